"""Gradients of reductions: pointwise functions of `g`, the gradient of the result, and `out`, the
result, both broadcast along the reduced dimensions, and `x`, the input.

    sum   dx = g            norm   dx = g * x / out            prod   dx = g * product of the others
"""

import triton
import triton.language as tl

from . import math as m
from .math import libdevice
from .reduction import absolute_hit, angle, at_least, hit, is_number, same, unbounded


@triton.jit
def extremum_bwd(g, x, out, count):
    # A product, not a selection: where `count` is 0 (NaN) the gradient is NaN, as torch's is.
    return (m.div(g, count) * hit(x, out)[0],)


@triton.jit
def prod_bwd(g, x, rest, zeros, wild):
    """`rest` is the product of what is not 0, of which there are `zeros` more; `wild` of all are
    not finite."""
    other_zeros = zeros - tl.where(x == 0, 1, 0)
    # 0 times what is not finite is NaN.
    of_zeros = tl.where(wild > unbounded(x), float("nan"), 0)
    others = tl.where(other_zeros > 0, of_zeros, tl.where(x == 0, rest, m.div(rest, x)))
    return (g * others,)


@triton.jit
def evenly_bwd(g, x, out, count):
    return (tl.where(same(x, out)[0] > 0, m.div(g, count), 0),)


@triton.jit
def nansum_bwd(g, x):
    return (g * is_number(x)[0],)


@triton.jit
def nanmean_bwd(g, x, count):
    return (m.div(g, count) * is_number(x)[0],)


@triton.jit
def logsumexp_bwd(g, x, out):
    return (g * libdevice.exp(x - out),)


@triton.jit
def variance_bwd(g, h, x, mean, scale, count):
    """`g` of the variance, `h` of the mean."""
    return (g * (scale * (x - mean)) + m.div(h, tl.broadcast_to(count, h.shape)),)


@triton.jit
def deviation_bwd(g, h, x, mean, out, scale, count):
    slope = tl.where(out == 0, 0, m.div(g, 2 * out))
    return variance_bwd(slope, h, x, mean, scale, count)


@triton.jit
def norm_1_bwd(g, x):
    return (g * m.sign(x),)


@triton.jit
def norm_2_bwd(g, x, out):
    return (g * tl.where(out == 0, 0, m.div(x, out)),)


@triton.jit
def distance_bwd(g, x, y, out, eps):
    slope = norm_2_bwd(g, x - y + eps, out)[0]
    return slope, -slope


@triton.jit
def difference(x, y, eps):
    return (x - y + eps,)


@triton.jit
def negative(x):
    return (-x,)


@triton.jit
def cosine_bwd(g, x, y, x_norm, y_norm, xy, eps):
    x_least, y_least = at_least(x_norm, eps), at_least(y_norm, eps)
    out = angle(xy, x_least, y_least)
    x_unit, y_unit = m.div(x, x_least), m.div(y, y_least)
    # In the direction of x itself the norm changes, as far as torch lets it.
    x_own = tl.where(x_norm == 0, 0, m.div(x, x_norm))
    y_own = tl.where(y_norm == 0, 0, m.div(y, y_norm))
    return m.div(g * (y_unit - out * x_own), x_least), m.div(g * (x_unit - out * y_own), y_least)


@triton.jit
def norm_inf_bwd(g, x, out, count):
    share = m.div(g, tl.where(m.is_nan(out), 1, count))
    return (m.sign(x) * (share * absolute_hit(x, out)[0]),)


@triton.jit
def norm_scale(g, out, p):
    """What all elements of a row have in common in the gradient of a p-norm."""
    # Apart, so that a norm of 0 never divides.
    low = g * libdevice.pow(out, tl.broadcast_to(1 - p, out.shape))
    high = tl.where(out == 0, 0, m.div(g, libdevice.pow(out, tl.broadcast_to(p - 1, out.shape))))
    return (tl.where(p < 1, low, high),)


@triton.jit
def norm_p_bwd(scale, x, p):
    slope = libdevice.pow(tl.abs(x), tl.broadcast_to(p - 1, x.shape))
    return (m.sign(x) * tl.where(x == 0, 0, slope) * scale,)
