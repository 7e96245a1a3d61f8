"""Two tensors row by row: ``cosine_similarity`` and ``pairwise_distance``.

They are reductions of two operands, each in one kernel, with a backward that is one kernel more.
The rules are those that torch's own compositions have (Distance.cpp): a distance is the norm of a
difference; of a norm that is too small to divide by, an angle takes the slope of the norm all the
same.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..admission import admit, settle
from ..dispatch import apply
from ..dtypes import COMPUTE_DTYPE, FLOATING, is_number
from ..kernels import distance as kd
from ..kernels import reduction as k
from ..kernels import reduction_backward as kb
from ..launchers.pointwise import elementwise
from ..launchers.reduction import (
    PRODUCT,
    Plan,
    Reduction,
    plan_for,
    reduce,
    run,
    run_many,
    sum_to,
)
from ..layout import broadcast_shape, broadcasts
from ..op import OPS, BackwardParams, Bind, Needs, Op, Spec, Tensors, Unsupported, register
from ..sampling import Make, Sample
from .reduction import (
    Kind,
    Params,
    count_of,
    exact_pointwise,
    restored,
    shifted,
    total_of,
    value_of,
)
from .row_gradients import batch_all, logical_rank, reduce_to
from .vector_norm import backward as norm_backward
from .vector_norm import jvp as norm_jvp
from .vector_norm import kind_of as norm_of
from .vector_norm import rule as norm_rule

F = torch.nn.functional


class PairParams(NamedTuple):
    """What a reduction of two tensors is beside them.

    Attributes:
        dims: the reduced dimension of their common shape; none of numbers.
        keepdim: whether it stays, with size 1.
        result: dtype of the result, to which torch converts both first.
        number: order of the norm.
        eps: what keeps a slope finite.
        specs: of the tensors, and
        launch: of a call that is remembered; neither of another.
    """

    dims: tuple[int, ...]
    keepdim: bool
    result: torch.dtype
    number: float
    eps: float
    specs: tuple[Spec, Spec] | None = None
    launch: Plan | None = None


def _read(
    x1: Tensor, x2: Tensor, dim: int, keepdim: bool, number: float, eps: float
) -> tuple[Tensors, PairParams]:
    admit(x1)
    admit(x2)
    if x1.device != x2.device:
        raise Unsupported("tensors on different devices")
    if x1.dtype not in FLOATING or x2.dtype not in FLOATING:
        raise Unsupported("integer operand")
    if not broadcasts(x1.shape, x2.shape):
        raise Unsupported("shapes do not broadcast")
    if type(dim) is not int or type(keepdim) is not bool:
        raise Unsupported(f"dim={dim!r}, keepdim={keepdim!r}")
    for value in (number, eps):
        if not is_number(value) or isinstance(value, bool):
            raise Unsupported(f"a {type(value).__name__} in a number's place")
    rank = max(x1.dim(), x2.dim())
    if not -max(rank, 1) <= dim < max(rank, 1):
        raise Unsupported("dim out of range")
    result = torch.promote_types(x1.dtype, x2.dtype)
    dims = (dim % rank,) if rank else ()
    return (x1, x2), PairParams(dims, keepdim, result, float(number), float(eps))


def _pair(
    name: str,
    *targets: Callable[..., Any],
    bind: Bind,
    plan: Callable[..., Plan],
    rule: Callable[..., Tensors],
    backward: Callable[..., list[Tensor | None]],
    samples: Callable[[Make], Iterator[Sample]],
    formula: str,
    jvp: Callable[..., Tensor] | None = None,
    kept: int = 0,
) -> Op:
    """Make and register a reduction of two operands.

    Args:
        jvp: ``(params, tensors, outputs, tangents) -> tangent``. None: by the rule.
        rule: ``(params, g, x, y, out) -> (dx, dy)``, in their common shape and computing dtype.
        backward: the same by kernels: ``(params, dtypes, g, x, y, *rows)``, ``dtypes`` being those
            of the gradients, None for one that is not wanted.
        plan: ``(params, x, y)`` to how they are reduced.
        kept: results of that past the first, the rows of ``backward``; with none they are the
            result alone. A rule has no use of the result where they are kept.
    """
    rows_of = tuple(range(3, 3 + kept)) if kept else (2,)

    def forward(params: PairParams, x: Tensor, y: Tensor) -> Any:
        launch = params.launch or plan(params, x, y)
        if not kept:
            return run(launch, (x, y), params.result)
        return run_many(launch, (x, y), (params.result, *[COMPUTE_DTYPE[params.result]] * kept))

    def prepared(params: PairParams, x: Tensor, y: Tensor) -> PairParams:
        specs = Spec(x.shape, x.dtype), Spec(y.shape, y.dtype)
        return params._replace(specs=specs, launch=plan(params, x, y))

    def full_rule(
        params: PairParams, needs: Needs, specs: tuple, grads: Tensors, saved: Tensors
    ) -> Tensors:
        (g,), (x, y, out) = grads, saved[:3]
        assert g is not None
        assert x is not None
        assert y is not None
        full, compute = broadcast_shape([x, y]), COMPUTE_DTYPE[params.result]
        if out is not None:
            out = restored(out, params)
        wide = [t.to(compute).expand(full) for t in (x, y)]
        found = rule(params, restored(g, params), *wide, out)
        return tuple(
            reduce_to(d, spec) if need and d is not None else None
            for d, spec, need in zip(found, specs, needs, strict=True)
        )

    def run_backward(bp: BackwardParams, g: Tensor, *saved: Tensor) -> Any:
        x, y = saved[:2]
        params, specs, full = bp.params, bp.specs, broadcast_shape([x, y])
        dtypes: list[torch.dtype | None] = []
        for need, spec in zip(bp.needs, specs, strict=True):
            assert spec is not None
            whole = spec.dtype if spec.shape == full else COMPUTE_DTYPE[params.result]
            dtypes.append(whole if need else None)
        rows = [restored(saved[i], params) for i in rows_of]
        found = backward(params, tuple(dtypes), restored(g, params), x, y, *rows)
        gradients = [
            sum_to(d, spec.shape, spec.dtype)
            for d, spec in zip(found, specs, strict=True)
            if d is not None and spec is not None
        ]
        return gradients[0] if len(gradients) == 1 else tuple(gradients)

    def reference(bp: BackwardParams, g: Tensor, *saved: Tensor | None) -> Tensors:
        found = full_rule(bp.params, bp.needs, bp.specs, (g,), saved)
        return tuple(d for d in found if d is not None)

    def rule_jvp(
        params: PairParams, tensors: Tensors, outputs: Tensors, tangents: Tensors
    ) -> Tensor:
        (x, y), (out,) = tensors, outputs
        assert x is not None
        assert y is not None
        assert out is not None
        compute = COMPUTE_DTYPE[params.result]
        # For g = 1, and not summed over what is broadcast, a gradient is a row of the Jacobian.
        spec = Spec(broadcast_shape([x, y]), compute)
        total: Tensor | None = None
        for i, tangent in enumerate(tangents):
            if tangent is None:
                continue
            needs = (i == 0, i == 1)
            ones = torch.ones_like(out)
            row = full_rule(params, needs, (spec, spec), (ones,), (x, y, out))[i]
            if row is None:
                continue
            part = total_of(row * settle(tangent), params, params.keepdim, compute)
            total = part if total is None else total + part
        return torch.zeros_like(out) if total is None else total.to(params.result)

    def vmap(info: Any, params: PairParams, tensors: Tensors, dims: tuple) -> tuple[Any, Any]:
        batched = batch_all(tensors, dims, logical_rank(tensors, dims))
        params = shifted(params)._replace(specs=None, launch=None)
        found = apply(op, params, batched, everything=True)
        return found, (0,) * (1 + kept) if kept else 0

    op = Op(
        name=name,
        bind=bind,
        forward=forward,
        prepare=prepared,
        specs=operator.attrgetter("specs"),
        rule=full_rule,
        jvp=jvp or rule_jvp,
        vmap=vmap,
        dtypes=FLOATING,
        replaces=targets,
        backward=Op(
            name=f"{name}_backward",
            bind=None,
            forward=run_backward,
            reference=reference,
            outputs=2,
            kernels=("reduce", "pointwise_dense", "pointwise_strided"),
            dtypes=FLOATING,
            formula=f"autograd through the rule of {name}",
        ),
        saves=lambda params, needs: (0, 1, *rows_of),
        autocast={"cuda": "float32"},
        opinfo=(f"nn.functional.{name}",),
        kernels=("reduce",),
        formula=formula,
        samples=samples,
        sources="torch Distance.cpp",
        cost=_cost,
    )
    return register(op)


def _cost(params: PairParams, x: Tensor, y: Tensor) -> tuple[int, int]:
    shape = broadcast_shape([x, y])
    rows = shape.numel() // max(count_of(shape, params.dims), 1)
    moved = x.numel() * x.element_size() + y.numel() * y.element_size()
    return moved + rows * params.result.itemsize, shape.numel()


def _gradients(
    function: Any,
    params: PairParams,
    dtypes: tuple[torch.dtype | None, ...],
    *operands: Tensor,
    consts: tuple[float, ...] = (),
) -> list[Tensor | None]:
    """Both gradients in one kernel."""
    compute = COMPUTE_DTYPE[params.result]
    return elementwise(function, 0, operands, (), consts, compute, dtypes)


def _samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 5), make(3, 5)), {}, "rows")
    yield Sample((make(2, 1, 4, low=0.5), make(3, 4)), {}, "broadcast")
    yield Sample((make(5, 3).t(), make(3, 10)[:, ::2]), {}, "strided")
    yield Sample((make(0, 4), make(0, 4)), {}, "empty")
    yield Sample((make(2, 1031), make(2, 1031)), {}, "past one block of the reduced")


# ------------------------------------------------------------------------------- cosine_similarity

COSINE = Reduction(kd.products, k.add_three, (0.0, 0.0, 0.0), kd.cosine)


def _bind_cosine(
    x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8
) -> tuple[Tensors, PairParams]:
    tensors, params = _read(x1, x2, dim, False, 2.0, eps)
    if x1.dtype is not x2.dtype:
        raise Unsupported("operands of different dtypes, of which torch takes norms in their own")
    if params.eps < 0:
        raise Unsupported("negative eps")
    return tensors, params


def _cosine_plan(params: PairParams, x: Tensor, y: Tensor) -> Plan:
    return plan_for((x, y), COSINE, params.dims, False, params.result, (), (params.eps,))


def _cosine_rule(params: PairParams, g: Tensor, x: Tensor, y: Tensor, _: None) -> Tensors:
    (x_own, x_unit, x_least), (y_own, y_unit, y_least) = _unit(params, x), _unit(params, y)
    out = total_of(x_unit * y_unit, params, True)
    return g * (y_unit - out * x_own) / x_least, g * (x_unit - out * y_own) / y_least


def _unit(params: PairParams, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` over its norm, over what it is divided by, and that. torch raises a norm to ``eps``
    behind autograd's back, so that its slope stays."""
    norm = torch.linalg.vector_norm(x, 2, params.dims, True)
    least = torch.where(norm < params.eps, params.eps + (norm - norm.detach()), norm)
    return torch.where(norm == 0, 0.0, x / norm), x / least, least


def _cosine_backward(
    params: PairParams,
    dtypes: tuple[torch.dtype | None, ...],
    g: Tensor,
    x: Tensor,
    y: Tensor,
    *rows: Tensor,
) -> list[Tensor | None]:
    # Rather than kept, for what torch keeps is not to be exceeded.
    compute = COMPUTE_DTYPE[params.result]
    xy = reduce(PRODUCT, (x, y), params.dims, True, params.result, compute)
    return _gradients(kb.cosine_bwd, params, dtypes, g, x, y, *rows, xy, consts=(params.eps,))


def _cosine_samples(make: Make) -> Iterator[Sample]:
    yield from _samples(make)
    yield Sample((make(2, 9000), make(2, 9000)), {}, "rows shared by several programs")


# ------------------------------------------------------------------------------- pairwise_distance

_DIFFERENCE = {
    k.nonzero: kd.difference_nonzero,
    k.absolute: kd.difference_absolute,
    k.square: kd.difference_square,
    k.absolute_power: kd.difference_power,
}


@lru_cache(maxsize=64)
def _distance_of(kind: Kind) -> Reduction:
    """The norm's reduction, of a difference."""
    return kind.reduction.but(map=_DIFFERENCE[kind.reduction.map])


def _bind_distance(
    x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> tuple[Tensors, PairParams]:
    tensors, params = _read(x1, x2, -1, keepdim, p, eps)
    if not params.dims:
        raise Unsupported("distance of numbers")
    shape = broadcast_shape([x1, x2])
    norm_of(params.number, count_of(shape, params.dims))  # refuses what torch does
    return tensors, params


def _distance_plan(params: PairParams, x: Tensor, y: Tensor) -> Plan:
    dims, keepdim, result, p, eps, *_ = params
    kind = norm_of(p, count_of(broadcast_shape([x, y]), dims))
    before = (*kind.map_params, eps)
    return plan_for((x, y), _distance_of(kind), dims, keepdim, result, before, kind.finish_params)


def _norm_params(params: PairParams) -> Params:
    return Params(params.dims, True, COMPUTE_DTYPE[params.result], params.number)


def _distance_rule(params: PairParams, g: Tensor, x: Tensor, y: Tensor, out: Tensor) -> Tensors:
    difference = x - y + params.eps
    spec = Spec(difference.shape, difference.dtype)
    if difference.dtype is not params.result:
        # Powers of it would multiply the rounding of a half precision result.
        out = torch.linalg.vector_norm(difference, params.number, params.dims, True)
    dx = norm_rule(_norm_params(params), spec, g, difference, out)
    return dx, None if dx is None else -dx


def _distance_backward(
    params: PairParams,
    dtypes: tuple[torch.dtype | None, ...],
    g: Tensor,
    x: Tensor,
    y: Tensor,
    out: Tensor,
) -> list[Tensor | None]:
    if params.number == 2:
        return _gradients(kb.distance_bwd, params, dtypes, g, x, y, out, consts=(params.eps,))
    compute = COMPUTE_DTYPE[params.result]
    difference = exact_pointwise(kb.difference, (x, y), compute, compute, (params.eps,))
    norm_params, spec = _norm_params(params), Spec(difference.shape, compute)
    if compute is not params.result:
        out = value_of(norm_of, norm_params, difference)
    dx = norm_backward(norm_params, spec, g, difference, out)
    if dx is None:
        return [None, None]
    dx_dtype, dy_dtype = dtypes
    return [
        None if dx_dtype is None else dx.to(dx_dtype),
        None if dy_dtype is None else exact_pointwise(kb.negative, (dx,), compute, dy_dtype),
    ]


def _distance_jvp(
    params: PairParams, tensors: Tensors, outputs: Tensors, tangents: Tensors
) -> Tensor:
    """The norm's, of a difference."""
    (x, y), (out,), (dx, dy) = tensors, outputs, [t if t is None else settle(t) for t in tangents]
    assert x is not None
    assert y is not None
    assert out is not None
    compute = COMPUTE_DTYPE[params.result]
    difference = x.to(compute) - y.to(compute) + params.eps
    tangent = dx if dy is None else -dy if dx is None else dx - dy
    assert tangent is not None
    norm_params = _norm_params(params)._replace(keepdim=params.keepdim)
    if compute is not params.result:
        out = torch.linalg.vector_norm(difference, params.number, params.dims, params.keepdim)
    return norm_jvp(OPS["vector_norm"], norm_params, difference, out, tangent).to(params.result)


def _distance_samples(make: Make) -> Iterator[Sample]:
    yield from _samples(make)
    for p in (0.5, 1.0, 3.0, float("inf")):
        yield Sample((make(3, 5), make(5)), {"p": p, "keepdim": True}, f"p={p}")


# ------------------------------------------------------------------------------------------- TABLE

_pair(
    "cosine_similarity", F.cosine_similarity,
    bind=_bind_cosine, plan=_cosine_plan, kept=2,
    rule=_cosine_rule, backward=_cosine_backward, samples=_cosine_samples,
    formula="dx = g * (y / |y| - out * x / |x|) / |x|; dy = g * (x / |x| - out * y / |y|) / |y|",
)  # fmt: skip
_pair(
    "pairwise_distance", F.pairwise_distance,
    bind=_bind_distance, plan=_distance_plan,
    rule=_distance_rule, backward=_distance_backward, jvp=_distance_jvp,
    samples=_distance_samples,
    formula="dx = g * sign(x - y) * (abs(x - y) / out) ** (p - 1); dy = -dx",
)  # fmt: skip
