"""Dropout: y[i] = x[i] * m[i] s, and dx[i] = g[i] * m[i] s, where m[i] is 1 if i is kept, else 0.

Alpha dropout puts a number in place of what it drops and adds another to what it keeps, so that
mean and variance stay. The mask is a function of a seed and of the number of i (``philox.py``),
which elements share that are dropped together; it is never in memory.
"""

import triton
import triton.language as tl

from .philox import LANES, keep, kept, words
from .pointwise import numbers
from .reduction import locate

# Of the kernel that walks strides: 16 elements a thread would need 64 registers for the words.
TILE = 1024
DENSE_WARPS = 2


@triton.jit
def scaled(x, mask, constants, COMPUTE: tl.constexpr):
    """A product also where nothing is kept, as torch's: what is not finite becomes NaN."""
    values = numbers(constants, COMPUTE)
    x = x.to(COMPUTE)
    y = x * tl.where(mask, values[0], 0.0).to(COMPUTE)
    if len(values) > 1:
        y = y + tl.where(mask, values[1], values[2])
    return y


@triton.jit
def dropout_dense(
    y_ptr, x_ptr, seed_ptr, constants, limit, n, COMPUTE: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Of tensors whose elements lie in memory in the order in which they are numbered."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    lane = tl.arange(0, LANES)
    seed = tl.load(seed_ptr)
    drawn = words(seed, program * LANES + lane)
    start = program * (4 * LANES)
    # A mask whose bound is not a multiple of 16 would cost all the vector accesses.
    if start + 4 * LANES <= n:
        for i in tl.static_range(4):
            offset = start + i * LANES + lane
            y = scaled(tl.load(x_ptr + offset), kept(drawn[i], limit), constants, COMPUTE)
            tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty))
    else:
        for i in tl.static_range(4):
            offset = start + i * LANES + lane
            x = tl.load(x_ptr + offset, mask=offset < n)
            y = scaled(x, kept(drawn[i], limit), constants, COMPUTE)
            tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=offset < n)


@triton.jit
def dropout_strided(
    y_ptr, x_ptr, seed_ptr, constants, limit, shape, strides, rows, columns,
    COMPUTE: tl.constexpr, WIDE: tl.constexpr, ROW_AT_ONCE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """`shape` holds the outer dimensions, innermost first. `strides` are those of y, of x, of the
    elements' numbers and of the seeds, each with the column's first and then those of `shape`.
    ROW_AT_ONCE: a row has one number and one seed (a channel). Without a seed, nothing is kept."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    column_tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    row = (program // column_tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (program % column_tiles) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    x_at = locate(row, shape, strides[1][1:])[:, None] + (column * strides[1][0])[None, :]
    x = tl.load(x_ptr + x_at, mask=inside)
    if seed_ptr is None:
        mask = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.int1)
    else:
        index = locate(row, shape, strides[2][1:])[:, None]
        seed_at = locate(row, shape, strides[3][1:])[:, None]
        if not ROW_AT_ONCE:
            index = index + (column * strides[2][0])[None, :]
            seed_at = seed_at + (column * strides[3][0])[None, :]
            seed = tl.load(seed_ptr + seed_at, mask=inside, other=0)
        else:
            seed = tl.load(seed_ptr + seed_at, mask=(row < rows)[:, None], other=0)
        mask = tl.broadcast_to(keep(seed, index, limit), (BLOCK_ROWS, BLOCK_COLUMNS))
    y = scaled(x, mask, constants, COMPUTE)
    y_at = locate(row, shape, strides[0][1:])[:, None] + (column * strides[0][0])[None, :]
    tl.store(y_ptr + y_at, y.to(y_ptr.dtype.element_ty), mask=inside)
