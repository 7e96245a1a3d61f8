"""Device functions that compare, choose and step. See pointwise.py for their kernels."""

import triton
import triton.language as tl

from . import math as m
from .math import libdevice


@triton.jit
def sign(x):
    return (m.sign(x),)


@triton.jit
def maximum(x, y):
    return (tl.where(m.is_nan(x) | (x > y), x, y),)


@triton.jit
def maximum_bwd(g, x, y):
    tie = x == y
    return tl.where(tie, g / 2, tl.where(x < y, 0, g)), tl.where(tie, g / 2, tl.where(x > y, 0, g))


@triton.jit
def minimum(x, y):
    return (tl.where(m.is_nan(x) | (x < y), x, y),)


@triton.jit
def minimum_bwd(g, x, y):
    tie = x == y
    return tl.where(tie, g / 2, tl.where(x > y, 0, g)), tl.where(tie, g / 2, tl.where(x < y, 0, g))


@triton.jit
def where(c, x, y):
    return (tl.where(c, x, y),)


@triton.jit
def where_bwd(g, c):
    return tl.where(c, g, 0), tl.where(c, 0, g)


@triton.jit
def eq(x, y):
    return (x == y,)


@triton.jit
def ne(x, y):
    return (x != y,)


@triton.jit
def lt(x, y):
    return (x < y,)


@triton.jit
def le(x, y):
    return (x <= y,)


@triton.jit
def gt(x, y):
    return (x > y,)


@triton.jit
def ge(x, y):
    return (x >= y,)


@triton.jit
def fmax(x, y):
    return (tl.where((x >= y) | m.is_nan(y), x, y),)


@triton.jit
def fmax_bwd(g, x, y):
    first = (x >= y) | m.is_nan(y)
    return tl.where(first, g, 0), tl.where(first, 0, g)


@triton.jit
def fmin(x, y):
    return (tl.where((x <= y) | m.is_nan(y), x, y),)


@triton.jit
def fmin_bwd(g, x, y):
    first = (x <= y) | m.is_nan(y)
    return tl.where(first, g, 0), tl.where(first, 0, g)


@triton.jit
def clamp_min(x, y):
    return (tl.where(m.is_nan(x) | (x > y), x, y),)


@triton.jit
def clamp_min_bwd(g, x, y):
    return tl.where(x >= y, g, 0), tl.where(x < y, g, 0)


@triton.jit
def clamp_max(x, y):
    return (tl.where(m.is_nan(x) | (x < y), x, y),)


@triton.jit
def clamp_max_bwd(g, x, y):
    return tl.where(x <= y, g, 0), tl.where(x > y, g, 0)


@triton.jit
def clamp(x, low, high):
    raised = tl.where(m.is_nan(x) | (x > low), x, low)
    return (tl.where(m.is_nan(raised) | (raised < high), raised, high),)


@triton.jit
def clamp_bwd(g, x, low, high):
    inside = tl.where((x >= low) & (x <= high), g, 0)
    # Where the bounds have crossed, the upper one is the result.
    at_low = tl.where((x < low) & (low < high), g, 0)
    at_high = tl.where((x > high) | (high < low), g, 0)
    return inside, at_low, at_high


@triton.jit
def clamp_open(x, low, high):
    """With one bound; the other is infinite."""
    return clamp(x, low, high)


@triton.jit
def clamp_open_bwd(g, x, low, high):
    inside = tl.where((x >= low) & (x <= high), g, 0)
    return inside, tl.where(x < low, g, 0), tl.where(x > high, g, 0)


@triton.jit
def masked_fill(x, c, y):
    return (tl.where(c, y, x),)


@triton.jit
def masked_fill_bwd(g, c):
    return tl.where(c, 0, g), tl.where(c, g, 0)


@triton.jit
def nan_to_num(x, nan, posinf, neginf):
    finite = tl.where(x == float("inf"), posinf, tl.where(x == float("-inf"), neginf, x))
    return (tl.where(m.is_nan(x), nan, finite),)


@triton.jit
def nan_to_num_bwd(g, x, nan, posinf, neginf):
    # A product, as torch's: an infinite gradient of what was not finite is NaN.
    return (g * (x - x == 0).to(x.dtype),)


@triton.jit
def copysign(x, y):
    return (libdevice.copysign(x, y),)


@triton.jit
def copysign_bwd(g, x, out):
    return g * tl.where(x == 0, 0, m.div(out, x)), tl.zeros_like(g)


@triton.jit
def floor(x):
    return (tl.floor(x),)


@triton.jit
def ceil(x):
    return (tl.ceil(x),)


@triton.jit
def trunc(x):
    return (libdevice.trunc(x),)


@triton.jit
def frac(x):
    return (x - libdevice.trunc(x),)


@triton.jit
def round(x):
    return (libdevice.rint(x),)


@triton.jit
def round_decimals(x, up, down):
    """To a multiple of down / up, of which one is 1."""
    return (m.div(libdevice.rint(m.div(x * up, down)) * down, up),)
