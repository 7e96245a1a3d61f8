"""Extrema with their indices: of equals the first, and NaN before everything.

(x, i) . (y, j) = (x, i) if x > y, or x == y and i < j, else (y, j)
"""

import triton
import triton.language as tl

from . import math as m


@triton.jit
def first_maximum(x, i, y, j):
    """The larger with its index; NaN is the largest, of equals the first."""
    same = (x == y) | (m.is_nan(x) & m.is_nan(y))
    first = (x > y) | (m.is_nan(x) & (y == y)) | (same & (i < j))
    return tl.where(first, x, y), tl.where(first, i, j)


@triton.jit
def next_maximum(x, i, y, j):
    """`first_maximum` of an element that comes after the others; `i` is the identity's at first."""
    later = ((y > x) | (y != y)) & (x == x) | (i > j)
    return tl.where(later, y, x), tl.where(later, j, i)


@triton.jit
def first_minimum(x, i, y, j):
    same = (x == y) | (m.is_nan(x) & m.is_nan(y))
    first = (x < y) | (m.is_nan(x) & (y == y)) | (same & (i < j))
    return tl.where(first, x, y), tl.where(first, i, j)


@triton.jit
def next_minimum(x, i, y, j):
    later = ((y < x) | (y != y)) & (x == x) | (i > j)
    return tl.where(later, y, x), tl.where(later, j, i)


@triton.jit
def indexed(x, index):
    return x, tl.broadcast_to(index, x.shape)


# Bytes of a tile of `place`: four 16-byte stores for each of 128 threads.
TILE_BYTES = 8192


@triton.jit
def place(
    out, g, index, before, length, after,
    WIDE: tl.constexpr,
    BLOCK_BEFORE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_AFTER: tl.constexpr,
):  # fmt: skip
    """out[a, i, b] = g[a, b] where i is index[a, b], else 0; all are dense."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    tiles_after, tiles = tl.cdiv(after, BLOCK_AFTER), tl.cdiv(length, BLOCK)
    b = (program % tiles_after) * BLOCK_AFTER + tl.arange(0, BLOCK_AFTER)
    program = program // tiles_after
    i = (program % tiles) * BLOCK + tl.arange(0, BLOCK)
    a = (program // tiles) * BLOCK_BEFORE + tl.arange(0, BLOCK_BEFORE)
    a, i, b = a[:, None, None], i[None, :, None], b[None, None, :]
    mask = (a < before) & (b < after)
    chosen = tl.load(index + (a * after + b), mask=mask, other=-1)
    value = tl.load(g + (a * after + b), mask=mask, other=0)
    found = tl.where(chosen == i, value.to(out.dtype.element_ty), 0)
    tl.store(out + (a * length * after + i * after + b), found, mask=mask & (i < length))
