"""Device functions that compare, choose and step. See pointwise.py for their kernels."""

import triton
import triton.language as tl

from . import math as m


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
