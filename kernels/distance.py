"""Two rows: the norm of their difference, and the angle between them.

distance = |x - y + eps|_p            cosine = x . y / (|x| |y|)
"""

import triton

from . import math as m
from .reduction import absolute, absolute_power, angle, at_least, nonzero, square

# MAP: that of a norm, of a difference that is shifted by a little as torch shifts it.


@triton.jit
def difference_nonzero(x, y, eps):
    return nonzero(x - y + eps)


@triton.jit
def difference_absolute(x, y, eps):
    return absolute(x - y + eps)


@triton.jit
def difference_square(x, y, eps):
    return square(x - y + eps)


@triton.jit
def difference_power(x, y, p, eps):
    return absolute_power(x - y + eps, p)


@triton.jit
def products(x, y):
    """What an angle is made of; of an infinity the square is NaN, so that it is no overflow."""
    return x * x + (x - x), y * y + (y - y), x * y


@triton.jit
def cosine(xx, yy, xy, eps):
    """The cosine of an angle, and the two norms."""
    x, y = m.sqrt(xx), m.sqrt(yy)
    return angle(xy, at_least(x, eps), at_least(y, eps)), x, y
