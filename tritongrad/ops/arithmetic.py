"""Pointwise arithmetic: one row an op.

A row names the device function (``NAME`` and ``NAME_bwd`` in the kernel file of this module's name)
and, for each input that has one, the derivative as a line of torch mathematics. In both, ``x, y``
are the inputs (``c`` a condition), ``out`` the result, ``g`` its gradient, further names the op's
parameters; the names decide what is saved for backward. The rules are torch's (derivatives.yaml),
so that values at kinks and ties are too; broadcasting and promotion are undone in rows.py, once for
all. The other tables: selection.py, elementary.py, activation.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dtypes import Number
from ..kernels import arithmetic as k
from ..sampling import Make, Sample
from .operands import binary_bind, bind_two, reflected, unary, unary_bind
from .rows import number_samples, row, spelled, standard_samples
from .signatures import (
    bind_addc,
    bind_div,
    bind_float_power,
    bind_lerp,
    bind_pow,
    bind_radd,
    bind_rdiv,
    bind_rmul,
    bind_rsub,
    bind_scaled_left,
    bind_sub,
)

T = Tensor
pointwise = partial(row, k)


def scaled(g: Any, alpha: Any) -> Any:
    """``alpha * g``, without a kernel for the usual factor 1."""
    return g if isinstance(alpha, (int, float)) and alpha == 1 else g * alpha


def _add_samples(make: Make) -> Iterator[Sample]:
    yield from standard_samples(2, -2.0, 2.0)(make)
    yield Sample((make(3, 5), make(5)), {"alpha": 2.5}, "alpha")
    yield Sample((make(3, 5), 2), {}, "number")


def _pow_samples(make: Make) -> Iterator[Sample]:
    yield from number_samples(0.2, 2.0)(make)
    yield Sample((make(3, 5), 2), {}, "square")
    yield Sample((make(3, 5), 3), {}, "cube")
    yield Sample((make(3, 5, low=0.2), 0.5), {}, "root")
    yield Sample((make(3, 5, low=0.2), -0.5), {}, "inverse root")
    yield Sample((1.5, make(3, 5)), {}, "number to a tensor's power")


def _div_samples(make: Make) -> Iterator[Sample]:
    yield from number_samples(0.5, 2.0)(make)
    # Away from the integers, where the quotient steps.
    for mode in ("floor", "trunc"):
        x, y = make(3, 5, low=-0.9, high=-0.1), make(3, 5, low=1.0)
        yield Sample((x, y), {"rounding_mode": mode}, mode)


def _factor_samples(make: Make) -> Iterator[Sample]:
    yield from standard_samples(3, 0.5, 2.0)(make)
    yield Sample((make(3, 5), make(3, 5), make(3, 5, low=0.5)), {"value": -2.5}, "value")


def _lerp_samples(make: Make) -> Iterator[Sample]:
    yield from standard_samples(3, -0.4, 2.0)(make)
    yield Sample((make(3, 5), make(5), 0.3), {}, "number")


def _remainder_samples(make: Make) -> Iterator[Sample]:
    yield from standard_samples(2, 0.5, 2.0)(make)
    # Away from multiples of the divisor.
    yield Sample((make(3, 5, low=-0.9, high=-0.1), 1.5), {}, "number")


def power_slope(g: Tensor, x: Any, y: Any) -> Tensor:
    """d/dx of x ** y, which is 0 for y = 0 whatever x is."""
    if isinstance(y, (int, float)):
        return torch.zeros_like(g) if y == 0 else g * (y * x ** (y - 1))
    return torch.where(y == 0, 0.0, g * (y * x ** (y - 1)))


def exponent_slope(g: Tensor, x: Any, y: Tensor, out: Tensor) -> Tensor:
    """d/dy of x ** y, which is 0 for x = 0 and y >= 0, where log(x) is not."""
    if isinstance(x, (int, float)):
        # log through torch, not math: a negative base has slope NaN, not an error.
        slope = out * torch.log(torch.full((), x, dtype=out.dtype, device=out.device))
        return g * (torch.where(y >= 0, 0.0, slope) if x == 0 else slope)
    slope = out * torch.log(x)
    return g * torch.where(x == 0, torch.where(y >= 0, 0.0, slope), slope)


def _raised_to(exponent: Number) -> tuple[Any, Any]:
    return (k.pow_square, k.square_bwd) if exponent == 2 else (k.pow_number, k.pow_number_bwd)


def quotient_slope(g: Tensor, x: Any, y: Any, form: str = "") -> Tensor:
    """d/dy of x / y; a rounded quotient is constant."""
    return torch.zeros_like(g) if form else -g * ((x / y) / y)


def quotient_tangent(
    dx: Tensor | None, dy: Tensor | None, y: Any, out: Tensor, form: str
) -> Tensor:
    """Divided once, after the difference: at y = 0 two quotients would be infinities of either
    sign."""
    if form:
        return torch.zeros_like(out)
    if dy is None:
        assert dx is not None
        return dx / y
    return (-dy * out if dx is None else dx - dy * out) / y


def fraction_tangent(
    dx: Tensor | None, dy: Tensor | None, dz: Tensor | None, y: Tensor, z: Tensor, value: Any
) -> Tensor:
    parts = [] if dx is None else [dx]
    if dy is not None:
        parts.append(dy / z * value)
    if dz is not None:
        parts.append(-(dz * (y / z) / z * value))
    return functools.reduce(torch.add, parts)


def mixture_tangent(
    dx: Tensor | None, dy: Tensor | None, dw: Tensor | None, x: Tensor, y: Tensor, w: Any
) -> Tensor:
    """torch mixes tangents of zero too, which an infinite weight turns into NaN."""
    like = next(d for d in (dx, dy, dw) if d is not None)
    zero = torch.zeros_like(like)
    weight = w.to(like.dtype) if isinstance(w, Tensor) else w
    mixed = torch.lerp(zero if dx is None else dx, zero if dy is None else dy, weight)
    return mixed if dw is None else mixed + dw * (y - x)


pointwise(
    "add", torch.add, T.add, T.__add__,
    bind=bind_scaled_left,
    variants={T.__radd__: bind_radd},
    inputs=("x", "y"),
    consts=("alpha",),
    rules={"x": lambda g: g, "y": lambda g, alpha: scaled(g, alpha)},
    samples=_add_samples,
    opinfo=("add", "__radd__"),
)  # fmt: skip
pointwise(
    "sub", torch.sub, torch.subtract, T.sub, T.subtract, T.__sub__,
    bind=bind_sub,
    variants={T.__rsub__: bind_rsub, torch.rsub: bind_rsub},
    inputs=("x", "y"),
    consts=("alpha",),
    rules={"x": lambda g: g, "y": lambda g, alpha: g * -alpha},
    samples=_add_samples,
    opinfo=("sub", "rsub", "__rsub__"),
)  # fmt: skip
pointwise(
    "mul", torch.mul, torch.multiply, T.mul, T.multiply, T.__mul__,
    bind=bind_two,
    inputs=("x", "y"),
    variants={T.__rmul__: bind_rmul},
    rules={"x": lambda g, y: g * y, "y": lambda g, x: g * x},
    samples=number_samples(-2.0, 2.0),
    opinfo=("mul", "__rmul__"),
)  # fmt: skip
pointwise(
    "div", torch.div, torch.divide, torch.true_divide, T.div, T.divide, T.true_divide,
    T.__div__, T.__truediv__,
    bind=bind_div,
    variants={T.__rdiv__: bind_rdiv, T.__rtruediv__: bind_rdiv},
    inputs=("x", "y"),
    forms=("", "_floor", "_trunc"),
    rules={
        "x": lambda g, y, form="": torch.zeros_like(g) if form else g / y,
        "y": quotient_slope,
    },
    jvp=quotient_tangent,
    samples=_div_samples,
    opinfo=(
        "div.no_rounding_mode", "div.floor_rounding", "div.trunc_rounding", "true_divide",
        "__rdiv__",
    ),
)  # fmt: skip
pointwise(
    "pow", torch.pow, T.pow, T.__pow__,
    bind=bind_pow,
    variants={T.__rpow__: reflected(bind_pow)},
    inputs=("x", "y"),
    rules={
        "x": lambda g, x, y: power_slope(g, x, y),
        "y": lambda g, x, y, out: exponent_slope(g, x, y, out),
    },
    for_number=_raised_to,
    samples=_pow_samples,
    opinfo=("pow", "__rpow__"),
    autocast={"cuda": "float32"},
)  # fmt: skip
pointwise(
    "neg", torch.neg, torch.negative, T.neg, T.negative, T.__neg__,
    bind=unary_bind(False), rules={"x": lambda g: -g},
)  # fmt: skip
pointwise(
    "abs", torch.abs, torch.absolute, T.abs, T.absolute, T.__abs__,
    bind=unary_bind(False), rules={"x": lambda g, x: g * torch.sign(x)},
)  # fmt: skip
pointwise(
    "float_power", *spelled("float_power"),
    bind=bind_float_power,
    inputs=("x", "y"),
    device="pow",
    rules={
        "x": lambda g, x, y: power_slope(g, x, y),
        "y": lambda g, x, y, out: exponent_slope(g, x, y, out),
    },
    for_number=_raised_to,
    samples=number_samples(0.2, 2.0),
)  # fmt: skip
pointwise(
    "square", *spelled("square"),
    bind=unary_bind(False), rules={"x": lambda g, x: g * (2 * x)},
    autocast={"cuda": "float32"},  # torch's is pow
)  # fmt: skip
pointwise(
    "reciprocal", *spelled("reciprocal"),
    bind=unary_bind(True), rules={"x": lambda g, out: -g * (out * out)}, low=0.3,
    autocast={"cuda": "float32"},
)  # fmt: skip


def _scaled_by(name: str, factor: float) -> None:
    pointwise(
        name, *spelled(name),
        bind=lambda input: unary(input, factor, to_float=True), consts=("factor",),
        device="scale", rules={"x": lambda g, factor: g * factor},
    )  # fmt: skip


_scaled_by("deg2rad", math.pi / 180)
_scaled_by("rad2deg", 180 / math.pi)
pointwise(
    "addcmul", *spelled("addcmul"),
    bind=bind_addc,
    inputs=("x", "y", "z"),
    consts=("value",),
    rules={
        "x": lambda g: g,
        "y": lambda g, z, value: g * (z * value),
        "z": lambda g, y, value: g * (y * value),
    },
    samples=_factor_samples,
    autocast={"cuda": "promote"},
)  # fmt: skip
pointwise(
    "addcdiv", *spelled("addcdiv"),
    bind=bind_addc,
    inputs=("x", "y", "z"),
    consts=("value",),
    rules={
        "x": lambda g: g,
        "y": lambda g, z, value: g * (value / z),
        "z": lambda g, y, z, value: -g * (value * y / (z * z)),
    },
    jvp=fraction_tangent,
    samples=_factor_samples,
    autocast={"cuda": "promote"},
)  # fmt: skip
pointwise(
    "lerp", *spelled("lerp"),
    bind=bind_lerp,
    inputs=("x", "y", "w"),
    rules={
        "x": lambda g, w: g * (1 - w),
        "y": lambda g, w: g * w,
        "w": lambda g, x, y: g * (y - x),
    },
    jvp=mixture_tangent,
    samples=_lerp_samples,
)  # fmt: skip
QUOTIENTS = "Exact for quotients of any size, of which torch's CPU kernels give NaN."
pointwise(
    "fmod", *spelled("fmod"),
    bind=binary_bind(),
    inputs=("x", "y"),
    rules={
        "x": lambda g: g,
        "y": lambda g, x, y: -g * torch.div(x, y, rounding_mode="trunc"),
    },
    samples=_remainder_samples, differs=QUOTIENTS,
)  # fmt: skip
pointwise(
    "remainder", *spelled("remainder"), T.__mod__,
    bind=binary_bind(numbers="any"),
    variants={T.__rmod__: reflected(binary_bind(numbers="any"))},
    inputs=("x", "y"),
    rules={
        "x": lambda g: g,
        "y": lambda g, x, y: -g * torch.div(x, y, rounding_mode="floor"),
    },
    samples=_remainder_samples, differs=QUOTIENTS,
    opinfo=("remainder", "__rmod__"),
)  # fmt: skip
