"""Device functions of arithmetic. See pointwise.py for the kernels that carry them."""

import triton
import triton.language as tl

from . import math as m


@triton.jit
def add(x, y, alpha):
    return (x + alpha * y,)


@triton.jit
def sub(x, y, alpha):
    return (x - alpha * y,)


@triton.jit
def mul(x, y):
    return (x * y,)


@triton.jit
def mul_bwd(g, x, y):
    return g * y, g * x


@triton.jit
def div(x, y):
    return (m.div(x, y),)


@triton.jit
def div_bwd(g, x, y):
    # Two divisions, not one by y * y, which overflows long before the quotient does.
    return m.div(g, y), -g * m.div(m.div(x, y), y)


@triton.jit
def neg(x):
    return (-x,)


@triton.jit
def pow(x, y):
    return (m.pow(x, y),)


@triton.jit
def pow_bwd(g, x, y, out):
    dx = tl.where(y == 0, 0, g * (y * m.pow(x, y - 1)))
    # 0 ** y is constant in y for y >= 0; elsewhere log(0) says what torch says.
    dy = g * tl.where((x == 0) & (y >= 0), 0, out * m.log(x))
    return dx, dy


@triton.jit
def power_or_root(x, y):
    # For the numbers 0.5 and -0.5 torch takes roots, which are not powers at -0 and -inf.
    root = m.sqrt(x)
    inverse = m.div(tl.full(x.shape, 1, x.dtype), root)
    return tl.where(y == 0.5, root, tl.where(y == -0.5, inverse, m.pow(x, y)))


@triton.jit
def pow_number(x, y):
    return (power_or_root(x, y),)


@triton.jit
def pow_number_bwd(g, x, y):
    return (tl.where(y == 0, 0, g * (y * power_or_root(x, y - 1))),)


@triton.jit
def square(x, y):
    return (x * x,)


@triton.jit
def square_bwd(g, x):
    return (g * (2 * x),)


@triton.jit
def abs(x):
    return (tl.abs(x),)


@triton.jit
def abs_bwd(g, x):
    return (g * m.sign(x),)
