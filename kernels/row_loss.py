"""Losses of rows.

L = (sum over k of l[k]) / n, or the sum alone, or each l by itself, where l[k] = FINISH(COMBINE
over r of MAP(x[k, r], y[k, r], ...), label[k]); and backward dx[k, r] = g / n * dl[k]/dx[k, r],
pointwise, of what row k was combined to, which `row_loss` stores.

A program walks the tiles of its rows and adds up their losses, so that none is ever stored that is
only summed. Where there are rows for several programs, each stores its part, and `reduction.reduce`
adds those.
"""

import triton
import triton.language as tl

from . import collective
from . import math as m
from .math import libdevice
from .pointwise import numbers
from .reduction import (
    absolute,
    absolute_power,
    at_least,
    locate,
    minimum,
    nonzero,
    one,
    rows_of,
    square,
)
from .reduction_backward import norm_1_bwd, norm_2_bwd, norm_inf_bwd, norm_p_bwd, norm_scale

# Accumulators of a tile: 8 floats for each of 128 threads.
TILE_BYTES = 4096
# Rows of a tile whose contiguous axis is that of the rows.
SIDE_BY_SIDE = 128
# What torch adds to squared norms, a float32 in every dtype.
COSINE_EPSILON = tl.constexpr(9.999999960041972e-13)


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
def row_loss(
    outs, ins, labels, map_params, finish_params, divisor,
    shape, in_strides, label_strides, column_strides, rows, columns, tiles, span, parts,
    MAP: tl.constexpr, COMBINE: tl.constexpr, FINISH: tl.constexpr, IDENTITY: tl.constexpr,
    RESULT: tl.constexpr, COMPUTE: tl.constexpr, EACH: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """`shape` of all rows and their strides are innermost first. `rows` are summed to one loss, in
    `tiles`, `span` of them for each of `parts` programs; or EACH is a loss. `outs` are the loss,
    and each of FINISH's further results for each row."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    part = program % parts
    first = program // parts * rows
    params = numbers(map_params, COMPUTE)
    identity = ()
    for i in tl.static_range(len(IDENTITY)):
        identity = identity + (tl.full((BLOCK_ROWS, BLOCK_COLUMNS), IDENTITY[i], COMPUTE),)
    total = tl.zeros((BLOCK_ROWS,), COMPUTE)
    for tile in range(part * span, tl.minimum(part * span + span, tiles)):
        inside = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        row = (first + inside).to(program.dtype)
        row_mask = inside < rows
        whole = row_mask[:, None]
        pointers = rows_of(ins, row, shape, in_strides)
        combined = identity
        for step in range(0, tl.cdiv(columns, BLOCK_COLUMNS)):
            start = step * BLOCK_COLUMNS
            # 64 bits if WIDE; the interpreter's loop variable has no type of its own.
            column = (start + tl.arange(0, BLOCK_COLUMNS)).to(program.dtype)
            offsets = ()
            for i in tl.static_range(len(ins)):
                offsets = offsets + ((column * column_strides[i])[None, :],)
            # Only the last tile has a mask of columns, which would cost the vector loads.
            if start + BLOCK_COLUMNS <= columns:
                value = mapped(pointers, offsets, whole, params, MAP, RESULT, COMPUTE)
            else:
                column_mask = (column < columns)[None, :]
                mask = whole & column_mask
                loaded = mapped(pointers, offsets, mask, params, MAP, RESULT, COMPUTE)
                value = ()
                for i in tl.static_range(len(IDENTITY)):
                    value = value + (tl.where(column_mask, loaded[i], identity[i]),)
            combined = COMBINE(*combined, *value)
        folded = collective.fold(combined, COMBINE)
        label = ()
        for i in tl.static_range(len(labels)):
            place = labels[i] + locate(row, shape, label_strides[i])
            label = label + (tl.load(place, mask=row_mask).to(COMPUTE),)
        results = FINISH(*folded, *label, *numbers(finish_params, COMPUTE))
        for i in tl.static_range(1, len(outs)):
            tl.store(outs[i] + row, results[i], mask=row_mask)
        if EACH:
            tl.store(outs[0] + row, results[0].to(outs[0].dtype.element_ty), mask=row_mask)
        else:
            total += tl.where(row_mask, results[0], 0)
    if not EACH:
        loss = tl.sum(total, 0)
        for i in tl.static_range(len(divisor)):
            loss = m.div(loss, numbers(divisor, COMPUTE)[i])
        tl.store(outs[0] + program, loss.to(outs[0].dtype.element_ty))


# The angle of two rows


@triton.jit
def dot_products(x, y):
    return x * x, y * y, x * y


@triton.jit
def cosine_of(xx, yy, xy):
    norm = m.sqrt((xx + COSINE_EPSILON) * (yy + COSINE_EPSILON))
    return m.div(xy, norm), norm


@triton.jit
def cosine_embedding(xx, yy, xy, label, margin):
    cosine = cosine_of(xx, yy, xy)[0]
    apart = tl.where(label == -1, at_least(cosine - margin, 0), 0)
    return tl.where(label == 1, 1 - cosine, 0) + apart, xx, yy, xy


@triton.jit
def cosine_embedding_bwd(g, x, y, label, xx, yy, xy, scale, margin):
    cosine, norm = cosine_of(xx, yy, xy)
    g = g * scale
    g = tl.where((label == -1) & (cosine - margin >= 0), g, 0) - tl.where(label == 1, g, 0)
    across = m.div(g, norm)
    along = m.div(-g * m.div(cosine, norm), norm)
    dx = across * y + along * (yy + COSINE_EPSILON) * x
    return dx, across * x + along * (xx + COSINE_EPSILON) * y


# The distances of three rows: of the anchor to the positive one and to the negative one, and
# between those, which costs no load where nobody wants it. MAP, one for each kind of norm.


@triton.jit
def differences(a, p, n, eps):
    return a - p + eps, a - n + eps, p - n + eps


@triton.jit
def triplet_nonzero(a, p, n, eps):
    near, far, between = differences(a, p, n, eps)
    return nonzero(near)[0], nonzero(far)[0], nonzero(between)[0]


@triton.jit
def triplet_absolute(a, p, n, eps):
    near, far, between = differences(a, p, n, eps)
    return absolute(near)[0], absolute(far)[0], absolute(between)[0]


@triton.jit
def triplet_square(a, p, n, eps):
    near, far, between = differences(a, p, n, eps)
    return square(near)[0], square(far)[0], square(between)[0]


@triton.jit
def triplet_power(a, p, n, eps, power):
    near, far, between = differences(a, p, n, eps)
    near, far = absolute_power(near, power)[0], absolute_power(far, power)[0]
    return near, far, absolute_power(between, power)[0]


@triton.jit
def triplet_counted(a, p, n, eps):
    near, far, between = triplet_absolute(a, p, n, eps)
    return near, one(near), far, one(far), between, one(between)


# COMBINE


@triton.jit
def larger(x, i, y, j):
    """A maximum, and how often it is there."""
    count = tl.where(x == y, i + j, tl.where(x > y, i, j))
    return tl.where(m.is_nan(x) | (x > y), x, y), count


@triton.jit
def smaller(x, i, y, j):
    count = tl.where(x == y, i + j, tl.where(x < y, i, j))
    return tl.where(m.is_nan(x) | (x < y), x, y), count


@triton.jit
def three_larger(a, i, b, j, c, k, x, u, y, v, z, w):
    return larger(a, i, x, u) + larger(b, j, y, v) + larger(c, k, z, w)


@triton.jit
def three_smaller(a, i, b, j, c, k, x, u, y, v, z, w):
    return smaller(a, i, x, u) + smaller(b, j, y, v) + smaller(c, k, z, w)


# FINISH


@triton.jit
def nearest(far, between, swap):
    swapped = tl.broadcast_to(swap, far.shape) != 0
    return tl.where(swapped, minimum(far, between)[0], far), swapped


@triton.jit
def triplet(near, far, between, margin, swap):
    return at_least(margin + near - nearest(far, between, swap)[0], 0), near, far, between


@triton.jit
def triplet_root(near, far, between, margin, swap):
    return triplet(m.sqrt(near), m.sqrt(far), m.sqrt(between), margin, swap)


@triton.jit
def triplet_power_root(near, far, between, margin, swap, root):
    root = tl.broadcast_to(root, near.shape)
    near, far = libdevice.pow(near, root), libdevice.pow(far, root)
    return triplet(near, far, libdevice.pow(between, root), margin, swap)


@triton.jit
def triplet_count(near, i, far, j, between, k, margin, swap):
    return triplet(near, far, between, margin, swap) + (i, j, k)


# Backward


@triton.jit
def triplet_shares(g, near, far, between, margin, swap):
    """The gradients of the three distances."""
    least, swapped = nearest(far, between, swap)
    g = tl.where(margin + near - least >= 0, g, 0)
    tied = tl.where(far == between, 0.5 * g, g)
    to_far = tl.where(swapped, tl.where(far > between, 0, tied), g)
    return g, -to_far, -tl.where(swapped & ~(far < between), tied, 0)


@triton.jit
def triplet_gradients(near, far, between, swap):
    """From what flows through each distance to what reaches the three rows."""
    between = tl.where(tl.broadcast_to(swap, near.shape) != 0, between, 0)
    return near + far, between - near, -far - between


@triton.jit
def triplet_absolute_bwd(g, a, p, n, near, far, between, scale, margin, swap, eps):
    to_near, to_far, to_between = triplet_shares(g * scale, near, far, between, margin, swap)
    x, y, z = differences(a, p, n, eps)
    x, y = norm_1_bwd(to_near, x)[0], norm_1_bwd(to_far, y)[0]
    return triplet_gradients(x, y, norm_1_bwd(to_between, z)[0], swap)


@triton.jit
def triplet_square_bwd(g, a, p, n, near, far, between, scale, margin, swap, eps):
    to_near, to_far, to_between = triplet_shares(g * scale, near, far, between, margin, swap)
    x, y, z = differences(a, p, n, eps)
    x, y = norm_2_bwd(to_near, x, near)[0], norm_2_bwd(to_far, y, far)[0]
    return triplet_gradients(x, y, norm_2_bwd(to_between, z, between)[0], swap)


@triton.jit
def power_bwd(g, x, out, power):
    return norm_p_bwd(norm_scale(g, out, power)[0], x, power)[0]


@triton.jit
def triplet_power_bwd(g, a, p, n, near, far, between, scale, margin, swap, eps, power):
    to_near, to_far, to_between = triplet_shares(g * scale, near, far, between, margin, swap)
    x, y, z = differences(a, p, n, eps)
    x, y = power_bwd(to_near, x, near, power), power_bwd(to_far, y, far, power)
    return triplet_gradients(x, y, power_bwd(to_between, z, between, power), swap)


@triton.jit
def triplet_count_bwd(g, a, p, n, near, far, between, i, j, k, scale, margin, swap, eps):
    to_near, to_far, to_between = triplet_shares(g * scale, near, far, between, margin, swap)
    x, y, z = differences(a, p, n, eps)
    x, y = norm_inf_bwd(to_near, x, near, i)[0], norm_inf_bwd(to_far, y, far, j)[0]
    return triplet_gradients(x, y, norm_inf_bwd(to_between, z, between, k)[0], swap)
