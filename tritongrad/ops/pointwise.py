"""Pointwise operations: one row of TABLE each.

A row names the device function (``kernels.pointwise.NAME`` and ``NAME_bwd``) and, for each input
that has one, the derivative as a line of torch mathematics. In both, ``x, y`` are the inputs
(``c`` a condition), ``out`` the result, ``g`` its gradient, further names the op's parameters; the
names decide what is saved for backward. The rules are torch's (derivatives.yaml), so that values
at kinks and ties are too; broadcasting and promotion are undone here, once for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..sampling import Make, Sample
from .operands import (
    bind_div,
    bind_pow,
    bind_radd,
    bind_rdiv,
    bind_relu_function,
    bind_rmul,
    bind_rsub,
    bind_scaled_left,
    bind_sub,
    bind_two,
    bind_where,
    bind_where_method,
    reflected,
    unary_bind,
)
from .rows import pointwise, standard_samples

T = Tensor
F = torch.nn.functional


def scaled(g: Any, alpha: Any) -> Any:
    """``alpha * g``, without a kernel for the usual factor 1."""
    return g if isinstance(alpha, (int, float)) and alpha == 1 else g * alpha


def _where_samples(make: Make) -> Iterator[Sample]:
    def c(*shape: int) -> Tensor:
        return make(*shape, dtype=torch.bool, requires_grad=False)

    yield Sample((c(3, 5), make(3, 5), make(3, 5)), {}, "small")
    yield Sample((c(1031), make(1031), make(1031)), {}, "past one block")
    yield Sample((c(4, 1), make(5), make(2, 1, 1)), {}, "broadcast")
    yield Sample((c(3, 4), make(3, 4), 0.5), {}, "number")
    yield Sample((c(0, 4), make(0, 4), make(4)), {}, "empty")


def _add_samples(make: Make) -> Iterator[Sample]:
    yield from standard_samples(2, -2.0, 2.0)(make)
    yield Sample((make(3, 5), make(5)), {"alpha": 2.5}, "alpha")
    yield Sample((make(3, 5), 2), {}, "number")


def _number_samples(low: float, high: float) -> Callable[[Make], Iterator[Sample]]:
    def samples(make: Make) -> Iterator[Sample]:
        yield from standard_samples(2, low, high)(make)
        yield Sample((make(3, 5, low=low, high=high), 1.5), {}, "number")

    return samples


def _pow_samples(make: Make) -> Iterator[Sample]:
    yield from _number_samples(0.2, 2.0)(make)
    yield Sample((make(3, 5), 2), {}, "square")
    yield Sample((make(3, 5), 3), {}, "cube")
    yield Sample((1.5, make(3, 5)), {}, "number to a tensor's power")


def power_slope(g: Tensor, x: Any, y: Any) -> Tensor:
    """d/dx of x ** y, which is 0 for y = 0 whatever x is."""
    if isinstance(y, (int, float)):
        return torch.zeros_like(g) if y == 0 else g * (y * x ** (y - 1))
    return torch.where(y == 0, 0.0, g * (y * x ** (y - 1)))


def exponent_slope(g: Tensor, x: Any, y: Tensor, out: Tensor) -> Tensor:
    """d/dy of x ** y, which is 0 for x = 0 and y >= 0, where log(x) is not."""
    if isinstance(x, (int, float)):
        # log through torch, not math: a negative base has slope NaN, not an error.
        slope = g * (out * torch.log(torch.full((), x, dtype=out.dtype, device=out.device)))
        return torch.where(y >= 0, 0.0, slope) if x == 0 else slope
    slope = g * (out * torch.log(x))
    return torch.where(x == 0, torch.where(y >= 0, 0.0, slope), slope)


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
    samples=_number_samples(-2.0, 2.0),
    opinfo=("mul", "__rmul__"),
)  # fmt: skip
pointwise(
    "div", torch.div, torch.divide, torch.true_divide, T.div, T.divide, T.true_divide,
    T.__div__, T.__truediv__,
    bind=bind_div,
    variants={T.__rdiv__: bind_rdiv, T.__rtruediv__: bind_rdiv},
    inputs=("x", "y"),
    rules={"x": lambda g, y: g / y, "y": lambda g, x, y: -g * ((x / y) / y)},
    samples=_number_samples(0.5, 2.0),
    opinfo=("div.no_rounding_mode", "true_divide", "__rdiv__"),
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
    samples=_pow_samples,
    opinfo=("pow", "__rpow__"),
    autocast={"cuda": "float32"},
)  # fmt: skip
pointwise(
    "neg", torch.neg, torch.negative, T.neg, T.negative, T.__neg__,
    bind=unary_bind(False), rules={"x": lambda g: -g},
)  # fmt: skip
pointwise(
    "exp", torch.exp, T.exp,
    bind=unary_bind(True), rules={"x": lambda g, out: g * out}, autocast={"cuda": "float32"},
)  # fmt: skip
pointwise(
    "log", torch.log, T.log,
    bind=unary_bind(True), rules={"x": lambda g, x: g / x}, low=0.3, autocast={"cuda": "float32"},
)  # fmt: skip
pointwise(
    "sqrt", torch.sqrt, T.sqrt,
    bind=unary_bind(True), rules={"x": lambda g, out: g / (2 * out)}, low=0.3,
)  # fmt: skip
pointwise(
    "abs", torch.abs, torch.absolute, T.abs, T.absolute, T.__abs__,
    bind=unary_bind(False), rules={"x": lambda g, x: g * torch.sign(x)},
)  # fmt: skip
pointwise(
    "sign", torch.sign, torch.sgn, T.sign, T.sgn,
    bind=unary_bind(False), rules={"x": lambda g: torch.zeros_like(g)}, opinfo=("sign", "sgn"),
)  # fmt: skip
pointwise(
    "sin", torch.sin, T.sin,
    bind=unary_bind(True), rules={"x": lambda g, x: g * torch.cos(x)},
)  # fmt: skip
pointwise(
    "cos", torch.cos, T.cos,
    bind=unary_bind(True), rules={"x": lambda g, x: -g * torch.sin(x)},
)  # fmt: skip
pointwise(
    "tanh", torch.tanh, T.tanh, F.tanh,
    bind=unary_bind(True), rules={"x": lambda g, out: g * (1 - out * out)},
)  # fmt: skip
pointwise(
    "sigmoid", torch.sigmoid, torch.special.expit, T.sigmoid, F.sigmoid,
    bind=unary_bind(True), rules={"x": lambda g, out: g * (1 - out) * out},
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
    "maximum", torch.maximum, T.maximum,
    bind=bind_two,
    inputs=("x", "y"),
    rules={
        "x": lambda g, x, y: torch.where(x == y, g / 2, torch.where(x < y, 0.0, g)),
        "y": lambda g, x, y: torch.where(x == y, g / 2, torch.where(x > y, 0.0, g)),
    },
)  # fmt: skip
pointwise(
    "minimum", torch.minimum, T.minimum,
    bind=bind_two,
    inputs=("x", "y"),
    rules={
        "x": lambda g, x, y: torch.where(x == y, g / 2, torch.where(x > y, 0.0, g)),
        "y": lambda g, x, y: torch.where(x == y, g / 2, torch.where(x < y, 0.0, g)),
    },
)  # fmt: skip
pointwise(
    "where", torch.where,
    bind=bind_where,
    variants={T.where: bind_where_method},
    inputs=("c", "x", "y"),
    rules={"x": lambda g, c: torch.where(c, g, 0.0), "y": lambda g, c: torch.where(c, 0.0, g)},
    samples=_where_samples,
)  # fmt: skip

# Comparisons: no derivative, but the rules above and the control flow of user code need them.
for _name, _symbol, _alias in (
    ("eq", "__eq__", None), ("ne", "__ne__", "not_equal"),
    ("lt", "__lt__", "less"), ("le", "__le__", "less_equal"),
    ("gt", "__gt__", "greater"), ("ge", "__ge__", "greater_equal"),
):  # fmt: skip
    _aliases = () if _alias is None else (getattr(torch, _alias), getattr(T, _alias))
    pointwise(
        _name, getattr(torch, _name), getattr(T, _name), getattr(T, _symbol), *_aliases,
        bind=bind_two, inputs=("x", "y"), rules={}, boolean=True,
        samples=_number_samples(-2.0, 2.0),
    )  # fmt: skip
