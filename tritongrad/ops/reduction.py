"""What reductions share: reading their calls, the record of one, its backward op and forward mode.

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

from ..admission import admit, settle, transforming
from ..dispatch import apply
from ..dtypes import COMPUTE_DTYPE, FLOATING, INTEGRAL, Number
from ..function import vjp
from ..launchers.pointwise import elementwise
from ..launchers.reduction import (
    SUM,
    Plan,
    Reduction,
    plan,
    plan_for,
    reduce,
    run,
    run_many,
)
from ..layout import batched
from ..op import BackwardParams, Bind, Needs, Op, Spec, Tensors, Unsupported, register
from ..sampling import Make, Sample

Dim = int | Sequence[int] | None


class Params(NamedTuple):
    """What a reduction is beside its tensor.

    Attributes:
        dims: the reduced dimensions, not negative; none where nothing is reduced.
        keepdim: whether they stay, with size 1.
        result: dtype of the result, to which torch converts the input first.
        number: order of a norm, correction of a variance.
        specs: of the tensor, and
        plan: the launch for it; neither under a transform, where the kernel will meet another.
    """

    dims: tuple[int, ...]
    keepdim: bool
    result: torch.dtype
    number: float = 0.0
    specs: tuple[Spec] | None = None
    plan: Plan | None = None


class Kind(NamedTuple):
    """The reduction that a call is, with further arguments of its map and of its finish."""

    reduction: Reduction
    map_params: tuple[Number, ...] = ()
    finish_params: tuple[Number, ...] = ()


KindOf = Callable[[float, int], Kind]
"""Which one, of ``Params.number`` and the count of elements that become one; raises Unsupported
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
    number: float = 0.0,
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
        return _params(kind_of, input.shape, input.dtype, dim, keepdim, dtype, number)[0]
    return _params_and_plan(
        kind_of, input.shape, input.stride(), input.dtype, input.get_device(),
        dim, keepdim, dtype, number,
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
    number: float,
) -> Params:
    params, kind = _params(kind_of, shape, own, dim, keepdim, dtype, number)
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
    number: float,
) -> tuple[Params, Kind]:
    result = own if dtype is None else dtype
    if result not in FLOATING:
        if result in INTEGRAL:
            raise Unsupported("integer result")
        raise Unsupported(f"dtype {str(result).removeprefix('torch.')}")
    if own not in FLOATING and own not in INTEGRAL:
        raise Unsupported(f"dtype {str(own).removeprefix('torch.')}")
    dims: tuple[int, ...] = () if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    params = Params(_dims(len(shape), dims), keepdim, result, number)
    return params, kind_of(number, count_of(shape, params.dims))


# The default of an argument without which torch reads a call differently.
OMITTED: Any = object()


def bind_total(kind_of: KindOf) -> Bind:
    """The signature of sum and mean."""

    def bind(
        input: Tensor,
        dim: Dim = OMITTED,
        keepdim: bool = OMITTED,
        *,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensors, Params]:
        if dim is OMITTED:
            if keepdim is not OMITTED:
                raise Unsupported("keepdim without dim")
            dim = None
        keep = keepdim is not OMITTED and keepdim
        return (input,), read(input, dim, keep, dtype, kind_of)

    return bind


# ------------------------------------------------------------------------------- common to the ops


def restored(value: Tensor, params: Any) -> Tensor:
    """A result with its reduced dimensions back, so that it broadcasts with the input."""
    if not params.keepdim and value.dim():
        for d in params.dims:
            value = value.unsqueeze(d)
    return value


def total_of(value: Tensor, params: Any, keepdim: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Sum over the dimensions of a call; over none, where torch would take all."""
    if not params.dims:
        return value if dtype is None else value.to(dtype)
    return torch.sum(value, params.dims, keepdim, dtype=dtype)


def count_of(shape: Sequence[int], dims: tuple[int, ...]) -> int:
    """Number of elements that are reduced into one."""
    return math.prod([shape[d] for d in dims])


def value_of(kind_of: KindOf, params: Params, x: Tensor) -> Tensor:
    """The reduction of a tensor other than the one that a call was read for."""
    return run(_plan_of(kind_of, params, x), (x,), params.result)


def _plan_of(kind_of: KindOf, params: Params, x: Tensor) -> Plan:
    dims, keepdim, result, number = params[:4]
    kind, before, after = kind_of(number, count_of(x.shape, dims))
    return plan_for((x,), kind, dims, keepdim, result, before, after)


def shifted(params: Any) -> Any:
    """``params`` for an input with one more dimension, in front."""
    return params._replace(dims=tuple([d + 1 for d in params.dims]))


def reduction(
    name: str,
    *targets: Callable[..., Any],
    bind: Bind,
    kind_of: KindOf,
    samples: Callable[[Make], Iterator[Sample]],
    rule: Any = None,
    variants: Mapping[Callable[..., Any], Bind] | None = None,
    saves: Callable[[Params, Needs], tuple[int, ...]] = lambda params, needs: (0, 1),
    backward: Callable[..., Any] | None = None,
    jvp: Callable[..., Any] | None = None,
    formula: str = "",
    overloads: tuple[Bind, ...] = (),
    shares: tuple[Callable[..., Any], ...] = (),
    results: Callable[[torch.dtype], tuple[torch.dtype | None, ...]] | None = None,
    outputs: int = 1,
    returns: Callable[[tuple[Any, ...]], Any] | None = None,
    opinfo: tuple[str, ...] | None = None,
    autocast: Mapping[str, str] | None = None,
    constants: tuple[int, ...] = (),
) -> Op:
    """Make and register a reduction.

    Args:
        bind: reads calls for the same ``kind_of``.
        rule: ``(params, spec, g, x, out) -> dx``, the derivative in torch mathematics; with several
            outputs as many gradients and results. None: there is no derivative.
        backward: the same with kernels; None where the rule needs none.
        jvp: ``(op, params, x, out, tangent) -> tangent of the result``. None: by the rule.
        results: of the dtype of the call, those of what the kernel finishes with, None for what is
            not wanted. None: one, of that dtype.
        constants: which of the rule's tensors it is constant in.
    """
    push: Callable[..., Any] = jvp or row_jvp

    def forward(params: Params, x: Tensor) -> Any:
        launch = params.plan or _plan_of(kind_of, params, x)
        if results is None:
            return run(launch, (x,), params.result)
        found = run_many(launch, (x,), results(params.result))
        return found if outputs > 1 else next(t for t in found if t is not None)

    def full_rule(
        params: Params, needs: Needs, specs: tuple, grads: Tensors, saved: Tensors
    ) -> Tensors:
        return (rule(params, specs[0], *grads, *saved),)

    def full_jvp(params: Params, tensors: Tensors, outs: Tensors, tangents: Tensors) -> Any:
        assert tangents[0] is not None
        return push(op, params, *tensors, *outs, settle(tangents[0]))

    def vmap(info: Any, params: Params, tensors: Tensors, dims: tuple) -> tuple[Any, Any]:
        found = apply(op, shifted(params), batched(tensors, dims))
        return found, 0 if outputs == 1 else (0,) * outputs

    op = Op(
        name=name,
        bind=bind,
        forward=forward,
        replaces=targets,
        variants=variants or {},
        overloads=overloads,
        shares=shares,
        outputs=outputs,
        returns=returns,
        saves=saves,
        specs=operator.attrgetter("specs"),
        rule=None if rule is None else full_rule,
        backward=None
        if backward is None
        else backward_op(name, full_rule, backward, outputs, constants=constants),
        jvp=None if rule is None else full_jvp,
        differentiable=rule is not None,
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


def backward_op(
    name: str,
    rule: Any,
    backward: Callable[..., Any],
    outputs: int = 1,
    kernels: tuple[str, ...] = ("reduce", "pointwise_dense", "pointwise_strided"),
    constants: tuple[int, ...] = (),
) -> Op:
    """The op of ``(g, x, out)`` that computes the gradient of a reduction's input."""

    def forward(bp: BackwardParams, *tensors: Tensor | None) -> Any:
        return backward(bp.params, bp.specs[0], *tensors)

    def reference(bp: BackwardParams, *tensors: Tensor | None) -> Tensors:
        return rule(bp.params, bp.needs, bp.specs, tensors[:outputs], tensors[outputs:])

    def vmap(info: Any, bp: BackwardParams, tensors: Tensors, dims: tuple) -> Any:
        spec = bp.specs[0]
        assert spec is not None
        spec = spec._replace(shape=torch.Size((info.batch_size, *spec.shape)))
        bp = bp._replace(params=shifted(bp.params), specs=(spec,))
        return apply(op, bp, batched(tensors, dims)), 0

    op = Op(
        name=f"{name}_backward",
        bind=None,
        forward=forward,
        reference=reference,
        constants=constants,
        vmap=vmap,
        kernels=kernels,
        dtypes=FLOATING,
        formula=f"autograd through the rule of {name}",
    )
    return op


def _cost(params: Params, x: Tensor) -> tuple[int, int]:
    rows = x.numel() // max(count_of(x.shape, params.dims), 1)
    moved = x.numel() * x.element_size() + rows * params.result.itemsize
    return moved, x.numel()


def row_jvp(op: Op, params: Params, x: Tensor, *rest: Tensor) -> Any:
    """Forward mode of a reduction by its rule: the gradient for g = 1 is the row of the Jacobian
    that the tangent meets."""
    *outs, tangent = rest
    compute = COMPUTE_DTYPE[params.result]
    specs = (Spec(x.shape, compute),)
    parts = []
    for out in outs:
        grads = tuple([torch.ones_like(o) if o is out else None for o in outs])
        (row,) = vjp(op, params, (True,), specs, grads, (x, *outs), own_level=1)
        assert row is not None
        part = total_of(row * tangent, params, params.keepdim, compute)
        parts.append(part.to(params.result))
    return parts[0] if len(parts) == 1 else tuple(parts)


@cache
def counting(function: Any) -> Reduction:
    return SUM.but(map=function)


def hits_per_row(function: Any, params: Params, x: Tensor, out: Tensor) -> Tensor:
    """How many elements of each row of ``x`` are its extremum."""
    compute = COMPUTE_DTYPE[params.result]
    return reduce(counting(function), (x, out), params.dims, True, params.result, compute)


def exact_pointwise(
    function: Any,
    operands: tuple[Tensor | None, ...],
    result: torch.dtype,
    dtype: torch.dtype,
    consts: tuple[Number, ...] = (),
    raw: int = 0,
) -> Tensor:
    """``elementwise`` of a function with one output; an operand that is None counts as zeros."""
    scalars = (None,) * len(operands)
    # Not rounded to the result's dtype: counts and scales would not fit the half types.
    compute = COMPUTE_DTYPE[result]
    (out,) = elementwise(function, raw, operands, scalars, consts, compute, (dtype,))
    assert out is not None
    return out


def extremum_jvp(op: Op, params: Params, x: Tensor, out: Tensor, tangent: Tensor) -> Tensor:
    """Where the extremum is NaN nothing equals it, and the tangent is 0 / 0."""
    hits = x == restored(out, params)
    compute = COMPUTE_DTYPE[params.result]
    total = total_of(torch.where(hits, tangent, 0.0), params, params.keepdim, compute)
    return (total / total_of(hits, params, params.keepdim, compute)).to(params.result)


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
    yield Sample((make(16, 2, 257),), {"dim": (0, 2)}, "rows shared by several programs")


def short_samples(make: Make) -> Iterator[Sample]:
    """Of the standard samples what reaches every branch of a reduction with one dim or several."""
    # Long rows of one sign: of a sum that cancels, the last digits are chance.
    yield Sample((make(3, 5), 1), {}, "rows")
    yield Sample((make(2, 3, 4), (0, -1)), {"keepdim": True}, "several dims, keepdim")
    yield Sample((make(), 0), {}, "0-dim")
    yield Sample((make(4, 9)[:, ::2].t(), 1), {}, "strided")
    yield Sample((make(2, 0, 3), 2), {}, "empty")
    yield Sample((make(2, 4099, low=0.5), 1), {}, "past one block of the reduced")
    yield Sample((make(3, 131), 0), {}, "past one block of the kept")
    yield Sample((make(16, 2, 257, low=0.5), (0, 2)), {}, "rows shared by several programs")
