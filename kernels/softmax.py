"""Softmax and its logarithm.

y = exp(x - max x) / sum exp(x - max x), and log y = x - max x - log sum exp(x - max x).

With sums along the row, <a, b> = sum a b, g the gradient of the result and v that of dx:

    softmax       dx = y (g - <g, y>)        dg = y (v - <v, y>)     dy = v (g - <g, y>) - g <v, y>
    log_softmax   dx = g - exp(y) sum g      dg = v - <v, exp(y)>    dy = -v exp(y) sum g

The functions named `*_row` are for kernels.rowwise, which holds whole rows. Longer rows are reduced
first, and then computed element by element with what the reduction found; those are the others.
"""

import triton
import triton.language as tl

from . import math as m
from .math import libdevice

INF = tl.constexpr(float("inf"))


@triton.jit
def shifted(x, mask):
    """x - max x and its exponential, 0 past the end. A row of -inf is NaN, as torch's is."""
    x = x - tl.max(tl.where(mask, x, -INF), 1)[:, None]
    return x, tl.where(mask, libdevice.exp(x), 0)


@triton.jit
def softmax_row(x, mask):
    _, e = shifted(x, mask)
    return (m.div(e, tl.sum(e, 1)[:, None]),)


@triton.jit
def softmax_bwd_row(g, y, mask):
    return softmax_bwd(g, y, tl.sum(g * y, 1)[:, None])


@triton.jit
def softmax_bwd_bwd_row(v, g, y, mask):
    return softmax_bwd_bwd(v, g, y, tl.sum(v * y, 1)[:, None], tl.sum(g * y, 1)[:, None])


@triton.jit
def log_softmax_row(x, mask):
    x, e = shifted(x, mask)
    return (x - libdevice.log(tl.sum(e, 1))[:, None],)


@triton.jit
def log_softmax_bwd_row(g, y, mask):
    return log_softmax_bwd(g, y, tl.sum(g, 1)[:, None])


@triton.jit
def log_softmax_bwd_bwd_row(v, g, y, mask):
    # v is 0 past the end, where exp(y) is not.
    return log_softmax_bwd_bwd(
        v, g, y, tl.sum(v * libdevice.exp(y), 1)[:, None], tl.sum(g, 1)[:, None]
    )


@triton.jit
def softmax(x, top, total):
    # A row with an infinity in it is NaN throughout, as torch's is.
    return (m.div(libdevice.exp(x - top), tl.where(top == INF, float("nan"), total)),)


@triton.jit
def softmax_bwd(g, y, gy):
    return (y * (g - gy),)


@triton.jit
def softmax_bwd_bwd(v, g, y, vy, gy):
    return y * (v - vy), v * (g - gy) - g * vy


@triton.jit
def log_softmax(x, top, total):
    return (x - top - libdevice.log(tl.where(top == INF, float("nan"), total)),)


@triton.jit
def log_softmax_bwd(g, y, total):
    return (g - libdevice.exp(y) * total,)


@triton.jit
def log_softmax_bwd_bwd(v, g, y, vp, total):
    return v - vp, -v * libdevice.exp(y) * total


# MAP of the reductions of long rows.


@triton.jit
def product_exponential(x, y):
    return (x * libdevice.exp(y),)
