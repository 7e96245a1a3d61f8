"""Gradients of attention: formulas and notation are in attention.py.

Three passes, each of which computes the probabilities again from lse and owns what it writes: a
block of queries sums over keys, a block of keys over queries (of all heads that share them), a
block of the mask over whatever it was broadcast along. No two programs add to one number, so that
runs give the same bits.
"""

import triton
import triton.language as tl

from .attention import (
    addend,
    again,
    dot,
    exponent,
    finite,
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
from .pointwise import scalar


@triton.jit
def attention_rows(
    shift_ptr, delta_ptr, omega_ptr, dsink_ptr, g, h_ptr, out, tangent, lse_ptr, mu_ptr,
    sinks, tsinks, batch_shape, heads, L, DV,
    FAST: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """What all pairs of a query share: what to subtract from their exponents, delta, omega if there
    is a tangent, and each query's part in the gradient of its head's sink."""
    tiles = tl.cdiv(L, BLOCK_M)
    matrix = tl.program_id(0) // tiles
    batch, head = matrix // heads, matrix % heads
    matrix = matrix.to(tl.int64)
    i = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    if WIDE:
        i = i.to(tl.int64)
    cv = tl.arange(0, BLOCK_DV)
    ACC: tl.constexpr = delta_ptr.dtype.element_ty
    grads = tile(head_of(g, batch, head, batch_shape), i, cv, L, DV).to(ACC)
    o = tile(head_of(out, batch, head, batch_shape), i, cv, L, DV).to(ACC)
    delta = tl.sum(grads * o, 1)
    if h_ptr is not None:
        delta -= vector(h_ptr, matrix, i, L)
    tl.store(delta_ptr + matrix * L + i, delta, mask=i < L)
    shift = finite(vector(lse_ptr, matrix, i, L), FAST)
    tl.store(shift_ptr + matrix * L + i, shift, mask=i < L)
    slope = -delta
    if omega_ptr is not None:
        t = tile(head_of(tangent, batch, head, batch_shape), i, cv, L, DV).to(ACC)
        omega = tl.sum(grads * t, 1)
        tl.store(omega_ptr + matrix * L + i, omega, mask=i < L)
        x = -vector(mu_ptr, matrix, i, L)
        if tsinks is not None:
            x += number_of(tsinks, batch, head, batch_shape, ACC)
        slope = -x * delta - omega
    if dsink_ptr is not None:
        sink = exponent(number_of(sinks, batch, head, batch_shape, ACC), None, FAST, False)
        tl.store(dsink_ptr + matrix * L + i, power(sink - shift, FAST) * slope, mask=i < L)


@triton.jit
def attention_bwd_q(
    dq, dslope_ptr, g, q, k, v, rows, extras, about,
    PRECISION: tl.constexpr, FAST: tl.constexpr, UNSCALED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Of each query dq, and its part in the gradient of its head's slope; what is not wanted is
    None. `rows` are numbers of each query: lse as an exponent, delta, and for second derivatives mu
    and omega."""
    shift_ptr, delta_ptr = rows[0], rows[1]
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
    mask = head_if(mask, batch, head, batch_shape)
    q, g = head_of(q, batch, head, batch_shape), head_of(g, batch, head, batch_shape)
    queries, grads = tile(q, i, c, L, D), tile(g, i, cv, L, DV)
    ACC: tl.constexpr = shift_ptr.dtype.element_ty
    # Of float64, at as many warps, it spills less to hold them.
    LEAN: tl.constexpr = not FAST and ACC == tl.float32 and BLOCK_D > 128
    slope = number_of(slopes, batch, head, batch_shape, ACC)
    shift = vector(shift_ptr, matrix, i, L)
    delta = vector(delta_ptr, matrix, i, L)

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
            values = tile(v, j, cv, ENDS, DV)
            inside = ((i < L)[:, None] & (j < S)[None, :]) if edges else None
            s, steep, _ = scores(
                product(again(queries, q, i, c, L, D, LEAN), keys, PRECISION),
                i[:, None], j[None, :], at[:, None] - j[None, :], mask, slope, scale, softcap,
                inside, UNSCALED,
            )  # fmt: skip
            p = power(exponent(s, scale, FAST, UNSCALED) - shift[:, None], FAST)
            if edges:
                p = tl.where(paired(j[None, :], lo[:, None], hi[:, None], sides), p, 0)
            e = product(again(grads, g, i, cv, L, DV, LEAN), values, PRECISION)
            if seed_ptr is not None:
                e *= kept(seed_ptr, dropout, matrix, i[:, None], j[None, :], ACC)
            r = p * (e - delta[:, None])
            if dslope_ptr is not None:
                steps -= tl.sum(r * tl.abs(at[:, None] - j[None, :]).to(ACC), 1)
            if dq is not None:
                acc = dot((r * steep).to(keys.dtype), keys, acc, PRECISION)
    if dq is not None:
        put(head_of(dq, batch, head, batch_shape), acc * scalar(scale, ACC), i, c, L, D)
    if dslope_ptr is not None:
        tl.store(dslope_ptr + matrix * L + i, steps, mask=i < L)


@triton.jit
def member(turn, count, key_head, group, SHARED: tl.constexpr):
    """Of a loop over all heads that share one of keys, `count` steps of each: whose step it is, and
    which. In one loop what is loaded ahead is the next head's, too, and held in fewer registers."""
    if SHARED:
        return key_head * group + turn // count, turn % count
    else:
        return key_head, turn


@triton.jit
def attention_bwd_kv(
    dk, dv, g, q, k, v, rows, extras, about,
    PRECISION: tl.constexpr, FAST: tl.constexpr, UNSCALED: tl.constexpr, WIDE: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Blocks of pairs are keys by queries here: what multiplies gradients and queries needs no
    transposition. `segments` are those of keys; what is not wanted of dk and dv is None."""
    shift_ptr, delta_ptr = rows[0], rows[1]
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
    keys, values = tile(k, j, c, S, D), tile(v, j, cv, S, DV)
    ACC: tl.constexpr = shift_ptr.dtype.element_ty
    LEAN: tl.constexpr = not FAST and ACC == tl.float32 and BLOCK_D > 128

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
            grads_of = head_of(g, batch, head, batch_shape)
            mask_here = head_if(mask, batch, head, batch_shape)
            slope = number_of(slopes, batch, head, batch_shape, ACC)
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
            s, steep, _ = scores(
                product(again(keys, k, j, c, S, D, LEAN), queries, PRECISION),
                i[None, :], j[:, None], at[:, None] - i[None, :],
                mask_here, slope, scale, softcap, inside, UNSCALED,
            )  # fmt: skip
            shift = vector(shift_ptr, matrix, i, L, not edges)[None, :]
            p = power(exponent(s, scale, FAST, UNSCALED) - shift, FAST)
            if edges:
                p = tl.where(paired(i[None, :], lo[:, None], hi[:, None], sides), p, 0)
            if seed_ptr is not None:
                keep = kept(seed_ptr, dropout, matrix, i[None, :], j[:, None], ACC)
            if dv is not None:
                dropped = p
                if seed_ptr is not None:
                    dropped *= keep
                dvalues = dot(dropped.to(grads.dtype), grads, dvalues, PRECISION)
            if dk is not None:
                e = product(again(values, v, j, cv, S, DV, LEAN), grads, PRECISION)
                if seed_ptr is not None:
                    e *= keep
                r = p * (e - vector(delta_ptr, matrix, i, L, not edges)[None, :]) * steep
                dkeys = dot(r.to(queries.dtype), queries, dkeys, PRECISION)
    if dk is not None:
        put(head_of(dk, batch, key_head, batch_shape), dkeys * scalar(scale, ACC), j, c, S, D)
    if dv is not None:
        put(head_of(dv, batch, key_head, batch_shape), dvalues, j, cv, S, DV)


@triton.jit
def attention_bwd_mask(
    dmask, g, q, k, v, tangents, rows, extras, about,
    own_heads, own_L, own_S, shared_by,
    SHARED_BATCH: tl.constexpr, SHARED_HEADS: tl.constexpr, SHARED_L: tl.constexpr,
    SHARED_S: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, UNSCALED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """r of a block of the mask, or w where there is a `mu`, summed over all that shares it."""
    tq, tk, tv, tmask, tslopes = tangents[0], tangents[1], tangents[2], tangents[3], tangents[5]
    shift_ptr, delta_ptr, mu_ptr, omega_ptr = rows
    mask, slopes, seed_ptr, segments = extras[0], extras[1], extras[3], extras[4]
    batch_shape, heads, group, L, S, D, DV, scale, softcap, down, up, dropout = about
    own_tiles_j = tl.cdiv(own_S, BLOCK_N)
    own_tiles = tl.cdiv(own_L, BLOCK_M) * own_tiles_j
    own = (tl.program_id(0) // own_tiles).to(tl.int64)
    own_i = tl.program_id(0) % own_tiles // own_tiles_j
    own_j = tl.program_id(0) % own_tiles % own_tiles_j
    c, cv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    ACC: tl.constexpr = shift_ptr.dtype.element_ty
    LEAN: tl.constexpr = not FAST and ACC == tl.float32 and BLOCK_D > 128
    count_i = tl.cdiv(L, BLOCK_M) if SHARED_L else 1
    count_j = tl.cdiv(S, BLOCK_N) if SHARED_S else 1
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    batch = own // own_heads
    head = own % own_heads
    for sharer in range(0, shared_by):
        # Of each dimension of the batch, the index is the mask's own or the sharer's.
        rest, other = own // own_heads, sharer
        head = own % own_heads
        if SHARED_HEADS:
            head = (other % heads).to(tl.int64)
            other = other // heads
        batch, step = own * 0, 1
        for d in tl.static_range(len(batch_shape)):
            if SHARED_BATCH[d]:
                batch += other % batch_shape[d] * step
                other = other // batch_shape[d]
            else:
                batch += rest % batch_shape[d] * step
                rest = rest // batch_shape[d]
            step = step * batch_shape[d]
        matrix = batch * heads + head
        slope = number_of(slopes, batch, head, batch_shape, ACC)
        for block_i in range(0, count_i):
            i = (own_i + block_i) * BLOCK_M + tl.arange(0, BLOCK_M)
            if WIDE:
                i = i.to(tl.int64)
            queries = tile(head_of(q, batch, head, batch_shape), i, c, L, D)
            grads = tile(head_of(g, batch, head, batch_shape), i, cv, L, DV)
            shift = vector(shift_ptr, matrix, i, L)
            delta = vector(delta_ptr, matrix, i, L)
            sides = L, S, down, up, segments
            lo, hi, at = seen(i, L, S, down, up, segments)
            for block_j in range(0, count_j):
                j = (own_j + block_j) * BLOCK_N + tl.arange(0, BLOCK_N)
                inside = (i < L)[:, None] & (j < S)[None, :]
                keys = tile(head_of(k, batch, head // group, batch_shape), j, c, S, D)
                s, steep, _ = scores(
                    product(queries, keys, PRECISION), i[:, None], j[None, :],
                    at[:, None] - j[None, :], head_if(mask, batch, head, batch_shape),
                    slope, scale, softcap, inside, UNSCALED,
                )  # fmt: skip
                p = power(exponent(s, scale, FAST, UNSCALED) - shift[:, None], FAST)
                p = tl.where(paired(j[None, :], lo[:, None], hi[:, None], sides), p, 0)
                values = tile(head_of(v, batch, head // group, batch_shape), j, cv, S, DV)
                held = again(grads, head_of(g, batch, head, batch_shape), i, cv, L, DV, LEAN)
                e = product(held, values, PRECISION)
                if seed_ptr is not None:
                    keep = kept(seed_ptr, dropout, matrix, i[:, None], j[None, :], ACC)
                    e *= keep
                x = e - delta[:, None]
                if mu_ptr is not None:
                    t = tl.zeros((BLOCK_M, BLOCK_N), ACC)
                    if tq is not None:
                        tqueries = tile(head_of(tq, batch, head, batch_shape), i, c, L, D)
                        t = dot(tqueries, tl.trans(keys), t, PRECISION)
                    if tk is not None:
                        tkeys = tile(head_of(tk, batch, head // group, batch_shape), j, c, S, D)
                        t = dot(queries, tl.trans(tkeys), t, PRECISION)
                    t *= scalar(scale, ACC) * steep
                    if tmask is not None:
                        there = head_if(tmask, batch, head, batch_shape)
                        t += addend(there, i[:, None], j[None, :], inside).to(ACC)
                    if tslopes is not None:
                        tslope = number_of(tslopes, batch, head, batch_shape, ACC)
                        t -= tslope * tl.abs(at[:, None] - j[None, :]).to(ACC)
                    x *= t - vector(mu_ptr, matrix, i, L)[:, None]
                    x -= vector(omega_ptr, matrix, i, L)[:, None]
                    if tv is not None:
                        tvalues = tile(head_of(tv, batch, head // group, batch_shape), j, cv, S, DV)
                        f = product(grads, tvalues, PRECISION)
                        if seed_ptr is not None:
                            f *= keep
                        x += f
                acc += p * x
    if SHARED_L:
        acc = tl.zeros_like(acc) + tl.sum(acc, 0)[None, :]
    if SHARED_S:
        acc = tl.zeros_like(acc) + tl.sum(acc, 1)[:, None]
    i = own_i * BLOCK_M + tl.arange(0, BLOCK_M)
    if WIDE:
        i = i.to(tl.int64)
    j = own_j * BLOCK_N + tl.arange(0, BLOCK_N)
    put(head_of(dmask, batch, head, batch_shape), acc, i, j, own_L, own_S)
