"""Device functions of the elementary functions. See pointwise.py for their kernels."""

import triton
import triton.language as tl

from . import half
from . import math as m
from .math import libdevice

PI = tl.constexpr(3.141592653589793)
LN2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
LN10 = tl.constexpr(2.302585092994046)
TWO_OVER_SQRT_PI = tl.constexpr(1.1283791670955126)
ONE_OVER_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def exp(x):
    return (libdevice.exp(x),)


@triton.jit
def exp_bwd(g, out):
    return (g * out,)


@triton.jit
def log(x):
    return (libdevice.log(x),)


@triton.jit
def log_bwd(g, x):
    return (m.div(g, x),)


@triton.jit
def sqrt(x):
    return (m.sqrt(x),)


@triton.jit
def sqrt_bwd(g, out):
    return (m.div(g, 2 * out),)


@triton.jit
def sin(x):
    return (libdevice.sin(x),)


@triton.jit
def sin_bwd(g, x):
    return (g * libdevice.cos(x),)


@triton.jit
def cos(x):
    return (libdevice.cos(x),)


@triton.jit
def cos_bwd(g, x):
    return (-g * libdevice.sin(x),)


@triton.jit
def tanh(x):
    return (libdevice.tanh(x),)


@triton.jit
def tanh_bwd(g, out):
    return (g * (1 - out * out),)


@triton.jit
def tanh_bwd_bwd(vx, g, out):
    return vx * (1 - out * out), -2 * (vx * g * out)


@triton.jit
def tan(x):
    return (libdevice.tan(x),)


@triton.jit
def tan_bwd(g, out):
    return (g * (1 + out * out),)


@triton.jit
def acos(x):
    return (libdevice.acos(x),)


@triton.jit
def acos_bwd(g, x):
    return (-m.div(g, m.sqrt(1 - x * x)),)


@triton.jit
def asin(x):
    return (libdevice.asin(x),)


@triton.jit
def asin_bwd(g, x):
    return (m.div(g, m.sqrt(1 - x * x)),)


@triton.jit
def atan(x, HALF: tl.constexpr = False):
    return (m.atan(x, HALF),)


@triton.jit
def atan_bwd(g, x):
    return (m.div(g, x * x + 1),)


@triton.jit
def atan2(x, y, HALF: tl.constexpr = False):
    return (m.atan2(x, y, HALF),)


@triton.jit
def atan2_bwd(g, x, y):
    square = x * x + y * y
    scale = tl.where(square == 0, 0, m.inverse(square))
    return g * y * scale, g * -x * scale


@triton.jit
def sinh(x, HALF: tl.constexpr = False):
    return (m.sinh(x, HALF),)


@triton.jit
def sinh_bwd(g, x):
    return (g * libdevice.cosh(x),)


@triton.jit
def cosh(x):
    return (libdevice.cosh(x),)


@triton.jit
def cosh_bwd(g, x):
    return (g * libdevice.sinh(x),)


@triton.jit
def acosh(x, HALF: tl.constexpr = False):
    return (m.acosh(x, HALF),)


@triton.jit
def acosh_bwd(g, x):
    return (m.div(g, m.sqrt(x * x - 1)),)


@triton.jit
def asinh(x, HALF: tl.constexpr = False):
    return (m.asinh(x, HALF),)


@triton.jit
def asinh_bwd(g, x):
    return (m.div(g, m.sqrt(x * x + 1)),)


@triton.jit
def atanh(x, HALF: tl.constexpr = False):
    return (m.atanh(x, HALF),)


@triton.jit
def atanh_bwd(g, x):
    return (m.div(g, 1 - x * x),)


@triton.jit
def sine_of_half_turns(r):
    """sin(pi r) in float32, |r| <= 1/2: r times pi and a polynomial of r^2, to 2e-10 of itself."""
    t = r * r
    p = -0.5992588400840759 + t * (0.08208292722702026 - t * 0.0070829144679009914)
    return r * (PI + t * (-5.167712688446045 + t * (2.550163745880127 + t * p)))


@triton.jit
def half_turns(x):
    """``(r, sign)`` with sin(pi x) = sign sin(pi r), |r| <= 1/2, exactly. The library's sine takes
    any angle; of those that it has a slow path for, registers are spilled."""
    n = libdevice.rint(x)
    odd = n - 2 * libdevice.rint(n * 0.5)
    return x - n, 1 - 2 * tl.abs(odd)


@triton.jit
def sinc(x):
    z = x * PI
    if x.dtype == tl.float32:
        r, sign = half_turns(x)
        sine = sign * sine_of_half_turns(r)
    else:
        sine = libdevice.sin(z)
    return (tl.where(z == 0, 1, m.div(sine, z)),)


@triton.jit
def sinc_bwd(g, x):
    z = x * PI
    if x.dtype == tl.float32:
        r, sign = half_turns(x)
        cosine = sign * sine_of_half_turns(0.5 - tl.abs(r))
        # Near 0 the two cancel: a polynomial, to 1e-9 of the slope.
        t = tl.where(tl.abs(x) < 0.5, x * x, 0)
        p = -1.1444889307022095 + t * (0.208939790725708 - t * 0.022359108552336693)
        near = x * (-3.289868116378784 + t * (3.246968984603882 + t * p))
        far = m.div(cosine - m.div(sign * sine_of_half_turns(r), z), x)
        slope = tl.where(tl.abs(x) < 0.5, near, far)
    else:
        slope = m.div(z * libdevice.cos(z) - libdevice.sin(z), x * x * PI)
    return (tl.where(x * x * PI == 0, 0, g * slope),)


@triton.jit
def hypot(x, y):
    return (libdevice.hypot(x, y),)


@triton.jit
def hypot_bwd(g, x, y, out):
    return m.div(g * x, out), m.div(g * y, out)


@triton.jit
def rsqrt(x):
    return (libdevice.rsqrt(x),)


@triton.jit
def rsqrt_bwd(g, out):
    return (-0.5 * g * (out * out * out),)


@triton.jit
def exp2(x):
    return (libdevice.exp2(x),)


@triton.jit
def exp2_bwd(g, out):
    return (g * out * LN2,)


@triton.jit
def expm1(x, HALF: tl.constexpr = False):
    return (m.expm1(x, HALF),)


@triton.jit
def expm1_bwd(g, out):
    return (g * (out + 1),)


@triton.jit
def log2(x):
    return (libdevice.log2(x),)


@triton.jit
def log2_bwd(g, x):
    return (m.div(g, x * LN2),)


@triton.jit
def log10(x):
    return (libdevice.log10(x),)


@triton.jit
def log10_bwd(g, x):
    return (m.div(g, x * LN10),)


@triton.jit
def log1p(x):
    return (libdevice.log1p(x),)


@triton.jit
def log1p_bwd(g, x):
    return (m.div(g, x + 1),)


@triton.jit
def logaddexp(x, y, HALF: tl.constexpr = False):
    # Of two equal infinities the difference is NaN.
    down = tl.where(x == y, 0, -tl.abs(x - y))
    return (tl.where(x > y, x, y) + m.log1p_exp(down, HALF),)


@triton.jit
def logaddexp_bwd(g, x, y):
    return m.div(g, 1 + libdevice.exp(y - x)), m.div(g, 1 + libdevice.exp(x - y))


@triton.jit
def logaddexp2(x, y, HALF: tl.constexpr = False):
    down = tl.where(x == y, 0, -tl.abs(x - y))
    if HALF:
        added = m.log1p_exp(down * LN2, HALF)
    else:
        added = libdevice.log1p(libdevice.exp2(down))
    return (tl.where(x > y, x, y) + added * LOG2_E,)


@triton.jit
def logaddexp2_bwd(g, x, y):
    return m.div(g, 1 + libdevice.exp2(y - x)), m.div(g, 1 + libdevice.exp2(x - y))


@triton.jit
def xlogy(x, y):
    return (tl.where((x == 0) & (y == y), 0, x * libdevice.log(y)),)


@triton.jit
def xlogy_bwd(g, x, y):
    dx = tl.where((g == 0) & (y == y), 0, g * libdevice.log(y))
    return tl.where((x == 0) & (y <= 0), 0, dx), m.div(g * x, y)


@triton.jit
def xlog1py(x, y):
    return (tl.where((x == 0) & (y == y), 0, x * libdevice.log1p(y)),)


@triton.jit
def xlog1py_bwd(g, x, y):
    dx = tl.where((g == 0) & (y == y), 0, g * libdevice.log1p(y))
    return tl.where((x == 0) & (y <= -1), 0, dx), m.div(g * x, y + 1)


@triton.jit
def entr(x, HALF: tl.constexpr = False):
    # Below 0 it is -inf, not log's NaN.
    return (tl.where(x < 0, float("-inf"), tl.where(x == 0, 0, -x * m.log(x, HALF))),)


@triton.jit
def entr_bwd(g, x):
    return (g * -(1 + libdevice.log(x)),)


@triton.jit
def logit(x, eps, HALF: tl.constexpr = False):
    # A negative eps stands for none.
    low = tl.where(eps < 0, float("-inf"), eps)
    x = tl.where(x < low, low, tl.where(x > 1 - low, 1 - low, x))
    if HALF:
        return (half.logit(x),)
    else:
        # Near 1/2 the odds are near 1, where log loses what they were rounded by; 2 x - 1 is exact.
        middle = tl.abs(x - 0.5) < 0.2
        odds = m.div(tl.where(middle, 2 * x - 1, x), 1 - x)
        return (tl.where(middle, libdevice.log1p(odds), libdevice.log(odds)),)


@triton.jit
def logit_bwd(g, x, eps):
    slope = m.div(g, x * (1 - x))
    bare = tl.where((x < 0) | (x > 1), float("nan"), slope)
    clamped = tl.where((x >= eps) & (x <= 1 - eps), slope, 0)
    return (tl.where(eps < 0, bare, clamped),)


@triton.jit
def erf(x, HALF: tl.constexpr = False):
    return (m.erf(x, HALF),)


@triton.jit
def erf_bwd(g, x):
    return (libdevice.exp(-(x * x)) * TWO_OVER_SQRT_PI * g,)


@triton.jit
def erfc(x, HALF: tl.constexpr = False):
    return (m.erfc(x, HALF),)


@triton.jit
def erfc_bwd(g, x):
    return (-libdevice.exp(-(x * x)) * TWO_OVER_SQRT_PI * g,)


@triton.jit
def ndtr(x, HALF: tl.constexpr = False):
    # 1 + erf would cancel in the lower tail.
    cumulated, _ = m.normal(x, HALF)
    return (cumulated,)


@triton.jit
def ndtr_bwd(g, x):
    return (libdevice.exp(-0.5 * (x * x)) * ONE_OVER_SQRT_2PI * g,)
