"""Comparison, choice and steps: one row an op, as arithmetic.py describes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels import selection as k
from ..sampling import Make, Sample
from .operands import binary_bind, bind_tensors, bind_two, unary_bind
from .rows import number_samples, row, spelled, standard_samples
from .signatures import (
    bind_clamp,
    bind_masked_fill,
    bind_nan_to_num,
    bind_pair,
    bind_round,
    bind_where,
    bind_where_method,
)

T = Tensor
pointwise = partial(row, k)


def _where_samples(make: Make) -> Iterator[Sample]:
    def c(*shape: int) -> Tensor:
        return make(*shape, dtype=torch.bool, requires_grad=False)

    yield Sample((c(3, 5), make(3, 5), make(3, 5)), {}, "small")
    yield Sample((c(1031), make(1031), make(1031)), {}, "past one block")
    yield Sample((c(4, 1), make(5), make(2, 1, 1)), {}, "broadcast")
    yield Sample((c(3, 4), make(3, 4), 0.5), {}, "number")
    yield Sample((c(0, 4), make(0, 4), make(4)), {}, "empty")


def _clamp_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 5), make(3, 5), make(3, 5)), {}, "tensors")
    yield Sample((make(1031), -0.5, 1.5), {}, "past one block")
    yield Sample((make(4, 1, 3),), {"min": make(5, 1)}, "broadcast, lower bound")
    yield Sample((make(6, 7).t(),), {"max": 0.5}, "upper bound")
    yield Sample((make(2, 0), -1.0), {}, "empty")


def _masked_fill_samples(make: Make) -> Iterator[Sample]:
    def c(*shape: int) -> Tensor:
        return make(*shape, dtype=torch.bool, requires_grad=False)

    yield Sample((make(3, 5), c(3, 5), 0.5), {}, "small")
    yield Sample((make(3, 5), c(5), make()), {}, "tensor")
    yield Sample((make(1031), c(1031), -1.0), {}, "past one block")
    yield Sample((make(4, 1), c(2, 1, 3), make()), {}, "broadcast")
    yield Sample((make(0, 4), c(4), 1), {}, "empty")


def _round_samples(make: Make) -> Iterator[Sample]:
    yield from standard_samples(1, 0.6, 1.4)(make)
    yield Sample((make(3, 5, low=0.1, high=0.2),), {"decimals": 1}, "decimals")
    yield Sample((make(3, 5, low=60.0, high=140.0),), {"decimals": -2}, "hundreds")


def either(condition: Tensor, a: Any, b: Any) -> Tensor:
    """One of two tangents, of which one may be missing."""
    return torch.where(condition, 0.0 if a is None else a, 0.0 if b is None else b)


def lower_slope(g: Tensor, x: Tensor, low: Any, high: Any, form: str = "") -> Tensor:
    """Where the bounds have crossed, the upper one is the result."""
    return torch.where(x < low, g if form else torch.where(low < high, g, 0.0), 0.0)


def upper_slope(g: Tensor, x: Tensor, low: Any, high: Any, form: str = "") -> Tensor:
    return torch.where(x > high, g, 0.0 if form else torch.where(high < low, g, 0.0))


def clamped_tangent(dx: Any, dlow: Any, dhigh: Any, x: Tensor, low: Any, high: Any) -> Tensor:
    """Which of equals moves is torch's choice: x beside numbers and beside two tensors, the bound
    where it is one tensor."""
    moving_low, moving_high = isinstance(low, Tensor), isinstance(high, Tensor)
    if moving_low and moving_high:
        return either(low > high, dhigh, either(x < low, dlow, either(x > high, dhigh, dx)))
    if moving_low:
        return either(x > low, dx, dlow)
    if moving_high:
        return either(x < high, dx, dhigh)
    return torch.where(x >= low, torch.where(x <= high, dx, 0.0), 0.0)


def numeric_tangent(dx: Tensor | None, dy: Tensor | None, first: Tensor) -> Tensor:
    """The tangent of x where it is chosen, else that of y."""
    if dy is None:
        assert dx is not None
        return first * dx
    return dy + first * (-dy if dx is None else dx - dy)


def chosen_tangent(dx: Tensor | None, dy: Tensor | None, tie: Tensor, first: Tensor) -> Tensor:
    """The tangent of x where it is chosen, of y where not or where either is NaN, and between the
    two where they tie."""
    given = dx if dy is None else dy
    assert given is not None
    share = torch.where(tie, 0.5, first.to(given.dtype))
    if dy is None:
        return share * given
    return dy + share * (-dy if dx is None else dx - dy)


pointwise(
    "sign", torch.sign, torch.sgn, T.sign, T.sgn,
    bind=unary_bind(False), rules={"x": lambda g: torch.zeros_like(g)}, opinfo=("sign", "sgn"),
)  # fmt: skip


def _extremum(name: str, reduction: str, beyond: Callable[[Tensor, Tensor], Tensor]) -> None:
    """maximum or minimum; ``beyond(x, y)`` says where x is chosen."""
    overloads = getattr(torch, reduction), getattr(T, reduction)
    pointwise(
        name, *spelled(name),
        bind=bind_tensors,
        variants=dict.fromkeys(overloads, bind_pair),
        shares=overloads,
        opinfo=(name, f"{reduction}.binary"),
        inputs=("x", "y"),
        rules={
            "x": lambda g, x, y: torch.where(x == y, g / 2, torch.where(beyond(y, x), 0.0, g)),
            "y": lambda g, x, y: torch.where(x == y, g / 2, torch.where(beyond(x, y), 0.0, g)),
        },
        jvp=lambda dx, dy, x, y: chosen_tangent(dx, dy, x == y, beyond(x, y)),
    )  # fmt: skip


def _numeric_extremum(
    name: str,
    reaches: Callable[[Tensor, Tensor], Tensor],
    beyond: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """fmax or fmin, which choose x where y is NaN, and of what ties x as well; torch's forward mode
    has a tie of its own, ``beyond``."""
    pointwise(
        name, *spelled(name),
        bind=bind_tensors,
        inputs=("x", "y"),
        rules={
            "x": lambda g, x, y: torch.where(y != y, g, torch.where(reaches(x, y), g, 0.0)),
            "y": lambda g, x, y: torch.where(y != y, 0.0, torch.where(reaches(x, y), 0.0, g)),
        },
        jvp=lambda dx, dy, x, y: numeric_tangent(dx, dy, torch.where(y != y, True, beyond(x, y))),
    )  # fmt: skip


_extremum("maximum", "max", torch.gt)
_extremum("minimum", "min", torch.lt)
_numeric_extremum("fmax", torch.ge, torch.gt)
_numeric_extremum("fmin", torch.le, torch.le)
pointwise(
    "where", torch.where,
    bind=bind_where,
    variants={T.where: bind_where_method},
    inputs=("c", "x", "y"),
    rules={"x": lambda g, c: torch.where(c, g, 0.0), "y": lambda g, c: torch.where(c, 0.0, g)},
    samples=_where_samples,
)  # fmt: skip
pointwise(
    "clamp", *spelled("clamp", "clip"),
    bind=bind_clamp,
    inputs=("x", "low", "high"),
    rules={
        "x": lambda g, x, low, high: torch.where(
            x >= low, torch.where(x <= high, g, 0.0), 0.0
        ),
        "low": lower_slope,
        "high": upper_slope,
    },
    forms=("", "_open"),
    jvp=clamped_tangent,
    samples=_clamp_samples,
)  # fmt: skip
pointwise(
    "clamp_min", *spelled("clamp_min"),
    bind=bind_two,
    inputs=("x", "y"),
    rules={
        "x": lambda g, x, y: torch.where(x >= y, g, 0.0),
        "y": lambda g, x, y: torch.where(x < y, g, 0.0),
    },
    jvp=lambda dx, dy, x, y: either(x >= y, dx, dy),
    samples=number_samples(-2.0, 2.0),
)  # fmt: skip
pointwise(
    "clamp_max", *spelled("clamp_max"),
    bind=bind_two,
    inputs=("x", "y"),
    rules={
        "x": lambda g, x, y: torch.where(x <= y, g, 0.0),
        "y": lambda g, x, y: torch.where(x > y, g, 0.0),
    },
    jvp=lambda dx, dy, x, y: either(x <= y, dx, dy),
    samples=number_samples(-2.0, 2.0),
)  # fmt: skip
pointwise(
    "masked_fill", *spelled("masked_fill"),
    bind=bind_masked_fill,
    inputs=("x", "c", "y"),
    rules={"x": lambda g, c: torch.where(c, 0.0, g), "y": lambda g, c: torch.where(c, g, 0.0)},
    samples=_masked_fill_samples,
)  # fmt: skip
pointwise(
    "nan_to_num", *spelled("nan_to_num"),
    bind=bind_nan_to_num,
    consts=("nan", "posinf", "neginf"),
    # x - x is 0 for finite numbers only.
    rules={"x": lambda g, x: g * (x - x == 0)},
)  # fmt: skip
pointwise(
    "copysign", *spelled("copysign"),
    bind=binary_bind(True),
    inputs=("x", "y"),
    rules={
        "x": lambda g, x, out: g * torch.where(x == 0, 0.0, out / x),
        "y": lambda g: torch.zeros_like(g),
    },
    samples=number_samples(0.5, 2.0),
)  # fmt: skip
pointwise(
    "floor", *spelled("floor"),
    bind=unary_bind(False), rules={"x": lambda g: torch.zeros_like(g)}, low=0.2, high=0.8,
)  # fmt: skip
pointwise(
    "ceil", *spelled("ceil"),
    bind=unary_bind(False), rules={"x": lambda g: torch.zeros_like(g)}, low=0.2, high=0.8,
)  # fmt: skip
pointwise(
    "trunc", *spelled("trunc", "fix"),
    bind=unary_bind(False), rules={"x": lambda g: torch.zeros_like(g)}, low=0.2, high=0.8,
)  # fmt: skip
pointwise(
    "frac", *spelled("frac"),
    bind=unary_bind(False), rules={"x": lambda g: g}, low=0.2, high=0.8,
)  # fmt: skip
pointwise(
    "round", *spelled("round"),
    bind=bind_round,
    consts=("up", "down"),
    forms=("", "_decimals"),
    rules={"x": lambda g: torch.zeros_like(g)},
    samples=_round_samples,
    opinfo=("round", "round.decimals_0", "round.decimals_3", "round.decimals_neg_3"),
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
        samples=number_samples(-2.0, 2.0),
    )  # fmt: skip
