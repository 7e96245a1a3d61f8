"""Gradients of attention's tangent along its primals, which are attention's second derivatives:
formulas and notation are in attention.py, the passes those of attention_backward.py. Tangents `t`
of an input are None where they are 0.
"""

import triton
import triton.language as tl

from .attention import (
    addend,
    again,
    dot,
    exponent,
    head_if,
    head_of,
    kept,
    number_of,
    paired,
    power,
    product,
    put,
    scores,
    seen,
    tile,
    vector,
    walk,
)
from .attention_backward import member
from .pointwise import scalar


@triton.jit
def attention_jvp_bwd_q(
    dq, dslope_ptr, g, q, k, v, tangents, rows, extras, about,
    PRECISION: tl.constexpr, FAST: tl.constexpr, UNSCALED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    tq, tk, tv, tmask, _, tslopes = tangents
    shift_ptr, delta_ptr, mu_ptr, omega_ptr = rows
    mask, slopes, seed_ptr, segments = extras[0], extras[1], extras[3], extras[4]
    batch_shape, heads, group, L, S, D, DV, scale, softcap, down, up, dropout = about
    tiles = tl.cdiv(L, BLOCK_M)
    matrix = tl.program_id(0) // tiles
    batch, head = matrix // heads, matrix % heads
    matrix = matrix.to(tl.int64)
    start = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    if WIDE:
        start = start.to(tl.int64)
    i = start + tl.arange(0, BLOCK_M)
    c, cv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    k = head_of(k, batch, head // group, batch_shape)
    v = head_of(v, batch, head // group, batch_shape)
    tk = head_if(tk, batch, head // group, batch_shape)
    tv = head_if(tv, batch, head // group, batch_shape)
    mask = head_if(mask, batch, head, batch_shape)
    tmask = head_if(tmask, batch, head, batch_shape)
    q = head_of(q, batch, head, batch_shape)
    g = head_of(g, batch, head, batch_shape)
    queries, grads = tile(q, i, c, L, D), tile(g, i, cv, L, DV)
    LEAN: tl.constexpr = not FAST and BLOCK_D > 64
    LEANER: tl.constexpr = not FAST and BLOCK_D > 128
    if tq is not None:
        tq = head_of(tq, batch, head, batch_shape)
        tqueries = tile(tq, i, c, L, D)
    ACC: tl.constexpr = shift_ptr.dtype.element_ty
    slope = number_of(slopes, batch, head, batch_shape, ACC)
    tslope = number_of(tslopes, batch, head, batch_shape, ACC)
    shift = vector(shift_ptr, matrix, i, L)
    delta = vector(delta_ptr, matrix, i, L)
    mu = vector(mu_ptr, matrix, i, L)
    omega = vector(omega_ptr, matrix, i, L)

    sides = L, S, down, up, segments
    lo, hi, at = seen(i, L, S, down, up, segments)
    first, inner, inner_end, end = walk(start, lo, hi, sides, BLOCK_M, BLOCK_N)
    if dq is not None:
        acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    if dslope_ptr is not None:
        steps = tl.zeros((BLOCK_M,), ACC)
    for edges in tl.static_range(2):
        count = end - first - (inner_end - inner) if edges else inner_end - inner
        for step in range(0, count):
            block = inner + step
            if edges:
                block = tl.where(
                    first + step < inner, first + step, inner_end + step - inner + first
                )
            j = block * BLOCK_N + tl.arange(0, BLOCK_N)
            ENDS = S if edges else None
            keys = tile(k, j, c, ENDS, D)
            inside = ((i < L)[:, None] & (j < S)[None, :]) if edges else None
            s, steep, bent = scores(
                product(again(queries, q, i, c, L, D, LEANER), keys, PRECISION),
                i[:, None], j[None, :], at[:, None] - j[None, :], mask, slope, scale, softcap,
                inside, UNSCALED,
            )  # fmt: skip
            p = power(exponent(s, scale, FAST, UNSCALED) - shift[:, None], FAST)
            if edges:
                p = tl.where(paired(j[None, :], lo[:, None], hi[:, None], sides), p, 0)
            y = tl.zeros((BLOCK_M, BLOCK_N), ACC)
            if tq is not None:
                y = dot(again(tqueries, tq, i, c, L, D, LEAN), tl.trans(keys), y, PRECISION)
            if tk is not None:
                tkeys = tile(tk, j, c, ENDS, D)
                y = dot(again(queries, q, i, c, L, D, LEANER), tl.trans(tkeys), y, PRECISION)
            y *= scalar(scale, ACC)
            t = y * steep
            if tmask is not None:
                t += addend(tmask, i[:, None], j[None, :], inside).to(ACC)
            if tslopes is not None:
                t -= tslope * tl.abs(at[:, None] - j[None, :]).to(ACC)
            held = again(grads, g, i, cv, L, DV, LEANER)
            e = product(held, tile(v, j, cv, ENDS, DV), PRECISION)
            if seed_ptr is not None:
                keep = kept(seed_ptr, dropout, matrix, i[:, None], j[None, :], ACC)
                e *= keep
            e -= delta[:, None]
            w = (t - mu[:, None]) * e - omega[:, None]
            if tv is not None:
                held = again(grads, g, i, cv, L, DV, LEANER)
                f = product(held, tile(tv, j, cv, ENDS, DV), PRECISION)
                if seed_ptr is not None:
                    f *= keep
                w += f
            w *= p
            if dslope_ptr is not None:
                steps -= tl.sum(w * tl.abs(at[:, None] - j[None, :]).to(ACC), 1)
            if dq is not None:
                r = p * e
                dz = w * steep
                if softcap is not None:
                    dz += r * bent * y
                acc = dot(dz.to(keys.dtype), keys, acc, PRECISION)
                if tk is not None:
                    acc = dot((r * steep).to(tkeys.dtype), tkeys, acc, PRECISION)
    if dq is not None:
        put(head_of(dq, batch, head, batch_shape), acc * scalar(scale, ACC), i, c, L, D)
    if dslope_ptr is not None:
        tl.store(dslope_ptr + matrix * L + i, steps, mask=i < L)


@triton.jit
def attention_jvp_bwd_kv(
    dk, dv, g, q, k, v, tangents, rows, extras, about,
    PRECISION: tl.constexpr, FAST: tl.constexpr, UNSCALED: tl.constexpr, WIDE: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Blocks of pairs are keys by queries, as in `attention_bwd_kv`. What is not wanted of dk and
    dv is None."""
    tq, tk, tv, tmask, _, tslopes = tangents
    shift_ptr, delta_ptr, mu_ptr, omega_ptr = rows
    mask, slopes, seed_ptr, segments = extras[0], extras[1], extras[3], extras[4]
    batch_shape, heads, group, L, S, D, DV, scale, softcap, down, up, dropout = about
    tiles = tl.cdiv(S, BLOCK_N)
    shared = tl.program_id(0) // tiles
    batch, key_head = shared // (heads // group), shared % (heads // group)
    start = tl.program_id(0) % tiles * BLOCK_N
    if WIDE:
        start = start.to(tl.int64)
    j = start + tl.arange(0, BLOCK_N)
    c, cv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    k, v = head_of(k, batch, key_head, batch_shape), head_of(v, batch, key_head, batch_shape)
    keys = tile(k, j, c, S, D)
    if dk is not None:
        values = tile(v, j, cv, S, DV)
    LEAN: tl.constexpr = not FAST and BLOCK_D > 64
    if tk is not None:
        tk = head_of(tk, batch, key_head, batch_shape)
        tkeys = tile(tk, j, c, S, D)
    if tv is not None and dk is not None:
        tv = head_of(tv, batch, key_head, batch_shape)
        tvalues = tile(tv, j, cv, S, DV)
    ACC: tl.constexpr = shift_ptr.dtype.element_ty

    sides = S, L, up, down, segments
    lo, hi, at = seen(j, S, L, up, down, segments)
    first, inner, inner_end, end = walk(start, lo, hi, sides, BLOCK_N, BLOCK_M)
    dkeys = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    dvalues = tl.zeros((BLOCK_N, BLOCK_DV), ACC)
    for edges in tl.static_range(2):
        count = end - first - (inner_end - inner) if edges else inner_end - inner
        for turn in range(0, count * group if SHARED else count):
            head, step = member(turn, count, key_head, group, SHARED)
            matrix = (batch * heads + head).to(tl.int64)
            queries_of = head_of(q, batch, head, batch_shape)
            tqueries_of = head_if(tq, batch, head, batch_shape)
            grads_of = head_of(g, batch, head, batch_shape)
            mask_here = head_if(mask, batch, head, batch_shape)
            tmask_here = head_if(tmask, batch, head, batch_shape)
            slope = number_of(slopes, batch, head, batch_shape, ACC)
            tslope = number_of(tslopes, batch, head, batch_shape, ACC)
            block = inner + step
            if edges:
                block = tl.where(
                    first + step < inner, first + step, inner_end + step - inner + first
                )
            i = block * BLOCK_M + tl.arange(0, BLOCK_M)
            ENDS = L if edges else None
            queries = tile(queries_of, i, c, ENDS, D)
            grads = tile(grads_of, i, cv, ENDS, DV)
            inside = ((j < S)[:, None] & (i < L)[None, :]) if edges else None
            s, steep, bent = scores(
                product(again(keys, k, j, c, S, D, LEAN), queries, PRECISION),
                i[None, :], j[:, None], at[:, None] - i[None, :],
                mask_here, slope, scale, softcap, inside, UNSCALED,
            )  # fmt: skip
            shift = vector(shift_ptr, matrix, i, L, not edges)[None, :]
            p = power(exponent(s, scale, FAST, UNSCALED) - shift, FAST)
            if edges:
                p = tl.where(paired(i[None, :], lo[:, None], hi[:, None], sides), p, 0)
            y = tl.zeros((BLOCK_N, BLOCK_M), ACC)
            if tq is not None:
                tqueries = tile(tqueries_of, i, c, ENDS, D)
                held = again(keys, k, j, c, S, D, LEAN)
                y = dot(held, tl.trans(tqueries), y, PRECISION)
            if tk is not None:
                held = again(tkeys, tk, j, c, S, D, LEAN)
                y = dot(held, tl.trans(queries), y, PRECISION)
            y *= scalar(scale, ACC)
            x = y * steep - vector(mu_ptr, matrix, i, L, not edges)[None, :]
            if tmask is not None:
                x += addend(tmask_here, i[None, :], j[:, None], inside).to(ACC)
            if tslopes is not None:
                x -= tslope * tl.abs(at[:, None] - i[None, :]).to(ACC)
            if seed_ptr is not None:
                keep = kept(seed_ptr, dropout, matrix, i[None, :], j[:, None], ACC)
            if dv is not None:
                px = p * x
                if seed_ptr is not None:
                    px *= keep
                dvalues = dot(px.to(grads.dtype), grads, dvalues, PRECISION)
            if dk is not None:
                e = product(again(values, v, j, cv, S, DV, LEAN), grads, PRECISION)
                if seed_ptr is not None:
                    e *= keep
                e -= vector(delta_ptr, matrix, i, L, not edges)[None, :]
                w = x * e - vector(omega_ptr, matrix, i, L, not edges)[None, :]
                if tv is not None:
                    f = product(again(tvalues, tv, j, cv, S, DV, LEAN), grads, PRECISION)
                    if seed_ptr is not None:
                        f *= keep
                    w += f
                r = p * e
                dz = p * w * steep
                if softcap is not None:
                    dz += r * bent * y
                dkeys = dot(dz.to(queries.dtype), queries, dkeys, PRECISION)
                if tq is not None:
                    dkeys = dot((r * steep).to(tqueries.dtype), tqueries, dkeys, PRECISION)
    if dk is not None:
        put(head_of(dk, batch, key_head, batch_shape), dkeys * scalar(scale, ACC), j, c, S, D)
    if dv is not None:
        put(head_of(dv, batch, key_head, batch_shape), dvalues, j, cv, S, DV)
