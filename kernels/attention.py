"""Attention: the value, and its tangent. Gradients are in attention_backward.py and
attention_second.py, which share this notation.

Of a query i and a key j, z = scale q_i . k_j, capped to u = c tanh(z / c) if there is a cap, and
s = u + bias - slope |i - j|, or -inf where j is hidden from i. With a sink, one more logit per
head without a value, rows are

    lse_i = log sum_j exp s_ij      p_ij = exp(s_ij - lse_i)      o_i = sum_j D_ij p_ij v_j

where D is 1, or dropout's 0 or 1 / (1 - probability). A tangent marked ', t = ds:

    y = scale (q'_i . k_j + q_i . k'_j)    t = u'(z) y + bias' - slope' |i - j|
    u' = 1 - (u / c)^2
    mu_i = lse'_i = sum_j p t              o'_i = sum_j D p (t v_j + v'_j) - mu_i o_i

Gradients for cotangents g of o and h of lse, with e = D g_i . v_j and delta_i = g_i . o_i - h_i:

    r = dL/ds = p (e - delta)              dq_i = scale sum_j u' r k_j
    dv_j = sum_i D p g_i                   dk_j = scale sum_i u' r q_i       dbias = r
    dslope = -sum_ij r |i - j|

Those of <g, o'> + <h, mu>, the tangent's. Along q', k', v' they are the gradients above, because
the tangent is linear in them. Along q, k, v, with f = D g_i . v'_j and omega_i = g_i . o'_i:

    w = dL/ds = p ((t - mu) (e - delta) + f - omega)         dL/dy = u' r
    dz = u' w + u'' r y       u'' = -2 u' u / c^2            dbias = w    dslope = -sum w |i - j|
    dq_i = scale sum_j (dz k_j + u' r k'_j)    dk_j = scale sum_i (dz q_i + u' r q'_i)
    dv_j = sum_i D p (t - mu) g_i

Because <gg, vjp(g)> = <g, jvp(gg)>, those are the second derivatives, too: of the gradient, for
cotangents q', k', v' of it, along g (that is o', and mu along h) and along q, k, v; and its tangent
in the direction q', k', v'. So four sets of kernels are all first and second derivatives there are.

A sink is a key with e = f = 0, of which only t and the gradient are the caller's.

Every kernel holds one block of queries (or of keys) and walks along the other; nothing of the size
of all pairs is stored. Rows of which all keys are hidden are 0, their lse -inf, as torch's are.
"""

import triton
import triton.language as tl

from . import math as m
from .math import libdevice
from .pointwise import scalar

INF = tl.constexpr(float("inf"))
LOG2E = tl.constexpr(1.4426950408889634)

# The interpreter's dot reads the bits of bfloat16 as integers, see matmul.py.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def head_of(operand, batch, head, batch_shape):
    """One matrix of an operand, which is (pointer, batch strides, head stride, row stride, column
    stride): its pointer, and the last two. `batch_shape` is innermost first."""
    ptr, batch_strides, stride_head, stride_row, stride_col = operand
    for d in tl.static_range(len(batch_shape)):
        ptr += (batch % batch_shape[d]).to(tl.int64) * batch_strides[d]
        batch = batch // batch_shape[d]
    return ptr + head.to(tl.int64) * stride_head, stride_row, stride_col


@triton.jit
def tile(matrix, rows, cols, ROWS, COLS, AGAIN: tl.constexpr = False):
    """A block of a matrix, 0 past its ends; where ROWS or COLS is None, there is no end in it.
    AGAIN: in every step of a loop."""
    ptr, stride_row, stride_col = matrix
    ptrs = ptr + (rows[:, None] * stride_row + cols[None, :] * stride_col)
    if ROWS is None:
        if COLS is None:
            return tl.load(ptrs, volatile=AGAIN)
        else:
            return tl.load(ptrs, mask=(cols < COLS)[None, :], other=0, volatile=AGAIN)
    elif COLS is None:
        return tl.load(ptrs, mask=(rows < ROWS)[:, None], other=0, volatile=AGAIN)
    else:
        inside = (rows < ROWS)[:, None] & (cols < COLS)[None, :]
        return tl.load(ptrs, mask=inside, other=0, volatile=AGAIN)


@triton.jit
def again(block, matrix, rows, cols, ROWS, COLS, LEAN: tl.constexpr):
    """A block that a program holds through a loop; if LEAN, loaded in every step instead: without
    tensor cores each thread would hold whole rows of it in registers, which are too few."""
    if LEAN:
        return tile(matrix, rows, cols, ROWS, COLS, True)
    else:
        return block


@triton.jit
def put(matrix, block, rows, cols, ROWS, COLS):
    """Store a block into a matrix."""
    ptr, stride_row, stride_col = matrix
    ptrs = ptr + (rows[:, None] * stride_row + cols[None, :] * stride_col)
    inside = (rows < ROWS)[:, None]
    if COLS is not None:
        inside = inside & (cols < COLS)[None, :]
    tl.store(ptrs, block.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    if _INTERPRETED and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a times b transposed, in the type to accumulate in."""
    ACC: tl.constexpr = tl.float64 if a.dtype == tl.float64 else tl.float32
    return dot(a, tl.trans(b), tl.zeros((a.shape[0], b.shape[0]), ACC), PRECISION)


@triton.jit
def exponent(x, scale, FAST: tl.constexpr, UNSCALED: tl.constexpr):
    """Scores as exponents: of two, if FAST, for what is rounded to half precision anyway. UNSCALED
    are products whose `scale` is still to come, in one instruction with what is subtracted."""
    if UNSCALED:
        return x * (scalar(scale, tl.float32) * LOG2E)
    elif FAST:
        return x * LOG2E
    else:
        return x


@triton.jit
def power(exponents, FAST: tl.constexpr):
    if FAST:
        return tl.exp2(exponents)
    else:
        return libdevice.exp(exponents)


@triton.jit
def highest(top):
    """What to subtract from scores: where all are -inf, anything but that; where one is inf, what
    leaves it inf, and NaN NaN: lse is inf unless one is NaN."""
    return tl.where(top == -INF, 0.0, tl.where(top == INF, 1e38, top))


@triton.jit
def finite(lse, FAST: tl.constexpr):
    """What to subtract from exponents once lse is known: NaN for inf, as p is."""
    shift = tl.where(lse == -INF, 0.0, tl.where(lse == INF, float("nan"), lse))
    return exponent(shift, None, FAST, False)


@triton.jit
def seen(i, own, others, reach_down, reach_up, segments):
    """Which of the others each of a block's own indices is paired with: from `lo` to `hi`, and
    where among them its diagonal is. Indices past the end have no pair.

    Within a band, queries look `reach_down` keys back and `reach_up` ahead; keys look the other way
    round. In packed batches, `segments` has for each index where its sequence begins and ends among
    the others, and how much later it is there.
    """
    at = tl.minimum(i, own - 1)
    lo, hi = at * 0, at * 0 + others
    if segments is not None:
        starts, ends, shifts = segments
        lo, hi = tl.load(starts + at).to(at.dtype), tl.load(ends + at).to(at.dtype)
        at = at + tl.load(shifts + at).to(at.dtype)
    first, last = lo, hi
    if reach_down is not None:
        lo = tl.minimum(tl.maximum(lo, at - reach_down), last)
    if reach_up is not None:
        hi = tl.maximum(tl.minimum(hi, at + reach_up + 1), first)
    return lo, tl.where(i < own, hi, 0), at


@triton.jit
def paired(other, lo, hi, sides):
    """Whether each of the others is within what `seen` gave of `sides`. What is past one's own end
    is not asked: no one reads it."""
    _, others, reach_down, reach_up, segments = sides
    if segments is None and reach_up is None:
        hi = others
    if segments is None and reach_down is None:
        return other < hi
    else:
        return (other >= lo) & (other < hi)


@triton.jit
def walk(start, lo, hi, sides, HELD: tl.constexpr, BLOCK: tl.constexpr):
    """Blocks of the others: the first and the end, and between those two of the blocks that all of
    `lo` to `hi` cover. `sides` is what `seen` was given, of HELD indices from `start`."""
    own, others, reach_down, reach_up, segments = sides
    if segments is None:
        # They grow with the index: no reductions, and numbers of the program, not of threads.
        least, shortest, _ = seen(start, own, others, reach_down, reach_up, None)
        last = tl.minimum(start + HELD, own) - 1
        most, longest, _ = seen(last, own, others, reach_down, reach_up, None)
        shortest = tl.where(start + HELD > own, 0, shortest)
    else:
        least, most, shortest, longest = tl.min(lo, 0), tl.max(lo, 0), tl.min(hi, 0), tl.max(hi, 0)
    first = least // BLOCK
    end = tl.maximum(tl.cdiv(longest, BLOCK), first)
    inner = tl.minimum(tl.cdiv(most, BLOCK), end)
    inner_end = tl.maximum(shortest // BLOCK, inner)
    return first, inner, tl.minimum(inner_end, end), end


@triton.jit
def addend(matrix, i, j, inside):
    """What is added to the scores of a block of pairs, 0 outside."""
    ptr, stride_i, stride_j = matrix
    ptrs = ptr + (i * stride_i + j * stride_j)
    if inside is None:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=inside, other=0)


@triton.jit
def scores(dots, i, j, apart, mask, slope, scale, softcap, inside, UNSCALED: tl.constexpr):
    """s, u' and u'' of a block of pairs, queries i and keys j as they lie in it; -inf where a bool
    mask hides a pair. `inside` is where the mask has elements, None for everywhere. UNSCALED: s by
    scale, see `exponent`."""
    ACC: tl.constexpr = dots.dtype
    s = dots
    if not UNSCALED:
        s *= scalar(scale, ACC)
    steep, bent = 1.0, 0.0
    if softcap is not None:
        cap = tl.zeros_like(s) + scalar(softcap, ACC)
        u = libdevice.tanh(m.div(s, cap))
        s, steep = u * cap, 1 - u * u
        bent = m.div(-2 * u * steep, cap)
    if slope is not None:
        s -= slope * tl.abs(apart).to(ACC)
    if mask is not None:
        bias = addend(mask, i, j, inside)
        if bias.dtype == tl.int1:
            # Added, as torch's is: a NaN shows where it is hidden, too.
            hidden = tl.where(bias, 0.0, -INF).to(ACC)
            if ACC == tl.float64:
                # Triton (3.7) lays products out for the narrowest numbers that operands come from,
                # and those of float64 not for bytes: a maximum of one element hides them.
                hidden = tl.max(hidden[:, :, None], 2)
            s += hidden
        else:
            s += bias.to(ACC)
    return s, steep, bent


@triton.jit
def head_if(mask, batch, head, batch_shape):
    if mask is None:
        return None
    else:
        return head_of(mask, batch, head, batch_shape)


@triton.jit
def number_of(operand, batch, head, batch_shape, ACC: tl.constexpr):
    """A head's number, None where heads have none."""
    if operand is None:
        return None
    else:
        ptr, _, _ = head_of(operand, batch, head, batch_shape)
        return tl.load(ptr).to(ACC)


@triton.jit
def vector(ptr, matrix, i, L, INSIDE: tl.constexpr = False):
    """Rows' numbers of one matrix, which lie dense; 0 past the end, which no row is if INSIDE."""
    if INSIDE:
        return tl.load(ptr + matrix * L + i)
    else:
        return tl.load(ptr + matrix * L + i, mask=i < L, other=0)


@triton.jit
def kept(seed_ptr, probability, matrix, i, j, ACC: tl.constexpr):
    """Dropout's factor of pairs, in every kernel from the same random numbers: those of the seed,
    at place (j, i, matrix)."""
    zero = i * 0 + j * 0
    bits, _, _, _ = tl.philox(
        tl.load(seed_ptr), (zero + j).to(tl.uint32), (zero + i).to(tl.uint32),
        (zero + matrix).to(tl.uint32), zero.to(tl.uint32),
    )  # fmt: skip
    drop = scalar(probability, ACC)
    # 24 bits are as many as a float32 holds.
    uniform = (bits >> 8).to(ACC) * (1.0 / 16777216.0)
    return tl.where(
        uniform < drop, tl.zeros_like(uniform), m.inverse(tl.zeros_like(uniform) + (1 - drop))
    )


@triton.jit
def attention_keep(
    keep_ptr, seed_ptr, L, S, probability, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Dropout's factors of all pairs, which lie dense: for formulas, no kernel reads them."""
    tiles_j = tl.cdiv(S, BLOCK_N)
    tiles = tl.cdiv(L, BLOCK_M) * tiles_j
    matrix = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles // tiles_j * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(0) % tiles_j * BLOCK_N + tl.arange(0, BLOCK_N)
    ACC: tl.constexpr = keep_ptr.dtype.element_ty
    keep = kept(seed_ptr, probability, matrix, i[:, None], j[None, :], ACC)
    put((keep_ptr + matrix * L * S, S, 1), keep, i, j, L, S)


@triton.jit
def attention_fwd(
    out, lse_ptr, q, k, v, extras, about,
    PRECISION: tl.constexpr, FAST: tl.constexpr, UNSCALED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """o and lse of one block of queries."""
    mask, slopes, sinks, seed_ptr, segments = extras
    batch_shape, heads, group, L, S, D, DV, scale, softcap, down, up, dropout = about
    tiles = tl.cdiv(L, BLOCK_M)
    matrix = tl.program_id(0) // tiles
    batch, head = matrix // heads, matrix % heads
    matrix = matrix.to(tl.int64)
    # Under a causal mask the last queries have most keys: first, so that no one waits for them.
    start = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    if WIDE:
        start = start.to(tl.int64)
    i = start + tl.arange(0, BLOCK_M)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    k = head_of(k, batch, head // group, batch_shape)
    v = head_of(v, batch, head // group, batch_shape)
    mask = head_if(mask, batch, head, batch_shape)
    q = head_of(q, batch, head, batch_shape)
    queries = tile(q, i, d, L, D)
    ACC: tl.constexpr = tl.float64 if queries.dtype == tl.float64 else tl.float32
    LEAN: tl.constexpr = not FAST and BLOCK_D > 128
    slope = number_of(slopes, batch, head, batch_shape, ACC)

    sides = L, S, down, up, segments
    lo, hi, at = seen(i, L, S, down, up, segments)
    first, inner, inner_end, end = walk(start, lo, hi, sides, BLOCK_M, BLOCK_N)
    top = tl.full((BLOCK_M,), -INF, ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), ACC)
    # The blocks that all see whole, without a mask; then those at the edges.
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
            keys = tile(k, j, d, ENDS, D)
            values = tile(v, j, dv, ENDS, DV)
            inside = ((i < L)[:, None] & (j < S)[None, :]) if edges else None
            s, _, _ = scores(
                product(again(queries, q, i, d, L, D, LEAN), keys, PRECISION),
                i[:, None], j[None, :], at[:, None] - j[None, :], mask, slope, scale, softcap,
                inside, UNSCALED,
            )  # fmt: skip
            if edges:
                s = tl.where(paired(j[None, :], lo[:, None], hi[:, None], sides), s, -INF)
            before, top = top, tl.maximum(top, tl.max(s, 1), tl.PropagateNan.ALL)
            shift = highest(exponent(top, scale, FAST, UNSCALED))
            p = power(exponent(s, scale, FAST, UNSCALED) - shift[:, None], FAST)
            rescale = power(exponent(before, scale, FAST, UNSCALED) - shift, FAST)
            total = total * rescale + tl.sum(p, 1)
            if seed_ptr is not None:
                p *= kept(seed_ptr, dropout, matrix, i[:, None], j[None, :], ACC)
            acc = dot(p.to(values.dtype), values, acc * rescale[:, None], PRECISION)

    if UNSCALED:
        top *= scalar(scale, ACC)
    if sinks is not None:
        sink = number_of(sinks, batch, head, batch_shape, ACC)
        before, top = top, tl.maximum(top, sink, tl.PropagateNan.ALL)
        shift = highest(exponent(top, None, FAST, False))
        rescale = power(exponent(before, None, FAST, False) - shift, FAST)
        total = total * rescale + power(exponent(sink, None, FAST, False) - shift, FAST)
        acc *= rescale[:, None]
    total = tl.where(total == 0, 1, total)
    lse = top + libdevice.log(total)
    total = tl.where(top == INF, float("nan"), total)
    o = m.div(acc, tl.zeros_like(acc) + total[:, None])
    put(head_of(out, batch, head, batch_shape), o, i, dv, L, DV)
    tl.store(lse_ptr + matrix * L + i, lse, mask=i < L)


@triton.jit
def attention_jvp(
    tangent, mu_ptr, q, k, v, tangents, out, lse_ptr, extras, about,
    PRECISION: tl.constexpr, FAST: tl.constexpr, UNSCALED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """o' and mu of one block of queries; tangents are None where they are 0."""
    dq, dk, dv, dmask, dsinks, dslopes = tangents
    mask, slopes, sinks, seed_ptr, segments = extras
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
    dmask = head_if(dmask, batch, head, batch_shape)
    q = head_of(q, batch, head, batch_shape)
    queries = tile(q, i, c, L, D)
    ACC: tl.constexpr = tl.float64 if queries.dtype == tl.float64 else tl.float32
    LEAN: tl.constexpr = not FAST and BLOCK_D > 64
    LEANER: tl.constexpr = not FAST and BLOCK_D > 128
    slope = number_of(slopes, batch, head, batch_shape, ACC)
    dslope = number_of(dslopes, batch, head, batch_shape, ACC)
    if dq is not None:
        dq = head_of(dq, batch, head, batch_shape)
        dqueries = tile(dq, i, c, L, D)
    if dk is not None:
        dk = head_of(dk, batch, head // group, batch_shape)
    if dv is not None:
        dv = head_of(dv, batch, head // group, batch_shape)
    shift = finite(vector(lse_ptr, matrix, i, L), FAST)

    sides = L, S, down, up, segments
    lo, hi, at = seen(i, L, S, down, up, segments)
    first, inner, inner_end, end = walk(start, lo, hi, sides, BLOCK_M, BLOCK_N)
    mu = tl.zeros((BLOCK_M,), ACC)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), ACC)
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
            s, steep, _ = scores(
                product(again(queries, q, i, c, L, D, LEANER), keys, PRECISION),
                i[:, None], j[None, :], at[:, None] - j[None, :], mask, slope, scale, softcap,
                inside, UNSCALED,
            )  # fmt: skip
            p = power(exponent(s, scale, FAST, UNSCALED) - shift[:, None], FAST)
            if edges:
                p = tl.where(paired(j[None, :], lo[:, None], hi[:, None], sides), p, 0)
            t = tl.zeros((BLOCK_M, BLOCK_N), ACC)
            if dq is not None:
                t = dot(again(dqueries, dq, i, c, L, D, LEAN), tl.trans(keys), t, PRECISION)
            if dk is not None:
                dkeys = tl.trans(tile(dk, j, c, ENDS, D))
                t = dot(again(queries, q, i, c, L, D, LEANER), dkeys, t, PRECISION)
            t *= scalar(scale, ACC) * steep
            if dmask is not None:
                t += addend(dmask, i[:, None], j[None, :], inside).to(ACC)
            if dslopes is not None:
                t -= dslope * tl.abs(at[:, None] - j[None, :]).to(ACC)
            pt = p * t
            mu += tl.sum(pt, 1)
            if seed_ptr is not None:
                keep = kept(seed_ptr, dropout, matrix, i[:, None], j[None, :], ACC)
                p, pt = p * keep, pt * keep
            values = tile(v, j, cv, ENDS, DV)
            acc = dot(pt.to(values.dtype), values, acc, PRECISION)
            if dv is not None:
                dvalues = tile(dv, j, cv, ENDS, DV)
                acc = dot(p.to(dvalues.dtype), dvalues, acc, PRECISION)

    if dsinks is not None:
        sink = exponent(number_of(sinks, batch, head, batch_shape, ACC), None, FAST, False)
        mu += power(sink - shift, FAST) * number_of(dsinks, batch, head, batch_shape, ACC)
    o = tile(head_of(out, batch, head, batch_shape), i, cv, L, DV).to(ACC)
    put(head_of(tangent, batch, head, batch_shape), acc - mu[:, None] * o, i, cv, L, DV)
    tl.store(mu_ptr + matrix * L + i, mu, mask=i < L)
