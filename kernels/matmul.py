"""Matrix products.

c[i, m, n] = F(z), z = alpha * sum_k a[i, m, k] * b[i, k, n] + beta * added[i, m, n] + bias[n], for
every index i of the batch, with F an activation or nothing. The gradients, da = alpha dz b^T and
db = alpha a^T dz, are products of the same kind. Every operand is read through its own strides: a
transpose is two strides exchanged, a broadcast is a stride of 0.

Products are summed as one whose k has two indices, (s, k), each with a stride: c[i, m, n] =
alpha * sum_sk a[i, s, m, k] * b[i, s, k, n] + beta * added[i, m, n].
"""

import triton
import triton.language as tl

from .pointwise import evaluate, scalar

# Rows of tiles that run together: they share the columns of b in L2 while these are there.
GROUP = tl.constexpr(8)

# The interpreter's dot reads the bits of bfloat16 as integers. Products of two bfloat16 are exact
# in float32, so there the cast changes nothing else.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def tile_in_group(tile, tiles_m, tiles_n):
    """Row and column of a tile: down the rows of a group first, then on to the next column."""
    width = GROUP * tiles_n
    first = tile // width * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + tile % width % height, tile % width // height


@triton.jit
def addend(ptr, m, n, in_m, in_n, stride_m, stride_n):
    """What is added to a tile, or its one row, column or element that is broadcast over it."""
    if stride_m is None:
        if stride_n is None:
            return tl.load(ptr)
        else:
            return tl.load(ptr + n[None, :] * stride_n, mask=in_n, other=0)
    elif stride_n is None:
        return tl.load(ptr + m[:, None] * stride_m, mask=in_m, other=0)
    else:
        offsets = m[:, None] * stride_m + n[None, :] * stride_n
        return tl.load(ptr + offsets, mask=in_m & in_n, other=0)


@triton.jit
def combination(acc, alpha, added_ptr, m, n, in_m, in_n, stride_m, stride_n, beta):
    """`alpha` times a tile and `beta` times what is added to it, if anything is."""
    if alpha is not None:
        acc *= scalar(alpha, acc.dtype)
    if added_ptr is not None:
        added = addend(added_ptr, m, n, in_m, in_n, stride_m, stride_n).to(acc.dtype)
        if beta is not None:
            added *= scalar(beta, acc.dtype)
        acc += added
    return acc


@triton.jit
def pieces_of(acc, PIECES: tl.constexpr):
    """A tile as so many of equal width, from left to right. The halves of a tile are halves of what
    each thread has, as far as its layout goes: then nothing moves."""
    if PIECES == 1:
        return (acc,)
    else:
        halves = tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2))
        left, right = tl.split(tl.permute(halves, (0, 2, 1)))
        return pieces_of(left, PIECES // 2) + pieces_of(right, PIECES // 2)


@triton.jit
def multiplied(
    acc, a_ptrs, b_ptrs, in_a, in_b, k, K, a_step, b_step,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`acc` and the product of a row of tiles of a and a column of tiles of b."""
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs, mask=in_a, other=0)
            b = tl.load(b_ptrs, mask=in_b, other=0)
        else:
            a = tl.load(a_ptrs, mask=in_a & (k < K - start)[None, :], other=0)
            b = tl.load(b_ptrs, mask=in_b & (k < K - start)[:, None], other=0)
        if _INTERPRETED and a.dtype == tl.bfloat16:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
        a_ptrs += a_step
        b_ptrs += b_step
    return acc


@triton.jit
def finish(
    acc, alpha, added_ptr, m, n, in_m, N, stride_added_m, stride_added_n, beta,
    bias_ptr, stride_bias, z_ptr, c_ptr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """Store a tile, or a piece of one, with all that follows the product."""
    in_n = (n < N)[None, :]
    z = combination(acc, alpha, added_ptr, m, n, in_m, in_n, stride_added_m, stride_added_n, beta)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + n[None, :] * stride_bias, mask=in_n, other=0).to(z.dtype)
    at = m[:, None] * N + n[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=in_m & in_n)
    if EPILOGUE is not None:
        z = evaluate(EPILOGUE, (z,), c_ptr.dtype.element_ty)[0]
    tl.store(c_ptr + at, z.to(c_ptr.dtype.element_ty), mask=in_m & in_n)


@triton.jit
def gemm(
    c_ptr, a_ptr, b_ptr, added_ptr, M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn, batch_shape, a_batch_strides, b_batch_strides,
    added_batch_strides, stride_added_m, stride_added_n, beta, alpha, S, stride_as, stride_bs,
    bias_ptr, stride_bias, z_ptr,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr, EPILOGUE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One tile of one c, which is dense. `batch_shape` and the batch strides are innermost first.
    Strides that `added` is broadcast along are None, and so are factors of 1. EPILOGUE is a device
    function of pointwise.py's kind, or None; `z` is what it is applied to, laid out as c, or None.
    `S` is the number of products that are summed, or None: one.

    Tiles at the edges are masked. That costs no vector access: a bound that is not divisible by 16
    is the length of rows that begin at unaligned addresses anyway.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    batch = program // (tiles_m * tiles_n)
    tile_m, tile_n = tile_in_group(program % (tiles_m * tiles_n), tiles_m, tiles_n)

    rest = batch.to(tl.int64)
    c_ptr += rest * M * N
    if z_ptr is not None:
        z_ptr += rest * M * N
    for d in tl.static_range(len(batch_shape)):
        index = rest % batch_shape[d]
        rest = rest // batch_shape[d]
        a_ptr += index * a_batch_strides[d]
        b_ptr += index * b_batch_strides[d]
        if added_ptr is not None:
            added_ptr += index * added_batch_strides[d]

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    step = BLOCK_K
    if WIDE:
        m, n, k = m.to(tl.int64), n.to(tl.int64), k.to(tl.int64)
        step = tl.full((), BLOCK_K, tl.int64)
    a_offsets = m[:, None] * stride_am + k[None, :] * stride_ak
    b_offsets = k[:, None] * stride_bk + n[None, :] * stride_bn
    in_a = (m < M)[:, None]
    in_b = (n < N)[None, :]

    ACC: tl.constexpr = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    a_step, b_step = step * stride_ak, step * stride_bk
    if S is None:
        acc = multiplied(
            acc, a_ptr + a_offsets, b_ptr + b_offsets, in_a, in_b, k, K, a_step, b_step,
            PRECISION, EVEN_K, BLOCK_K,
        )  # fmt: skip
    else:
        # A loop for each, in which Triton loads ahead. It does not where each block divides to find
        # the product that it is in, which was measured at a fiftieth of the floor.
        for _ in range(0, S):
            acc = multiplied(
                acc, a_ptr + a_offsets, b_ptr + b_offsets, in_a, in_b, k, K, a_step, b_step,
                PRECISION, EVEN_K, BLOCK_K,
            )  # fmt: skip
            a_ptr += stride_as
            b_ptr += stride_bs

    # What is added, and an activation, take registers beside those of the tile: so piece by piece,
    # each behind a branch, past which the compiler moves nothing.
    WIDTH: tl.constexpr = BLOCK_N // PIECES
    pieces = pieces_of(acc, PIECES)
    for i in tl.static_range(PIECES):
        first = tile_n * BLOCK_N + i * WIDTH
        if first < N:
            columns = (first + tl.arange(0, WIDTH)).to(n.dtype)
            finish(
                pieces[i], alpha, added_ptr, m, columns, in_a, N, stride_added_m, stride_added_n,
                beta, bias_ptr, stride_bias, z_ptr, c_ptr, EPILOGUE,
            )  # fmt: skip
