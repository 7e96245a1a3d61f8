"""Reductions over any set of dimensions.

out[k] = FINISH(COMBINE over r of MAP(x[k, r], y[k, r], ...)), where k numbers the elements of the
dimensions that are kept and r those of the reduced ones: a sum has MAP(x) = x, a dot product x * y,
the p-norm |x| ** p.

One kernel carries them all. A program owns a tile of kept by reduced elements, walks it along the
reduced dimensions, accumulates element by element in float32 or float64, and folds the tile into
its column of results once, at the end. Where there are few kept elements and many reduced ones,
several programs share a row: each stores its part (FINISH is `keep`), and the kernel reduces those
parts in a second launch. There are no atomics, so results are the same every time.
"""

import triton
import triton.language as tl

from . import math as m
from .pointwise import numbers

# A tile's accumulators: 32 floats a thread, so several 16-byte loads in flight in each, and in
# float64 half as many elements, or the power of a p-norm spills.
TILE_BYTES = 16384
# Kept elements of a tile whose contiguous axis is the kept one: a warp reads 512 bytes in float32.
KEPT_BLOCK = 128
# A contiguous run of reduced elements this long is walked by itself; shorter ones are strung
# together, at a division and a remainder for each column of the tile.
RUN = 256


@triton.jit
def locate(index, shape, strides):
    """Offset of a linear index over `shape`, innermost dimension first."""
    if len(shape) == 1:
        offset = index * strides[0]
    else:
        offset = (index % shape[0]) * strides[0]
        rest = index // shape[0]
        for d in tl.static_range(1, len(shape) - 1):
            offset += (rest % shape[d]) * strides[d]
            rest = rest // shape[d]
        offset += rest * strides[len(shape) - 1]
    return offset


@triton.jit
def mapped(
    pointers, offsets, mask, params,
    MAP: tl.constexpr, RESULT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """MAP of a tile of the operands, each first converted to the result's type, as torch does."""
    values = ()
    for i in tl.static_range(len(pointers)):
        block = tl.load(pointers[i] + offsets[i], mask=mask)
        values = values + (block.to(RESULT).to(COMPUTE),)
    return MAP(*values, *params)


@triton.jit
def reduce(
    out, ins, map_params, finish_params,
    kept_shape, out_strides, kept_strides, reduced_shape, reduced_strides,
    rows, length, steps, span,
    MAP: tl.constexpr, COMBINE: tl.constexpr, FOLD: tl.constexpr, FINISH: tl.constexpr,
    IDENTITY: tl.constexpr, RESULT: tl.constexpr, COMPUTE: tl.constexpr,
    RUNS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Shapes and strides are innermost first; `kept_strides` and `reduced_strides` have one tuple
    for each operand.

    `rows` kept elements; `length` reduced ones in a run (RUNS: the innermost reduced dimension, the
    others numbering the runs; otherwise all of them), `steps` tiles along all runs, `span` of them
    for each program. Part s of the result, where there are several, lies `s * rows` further on.
    """
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    part = program // row_tiles
    row = (program % row_tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = (row < rows)[:, None]
    pointers = ()
    for i in tl.static_range(len(ins)):
        pointers = pointers + (ins[i] + locate(row, kept_shape, kept_strides[i])[:, None],)
    params = numbers(map_params, COMPUTE)

    total = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), IDENTITY, COMPUTE)
    run_steps = tl.cdiv(length, BLOCK_COLUMNS)
    for step in range(part * span, tl.minimum(part * span + span, steps)):
        if RUNS and len(reduced_shape) > 1:
            run = step // run_steps
            start = (step % run_steps) * BLOCK_COLUMNS
        else:
            start = step * BLOCK_COLUMNS
        # 64 bits if WIDE; the interpreter's loop variable has no type of its own to see to that.
        column = (start + tl.arange(0, BLOCK_COLUMNS)).to(program.dtype)
        offsets = ()
        for i in tl.static_range(len(ins)):
            if RUNS:
                offset = column * reduced_strides[i][0]
                if len(reduced_shape) > 1:
                    offset += locate(run, reduced_shape[1:], reduced_strides[i][1:])
            else:
                offset = locate(column, reduced_shape, reduced_strides[i])
            offsets = offsets + (offset[None, :],)
        # A column mask whose bound is not a multiple of 16 would cost the vector loads, so only the
        # last tile of a run has one.
        if start + BLOCK_COLUMNS <= length:
            value = mapped(pointers, offsets, row_mask, params, MAP, RESULT, COMPUTE)
        else:
            column_mask = (column < length)[None, :]
            mask = row_mask & column_mask
            value = mapped(pointers, offsets, mask, params, MAP, RESULT, COMPUTE)
            value = tl.where(column_mask, value, IDENTITY)
        total = COMBINE(total, value)

    result = FINISH(FOLD(total), *numbers(finish_params, COMPUTE))
    offset = part * rows + locate(row, kept_shape, out_strides)
    tl.store(out + offset, result.to(out.dtype.element_ty), mask=row < rows)


# COMBINE of two tiles, and FOLD of a tile into one value for each of its rows.


@triton.jit
def add(x, y):
    return x + y


@triton.jit
def fold_add(x):
    return tl.sum(x, 1)


@triton.jit
def maximum(x, y):
    return tl.where(m.is_nan(x) | (x > y), x, y)


@triton.jit
def fold_maximum(x):
    return with_nan(tl.max(tl.where(m.is_nan(x), float("-inf"), x), 1), x)


@triton.jit
def minimum(x, y):
    return tl.where(m.is_nan(x) | (x < y), x, y)


@triton.jit
def fold_minimum(x):
    return with_nan(tl.min(tl.where(m.is_nan(x), float("inf"), x), 1), x)


@triton.jit
def with_nan(result, x):
    """NaN for the rows that contain one: tl.max and tl.min pass over them."""
    return tl.where(tl.max(m.is_nan(x).to(tl.int32), 1) > 0, float("nan"), result)


# MAP


@triton.jit
def keep(x):
    return x


@triton.jit
def product(x, y):
    return x * y


@triton.jit
def absolute(x):
    return tl.abs(x)


@triton.jit
def square(x):
    return x * x


@triton.jit
def nonzero(x):
    return tl.where(x == 0, 0.0, 1.0).to(x.dtype)


@triton.jit
def absolute_power(x, p):
    return m.pow(tl.abs(x), p)


@triton.jit
def hit(x, out):
    return tl.where(x == out, 1.0, 0.0).to(x.dtype)


@triton.jit
def absolute_hit(x, out):
    return hit(tl.abs(x), out)


# FINISH


@triton.jit
def divide(total, count):
    return m.div(total, count)


@triton.jit
def root(total):
    return m.sqrt(total)


@triton.jit
def power(total, exponent):
    return m.pow(total, tl.broadcast_to(exponent, total.shape))


# Backward: pointwise functions of `g`, the gradient of the result, and `out`, the result, both
# broadcast along the reduced dimensions, and `x`, the input.


@triton.jit
def extremum_bwd(g, x, out, count):
    # A product, not a selection: where `count` is 0 (NaN) the gradient is NaN, as torch's is.
    return (m.div(g, count) * hit(x, out),)


@triton.jit
def norm_1_bwd(g, x):
    return (g * m.sign(x),)


@triton.jit
def norm_2_bwd(g, x, out):
    return (g * tl.where(out == 0, 0, m.div(x, out)),)


@triton.jit
def norm_inf_bwd(g, x, out, count):
    share = m.div(g, tl.where(m.is_nan(out), 1, count))
    return (m.sign(x) * (share * absolute_hit(x, out)),)


@triton.jit
def norm_scale(g, out, p):
    """What all elements of a row have in common in the gradient of a p-norm."""
    # Apart, so that a norm of 0 never divides.
    low = g * m.pow(out, tl.broadcast_to(1 - p, out.shape))
    high = tl.where(out == 0, 0, m.div(g, m.pow(out, tl.broadcast_to(p - 1, out.shape))))
    return (tl.where(p < 1, low, high),)


@triton.jit
def norm_p_bwd(scale, x, p):
    slope = m.pow(tl.abs(x), tl.broadcast_to(p - 1, x.shape))
    return (m.sign(x) * tl.where(x == 0, 0, slope) * scale,)
