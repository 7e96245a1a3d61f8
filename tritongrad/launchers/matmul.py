"""Launching the matrix product: which tile, over which batch, read through which strides."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import matmul as k
from ..layout import INT32_MAX, collapse, expanded_strides, next_power_of_two
from ..runtime import launch_prepared


class Tile(NamedTuple):
    """A block of the result that one program computes, and the program's resources."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# From the largest to the smallest, of each size the squarest first: a tile of m by n reads
# (m + n) / (m n) elements for each product, so large square tiles read least. What bounds them is
# registers (the accumulator takes m n / (32 warps) of 255 a thread) and shared memory (as many
# copies of k (m + n) elements as stages; sm_90 has 227 KiB, gfx942 64). None spills on sm_80 or
# later.
_HALF = (
    Tile(128, 128, 64, 8, 3),
    Tile(64, 64, 64, 4, 4),
    Tile(32, 64, 64, 4, 4),
    Tile(64, 32, 64, 4, 4),
    Tile(16, 64, 128, 4, 3),
    Tile(64, 16, 128, 4, 3),
    Tile(16, 32, 128, 4, 4),
    Tile(32, 16, 128, 4, 4),
    Tile(16, 16, 128, 4, 4),
)
# Reads a quarter less, and keeps Hopper's tensor cores busier. Before Hopper it spills, as it does
# anywhere without aligned rows, where each element has an address of its own.
_HALF_HOPPER = Tile(128, 256, 64, 8, 3)
_SINGLE_SMALL = (
    Tile(64, 64, 32, 4, 3),
    Tile(32, 64, 32, 4, 3),
    Tile(64, 32, 32, 4, 3),
    Tile(16, 64, 64, 4, 3),
    Tile(64, 16, 64, 4, 3),
    Tile(16, 32, 64, 4, 3),
    Tile(32, 16, 64, 4, 3),
    Tile(16, 16, 64, 4, 3),
)
# IEEE float32 has no tensor core: its products are ordinary arithmetic on registers, of which a
# deeper tile would take too many. TF32, like half precision, wants depth, and aligned rows.
_SINGLE = (Tile(128, 128, 16, 8, 3), *_SINGLE_SMALL)
_SINGLE_TF32 = Tile(128, 128, 32, 8, 3)
_DOUBLE = (
    Tile(128, 64, 16, 8, 3),
    Tile(64, 64, 16, 4, 3),
    Tile(32, 32, 16, 4, 3),
    Tile(16, 32, 16, 4, 3),
    Tile(32, 16, 16, 4, 3),
    Tile(16, 16, 16, 4, 3),
)

# Programs that keep a GPU busy (an H200 has 132 multiprocessors): a larger tile that makes fewer
# of them leaves multiprocessors idle.
FILL = 128

_HAS_WGMMA = (
    torch.version.hip is None
    and torch.cuda.is_available()
    and torch.cuda.get_device_capability() >= (9, 0)
)


def _float32_precision() -> str:
    """How torch has been told to multiply float32: exactly, or rounded to TF32."""
    return "tf32" if torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32" else "ieee"


def _tiles(dtype: torch.dtype, precision: str, aligned: bool) -> tuple[Tile, ...]:
    if dtype is torch.float64:
        return _DOUBLE
    if dtype is torch.float32:
        if precision == "ieee":
            return _SINGLE
        return (_SINGLE_TF32, *_SINGLE_SMALL) if aligned else _SINGLE_SMALL
    return (_HALF_HOPPER, *_HALF) if _HAS_WGMMA and aligned else _HALF


@lru_cache(maxsize=4096)
def _configuration(
    dtype: torch.dtype, precision: str, sizes: tuple[int, int, int, int], aligned: bool, wide: bool
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and constexprs of a product; ``sizes`` are those of batch, rows, columns and depth."""
    batch, m, n, depth = sizes
    limit_m, limit_n = max(next_power_of_two(m), 16), max(next_power_of_two(n), 16)
    fitting = [t for t in _tiles(dtype, precision, aligned) if t.m <= limit_m and t.n <= limit_n]
    for tile in fitting:
        programs = batch * -(-m // tile.m) * -(-n // tile.n)
        if programs >= FILL:
            break
    meta = {
        "PRECISION": precision,
        "EVEN_K": depth % tile.k == 0,
        "WIDE": wide,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    return (programs,), meta


class _Batch(NamedTuple):
    """The batch of a product, innermost dimension first, and what is left as rows of ``a``."""

    shape: tuple[int, ...]
    a_strides: tuple[int, ...]
    b_strides: tuple[int, ...]
    rows: int
    stride_am: int


def _collapse_batch(a: Tensor, b: Tensor, batch_shape: torch.Size) -> _Batch:
    """The fewest dimensions that walk the batch.

    Where one ``b`` serves the whole batch, as a weight does, the matrices of ``a`` lie below one
    another in one product with many rows, as far as the strides of ``a`` allow.
    """
    a_strides = expanded_strides(a, (*batch_shape, *a.shape[-2:]))
    b_strides = expanded_strides(b, (*batch_shape, *b.shape[-2:]))[:-2]
    rows = a.shape[-2]
    if not any(b_strides):
        shape = (*batch_shape, rows)
        sizes, (merged,) = collapse(shape, [a_strides[:-1]], range(len(shape) - 1, -1, -1))
        outer = tuple(sizes[1:])
        return _Batch(outer, tuple(merged[1:]), (0,) * len(outer), sizes[0], merged[0])
    order = range(len(batch_shape) - 1, -1, -1)
    sizes, (merged_a, merged_b) = collapse(batch_shape, [a_strides[:-2], b_strides], order)
    return _Batch(tuple(sizes), tuple(merged_a), tuple(merged_b), rows, a_strides[-2])


_NO_BATCH: tuple[tuple[int, ...], ...] = ((), (), ())


def matrix_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a[..., M, K] @ b[..., K, N] (+ bias[N])``, their batches broadcast, in one launch.

    Shapes fit, and dtypes are equal (checked when the call was bound). The result is contiguous.
    """
    batch, batch_arguments = 1, _NO_BATCH
    if a.dim() == 2 == b.dim():
        rows, depth = a.shape
        columns = b.shape[1]
        stride_am, stride_ak = a.stride()
        stride_bk, stride_bn = b.stride()
        out = a.new_empty((rows, columns))
        if rows == 0 or columns == 0:
            return out
    else:
        rows, depth = a.shape[-2:]
        columns = b.shape[-1]
        stride_ak = a.stride(-1)
        stride_bk, stride_bn = b.stride()[-2:]
        batch_shape = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        out = a.new_empty((*batch_shape, rows, columns))
        if out.numel() == 0:
            return out
        found = _collapse_batch(a, b, batch_shape)
        rows, stride_am = found.rows, found.stride_am
        batch_arguments = found[:3]
        batch = out.numel() // (rows * columns)
    if bias is not None and bias.stride(0) != 1:
        bias = bias.contiguous()
    a_reach = rows * stride_am + depth * stride_ak
    b_reach = depth * stride_bk + columns * stride_bn
    wide = max(rows * columns, a_reach, b_reach) > INT32_MAX
    # Unless one stride of a matrix is 1, nothing about it is aligned.
    aligned = (
        (stride_am == 1 or stride_ak == 1)
        and (stride_bk == 1 or stride_bn == 1)
        and (max(stride_am, stride_ak) | max(stride_bk, stride_bn) | columns) % 16 == 0
    )
    dtype = a.dtype
    precision = _float32_precision() if dtype is torch.float32 else "ieee"
    grid, meta = _configuration(dtype, precision, (batch, rows, columns, depth), aligned, wide)
    launch_prepared(
        k.gemm,
        grid,
        (
            out, a, b, bias, rows, columns, depth,
            stride_am, stride_ak, stride_bk, stride_bn, *batch_arguments,
        ),
        out.device,
        meta,
    )  # fmt: skip
    return out
