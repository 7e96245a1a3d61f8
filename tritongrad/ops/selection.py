"""Comparison, choice and steps: one row an op, as arithmetic.py describes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..kernels import selection as k
from ..sampling import Make, Sample
from .operands import (
    bind_pair,
    bind_tensors,
    bind_two,
    bind_where,
    bind_where_method,
    unary_bind,
)
from .rows import number_samples, row

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
pointwise(
    "maximum", torch.maximum, T.maximum,
    bind=bind_tensors,
    variants={torch.max: bind_pair, T.max: bind_pair},
    shares=(torch.max, T.max),
    opinfo=("maximum", "max.binary"),
    inputs=("x", "y"),
    rules={
        "x": lambda g, x, y: torch.where(x == y, g / 2, torch.where(x < y, 0.0, g)),
        "y": lambda g, x, y: torch.where(x == y, g / 2, torch.where(x > y, 0.0, g)),
    },
    jvp=lambda dx, dy, x, y: chosen_tangent(dx, dy, x == y, x > y),
)  # fmt: skip
pointwise(
    "minimum", torch.minimum, T.minimum,
    bind=bind_tensors,
    variants={torch.min: bind_pair, T.min: bind_pair},
    shares=(torch.min, T.min),
    opinfo=("minimum", "min.binary"),
    inputs=("x", "y"),
    rules={
        "x": lambda g, x, y: torch.where(x == y, g / 2, torch.where(x > y, 0.0, g)),
        "y": lambda g, x, y: torch.where(x == y, g / 2, torch.where(x < y, 0.0, g)),
    },
    jvp=lambda dx, dy, x, y: chosen_tangent(dx, dy, x == y, x < y),
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
        samples=number_samples(-2.0, 2.0),
    )  # fmt: skip
