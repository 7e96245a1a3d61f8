"""Reductions: sum, mean, amax, amin, and the vector norms.

The rules are torch's (derivatives.yaml; ``norm_backward`` in FunctionsManual.cpp), so that values
at ties, at zero and of NaN are too. ``g`` is the gradient of the result; it and ``out``, the
result, are broadcast back along the reduced dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import COMPUTE_DTYPE, FLOATING, INTEGRAL, Number
from ..function import admit, apply, settle, vjp
from ..kernels import reduction as k
from ..launchers.pointwise import elementwise
from ..launchers.reduction import AMAX, AMIN, MEAN, SUM, reduce
from ..op import BackwardParams, Bind, Needs, Op, Spec, Tensors, Unsupported, register
from ..sampling import Make, Sample

Dim = int | Sequence[int] | None


class Params(NamedTuple):
    """What a reduction is beside its tensor.

    Attributes:
        dims: the reduced dimensions, not negative; none where nothing is reduced.
        keepdim: whether they stay, with size 1.
        result: dtype of the result, to which torch converts the input first.
        order: of a norm.
    """

    dims: tuple[int, ...]
    keepdim: bool
    result: torch.dtype
    order: float = 2.0


# ---------------------------------------------------------------------- reading torch's signatures


@lru_cache(maxsize=1024)
def _dims(rank: int, dims: tuple[Any, ...]) -> tuple[int, ...]:
    """Dimensions as a call gives them, wrapped and checked; none given means all of them."""
    found = []
    span = max(rank, 1)
    for d in dims:
        if type(d) is not int:
            raise Unsupported(f"dim is a {type(d).__name__}")
        if not -span <= d < span:
            raise Unsupported("dim out of range")
        found.append(d % span)
    if len(set(found)) < len(found):
        raise Unsupported("dim given twice")
    return tuple(sorted(found)) if rank and found else tuple(range(rank))


def _params(
    input: Tensor, dim: Dim, keepdim: bool, dtype: torch.dtype | None, order: float = 2.0
) -> Params:
    admit(input)
    result = input.dtype if dtype is None else dtype
    if result not in FLOATING:
        if result in INTEGRAL:
            raise Unsupported("integer result")
        raise Unsupported(f"dtype {str(result).removeprefix('torch.')}")
    if input.dtype not in FLOATING and input.dtype not in INTEGRAL:
        raise Unsupported(f"dtype {str(input.dtype).removeprefix('torch.')}")
    if type(keepdim) is not bool:
        raise Unsupported(f"keepdim is a {type(keepdim).__name__}")
    if dim is None:
        dim = ()
    elif type(dim) is int:
        dim = (dim,)
    elif not isinstance(dim, (tuple, list)):
        raise Unsupported(f"dim is a {type(dim).__name__}")
    return Params(_dims(input.dim(), tuple(dim)), keepdim, result, order)


def _refuse_empty(input: Tensor, dims: tuple[int, ...]) -> None:
    """An extremum of nothing is an error of torch's."""
    shape = input.shape
    if 0 in shape and any(shape[d] == 0 for d in dims):
        raise Unsupported("reduces an empty dimension")


def _bind_sum(
    input: Tensor, dim: Dim = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> tuple[Tensors, Params]:
    return (input,), _params(input, dim, keepdim, dtype)


def _bind_extremum(input: Tensor, dim: Dim = (), keepdim: bool = False) -> tuple[Tensors, Params]:
    params = _params(input, dim, keepdim, None)
    _refuse_empty(input, params.dims)
    return (input,), params


def _bind_vector_norm(
    input: Tensor,
    ord: Number = 2,
    dim: Dim = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensors, Params]:
    if type(ord) not in (int, float):
        raise Unsupported(f"order is a {type(ord).__name__}")
    params = _params(input, dim, keepdim, dtype, float(ord))
    if input.dtype is not params.result and (
        input.dtype not in FLOATING
        or torch.promote_types(input.dtype, params.result) is not params.result
    ):
        raise Unsupported("dtype would narrow the input")
    if ord < 0 or ord == math.inf:
        _refuse_empty(input, params.dims)
    return (input,), params


def _bind_norm(
    input: Tensor,
    p: Number | str | None = "fro",
    dim: Dim = None,
    keepdim: bool = False,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensors, Params]:
    if out is not None:
        raise Unsupported("out=")
    if p is None:
        p = 2
    elif isinstance(p, str):
        if p != "fro" or not (dim is None or isinstance(dim, int) or len(dim) <= 2):
            raise Unsupported("matrix norm")
        p = 2
    return _bind_vector_norm(input, p, dim, keepdim, dtype=dtype)


def _bind_norm_method(
    input: Tensor,
    p: Number | str | None = "fro",
    dim: Dim = None,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensors, Params]:
    return _bind_norm(input, p, dim, keepdim, None, dtype)


def _bind_linalg_norm(
    input: Tensor,
    ord: Number | str | None = None,
    dim: Dim = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensors, Params]:
    if not isinstance(input, Tensor):
        raise Unsupported(f"input is a {type(input).__name__}")
    # How many dimensions decide whether an order is a vector's or a matrix's.
    count = input.dim() if dim is None else 1 if isinstance(dim, int) else len(dim)
    if dim is not None and count not in (1, 2):
        raise Unsupported("norm over other than one or two dimensions")
    if ord is None:
        return _bind_vector_norm(input, 2, dim, keepdim, dtype=dtype)
    if count != 1:
        raise Unsupported("matrix norm")
    return _bind_vector_norm(input, ord, dim, keepdim, dtype=dtype)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------- common to the ops


def _restored(value: Tensor, params: Params) -> Tensor:
    """A result with its reduced dimensions back, so that it broadcasts with the input."""
    if not params.keepdim and value.dim():
        for d in params.dims:
            value = value.unsqueeze(d)
    return value


def _total(
    value: Tensor, params: Params, keepdim: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """Sum over the dimensions of a call; over none, where torch would take all."""
    if not params.dims:
        return value if dtype is None else value.to(dtype)
    return torch.sum(value, params.dims, keepdim, dtype=dtype)


def _shifted(params: Params) -> Params:
    """``params`` for an input with one more dimension, in front."""
    return params._replace(dims=tuple([d + 1 for d in params.dims]))


def _in_front(tensor: Tensor | None, dim: int | None) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)


def _reduction(
    name: str,
    *targets: Callable[..., Any],
    bind: Bind,
    forward: Callable[..., Tensor],
    rule: Any,
    samples: Callable[[Make], Iterator[Sample]],
    variants: Mapping[Callable[..., Any], Bind] | None = None,
    saves: Callable[[Params, Needs], tuple[int, ...]] = lambda params, needs: (0, 1),
    backward: Callable[..., Any] | None = None,
    jvp: Callable[..., Tensor],
    formula: str,
    opinfo: tuple[str, ...] | None = None,
    autocast: Mapping[str, str] | None = None,
) -> Op:
    """Make and register a reduction.

    Args:
        rule: ``(params, spec, g, x, out) -> dx``, the derivative in torch mathematics.
        backward: the same with kernels; None where the rule needs none.
        jvp: ``(op, params, x, out, tangent) -> tangent of the result``.
    """

    def full_rule(
        params: Params, needs: Needs, specs: tuple, grads: Tensors, saved: Tensors
    ) -> Tensors:
        return (rule(params, specs[0], grads[0], *saved),)

    def full_jvp(params: Params, tensors: Tensors, outputs: Tensors, tangents: Tensors) -> Tensor:
        assert tangents[0] is not None
        return jvp(op, params, *tensors, *outputs, settle(tangents[0]))

    def vmap(info: Any, params: Params, tensors: Tensors, dims: tuple) -> tuple[Tensor, int]:
        return apply(op, _shifted(params), (_in_front(tensors[0], dims[0]),)), 0

    op = Op(
        name=name,
        bind=bind,
        forward=forward,
        replaces=targets,
        variants=variants or {},
        saves=saves,
        rule=full_rule,
        backward=None if backward is None else _backward_op(name, full_rule, backward),
        jvp=full_jvp,
        vmap=vmap,
        autocast=autocast or {},
        opinfo=(name,) if opinfo is None else opinfo,
        kernels=("reduce",),
        formula=formula,
        dtypes=FLOATING,
        samples=samples,
        sources="torch derivatives.yaml",
        cost=_cost,
    )
    return register(op)


def _backward_op(name: str, rule: Any, backward: Callable[..., Any]) -> Op:
    """The op of ``(g, x, out)`` that computes the gradient of a reduction's input."""

    def forward(bp: BackwardParams, *tensors: Tensor | None) -> Any:
        return backward(bp.params, bp.specs[0], *tensors)

    def reference(bp: BackwardParams, g: Tensor, *saved: Tensor | None) -> Tensors:
        return rule(bp.params, bp.needs, bp.specs, (g,), saved)

    def vmap(info: Any, bp: BackwardParams, tensors: Tensors, dims: tuple) -> Any:
        spec = bp.specs[0]
        assert spec is not None
        spec = spec._replace(shape=torch.Size((info.batch_size, *spec.shape)))
        bp = bp._replace(params=_shifted(bp.params), specs=(spec,))
        batched = tuple(_in_front(t, d) for t, d in zip(tensors, dims, strict=True))
        return apply(op, bp, batched), 0

    op = Op(
        name=f"{name}_backward",
        bind=None,
        forward=forward,
        reference=reference,
        vmap=vmap,
        kernels=("reduce", "pointwise_dense", "pointwise_strided"),
        dtypes=FLOATING,
        formula=f"autograd through the rule of {name}",
    )
    return op


def _cost(params: Params, x: Tensor) -> tuple[int, int]:
    count = math.prod([x.shape[d] for d in params.dims])
    moved = x.numel() * x.element_size() + x.numel() // max(count, 1) * params.result.itemsize
    return moved, x.numel()


def _samples(low: float = -2.0) -> Callable[[Make], Iterator[Sample]]:
    """Calls that cross block boundaries in both directions, share rows, and are strided."""

    def samples(make: Make) -> Iterator[Sample]:
        def some(*shape: int) -> Tensor:
            return make(*shape, low=low)

        yield Sample((some(3, 5),), {}, "all")
        yield Sample((some(3, 5),), {"dim": 1}, "rows")
        yield Sample((some(3, 5),), {"dim": -2, "keepdim": True}, "columns, keepdim")
        yield Sample((some(2, 3, 4),), {"dim": (0, -1)}, "several dims")
        yield Sample((some(2, 3),), {"dim": (), "keepdim": True}, "dim=()")
        yield Sample((some(),), {}, "0-dim")
        yield Sample((some(7, 6).t(),), {"dim": 1}, "transposed")
        yield Sample((some(4, 9)[:, ::2],), {"dim": 1}, "every other column")
        yield Sample((some(3, 1).expand(3, 5),), {"dim": 1}, "expanded")
        yield Sample((some(2, 0, 3),), {"dim": 2}, "empty")
        yield Sample((some(2, 4099),), {"dim": 1}, "past one block of the reduced")
        yield Sample((some(3, 131),), {"dim": 0}, "past one block of the kept")
        yield Sample((some(8, 2, 257),), {"dim": (0, 2)}, "rows shared by several programs")

    return samples


def _total_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 0),), {"dim": 1}, "of nothing")
    yield from _samples()(make)
    yield Sample((make(3, 5),), {"dim": 1, "dtype": torch.float64}, "dtype")


# ------------------------------------------------------------------------------------ sum and mean


def _spread(params: Params, spec: Spec, g: Tensor) -> Tensor:
    # A view: converted while it is small, then every element reads the same memory.
    return _restored(g.to(spec.dtype), params).expand(spec.shape)


def _sum_rule(params: Params, spec: Spec, g: Tensor, x: None, out: None) -> Tensor:
    return _spread(params, spec, g)


def _mean_rule(params: Params, spec: Spec, g: Tensor, x: None, out: None) -> Tensor:
    return _spread(params, spec, g / _count(spec.shape, params))


def _count(shape: Sequence[int], params: Params) -> int:
    return math.prod([shape[d] for d in params.dims])


def _sum_forward(params: Params, x: Tensor) -> Tensor:
    return reduce(SUM, (x,), params.dims, params.keepdim, params.result, params.result)


def _mean_forward(params: Params, x: Tensor) -> Tensor:
    dims, keepdim, result, _ = params
    return reduce(
        MEAN, (x,), dims, keepdim, result, result, finish_params=(_count(x.shape, params),)
    )


def _linear_jvp(op: Op, params: Params, x: Tensor, out: Tensor, tangent: Tensor) -> Tensor:
    return apply(op, params, (tangent,))


def _saves_nothing(params: Params, needs: Needs) -> tuple[int, ...]:
    return ()


# --------------------------------------------------------------------------------- amax and amin


def _extremum_rule(params: Params, spec: Spec, g: Tensor, x: Tensor, out: Tensor) -> Tensor:
    hits = x == _restored(out, params)
    count = _total(hits, params, True, COMPUTE_DTYPE[spec.dtype])
    # Ties share evenly.
    return ((_restored(g, params) / count) * hits).to(spec.dtype)


def _extremum_backward(params: Params, spec: Spec, g: Tensor, x: Tensor, out: Tensor) -> Tensor:
    g, out = _restored(g, params), _restored(out, params)
    count = _hits(k.hit, params, x, out)
    return _pointwise(k.extremum_bwd, (g, x, out, count), params.result, spec.dtype)


def _hits(function: Any, params: Params, x: Tensor, out: Tensor) -> Tensor:
    """How many elements of each row of ``x`` are its extremum."""
    compute = COMPUTE_DTYPE[params.result]
    counting = SUM._replace(map=function)
    return reduce(counting, (x, out), params.dims, True, params.result, compute)


def _pointwise(
    function: Any,
    operands: tuple[Tensor, ...],
    result: torch.dtype,
    dtype: torch.dtype,
    consts: tuple[Number, ...] = (),
) -> Tensor:
    # Not rounded to the result's dtype: counts and scales would not fit the half types.
    (out,) = elementwise(function, 0, operands, (), consts, COMPUTE_DTYPE[result], (dtype,))
    assert out is not None
    return out


def _extremum_jvp(op: Op, params: Params, x: Tensor, out: Tensor, tangent: Tensor) -> Tensor:
    hits = x == _restored(out, params)
    compute = COMPUTE_DTYPE[params.result]
    total = _total(torch.where(hits, tangent, 0.0), params, params.keepdim, compute)
    return (total / _total(hits, params, params.keepdim, compute)).to(params.result)


# ------------------------------------------------------------------------------------ vector norms


def _norm_forward(params: Params, x: Tensor) -> Tensor:
    dims, keepdim, result, p = params
    map_params: tuple[float, ...] = ()
    finish_params: tuple[float, ...] = ()
    if p == 0:
        reduction = SUM._replace(map=k.nonzero)
    elif p == math.inf:
        reduction = AMAX._replace(map=k.absolute)
    elif p == -math.inf:
        reduction = AMIN._replace(map=k.absolute)
    elif p == 1 or all(x.shape[d] == 1 for d in dims):
        # A single element's norm is its absolute value, exactly.
        reduction = SUM._replace(map=k.absolute)
    elif p == 2:
        reduction = SUM._replace(map=k.square, finish=k.root)
    else:
        reduction = SUM._replace(map=k.absolute_power, finish=k.power)
        map_params, finish_params = (p,), (1 / p,)
    return reduce(reduction, (x,), dims, keepdim, result, result, map_params, finish_params)


def _norm_saves(params: Params, needs: Needs) -> tuple[int, ...]:
    return () if params.order == 0 else (0,) if params.order == 1 else (0, 1)


def _norm_rule(
    params: Params, spec: Spec, g: Tensor, x: Tensor | None, out: Tensor | None
) -> Tensor | None:
    if params.order == 0:
        return None  # a count: undefined, says torch
    assert x is not None
    x, g = x.to(params.result), _restored(g, params)
    if params.order == 1:
        dx = torch.sign(x) * g
    else:
        assert out is not None
        dx = _norm_slope(g, x, _restored(out, params), params)
    return dx.to(spec.dtype)


def _norm_slope(g: Tensor, x: Tensor, out: Tensor, params: Params) -> Tensor:
    p = params.order
    if p == 2:
        return g * torch.where(out == 0, 0.0, x / out)
    if math.isinf(p):
        hits = torch.abs(x) == out
        count = _total(hits, params, True, COMPUTE_DTYPE[params.result])
        # A NaN hits nothing; its row has gradient zero, not 0 / 0.
        count = torch.where(out != out, 1.0, count)
        return torch.sign(x) * ((g / count) * hits)
    if p < 1:
        slope = torch.sign(x) * torch.where(x == 0, 0.0, torch.abs(x) ** (p - 1))
        return slope * g * out ** (1 - p)
    scale = torch.where(out == 0, 0.0, g / out ** (p - 1))
    if p < 2:
        return torch.sign(x) * torch.abs(x) ** (p - 1) * scale
    return x * torch.abs(x) ** (p - 2) * scale


def _norm_backward(
    params: Params, spec: Spec, g: Tensor, x: Tensor | None, out: Tensor | None
) -> Tensor | None:
    p = params.order
    if p == 0:
        return None
    assert x is not None
    g = _restored(g, params)
    if p == 1:
        return _pointwise(k.norm_1_bwd, (g, x), params.result, spec.dtype)
    assert out is not None
    out = _restored(out, params)
    if p == 2:
        return _pointwise(k.norm_2_bwd, (g, x, out), params.result, spec.dtype)
    if math.isinf(p):
        count = _hits(k.absolute_hit, params, x, out)
        return _pointwise(k.norm_inf_bwd, (g, x, out, count), params.result, spec.dtype)
    compute = COMPUTE_DTYPE[params.result]
    if compute is not params.result:
        # out ** (p - 1) would multiply the rounding of a half precision result by p - 1.
        out = _norm_forward(params._replace(keepdim=True, result=compute), x)
    scale = _pointwise(k.norm_scale, (g, out), compute, compute, (p,))
    return _pointwise(k.norm_p_bwd, (scale, x), params.result, spec.dtype, (p,))


def _norm_jvp(op: Op, params: Params, x: Tensor, out: Tensor, tangent: Tensor) -> Tensor:
    if params.order == 0:
        return torch.zeros_like(out)
    # The gradient for g = 1 is the row of the Jacobian that the tangent meets.
    compute = COMPUTE_DTYPE[params.result]
    specs = (Spec(x.shape, compute),)
    (row,) = vjp(op, params, (True,), specs, (torch.ones_like(out),), (x, out), own_level=1)
    assert row is not None
    return _total(row * tangent, params, params.keepdim, compute).to(params.result)


def _norm_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 0), 3), {"dim": 1}, "of nothing")
    yield from _samples()(make)
    for order in (1, -math.inf, math.inf, 0.5, 1.5, 3, -1):
        yield Sample((make(3, 5), order), {"dim": 1}, f"order {order}")
    yield Sample((make(2, 3, 4), 3), {"dim": (0, 2), "keepdim": True}, "order 3, several dims")
    yield Sample((make(3, 1), 3), {"dim": 1}, "of one element")
    yield Sample((make(3, 5),), {"dim": 1, "dtype": torch.float64}, "dtype")


# ------------------------------------------------------------------------------------------- TABLE

T = Tensor
_linear: dict[str, Any] = {"jvp": _linear_jvp, "saves": _saves_nothing, "samples": _total_samples}
_extremum: dict[str, Any] = {
    "bind": _bind_extremum,
    "rule": _extremum_rule,
    "backward": _extremum_backward,
    "jvp": _extremum_jvp,
    "samples": _samples(),
    "formula": "dx = g / sum(x == out) * (x == out)",
}
_norm: dict[str, Any] = {
    "forward": _norm_forward,
    "saves": _norm_saves,
    "rule": _norm_rule,
    "backward": _norm_backward,
    "jvp": _norm_jvp,
    "samples": _norm_samples,
    "formula": "dx = g * sign(x) * (abs(x) / out) ** (p - 1)",
    "autocast": {"cuda": "float32"},
}

_reduction(
    "sum", torch.sum, T.sum,
    bind=_bind_sum, forward=_sum_forward, rule=_sum_rule, **_linear,
    formula="dx = g",
    autocast={"cuda": "float32"},
)  # fmt: skip
_reduction(
    "mean", torch.mean, T.mean,
    bind=_bind_sum, forward=_mean_forward, rule=_mean_rule, **_linear,
    formula="dx = g / n",
)  # fmt: skip
_reduction(
    "amax", torch.amax, T.amax,
    forward=lambda params, x: reduce(
        AMAX, (x,), params.dims, params.keepdim, params.result, params.result
    ),
    **_extremum,
)  # fmt: skip
_reduction(
    "amin", torch.amin, T.amin,
    forward=lambda params, x: reduce(
        AMIN, (x,), params.dims, params.keepdim, params.result, params.result
    ),
    **_extremum,
)  # fmt: skip
_reduction(
    "vector_norm", torch.linalg.vector_norm,
    bind=_bind_vector_norm, **_norm,
    opinfo=("linalg.vector_norm",),
)  # fmt: skip
_reduction(
    "norm", torch.norm,
    bind=_bind_norm,
    variants={T.norm: _bind_norm_method, torch.linalg.norm: _bind_linalg_norm},
    **_norm,
    opinfo=("norm", "norm.fro", "norm.inf", "linalg.norm", "linalg.norm.subgradients_at_zero"),
)  # fmt: skip
