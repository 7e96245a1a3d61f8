"""Elementary functions of numbers in half precision, whose results will be in half precision.

They compute in float32 with relative errors below 3e-6, where half of float16's last place is
2.4e-4, and bfloat16's 2e-3: of a hundred results not one is rounded to its other neighbour. The
library's, to an ulp of float32, are two to four times as long, and longer than the memory takes.

Each is one or two of the hardware's approximations, and where these lose digits a polynomial p that
minimises max |p - f| / |f| for the function f over an interval (reweighted least squares, in 40
digits). The approximations flush what is subnormal: results that can be are scaled afterwards, by a
power of 2. So an exponential is 0 only below 2**-134; a product with one (silu, mish, gradients of
gelu) then is 0 where in bfloat16 it is less than 2**-126, and subnormal. math.py decides who calls
these; tests/test_accuracy.py has all numbers of both dtypes.
"""

import triton
import triton.language as tl

from .library import libdevice

LN2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
HALF_PI = tl.constexpr(1.5707963267948966)
ONE_OVER_SQRT_2PI = tl.constexpr(0.3989422804014327)
SQRT_2 = tl.constexpr(1.4142135623730951)
# bfloat16 has its least number at 2**-133, and what is normal begins at 2**-126.
UP, DOWN = tl.constexpr(256.0), tl.constexpr(1 / 256.0)
LEAST = tl.constexpr(2.0**-133)
# Bits of float32: those of sqrt(1/2), and all but those of the fraction.
BITS_OF_SQRT_HALF = tl.constexpr(0x3F3504F3)
EXPONENT = tl.constexpr(-(2**23))


@triton.jit
def inverse(x):
    """Of a number from 2**-126 to 2**126."""
    return libdevice.fast_dividef(tl.full(x.shape, 1, x.dtype), x)


@triton.jit
def like(x, size):
    """The number of that size, not negative, with the sign of x."""
    bits = size.to(tl.int32, bitcast=True) | (x.to(tl.int32, bitcast=True) & -(2**31))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def exp_down(x):
    """exp of a number up to 80."""
    return tl.exp2(x * LOG2_E + 8) * DOWN


@triton.jit
def expm1(x):
    # Up to 1/4: x p(x), to 9e-8.
    p = 0.499998309 + x * (0.166667393 + x * (0.0417751505 + x * 0.00833332835))
    return tl.where(tl.abs(x) < 0.25, x * (0.999999992 + x * p), tl.exp2(x * LOG2_E) - 1)


@triton.jit
def log1p_exp(x):
    """log(1 + exp(x)) of a number that is not positive: e p(e), to 3e-8."""
    e = exp_down(x)
    p = 0.0782254939 + e * (-0.0295049575 + e * 0.00523262408)
    p = -0.248429775 + e * (0.191059885 + e * (-0.136632071 + e * p))
    return e * (0.99999997 + e * (-0.499994931 + e * (0.333190962 + e * p)))


@triton.jit
def log2(x):
    """An approximation to 2**-22 that flushes what is subnormal. AMD's library has none of that
    name, and one that is as short."""
    if hasattr(libdevice, "fast_log2f"):
        return libdevice.fast_log2f(x)
    else:
        return libdevice.log2(x)


@triton.jit
def log(x):
    # Within 1/4 of 1: f p(f), f = x - 1, to 1.4e-7.
    f = x - 1
    small = x < 2.0**-126
    p = -0.249533555 + f * (0.19942393 + f * (-0.18127258 + f * 0.157573249))
    p = 0.999999987 + f * (-0.500003684 + f * (0.333340379 + f * p))
    far = log2(tl.where(small, x * UP, x)) * LN2 - tl.where(small, 8 * LN2, 0.0)
    return tl.where(tl.abs(f) < 0.25, f * p, far)


@triton.jit
def odd_log(u, above, below):
    """log(above / below) of two whose quotient is (1 + u) / (1 - u), which is 2 atanh(u): up to
    |u| = 0.4 u p(u u), to 3e-8."""
    s = u * u
    p = 0.400835075 + s * (0.271669859 + s * 0.315051209)
    near = u * (2.00000006 + s * (0.66664954 + s * p))
    far = log2(libdevice.fast_dividef(above * UP, below)) * LN2 - 8 * LN2
    return tl.where(tl.abs(u) < 0.4, near, far)


@triton.jit
def logit(x):
    return odd_log(2 * x - 1, x, 1 - x)


@triton.jit
def atanh(x):
    return 0.5 * odd_log(x, 1 + x, 1 - x)


@triton.jit
def upper_tail(size, e, SLOPE: tl.constexpr):
    """Of the normal distribution above ``size``, not negative, in units of 0.2316419 / SLOPE: e, of
    which exp(-size**2 / 2) is the 256th part, times t p(t), t = 1 / (1 + SLOPE size), to 1.3e-7."""
    t = inverse(1 + size * SLOPE)
    p = 0.2263126 + t * (-0.202761049 + t * (0.248302083 + t * -0.0705673049))
    p = 0.0925245965 + t * (0.0903871153 + t * (0.102841285 + t * (0.0129607349 + t * p)))
    return e * (t * p * DOWN)


@triton.jit
def normal(x):
    """The normal distribution, cumulated, and its density."""
    e = tl.exp2(x * x * (-0.5 * LOG2_E) + 8)
    tail = upper_tail(tl.abs(x), e, 0.2316419)
    return tl.where(x < 0, tail, 1 - tail), e * (ONE_OVER_SQRT_2PI * DOWN)


@triton.jit
def erfc(x):
    tail = upper_tail(tl.abs(x), tl.exp2(x * x * -LOG2_E + 8), 0.2316419 * SQRT_2)
    return tl.where(x < 0, 2 - 2 * tail, 2 * tail)


@triton.jit
def erf(x):
    # Up to 1/2: x p(x x), to 1.4e-7.
    s = x * x
    p = -0.37610734 + s * (0.112456285 + s * -0.0243892915)
    tail = upper_tail(tl.abs(x), tl.exp2(s * -LOG2_E + 8), 0.2316419 * SQRT_2)
    return tl.where(s < 0.25, x * (1.12837902 + s * p), like(x, 1 - 2 * tail))


@triton.jit
def arc(t):
    """atan of a number up to 1: t p(t t), to 2e-8."""
    s = t * t
    p = 0.0426912752 + s * (-0.0160684785 + s * 0.00284985193)
    p = -0.14203642 + s * (0.106409244 + s * (-0.0750427394 + s * p))
    return t * (0.999999985 + s * (-0.333330733 + s * (0.199926191 + s * p)))


@triton.jit
def atan(x):
    far = tl.abs(x) > 1
    near = arc(tl.where(far, inverse(x), x))
    return tl.where(far, like(x, tl.full(x.shape, HALF_PI, x.dtype)) - near, near)


@triton.jit
def atan2(y, x):
    height, width = tl.abs(y), tl.abs(x)
    steep = height > width
    low, high = tl.where(steep, width, height), tl.where(steep, height, width)
    # Of two zeros 0, of two infinities 1.
    angle = arc(tl.where(low == float("inf"), 1, low / tl.where(high == 0, LEAST, high)))
    angle = tl.where(steep, HALF_PI - angle, angle)
    angle = tl.where(x.to(tl.int32, bitcast=True) < 0, 2 * HALF_PI - angle, angle)
    return like(y, tl.where((x != x) | (y != y), float("nan"), angle))


@triton.jit
def sinh(x):
    # Up to 1: x p(x x), to 2e-8.
    s = x * x
    near = x * (0.99999998 + s * (0.166667338 + s * (0.00832991216 + s * 0.000203939738)))
    scaled = tl.abs(x) * LOG2_E
    far = like(x, tl.exp2(scaled - 1) - tl.exp2(-1 - scaled))
    return tl.where(s < 1, near, far)


@triton.jit
def asinh(x):
    # Up to 1/2: x p(x x), to 3e-8; beyond, log(|x| + sqrt(x x + 1)), of half of that sum.
    size, s = tl.abs(x), x * x
    p = 0.0748257694 + s * (-0.042580765 + s * 0.0199085785)
    near = x * (0.999999974 + s * (-0.166661415 + s * p))
    sum_of_two = tl.where(size < 2.0**30, 0.5 * size + 0.5 * tl.sqrt(s + 1), size)
    return tl.where(size < 0.5, near, like(x, log2(sum_of_two) * LN2 + LN2))


@triton.jit
def acosh(x):
    # Up to 3/2: sqrt(t) p(t), t = x - 1, to 3e-8; beyond as asinh.
    t = x - 1
    p = -0.117847417 + t * (0.0264549038 + t * (-0.00752728524 + t * 0.00175968485))
    near = tl.sqrt(t) * (1.41421353 + t * p)
    far = tl.where(x < 2.0**30, 0.5 * x + 0.5 * tl.sqrt(x * x - 1), x)
    return tl.where(t < 0.5, near, log2(far) * LN2 + LN2)


@triton.jit
def tanhshrink(x):
    # Up to 1: x s p(s), s = x x, to 7e-8; beyond, |x| - 1 + 2 e / (1 + e), e = exp(-2 |x|).
    size, s = tl.abs(x), x * x
    p = -0.0216602743 + s * (0.00821922508 + s * (-0.00251072644 + s * 0.000420783884))
    near = x * (s * (0.333333313 + s * (-0.133331288 + s * (0.0539348266 + s * p))))
    e = tl.exp2(size * (-2 * LOG2_E))
    return tl.where(size < 1, near, like(x, size - 1 + 2 * e * inverse(1 + e)))


@triton.jit
def log2_of_size(x):
    """log2(|x|) to a relative error of 2e-7: with m from sqrt(1/2) to sqrt(2) and k an integer,
    |x| = 2**k m, f = m - 1, it is k + f p(f), p to 5e-9."""
    size = tl.abs(x)
    small = size < 2.0**-126
    bits = tl.where(small, size * UP, size).to(tl.int32, bitcast=True)
    k = (bits - BITS_OF_SQRT_HALF) & EXPONENT
    f = (bits - k).to(tl.float32, bitcast=True) - 1
    p = 0.204600771 + f * (-0.191062975 + f * (0.186174142 + f * -0.109948058))
    p = -0.36069665 + f * (0.2885674 + f * (-0.239617394 + f * p))
    p = -0.721347352 + f * (0.480898241 + f * p)
    exponent = k.to(tl.float32) * 2.0**-23 + tl.where(small, -8.0, 0.0)
    found = tl.where(size == 0, float("-inf"), exponent + f * (1.44269504 + f * p))
    return tl.where(size < float("inf"), found, size)


@triton.jit
def pow(x, y):
    exponent = log2_of_size(x)
    # Of 1 and for 0 it is 1, even where the other is NaN. The square of half the exponent's, so
    # that results may be subnormal.
    root = tl.exp2(tl.where((exponent == 0) | (y == 0), 0.0, exponent * (0.5 * y)))
    size = root * root
    whole = tl.floor(y)
    odd = (whole == y) & (2 * tl.floor(0.5 * y) != y)
    below = x < 0
    size = tl.where(below & (x > float("-inf")) & (whole != y), float("nan"), size)
    return tl.where(odd & (x.to(tl.int32, bitcast=True) < 0), -size, size)
