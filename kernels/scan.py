"""Scans along one dimension.

out[k, i] = FINISH(MAP(x[k, 0], ...) . MAP(x[k, 1], ...) . ... . MAP(x[k, i], ...), x[k, i], ...),
where k numbers the rows and the point is COMBINE, an associative function of tuples: a sum, a
product, or the first-order recurrence y[i] = a[i] y[i-1] + b[i], of which the derivatives of
both are instances. REVERSE begins at the other end, with i the last element.

A program owns a tile of rows, walks along them block by block and carries the last column of each
block into the next. Where there are few rows and long ones, several programs share a row, in three
launches of the one kernel: each reduces its part to one tuple (`totals`), those tuples are scanned,
and each scans its part from what came before it (`before`).
"""

import triton
import triton.language as tl

from . import collective
from .reduction import locate, rows_of, share

# Elements of a tile: 8 a thread, of each of up to two accumulators.
TILE = 1024
# Rows of a tile whose contiguous axis is that of the rows: a warp reads 128 bytes in float32.
ROW_BLOCK = 32


@triton.jit
def scan(
    outs, ins, totals, before,
    rows_shape, out_rows, in_rows, out_strides, in_strides, rows, length, span,
    MAP: tl.constexpr, COMBINE: tl.constexpr, FINISH: tl.constexpr, IDENTITY: tl.constexpr,
    SHIFTS: tl.constexpr, FILLS: tl.constexpr, REVERSE: tl.constexpr,
    RESULT: tl.constexpr, COMPUTE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`rows_shape` is innermost first, and `in_rows` has the strides of each operand along it;
    `out_strides` and `in_strides` are those along the scanned dimension.

    Operand n is read `SHIFTS[n]` elements further on, and as `FILLS[n]` where there is none.
    `length` elements in a row, `span` blocks of them for each program. Part s of `totals` and
    `before` lies `s * rows` further on.
    """
    part, row = share(rows, BLOCK_ROWS, WIDE)
    row_mask = (row < rows)[:, None]
    pointers = rows_of(ins, row, rows_shape, in_rows)
    targets = ()
    for n in tl.static_range(len(outs)):
        if outs[n] is None:
            targets = targets + (None,)
        else:
            targets = targets + (outs[n] + locate(row, rows_shape, out_rows)[:, None],)

    carry = ()
    for n in tl.static_range(len(IDENTITY)):
        start = tl.full((BLOCK_ROWS,), IDENTITY[n], COMPUTE)
        if before is not None:
            earlier = part - 1
            there = (row < rows) & (earlier >= 0)
            loaded = tl.load(before[n] + (earlier * rows + row), mask=there)
            start = tl.where(earlier >= 0, loaded, start)
        carry = carry + (start,)

    blocks = tl.cdiv(length, BLOCK)
    lane = tl.arange(0, BLOCK)
    last = (lane == (0 if REVERSE else BLOCK - 1))[None, :]
    for step in range(part * span, tl.minimum(part * span + span, blocks)):
        block = blocks - 1 - step if REVERSE else step
        place = (block * BLOCK + lane).to(row.dtype)
        inside = (place < length)[None, :]
        values = ()
        for n in tl.static_range(len(ins)):
            source = place + SHIFTS[n]
            mask = row_mask & ((source >= 0) & (source < length))[None, :]
            value = tl.load(pointers[n] + (source * in_strides[n])[None, :], mask=mask, other=0)
            value = value.to(RESULT).to(COMPUTE)
            if SHIFTS[n] != 0:
                value = tl.where(mask, value, FILLS[n])
            values = values + (value,)
        mapped = values
        if MAP is not None:
            mapped = MAP(*values)
        elements = ()
        for n in tl.static_range(len(IDENTITY)):
            fill = tl.full((BLOCK_ROWS, BLOCK), IDENTITY[n], COMPUTE)
            elements = elements + (tl.where(inside, mapped[n], fill),)
        scanned = collective.scan(elements, COMBINE, REVERSE)
        earlier_ones = ()
        for n in tl.static_range(len(IDENTITY)):
            wide = tl.broadcast_to(carry[n][:, None], (BLOCK_ROWS, BLOCK))
            earlier_ones = earlier_ones + (wide,)
        scanned = COMBINE(*earlier_ones, *scanned)
        carry = ()
        for n in tl.static_range(len(IDENTITY)):
            carry = carry + (tl.sum(tl.where(last, scanned[n], 0), 1),)
        if totals is None:
            results = scanned
            if FINISH is not None:
                results = FINISH(*scanned, *values)
            for n in tl.static_range(len(outs)):
                if outs[n] is not None:
                    result = results[n].to(outs[n].dtype.element_ty)
                    tl.store(
                        targets[n] + (place * out_strides)[None, :], result, mask=row_mask & inside
                    )
    if totals is not None:
        for n in tl.static_range(len(IDENTITY)):
            tl.store(totals[n] + (part * rows + row), carry[n], mask=row < rows)


# COMBINE, MAP, FINISH of the recurrence y[i] = a[i] y[i-1] + b[i].


@triton.jit
def affine(a1, b1, a2, b2):
    # Exact beside infinities: a slope of 0 forgets what came before it, and nothing came before the
    # identity (1, 0).
    first = (a1 == 1) & (b1 == 0)
    slope = tl.where((a1 == 0) | (a2 == 0), 0, a1 * a2)
    return slope, tl.where(first | (a2 == 0), b2, a2 * b1 + b2)


@triton.jit
def solution(slope, y, a, b):
    return (y,)


# Gradient of a cumulative product: the recurrence dy[i] = x[i+1] dy[i+1] + g[i] from the end, times
# the product `p` of what is before x[i]. Nothing is divided by x[i], which may be 0.


@triton.jit
def cumprod_terms(x, g, p):
    return x, g


@triton.jit
def cumprod_finish(slope, y, x, g, p):
    return (y * p,)
