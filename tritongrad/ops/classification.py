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
from typing import Any

import torch
from torch import Tensor

from ..admission import launchable, settle
from ..dispatch import apply
from ..dtypes import FLOATING
from ..function import differentiate
from ..launchers import classification as launcher
from ..layout import batched
from ..op import BackwardParams, Needs, Op, Spec, Tensors, register
from ..runtime import INTERPRETED
from ..sampling import Make, Sample
from . import class_calls
from .class_calls import KEPT, OUT_OF_RANGE, Params, bind_extended, labels, read, without
from .class_rules import moved, reduced_losses, slopes, spread, upstream, wanted, weight_of_all
from .loss_calls import modern

F = torch.nn.functional


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
    if params.overwrites and x.is_leaf and x.requires_grad:
        raise RuntimeError(
            "inplace_grad: the logits are a leaf that requires a gradient, which none of its "
            "gradients may overwrite"
        )
    found = launcher.rows(params.call, x, target, weight, params.row_dtype, params.averaged)
    return results(params, found)


def results(params: Params, found: launcher.Rows) -> tuple[Tensor, ...]:
    """The public result, then what is kept for backward."""
    assert found.loss is not None
    out, *scale = reduced(params, found.loss, found.share)
    slope = () if found.slope is None else (found.slope,)
    return (out, found.top, found.total, *slope, *scale)


def kept(params: Params, top: Tensor, total: Tensor, *rest: Tensor) -> tuple[Any, Any]:
    """What forward kept: of the rows, and the factor of a mean for each of them."""
    found = launcher.Rows(None, None, top, total, rest[0] if params.call.sloped else None)
    if not params.averaged:
        return found, None
    return found, spread(params, rest[-1], top.dim()).expand(top.shape)


def extras(params: Params) -> int:
    """How many results there are beside the public one."""
    return 2 + params.call.sloped + params.averaged


def _saves(params: Params, needs: Needs) -> tuple[int, ...]:
    return (0, 1, 2, *range(4, 4 + extras(params)))


def _backward_forward(
    bp: BackwardParams,
    g: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    loss: None,
    *rest: Tensor,
) -> Any:
    params: Params = bp.params
    call = params.call
    if not rest:  # a caller that has only the loss
        rest = _forward(params, x, target, weight)[1:]
    found, scale = kept(params, *rest)
    g = spread(params, g, found.top.dim()).expand(found.top.shape)
    made: list[Tensor | None] = [None, None, None]
    if bp.needs[2]:
        spec = bp.specs[2]
        assert spec is not None
        # First, because it reads the logits.
        made[2] = launcher.weight_gradient(
            call, g, params.factor or 1.0, x, target, found, params.batch, spec.dtype
        )
    if bp.needs[0]:
        made[0] = x.detach() if params.overwrites else torch.empty_like(x)
    if bp.needs[1]:
        made[1] = torch.empty_like(target)
    if bp.needs[0] or bp.needs[1]:
        launcher.gradients(call, g, scale, params.factor, x, target, weight, found, *made[:2])
    if params.overwrites and bp.needs[0]:
        torch.autograd.graph.increment_version(x)
    return present(made)


def _like_the_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """torch's own, of sizes that are not known, has another shape where nothing is reduced."""
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce, False)
    if reduction != "none":
        return input.new_empty(())
    dim = min(input.dim() - 1, 1)
    return input.new_empty([*input.shape[:dim], *input.shape[dim + 1 :]])


def _second(
    bp: BackwardParams, needs: Needs, specs: tuple, grads: Tensors, saved: Tensors
) -> Tensors:
    if bp.params.overwrites:
        raise RuntimeError(
            "inplace_grad: the gradient of cross_entropy has overwritten the logits, and has no "
            "derivative of its own"
        )
    return differentiate(cross_entropy_backward, bp, needs, grads, saved[: len(needs)])


def present(made: list[Tensor | None]) -> Any:
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
    found = launcher.likelihoods(params.call, x, target, weight, params.row_dtype, params.averaged)
    made = reduced(params, *found)
    return made[0] if len(made) == 1 else made


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
    if scale is None and params.averaged:  # compiled code keeps the loss alone
        scale = _likelihood(params, x, target, weight)[1]
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
    _, _, q, counted = wanted(params, target, weight, rank)
    scale = rest[0] if rest else None
    if scale is None and params.averaged:
        scale = 1.0 / weight_of_all(params, target, weight)
    g = upstream(params, settle(g), scale, rank - 1).unsqueeze(dim)
    assert counted is not None
    return torch.where(counted, -g * q, 0.0).expand(x.shape).to(x.dtype), None, None


def _linear(params: Params, x: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """The loss of a tangent, or of the gradient of a gradient: it is linear."""
    x = settle(x)
    if launchable((x,)):
        return apply(nll_loss, params, (x, target, weight))
    _, _, q, counted = wanted(params, target, weight, x.dim())
    assert counted is not None
    picked = torch.where(counted & (q != 0), -x.to(params.call.compute), 0.0)
    return reduced_losses(params, (picked * q).sum(params.call.dim), target, weight)


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


def index_samples(make: Make) -> Iterator[Sample]:
    """Calls of either loss."""
    yield Sample((make(3, 5), labels(make, 5, 3)), {}, "mean")
    weight = make(5, low=0.5, high=2.0, requires_grad=False)
    ignoring = without(labels(make, 5, 3), 2)
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
        (make(3, 4), without(labels(make, 4, 3), -100), weight.detach()), smoothed, "smoothed"
    )
    yield Sample((make(3, 4), probabilities(3, 4), weight), smoothed, "probabilities")
    yield Sample(
        (make(2, 3, 2), probabilities(2, 3, 2)), {"reduction": "none"}, "probabilities of each"
    )
    yield Sample((make(2, 16411), labels(make, 16411, 2)), smoothed, "in several tiles")


# ------------------------------------------------------------------------------------------- TABLE

cross_entropy_backward: Op = Op(
    name="cross_entropy_backward",
    bind=None,
    forward=_backward_forward,
    outputs=3,
    rule=_second,
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
        variants={class_calls.cross_entropy: bind_extended},
        ambient=object if INTERPRETED else None,  # values are looked at
        saves=_saves,
        rule=_rule,
        backward=cross_entropy_backward,
        jvp=lambda params, tensors, outputs, tangents: moved(params, tensors, tangents),
        vmap=vmap_of(lambda: cross_entropy),
        autocast=KEPT,
        schema="(Tensor input, Tensor target, Tensor? weight=None, bool? size_average=None, "
        'int ignore_index=-100, bool? reduce=None, str reduction="mean", '
        "float label_smoothing=0.0) -> Tensor",
        fake=_like_the_loss,
        opinfo=("nn.functional.cross_entropy",),
        kernels=("cross_entropy_fwd", "reduce"),
        formula="dx = g * (softmax(x) * sum(w * y) - w * y); dy = -g * w * log_softmax(x)",
        dtypes=FLOATING,
        samples=_samples,
        differs=OUT_OF_RANGE,
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
        schema="(Tensor input, Tensor target, Tensor? weight=None, bool? size_average=None, "
        'int ignore_index=-100, bool? reduce=None, str reduction="mean") -> Tensor',
        fake=_like_the_loss,
        opinfo=("nn.functional.nll_loss",),
        kernels=("nll_loss_fwd", "reduce"),
        formula="dx = -g * w at the label, 0 elsewhere",
        dtypes=FLOATING,
        samples=index_samples,
        differs=OUT_OF_RANGE,
        sources="torch derivatives.yaml",
        cost=_likelihood_cost,
    )
)
