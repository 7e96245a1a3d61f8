"""Activations of neural networks: one row an op, as arithmetic.py describes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels import activation as k
from ..sampling import Make, Sample
from .operands import unary, unary_bind
from .rows import row, spelled, standard_samples
from .signatures import (
    bind_celu,
    bind_gelu,
    bind_hardtanh,
    bind_prelu,
    bind_relu_function,
    bind_softshrink,
)

T = Tensor
F = torch.nn.functional
pointwise = partial(row, k)

# Those of torch.selu.
SELU = (1.6732632423543772, 1.0507009873554805, 1.0)
SQRT_HALF = math.sqrt(0.5)
ONE_OVER_SQRT_2PI = 1 / math.sqrt(2 * math.pi)
GELU_A, GELU_B = math.sqrt(2 / math.pi), 0.044715


def gelu_slope(g: Tensor, x: Tensor, form: str = "") -> Tensor:
    """Of x * P(x), with P the normal distribution or, for tanh, sigmoid(2 u)."""
    if form:
        s = torch.sigmoid(2 * GELU_A * (x + GELU_B * x**3))
        return g * (s + x * (2 * s * (1 - s)) * (GELU_A * (1 + 3 * GELU_B * x**2)))
    density = ONE_OVER_SQRT_2PI * torch.exp(-0.5 * (x * x))
    return g * (0.5 * torch.erfc(x * -SQRT_HALF) + x * density)


def mish_slope(g: Tensor, x: Tensor) -> Tensor:
    t = torch.tanh(F.softplus(x))
    return g * (t + x * torch.sigmoid(x) * (1 - t * t))


def silu_slope(g: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return g * s * (1 + x * (1 - s))


def softplus_slope(g: Tensor, x: Tensor, beta: Any, threshold: Any) -> Tensor:
    """The slope of the slope is 0 from the threshold on, itself included."""
    z = x * beta
    return torch.where(
        z > threshold, g, g * torch.sigmoid(torch.where(z >= threshold, threshold, z))
    )


def elu_slope(g: Tensor, x: Tensor, alpha: Any, scale: Any, input_scale: Any) -> Tensor:
    """The slope of the slope is 0 from 0 on, itself included."""
    e = torch.exp(torch.where(x < 0, x, 0.0) * input_scale)
    return torch.where(x <= 0, g * (input_scale * (alpha * scale) * e), g * scale)


def softsign_slope(g: Tensor, x: Tensor) -> Tensor:
    """NaN at infinity, as torch's."""
    d = 1 + torch.abs(x)
    return g * (1 - torch.abs(x) / d) / d


def outside(g: Tensor, x: Tensor, low: Any, high: Any) -> Tensor:
    """0 from ``low`` to ``high``, both included."""
    return torch.where(x >= low, torch.where(x <= high, 0.0, g), g)


def between(g: Tensor, x: Tensor, low: Any, high: Any) -> Tensor:
    """0 up to ``low`` and from ``high`` on, both included."""
    return torch.where(x <= low, 0.0, torch.where(x >= high, 0.0, g))


def hardswish_slope(g: Tensor, x: Tensor) -> Tensor:
    return torch.where(x <= -3, 0.0, torch.where(x < 3, g * (x / 3 + 0.5), g))


def _with(low: float, high: float, *args: Any, **kwargs: Any) -> Callable[[Make], Iterator[Sample]]:
    """Samples of a unary op, one of them with these arguments."""

    def samples(make: Make) -> Iterator[Sample]:
        yield from standard_samples(1, low, high)(make)
        yield Sample((make(3, 5, low=low, high=high), *args), kwargs, "arguments")

    return samples


def _threshold_samples(make: Make) -> Iterator[Sample]:
    for call in standard_samples(1, -2.0, 2.0)(make):
        yield Sample((*call.args, 0.25, -1.5), {}, call.note)


def _prelu_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 5), make(1)), {}, "one weight")
    yield Sample((make(2, 3, 4), make(3)), {}, "weight of each channel")
    yield Sample((make(), make()), {}, "0-dim")
    yield Sample((make(1031), make(1)), {}, "past one block")
    yield Sample((make(0, 3), make(3)), {}, "empty")


pointwise(
    "sigmoid", *spelled("sigmoid", "expit"),
    bind=unary_bind(True), rules={"x": lambda g, out: g * (1 - out) * out},
)  # fmt: skip
pointwise(
    "logsigmoid", F.logsigmoid,
    bind=unary_bind(False), rules={"x": lambda g, x: g * torch.sigmoid(-x)},
    opinfo=("nn.functional.logsigmoid",),
)  # fmt: skip
pointwise(
    "softplus", F.softplus,
    bind=lambda input, beta=1.0, threshold=20.0: unary(input, beta, threshold),
    consts=("beta", "threshold"), rules={"x": softplus_slope},
    samples=_with(-2.0, 2.0, 3, 0.5), opinfo=("nn.functional.softplus",),
    autocast={"cuda": "float32"},
)  # fmt: skip
pointwise(
    "silu", F.silu,
    bind=lambda input, inplace=False: unary(input, inplace=inplace),
    rules={"x": silu_slope}, opinfo=("nn.functional.silu",),
)  # fmt: skip
pointwise(
    "mish", F.mish,
    bind=lambda input, inplace=False: unary(input, inplace=inplace),
    rules={"x": mish_slope}, opinfo=("nn.functional.mish",),
)  # fmt: skip
pointwise(
    "gelu", F.gelu,
    bind=bind_gelu, forms=("", "_tanh"),
    rules={"x": gelu_slope},
    samples=_with(-2.0, 2.0, approximate="tanh"), opinfo=("nn.functional.gelu",),
    differs="Second derivatives at the largest floats are 0; torch's are NaN.",
)  # fmt: skip
pointwise(
    "relu", torch.relu, T.relu,
    bind=unary_bind(False),
    variants={F.relu: bind_relu_function},
    # `out` is the 0 of the kernel where it is chosen; named so that, as torch's, the second
    # derivative is zeros and not nothing.
    rules={"x": lambda g, out: torch.where(out <= 0, out, g)},
    opinfo=("nn.functional.relu",),
)  # fmt: skip
pointwise(
    "leaky_relu", F.leaky_relu,
    bind=lambda input, negative_slope=0.01, inplace=False: unary(
        input, negative_slope, inplace=inplace
    ),
    consts=("slope",), rules={"x": lambda g, x, slope: torch.where(x > 0, g, g * slope)},
    samples=_with(-2.0, 2.0, 0.3), opinfo=("nn.functional.leaky_relu",),
)  # fmt: skip
pointwise(
    "prelu", *spelled("prelu"),
    bind=bind_prelu, inputs=("x", "w"),
    rules={
        "x": lambda g, x, w: torch.where(x > 0, g, w * g),
        "w": lambda g, x: torch.where(x > 0, 0.0, x * g),
    },
    samples=_prelu_samples, opinfo=("nn.functional.prelu",),
    autocast={"cpu": "lower", "cuda": "lower"},
    differs="At 0 the tangent is that of the gradient, w times; torch's forward mode has 1 there.",
)  # fmt: skip
pointwise(
    "elu", F.elu,
    bind=lambda input, alpha=1.0, inplace=False: unary(input, alpha, 1.0, 1.0, inplace=inplace),
    consts=("alpha", "scale", "input_scale"), rules={"x": elu_slope},
    samples=_with(-2.0, 2.0, 1.5), opinfo=("nn.functional.elu",),
)  # fmt: skip
pointwise(
    "selu", F.selu,
    bind=lambda input, inplace=False: unary(input, *SELU, inplace=inplace),
    variants={torch.selu: lambda input: unary(input, *SELU)},
    device="elu", consts=("alpha", "scale", "input_scale"), rules={"x": elu_slope},
    opinfo=("nn.functional.selu",),
)  # fmt: skip
pointwise(
    "celu", F.celu,
    bind=bind_celu,
    variants={torch.celu: lambda input, alpha=1.0: bind_celu(input, alpha)},
    device="elu", consts=("alpha", "scale", "input_scale"), rules={"x": elu_slope},
    samples=_with(-2.0, 2.0, 1.5), opinfo=("nn.functional.celu",),
    differs="Derivatives take 1 / alpha in the computing dtype; torch's take it in float32.",
)  # fmt: skip
pointwise(
    "hardtanh", F.hardtanh,
    bind=bind_hardtanh,
    consts=("low", "high"), rules={"x": between},
    samples=_with(-2.0, 2.0, -0.5, 1.5), opinfo=("nn.functional.hardtanh",),
)  # fmt: skip
pointwise(
    "relu6", F.relu6,
    bind=lambda input, inplace=False: unary(input, 0.0, 6.0, inplace=inplace),
    device="hardtanh", consts=("low", "high"), rules={"x": between},
    low=-7.0, high=7.0, opinfo=("nn.functional.relu6",),
)  # fmt: skip
pointwise(
    "hardsigmoid", F.hardsigmoid,
    bind=lambda input, inplace=False: unary(input, inplace=inplace),
    rules={"x": lambda g, x: torch.where(x > -3, torch.where(x < 3, g / 6, 0.0), 0.0)},
    low=-4.0, high=4.0, opinfo=("nn.functional.hardsigmoid",),
    differs="The gradient is exact in float64; torch's is of float32's 1 / 6.",
)  # fmt: skip
pointwise(
    "hardswish", F.hardswish,
    bind=lambda input, inplace=False: unary(input, inplace=inplace),
    rules={"x": hardswish_slope},
    low=-4.0, high=4.0, opinfo=("nn.functional.hardswish",),
)  # fmt: skip
pointwise(
    "hardshrink", *spelled("hardshrink"),
    bind=lambda input, lambd=0.5: unary(input, lambd),
    consts=("lambd",), rules={"x": lambda g, x, lambd: outside(g, x, -lambd, lambd)},
    samples=_with(-2.0, 2.0, 1.0), opinfo=("nn.functional.hardshrink",),
)  # fmt: skip
pointwise(
    "softshrink", F.softshrink,
    bind=bind_softshrink,
    consts=("lambd",), rules={"x": lambda g, x, lambd: outside(g, x, -lambd, lambd)},
    samples=_with(-2.0, 2.0, 1.0), opinfo=("nn.functional.softshrink",),
)  # fmt: skip
pointwise(
    "threshold", F.threshold,
    bind=lambda input, threshold, value, inplace=False: unary(
        input, threshold, value, inplace=inplace
    ),
    variants={torch.threshold: lambda input, threshold, value: unary(input, threshold, value)},
    consts=("at", "value"), rules={"x": lambda g, x, at: torch.where(x <= at, 0.0, g)},
    samples=_threshold_samples, opinfo=("nn.functional.threshold",),
)  # fmt: skip
INFINITE_UPSTREAM = "An infinite upstream gradient gives infinity where torch has NaN."
pointwise(
    "softsign", F.softsign,
    bind=unary_bind(True, bools=False), rules={"x": softsign_slope},
    opinfo=("nn.functional.softsign",), differs=INFINITE_UPSTREAM,
)  # fmt: skip
pointwise(
    "tanhshrink", F.tanhshrink,
    bind=unary_bind(True, bools=False), rules={"x": lambda g, x: g * torch.tanh(x) ** 2},
    opinfo=("nn.functional.tanhshrink",), differs=INFINITE_UPSTREAM,
)  # fmt: skip
