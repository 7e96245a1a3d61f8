"""Device functions of the elementary functions. See pointwise.py for their kernels."""

import triton
import triton.language as tl  # noqa: F401  (the interpreter asks for it)

from . import math as m


@triton.jit
def exp(x):
    return (m.exp(x),)


@triton.jit
def exp_bwd(g, out):
    return (g * out,)


@triton.jit
def log(x):
    return (m.log(x),)


@triton.jit
def log_bwd(g, x):
    return (m.div(g, x),)


@triton.jit
def sqrt(x):
    return (m.sqrt(x),)


@triton.jit
def sqrt_bwd(g, out):
    return (m.div(g, 2 * out),)


@triton.jit
def sin(x):
    return (m.sin(x),)


@triton.jit
def sin_bwd(g, x):
    return (g * m.cos(x),)


@triton.jit
def cos(x):
    return (m.cos(x),)


@triton.jit
def cos_bwd(g, x):
    return (-g * m.sin(x),)


@triton.jit
def tanh(x):
    return (m.tanh(x),)


@triton.jit
def tanh_bwd(g, out):
    return (g * (1 - out * out),)
