"""Reductions over any set of dimensions.

out[k] = FINISH(COMBINE over r of MAP(x[k, r], y[k, r], ...)), where k numbers the elements of the
dimensions that are kept and r those of the reduced ones: a sum has MAP(x) = x, a dot product x * y,
the p-norm |x| ** p. What is combined is a tuple: a maximum and its index, a mean with the squared
distances from it; and FINISH may have several results.

One kernel carries them all. A program owns a tile of kept by reduced elements, walks it along the
reduced dimensions, accumulates element by element in float32 or float64, and folds the tile into
its column of results once, at the end. Where there are few kept elements and many reduced ones,
several programs share a row: each stores its part (no FINISH), and the kernel reduces those parts
in a second launch (no MAP). There are no atomics, so results are the same every time.
"""

import triton
import triton.language as tl

from . import collective
from . import math as m
from .math import libdevice
from .pointwise import numbers, operand, scalar

# Bytes of a tile: 16 for each of 128 threads, so that one load is what a thread reads of it.
TILE_BYTES = 2048
# Tiles that are loaded before the first of them is combined. It takes some 32 KiB in flight on a
# multiprocessor to keep its memory busy, and accumulators for one tile alone.
AHEAD = 4
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
def share(rows, BLOCK_ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Which part of its rows a program has, and their numbers, in 64 bits if WIDE."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    return program // row_tiles, (program % row_tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)


# Functions cannot return None: what stands in a place that nothing is read of is a zero.


@triton.jit
def rows_of(tensors, row, shape, strides):
    """Pointers to the beginnings of a tile's rows in each of `tensors`; one pointer for all rows
    where there are no strides."""
    pointers = ()
    for i in tl.static_range(len(tensors)):
        if tensors[i] is None:
            pointers = pointers + (0,)
        elif strides[i] is None:
            pointers = pointers + (tensors[i],)
        else:
            pointers = pointers + (tensors[i] + locate(row, shape, strides[i])[:, None],)
    return pointers


@triton.jit
def hold(
    ins, pointers, scalars, kept_strides, reduced_strides, mask, steps,
    RAW: tl.constexpr, RESULT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """What does not change along a row: numbers, and operands that are broadcast along it, which
    may have no memory where a row has no elements."""
    held = ()
    for i in tl.static_range(len(ins)):
        if reduced_strides[i] is not None:
            held = held + (0,)
        elif ins[i] is None:
            if scalars[i] is None:
                held = held + (tl.full((), 0, COMPUTE),)
            else:
                held = held + (scalar(scalars[i], COMPUTE),)
        else:
            if kept_strides[i] is None:
                block = tl.load(pointers[i], mask=steps > 0)
            else:
                block = tl.load(pointers[i], mask=mask & (steps > 0))
            held = held + (operand(block, (RAW >> i) & 1, RESULT, COMPUTE),)
    return held


@triton.jit
def offsets_of(column, run, shape, strides, RUNS: tl.constexpr):
    """Of the columns of a tile in each operand that has strides."""
    offsets = ()
    for i in tl.static_range(len(strides)):
        if strides[i] is None:
            offsets = offsets + (0,)
        elif RUNS:
            offset = column * strides[i][0]
            if len(shape) > 1:
                offset += locate(run, shape[1:], strides[i][1:])
            offsets = offsets + (offset[None, :],)
        else:
            offsets = offsets + (locate(column, shape, strides[i])[None, :],)
    return offsets


@triton.jit
def load_tile(pointers, offsets, kept_strides, reduced_strides, row_mask, column_mask):
    """A tile of each operand that is not held; all of its columns without `column_mask`."""
    blocks = ()
    for i in tl.static_range(len(pointers)):
        if reduced_strides[i] is None:
            blocks = blocks + (0,)
        elif kept_strides[i] is None:
            blocks = blocks + (tl.load(pointers[i] + offsets[i], mask=column_mask),)
        elif column_mask is None:
            blocks = blocks + (tl.load(pointers[i] + offsets[i], mask=row_mask),)
        else:
            blocks = blocks + (tl.load(pointers[i] + offsets[i], mask=row_mask & column_mask),)
    return blocks


@triton.jit
def mapped(
    blocks, held, index, params, reduced_strides, shape: tl.constexpr,
    MAP: tl.constexpr, COLUMN: tl.constexpr, RAW: tl.constexpr,
    RESULT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """MAP of a tile of the operands, each first converted to the result's type, as torch does."""
    values = ()
    for i in tl.static_range(len(blocks)):
        if reduced_strides[i] is None:
            value = held[i]
        elif MAP is None:
            value = blocks[i]
        else:
            value = operand(blocks[i], (RAW >> i) & 1, RESULT, COMPUTE)
        values = values + (tl.broadcast_to(value, shape),)
    if MAP is None:
        return values
    elif COLUMN is None:
        return MAP(*values, *index, *params)
    else:
        return (tl.broadcast_to(MAP(*values, *index, *params)[COLUMN], shape),)


@triton.jit
def reduce(
    outs, ins, scalars, map_params, finish_params,
    kept_shape, out_strides, kept_strides, reduced_shape, reduced_strides,
    rows, length, steps, span,
    MAP: tl.constexpr, COMBINE: tl.constexpr, STEP: tl.constexpr, FINISH: tl.constexpr,
    IDENTITY: tl.constexpr, INDEX: tl.constexpr, COLUMN: tl.constexpr, RAW: tl.constexpr,
    RESULT: tl.constexpr, COMPUTE: tl.constexpr,
    RUNS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Shapes and strides are innermost first; `kept_strides` and `reduced_strides` have one tuple
    for each operand, or None where it is broadcast along all of these. An operand is a pointer, or
    None with its value in `scalars`, or None in both when nothing depends on it. Those whose bit is
    set in RAW are conditions. COLUMN: which of MAP's results is reduced, None for all.

    With an INDEX, the type of one, `reduced_strides` has one more, by which a reduced element finds
    its place in the order that torch counts in; MAP receives it as its last operand, and the last
    accumulator is one of such indices. STEP is COMBINE with one more element, in their order.

    `rows` kept elements; `length` reduced ones in a run (RUNS: the innermost reduced dimension, the
    others numbering the runs; otherwise all of them), `steps` of AHEAD tiles along all runs, `span`
    of them for each program. Part s of the results, where there are several, lies `s * rows`
    further on.
    """
    part, row = share(rows, BLOCK_ROWS, WIDE)
    row_mask = (row < rows)[:, None]
    pointers = rows_of(ins, row, kept_shape, kept_strides)
    params = numbers(map_params, COMPUTE)
    held = hold(
        ins, pointers, scalars, kept_strides, reduced_strides, row_mask, steps,
        RAW, RESULT, COMPUTE,
    )  # fmt: skip

    shape: tl.constexpr = (BLOCK_ROWS, BLOCK_COLUMNS)
    identity = ()
    for i in tl.static_range(len(IDENTITY)):
        if INDEX is not None and i == len(IDENTITY) - 1:
            identity = identity + (tl.full(shape, IDENTITY[i], INDEX),)
        else:
            identity = identity + (tl.full(shape, IDENTITY[i], COMPUTE),)
    total = identity
    run_steps = tl.cdiv(length, AHEAD * BLOCK_COLUMNS)
    for step in range(part * span, tl.minimum(part * span + span, steps)):
        run = step
        start = step * (AHEAD * BLOCK_COLUMNS)
        if RUNS and len(reduced_shape) > 1:
            run = step // run_steps
            start = (step % run_steps) * (AHEAD * BLOCK_COLUMNS)
        # A column mask whose bound is not a multiple of 16 would cost the vector loads, so only the
        # last tile of a run has one.
        if start + AHEAD * BLOCK_COLUMNS <= length:
            tiles = ()
            for ahead in tl.static_range(AHEAD):
                column = start + ahead * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
                column = column.to(row.dtype)
                offsets = offsets_of(column, run, reduced_shape, reduced_strides, RUNS)
                blocks = load_tile(pointers, offsets, kept_strides, reduced_strides, row_mask, None)
                index = ()
                if INDEX is not None and MAP is not None:
                    index = (offsets[len(ins)].to(INDEX),)
                tiles = tiles + ((blocks, index),)
            for ahead in tl.static_range(AHEAD):
                blocks, index = tiles[ahead]
                value = mapped(
                    blocks, held, index, params, reduced_strides, shape,
                    MAP, COLUMN, RAW, RESULT, COMPUTE,
                )  # fmt: skip
                total = STEP(*total, *value)
        else:
            for ahead in range(0, tl.cdiv(length - start, BLOCK_COLUMNS)):
                column = start + ahead * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
                # 64 bits if WIDE; the interpreter's loop variable has no type of its own.
                column = column.to(row.dtype)
                offsets = offsets_of(column, run, reduced_shape, reduced_strides, RUNS)
                inside = (column < length)[None, :]
                blocks = load_tile(
                    pointers, offsets, kept_strides, reduced_strides, row_mask, inside
                )
                index = ()
                if INDEX is not None and MAP is not None:
                    index = (offsets[len(ins)].to(INDEX),)
                loaded = mapped(
                    blocks, held, index, params, reduced_strides, shape,
                    MAP, COLUMN, RAW, RESULT, COMPUTE,
                )  # fmt: skip
                value = ()
                for i in tl.static_range(len(IDENTITY)):
                    value = value + (tl.where(inside, loaded[i], identity[i]),)
                total = COMBINE(*total, *value)

    results = collective.fold(total, COMBINE)
    if FINISH is not None:
        results = FINISH(*results, *numbers(finish_params, COMPUTE))
    offset = part * rows + locate(row, kept_shape, out_strides)
    for i in tl.static_range(len(outs)):
        if outs[i] is not None:
            result = results[i].to(outs[i].dtype.element_ty)
            tl.store(outs[i] + offset, result, mask=row < rows)


# COMBINE of two tuples of accumulators.


@triton.jit
def add(x, y):
    return (x + y,)


@triton.jit
def multiply(x, y):
    return (x * y,)


@triton.jit
def maximum(x, y):
    return (tl.where(m.is_nan(x) | (x > y), x, y),)


@triton.jit
def minimum(x, y):
    return (tl.where(m.is_nan(x) | (x < y), x, y),)


@triton.jit
def multiply_and_count(product1, zeros1, wild1, product2, zeros2, wild2):
    return product1 * product2, zeros1 + zeros2, wild1 + wild2


@triton.jit
def add_and_count(total1, count1, total2, count2):
    return total1 + total2, count1 + count2


@triton.jit
def add_three(x1, y1, z1, x2, y2, z2):
    return x1 + x2, y1 + y2, z1 + z2


@triton.jit
def add_exponentials(top1, total1, top2, total2):
    """Sums of exp(x - top): one exponential, because that of the larger top is 1."""
    below = top1 < top2
    # Equal ones may be infinities, whose difference is NaN.
    gap = tl.where(top1 == top2, 0.0, -tl.abs(top1 - top2)).to(top1.dtype)
    scale = libdevice.exp(gap)
    total = tl.where(below, total1 * scale + total2, total1 + total2 * scale)
    return tl.where(m.is_nan(top1) | (top1 > top2), top1, top2), total


# MAP


@triton.jit
def one(x):
    return tl.full(x.shape, 1.0, x.dtype)


@triton.jit
def exponential(x):
    return x, one(x)


@triton.jit
def numeric(x):
    """What is not NaN, and whether it is not."""
    return tl.where(m.is_nan(x), 0, x), tl.where(m.is_nan(x), 0, one(x))


@triton.jit
def numeric_value(x):
    return (tl.where(m.is_nan(x), 0, x),)


@triton.jit
def is_number(x):
    return (tl.where(m.is_nan(x), 0, one(x)),)


@triton.jit
def unbounded(x):
    """Whether it is infinite or NaN."""
    return tl.where(x - x == 0, 0, one(x))


@triton.jit
def nonzero_factor(x):
    """What is not zero, whether it is, and whether it is not finite."""
    return tl.where(x == 0, one(x), x), tl.where(x == 0, one(x), 0), unbounded(x)


@triton.jit
def keep(x):
    return (x,)


@triton.jit
def product(x, y):
    return (x * y,)


@triton.jit
def absolute(x):
    return (tl.abs(x),)


@triton.jit
def square(x):
    return (x * x,)


@triton.jit
def nonzero(x):
    return (tl.where(x == 0, 0.0, 1.0).to(x.dtype),)


@triton.jit
def absolute_power(x, p):
    return (libdevice.pow(tl.abs(x), p),)


@triton.jit
def hit(x, out):
    return (tl.where(x == out, 1.0, 0.0).to(x.dtype),)


@triton.jit
def same(x, out):
    """`hit`, with NaN equal to itself."""
    return (tl.where((x == out) | (m.is_nan(x) & m.is_nan(out)), 1.0, 0.0).to(x.dtype),)


@triton.jit
def absolute_hit(x, out):
    return hit(tl.abs(x), out)


# FINISH


@triton.jit
def divide(total, count):
    return (m.div(total, count),)


@triton.jit
def root(total):
    return (m.sqrt(total),)


@triton.jit
def power(total, exponent):
    return (libdevice.pow(total, tl.broadcast_to(exponent, total.shape)),)


@triton.jit
def ratio(total, count):
    return (m.div(total, count),)


@triton.jit
def logarithm(top, total):
    return (top + libdevice.log(total),)


@triton.jit
def at_least(norm, eps):
    return tl.where(norm < eps, eps, norm)


@triton.jit
def angle(xy, x, y):
    # Over a norm that overflows torch has unit vectors of zeros.
    overflow = (x == float("inf")) | (y == float("inf"))
    return m.div(m.div(tl.where(overflow, 1.0, xy).to(xy.dtype), x), y)
