"""The elementary functions: one row an op, as arithmetic.py describes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels import elementary as k
from ..sampling import Make, Sample
from .operands import binary_bind, bind_tensors, unary, unary_bind
from .rows import row, spelled, standard_samples

pointwise = partial(row, k)
FLOAT32 = {"cuda": "float32"}

LN2, LN10 = math.log(2), math.log(10)
TWO_OVER_SQRT_PI = 2 / math.sqrt(math.pi)
SQRT_HALF = math.sqrt(0.5)
ONE_OVER_SQRT_2PI = 1 / math.sqrt(2 * math.pi)


def inverse_square(x: Tensor, y: Tensor) -> Tensor:
    """1 / (x * x + y * y), and 0 at the origin."""
    square = x * x + y * y
    return torch.where(square == 0, 0.0, torch.reciprocal(square))


def angle_tangent(dx: Tensor | None, dy: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    """At the origin 0 / 0, where reverse mode has 0."""
    turned = 0.0 if dx is None else y * dx
    return (turned if dy is None else -x * dy + turned) / (x**2 + y**2)


def sinc_slope(g: Tensor, x: Tensor) -> Tensor:
    """torch's: 0 where the square of x, not x, is 0."""
    z, square = x * math.pi, x * x * math.pi
    return torch.where(square == 0, 0.0, g * ((z * torch.cos(z) - torch.sin(z)) / square))


def logit_slope(g: Tensor, x: Tensor, eps: Any) -> Tensor:
    """0 where x was clamped; without ``eps`` (-1), NaN outside the domain."""
    slope = g / (x * (1 - x))
    if eps < 0:
        return torch.where(x >= 0, torch.where(x <= 1, slope, math.nan), math.nan)
    return torch.where(x >= eps, torch.where(x <= 1 - eps, slope, 0.0), 0.0)


def times_log(function: Any, g: Tensor, x: Any, y: Any, pole: float) -> Tensor:
    """d/dx of x * log(y), which at x = 0 is 0 as far as the pole."""
    slope = function(g, y)
    if isinstance(y, (int, float)):
        return slope if y > pole else torch.where(x == 0, 0.0, slope)
    return torch.where(x == 0, torch.where(y <= pole, 0.0, slope), slope)


def _with_numbers(low: float, high: float) -> Any:
    """Samples of a binary op, some with a number in an operand's place."""

    def samples(make: Make) -> Iterator[Sample]:
        yield from standard_samples(2, low, high)(make)
        yield Sample((make(3, 5, low=low, high=high), 1.5), {}, "number")
        yield Sample((1.5, make(3, 5, low=low, high=high)), {}, "number first")

    return samples


def _logit_samples(make: Make) -> Iterator[Sample]:
    yield from standard_samples(1, 0.1, 0.9)(make)
    yield Sample((make(3, 5, low=0.0, high=1.0), 0.2), {}, "eps")


pointwise(
    "exp", *spelled("exp"),
    bind=unary_bind(True), rules={"x": lambda g, out: g * out}, autocast=FLOAT32,
)  # fmt: skip
pointwise(
    "exp2", *spelled("exp2"),
    bind=unary_bind(True), rules={"x": lambda g, out: g * out * LN2},
)  # fmt: skip
pointwise(
    "expm1", *spelled("expm1"),
    bind=unary_bind(True), rules={"x": lambda g, out: g * (out + 1)}, autocast=FLOAT32,
)  # fmt: skip
pointwise(
    "log", *spelled("log"),
    bind=unary_bind(True), rules={"x": lambda g, x: g / x}, low=0.3, autocast=FLOAT32,
)  # fmt: skip
pointwise(
    "log2", *spelled("log2"),
    bind=unary_bind(True), rules={"x": lambda g, x: g / (x * LN2)}, low=0.3, autocast=FLOAT32,
)  # fmt: skip
pointwise(
    "log10", *spelled("log10"),
    bind=unary_bind(True), rules={"x": lambda g, x: g / (x * LN10)}, low=0.3, autocast=FLOAT32,
)  # fmt: skip
pointwise(
    "log1p", *spelled("log1p"),
    bind=unary_bind(True), rules={"x": lambda g, x: g / (x + 1)}, low=-0.7, autocast=FLOAT32,
)  # fmt: skip
pointwise(
    "sqrt", *spelled("sqrt"),
    bind=unary_bind(True), rules={"x": lambda g, out: g / (2 * out)}, low=0.3,
)  # fmt: skip
pointwise(
    "rsqrt", *spelled("rsqrt"),
    bind=unary_bind(True), rules={"x": lambda g, out: -0.5 * g * out**3}, low=0.3,
    autocast=FLOAT32,
)  # fmt: skip
pointwise(
    "hypot", *spelled("hypot"),
    bind=bind_tensors, inputs=("x", "y"),
    rules={"x": lambda g, x, out: g * x / out, "y": lambda g, y, out: g * y / out},
)  # fmt: skip
pointwise(
    "sin", *spelled("sin"),
    bind=unary_bind(True), rules={"x": lambda g, x: g * torch.cos(x)},
)  # fmt: skip
pointwise(
    "cos", *spelled("cos"),
    bind=unary_bind(True), rules={"x": lambda g, x: -g * torch.sin(x)},
)  # fmt: skip
pointwise(
    "tan", *spelled("tan"),
    bind=unary_bind(True), rules={"x": lambda g, out: g * (1 + out**2)}, low=-1.2, high=1.2,
    autocast=FLOAT32,
)  # fmt: skip
pointwise(
    "asin", *spelled("asin", "arcsin"),
    bind=unary_bind(True), rules={"x": lambda g, x: g * torch.rsqrt(1 - x * x)},
    low=-0.9, high=0.9, autocast=FLOAT32,
)  # fmt: skip
pointwise(
    "acos", *spelled("acos", "arccos"),
    bind=unary_bind(True), rules={"x": lambda g, x: g * -torch.rsqrt(1 - x * x)},
    low=-0.9, high=0.9, autocast=FLOAT32,
)  # fmt: skip
pointwise(
    "atan", *spelled("atan", "arctan"),
    bind=unary_bind(True), rules={"x": lambda g, x: g / (x * x + 1)},
)  # fmt: skip
pointwise(
    "atan2", *spelled("atan2", "arctan2"),
    bind=binary_bind(True, numbers="none"), inputs=("x", "y"),
    rules={
        "x": lambda g, x, y: g * y * inverse_square(x, y),
        "y": lambda g, x, y: g * -x * inverse_square(x, y),
    },
    jvp=angle_tangent,
    low=0.5, autocast={"cuda": "promote"},
)  # fmt: skip
pointwise(
    "sinh", *spelled("sinh"),
    bind=unary_bind(True), rules={"x": lambda g, x: g * torch.cosh(x)}, autocast=FLOAT32,
)  # fmt: skip
pointwise(
    "cosh", *spelled("cosh"),
    bind=unary_bind(True), rules={"x": lambda g, x: g * torch.sinh(x)}, autocast=FLOAT32,
)  # fmt: skip
pointwise(
    "tanh", *spelled("tanh"),
    bind=unary_bind(True), rules={"x": lambda g, out: g * (1 - out * out)},
)  # fmt: skip
pointwise(
    "asinh", *spelled("asinh", "arcsinh"),
    bind=unary_bind(True), rules={"x": lambda g, x: g * torch.rsqrt(x**2 + 1)},
)  # fmt: skip
pointwise(
    "acosh", *spelled("acosh", "arccosh"),
    bind=unary_bind(True), rules={"x": lambda g, x: g * torch.rsqrt(x * x - 1)},
    low=1.2, high=4.0,
)  # fmt: skip
pointwise(
    "atanh", *spelled("atanh", "arctanh"),
    bind=unary_bind(True), rules={"x": lambda g, x: g / (1 - x**2)}, low=-0.9, high=0.9,
)  # fmt: skip
pointwise(
    "sinc", *spelled("sinc"),
    bind=unary_bind(True), rules={"x": sinc_slope}, low=0.2,
)  # fmt: skip


def _log_sum(name: str, exp: Callable[[Tensor], Tensor]) -> None:
    pointwise(
        name, *spelled(name),
        bind=bind_tensors, inputs=("x", "y"),
        rules={
            "x": lambda g, x, y: g / (1 + exp(y - x)),
            "y": lambda g, x, y: g / (1 + exp(x - y)),
        },
    )  # fmt: skip


def _times_log(name: str, function: Callable[..., Tensor], shift: int, opinfo: str) -> None:
    """x log(y + shift)"""
    pointwise(
        name, *spelled(name),
        bind=binary_bind(True, numbers="any"), inputs=("x", "y"),
        rules={
            "x": lambda g, x, y: times_log(function, g, x, y, -shift),
            "y": lambda g, x, y: g * x / (y + shift if shift else y),
        },
        samples=_with_numbers(0.3, 2.0),
        opinfo=(opinfo,),
    )  # fmt: skip


_log_sum("logaddexp", torch.exp)
_log_sum("logaddexp2", torch.exp2)
_times_log("xlogy", torch.xlogy, 0, "xlogy")
_times_log("xlog1py", torch.special.xlog1py, 1, "special.xlog1py")
pointwise(
    "entr", *spelled("entr"),
    bind=unary_bind(True), rules={"x": lambda g, x: g * -(1 + torch.log(x))}, low=0.3,
    opinfo=("special.entr",),
)  # fmt: skip
pointwise(
    "logit", *spelled("logit"),
    bind=lambda input, eps=None: unary(input, -1.0 if eps is None else eps, to_float=True),
    consts=("eps",), rules={"x": logit_slope}, samples=_logit_samples,
)  # fmt: skip
pointwise(
    "erf", *spelled("erf"),
    bind=unary_bind(True), rules={"x": lambda g, x: TWO_OVER_SQRT_PI * torch.exp(-(x**2)) * g},
)  # fmt: skip
pointwise(
    "erfc", *spelled("erfc"),
    bind=unary_bind(True), rules={"x": lambda g, x: -TWO_OVER_SQRT_PI * torch.exp(-(x**2)) * g},
)  # fmt: skip
pointwise(
    "ndtr", *spelled("ndtr"),
    bind=unary_bind(True),
    rules={
        "x": lambda g, x: torch.exp(-((x * SQRT_HALF) ** 2)) * ONE_OVER_SQRT_2PI * g
    },
    opinfo=("special.ndtr",),
    differs="The lower tail keeps its digits; torch's is 0 where 1 + erf cancels.",
)  # fmt: skip
