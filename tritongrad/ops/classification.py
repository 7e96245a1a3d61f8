"""``cross_entropy`` and ``nll_loss``: a kernel for the losses of all rows, one for their gradient.

The logits are read once forward and once backward, through their strides, and never written. What
is kept for backward are two or three numbers a row, not the gradient: making that forward would
move as many bytes (it has to be scaled, by a factor that only the device knows) and hold memory as
large as the logits from forward to backward.

The rules are in torch mathematics, with the targets of a row written out as its classes; forward
mode and all orders beyond the first come from them, in tensors of the size of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..admission import admit, launchable, settle
from ..dispatch import apply
from ..dtypes import COMPUTE_DTYPE, FLOATING
from ..launchers import classification as launcher
from ..launchers.classification import Smoothing
from ..layout import batched
from ..op import BackwardParams, Needs, Op, Spec, Tensors, Unsupported, register
from ..runtime import INTERPRETED
from ..sampling import Make, Sample
from .loss_calls import REDUCTIONS, modern, not_derived, values

F = torch.nn.functional


class Params(NamedTuple):
    """What a call is beside its tensors.

    Attributes:
        call: what each launch is told.
        batch: dimensions in front that vmap added: their losses stay apart.
        reduction: torch's.
        number: rows of which a mean of probabilities' losses is taken.
        result: dtype of the result.
    """

    call: launcher.Call
    batch: int
    reduction: str
    number: int
    result: torch.dtype

    @property
    def averaged(self) -> bool:
        """Whether the sum of losses is divided by that of their labels' weights."""
        return self.reduction == "mean" and self.call.labelled

    @property
    def factor(self) -> float | None:
        """Each row's part in a mean, where that is the same for all."""
        if self.reduction == "mean" and not self.call.labelled:
            return 1.0 / max(self.number, 1)
        return None


# ---------------------------------------------------------------------- reading torch's signatures


def read(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    probabilities: bool = True,
) -> tuple[Tensors, Params]:
    """The canonical call of either loss; ``probabilities`` may be targets of one of them."""
    if type(reduction) is not str or reduction not in REDUCTIONS:
        raise Unsupported(f"reduction={reduction!r}")
    if type(ignore_index) is not int or type(label_smoothing) not in (int, float):
        raise Unsupported("an ignore_index or label_smoothing of another type")
    if not -(2**63) <= ignore_index < 2**63:
        raise Unsupported("ignore_index beyond 64 bits")
    if not label_smoothing <= 1:
        raise Unsupported("label_smoothing above 1")
    for tensor in (input, target, *([] if weight is None else [weight])):
        admit(tensor)
        if tensor.get_device() != input.get_device():
            raise Unsupported("tensors on different devices")
    if not input.dim():
        raise Unsupported("no dimension of classes")
    result = _result(input)
    dim = min(input.dim() - 1, 1)
    shape = input.shape
    classes = shape[dim]
    kept = torch.Size((*shape[:dim], *shape[dim + 1 :]))
    if not classes:
        raise Unsupported("no classes")
    index = not (probabilities and target.shape == shape)
    if index:
        if target.dtype is not torch.int64:
            raise Unsupported(f"labels of {str(target.dtype).removeprefix('torch.')}")
        if target.shape != kept:
            raise Unsupported("not one label for each row")
        weight = without_derivative(weight)
        if INTERPRETED:
            # torch raises there. On a GPU its kernel traps where the result here is NaN.
            check_labels(target, classes, ignore_index)
    elif _result(target) is not result:
        raise Unsupported("probabilities of another dtype")
    elif ignore_index >= 0:
        raise Unsupported("ignore_index beside probabilities")
    if weight is not None and (weight.shape != (classes,) or _result(weight) is not result):
        raise Unsupported("weight is not one number of the input's dtype for each class")
    smoothing = None
    if label_smoothing > 0:
        smoothing = Smoothing(1 - label_smoothing, label_smoothing / classes)
    call = launcher.Call(
        dim, index, ignore_index, smoothing, z_loss, COMPUTE_DTYPE[result], classes
    )  # fmt: skip
    return (input, target, weight), Params(call, 0, reduction, kept.numel(), result)


def _result(tensor: Tensor) -> torch.dtype:
    """The dtype that a tensor is taken for. Under autocast that is float32, as which the kernels
    read half precision anyway: it is converted in no copy of the logits."""
    if tensor.dtype not in FLOATING:
        raise Unsupported(f"dtype {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.dtype is not torch.float64 and torch.is_autocast_enabled(tensor.device.type):
        return torch.float32
    return tensor.dtype


def without_derivative(weight: Tensor | None) -> Tensor | None:
    """The weight of a call in which torch has no derivative by it."""
    if weight is None:
        return None
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(weight).tangent is not None:
        raise Unsupported("forward mode by weight, of which torch has none")
    return not_derived(weight, "weight")


def check_labels(target: Tensor, classes: int, ignored: int) -> None:
    labels = values(target)
    if ((labels < 0) | (labels >= classes)).logical_and(labels != ignored).any():
        raise Unsupported("a label that is no class")


def _bind_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> tuple[Tensors, Params]:
    modern(size_average, reduce)
    return read(input, target, weight, ignore_index, reduction, label_smoothing)


def _bind_nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> tuple[Tensors, Params]:
    modern(size_average, reduce)
    return read(input, target, weight, ignore_index, reduction, probabilities=False)


# ------------------------------------------------------------------------------- torch mathematics


def spread(params: Params, value: Tensor, rank: int) -> Tensor:
    """What is as the result is, with a dimension for each of the ``rank`` that number the rows."""
    if params.reduction == "none":
        return value
    return value.reshape((*value.shape, *[1] * (rank - params.batch)))


def _upstream(params: Params, g: Tensor, scale: Tensor | None, rank: int) -> Tensor:
    """The gradient of each row's loss, expanded along the classes."""
    g = spread(params, g.to(params.call.compute), rank)
    if scale is not None:
        g = g * spread(params, scale, rank)
    if params.factor is not None:
        g = g * params.factor
    return g


class Wanted(NamedTuple):
    """Targets in the shape of the logits.

    Attributes:
        y: how much of each class is wanted.
        w: weights of classes, None: 1.
        q: their product.
        counted: whether a row counts, expanded along the classes; None: all do.
    """

    y: Tensor
    w: Tensor | None
    q: Tensor
    counted: Tensor | None


def _wanted(params: Params, target: Tensor, weight: Tensor | None, rank: int) -> Wanted:
    call = params.call
    dim, compute = call.dim, call.compute
    w = counted = None
    if weight is not None:
        *front, classes = weight.shape
        w = weight.to(compute).reshape(
            *front, *[1] * (dim - len(front)), classes, *[1] * (rank - dim - 1)
        )
    if call.labelled:
        label = target.unsqueeze(dim)
        counted = label != call.ignored
        numbers = torch.arange(call.classes, device=target.device)
        y = (label == numbers.view(-1, *[1] * (rank - dim - 1))).to(compute)
    else:
        y = target.to(compute)
    if call.smoothing is not None:
        y = y * call.smoothing.keep + call.smoothing.spread
    return Wanted(y, w, y if w is None else y * w, counted)


def _weight_of_all(params: Params, target: Tensor, weight: Tensor | None) -> Tensor:
    """What the mean of labels' losses divides by."""
    call = params.call._replace(smoothing=None)
    rank = target.dim() + 1
    _, _, q, counted = _wanted(params._replace(call=call), target, weight, rank)
    assert counted is not None
    return _summed(params, torch.where(counted, q, 0.0).sum(call.dim))


def slopes(
    params: Params, needs: Needs, g: Tensor, x: Tensor, target: Tensor, weight: Any, scale: Any
) -> Tensors:
    """The gradients of logits, targets and weights of classes, in the computing dtype."""
    call = params.call
    dim, rank = call.dim, x.dim()
    x = x.to(call.compute)
    if scale is None and params.averaged:
        scale = 1.0 / _weight_of_all(params, target, weight)
    g = _upstream(params, g, scale, rank - 1).unsqueeze(dim)
    y, w, q, counted = _wanted(params, target, weight, rank)
    if counted is not None:
        g = torch.where(counted, g, 0.0)
    dx = dy = dw = None
    if needs[0]:
        slope = q.sum(dim, keepdim=True)
        if call.z:
            slope = slope + 2 * call.z * torch.logsumexp(x, dim, keepdim=True)
        dx = g * (torch.softmax(x, dim) * slope - q)
    if needs[1] or needs[2]:
        downhill = -g * torch.log_softmax(x, dim)
        if needs[1]:
            dy = downhill if w is None else downhill * w
            dy = dy if call.smoothing is None else dy * call.smoothing.keep
        if needs[2]:
            dims = [d for d in range(params.batch, rank) if d != dim]
            dw = downhill * y
            dw = dw.sum(dims) if dims else dw
    return dx, dy, dw


def _summed(params: Params, value: Tensor) -> Tensor:
    """The sum over rows, but for the dimensions in front."""
    dims = tuple(range(params.batch, value.dim()))
    return value.sum(dims) if dims else value


def _reduced(params: Params, losses: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    if params.reduction != "none":
        losses = _summed(params, losses)
    if params.averaged:
        losses = losses / _weight_of_all(params, target, weight)
    elif params.factor is not None:
        losses = losses * params.factor
    return losses.to(params.result)


def moved(params: Params, tensors: Tensors, tangents: Tensors) -> Tensor:
    """The tangent of a cross entropy."""
    (x, target, weight), (dx, dy, dw) = tensors, tangents
    assert x is not None
    assert target is not None
    call = params.call
    dim, compute = call.dim, call.compute
    x = x.to(compute)
    y, w, q, counted = _wanted(params, target, weight, x.dim())
    logp = torch.log_softmax(x, dim)
    parts: list[Tensor] = []
    if dx is not None:
        dx = settle(dx).to(compute)
        away = (torch.exp(logp) * dx).sum(dim, keepdim=True)
        parts.append((q * (away - dx)).sum(dim))
        if call.z:
            parts.append(2 * call.z * torch.logsumexp(x, dim) * away.squeeze(dim))
    if dy is not None:
        part = settle(dy).to(compute) * logp
        part = part if w is None else part * w
        keep = 1.0 if call.smoothing is None else call.smoothing.keep
        parts.append(-keep * part.sum(dim))
    if dw is not None:
        like = _wanted(params, target, settle(dw), x.dim()).w
        assert like is not None
        parts.append(-(y * like * logp).sum(dim))
    losses = parts[0]
    for part in parts[1:]:
        losses = losses + part
    if counted is not None:
        losses = torch.where(counted.squeeze(dim), losses, 0.0)
    return _reduced(params, losses, target, weight)


# ----------------------------------------------------------------------------------- made into ops


def shifted(params: Params) -> Params:
    """``params`` for tensors with one more dimension, in front."""
    call = params.call._replace(dim=params.call.dim + 1)
    return params._replace(call=call, batch=params.batch + 1)


def vmap_of(op: Callable[[], Op]) -> Callable[..., Any]:
    """The vmap rule of each op here: a batch is one more dimension, in front."""

    def vmap(info: Any, params: Any, tensors: Tensors, dims: tuple) -> Any:
        if isinstance(params, BackwardParams):
            size = info.batch_size
            specs = tuple([s and Spec(torch.Size((size, *s.shape)), s.dtype) for s in params.specs])
            params = params._replace(params=shifted(params.params), specs=specs)
        else:
            params = shifted(params)
        found = apply(op(), params, batched(tensors, dims, info.batch_size), everything=True)
        return found, (0,) * len(found) if type(found) is tuple else 0

    return vmap


def reduced(params: Params, loss: Tensor, share: Tensor | None) -> tuple[Tensor, ...]:
    """The result from each row's loss; then the factor of a mean by weights."""
    if params.reduction == "none":
        return (loss,)
    if share is not None:
        return launcher.average(loss, share, params.batch, params.result)
    if params.reduction == "mean":
        return (launcher.mean(loss, params.batch, params.number, params.result),)
    return (launcher.total(loss, params.batch, params.result),)


def _forward(
    params: Params, x: Tensor, target: Tensor, weight: Tensor | None
) -> tuple[Tensor, ...]:
    dtype = params.result if params.reduction == "none" else params.call.compute
    found = launcher.rows(params.call, x, target, weight, dtype, params.averaged)
    assert found.loss is not None
    out, *scale = reduced(params, found.loss, found.share)
    slope = () if found.slope is None else (found.slope,)
    return (out, found.top, found.total, *slope, *scale)


def _saves(params: Params, needs: Needs) -> tuple[int, ...]:
    extras = 2 + params.call.sloped + params.averaged
    return (0, 1, 2, *range(4, 4 + extras))


def _backward_forward(
    bp: BackwardParams,
    g: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    loss: None,
    top: Tensor,
    total: Tensor,
    *rest: Tensor,
) -> Any:
    params: Params = bp.params
    call = params.call
    slope = rest[0] if call.sloped else None
    found = launcher.Rows(None, None, top, total, slope)
    g = spread(params, g, top.dim()).expand(top.shape)
    scale = spread(params, rest[-1], top.dim()).expand(top.shape) if params.averaged else None
    made = [
        torch.empty_like(t, dtype=s.dtype) if need and s is not None else None
        for t, need, s in zip((x, target), bp.needs, bp.specs, strict=False)
    ]
    if bp.needs[0] or bp.needs[1]:
        launcher.gradients(call, g, scale, params.factor, x, target, weight, found, *made)
    if bp.needs[2]:
        spec = bp.specs[2]
        assert spec is not None
        made.append(
            launcher.weight_gradient(
                call, g, params.factor or 1.0, x, target, found, params.batch, spec.dtype
            )
        )
    return _wanted_alone(made)


def _wanted_alone(made: list[Tensor | None]) -> Any:
    found = tuple([t for t in made if t is not None])
    return found[0] if len(found) == 1 else found


def _rule(
    params: Params, needs: Needs, specs: tuple[Spec | None, ...], grads: Tensors, saved: Tensors
) -> Tensors:
    (g, *_), (x, target, weight, _, *rest) = grads, saved
    assert g is not None
    assert x is not None
    assert target is not None
    scale = rest[-1] if params.averaged and rest else None
    found = slopes(params, needs, settle(g), x, target, weight, scale)
    return tuple([
        t if t is None or s is None else t.to(s.dtype)
        for t, s in zip(found, specs, strict=True)
    ])  # fmt: skip


def _reference_of(rule: Callable[..., Tensors]) -> Callable[..., Tensors]:
    def reference(bp: BackwardParams, g: Tensor, *saved: Tensor | None) -> Tensors:
        found = rule(bp.params, bp.needs, bp.specs, (g,), saved)
        return tuple([t for t in found if t is not None])

    return reference


def _likelihood(
    params: Params, x: Tensor, target: Tensor, weight: Tensor | None
) -> Tensor | tuple[Tensor, ...]:
    dtype = params.result if params.reduction == "none" else params.call.compute
    found = launcher.likelihoods(params.call, x, target, weight, dtype, params.averaged)
    results = reduced(params, *found)
    return results[0] if len(results) == 1 else results


def _likelihood_saves(params: Params, needs: Needs) -> tuple[int, ...]:
    # The input as well, as torch does: the second derivative by it is zeros, and not missing.
    return (0, 1, 2, 4) if params.averaged else (0, 1, 2)


def _likelihood_backward(
    bp: BackwardParams,
    g: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    loss: None,
    scale: Tensor | None = None,
) -> Tensor:
    params: Params = bp.params
    kept = target.shape
    g = spread(params, g, len(kept)).expand(kept)
    if scale is not None:
        scale = spread(params, scale, len(kept)).expand(kept)
    dx = torch.empty_like(x)
    launcher.likelihood_gradient(params.call, g, scale, target, weight, dx)
    return dx


def _likelihood_rule(
    params: Params, needs: Needs, specs: tuple[Spec | None, ...], grads: Tensors, saved: Tensors
) -> Tensors:
    (g, *_), (x, target, weight, _, *rest) = grads, saved
    assert g is not None
    assert x is not None
    assert target is not None
    dim, rank = params.call.dim, x.dim()
    _, _, q, counted = _wanted(params, target, weight, rank)
    scale = rest[0] if rest else None
    if scale is None and params.averaged:
        scale = 1.0 / _weight_of_all(params, target, weight)
    g = _upstream(params, settle(g), scale, rank - 1).unsqueeze(dim)
    assert counted is not None
    return torch.where(counted, -g * q, 0.0).expand(x.shape).to(x.dtype), None, None


def _linear(params: Params, x: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """The loss of a tangent, or of the gradient of a gradient: it is linear."""
    x = settle(x)
    if launchable((x,)):
        return apply(nll_loss, params, (x, target, weight))
    _, _, q, counted = _wanted(params, target, weight, x.dim())
    assert counted is not None
    picked = torch.where(counted & (q != 0), -x.to(params.call.compute), 0.0)
    return _reduced(params, (picked * q).sum(params.call.dim), target, weight)


def _likelihood_moved(
    params: Params, tensors: Tensors, outputs: Tensors, tangents: Tensors
) -> Tensor:
    (_, target, weight), (dx, *_) = tensors, tangents
    assert target is not None
    assert dx is not None
    return _linear(params, dx, target, weight)


def _likelihood_second(
    bp: BackwardParams, needs: Needs, specs: tuple, grads: Tensors, saved: Tensors
) -> Tensors:
    """The gradients of ``g`` and of ``x``, in which there is none."""
    (v, *_), (_, x, target, weight, *_) = grads, saved
    assert v is not None
    assert x is not None
    assert target is not None
    dg = _linear(bp.params, v, target, weight) if needs[0] else None
    dx = torch.zeros_like(x) if needs[1] else None
    return (dg, dx, *[None] * (len(needs) - 2))


def _cost(params: Params, x: Tensor, target: Tensor, weight: Tensor | None) -> tuple[int, int]:
    moved = x.numel() * x.element_size() + target.numel() * target.element_size()
    return moved, 5 * x.numel()


def _likelihood_cost(
    params: Params, x: Tensor, target: Tensor, weight: Tensor | None
) -> tuple[int, int]:
    return target.numel() * (x.element_size() + target.element_size()), target.numel()


# --------------------------------------------------------------------------------- samples


def labels(make: Make, classes: int, *shape: int) -> Tensor:
    """Labels in the shape, with a 1 behind it that is left away: so they are as many as the rows
    where sizes are changed."""
    found = make(*shape, 1, low=0, high=classes, dtype=torch.int64, requires_grad=False)
    return found.squeeze(-1)


def _without(target: Tensor, label: int) -> Tensor:
    """Targets of which the first is ``label``."""
    target.view(-1)[:1] = label
    return target


def index_samples(make: Make) -> Iterator[Sample]:
    """Calls of either loss."""
    yield Sample((make(3, 5), labels(make, 5, 3)), {}, "mean")
    weight = make(5, low=0.5, high=2.0, requires_grad=False)
    ignoring = _without(labels(make, 5, 3), 2)
    yield Sample(
        (make(3, 5), ignoring, weight), {"ignore_index": 2, "reduction": "none"}, "each, weighted"
    )
    yield Sample((make(3, 5), ignoring, weight), {"ignore_index": 2}, "weighted mean")
    yield Sample((make(5), labels(make, 5)), {"reduction": "sum"}, "one row")
    yield Sample(
        (make(2, 3, 2, 2), labels(make, 3, 2, 2, 2)), {"reduction": "sum"}, "classes not last"
    )
    yield Sample((make(0, 5), labels(make, 5, 0)), {"reduction": "sum"}, "no rows")
    yield Sample((make(7, 6).t(), labels(make, 7, 6)), {}, "transposed")


def _samples(make: Make) -> Iterator[Sample]:
    yield from index_samples(make)

    def probabilities(*shape: int) -> Tensor:
        return make(*shape, low=0.1, high=1.0)

    weight = make(4, low=0.5, high=2.0)
    smoothed = {"label_smoothing": 0.2}
    yield Sample(
        (make(3, 4), _without(labels(make, 4, 3), -100), weight.detach()), smoothed, "smoothed"
    )
    yield Sample((make(3, 4), probabilities(3, 4), weight), smoothed, "probabilities")
    yield Sample(
        (make(2, 3, 2), probabilities(2, 3, 2)), {"reduction": "none"}, "probabilities of each"
    )
    yield Sample((make(2, 16411), labels(make, 16411, 2)), smoothed, "in several tiles")


# ------------------------------------------------------------------------------------------- TABLE

KEPT = {"cuda": "keep", "cpu": "keep"}
"""Under autocast the result is float32, and the kernels convert what they read."""

cross_entropy_backward: Op = Op(
    name="cross_entropy_backward",
    bind=None,
    forward=_backward_forward,
    outputs=3,
    reference=_reference_of(_rule),
    vmap=vmap_of(lambda: cross_entropy_backward),
    kernels=("cross_entropy_bwd", "reduce"),
    dtypes=FLOATING,
    formula="autograd through the rule of cross_entropy",
)
cross_entropy: Op = register(
    Op(
        name="cross_entropy",
        bind=_bind_cross_entropy,
        forward=_forward,
        replaces=(F.cross_entropy,),
        ambient=object if INTERPRETED else None,  # values are looked at
        saves=_saves,
        rule=_rule,
        backward=cross_entropy_backward,
        jvp=lambda params, tensors, outputs, tangents: moved(params, tensors, tangents),
        vmap=vmap_of(lambda: cross_entropy),
        autocast=KEPT,
        opinfo=("nn.functional.cross_entropy",),
        kernels=("cross_entropy_fwd", "reduce"),
        formula="dx = g * (softmax(x) * sum(w * y) - w * y); dy = -g * w * log_softmax(x)",
        dtypes=FLOATING,
        samples=_samples,
        sources="torch derivatives.yaml; see kernels/classification.py",
        cost=_cost,
    )
)
nll_loss_backward: Op = Op(
    name="nll_loss_backward",
    bind=None,
    forward=_likelihood_backward,
    rule=_likelihood_second,
    reference=_reference_of(_likelihood_rule),
    vmap=vmap_of(lambda: nll_loss_backward),
    kernels=("nll_loss_bwd",),
    dtypes=FLOATING,
    formula="autograd through the rule of nll_loss",
)
nll_loss: Op = register(
    Op(
        name="nll_loss",
        bind=_bind_nll_loss,
        forward=_likelihood,
        replaces=(F.nll_loss,),
        ambient=object if INTERPRETED else None,  # values are looked at
        saves=_likelihood_saves,
        rule=_likelihood_rule,
        backward=nll_loss_backward,
        jvp=_likelihood_moved,
        vmap=vmap_of(lambda: nll_loss),
        autocast=KEPT,
        opinfo=("nn.functional.nll_loss",),
        kernels=("nll_loss_fwd", "reduce"),
        formula="dx = -g * w at the label, 0 elsewhere",
        dtypes=FLOATING,
        samples=index_samples,
        sources="torch derivatives.yaml",
        cost=_likelihood_cost,
    )
)
