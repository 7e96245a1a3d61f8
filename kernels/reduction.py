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
from .pointwise import numbers

# A tile's accumulators: 16 floats a thread, so four 16-byte loads in flight in each, and in float64
# half as many elements. With twice that, a map that looks for NaN spills.
# Half of it where there are several accumulators, which do more with each element.
TILE_BYTES = 8192
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


@triton.jit
def rows_of(tensors, row, shape, strides):
    """Pointers to the beginnings of a tile's rows in each of `tensors`."""
    pointers = ()
    for i in tl.static_range(len(tensors)):
        pointers = pointers + (tensors[i] + locate(row, shape, strides[i])[:, None],)
    return pointers


@triton.jit
def mapped(
    pointers, offsets, index, mask, params,
    MAP: tl.constexpr, RESULT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """MAP of a tile of the operands, each first converted to the result's type, as torch does."""
    values = ()
    for i in tl.static_range(len(pointers)):
        block = tl.load(pointers[i] + offsets[i], mask=mask)
        if MAP is None:
            values = values + (block,)
        else:
            values = values + (block.to(RESULT).to(COMPUTE),)
    if MAP is None:
        return values
    else:
        return MAP(*values, *index, *params)


@triton.jit
def reduce(
    outs, ins, map_params, finish_params,
    kept_shape, out_strides, kept_strides, reduced_shape, reduced_strides,
    rows, length, steps, span,
    MAP: tl.constexpr, COMBINE: tl.constexpr, FINISH: tl.constexpr,
    IDENTITY: tl.constexpr, INDEXED: tl.constexpr, RESULT: tl.constexpr, COMPUTE: tl.constexpr,
    RUNS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Shapes and strides are innermost first; `kept_strides` and `reduced_strides` have one tuple
    for each operand. If INDEXED, `reduced_strides` has one more, by which a reduced element finds
    its place in the order that torch counts in; MAP receives it as its last operand, and the last
    accumulator is one of such indices.

    `rows` kept elements; `length` reduced ones in a run (RUNS: the innermost reduced dimension, the
    others numbering the runs; otherwise all of them), `steps` tiles along all runs, `span` of them
    for each program. Part s of the results, where there are several, lies `s * rows` further on.
    """
    part, row = share(rows, BLOCK_ROWS, WIDE)
    row_mask = (row < rows)[:, None]
    pointers = rows_of(ins, row, kept_shape, kept_strides)
    params = numbers(map_params, COMPUTE)

    identity = ()
    for i in tl.static_range(len(IDENTITY)):
        if INDEXED and i == len(IDENTITY) - 1:
            identity = identity + (tl.full((BLOCK_ROWS, BLOCK_COLUMNS), IDENTITY[i], tl.int64),)
        else:
            identity = identity + (tl.full((BLOCK_ROWS, BLOCK_COLUMNS), IDENTITY[i], COMPUTE),)
    total = identity
    run_steps = tl.cdiv(length, BLOCK_COLUMNS)
    for step in range(part * span, tl.minimum(part * span + span, steps)):
        if RUNS and len(reduced_shape) > 1:
            run = step // run_steps
            start = (step % run_steps) * BLOCK_COLUMNS
        else:
            start = step * BLOCK_COLUMNS
        # 64 bits if WIDE; the interpreter's loop variable has no type of its own to see to that.
        column = (start + tl.arange(0, BLOCK_COLUMNS)).to(row.dtype)
        offsets = ()
        for i in tl.static_range(len(reduced_strides)):
            if RUNS:
                offset = column * reduced_strides[i][0]
                if len(reduced_shape) > 1:
                    offset += locate(run, reduced_shape[1:], reduced_strides[i][1:])
            else:
                offset = locate(column, reduced_shape, reduced_strides[i])
            offsets = offsets + (offset[None, :],)
        index = ()
        if INDEXED and MAP is not None:
            index = (offsets[len(ins)].to(tl.int64),)
        # A column mask whose bound is not a multiple of 16 would cost the vector loads, so only the
        # last tile of a run has one.
        if start + BLOCK_COLUMNS <= length:
            value = mapped(pointers, offsets, index, row_mask, params, MAP, RESULT, COMPUTE)
        else:
            column_mask = (column < length)[None, :]
            mask = row_mask & column_mask
            loaded = mapped(pointers, offsets, index, mask, params, MAP, RESULT, COMPUTE)
            value = ()
            for i in tl.static_range(len(IDENTITY)):
                value = value + (tl.where(column_mask, loaded[i], identity[i]),)
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
def add_exponentials(top1, total1, top2, total2):
    """Sums of exp(x - top): one exponential, because that of the larger top is 1."""
    below = top1 < top2
    # Equal ones may be infinities, whose difference is NaN.
    gap = tl.where(top1 == top2, 0.0, -tl.abs(top1 - top2)).to(top1.dtype)
    scale = libdevice.exp(gap)
    total = tl.where(below, total1 * scale + total2, total1 + total2 * scale)
    return tl.where(m.is_nan(top1) | (top1 > top2), top1, top2), total


@triton.jit
def first_maximum(x, i, y, j):
    """The larger with its index; NaN is the largest, of equals the first."""
    same = (x == y) | (m.is_nan(x) & m.is_nan(y))
    first = (x > y) | (m.is_nan(x) & (y == y)) | (same & (i < j))
    return tl.where(first, x, y), tl.where(first, i, j)


@triton.jit
def first_minimum(x, i, y, j):
    same = (x == y) | (m.is_nan(x) & m.is_nan(y))
    first = (x < y) | (m.is_nan(x) & (y == y)) | (same & (i < j))
    return tl.where(first, x, y), tl.where(first, i, j)


# MAP


@triton.jit
def one(x):
    return tl.full(x.shape, 1.0, x.dtype)


@triton.jit
def moments(x):
    # The distance from itself: not 0 but NaN where x is not finite.
    return one(x), x, tl.zeros_like(x), x - x


@triton.jit
def exponential(x):
    return x, one(x)


@triton.jit
def indexed(x, index):
    return x, tl.broadcast_to(index, x.shape)


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


# MAP of the distances: the same of a difference, shifted by a little as torch shifts it.


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
def add_three(x1, y1, z1, x2, y2, z2):
    return x1 + x2, y1 + y2, z1 + z2


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
def variance(n, origin, mean, square, freedom):
    return m.div(square, freedom), origin + mean


@triton.jit
def deviation(n, origin, mean, square, freedom):
    return m.sqrt(m.div(square, freedom)), origin + mean


@triton.jit
def logarithm(top, total):
    return (top + libdevice.log(total),)


@triton.jit
def at_least(norm, eps):
    return tl.where(norm < eps, eps, norm)


@triton.jit
def cosine(xx, yy, xy, eps):
    """The cosine of an angle, and the two norms."""
    x, y = m.sqrt(xx), m.sqrt(yy)
    return angle(xy, at_least(x, eps), at_least(y, eps)), x, y


@triton.jit
def angle(xy, x, y):
    # Over a norm that overflows torch has unit vectors of zeros.
    overflow = (x == float("inf")) | (y == float("inf"))
    return m.div(m.div(tl.where(overflow, 1.0, xy).to(xy.dtype), x), y)
