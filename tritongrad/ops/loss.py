"""Pointwise losses: torch's signatures, and one row a loss.

The rules are torch's (derivatives.yaml and FunctionsManual.cpp), at kinks too.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..admission import launchable
from ..dispatch import apply
from ..dtypes import is_number
from ..kernels import loss as k
from ..op import Bind, Unsupported
from . import operands
from .criterion import Form, Params, loss
from .elementary import times_log
from .loss_calls import (
    WITH_BATCHMEAN,
    Call,
    factor,
    modern,
    not_derived,
    read,
    same_size,
    samples_of,
    values,
    warn_of_sizes,
    with_weights,
)
from .rows import row

F = torch.nn.functional

# ----------------------------------------------------------------------- errors: functions of x - y

_XYW = ("x", "y", "w")


def _slope(d: Tensor) -> Tensor:
    """The sign, with slope 0 also where it is NaN: torch selects among constants."""
    return torch.where(d == d, torch.sign(d), 0 * d)


MSE = Form(
    _XYW, k.mse_loss, k.mse_loss_bwd,
    {
        "x": lambda g, x, y: g * (2 * (x - y)),
        "y": lambda g, x, y: g * (2 * (y - x)),
        "w": lambda g, x, y: g * (x - y) ** 2,
    },
    and_weight=k.mse_loss_and_weight,
)  # fmt: skip
L1 = Form(
    _XYW, k.l1_loss, k.l1_loss_bwd,
    {
        "x": lambda g, x, y: g * torch.sign(x - y),
        "y": lambda g, x, y: g * torch.sign(y - x),
        "w": lambda g, x, y: g * torch.abs(x - y),
    },
    and_weight=k.l1_loss_and_weight,
)  # fmt: skip


def _smooth_l1_slope(g: Tensor, d: Tensor, beta: float) -> Tensor:
    return torch.where(torch.abs(d) < beta, g * (d / beta), g * _slope(d))


SMOOTH_L1 = Form(
    ("x", "y"), k.smooth_l1_loss, k.smooth_l1_loss_bwd,
    {
        "x": lambda g, x, y, beta: _smooth_l1_slope(g, x - y, beta),
        "y": lambda g, x, y, beta: _smooth_l1_slope(g, y - x, beta),
    },
    ("beta",),
)  # fmt: skip
# smooth_l1_loss of beta=0.
ABSOLUTE = Form(
    ("x", "y"), k.absolute_error, k.absolute_error_bwd,
    {"x": L1.rules["x"], "y": L1.rules["y"]},
)  # fmt: skip


def _huber_slope(g: Tensor, d: Tensor, delta: float) -> Tensor:
    return torch.where(torch.abs(d) < delta, g * d, g * (delta * _slope(d)))


def _huber(x: Tensor, y: Tensor, delta: float) -> Tensor:
    z = torch.abs(x - y)
    return torch.where(z <= delta, 0.5 * z * z, delta * (z - 0.5 * delta))


HUBER = Form(
    _XYW, k.huber_loss, k.huber_loss_bwd,
    {
        "x": lambda g, x, y, delta: _huber_slope(g, x - y, delta),
        "y": lambda g, x, y, delta: _huber_slope(g, y - x, delta),
        "w": lambda g, x, y, delta: g * _huber(x, y, delta),
    },
    ("delta",),
)  # fmt: skip


def _bind_error(form: Form) -> Bind:
    def bind(
        input: Tensor,
        target: Tensor,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
    ) -> Call:
        modern(size_average, reduce)
        weighted = factor(weight, input, target)
        integral = None if weighted else 1
        tensors = (input, target, weight)
        call = read(form, tensors, reduction, integral=integral, by_weight=weighted)
        warn_of_sizes(input, target)
        return call

    return bind


def bind_smooth_l1(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Call:
    modern(size_average, reduce)
    if not is_number(beta) or not beta >= 0:
        raise Unsupported(f"beta={beta!r}")
    form, numbers = (SMOOTH_L1, (beta,)) if beta else (ABSOLUTE, ())
    call = read(form, (input, target), reduction, numbers=numbers, integral=1)
    warn_of_sizes(input, target)
    return call


def bind_huber(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Call:
    if not is_number(delta) or not delta > 0:
        raise Unsupported(f"delta={delta!r}")
    factor(weight, input, target)
    call = read(HUBER, (input, target, weight), reduction, numbers=(delta,))
    warn_of_sizes(input, target)
    return call


# ------------------------------------------------------------------------------------ probabilities

_EPSILON = 1e-12
_XYPW = ("x", "y", "p", "w")


def _spread(x: Tensor) -> Tensor:
    return (x + _EPSILON) * (1 - x + _EPSILON)


# u (x - y) / (x (1 - x)), with torch's own derivatives, each of which stays finite in its own way.
_SLOPE = row(
    k, "cross_entropy_slope", bind=None, inputs=("u", "x", "y"),
    rules={
        "u": lambda g, x, y: g * (x - y) / _spread(x),
        "x": lambda g, u, x, y: g * u * (x * x - 2 * x * y + y) / _spread(x) ** 2,
        "y": lambda g, u, x: -g * u / torch.where((1 - x) * x < _EPSILON, _EPSILON, (1 - x) * x),
    },
)  # fmt: skip


def _slope_of_bce(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    if not launchable((g, x, y)):
        return g * (x - y) / torch.where((1 - x) * x < _EPSILON, _EPSILON, (1 - x) * x)
    params = operands.Params((), (), torch.promote_types(g.dtype, x.dtype))
    slope: Tensor = apply(_SLOPE, params, (g, x, y))
    return slope


BCE = Form(
    _XYW, k.binary_cross_entropy, k.binary_cross_entropy_bwd,
    {
        "x": _slope_of_bce,
        "y": lambda g, x: -torch.logit(x) * g,
    },
)  # fmt: skip
BCE_LOGITS = Form(
    _XYPW, k.binary_cross_entropy_with_logits, k.binary_cross_entropy_with_logits_bwd,
    {"x": lambda g, x, y: g * (torch.sigmoid(x) - y), "y": lambda g, x: -x * g},
)  # fmt: skip
BCE_POSITIVE = Form(
    _XYPW, k.positive_weighted, k.positive_weighted_bwd,
    {
        "x": lambda g, x, y, p: g * ((p * y + 1 - y) * torch.sigmoid(x) - p * y),
        "y": lambda g, x, p: (F.logsigmoid(-x) - F.logsigmoid(x) * p) * g,
    },
)  # fmt: skip


def bind_bce(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Call:
    modern(size_average, reduce)
    same_size(input, target)
    call = read(BCE, (input, target, not_derived(weight, "weight")), reduction)
    _keeps_size(input, weight)
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        raise Unsupported("autocast, under which torch refuses")
    return call


def _look_at_probabilities(
    params: Params, input: Tensor, target: Tensor, *_: Tensor | None
) -> None:
    if input.device.type != "cpu":
        if torch.is_autocast_enabled(input.device.type):
            raise Unsupported("under autocast, where torch calls it unsafe")
        return  # where torch's kernel traps, and the result here is NaN
    for tensor in map(values, (input, target)):
        if tensor.numel():
            least, largest = [bound.item() for bound in tensor.aminmax()]
            if not (least >= 0 and largest <= 1):
                raise Unsupported("not between 0 and 1")


def bind_bce_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Call:
    modern(size_average, reduce)
    same_size(input, target)
    factors = not_derived(pos_weight, "pos_weight"), not_derived(weight, "weight")
    form = BCE_LOGITS if pos_weight is None else BCE_POSITIVE
    call = read(form, (input, target, *factors), reduction)
    _keeps_size(input, weight, pos_weight)
    return call


def _keeps_size(input: Tensor, *factors: Tensor | None) -> None:
    shapes = [t.shape for t in factors if t is not None]
    if torch.broadcast_shapes(input.shape, *shapes) != input.shape:
        raise Unsupported("weight larger than the input")


def _sum_of_products(a: Tensor, b: Tensor, e: Tensor) -> Tensor:
    return a * e + b * e


KL = Form(
    ("x", "y"), k.kl_div, k.kl_div_bwd,
    {
        "x": lambda g, y: -g * y,
        "y": lambda g, x, y: times_log(torch.xlogy, g, y, y, 0) + g * y / y - g * x,
    },
)  # fmt: skip
KL_LOG_TARGET = Form(
    ("x", "y"), k.kl_div_log_target, k.kl_div_log_target_bwd,
    {
        "x": lambda g, y: -g * torch.exp(y),
        "y": lambda g, x, y: _sum_of_products(g * (y - x), g, torch.exp(y)),
    },
)  # fmt: skip


def bind_kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Call:
    modern(size_average, reduce)
    if type(log_target) is not bool:
        raise Unsupported(f"log_target={log_target!r}")
    form = KL_LOG_TARGET if log_target else KL
    tensors, params = read(form, (input, target), reduction, reductions=WITH_BATCHMEAN)
    return tensors, params._replace(warning=_MEAN_OF_KL) if reduction == "mean" else params


_MEAN_OF_KL = (
    "reduction: 'mean' divides the total loss by both the batch size and the support size."
    "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
    "'mean' will be changed to behave the same as 'batchmean' in the next major release."
)


def _warn(params: Params, *tensors: Tensor | None) -> None:
    if params.warning:
        warnings.warn(params.warning, stacklevel=2)


# -------------------------------------------------------------------------------------------- TABLE

_unit = (0.05, 0.95)
_errors = samples_of(y=(-2.0, 2.0))
loss(
    "mse_loss", F.mse_loss, bind=_bind_error(MSE), form=MSE,
    samples=with_weights(_errors, "weight"),
)  # fmt: skip
loss(
    "l1_loss", F.l1_loss, bind=_bind_error(L1), form=L1,
    samples=with_weights(_errors, "weight"),
)  # fmt: skip
loss(
    "smooth_l1_loss", F.smooth_l1_loss, bind=bind_smooth_l1, form=SMOOTH_L1,
    samples=samples_of(y=(-2.0, 2.0), beta=(0.0, 0.7)),
)  # fmt: skip
loss(
    "huber_loss", F.huber_loss, bind=bind_huber, form=HUBER,
    samples=with_weights(samples_of(y=(-2.0, 2.0), delta=(0.7,)), "weight"),
)  # fmt: skip
loss(
    "binary_cross_entropy", F.binary_cross_entropy, bind=bind_bce, form=BCE,
    samples=with_weights(samples_of(_unit, _unit), "weight", grad=False),
    text="dx = g * (x - y) / (x * (1 - x)); dy = g * (log(1 - x) - log(x))",
    autocast={"cpu": "float32"}, look=_look_at_probabilities,
)  # fmt: skip
loss(
    "binary_cross_entropy_with_logits", F.binary_cross_entropy_with_logits,
    bind=bind_bce_with_logits, form=BCE_LOGITS,
    samples=with_weights(
        with_weights(samples_of(y=_unit), "weight", grad=False),
        "pos_weight", grad=False, shape=(5,),
    ),
)  # fmt: skip
loss(
    "kl_div", F.kl_div, bind=bind_kl_div, form=KL,
    samples=samples_of((-2.0, -0.1), _unit, log_target=(True,)), look=_warn,
)  # fmt: skip
