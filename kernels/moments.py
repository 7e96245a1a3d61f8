"""Variance: the mean of a row and the squared distances from it, in one pass.

n, sum of (x - m) ** 2, m = sum of x / n;   together n = n1 + n2, d = m2 - m1,
m = m1 + d n2 / n, square = square1 + square2 + d ** 2 n1 n2 / n
"""

import triton
import triton.language as tl

from . import math as m
from .reduction import one


@triton.jit
def merge_moments(n1, origin1, mean1, square1, n2, origin2, mean2, square2):
    """Chan, Golub and LeVeque's, with means counted from one of the elements: neither a large
    offset nor a small variance costs digits, and equal elements have no distance."""
    n = n1 + n2
    # The approximate division: where its error matters, `distance` is small.
    weight = tl.where(n2 == 0, 0.0, n2 / n).to(mean1.dtype)
    distance = tl.where((n1 == 0) | (n2 == 0), 0.0, (origin2 - origin1) + (mean2 - mean1))
    mean = tl.where(n1 == 0, mean2, mean1 + distance * weight)
    square = square1 + square2 + distance * distance * n1 * weight
    return n, tl.where(n1 == 0, origin2, origin1), mean, square


@triton.jit
def add_moment(n1, origin1, mean1, square1, n2, origin2, mean2, square2):
    """`merge_moments` with the moments of one element, by Welford's method."""
    origin = tl.where(n1 == 0, origin2, origin1)
    n = n1 + 1
    # Approximate, as above.
    weight = 1 / n
    distance = (origin2 - origin) - mean1
    # `square2` is NaN where the element is not finite.
    square = square1 + distance * distance * (n1 * weight) + square2
    return n, origin, mean1 + distance * weight, square


@triton.jit
def moments(x):
    # The distance from itself: not 0 but NaN where x is not finite.
    return one(x), x, tl.zeros_like(x), x - x


@triton.jit
def variance(n, origin, mean, square, freedom):
    return m.div(square, freedom), origin + mean


@triton.jit
def deviation(n, origin, mean, square, freedom):
    return m.sqrt(m.div(square, freedom)), origin + mean
