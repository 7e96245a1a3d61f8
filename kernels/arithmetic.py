"""Device functions of arithmetic. See pointwise.py for the kernels that carry them."""

import triton
import triton.language as tl

from . import math as m
from .math import libdevice


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
def pow(x, y, HALF: tl.constexpr = False):
    return (m.pow(x, y, HALF),)


@triton.jit
def pow_bwd(g, x, y, out, HALF: tl.constexpr = False):
    dx = tl.where(y == 0, 0, g * (y * m.pow(x, y - 1, HALF)))
    # 0 ** y is constant in y for y >= 0; elsewhere log(0) says what torch says.
    dy = g * tl.where((x == 0) & (y >= 0), 0, out * m.log(x, HALF))
    return dx, dy


@triton.jit
def power_or_root(x, y, HALF: tl.constexpr = False):
    # For the numbers 0.5 and -0.5 torch takes roots, which are not powers at -0 and -inf.
    root = m.sqrt(x)
    return tl.where(y == 0.5, root, tl.where(y == -0.5, m.inverse(root), m.pow(x, y, HALF)))


@triton.jit
def pow_number(x, y, HALF: tl.constexpr = False):
    return (power_or_root(x, y, HALF),)


@triton.jit
def pow_number_bwd(g, x, y, HALF: tl.constexpr = False):
    return (tl.where(y == 0, 0, g * (y * power_or_root(x, y - 1, HALF))),)


@triton.jit
def pow_square(x, y):
    return (x * x,)


@triton.jit
def square(x):
    return (x * x,)


@triton.jit
def square_bwd(g, x):
    return (g * (2 * x),)


@triton.jit
def addr(x, y, z, beta, alpha):
    return (tl.where(beta == 0, 0, beta * x) + alpha * y * z,)


@triton.jit
def addr_bwd(g, y, z, beta, alpha):
    return beta * g, alpha * g * z, alpha * g * y


@triton.jit
def abs(x):
    return (tl.abs(x),)


@triton.jit
def abs_bwd(g, x):
    return (g * m.sign(x),)


@triton.jit
def reciprocal(x):
    return (m.inverse(x),)


@triton.jit
def reciprocal_bwd(g, out):
    return (-g * (out * out),)


@triton.jit
def scale(x, factor):
    return (x * factor,)


@triton.jit
def addcmul(x, y, z, value):
    return (x + value * (y * z),)


@triton.jit
def addcmul_bwd(g, y, z, value):
    return g, g * (z * value), g * (y * value)


@triton.jit
def addcdiv(x, y, z, value):
    return (x + m.div(value * y, z),)


@triton.jit
def addcdiv_bwd(g, y, z, value):
    return g, g * m.div(value, z), -g * m.div(value * y, z * z)


@triton.jit
def lerp(x, y, w):
    # From the nearer end, so that each is met exactly.
    far = tl.abs(w) >= 0.5
    return (tl.where(far, y - (y - x) * (1 - w), x + w * (y - x)),)


@triton.jit
def lerp_bwd(g, x, y, w):
    return g * (1 - w), g * w, g * (y - x)


@triton.jit
def fmod(x, y):
    return (libdevice.fmod(x, y),)


@triton.jit
def fmod_bwd(g, x, y):
    return g, -g * libdevice.trunc(m.div(x, y))


@triton.jit
def remainder(x, y):
    r = libdevice.fmod(x, y)
    return (tl.where((r != 0) & ((r < 0) != (y < 0)), r + y, r),)


@triton.jit
def remainder_bwd(g, x, y):
    return g, -g * floor_quotient(x, y)


@triton.jit
def floor_quotient(x, y):
    """floor(x / y) of the exact quotient, as Python's: x / y may round up to an integer."""
    r = libdevice.fmod(x, y)
    q = m.div(x - r, y)
    q = tl.where((r != 0) & ((r < 0) != (y < 0)), q - 1, q)
    low = tl.floor(q)
    low = tl.where(q - low > 0.5, low + 1, low)
    quotient = m.div(x, y)
    return tl.where(y == 0, quotient, tl.where(q == 0, libdevice.copysign(q * 0, quotient), low))


@triton.jit
def div_floor(x, y):
    return (floor_quotient(x, y),)


@triton.jit
def div_trunc(x, y):
    return (libdevice.trunc(m.div(x, y)),)
