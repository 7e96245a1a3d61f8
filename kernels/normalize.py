"""Rows over their norms.

    y = x / l,  l = max(|x|, eps);   dx = (g - y <g, y>) / l where |x| >= eps, else g / l

The functions named `*_row` are for kernels.rowwise, which holds whole rows, and of norms of order
2. Other rows are reduced first, and then computed element by element; those are the others.
"""

import triton
import triton.language as tl

from . import math as m
from .reduction import at_least


@triton.jit
def normalize(x, norm, eps):
    return (m.div(x, at_least(norm, eps)),)


@triton.jit
def normalize_row(x, mask, eps):
    norm = m.sqrt(tl.sum(x * x, 1))[:, None]
    return normalize(x, tl.broadcast_to(norm, x.shape), eps)


@triton.jit
def products(g, x):
    return x * x, g * x


@triton.jit
def normalize_bwd(g, x, square, dot, eps):
    """`square` and `dot` are the sums of `products`."""
    norm = m.sqrt(square)
    least = at_least(norm, eps)
    # Twice divided by the norm, whose square may be too small or too large.
    along = m.div(x, least) * m.div(dot, least)
    # A norm of 0 has slope 0, one that is too small has none.
    return (m.div(g - tl.where((norm < eps) | (norm == 0), 0, along), least),)


@triton.jit
def normalize_bwd_row(g, x, mask, eps):
    square, dot = tl.sum(x * x, 1)[:, None], tl.sum(g * x, 1)[:, None]
    return normalize_bwd(g, x, tl.broadcast_to(square, x.shape), tl.broadcast_to(dot, x.shape), eps)
