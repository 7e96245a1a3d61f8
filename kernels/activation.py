"""Device functions of neural networks' activations. See pointwise.py for their kernels."""

import triton
import triton.language as tl

from . import math as m


@triton.jit
def sigmoid(x):
    # exp of a non-positive number only: it never overflows.
    e = m.exp(-tl.abs(x))
    return (tl.where(x >= 0, m.div(e * 0 + 1, 1 + e), m.div(e, 1 + e)),)


@triton.jit
def sigmoid_bwd(g, out):
    return (g * (1 - out) * out,)


@triton.jit
def relu(x):
    # `x < 0` rather than a maximum: NaN stays NaN.
    return (tl.where(x < 0, 0, x),)


@triton.jit
def relu_bwd(g, out):
    return (tl.where(out <= 0, 0, g),)
