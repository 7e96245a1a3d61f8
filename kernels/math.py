"""Elementary functions: the one place that decides which implementation a kernel calls.

Most are the library's, which kernels name themselves (library.py). Where a device function takes
``HALF``, it is true for operands and results in half precision: of those a function need not be
more exact than they are, and half.py has shorter ones. In float32 and float64 nothing changes.
"""

import triton
import triton.language as tl

from . import half
from .library import div as div
from .library import fma, libdevice
from .library import sqrt as sqrt

SQRT_HALF = tl.constexpr(0.7071067811865476)
ONE_OVER_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def is_nan(x):
    return x != x


@triton.jit
def inverse(x):
    return div(tl.full(x.shape, 1, x.dtype), x)


@triton.jit
def sign(x):
    # NaN compares false with everything: its sign is 0, as torch's is.
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0)).to(x.dtype)


@triton.jit
def divided(x, BY: tl.constexpr):
    """x / BY for 3 or 6, correctly rounded, as ``div`` is, whose slow path is a call for each
    element. The quotient by a rounded reciprocal is off by less than an ulp, and what it leaves
    of x is exact. Of 0 and infinities, where nothing is left or NaN, it keeps the sign."""
    if x.dtype == tl.float32:
        quotient = x * (1 / BY)
        left = fma(quotient, tl.full(x.shape, -BY, x.dtype), x)
        # Of subnormal numbers, what is added can be half of their last place: scaled, the product
        # is rounded to that, and the sum to even.
        added = left * (2.0**24 / BY)
        nearest = fma(added, tl.full(x.shape, 2.0**-24, x.dtype), quotient)
        return tl.where(tl.abs(left) > 0, nearest, quotient)
    else:
        return div(x, tl.full(x.shape, BY, x.dtype))


@triton.jit
def exp_down(x, HALF: tl.constexpr = False):
    """exp of a number up to 80."""
    return half.exp_down(x) if HALF else libdevice.exp(x)


@triton.jit
def expm1(x, HALF: tl.constexpr = False):
    return half.expm1(x) if HALF else libdevice.expm1(x)


@triton.jit
def ratio(x, y, HALF: tl.constexpr = False):
    """x / y for y from 2**-126 to 2**126."""
    return x * half.inverse(y) if HALF else div(x, y)


@triton.jit
def log1p_exp(x, HALF: tl.constexpr = False):
    """log(1 + exp(x)) of a number that is not positive."""
    return half.log1p_exp(x) if HALF else libdevice.log1p(libdevice.exp(x))


@triton.jit
def log(x, HALF: tl.constexpr = False):
    return half.log(x) if HALF else libdevice.log(x)


@triton.jit
def pow(x, y, HALF: tl.constexpr = False):
    return half.pow(x, y) if HALF else libdevice.pow(x, y)


@triton.jit
def normal(x, HALF: tl.constexpr = False):
    """The normal distribution, cumulated, and its density."""
    if HALF:
        return half.normal(x)
    else:
        density = libdevice.exp(-0.5 * (x * x)) * ONE_OVER_SQRT_2PI
        return 0.5 * libdevice.erfc(-x * SQRT_HALF), density


@triton.jit
def erf(x, HALF: tl.constexpr = False):
    return half.erf(x) if HALF else libdevice.erf(x)


@triton.jit
def erfc(x, HALF: tl.constexpr = False):
    return half.erfc(x) if HALF else libdevice.erfc(x)


@triton.jit
def atan(x, HALF: tl.constexpr = False):
    return half.atan(x) if HALF else libdevice.atan(x)


@triton.jit
def atan2(y, x, HALF: tl.constexpr = False):
    return half.atan2(y, x) if HALF else libdevice.atan2(y, x)


@triton.jit
def sinh(x, HALF: tl.constexpr = False):
    return half.sinh(x) if HALF else libdevice.sinh(x)


@triton.jit
def asinh(x, HALF: tl.constexpr = False):
    return half.asinh(x) if HALF else libdevice.asinh(x)


@triton.jit
def acosh(x, HALF: tl.constexpr = False):
    return half.acosh(x) if HALF else libdevice.acosh(x)


@triton.jit
def atanh(x, HALF: tl.constexpr = False):
    return half.atanh(x) if HALF else libdevice.atanh(x)
