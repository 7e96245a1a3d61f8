"""Device functions of neural networks' activations. See pointwise.py for their kernels."""

import triton
import triton.language as tl

from . import math as m
from .math import libdevice

SQRT_HALF = tl.constexpr(0.7071067811865476)
ONE_OVER_SQRT_2PI = tl.constexpr(0.3989422804014327)
# gelu's approximation: u = A (x + B x^3).
GELU_A = tl.constexpr(0.7978845608028654)
GELU_B = tl.constexpr(0.044715)
# Levels of the fraction that give tanhshrink in float64 up to 2.
TANHSHRINK_DEPTH = tl.constexpr(11)


@triton.jit
def logistic(x):
    # exp of a non-positive number only: it never overflows.
    e = libdevice.exp(-tl.abs(x))
    return m.div(tl.where(x < 0, e, 1), 1 + e)


@triton.jit
def sigmoid(x):
    return (logistic(x),)


@triton.jit
def sigmoid_bwd(g, out):
    return (g * (1 - out) * out,)


@triton.jit
def sigmoid_bwd_bwd(vx, g, out):
    return vx * (1 - out) * out, vx * g * (1 - 2 * out)


@triton.jit
def relu(x):
    # `x < 0` rather than a maximum: NaN stays NaN.
    return (tl.where(x < 0, 0, x),)


@triton.jit
def relu_bwd(g, out):
    return (tl.where(out <= 0, 0, g),)


@triton.jit
def logsigmoid(x):
    return (tl.where(x < 0, x, 0) - libdevice.log1p(libdevice.exp(-tl.abs(x))),)


@triton.jit
def logsigmoid_bwd(g, x):
    return (g * logistic(-x),)


@triton.jit
def softplus(x, beta, threshold):
    z = x * beta
    return (tl.where(z > threshold, x, m.div(libdevice.log1p(libdevice.exp(z)), beta)),)


@triton.jit
def softplus_bwd(g, x, beta, threshold):
    z = x * beta
    return (tl.where(z > threshold, g, g * logistic(z)),)


@triton.jit
def silu(x):
    return (x * logistic(x),)


@triton.jit
def silu_slopes(x):
    """silu and its first two derivatives."""
    s = logistic(x)
    ds = s * (1 - s)
    return x * s, s * (1 + x * (1 - s)), ds * (2 + x * (1 - 2 * s))


@triton.jit
def silu_bwd(g, x):
    _, d, _ = silu_slopes(x)
    return (g * d,)


@triton.jit
def silu_bwd_bwd(vx, g, x):
    _, d, dd = silu_slopes(x)
    return vx * d, vx * g * dd


@triton.jit
def tanh_softplus(x):
    """tanh(log(1 + exp(x))) = n / (n + 2) with n = exp(x) (exp(x) + 2)."""
    e = libdevice.exp(tl.where(x > 20, 20, x))
    n = e * (e + 2)
    return m.div(n, n + 2)


@triton.jit
def mish(x):
    return (x * tanh_softplus(x),)


@triton.jit
def mish_bwd(g, x):
    t = tanh_softplus(x)
    return (g * (t + x * logistic(x) * (1 - t * t)),)


@triton.jit
def gelu(x):
    return (0.5 * x * libdevice.erfc(-x * SQRT_HALF),)


@triton.jit
def gelu_slopes(x):
    """gelu and its first two derivatives; that of its density p is -x p."""
    cumulated = 0.5 * libdevice.erfc(-x * SQRT_HALF)
    density = libdevice.exp(-0.5 * (x * x)) * ONE_OVER_SQRT_2PI
    return x * cumulated, cumulated + x * density, density * (2 - x * x)


@triton.jit
def gelu_bwd(g, x):
    _, d, _ = gelu_slopes(x)
    return (g * d,)


@triton.jit
def gelu_bwd_bwd(vx, g, x):
    _, d, dd = gelu_slopes(x)
    return vx * d, vx * g * dd


@triton.jit
def gelu_tanh(x):
    # 1 + tanh(u) = 2 / (1 + exp(-2 u)), without the cancellation.
    u = (x + x * x * x * GELU_B) * GELU_A
    return (x * logistic(2 * u),)


@triton.jit
def gelu_tanh_slopes(x):
    """gelu_tanh, x s with s the logistic function of 2 u, and its first two derivatives."""
    u = (x + x * x * x * GELU_B) * GELU_A
    s = logistic(2 * u)
    slope = 2 * s * (1 - s)
    du = (1 + x * x * (3 * GELU_B)) * GELU_A
    ds = slope * du
    dds = slope * (2 * (1 - 2 * s) * (du * du) + x * (6 * GELU_B * GELU_A))
    return x * s, s + x * ds, 2 * ds + x * dds


@triton.jit
def gelu_tanh_bwd(g, x):
    _, d, _ = gelu_tanh_slopes(x)
    return (g * d,)


@triton.jit
def gelu_tanh_bwd_bwd(vx, g, x):
    _, d, dd = gelu_tanh_slopes(x)
    return vx * d, vx * g * dd


@triton.jit
def elu(x, alpha, scale, input_scale):
    # tl.where evaluates both sides, and expm1 of a large number would be infinite times 0.
    low = alpha * scale * libdevice.expm1(tl.where(x > 0, 0, x) * input_scale)
    return (tl.where(x > 0, x * scale, low),)


@triton.jit
def elu_bwd(g, x, alpha, scale, input_scale):
    low = g * (input_scale * (alpha * scale) * libdevice.exp(x * input_scale))
    return (tl.where(x <= 0, low, g * scale),)


@triton.jit
def leaky_relu(x, slope):
    return (tl.where(x > 0, x, x * slope),)


@triton.jit
def leaky_relu_bwd(g, x, slope):
    return (tl.where(x > 0, g, g * slope),)


@triton.jit
def prelu(x, w):
    return (tl.where(x > 0, x, w * x),)


@triton.jit
def prelu_bwd(g, x, w):
    return tl.where(x > 0, g, w * g), tl.where(x > 0, 0, x * g)


@triton.jit
def hardtanh(x, low, high):
    raised = tl.where(x < low, low, x)
    return (tl.where(raised > high, high, raised),)


@triton.jit
def hardtanh_bwd(g, x, low, high):
    return (tl.where((x <= low) | (x >= high), 0, g),)


@triton.jit
def ramp(x):
    """relu6(x + 3), NaN staying NaN."""
    y = x + 3
    return tl.where(y < 0, 0, tl.where(y > 6, 6, y))


@triton.jit
def hardsigmoid(x):
    return (m.div(ramp(x), 6),)


@triton.jit
def hardsigmoid_bwd(g, x):
    return (tl.where((x > -3) & (x < 3), m.div(g, 6), 0),)


@triton.jit
def hardswish(x):
    return (m.div(x * ramp(x), 6),)


@triton.jit
def hardswish_bwd(g, x):
    return (tl.where(x <= -3, 0, tl.where(x < 3, g * (m.div(x, 3) + 0.5), g)),)


@triton.jit
def hardshrink(x, lambd):
    return (tl.where((x >= -lambd) & (x <= lambd), 0, x),)


@triton.jit
def softshrink(x, lambd):
    # NaN stays NaN.
    inside = 0 * x
    return (tl.where(x > lambd, x - lambd, tl.where(x < -lambd, x + lambd, inside)),)


@triton.jit
def outside(g, x, lambd):
    return tl.where((x >= -lambd) & (x <= lambd), 0, g)


@triton.jit
def hardshrink_bwd(g, x, lambd):
    return (outside(g, x, lambd),)


@triton.jit
def softshrink_bwd(g, x, lambd):
    return (outside(g, x, lambd),)


@triton.jit
def threshold(x, at, value):
    return (tl.where(x <= at, value, x),)


@triton.jit
def threshold_bwd(g, x, at, value):
    return (tl.where(x <= at, 0, g),)


@triton.jit
def softsign(x):
    return (m.div(x, 1 + tl.abs(x)),)


@triton.jit
def softsign_bwd(g, x):
    # NaN at infinity, as torch's.
    d = 1 + tl.abs(x)
    return (m.div(g * (1 - m.div(tl.abs(x), d)), d),)


@triton.jit
def tanhshrink(x):
    # x - tanh(x) cancels near 0. There Lambert's fraction, tanh(x) = x / (1 + t) with
    # t = s / (3 + s / (5 + ...)) and s = x * x, of which n / d is what stands below s.
    s = tl.where(tl.abs(x) < 2, x * x, 0)
    d = tl.full(x.shape, 1, x.dtype)
    n = d * (2 * TANHSHRINK_DEPTH + 1)
    for i in tl.static_range(1, TANHSHRINK_DEPTH):
        n, d = n * (2 * (TANHSHRINK_DEPTH - i) + 1) + s * d, n
    near = m.div(x * (s * d), n + s * d)
    return (tl.where(tl.abs(x) < 2, near, x - libdevice.tanh(x)),)


@triton.jit
def tanhshrink_bwd(g, x):
    t = libdevice.tanh(x)
    return (g * (t * t),)
