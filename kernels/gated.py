"""Gated units: an activation of one half of a projection gates the other. See pointwise.py for the
kernels.

out = f(x) y, with f the activation, and backward dx = g y f'(x), dy = g f(x). With v the gradients
of these,

    dg = vx y f' + vy f        dx = g (vx y f'' + vy f')        dy = vx g f'

glu is the one whose gate is the second operand, as torch has it: x s(y), s the logistic function.
"""

import triton
import triton.language as tl

from .activation import (
    gelu,
    gelu_slopes,
    gelu_tanh,
    gelu_tanh_slopes,
    logistic,
    relu,
    silu,
    silu_slopes,
)


@triton.jit
def gated_bwd(g, y, f, d):
    return g * y * d, g * f


@triton.jit
def gated_bwd_bwd(vx, vy, g, y, f, d, dd):
    return vx * y * d + vy * f, g * (vx * y * dd + vy * d), vx * g * d


@triton.jit
def glu(x, y, HALF: tl.constexpr = False):
    return (x * logistic(y, HALF),)


@triton.jit
def glu_bwd(g, x, y, HALF: tl.constexpr = False):
    s = logistic(y, HALF)
    return g * s, g * x * (s * (1 - s))


@triton.jit
def glu_bwd_bwd(vx, vy, g, x, y, HALF: tl.constexpr = False):
    s = logistic(y, HALF)
    d = s * (1 - s)
    dg, dy, dx = gated_bwd_bwd(vy, vx, g, x, s, d, d * (1 - 2 * s))
    return dg, dx, dy


@triton.jit
def swiglu(x, y, HALF: tl.constexpr = False):
    return (silu(x, HALF)[0] * y,)


@triton.jit
def swiglu_bwd(g, x, y, HALF: tl.constexpr = False):
    f, d, _ = silu_slopes(x, HALF)
    return gated_bwd(g, y, f, d)


@triton.jit
def swiglu_bwd_bwd(vx, vy, g, x, y, HALF: tl.constexpr = False):
    f, d, dd = silu_slopes(x, HALF)
    return gated_bwd_bwd(vx, vy, g, y, f, d, dd)


@triton.jit
def geglu(x, y, HALF: tl.constexpr = False):
    return (gelu(x, HALF)[0] * y,)


@triton.jit
def geglu_bwd(g, x, y, HALF: tl.constexpr = False):
    f, d, _ = gelu_slopes(x, HALF)
    return gated_bwd(g, y, f, d)


@triton.jit
def geglu_bwd_bwd(vx, vy, g, x, y, HALF: tl.constexpr = False):
    f, d, dd = gelu_slopes(x, HALF)
    return gated_bwd_bwd(vx, vy, g, y, f, d, dd)


@triton.jit
def geglu_tanh(x, y, HALF: tl.constexpr = False):
    return (gelu_tanh(x, HALF)[0] * y,)


@triton.jit
def geglu_tanh_bwd(g, x, y, HALF: tl.constexpr = False):
    f, d, _ = gelu_tanh_slopes(x, HALF)
    return gated_bwd(g, y, f, d)


@triton.jit
def geglu_tanh_bwd_bwd(vx, vy, g, x, y, HALF: tl.constexpr = False):
    f, d, dd = gelu_tanh_slopes(x, HALF)
    return gated_bwd_bwd(vx, vy, g, y, f, d, dd)


@triton.jit
def reglu(x, y):
    return (relu(x)[0] * y,)


@triton.jit
def reglu_bwd(g, x, y):
    # Chosen, not multiplied by 0 or 1: the slope at an infinite g is relu's.
    return tl.where(x <= 0, 0, g * y), g * relu(x)[0]


@triton.jit
def reglu_bwd_bwd(vx, vy, g, x, y):
    off = x <= 0
    dg = tl.where(off, 0, vx * y) + vy * relu(x)[0]
    return dg, tl.where(off, 0, g * vy), tl.where(off, 0, vx * g)
