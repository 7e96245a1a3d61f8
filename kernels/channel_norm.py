"""Device functions of the norms of channels, which reductions and pointwise kernels carry.

    y = (x - E x) r w + b,    r = (E (x - E x)^2 + eps)^-1/2     E: mean over the dims of statistics
    dx = r (u - E u - xh E[u xh]),  u = g w;   dw = sum g xh;   db = sum g

E x is never one number, whose last digit would be worth as much as x is large, but an element, the
origin, and the distance of the mean from it, the offset: neither loses digits where x is far from
0, nor does what is computed of x less the one and then the other.
"""

import triton
import triton.language as tl  # noqa: F401  (the interpreter looks for it)

from . import math as m

# FINISH of moments


@triton.jit
def statistics(n, origin, offset, square, count, eps):
    variance = m.div(square, count)
    return origin, offset, m.inverse(m.sqrt(variance + eps)), variance


# POINTWISE


@triton.jit
def standard(x, origin, offset, rstd):
    return ((x - origin) - offset) * rstd


@triton.jit
def normed(x, origin, offset, rstd, weight, bias):
    return (standard(x, origin, offset, rstd) * weight + bias,)


@triton.jit
def normed_bwd(g, x, origin, offset, rstd, weight, eu, eux):
    return (rstd * (g * weight - eu - standard(x, origin, offset, rstd) * eux),)


@triton.jit
def shifted(x, mean, scale, bias):
    """By statistics that are given, and so not those of x."""
    return ((x - mean) * scale + bias,)


@triton.jit
def shifted_bwd(g, x, mean, scale):
    dx = g * scale
    return dx, -dx, g * (x - mean), g


@triton.jit
def running(mean, var, origin, offset, variance, momentum, kept, correction):
    """Averages over calls; ``kept`` is 1 - momentum, ``correction`` what makes it unbiased."""
    now = (origin + offset, variance * correction)
    return mean * kept + now[0] * momentum, var * kept + now[1] * momentum


# MAP and FINISH of the sums, which are of g and of g xh, and then of these by weights


@triton.jit
def slopes(g, x, origin, offset, rstd):
    return g, g * standard(x, origin, offset, rstd)


@triton.jit
def weighted(sum_g, sum_gx, weight):
    return sum_g * weight, sum_gx * weight


@triton.jit
def averages(first, second, count):
    return m.div(first, count), m.div(second, count)
