"""Reductions: sum, mean, amax and amin, and what the vector norms share with them.

The rules are torch's (derivatives.yaml), so that values at ties and of NaN are too. ``g`` is the
gradient of the result; it and ``out``, the result, are broadcast back along the reduced dimensions.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import COMPUTE_DTYPE, FLOATING, INTEGRAL, Number
from ..function import admit, apply, settle, transforming
from ..kernels import reduction as k
from ..launchers.pointwise import elementwise
from ..launchers.reduction import AMAX, AMIN, MEAN, SUM, Plan, Reduction, plan, reduce, run
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
        specs: of the tensor, and
        plan: the launch for it; neither under a transform, where the kernel will meet another.
    """

    dims: tuple[int, ...]
    keepdim: bool
    result: torch.dtype
    order: float = 2.0
    specs: tuple[Spec] | None = None
    plan: Plan | None = None


class Kind(NamedTuple):
    """The reduction that a call is, with further arguments of its map and of its finish."""

    reduction: Reduction
    map_params: tuple[Number, ...] = ()
    finish_params: tuple[Number, ...] = ()


KindOf = Callable[[float, int], Kind]
"""Which one, of the order and the number of elements that are reduced into one; raises Unsupported
where torch has none."""


def refuse_empty(count: int) -> None:
    """An extremum of nothing is an error of torch's."""
    if not count:
        raise Unsupported("reduces an empty dimension")


# ---------------------------------------------------------------------- reading torch's signatures


@lru_cache(maxsize=1024)
def _dims(rank: int, dims: tuple[int, ...]) -> tuple[int, ...]:
    """Dimensions as a call gives them, wrapped and checked; none given means all of them."""
    span = max(rank, 1)
    if rank > 64:
        raise Unsupported("more than 64 dimensions")
    if any(not -span <= d < span for d in dims):
        raise Unsupported("dim out of range")
    found = sorted({d % span for d in dims})
    if len(found) < len(dims):
        raise Unsupported("dim given twice")
    return tuple(found) if rank and found else tuple(range(rank))


def read(
    input: Tensor,
    dim: Dim,
    keepdim: bool,
    dtype: torch.dtype | None,
    kind_of: KindOf,
    order: float = 2.0,
) -> Params:
    """Params of a call, checked."""
    admit(input)
    # Types first: to a cache, True is 1.
    if type(dim) is not int and dim is not None:
        if not isinstance(dim, (tuple, list)) or not all(type(d) is int for d in dim):
            raise Unsupported(f"dim={dim!r}")
        dim = tuple(dim)
    if type(keepdim) is not bool:
        raise Unsupported(f"keepdim is a {type(keepdim).__name__}")
    if transforming():
        return _params(kind_of, input.shape, input.dtype, dim, keepdim, dtype, order)[0]
    return _params_and_plan(
        kind_of, input.shape, input.stride(), input.dtype, input.get_device(),
        dim, keepdim, dtype, order,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _params_and_plan(
    kind_of: KindOf,
    shape: torch.Size,
    strides: tuple[int, ...],
    own: torch.dtype,
    device: int,
    dim: Dim,
    keepdim: bool,
    dtype: torch.dtype | None,
    order: float,
) -> Params:
    params, kind = _params(kind_of, shape, own, dim, keepdim, dtype, order)
    reduction, before, after = kind
    launch = plan(
        reduction, (shape,), (strides,), params.dims, keepdim, params.result, device, before, after
    )
    return params._replace(specs=(Spec(shape, own),), plan=launch)


def _params(
    kind_of: KindOf,
    shape: torch.Size,
    own: torch.dtype,
    dim: Dim,
    keepdim: bool,
    dtype: torch.dtype | None,
    order: float,
) -> tuple[Params, Kind]:
    result = own if dtype is None else dtype
    if result not in FLOATING:
        if result in INTEGRAL:
            raise Unsupported("integer result")
        raise Unsupported(f"dtype {str(result).removeprefix('torch.')}")
    if own not in FLOATING and own not in INTEGRAL:
        raise Unsupported(f"dtype {str(own).removeprefix('torch.')}")
    dims: tuple[int, ...] = () if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    params = Params(_dims(len(shape), dims), keepdim, result, order)
    return params, kind_of(order, count_of(shape, params.dims))


# The default of an argument without which torch reads a call differently.
_OMITTED: Any = object()


def bind_total(kind_of: KindOf) -> Bind:
    """The signature of sum and mean."""

    def bind(
        input: Tensor,
        dim: Dim = _OMITTED,
        keepdim: bool = _OMITTED,
        *,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensors, Params]:
        if dim is _OMITTED:
            if keepdim is not _OMITTED:
                raise Unsupported("keepdim without dim")
            dim = None
        keep = keepdim is not _OMITTED and keepdim
        return (input,), read(input, dim, keep, dtype, kind_of)

    return bind


def bind_extremum(kind_of: KindOf) -> Bind:
    """The signature of amax and amin."""

    def bind(input: Tensor, dim: Dim = (), keepdim: bool = False) -> tuple[Tensors, Params]:
        return (input,), read(input, dim, keepdim, None, kind_of)

    return bind


# ------------------------------------------------------------------------------- common to the ops


def restored(value: Tensor, params: Params) -> Tensor:
    """A result with its reduced dimensions back, so that it broadcasts with the input."""
    if not params.keepdim and value.dim():
        for d in params.dims:
            value = value.unsqueeze(d)
    return value


def total_of(
    value: Tensor, params: Params, keepdim: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """Sum over the dimensions of a call; over none, where torch would take all."""
    if not params.dims:
        return value if dtype is None else value.to(dtype)
    return torch.sum(value, params.dims, keepdim, dtype=dtype)


def count_of(shape: Sequence[int], dims: tuple[int, ...]) -> int:
    """Number of elements that are reduced into one."""
    return math.prod([shape[d] for d in dims])


def value_of(kind_of: KindOf, params: Params, x: Tensor) -> Tensor:
    """The reduction of a tensor other than the one that a call was read for."""
    dims, keepdim, result, order = params[:4]
    kind, before, after = kind_of(order, count_of(x.shape, dims))
    return reduce(kind, (x,), dims, keepdim, result, result, before, after)


def _shifted(params: Params) -> Params:
    """``params`` for an input with one more dimension, in front."""
    return params._replace(dims=tuple([d + 1 for d in params.dims]))


def _in_front(tensor: Tensor | None, dim: int | None) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)


def reduction(
    name: str,
    *targets: Callable[..., Any],
    bind: Bind,
    kind_of: KindOf,
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
        bind: reads calls for the same ``kind_of``.
        rule: ``(params, spec, g, x, out) -> dx``, the derivative in torch mathematics.
        backward: the same with kernels; None where the rule needs none.
        jvp: ``(op, params, x, out, tangent) -> tangent of the result``.
    """

    def forward(params: Params, x: Tensor) -> Tensor:
        if params.plan is not None:
            return run(params.plan, (x,), params.result)
        return value_of(kind_of, params, x)

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
        specs=operator.attrgetter("specs"),
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
    rows = x.numel() // max(count_of(x.shape, params.dims), 1)
    moved = x.numel() * x.element_size() + rows * params.result.itemsize
    return moved, x.numel()


def standard_samples(make: Make) -> Iterator[Sample]:
    """Calls that cross block boundaries in both directions, share rows, and are strided."""
    yield Sample((make(3, 5),), {}, "all")
    yield Sample((make(3, 5),), {"dim": 1}, "rows")
    yield Sample((make(3, 5),), {"dim": -2, "keepdim": True}, "columns, keepdim")
    yield Sample((make(2, 3, 4),), {"dim": (0, -1)}, "several dims")
    yield Sample((make(2, 3),), {"dim": (), "keepdim": True}, "dim=()")
    yield Sample((make(),), {}, "0-dim")
    yield Sample((make(7, 6).t(),), {"dim": 1}, "transposed")
    yield Sample((make(4, 9)[:, ::2],), {"dim": 1}, "every other column")
    yield Sample((make(2, 0, 3),), {"dim": 2}, "empty")
    yield Sample((make(2, 4099),), {"dim": 1}, "past one block of the reduced")
    yield Sample((make(3, 131),), {"dim": 0}, "past one block of the kept")
    yield Sample((make(8, 2, 257),), {"dim": (0, 2)}, "rows shared by several programs")


def _total_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 0),), {"dim": 1}, "of nothing")
    yield from standard_samples(make)
    yield Sample((make(3, 5),), {"dim": 1, "dtype": torch.float64}, "dtype")


# ------------------------------------------------------------------------------------ sum and mean


def _spread(params: Params, spec: Spec, g: Tensor) -> Tensor:
    # A view, unless dtype= was given. Converted after it is expanded, as torch does: the derivative
    # of this sums what has not been rounded to the input's dtype yet.
    return restored(g, params).expand(spec.shape).to(spec.dtype)


def _sum_rule(params: Params, spec: Spec, g: Tensor, x: None, out: None) -> Tensor:
    return _spread(params, spec, g)


def _mean_rule(params: Params, spec: Spec, g: Tensor, x: None, out: None) -> Tensor:
    # Of no elements each gets nothing, and no number is divided by 0 on the way.
    return _spread(params, spec, g / max(count_of(spec.shape, params.dims), 1))


def _linear_jvp(op: Op, params: Params, x: Tensor, out: Tensor, tangent: Tensor) -> Tensor:
    if not params.dims:
        return tangent.to(params.result)
    # By torch's name rather than by apply(): a tangent may be zeros that were never stored.
    return op.replaces[0](tangent, params.dims, params.keepdim, dtype=params.result)


def _saves_nothing(params: Params, needs: Needs) -> tuple[int, ...]:
    return ()


# --------------------------------------------------------------------------------- amax and amin


def _extremum_rule(params: Params, spec: Spec, g: Tensor, x: Tensor, out: Tensor) -> Tensor:
    hits = x == restored(out, params)
    count = total_of(hits, params, True, COMPUTE_DTYPE[spec.dtype])
    # Ties share evenly.
    return ((restored(g, params) / count) * hits).to(spec.dtype)


def _extremum_backward(params: Params, spec: Spec, g: Tensor, x: Tensor, out: Tensor) -> Tensor:
    g, out = restored(g, params), restored(out, params)
    count = hits_per_row(k.hit, params, x, out)
    return exact_pointwise(k.extremum_bwd, (g, x, out, count), params.result, spec.dtype)


@cache
def _counting(function: Any) -> Reduction:
    return SUM.but(map=function)


def hits_per_row(function: Any, params: Params, x: Tensor, out: Tensor) -> Tensor:
    """How many elements of each row of ``x`` are its extremum."""
    compute = COMPUTE_DTYPE[params.result]
    return reduce(_counting(function), (x, out), params.dims, True, params.result, compute)


def exact_pointwise(
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
    hits = x == restored(out, params)
    compute = COMPUTE_DTYPE[params.result]
    total = total_of(torch.where(hits, tangent, 0.0), params, params.keepdim, compute)
    return (total / total_of(hits, params, params.keepdim, compute)).to(params.result)


# ------------------------------------------------------------------------------------------- TABLE

T = Tensor


def _sum(order: float, count: int) -> Kind:
    return Kind(SUM)


def _mean(order: float, count: int) -> Kind:
    return Kind(MEAN, (), (count,))


def _amax(order: float, count: int) -> Kind:
    refuse_empty(count)
    return Kind(AMAX)


def _amin(order: float, count: int) -> Kind:
    refuse_empty(count)
    return Kind(AMIN)


_linear: dict[str, Any] = {"jvp": _linear_jvp, "saves": _saves_nothing, "samples": _total_samples}
_extremum: dict[str, Any] = {
    "rule": _extremum_rule,
    "backward": _extremum_backward,
    "jvp": _extremum_jvp,
    "samples": standard_samples,
    "formula": "dx = g / sum(x == out) * (x == out)",
}
reduction(
    "sum", torch.sum, T.sum,
    bind=bind_total(_sum), kind_of=_sum, rule=_sum_rule, **_linear,
    formula="dx = g",
    autocast={"cuda": "float32"},
)  # fmt: skip
reduction(
    "mean", torch.mean, T.mean,
    bind=bind_total(_mean), kind_of=_mean, rule=_mean_rule, **_linear,
    formula="dx = g / n",
)  # fmt: skip
reduction("amax", torch.amax, T.amax, bind=bind_extremum(_amax), kind_of=_amax, **_extremum)
reduction("amin", torch.amin, T.amin, bind=bind_extremum(_amin), kind_of=_amin, **_extremum)
