"""Losses of rows: what they share, and ``cosine_embedding_loss``; triplet.py has another.

One kernel makes the losses of rows and adds them up; the gradient is pointwise, one kernel more.
The rules are those that torch's own compositions have (Loss.cpp).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..admission import admit, settle
from ..dispatch import apply
from ..dtypes import COMPUTE_DTYPE, FLOATING, Number, is_number
from ..kernels import reduction as combine
from ..kernels import row_loss as k
from ..launchers.reduction import Reduction
from ..launchers.row_loss import Plan, losses, plan_for
from ..layout import broadcast_shape, broadcast_sizes
from ..op import BackwardParams, Bind, Needs, Op, Spec, Tensors, Unsupported, register
from ..sampling import Make, Sample
from .criterion import FLOAT32
from .loss_calls import INTEGRAL_TARGETS, REDUCTIONS, constant, modern
from .row_gradients import Call, batch_all, gradients, logical_rank, reduce_to

F = torch.nn.functional


@dataclasses.dataclass(frozen=True, eq=False)
class Form:
    """A loss formula, as device functions of ``kernels.row_loss``.

    Attributes:
        reduction: of the elements of the rows; its ``finish`` takes the labels, too.
        kept: its results for each row past the loss, which backward reads.
        backward: all gradients, one for each operand; None: they are zero.
    """

    reduction: Reduction
    kept: int
    backward: Any


class Params(NamedTuple):
    """What a call of a loss of rows is beside its tensors.

    Attributes:
        form: its formula.
        call: the numbers that its rules take.
        map_numbers, finish_numbers, numbers: those that its device functions take, the last ones
            for the backward one.
        batch: dimensions in front whose losses are not added up, those that vmap added; None: all.
        mean: whether the sum is divided by the count of rows.
        result: dtype of the result.
        specs: of the tensors, and
        launch: of a call that is remembered; neither of another.
    """

    form: Form
    call: Any
    map_numbers: tuple[Number, ...]
    finish_numbers: tuple[Number, ...]
    numbers: tuple[Number, ...]
    batch: int | None
    mean: bool
    result: torch.dtype
    specs: tuple[Spec, ...] | None = None
    launch: Plan | None = None


def row_loss(
    name: str,
    target: Callable[..., Any],
    *,
    bind: Bind,
    arity: int,
    rule: Callable[..., Tensors],
    tangent: Callable[..., Tensor],
    samples: Callable[[Make], Iterator[Sample]],
    formula: str,
) -> Op:
    """Make and register the op of one loss of rows.

    Args:
        arity: operands with rows; what follows are labels, which have no derivative.
        rule: ``(call, g, *tensors) -> gradients`` of the operands, in their common shape and
            computing dtype, as ``g`` has the shape of the rows; None for zero.
        tangent: ``(call, tensors, tangents) -> tangents of the losses of rows``.
    """

    def forward(params: Params, *tensors: Tensor) -> tuple[Tensor, ...]:
        rows, labels = tensors[:arity], tensors[arity:]
        launch = params.launch or plan_of(params, rows, labels)
        return losses(launch, rows, labels, params.form.kept, params.result)

    def plan_of(params: Params, rows: tuple[Tensor, ...], labels: tuple[Tensor, ...]) -> Plan:
        form, _, before, after, _, batch, mean, result = params[:8]
        return plan_for(form.reduction, rows, labels, batch, mean, result, before, after)

    def prepared(params: Params, *tensors: Tensor) -> Params:
        return params._replace(
            specs=tuple([Spec(t.shape, t.dtype) for t in tensors]),
            launch=plan_of(params, tensors[:arity], tensors[arity:]),
        )

    def saves(params: Params, needs: Needs) -> tuple[int, ...]:
        count = len(needs)
        return (*range(count), *range(count + 1, count + 1 + params.form.kept))

    def full_rule(
        params: Params, needs: Needs, specs: tuple, grads: Tensors, saved: Tensors
    ) -> Tensors:
        (g,), tensors = grads, _widened(params, saved[: len(needs)], arity)
        assert g is not None
        rows = _rows(tensors, arity)
        g = _spread(g, params, rows).to(COMPUTE_DTYPE[params.result])
        if params.mean:
            # Of no rows each gets nothing, and no number is divided by 0 on the way.
            g = g / max(rows[params.batch :].numel(), 1)
        found = rule(params.call, g, *tensors)
        return tuple(
            reduce_to(torch.zeros(full, dtype=g.dtype, device=g.device) if d is None else d, spec)
            if need and spec is not None
            else None
            for d, full, spec, need in zip(
                (*found, *[None] * (len(needs) - arity)),
                [t.shape for t in tensors],
                specs,
                needs,
                strict=True,
            )
        )

    def tangent_of(params: Params, tensors: Tensors, outputs: Tensors, tangents: Tensors) -> Tensor:
        wide = _widened(params, tensors, arity)
        spread = [
            None if t is None else settle(t).to(w.dtype).expand(w.shape)
            for w, t in zip(wide[:arity], tangents, strict=False)
        ]
        rows = _rows(wide, arity)
        each = tangent(params.call, wide, spread).expand(rows)
        if params.batch is not None:
            dims = tuple(range(params.batch, len(rows)))
            if dims:
                each = each.sum(dims)
            if params.mean:
                each = each / rows[params.batch :].numel()
        return each.to(params.result)

    def vmap(info: Any, params: Params, tensors: Tensors, dims: tuple) -> tuple[Any, Any]:
        rank = logical_rank(tensors[:arity], dims[:arity])
        batched = batch_all(tensors[:arity], dims[:arity], rank)
        batched += batch_all(tensors[arity:], dims[arity:], rank - 1)
        if params.batch is not None:
            params = params._replace(batch=params.batch + 1)
        params = params._replace(specs=None, launch=None)
        found = apply(op, params, batched, everything=True)
        return found, (0,) * len(found)

    op = Op(
        name=name,
        bind=bind,
        forward=forward,
        prepare=prepared,
        replaces=(target,),
        specs=operator.attrgetter("specs"),
        saves=saves,
        rule=full_rule,
        backward=_backward_op(name, arity, full_rule),
        jvp=tangent_of,
        vmap=vmap,
        autocast=FLOAT32,
        opinfo=(f"nn.functional.{name}",),
        kernels=("row_loss", "reduce"),
        formula=formula,
        dtypes=FLOATING,
        samples=samples,
        sources="torch Loss.cpp",
        cost=partial(_cost, arity),
    )
    return register(op)


def _backward_op(name: str, arity: int, rule: Any) -> Op:
    """The op that computes all gradients in one kernel, from ``(g, *tensors, out, *kept)``."""

    def forward(bp: BackwardParams, g: Tensor, *saved: Tensor | None) -> Any:
        params, needs, specs = bp
        shapes = [s.shape for s in specs if s is not None]
        labels = tuple([t for t in saved[arity : len(specs)] if t is not None])
        full = broadcast_sizes([*shapes[:arity], *[torch.Size((*t.shape, 1)) for t in labels]])
        backward = params.form.backward
        if backward is None:
            found = [s for s, need in zip(specs, needs, strict=True) if need and s is not None]
            zeros = tuple([g.new_zeros(s.shape, dtype=s.dtype) for s in found])
            return zeros[0] if len(zeros) == 1 else zeros
        scale = 1 / max(full[params.batch : -1].numel(), 1) if params.mean else 1.0
        rows = (_spread(g, params, full[:-1]), *labels, *saved[len(specs) + 1 :])
        first, *others = [None if t is None else t.unsqueeze(-1) for t in rows]
        call = Call(
            backward,
            0,
            (first, *saved[:arity], *others),
            (),
            (scale, *params.numbers),
            # Not rounded to half precision: what the gradient has in float32 would not fit.
            COMPUTE_DTYPE[params.result],
        )
        columns = (*range(arity), *[-1] * len(labels))
        return gradients(call, columns, needs, specs, full)

    def reference(bp: BackwardParams, g: Tensor, *saved: Tensor | None) -> Tensors:
        found = rule(bp.params, bp.needs, bp.specs, (g,), saved)
        return tuple(t for t in found if t is not None)

    return Op(
        name=f"{name}_backward",
        bind=None,
        forward=forward,
        outputs=arity,
        reference=reference,
        kernels=("pointwise_strided", "pointwise_dense"),
        dtypes=FLOATING,
        formula=f"autograd through the rule of {name}",
    )


def _widened(params: Params, tensors: Tensors, arity: int) -> tuple[Any, ...]:
    """The operands in their common shape and computing dtype, because in the gradients terms
    cancel; and the labels."""
    rows, labels = [t for t in tensors[:arity] if t is not None], tensors[arity:]
    sizes = [torch.Size((*t.shape, 1)) for t in labels if t is not None]
    full = broadcast_sizes([broadcast_shape(rows), *sizes])
    return (*[t.to(COMPUTE_DTYPE[params.result]).expand(full) for t in rows], *labels)


def _rows(tensors: tuple[Any, ...], arity: int) -> torch.Size:
    return broadcast_shape(tensors[:arity])[:-1]


def _spread(g: Tensor, params: Params, rows: torch.Size) -> Tensor:
    """The gradient of the result as that of each row's loss, but for the division of a mean."""
    if params.batch is None:
        return g
    return g.reshape((*g.shape, *[1] * (len(rows) - params.batch))).expand(rows)


def _cost(arity: int, params: Params, *tensors: Tensor) -> tuple[int, int]:
    moved = sum(t.numel() * t.element_size() for t in tensors)
    shape = broadcast_shape(tensors[:arity])
    kept = shape[:-1].numel() * params.form.kept * COMPUTE_DTYPE[params.result].itemsize
    return moved + kept, arity * shape.numel()


def read(tensors: tuple[Tensor, ...], margin: float, reduction: str) -> dict[str, Any]:
    """The parameters that depend on the reduction and the dtype."""
    for tensor in tensors:
        admit(tensor)
        if tensor.device != tensors[0].device or tensor.dtype is not tensors[0].dtype:
            raise Unsupported("tensors on different devices or of different dtypes")
    if tensors[0].dtype not in FLOATING:
        raise Unsupported("integer input")
    if not is_number(margin) or isinstance(margin, bool):
        raise Unsupported(f"margin={margin!r}")
    if type(reduction) is not str or reduction not in REDUCTIONS:
        raise Unsupported(f"reduction={reduction!r}")
    return {
        "batch": None if reduction == "none" else 0,
        "mean": reduction == "mean",
        "result": tensors[0].dtype,
    }


# --------------------------------------------------------------------------- cosine_embedding_loss

COSINE = Form(
    Reduction(k.dot_products, combine.add_three, (0.0, 0.0, 0.0), k.cosine_embedding),
    3,
    k.cosine_embedding_bwd,
)


def _bind_cosine(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> tuple[Tensors, Params]:
    modern(size_average, reduce)
    found = read((input1, input2), margin, reduction)
    admit(target)
    if target.device != input1.device or target.dtype not in FLOATING | INTEGRAL_TARGETS:
        raise Unsupported("target on another device, or of a dtype that has no -1")
    if target.dim() > 1 or not input1.dim() == input2.dim() == target.dim() + 1:
        raise Unsupported("other than rows with a label each")
    rows = {n for t in (input1, input2, target) for n in t.shape[: target.dim()]}
    if len(rows - {1}) > 1 or len({input1.shape[-1], input2.shape[-1]} - {1}) > 1:
        raise Unsupported("shapes do not broadcast")
    numbers = (float(margin),)
    params = Params(COSINE, float(margin), (), numbers, numbers, **found)
    return (input1, input2, constant(target)), params


_EPSILON = 9.999999960041972e-13  # torch's 1e-12 is a float32


def _cosine_rule(margin: float, g: Tensor, x: Tensor, y: Tensor, label: Tensor) -> Tensors:
    x_square, y_square, xy = (torch.linalg.vecdot(a, b) for a, b in ((x, x), (y, y), (x, y)))
    x_square, y_square = x_square + _EPSILON, y_square + _EPSILON
    norm = torch.sqrt(x_square * y_square)
    cosine = xy / norm
    g = _cosine_slope(margin, g, cosine, label)
    across, along = (g / norm).unsqueeze(-1), -g * (cosine / norm) / norm
    return (
        across * y + (along * y_square).unsqueeze(-1) * x,
        across * x + (along * x_square).unsqueeze(-1) * y,
    )


def _cosine_slope(margin: float, g: Tensor, cosine: Tensor, label: Tensor) -> Tensor:
    """The gradient of the angle's cosine; in forward mode, the other way round, the tangent."""
    apart = torch.where(label == -1, torch.where(cosine - margin >= 0, g, 0.0), 0.0)
    return apart - torch.where(label == 1, g, 0.0)


def _cosine_tangent(margin: float, tensors: tuple[Any, ...], tangents: list[Any]) -> Tensor:
    (x, y, label), (dx, dy) = tensors, tangents
    x_square, y_square, xy = (torch.linalg.vecdot(a, b) for a, b in ((x, x), (y, y), (x, y)))
    x_square, y_square = x_square + _EPSILON, y_square + _EPSILON
    norm = torch.sqrt(x_square * y_square)
    across, along = [], []
    if dx is not None:
        across.append(torch.linalg.vecdot(dx, y))
        along.append(2 * torch.linalg.vecdot(dx, x) * y_square)
    if dy is not None:
        across.append(torch.linalg.vecdot(x, dy))
        along.append(2 * torch.linalg.vecdot(dy, y) * x_square)
    cosine = xy / norm
    stretch = _added(along) / (2 * norm)
    return _cosine_slope(margin, (_added(across) - stretch * cosine) / norm, cosine, label)


def _added(terms: list[Tensor]) -> Tensor:
    first, *others = terms
    for term in others:
        first = first + term
    return first


def _cosine_samples(make: Make) -> Iterator[Sample]:
    def labels(*shape: int) -> Tensor:
        return make(*shape, requires_grad=False).sign()

    triple = (make(3, 4), make(3, 4), labels(3))
    yield Sample(triple, {"margin": 0.2, "reduction": "none"}, "each")
    yield Sample(triple, {"margin": 0.2}, "mean")
    yield Sample((make(5), make(5), labels()), {"reduction": "sum"}, "one row")
    yield Sample((make(1, 5), make(5, 3).t(), labels(3)), {}, "broadcast, transposed")
    yield Sample((make(0, 4), make(0, 4), labels(0)), {"reduction": "sum"}, "empty")
    yield Sample((make(2, 1031), make(2, 1031), labels(2)), {}, "past one block")
    yield Sample((make(60, 130), make(60, 130), labels(60)), {}, "shared by several programs")


# ------------------------------------------------------------------------------------------- TABLE

row_loss(
    "cosine_embedding_loss", F.cosine_embedding_loss,
    bind=_bind_cosine, arity=2, rule=_cosine_rule, tangent=_cosine_tangent,
    formula="that of 1 - cos(x, y), or of max(cos(x, y) - margin, 0)",
    samples=_cosine_samples,
)  # fmt: skip
