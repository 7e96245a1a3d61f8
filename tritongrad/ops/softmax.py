"""``softmax`` and ``log_softmax``: a kernel for the value, the gradient, and its gradient in turn.

The formulas, in the notation of ``kernels/softmax.py``, are evaluated in three ways: by kernels
that hold a whole row, by a reduction and a pointwise kernel where rows are longer than that, and in
torch mathematics, from which third orders and forward mode come.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..admission import admit, settle, transforming
from ..dispatch import apply
from ..dtypes import COMPUTE_DTYPE, FLOATING, INTEGRAL
from ..function import vjp
from ..kernels import reduction as reduction_kernels
from ..kernels import softmax as k
from ..launchers import rowwise
from ..launchers.pointwise import elementwise
from ..launchers.reduction import PRODUCT, SUM, Reduction, plan, reduce, run_many
from ..layout import batched
from ..op import BackwardParams, Bind, Needs, Op, Spec, Tensors, Unsupported, register
from ..sampling import Make, Sample

F = torch.nn.functional
T = Tensor

EXPONENTIALS = Reduction(
    reduction_kernels.exponential, reduction_kernels.add_exponentials, (-float("inf"), 0.0)
)
"""The largest element of a row, and the sum of exponentials relative to it."""
PROBABILITIES = SUM.but(map=k.product_exponential)
"""<v, exp(y)>"""


class Params(NamedTuple):
    """What a call is beside its tensor.

    Attributes:
        dims: the one that rows lie along, not negative; none for a number.
        result: dtype of the result, to which torch converts the input first.
        specs: of the tensor, and
        plan: the launch for it, None for long rows; neither under a transform.
    """

    dims: tuple[int, ...]
    result: torch.dtype
    specs: tuple[Spec] | None = None
    plan: rowwise.Plan | None = None


class Formulas(NamedTuple):
    """One of the two functions. Each field but the last two is a pair of device functions: of whole
    rows, and of elements with the row sums that ``*_sums`` compute."""

    value: tuple[Any, Any]
    gradient: tuple[Any, Any]
    second: tuple[Any, Any]
    gradient_sums: Callable[..., tuple[Tensor, ...]]
    second_sums: Callable[..., tuple[Tensor, ...]]
    rule: Callable[..., Tensor]
    second_rule: Callable[..., tuple[Tensor, Tensor]]


# ---------------------------------------------------------------------- reading torch's signatures


def _reader(formulas: Formulas) -> Callable[[Tensor, Any, torch.dtype | None], Params]:
    """How calls of one function are read and planned."""

    def read(input: Tensor, dim: Any, dtype: torch.dtype | None) -> Params:
        admit(input)
        if type(dim) is not int:
            raise Unsupported(f"dim={dim!r}")
        params = _params(input.dim(), input.dtype, dim, dtype)
        if transforming():
            return params
        shape, strides = input.shape, input.stride()
        launch = rowwise.plan(
            formulas.value[0], (shape,), (strides,), params.dims, params.result, input.get_device()
        )
        return params._replace(specs=(Spec(shape, input.dtype),), plan=launch)

    return read


def _params(rank: int, own: torch.dtype, dim: int, dtype: torch.dtype | None) -> Params:
    span = max(rank, 1)
    if not -span <= dim < span:
        raise Unsupported("dim out of range")
    result = own if dtype is None else dtype
    if result not in FLOATING or own not in FLOATING | INTEGRAL:
        raise Unsupported(f"dtype {str(result).removeprefix('torch.')}")
    return Params((dim % span,) if rank else (), result)


# -------------------------------------------------------------------------------------- the kernels


def _exact(
    function: Any, operands: tuple[Tensor, ...], dtypes: tuple[torch.dtype | None, ...]
) -> tuple[Tensor | None, ...]:
    """Elements of long rows, computed with row sums that must not be rounded to a half type."""
    compute = COMPUTE_DTYPE[operands[0].dtype]
    return tuple(elementwise(function, 0, operands, (), (), compute, dtypes))


def _rows(
    functions: tuple[Any, Any],
    sums: Callable[..., tuple[Tensor, ...]],
    params: Params,
    operands: tuple[Tensor, ...],
    dtypes: tuple[torch.dtype | None, ...],
) -> tuple[Tensor | None, ...]:
    """A function of whole rows, or of elements where they are too long."""
    launch = rowwise.plan(
        functions[0],
        tuple([t.shape for t in operands]),
        tuple([t.stride() for t in operands]),
        params.dims,
        params.result,
        operands[0].get_device(),
        len(dtypes),
    )
    if launch is not None:
        return rowwise.run(launch, operands, dtypes)
    return _exact(functions[1], (*operands, *sums(params, *operands)), dtypes)


def _exponentials(params: Params, x: Tensor) -> tuple[Tensor, ...]:
    compute = COMPUTE_DTYPE[params.result]
    launch = plan(
        EXPONENTIALS, (x.shape,), (x.stride(),), params.dims, True, params.result, x.get_device()
    )
    return run_many(launch, (x,), (compute, compute))  # type: ignore[return-value]


def _sum(kind: Reduction, params: Params, *operands: Tensor) -> Tensor:
    compute = COMPUTE_DTYPE[params.result]
    return reduce(kind, operands, params.dims, True, params.result, compute)


# ------------------------------------------------------------------------------- torch mathematics


def _total(value: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Row sums; over no dimension, where torch would take all."""
    return value.sum(dims, keepdim=True) if dims else value


def _softmax_rule(g: Tensor, y: Tensor, dims: tuple[int, ...]) -> Tensor:
    return y * (g - _total(g * y, dims))


def _softmax_second(
    v: Tensor, g: Tensor, y: Tensor, dims: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    vy = _total(v * y, dims)
    return y * (v - vy), v * (g - _total(g * y, dims)) - g * vy


def _log_softmax_rule(g: Tensor, y: Tensor, dims: tuple[int, ...]) -> Tensor:
    return g - torch.exp(y) * _total(g, dims)


def _log_softmax_second(
    v: Tensor, g: Tensor, y: Tensor, dims: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    vp = v * torch.exp(y)
    return v - _total(vp, dims), -vp * _total(g, dims)


SOFTMAX = Formulas(
    value=(k.softmax_row, k.softmax),
    gradient=(k.softmax_bwd_row, k.softmax_bwd),
    second=(k.softmax_bwd_bwd_row, k.softmax_bwd_bwd),
    gradient_sums=lambda params, g, y: (_sum(PRODUCT, params, g, y),),
    second_sums=lambda params, v, g, y: (
        _sum(PRODUCT, params, v, y),
        _sum(PRODUCT, params, g, y),
    ),
    rule=_softmax_rule,
    second_rule=_softmax_second,
)
LOG_SOFTMAX = Formulas(
    value=(k.log_softmax_row, k.log_softmax),
    gradient=(k.log_softmax_bwd_row, k.log_softmax_bwd),
    second=(k.log_softmax_bwd_bwd_row, k.log_softmax_bwd_bwd),
    gradient_sums=lambda params, g, y: (_sum(SUM, params, g),),
    second_sums=lambda params, v, g, y: (
        _sum(PROBABILITIES, params, v, y),
        _sum(SUM, params, g),
    ),
    rule=_log_softmax_rule,
    second_rule=_log_softmax_second,
)

# ----------------------------------------------------------------------------------- made into ops


def _shifted(params: Any) -> Any:
    """``params``, or those of a backward op, for tensors with one more dimension, in front."""
    if isinstance(params, BackwardParams):
        return params._replace(params=_shifted(params.params))
    return params._replace(dims=tuple([d + 1 for d in params.dims]), specs=None, plan=None)


def _vmap_of(op: Callable[[], Op]) -> Callable[..., Any]:
    """The vmap rule of each op here: a batch is one more dimension of rows."""

    def vmap(info: Any, params: Any, tensors: Tensors, dims: tuple) -> Any:
        found = apply(op(), _shifted(params), batched(tensors, dims, info.batch_size))
        return (found, (0,) * len(found)) if type(found) is tuple else (found, 0)

    return vmap


def _second_op(name: str, formulas: Formulas) -> Op:
    """The op of ``(v, g, x, y, dx)`` that computes the gradients of ``g`` and ``y``."""

    def wanted(bp: BackwardParams, found: tuple[Tensor | None, ...]) -> Any:
        kept = tuple([t for t, need in zip(found, bp.needs[::2], strict=False) if need])
        return kept[0] if len(kept) == 1 else kept

    def forward(bp: BackwardParams, v: Tensor, g: Tensor, x: None, y: Tensor, dx: None) -> Any:
        dtypes = tuple([s.dtype if n and s else None for n, s in _pairs(bp)])
        params = bp.params.params
        return wanted(bp, _rows(formulas.second, formulas.second_sums, params, (v, g, y), dtypes))

    def reference(bp: BackwardParams, *tensors: Tensor | None) -> Tensors:
        return tuple([t for t in _second_rule(formulas, bp, *tensors) if t is not None])

    op = Op(
        name=f"{name}_backward_backward",
        bind=None,
        forward=forward,
        outputs=2,
        reference=reference,
        vmap=_vmap_of(lambda: op),
        kernels=KERNELS,
        dtypes=FLOATING,
        formula=f"autograd through the rule of {name}_backward",
    )
    return op


def _pairs(bp: BackwardParams) -> tuple[tuple[bool, Spec | None], ...]:
    """Need and spec of ``g`` and of ``y``, the first and the third tensor of a backward op."""
    return (bp.needs[0], bp.specs[0]), (bp.needs[2], bp.specs[2])


def _second_rule(
    formulas: Formulas, bp: BackwardParams, v: Any, g: Any, x: Any, y: Any, dx: Any
) -> Tensors:
    found = formulas.second_rule(v, g, y, bp.params.params.dims)
    dg, dy = [
        t.to(s.dtype) if n and s else None for t, (n, s) in zip(found, _pairs(bp), strict=True)
    ]
    return dg, None, dy


def _backward_op(name: str, formulas: Formulas) -> Op:
    """The op of ``(g, x, y)`` that computes the gradient of ``x``, which it needs no value of."""

    def forward(bp: BackwardParams, g: Tensor, x: None, y: Tensor) -> Any:
        (spec,) = bp.specs
        assert spec is not None
        found = _rows(formulas.gradient, formulas.gradient_sums, bp.params, (g, y), (spec.dtype,))
        return found[0]

    def reference(bp: BackwardParams, g: Tensor, x: None, y: Tensor) -> Tensors:
        (spec,) = bp.specs
        assert spec is not None
        return (formulas.rule(g, y, bp.params.dims).to(spec.dtype),)

    def rule(
        bp: BackwardParams, needs: Needs, specs: tuple, grads: Tensors, saved: Tensors
    ) -> Tensors:
        above = BackwardParams(bp, needs, specs)
        return _second_rule(formulas, above, *grads, *saved)

    op = Op(
        name=f"{name}_backward",
        bind=None,
        forward=forward,
        rule=rule,
        reference=reference,
        backward=_second_op(name, formulas),
        vmap=_vmap_of(lambda: op),
        kernels=KERNELS,
        dtypes=FLOATING,
        formula=f"autograd through the rule of {name}",
    )
    return op


KERNELS = ("rowwise", "reduce", "pointwise_dense", "pointwise_strided")


def _make(
    name: str,
    formulas: Formulas,
    *targets: Callable[..., Any],
    functional: Callable[..., Any],
    opinfo: tuple[str, ...],
    formula: str,
) -> Op:
    read = _reader(formulas)

    def bind(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> tuple[Tensors, Params]:
        return (input,), read(input, dim, dtype)

    def forward(params: Params, x: Tensor) -> Tensor:
        if params.plan is not None:
            (y,) = rowwise.run(params.plan, (x,), (params.result,))
        else:
            (y,) = _rows(formulas.value, _exponentials, params, (x,), (params.result,))
        assert y is not None
        return y

    def rule(params: Params, needs: Needs, specs: tuple, grads: Tensors, saved: Tensors) -> Tensors:
        (g,), (_, y) = grads, saved
        return (formulas.rule(g, y, params.dims).to(specs[0].dtype),)

    def jvp(params: Params, tensors: Tensors, outputs: Tensors, tangents: Tensors) -> Tensor:
        (x,), (y,), (tangent,) = tensors, outputs, tangents
        assert x is not None
        assert y is not None
        assert tangent is not None
        result, compute = params.result, COMPUTE_DTYPE[params.result]
        if compute is not result:
            # The rounding of a half precision result would be in each term.
            y = targets[0](x, params.dims[0] if params.dims else 0, dtype=compute)
            params = Params(params.dims, compute)
        tangent = settle(tangent).to(compute)
        if formulas is SOFTMAX:
            # Its Jacobian is symmetric, so that the gradient's kernel computes tangents, too.
            specs = (Spec(y.shape, compute),)
            (found,) = vjp(op, params, (True,), specs, (tangent,), (None, y), own_level=1)
            assert found is not None
            return found.to(result)
        return (tangent - _total(torch.exp(y) * tangent, params.dims)).to(result)

    op = Op(
        name=name,
        bind=bind,
        forward=forward,
        replaces=targets,
        variants={functional: _functional(read)},
        schema="(Tensor input, int dim, ScalarType? dtype=None) -> Tensor",
        compiles=lambda input, dim, dtype=None: type(dim) is int,
        spelling=(functional, _spelled),
        saves=lambda params, needs: (1,),
        specs=operator.attrgetter("specs"),
        rule=rule,
        backward=_backward_op(name, formulas),
        jvp=jvp,
        vmap=_vmap_of(lambda: op),
        autocast={"cuda": "float32"},
        opinfo=opinfo,
        kernels=KERNELS,
        formula=formula,
        dtypes=FLOATING,
        samples=_samples,
        sources="torch derivatives.yaml; see kernels/softmax.py",
        cost=_cost,
    )
    return register(op)


def _functional(read: Any) -> Bind:
    def bind(
        input: Tensor,
        dim: int | None = None,
        _stacklevel: int = 3,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensors, Params]:
        return (input,), read(input, dim, dtype)

    return bind


def _spelled(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> tuple | None:
    return None if dim is None else (input, dim, dtype)


def _cost(params: Params, x: Tensor) -> tuple[int, int]:
    return x.numel() * (x.element_size() + params.result.itemsize), 5 * x.numel()


def _samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 5), 1), {}, "rows")
    yield Sample((make(3, 5), 0), {}, "columns")
    yield Sample((make(2, 3, 4), -2), {}, "inner dim")
    yield Sample((make(), 0), {}, "0-dim")
    yield Sample((make(7, 6).t(), 1), {}, "transposed")
    yield Sample((make(4, 9)[:, ::2], 1), {}, "every other column")
    yield Sample((make(3, 1).expand(-1, 4), 1), {}, "expanded")
    yield Sample((make(2, 0, 3), 2), {}, "no rows")
    yield Sample((make(2, 0), 1), {}, "rows of nothing")
    yield Sample((make(3, 5), 1), {"dtype": torch.float64}, "dtype")
    yield Sample((make(5, 1031), 1), {}, "several rows a program")
    yield Sample((make(2, 33000), 1), {}, "longer than a program holds")


# ------------------------------------------------------------------------------------------- TABLE

_make(
    "softmax", SOFTMAX, torch.softmax, torch.special.softmax, T.softmax,
    functional=F.softmax,
    opinfo=("softmax", "softmax.with_dtype"),
    formula="dx = out * (g - sum(g * out))",
)  # fmt: skip
_make(
    "log_softmax", LOG_SOFTMAX, torch.log_softmax, torch.special.log_softmax, T.log_softmax,
    functional=F.log_softmax,
    opinfo=("log_softmax", "log_softmax.with_dtype"),
    formula="dx = g - exp(out) * sum(g)",
)  # fmt: skip
