"""The elementary functions: one row an op, as arithmetic.py describes."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..kernels import elementary as k
from .operands import unary_bind
from .rows import row

T = Tensor
F = torch.nn.functional
pointwise = partial(row, k)

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
