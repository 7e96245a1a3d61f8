"""Rotary position embedding: pairs of features turn by an angle that depends on the position.

With c and s the cosine and sine of pair j at a position, which are the same for all heads,

    a' = a c - b s        b' = b c + a s        dc = sum g_a a + g_b b        ds = sum g_b a - g_a b

where (a, b) is (x[j], x[j + R]) or, interleaved, (x[2 j], x[2 j + 1]) for j < R, and the sums are
over heads, and over the batch where it shares the angles. Features from 2 R on are copied. The
gradient of x is the rotation by the negative angle, which is the same kernel.
"""

import triton
import triton.language as tl

# Pairs of features of one program: 8 a thread of 4 warps, 16 bytes of each half in bfloat16.
PAIRS = 1024
# Of one row at most, so that several heads share the angles that a program reads.
ROW_PAIRS = 256


@triton.jit
def load_pairs(
    ptr, start, pairs, stride, in_rows,
    COMPUTE: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """a and b, from pair `start` on, of the rows that `ptr` and `in_rows` are tiles of, with a size
    of 1 where the pairs go."""
    if INTERLEAVED:
        # Neighbours in memory are loaded together, and told apart in registers.
        k = 2 * start + tl.arange(0, 2 * BLOCK_J)
        mask = in_rows & (k < 2 * pairs)[None, None, :]
        both = tl.load(ptr + (k * stride)[None, None, :], mask=mask, other=0).to(COMPUTE)
        return tl.split(tl.reshape(both, (both.shape[0], both.shape[1], BLOCK_J, 2)))
    else:
        j = start + tl.arange(0, BLOCK_J)
        mask = in_rows & (j < pairs)[None, None, :]
        at = ptr + (j * stride)[None, None, :]
        a = tl.load(at, mask=mask, other=0)
        b = tl.load(at + pairs * stride, mask=mask, other=0)
        return a.to(COMPUTE), b.to(COMPUTE)


@triton.jit
def store_pairs(
    ptr, a, b, start, pairs, stride, in_rows, INTERLEAVED: tl.constexpr, BLOCK_J: tl.constexpr
):
    DTYPE: tl.constexpr = ptr.dtype.element_ty
    if INTERLEAVED:
        k = 2 * start + tl.arange(0, 2 * BLOCK_J)
        mask = in_rows & (k < 2 * pairs)[None, None, :]
        both = tl.reshape(tl.join(a, b), (a.shape[0], a.shape[1], 2 * BLOCK_J))
        tl.store(ptr + (k * stride)[None, None, :], both.to(DTYPE), mask=mask)
    else:
        j = start + tl.arange(0, BLOCK_J)
        mask = in_rows & (j < pairs)[None, None, :]
        at = ptr + (j * stride)[None, None, :]
        tl.store(at, a.to(DTYPE), mask=mask)
        tl.store(at + pairs * stride, b.to(DTYPE), mask=mask)


@triton.jit
def load_angles(ptr, batch, row, j, strides, mask, COMPUTE: tl.constexpr):
    """One of the tables at the rows of a block of positions; NaN where there is no such row."""
    at = ptr + batch * strides[0] + (row * strides[1])[:, None] + (j * strides[2])[None, :]
    return tl.load(at, mask=mask, other=float("nan")).to(COMPUTE)[:, None, :]


@triton.jit
def rope_fwd(
    out_ptr, x_ptr, cos_ptr, sin_ptr, position_ptr, S, H, pairs, features, rows,
    out_strides, x_strides, cos_strides, sin_strides, position_strides,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, COPY: tl.constexpr, COMPUTE: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Strides are those of batch, position, head and feature; of the tables, of batch, row and
    pair. A table that is None is zero; without COPY, so are the features that do not turn."""
    program = tl.program_id(0).to(tl.int64)
    s_tiles, h_tiles = tl.cdiv(S, BLOCK_S), tl.cdiv(H, BLOCK_H)
    h = program % h_tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    s = program // h_tiles % s_tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    rest = program // (h_tiles * s_tiles)
    j_tiles = tl.maximum(tl.cdiv(pairs, BLOCK_J), 1)
    j_tile, batch = rest % j_tiles, rest // j_tiles
    j_start = j_tile * BLOCK_J
    if not WIDE:
        h, s, j_start = h.to(tl.int32), s.to(tl.int32), j_start.to(tl.int32)
    j = j_start + tl.arange(0, BLOCK_J)

    in_s = s < S
    in_rows = (in_s[:, None] & (h < H)[None, :])[:, :, None]
    x_ptr += batch * x_strides[0]
    x_rows = x_ptr + ((s * x_strides[1])[:, None] + (h * x_strides[2])[None, :])[:, :, None]
    out_ptr += batch * out_strides[0]
    out_rows = out_ptr + ((s * out_strides[1])[:, None] + (h * out_strides[2])[None, :])[:, :, None]

    row = s
    in_table = in_s
    if position_ptr is not None:
        at = position_ptr + batch * position_strides[0] + s * position_strides[1]
        row = tl.load(at, mask=in_s, other=0).to(tl.int64)
        row = tl.where(row < 0, row + rows, row)
        in_table = in_s & (row >= 0) & (row < rows)
    mask = in_table[:, None] & (j < pairs)[None, :]

    a, b = load_pairs(x_rows, j_start, pairs, x_strides[3], in_rows, COMPUTE, INTERLEAVED, BLOCK_J)
    first = tl.zeros(a.shape, COMPUTE)
    second = first
    if cos_ptr is not None:
        c = load_angles(cos_ptr, batch, row, j, cos_strides, mask, COMPUTE)
        first = a * c
        second = b * c
    if sin_ptr is not None:
        d = load_angles(sin_ptr, batch, row, j, sin_strides, mask, COMPUTE)
        if INVERSE:
            d = -d
        first -= b * d
        second += a * d
    store_pairs(
        out_rows, first, second, j_start, pairs, out_strides[3], in_rows, INTERLEAVED, BLOCK_J
    )

    if j_tile == 0:
        for start in range(2 * pairs, features, BLOCK_J):
            f = start + tl.arange(0, BLOCK_J).to(j.dtype)
            in_rest = in_rows & (f < features)[None, None, :]
            if COPY:
                copied = tl.load(x_rows + (f * x_strides[3])[None, None, :], mask=in_rest)
            else:
                copied = tl.zeros(in_rest.shape, x_ptr.dtype.element_ty)
            tl.store(out_rows + (f * out_strides[3])[None, None, :], copied, mask=in_rest)


@triton.jit
def rope_angles_bwd(
    dcos_ptr, dsin_ptr, g_ptr, x_ptr, S, H, pairs, summed, g_strides, x_strides,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, COMPUTE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Gradients of the angles of each position, dense, or None: sums over all heads, and over
    `summed` elements of the batch that share them."""
    program = tl.program_id(0).to(tl.int64)
    s_tiles = tl.cdiv(S, BLOCK_S)
    s = program % s_tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    rest = program // s_tiles
    j_tiles = tl.cdiv(pairs, BLOCK_J)
    j_start, batch = rest % j_tiles * BLOCK_J, rest // j_tiles
    h = tl.arange(0, BLOCK_H)
    if WIDE:
        h = h.to(tl.int64)
    else:
        s, j_start = s.to(tl.int32), j_start.to(tl.int32)
    j = j_start + tl.arange(0, BLOCK_J)
    dcos = tl.zeros((BLOCK_S, BLOCK_J), COMPUTE)
    dsin = tl.zeros((BLOCK_S, BLOCK_J), COMPUTE)
    for i in range(0, summed):
        g_batch = g_ptr + (batch * summed + i) * g_strides[0]
        x_batch = x_ptr + (batch * summed + i) * x_strides[0]
        for start in range(0, H, BLOCK_H):
            head = start + h
            in_rows = ((s < S)[:, None] & (head < H)[None, :])[:, :, None]
            at_g = (s * g_strides[1])[:, None] + (head * g_strides[2])[None, :]
            at_x = (s * x_strides[1])[:, None] + (head * x_strides[2])[None, :]
            g_rows, x_rows = g_batch + at_g[:, :, None], x_batch + at_x[:, :, None]
            ga, gb = load_pairs(
                g_rows, j_start, pairs, g_strides[3], in_rows, COMPUTE, INTERLEAVED, BLOCK_J
            )
            a, b = load_pairs(
                x_rows, j_start, pairs, x_strides[3], in_rows, COMPUTE, INTERLEAVED, BLOCK_J
            )
            dcos += tl.sum(ga * a + gb * b, 1)
            dsin += tl.sum(gb * a - ga * b, 1)
    if INVERSE:
        dsin = -dsin
    at = ((batch * S + s) * pairs)[:, None] + j[None, :]
    mask = (s < S)[:, None] & (j < pairs)[None, :]
    if dcos_ptr is not None:
        tl.store(dcos_ptr + at, dcos.to(dcos_ptr.dtype.element_ty), mask=mask)
    if dsin_ptr is not None:
        tl.store(dsin_ptr + at, dsin.to(dsin_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rope_table_bwd(
    dtable_ptr, dangles_ptr, position_ptr, count, rows, pairs,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """The gradient of one row of a table: the sum of those of the positions that read it, in their
    order. What does not match is not loaded."""
    program = tl.program_id(0).to(tl.int64)
    j_tiles = tl.cdiv(pairs, BLOCK_J)
    row = program // j_tiles
    j = program % j_tiles * BLOCK_J + tl.arange(0, BLOCK_J)
    ACC: tl.constexpr = dangles_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_J,), ACC)
    for start in range(0, count, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        position = tl.load(position_ptr + n, mask=n < count, other=rows)
        match = (position == row) | (position == row - rows)
        at = dangles_ptr + (n * pairs)[:, None] + j[None, :]
        part = tl.load(at, mask=match[:, None] & (j < pairs)[None, :], other=0)
        total += tl.sum(part, 0)
    at = dtable_ptr + row * pairs + j
    tl.store(at, total.to(dtable_ptr.dtype.element_ty), mask=j < pairs)
