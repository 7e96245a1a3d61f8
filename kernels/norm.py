"""Layer normalisation and root mean square normalisation of rows, with their derivatives.

    xh = (x - E x) r,  r = (E (x - E x)^2 + eps)^-1/2,  y = xh w + b        E: mean along a row

With u = g w and P v = v - E v - xh E[v xh], which is symmetric (without centring E v = 0):

    dx = r P u            dw = sum g xh             db = sum g              sums: over the rows

and, of those, with v, p, q the gradients of dx, dw, db; t = g p, a = E[v xh], b = E[u xh]:

    dg = w r P v + p xh + q                         dw = sum g r P v
    dx = r P t - r^2 (b (v - E v) + a (u - E u) + xh (E[v u] - E v E u - 3 a b))

A row is held in registers while it fits (`LONG` is false), otherwise walked in blocks, once for
its sums and once for its results. Sums over rows: each program has partial ones in registers, of
all the rows that it takes, and a reduction adds those of the programs. There are no atomics.
"""

import triton
import triton.language as tl

from . import math as m
from .pointwise import scalar
from .reduction import locate

# Elements of a tile of short rows: several rows a program, or most of its threads would idle.
TILE = 4096
# Float32 numbers that a row may have, in a program of 512 threads of 128 registers: forward holds
# x; backward x and g, and perhaps sums over rows; its gradient x, g and v, and perhaps such a sum.
FORWARD, BACKWARD, SECOND = 32768, 16384, 4096
# Elements of a block of longer rows.
LONG_BLOCK = 4096


@triton.jit
def load_tile(
    ins, i: tl.constexpr, row, column, mask, kept_shape, row_shape, kept_strides, row_strides,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Operand i, 0 outside of the mask."""
    at_row = locate(row, kept_shape, kept_strides[i])[:, None]
    at_column = locate(column, row_shape, row_strides[i])[None, :]
    return tl.load(ins[i] + (at_row + at_column), mask=mask, other=0).to(COMPUTE)


@triton.jit
def summed(
    ins, row, column, mask, kept_shape, row_shape, kept_strides, row_strides, COMPUTE: tl.constexpr
):  # fmt: skip
    """The one operand, or the sum of two, rounded as it is stored."""
    x = load_tile(
        ins, 0, row, column, mask, kept_shape, row_shape, kept_strides, row_strides, COMPUTE
    )
    if len(ins) == 2:
        other = load_tile(
            ins, 1, row, column, mask, kept_shape, row_shape, kept_strides, row_strides, COMPUTE
        )
        x = (x + other).to(ins[0].dtype.element_ty).to(COMPUTE)
    return x


@triton.jit
def of_columns(ptr, column, columns, COMPUTE: tl.constexpr):
    """A weight or a bias, as a row."""
    return tl.load(ptr + column, mask=column < columns, other=0).to(COMPUTE)[None, :]


@triton.jit
def store_normed(
    y_ptr, sum_ptr, weight_ptr, bias_ptr, x, mean, rstd, row, column, mask, columns,
    CENTRED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    at = row[:, None] * columns + column[None, :]
    if sum_ptr is not None:
        tl.store(sum_ptr + at, x.to(sum_ptr.dtype.element_ty), mask=mask)
    if y_ptr is not None:
        y = (x - mean[:, None]) * rstd[:, None] if CENTRED else x * rstd[:, None]
        if weight_ptr is not None:
            y = y * of_columns(weight_ptr, column, columns, COMPUTE)
        if bias_ptr is not None:
            y = y + of_columns(bias_ptr, column, columns, COMPUTE)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def norm_fwd(
    y_ptr, sum_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, ins, eps,
    kept_shape, row_shape, kept_strides, row_strides, rows, columns,
    CENTRED: tl.constexpr, LONG: tl.constexpr, COMPUTE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Shapes and strides are innermost first, one tuple of strides for each of `ins`: x, or two
    that x is the sum of. Results are dense; one that is None is not wanted."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    row = program * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = row < rows
    lane = tl.arange(0, BLOCK_COLUMNS).to(row.dtype)
    count = tl.full((), columns, COMPUTE)
    mean = tl.zeros((BLOCK_ROWS,), COMPUTE)
    if LONG:
        # Welford's, each lane by itself; then the lanes are put together as Chan has it.
        centre = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), COMPUTE)
        square = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), COMPUTE)
        for start in range(0, columns, BLOCK_COLUMNS):
            column = start + lane
            inside = (column < columns)[None, :]
            mask = row_mask[:, None] & inside
            x = summed(
                ins, row, column, mask, kept_shape, row_shape, kept_strides, row_strides, COMPUTE
            )
            if CENTRED:
                seen = tl.full((), start // BLOCK_COLUMNS + 1, COMPUTE)
                distance = x - centre
                step = distance / seen
                centre = tl.where(inside, centre + step, centre)
                square = tl.where(inside, square + distance * (x - centre), square)
            else:
                square += x * x
        if CENTRED:
            steps = tl.cdiv(columns, BLOCK_COLUMNS)
            last = (steps - 1) * BLOCK_COLUMNS + lane < columns
            weight = tl.where(last, steps, steps - 1).to(COMPUTE)[None, :]
            mean = m.div(tl.sum(centre * weight, 1), count)
            # Once more, of what is left: the first sum is rounded as the numbers are large.
            mean += m.div(tl.sum((centre - mean[:, None]) * weight, 1), count)
            gap = centre - mean[:, None]
            square += gap * gap * weight
        total = tl.sum(square, 1)
        rstd = m.inverse(m.sqrt(m.div(total, count) + scalar(eps, COMPUTE)))
        for start in range(0, columns, BLOCK_COLUMNS):
            column = start + lane
            mask = row_mask[:, None] & (column < columns)[None, :]
            x = summed(
                ins, row, column, mask, kept_shape, row_shape, kept_strides, row_strides, COMPUTE
            )
            store_normed(
                y_ptr, sum_ptr, weight_ptr, bias_ptr, x, mean, rstd, row, column, mask, columns,
                CENTRED, COMPUTE,
            )  # fmt: skip
    else:
        mask = row_mask[:, None] & (lane < columns)[None, :]
        x = summed(ins, row, lane, mask, kept_shape, row_shape, kept_strides, row_strides, COMPUTE)
        centred = x
        if CENTRED:
            mean = m.div(tl.sum(x, 1), count)
            centred = tl.where((lane < columns)[None, :], x - mean[:, None], 0)
        total = tl.sum(centred * centred, 1)
        rstd = m.inverse(m.sqrt(m.div(total, count) + scalar(eps, COMPUTE)))
        store_normed(
            y_ptr, sum_ptr, weight_ptr, bias_ptr, x, mean, rstd, row, lane, mask, columns,
            CENTRED, COMPUTE,
        )  # fmt: skip
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean, mask=row_mask)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd, mask=row_mask)


@triton.jit
def statistics(mean_ptr, rstd_ptr, row, row_mask, COMPUTE: tl.constexpr):
    """Columns of both, 0 past the last row."""
    rstd = tl.load(rstd_ptr + row, mask=row_mask, other=0).to(COMPUTE)
    if mean_ptr is None:
        mean = tl.zeros_like(rstd)
    else:
        mean = tl.load(mean_ptr + row, mask=row_mask, other=0).to(COMPUTE)
    return mean[:, None], rstd[:, None]


@triton.jit
def average(x, count):
    """Of each row, which a tile has in full."""
    return m.div(tl.sum(x, 1), count)[:, None]


@triton.jit
def gradient(u, xh, eu, eux, rstd):
    return rstd * (u - eu - xh * eux)


@triton.jit
def norm_bwd(
    dx_ptr, dweight_ptr, dbias_ptr, mean_ptr, rstd_ptr, weight_ptr, ins,
    kept_shape, row_shape, kept_strides, row_strides, rows, columns,
    CENTRED: tl.constexpr, LONG: tl.constexpr, COMPUTE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """`ins` are g, x, and perhaps what is added to dx. `dweight_ptr` and `dbias_ptr` have a row for
    each program, and are None if LONG."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    if WIDE:
        program = program.to(tl.int64)
    lane = tl.arange(0, BLOCK_COLUMNS).to(program.dtype)
    count = tl.full((), columns, COMPUTE)
    if not LONG and weight_ptr is not None:
        weight = of_columns(weight_ptr, lane, columns, COMPUTE)
    if dweight_ptr is not None:
        dweight = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), COMPUTE)
    if dbias_ptr is not None:
        dbias = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), COMPUTE)
    for tile in range(program, tl.cdiv(rows, BLOCK_ROWS), programs):
        row = (tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(program.dtype)
        row_mask = row < rows
        mean, rstd = statistics(mean_ptr, rstd_ptr, row, row_mask, COMPUTE)
        if LONG:
            su = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), COMPUTE)
            sux = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), COMPUTE)
            for start in range(0, columns, BLOCK_COLUMNS):
                column = start + lane
                mask = row_mask[:, None] & (column < columns)[None, :]
                u = load_tile(
                    ins, 0, row, column, mask, kept_shape, row_shape, kept_strides, row_strides,
                    COMPUTE,
                )  # fmt: skip
                x = load_tile(
                    ins, 1, row, column, mask, kept_shape, row_shape, kept_strides, row_strides,
                    COMPUTE,
                )  # fmt: skip
                if weight_ptr is not None:
                    u = u * of_columns(weight_ptr, column, columns, COMPUTE)
                su += u
                sux += u * ((x - mean) * rstd)
            eux = average(sux, count)
            eu = average(su, count) if CENTRED else tl.zeros_like(eux)
            for start in range(0, columns, BLOCK_COLUMNS):
                column = start + lane
                mask = row_mask[:, None] & (column < columns)[None, :]
                u = load_tile(
                    ins, 0, row, column, mask, kept_shape, row_shape, kept_strides, row_strides,
                    COMPUTE,
                )  # fmt: skip
                x = load_tile(
                    ins, 1, row, column, mask, kept_shape, row_shape, kept_strides, row_strides,
                    COMPUTE,
                )  # fmt: skip
                if weight_ptr is not None:
                    u = u * of_columns(weight_ptr, column, columns, COMPUTE)
                dx = gradient(u, (x - mean) * rstd, eu, eux, rstd)
                if len(ins) == 3:
                    dx += load_tile(
                        ins, 2, row, column, mask, kept_shape, row_shape, kept_strides,
                        row_strides, COMPUTE,
                    )  # fmt: skip
                at = row[:, None] * columns + column[None, :]
                tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        else:
            mask = row_mask[:, None] & (lane < columns)[None, :]
            g = load_tile(
                ins, 0, row, lane, mask, kept_shape, row_shape, kept_strides, row_strides, COMPUTE
            )
            x = load_tile(
                ins, 1, row, lane, mask, kept_shape, row_shape, kept_strides, row_strides, COMPUTE
            )
            xh = (x - mean) * rstd
            if dweight_ptr is not None:
                dweight += g * xh
            if dbias_ptr is not None:
                dbias += g
            if dx_ptr is not None:
                u = g * weight if weight_ptr is not None else g
                eux = average(u * xh, count)
                eu = average(u, count) if CENTRED else tl.zeros_like(eux)
                dx = gradient(u, xh, eu, eux, rstd)
                if len(ins) == 3:
                    dx += load_tile(
                        ins, 2, row, lane, mask, kept_shape, row_shape, kept_strides, row_strides,
                        COMPUTE,
                    )  # fmt: skip
                at = row[:, None] * columns + lane[None, :]
                tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    at = program * columns + lane
    if dweight_ptr is not None:
        tl.store(dweight_ptr + at, tl.sum(dweight, 0), mask=lane < columns)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + at, tl.sum(dbias, 0), mask=lane < columns)
