"""Random numbers that can be computed again: Philox4x32 (Salmon et al., SC 2011).

A counter and a seed, which is the key, give four words; nothing is carried from one counter to the
next. Of seven rounds, the fewest that pass BigCrush there: at ten, a mask of a half precision
tensor takes longer to compute than the tensor takes to move.

Element i of a tensor has word (i / LANES) % 4 of the counter that the elements LANES before and
after it share. So a program that has 4 LANES elements in a row computes each counter once, and each
thread finds the words of its own elements, contiguous ones, in its own registers.
"""

import triton
import triton.language as tl

LANES = tl.constexpr(512)
ROUNDS = tl.constexpr(7)


@triton.jit
def words(seed, counter):
    """The four words of each counter."""
    low = counter.to(tl.uint32)
    zero = tl.zeros_like(low)
    if counter.dtype.primitive_bitwidth > 32:
        return tl.philox(seed, low, (counter >> 32).to(tl.uint32), zero, zero, ROUNDS)
    else:
        return tl.philox(seed, low, zero, zero, zero, ROUNDS)


@triton.jit
def kept(word, limit):
    """Whether a number, uniform among those of 32 bits, is at most ``limit``."""
    return word.to(tl.int32, bitcast=True) <= limit


@triton.jit
def keep(seed, index, limit):
    """The mask of the elements ``index``, one by one; see ``limit`` of ``launchers/philox.py``."""
    a, b, c, d = words(seed, index // (4 * LANES) * LANES + index % LANES)
    number = index // LANES % 4
    word = tl.where(number < 2, tl.where(number == 0, a, b), tl.where(number == 2, c, d))
    return kept(word, limit)
