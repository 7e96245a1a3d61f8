"""The gradient of the gradient of layer normalisation and root mean square normalisation.

The formulas are in norm.py. Of a row, seven averages are needed: those of v, u, t, v xh, u xh,
v u and t xh, of which the first three are not without centring.
"""

import triton
import triton.language as tl

from .norm import average, load_tile, of_columns, statistics


@triton.jit
def operands(
    ins, weight, p, mean, rstd, row, column, mask, kept_shape, row_shape, kept_strides, row_strides,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """v, g, u, t and xh; zeros for what is absent."""
    g = load_tile(
        ins, 1, row, column, mask, kept_shape, row_shape, kept_strides, row_strides, COMPUTE
    )
    x = load_tile(
        ins, 2, row, column, mask, kept_shape, row_shape, kept_strides, row_strides, COMPUTE
    )
    if ins[0] is None:
        v = tl.zeros_like(g)
    else:
        v = load_tile(
            ins, 0, row, column, mask, kept_shape, row_shape, kept_strides, row_strides, COMPUTE
        )
    return v, g, g * weight, g * p, tl.where(mask, (x - mean) * rstd, 0)


@triton.jit
def vector(ptr, column, columns, absent: tl.constexpr, COMPUTE: tl.constexpr):
    """One of weight, p and q as a row; None counts as `absent` throughout."""
    if ptr is None:
        found = tl.full((1, column.shape[0]), absent, COMPUTE)
    else:
        found = of_columns(ptr, column, columns, COMPUTE)
    return found


@triton.jit
def store_second(
    dg_ptr, dx_ptr, v, u, t, xh, weight, p, q, rstd, ev, eu, et, a, b, vu, d, row, column, mask,
    columns,
):  # fmt: skip
    at = row[:, None] * columns + column[None, :]
    pushed = rstd * (v - ev - xh * a)
    if dg_ptr is not None:
        dg = weight * pushed + p * xh + q
        tl.store(dg_ptr + at, dg.to(dg_ptr.dtype.element_ty), mask=mask)
    if dx_ptr is not None:
        bent = b * (v - ev) + a * (u - eu) + xh * (vu - ev * eu - 3 * a * b)
        dx = rstd * (t - et - xh * d) - rstd * rstd * bent
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    return pushed


@triton.jit
def norm_bwd_bwd(
    dg_ptr, dx_ptr, dweight_ptr, ev_ptr, evx_ptr, mean_ptr, rstd_ptr, weight_ptr, p_ptr, q_ptr, ins,
    kept_shape, row_shape, kept_strides, row_strides, rows, columns,
    CENTRED: tl.constexpr, LONG: tl.constexpr, COMPUTE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """`ins` are v, g and x, the first perhaps None. `dweight_ptr` has a row for each program; if
    LONG it is None, and E v and E[v xh] are stored for the sum over rows that follows."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    if WIDE:
        program = program.to(tl.int64)
    lane = tl.arange(0, BLOCK_COLUMNS).to(program.dtype)
    count = tl.full((), columns, COMPUTE)
    if dweight_ptr is not None:
        dweight = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), COMPUTE)
    if not LONG:
        weight = vector(weight_ptr, lane, columns, 1, COMPUTE)
        p = vector(p_ptr, lane, columns, 0, COMPUTE)
        q = vector(q_ptr, lane, columns, 0, COMPUTE)
    for tile in range(program, tl.cdiv(rows, BLOCK_ROWS), programs):
        row = (tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(program.dtype)
        row_mask = row < rows
        mean, rstd = statistics(mean_ptr, rstd_ptr, row, row_mask, COMPUTE)
        if LONG:
            none = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), COMPUTE)
            sv, su, st, sa, sb, svu, sd = none, none, none, none, none, none, none
            for start in range(0, columns, BLOCK_COLUMNS):
                column = start + lane
                mask = row_mask[:, None] & (column < columns)[None, :]
                weight = vector(weight_ptr, column, columns, 1, COMPUTE)
                p = vector(p_ptr, column, columns, 0, COMPUTE)
                v, g, u, t, xh = operands(
                    ins, weight, p, mean, rstd, row, column, mask, kept_shape, row_shape,
                    kept_strides, row_strides, COMPUTE,
                )  # fmt: skip
                sv += v
                su += u
                st += t
                sa += v * xh
                sb += u * xh
                svu += v * u
                sd += t * xh
            a, b = average(sa, count), average(sb, count)
            vu, d = average(svu, count), average(sd, count)
            ev, eu, et = tl.zeros_like(a), tl.zeros_like(a), tl.zeros_like(a)
            if CENTRED:
                ev, eu, et = average(sv, count), average(su, count), average(st, count)
            for start in range(0, columns, BLOCK_COLUMNS):
                column = start + lane
                mask = row_mask[:, None] & (column < columns)[None, :]
                weight = vector(weight_ptr, column, columns, 1, COMPUTE)
                p = vector(p_ptr, column, columns, 0, COMPUTE)
                q = vector(q_ptr, column, columns, 0, COMPUTE)
                v, g, u, t, xh = operands(
                    ins, weight, p, mean, rstd, row, column, mask, kept_shape, row_shape,
                    kept_strides, row_strides, COMPUTE,
                )  # fmt: skip
                store_second(
                    dg_ptr, dx_ptr, v, u, t, xh, weight, p, q, rstd, ev, eu, et, a, b, vu, d, row,
                    column, mask, columns,
                )  # fmt: skip
            if ev_ptr is not None:
                tl.store(ev_ptr + row[:, None], ev, mask=row_mask[:, None])
                tl.store(evx_ptr + row[:, None], a, mask=row_mask[:, None])
        else:
            mask = row_mask[:, None] & (lane < columns)[None, :]
            v, g, u, t, xh = operands(
                ins, weight, p, mean, rstd, row, lane, mask, kept_shape, row_shape,
                kept_strides, row_strides, COMPUTE,
            )  # fmt: skip
            a, b = average(v * xh, count), average(u * xh, count)
            vu, d = average(v * u, count), average(t * xh, count)
            ev, eu, et = tl.zeros_like(a), tl.zeros_like(a), tl.zeros_like(a)
            if CENTRED:
                ev, eu, et = average(v, count), average(u, count), average(t, count)
            pushed = store_second(
                dg_ptr, dx_ptr, v, u, t, xh, weight, p, q, rstd, ev, eu, et, a, b, vu, d, row,
                lane, mask, columns,
            )  # fmt: skip
            if dweight_ptr is not None:
                dweight += g * pushed
    if dweight_ptr is not None:
        at = program * columns + lane
        tl.store(dweight_ptr + at, tl.sum(dweight, 0), mask=lane < columns)


# MAP of the sums over rows where they are long: of dw and db, and of g r P v.


@triton.jit
def centred_weight(g, x, rstd, mean):
    return (g * ((x - mean) * rstd),)


@triton.jit
def weight(g, x, rstd):
    return (g * (x * rstd),)


@triton.jit
def weight_and_bias(g, x, rstd, mean):
    return g * ((x - mean) * rstd), g


@triton.jit
def centred_weight_second(g, v, x, rstd, evx, mean, ev):
    return (g * (rstd * (v - ev - (x - mean) * rstd * evx)),)


@triton.jit
def weight_second(g, v, x, rstd, evx):
    return (g * (rstd * (v - x * rstd * evx)),)


@triton.jit
def add_two(x1, y1, x2, y2):
    return x1 + x2, y1 + y2
