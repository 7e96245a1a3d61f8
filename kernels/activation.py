"""Device functions of neural networks' activations. See pointwise.py for their kernels."""

import triton
import triton.language as tl

from . import half
from . import math as m
from .math import libdevice

# gelu's approximation: u = A (x + B x^3).
GELU_A = tl.constexpr(0.7978845608028654)
GELU_B = tl.constexpr(0.044715)
# Levels of the fraction that give tanhshrink in float64 up to 2.
TANHSHRINK_DEPTH = tl.constexpr(11)


@triton.jit
def logistic(x, HALF: tl.constexpr = False):
    # exp of a non-positive number only: it never overflows.
    e = m.exp_down(-tl.abs(x), HALF)
    return m.ratio(tl.where(x < 0, e, 1), 1 + e, HALF)


@triton.jit
def sigmoid(x, HALF: tl.constexpr = False):
    return (logistic(x, HALF),)


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
def logsigmoid(x, HALF: tl.constexpr = False):
    return (tl.where(x < 0, x, 0) - m.log1p_exp(-tl.abs(x), HALF),)


@triton.jit
def logsigmoid_bwd(g, x, HALF: tl.constexpr = False):
    return (g * logistic(-x, HALF),)


@triton.jit
def softplus(x, beta, threshold, HALF: tl.constexpr = False):
    z = x * beta
    if HALF:
        # The inverse is taken once for all elements.
        y = (tl.where(z < 0, 0, z) + m.log1p_exp(-tl.abs(z), HALF)) * m.inverse(beta)
    else:
        y = m.div(libdevice.log1p(libdevice.exp(z)), beta)
    return (tl.where(z > threshold, x, y),)


@triton.jit
def softplus_bwd(g, x, beta, threshold, HALF: tl.constexpr = False):
    z = x * beta
    return (tl.where(z > threshold, g, g * logistic(z, HALF)),)


@triton.jit
def silu(x, HALF: tl.constexpr = False):
    return (x * logistic(x, HALF),)


@triton.jit
def silu_slopes(x, HALF: tl.constexpr = False):
    """silu and its first two derivatives."""
    s = logistic(x, HALF)
    ds = s * (1 - s)
    return x * s, s * (1 + x * (1 - s)), ds * (2 + x * (1 - 2 * s))


@triton.jit
def silu_bwd(g, x, HALF: tl.constexpr = False):
    _, d, _ = silu_slopes(x, HALF)
    return (g * d,)


@triton.jit
def silu_bwd_bwd(vx, g, x, HALF: tl.constexpr = False):
    _, d, dd = silu_slopes(x, HALF)
    return vx * d, vx * g * dd


@triton.jit
def tanh_softplus(x, HALF: tl.constexpr = False):
    """tanh(log(1 + exp(x))) = n / (n + 2) with n = exp(x) (exp(x) + 2)."""
    e = m.exp_down(tl.where(x > 20, 20, x), HALF)
    n = e * (e + 2)
    # To an ulp, the ratio need not reach 1, which is what it is from there on.
    return tl.where(x > 20, 1, m.ratio(n, n + 2, HALF))


@triton.jit
def mish(x, HALF: tl.constexpr = False):
    return (x * tanh_softplus(x, HALF),)


@triton.jit
def mish_bwd(g, x, HALF: tl.constexpr = False):
    t = tanh_softplus(x, HALF)
    return (g * (t + x * logistic(x, HALF) * (1 - t * t)),)


@triton.jit
def gelu(x, HALF: tl.constexpr = False):
    cumulated, _ = m.normal(x, HALF)
    return (x * cumulated,)


@triton.jit
def gelu_slopes(x, HALF: tl.constexpr = False):
    """gelu and its first two derivatives; that of its density p is -x p."""
    cumulated, density = m.normal(x, HALF)
    return x * cumulated, cumulated + x * density, density * (2 - x * x)


@triton.jit
def gelu_bwd(g, x, HALF: tl.constexpr = False):
    _, d, _ = gelu_slopes(x, HALF)
    return (g * d,)


@triton.jit
def gelu_bwd_bwd(vx, g, x, HALF: tl.constexpr = False):
    _, d, dd = gelu_slopes(x, HALF)
    return vx * d, vx * g * dd


@triton.jit
def gelu_tanh(x, HALF: tl.constexpr = False):
    # 1 + tanh(u) = 2 / (1 + exp(-2 u)), without the cancellation.
    u = (x + x * x * x * GELU_B) * GELU_A
    return (x * logistic(2 * u, HALF),)


@triton.jit
def gelu_tanh_slopes(x, HALF: tl.constexpr = False):
    """gelu_tanh, x s with s the logistic function of 2 u, and its first two derivatives."""
    u = (x + x * x * x * GELU_B) * GELU_A
    s = logistic(2 * u, HALF)
    slope = 2 * s * (1 - s)
    du = (1 + x * x * (3 * GELU_B)) * GELU_A
    ds = slope * du
    dds = slope * (2 * (1 - 2 * s) * (du * du) + x * (6 * GELU_B * GELU_A))
    return x * s, s + x * ds, 2 * ds + x * dds


@triton.jit
def gelu_tanh_bwd(g, x, HALF: tl.constexpr = False):
    _, d, _ = gelu_tanh_slopes(x, HALF)
    return (g * d,)


@triton.jit
def gelu_tanh_bwd_bwd(vx, g, x, HALF: tl.constexpr = False):
    _, d, dd = gelu_tanh_slopes(x, HALF)
    return vx * d, vx * g * dd


@triton.jit
def elu(x, alpha, scale, input_scale, HALF: tl.constexpr = False):
    # tl.where evaluates both sides, and expm1 of a large number would be infinite times 0.
    low = alpha * scale * m.expm1(tl.where(x > 0, 0, x) * input_scale, HALF)
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
    return (m.divided(ramp(x), 6),)


@triton.jit
def hardsigmoid_bwd(g, x):
    return (tl.where((x > -3) & (x < 3), m.divided(g, 6), 0),)


@triton.jit
def hardswish(x):
    return (m.divided(x * ramp(x), 6),)


@triton.jit
def hardswish_bwd(g, x):
    return (tl.where(x <= -3, 0, tl.where(x < 3, g * (m.divided(x, 3) + 0.5), g)),)


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
def tanhshrink(x, HALF: tl.constexpr = False):
    if HALF:
        return (half.tanhshrink(x),)
    else:
        return (tanhshrink_by_fraction(x),)


@triton.jit
def tanhshrink_by_fraction(x):
    # x - tanh(x) cancels near 0. There Lambert's fraction, tanh(x) = x / (1 + t) with
    # t = s / (3 + s / (5 + ...)) and s = x * x, of which n / d is what stands below s.
    s = tl.where(tl.abs(x) < 2, x * x, 0)
    d = tl.full(x.shape, 1, x.dtype)
    n = d * (2 * TANHSHRINK_DEPTH + 1)
    for i in tl.static_range(1, TANHSHRINK_DEPTH):
        n, d = n * (2 * (TANHSHRINK_DEPTH - i) + 1) + s * d, n
    near = m.div(x * (s * d), n + s * d)
    return tl.where(tl.abs(x) < 2, near, x - libdevice.tanh(x))


@triton.jit
def tanhshrink_bwd(g, x):
    t = libdevice.tanh(x)
    return (g * (t * t),)
