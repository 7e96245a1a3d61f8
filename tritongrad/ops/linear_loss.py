"""``linear_cross_entropy``: the loss of ``linear``'s logits, which are never in memory together.

Beyond its gradients it needs the input once more and the logits of some classes. ``options``, which
choose how torch does the like, without derivatives of the gradient, are left to torch. Derivatives
beyond the first and forward mode are those of ``linear`` and ``cross_entropy``, whose rules put all
logits in memory.

Compiled, ``tritongrad.nn.functional.linear_cross_entropy`` is one library op, whose backward makes
the rows' numbers again. Into torch's function Dynamo looks before a mode does: what it sees are
``linear`` and ``cross_entropy``, on our kernels, but with all logits in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..admission import settle
from ..dtypes import FLOATING
from ..launchers import linear_loss as launcher
from ..launchers.matmul import float32_precision
from ..op import BackwardParams, Needs, Op, Spec, Tensors, Unsupported, register
from ..runtime import INTERPRETED
from ..sampling import Make, Sample
from .class_calls import KEPT, OUT_OF_RANGE, Params, labels, read_targets, without
from .class_rules import moved, slopes, spread
from .classification import extras, kept, results
from .contraction import GEMM
from .factors import admit_alike

F = torch.nn.functional


def _bind(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> tuple[Tensors, Params]:
    if options is not None:
        raise Unsupported("options, which choose torch's own pieces")
    linear = [input, linear_weight, *([] if linear_bias is None else [linear_bias])]
    lower = _lowered(input)
    admit_alike(*linear, promoting=lower is not None)
    if lower is not None and any(t.dtype is torch.float64 for t in linear):
        raise Unsupported("float64 beside what autocast lowers")
    if not 1 <= input.dim() <= 2 or linear_weight.dim() < 2:
        raise Unsupported("an input of other than one or two dimensions, a weight of less than two")
    (*batch, features), (classes, *losses, inner) = input.shape, linear_weight.shape
    if features != inner or (losses and not batch) or 0 in losses:
        raise Unsupported("sizes that do not go together")
    if linear_bias is not None and linear_bias.shape != (classes, *losses):
        raise Unsupported("bias is not one number for each row of linear_weight")
    shape = torch.Size((*batch, classes, *losses))
    if target.__class__ is Tensor and target.shape == shape and ignore_index is not None:
        raise Unsupported("ignore_index beside probabilities")
    weight, params = read_targets(
        shape, len(batch), input, target, weight,
        -100 if ignore_index is None else ignore_index, reduction, label_smoothing,
    )  # fmt: skip
    # One row or several, one loss of each or several: there are always both dimensions.
    params = params._replace(call=params.call._replace(dim=1))
    if lower is not None:
        input, linear_weight = input.to(lower), linear_weight.to(lower)
        linear_bias = None if linear_bias is None else linear_bias.to(lower)
    return (input, linear_weight, target, linear_bias, weight), params


def _lowered(input: Tensor) -> torch.dtype | None:
    """What autocast converts the factors of a product to; the loss is computed in float32."""
    if not isinstance(input, Tensor) or input.dtype is torch.float64:
        return None
    device = input.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _factors(
    params: Params,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
) -> launcher.Factors:
    classes, *losses, features = weight.shape
    rows, count = x.shape[0] if x.dim() > 1 else 1, math.prod(losses)
    shape = (rows, count) if params.call.labelled else (rows, classes, count)
    return launcher.Factors(
        x.reshape(rows, features),
        weight.reshape(classes, count, features),
        None if bias is None else bias.reshape(classes, count),
        target.reshape(shape),
        class_weight,
    )


def _public(x: Tensor, weight: Tensor) -> torch.Size:
    """Shape of the losses of all rows."""
    return torch.Size((*x.shape[:-1], *weight.shape[1:-1]))


def _compiles(*args: Any, options: Any = None, **kwargs: Any) -> bool:
    return options is None


def _fake(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    # torch's own makes all logits, of which a compiler sees nothing here.
    each = reduction == "none"
    return input.new_empty((*input.shape[:-1], *linear_weight.shape[1:-1]) if each else ())


def _forward(
    params: Params, x: Tensor, weight: Tensor, target: Tensor, *rest: Tensor | None
) -> tuple[Tensor, ...]:
    factors = _factors(params, x, weight, target, *rest)
    found = launcher.losses(params.call, factors, params.row_dtype, params.averaged)
    out, *more = results(params, found)
    # In place: a view made inside a Function could not be modified in place by the user.
    return (out.resize_(_public(x, weight)) if params.reduction == "none" else out, *more)


def _saves(params: Params, needs: Needs) -> tuple[int, ...]:
    return (*range(5), *range(6, 6 + extras(params)))


def _rows_of(params: Params, value: Tensor, rows: torch.Size) -> Tensor:
    """What is as the result is, as the losses are numbered here."""
    return value.reshape(rows) if params.reduction == "none" else value


def _backward_forward(
    bp: BackwardParams,
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    out: None,
    *saved: Tensor,
) -> Any:
    params: Params = bp.params
    if not saved:  # compiled code keeps the loss alone
        saved = _forward(params, x, weight, target, bias, class_weight)[1:]
    found, scale = kept(params, *saved)
    rows = found.top.shape
    factors = _factors(params, x, weight, target, bias, class_weight)
    g = spread(params, _rows_of(params, g, rows), len(rows)).expand(rows)
    made = launcher.gradients(params.call, factors, g, scale, params.factor, found, bp.needs)
    present = tuple(
        [t.view(s.shape) for t, s in zip(made, bp.specs, strict=True) if t is not None and s]
    )
    return present[0] if len(present) == 1 else present


def _logits(params: Params, factors: launcher.Factors) -> Tensor:
    """All of them, in the computing dtype: they are not rounded here either."""
    x, weight, bias = (t if t is None else t.to(params.call.compute) for t in factors[:3])
    assert x is not None
    assert weight is not None
    flat = None if bias is None else bias.flatten()
    return F.linear(x, weight.flatten(0, 1), flat).reshape(len(x), *weight.shape[:2])


def _rule(
    params: Params, needs: Needs, specs: tuple[Spec | None, ...], grads: Tensors, saved: Tensors
) -> Tensors:
    (g, *_), (x, weight, target, bias, class_weight, _, *rest) = grads, saved
    assert g is not None
    assert x is not None
    assert weight is not None
    assert target is not None
    factors = _factors(params, x, weight, target, bias, class_weight)
    logits = _logits(params, factors)
    rows = torch.Size((logits.shape[0], logits.shape[2]))
    scale = rest[-1] if params.averaged and rest else None
    need_x, need_weight, need_target, need_bias, need_class_weight = needs
    through = need_x or need_weight or need_bias
    dlogits, dtarget, dclasses = slopes(
        params, (through, need_target, need_class_weight),
        _rows_of(params, settle(g), rows), logits, factors.target, class_weight, scale,
    )  # fmt: skip
    dx = dweight = dbias = None
    if dlogits is not None:
        flat = dlogits.flatten(1)
        if need_x:
            dx = flat @ factors.weight.flatten(0, 1).to(flat.dtype)
        if need_weight:
            dweight = flat.mT @ factors.x.to(flat.dtype)
        if need_bias:
            dbias = flat.sum(0)
    found = dx, dweight, dtarget, dbias, dclasses
    return tuple(
        [
            None if t is None or s is None else t.reshape(s.shape).to(s.dtype)
            for t, s in zip(found, specs, strict=True)
        ]
    )


def _reference(bp: BackwardParams, g: Tensor, *saved: Tensor | None) -> Tensors:
    found = _rule(bp.params, bp.needs, bp.specs, (g,), saved)
    return tuple([t for t in found if t is not None])


def _jvp(params: Params, tensors: Tensors, outputs: Tensors, tangents: Tensors) -> Tensor:
    x, weight, target, bias, class_weight = tensors
    assert x is not None
    assert weight is not None
    assert target is not None
    factors = _factors(params, x, weight, target, bias, class_weight)
    logits = _logits(params, factors)
    dx, dweight, dtarget, dbias, dclasses = (t if t is None else settle(t) for t in tangents)
    moving: Tensor | None = None
    for at in ((dx, weight), (x, dweight)):
        if at[0] is not None and at[1] is not None:
            part = _logits(params, _factors(params, at[0], at[1], target, None, None))
            moving = part if moving is None else moving + part
    if dbias is not None:
        part = dbias.to(logits.dtype).reshape(logits.shape[1:]).expand(logits.shape)
        moving = part if moving is None else moving + part
    if dtarget is not None:
        dtarget = dtarget.reshape(factors.target.shape)
    found = moved(params, (logits, factors.target, class_weight), (moving, dtarget, dclasses))
    return found.reshape(_public(x, weight)) if params.reduction == "none" else found


def _cost(params: Params, x: Tensor, weight: Tensor, target: Tensor, *rest: Any) -> tuple[int, int]:
    rows = x.numel() // max(x.shape[-1], 1)
    moved = sum(t.numel() * t.element_size() for t in (x, weight, target))
    return moved, 2 * rows * weight.numel()


def _bench(make: Make, size: Any) -> Sample:
    """Tokens of a model whose vocabulary is far larger than its hidden size."""
    tokens, hidden, classes = size.side, min(size.side, 2**12), 8 * size.side
    target = make(tokens, low=0, high=classes, dtype=torch.int64, requires_grad=False)
    return Sample((make(tokens, hidden), make(classes, hidden), target))


def _samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 2), make(4, 2), labels(make, 4, 3)), {}, "mean")
    yield Sample(
        (make(3, 2), make(4, 2), without(labels(make, 4, 3), 1)),
        {
            "linear_bias": make(4), "weight": make(4, low=0.5, requires_grad=False),
            "ignore_index": 1, "reduction": "none", "label_smoothing": 0.2,
        },
        "each, weighted, smoothed",
    )  # fmt: skip
    yield Sample(
        (make(2, 2), make(3, 2), make(2, 3, low=0.1, high=1.0)),
        {"weight": make(3, low=0.5)},
        "probabilities",
    )
    yield Sample((make(5), make(4, 5), labels(make, 4)), {"reduction": "sum"}, "one row")
    yield Sample((make(2, 5), make(4, 3, 5), labels(make, 4, 2, 3)), {}, "several losses of a row")
    yield Sample((make(0, 5), make(4, 5), labels(make, 4, 0)), {"reduction": "sum"}, "no rows")
    yield Sample(
        (make(3, 2), make(400, 2), labels(make, 400, 3)),
        {"linear_bias": make(400)},
        "several pieces",
    )
    yield Sample(
        (make(3, 2), make(400, 2), make(3, 400, low=0.0, high=0.01)),
        {"weight": make(400, low=0.5), "reduction": "sum"},
        "several pieces of probabilities",
    )


linear_cross_entropy_backward: Op = Op(
    name="linear_cross_entropy_backward",
    bind=None,
    forward=_backward_forward,
    outputs=5,
    reference=_reference,
    kernels=(*GEMM, "cross_entropy_bwd", "reduce"),
    dtypes=FLOATING,
    formula="autograd through the rule of linear_cross_entropy",
)


def _register() -> None:
    """torch has it since 2.13."""
    register(
        Op(
            name="linear_cross_entropy",
            bind=_bind,
            ambient=object if INTERPRETED else float32_precision,  # values are looked at
            forward=_forward,
            replaces=(F.linear_cross_entropy,),
            saves=_saves,
            rule=_rule,
            backward=linear_cross_entropy_backward,
            jvp=_jvp,
            autocast=KEPT,
            schema=(
                "(Tensor input, Tensor linear_weight, Tensor target, *, Tensor? linear_bias=None, "
                'Tensor? weight=None, str reduction="mean", int? ignore_index=None, '
                "float label_smoothing=0.0, str? options=None) -> Tensor"
            ),
            compiles=_compiles,
            fake=_fake,
            opinfo=("nn.functional.linear_cross_entropy",),
            kernels=(*GEMM, "cross_entropy_fwd", "reduce"),
            formula="dx = d @ w; dw = d.T @ x; db = sum of d over rows; d = dlogits",
            dtypes=FLOATING,
            samples=_samples,
            bench=_bench,
            differs=OUT_OF_RANGE,
            sources="torch.nn.functional.linear and cross_entropy",
            cost=_cost,
        )
    )


if hasattr(F, "linear_cross_entropy"):
    _register()
