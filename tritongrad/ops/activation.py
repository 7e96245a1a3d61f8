"""Activations of neural networks: one row an op, as arithmetic.py describes."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..kernels import activation as k
from .operands import bind_relu_function, unary_bind
from .rows import row

T = Tensor
F = torch.nn.functional
pointwise = partial(row, k)

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
