"""Pointwise losses.

L = (sum over i of l(x[i], y[i], ...)) / n, or the sum alone, or each l by itself; and backward
dx[i] = g / n * dl/dx[i].

`NAME` is l, a device function for the pointwise kernel as for the reduction kernel's MAP, so that
no loss is ever stored that is only summed. `x` is the input, `y` the target, `w` the weight, 1
where there is none; then come the loss's numbers. Of a result that is a tensor the first parameter
decides the memory layout. `NAME_bwd` has one value for each input that has a gradient; `scale` is
1 / n. Where n is the sum of the weights, `mean` is the result, and 0 otherwise. They are torch's
formulas, and where those overflow, so do these.
"""

import triton
import triton.language as tl

from . import math as m
from .elementary import xlogy, xlogy_bwd
from .math import libdevice
from .reduction import at_least, one

# What torch's kernel adds nothing below, a float32 in every dtype; and the least logarithm.
BCE_EPSILON = tl.constexpr(9.999999960041972e-13)
BCE_LEAST = tl.constexpr(-100.0)


@triton.jit
def average(total, weight):
    """A weighted sum over the sum of the weights; and for backward `scale` and `mean`."""
    mean = m.div(total, weight)
    return mean, m.div(one(weight), weight), mean


@triton.jit
def mse_loss(x, y, w):
    d = x - y
    return (d * d * w,)


@triton.jit
def mse_loss_and_weight(x, y, w):
    return mse_loss(x, y, w)[0], w


@triton.jit
def mse_loss_bwd(g, x, y, w, scale, mean):
    g = g * scale
    d = x - y
    slope = g * w * (2 * d)
    return slope, -slope, g * (d * d - mean)


@triton.jit
def absolute_error(x, y):
    return (tl.abs(x - y),)


@triton.jit
def absolute_error_bwd(g, x, y, scale):
    slope = g * scale * m.sign(x - y)
    return slope, -slope


@triton.jit
def l1_loss(x, y, w):
    return (tl.abs(x - y) * w,)


@triton.jit
def l1_loss_and_weight(x, y, w):
    return l1_loss(x, y, w)[0], w


@triton.jit
def l1_loss_bwd(g, x, y, w, scale, mean):
    g = g * scale
    slope = g * w * m.sign(x - y)
    return slope, -slope, g * (tl.abs(x - y) - mean)


@triton.jit
def smooth_l1_loss(x, y, beta):
    z = tl.abs(x - y)
    inside = m.div(0.5 * z * z, tl.broadcast_to(beta, z.shape))
    return (tl.where(z < beta, inside, z - 0.5 * beta),)


@triton.jit
def smooth_l1_loss_bwd(g, x, y, scale, beta):
    d = x - y
    inside = m.div(d, tl.broadcast_to(beta, d.shape))
    slope = g * scale * tl.where(d <= -beta, -1, tl.where(d >= beta, 1, inside))
    return slope, -slope


@triton.jit
def huber_loss(x, y, w, delta):
    z = tl.abs(x - y)
    return (tl.where(z <= delta, 0.5 * z * z, delta * (z - 0.5 * delta)) * w,)


@triton.jit
def huber_loss_bwd(g, x, y, w, scale, delta):
    g = g * scale
    d = x - y
    slope = g * w * tl.where(d <= -delta, -delta, tl.where(d >= delta, delta, d))
    return slope, -slope, g * huber_loss(x, y, 1, delta)[0]


@triton.jit
def binary_cross_entropy(x, y, w):
    off = at_least(libdevice.log1p(-x), BCE_LEAST)
    on = at_least(libdevice.log(x), BCE_LEAST)
    return (((y - 1) * off - y * on) * w,)


@triton.jit
def cross_entropy_slope(u, x, y):
    return (m.div(u * (x - y), at_least((1 - x) * x, BCE_EPSILON)),)


@triton.jit
def binary_cross_entropy_bwd(g, x, y, w, scale):
    g = g * scale * w
    return cross_entropy_slope(g, x, y)[0], g * (libdevice.log1p(-x) - libdevice.log(x))


@triton.jit
def log_sigmoid(x):
    return tl.where(x < 0, x, 0) - libdevice.log1p(libdevice.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    e = libdevice.exp(-tl.abs(x))
    return m.div(tl.where(x < 0, e, 1), 1 + e)


@triton.jit
def binary_cross_entropy_with_logits(x, y, w):
    return (((1 - y) * x - log_sigmoid(x)) * w,)


@triton.jit
def binary_cross_entropy_with_logits_bwd(g, x, y, w, scale):
    g = g * scale * w
    return g * (sigmoid(x) - y), -x * g


@triton.jit
def positive_weighted(x, y, p, w):
    """binary_cross_entropy_with_logits with the weight `p` of what is positive."""
    return (((1 - y) * x - ((p - 1) * y + 1) * log_sigmoid(x)) * w,)


@triton.jit
def positive_weighted_bwd(g, x, y, p, w, scale):
    g = g * scale * w
    on = p * y
    return g * ((on + 1 - y) * sigmoid(x) - on), g * (log_sigmoid(-x) - p * log_sigmoid(x))


@triton.jit
def kl_div(x, y):
    return (xlogy(y, y)[0] - y * x,)


@triton.jit
def kl_div_bwd(g, x, y, scale):
    g = g * scale
    factor, logarithm = xlogy_bwd(g, y, y)
    return -g * y, factor + logarithm - g * x


@triton.jit
def kl_div_log_target(x, y):
    return (libdevice.exp(y) * (y - x),)


@triton.jit
def kl_div_log_target_bwd(g, x, y, scale):
    g = g * scale
    e = libdevice.exp(y)
    return -g * e, g * (e * (y - x)) + g * e


@triton.jit
def stirling(y):
    """Stirling's approximation of log(y!), for y > 1."""
    return tl.where(
        y <= 1, 0, y * libdevice.log(y) - y + 0.5 * libdevice.log(6.283185307179586 * y)
    )


@triton.jit
def stirling_bwd(g, y):
    # A product, not a selection: where the logarithm is not finite, torch's gradient is NaN.
    g = tl.where(y <= 1, 0, g)
    return g * libdevice.log(y) + (m.div(g * y, y) - g) + m.div(0.5 * g, y)


@triton.jit
def poisson_nll_loss(x, y, eps):
    return (x - y * libdevice.log(x + eps),)


@triton.jit
def poisson_nll_loss_bwd(g, x, y, scale, eps):
    g = g * scale
    return g * (1 - m.div(y, x + eps)), -g * libdevice.log(x + eps)


@triton.jit
def poisson_full(x, y, eps):
    return (poisson_nll_loss(x, y, eps)[0] + stirling(y),)


@triton.jit
def poisson_full_bwd(g, x, y, scale, eps):
    dx, dy = poisson_nll_loss_bwd(g, x, y, scale, eps)
    return dx, dy + stirling_bwd(g * scale, y)


@triton.jit
def poisson_log_input(x, y):
    return (libdevice.exp(x) - y * x,)


@triton.jit
def poisson_log_input_bwd(g, x, y, scale):
    g = g * scale
    return g * (libdevice.exp(x) - y), -g * x


@triton.jit
def poisson_log_input_full(x, y):
    return (poisson_log_input(x, y)[0] + stirling(y),)


@triton.jit
def poisson_log_input_full_bwd(g, x, y, scale):
    dx, dy = poisson_log_input_bwd(g, x, y, scale)
    return dx, dy + stirling_bwd(g * scale, y)


@triton.jit
def gaussian_nll_loss(x, y, v, eps, constant):
    d = x - y
    v = tl.broadcast_to(at_least(v, eps), d.shape)
    return (0.5 * (libdevice.log(v) + m.div(d * d, v)) + constant,)


@triton.jit
def gaussian_nll_loss_bwd(g, x, y, v, scale, eps, constant):
    # Where v was raised to eps its gradient is that at eps.
    g = 0.5 * g * scale
    v = at_least(v, eps)
    d = x - y
    slope = m.div(g, v)
    return slope * (2 * d), -slope * (2 * d), slope - g * m.div(m.div(d * d, v), v)


@triton.jit
def soft_margin_loss(x, y):
    return (libdevice.log1p(libdevice.exp(-y * x)),)


@triton.jit
def soft_margin_loss_bwd(g, x, y, scale):
    z = libdevice.exp(-y * x)
    return (-g * scale * y * m.div(z, 1 + z),)


@triton.jit
def hinge_embedding_loss(y, x, margin):
    return (tl.where(y != 1, at_least(margin - x, 0), 0) + tl.where(y != -1, x, 0),)


@triton.jit
def hinge_embedding_loss_bwd(g, x, y, scale, margin):
    g = g * scale
    return (tl.where(y != -1, g, 0) - tl.where((y != 1) & (margin - x >= 0), g, 0),)


@triton.jit
def margin_ranking_loss(t, x, y, margin):
    return (at_least(-t * (x - y) + margin, 0),)


@triton.jit
def margin_ranking_loss_bwd(g, x, y, t, scale, margin):
    d = x - y
    g = tl.where(-t * d + margin >= 0, g * scale, 0)
    return -g * t, g * t, -g * d
