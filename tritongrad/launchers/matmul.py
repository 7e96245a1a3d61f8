"""Launching the matrix product: which tile, over which batch, read through which strides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import COMPUTE_DTYPE, Number, encode
from ..kernels import arithmetic
from ..kernels import matmul as k
from ..layout import (
    INT32_MAX,
    Strides,
    collapse,
    dense_strides,
    next_power_of_two,
    strides_as,
)
from ..runtime import launch_prepared
from . import reduction
from .configurations import compute_capability, planned
from .pointwise import elementwise


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
# later, nor on gfx942: `compare static` is the judge.
#
# Of each tile the depth k, 0 where the kind has no use of it. Half precision wants depth; without
# aligned rows each element has an address of its own, for which depth costs registers. IEEE
# float32 has no tensor core: its products are ordinary arithmetic on registers, of which a deep
# tile would take too many, and without aligned rows a large one too. TF32 wants depth again, and
# aligned rows.
_KINDS = ("half", "half, unaligned", "float32", "float32, unaligned", "tf32", "float64")
_DEPTHS = {
    # m, n, warps
    (128, 128, 8): (64, 0, 16, 0, 32, 0),
    (128, 64, 8): (64, 32, 0, 16, 0, 16),
    (64, 128, 8): (0, 0, 16, 0, 0, 0),
    (64, 64, 4): (64, 32, 0, 0, 32, 16),
    (32, 64, 4): (32, 32, 16, 32, 32, 0),
    (64, 32, 4): (64, 32, 16, 16, 32, 0),
    (32, 32, 4): (0, 0, 0, 0, 0, 16),
    (16, 64, 4): (64, 32, 32, 32, 64, 0),
    (64, 16, 4): (128, 32, 32, 32, 64, 0),
    (16, 32, 4): (128, 64, 32, 32, 64, 16),
    (32, 16, 4): (128, 64, 32, 32, 64, 16),
    (16, 16, 4): (128, 64, 32, 32, 64, 16),
}


def _stages(kind: str, m: int, n: int, k: int) -> int:
    """Copies of the operands' blocks: a fourth where half precision has the shared memory."""
    return 4 if kind == "half" and 4 * 2 * k * (m + n) <= 64 * 1024 else 3


_TILES = {
    kind: tuple(
        Tile(m, n, depths[i], warps, _stages(kind, m, n, depths[i]))
        for (m, n, warps), depths in _DEPTHS.items()
        if depths[i]
    )
    for i, kind in enumerate(_KINDS)
}

# What Hopper's tensor cores do best with, beside those. They take both operands from shared memory,
# b's columns once for each 64 rows, so a wide tile serves them better than a high one. The first
# spills before Hopper.
_HOPPER = tuple(
    sorted(
        (Tile(128, 256, 64, 8, 3), Tile(64, 128, 64, 4, 4), *_TILES["half"]),
        key=lambda tile: -tile.m * tile.n,
    )
)

PROCESSORS = 132
"""Multiprocessors of the GPU that a tile is chosen for, an H100 or H200."""


def has_wgmma() -> bool:
    """Whether the GPU has Hopper's tensor cores, or later ones."""
    return compute_capability() >= (9, 0)


def float32_precision() -> str:
    """How torch has been told to multiply float32: "tf32" for rounded to that."""
    return torch._C._get_fp32_precision_getter("cuda", "matmul")


def _tiles(dtype: torch.dtype, precision: str, aligned: bool) -> tuple[Tile, ...]:
    if dtype is torch.float64:
        return _TILES["float64"]
    if dtype is torch.float32:
        if not aligned:
            return _TILES["float32, unaligned"]
        return _TILES["float32" if precision == "ieee" else "tf32"]
    if not aligned:
        return _TILES["half, unaligned"]
    return _HOPPER if has_wgmma() else _TILES["half"]


def _tile(
    dtype: torch.dtype,
    precision: str,
    aligned: bool,
    sizes: tuple[int, int, int],
) -> Tile:
    """The tile with which the busiest multiprocessor reads least, the larger of two, of those that
    are not larger than the result: for each step in k, m + n elements for each of its programs."""
    batch, m, n = sizes
    limit_m, limit_n = max(next_power_of_two(m), 16), max(next_power_of_two(n), 16)

    def read(tile: Tile) -> int:
        programs = batch * -(-m // tile.m) * -(-n // tile.n)
        return -(-programs // PROCESSORS) * (tile.m + tile.n)

    tiles = _tiles(dtype, precision, aligned)
    return min((t for t in tiles if t.m <= limit_m and t.n <= limit_n), key=read)


def _step(stride: int, other: int) -> int:
    """How far apart a matrix' rows, or columns, are whose elements lie side by side; 1 for none."""
    return stride if other == 1 else other if stride == 1 else 1


def _pieces(tile: Tile, adding: bool, epilogue: bool) -> int:
    """In how many pieces a tile is finished: what is added to each of its elements is 32 numbers a
    thread at a time, and an activation, whose steps all elements take in turn, one of 16."""
    accumulators = tile.m * tile.n // (32 * tile.warps)
    return max(accumulators // (16 if epilogue else 32), 1) if adding or epilogue else 1


def _walk(own: Sequence[int], strides: Strides, shape: torch.Size) -> Strides:
    """Strides through a batch of ``shape`` of an operand whose own is to be broadcast."""
    missing = len(shape) - len(own)
    return (0,) * missing + tuple([0 if n == 1 else s for n, s in zip(own, strides, strict=True)])


class Addend(NamedTuple):
    """What is added to a product: an operand that broadcasts to its shape, ``beta`` times."""

    shape: torch.Size
    strides: Strides
    beta: Number = 1


class Plan(NamedTuple):
    """How operands of certain shapes and strides are multiplied.

    Attributes:
        shape, strides: of the result.
        grid: None if the result is empty.
        geometry: the kernel's arguments after its pointers.
        meta: its constexprs.
        sums: the reduction that a product with one row or column is, instead of tiles.
        outer: shapes and strides of the operands of the pointwise product that one with nothing to
            sum over is.
        factors: of the product, and of what is added, in either of these.
        shifted: for operands that begin at unaligned addresses, where that makes a difference.
    """

    shape: torch.Size
    strides: Strides
    grid: tuple[int] | None
    geometry: tuple[Any, ...]
    meta: dict[str, Any]
    sums: reduction.Plan | None = None
    outer: tuple[torch.Size, Strides, torch.Size, Strides] | None = None
    factors: tuple[Number, Number] = (1, 1)
    shifted: Plan | None = None


@planned
def plan(
    a_shape: torch.Size,
    a_strides: Strides,
    b_shape: torch.Size,
    b_strides: Strides,
    dtype: torch.dtype,
    precision: str,
    alpha: Number = 1,
    added: Addend | None = None,
    epilogue: Any = None,
    summed: bool = False,
    device: int | None = None,
    shifted: bool = False,
) -> Plan:
    """How to multiply operands of these shapes and strides, float32 in ``float32_precision()``;
    ``alpha`` times their product, and something added, and a device function of all that.
    ``summed``: the product is summed over the last dimension of its batch, which both have.
    ``device``: where other kernels may do it, if ``run`` is what launches it, without a bias.
    ``shifted``: they begin at unaligned addresses."""
    precision = "tf32" if dtype is torch.float32 and precision == "tf32" else "ieee"
    operands = a_shape, a_strides, b_shape, b_strides
    how = dtype, precision, alpha, added, epilogue, summed, None
    parts: tuple[int, ...] = ()
    if summed:
        a_shape, a_strides, b_shape, b_strides, parts = _side_by_side(
            a_shape, a_strides, b_shape, b_strides
        )
    batch_shape = torch.broadcast_shapes(a_shape[:-2], b_shape[:-2])
    (m, depth), n = a_shape[-2:], b_shape[-1]
    shape = torch.Size((*batch_shape, m, n))
    strides = dense_strides(shape, range(len(shape) - 1, -1, -1))
    if 0 in shape:
        return Plan(shape, strides, None, (), {})
    a_walk = _walk(a_shape[:-2], a_strides[:-2], batch_shape)
    b_walk = _walk(b_shape[:-2], b_strides[:-2], batch_shape)
    (stride_am, stride_ak), (stride_bk, stride_bn) = a_strides[-2:], b_strides[-2:]
    addend = added or Addend(torch.Size(), ())
    *added_walk, stride_dm, stride_dn = strides_as(addend.shape, addend.strides, shape)
    if any(b_walk):
        order = range(len(batch_shape) - 1, -1, -1)
        walks = [a_walk, b_walk, tuple(added_walk)]
        sizes, (a_batch, b_batch, added_batch) = collapse(batch_shape, walks, order)
    else:
        # One b serves the whole batch, as a weight does: the matrices of a lie below one another in
        # one product with many rows, as far as the strides of a (and what is added) allow.
        order = range(len(batch_shape), -1, -1)
        walks = [(*a_walk, stride_am), (*added_walk, stride_dm)]
        (m, *sizes), (a_rows, added_rows) = collapse((*batch_shape, m), walks, order)
        (stride_am, *a_batch), (stride_dm, *added_batch) = a_rows, added_rows
        b_batch = [0] * len(sizes)
    batch = math.prod(sizes)
    if min(m, n) == 1:
        # Limited by memory: rounding the operands would gain nothing.
        precision = "ieee"
    steps = _step(stride_am, stride_ak), _step(stride_bk, stride_bn), n
    every = *steps, *parts[1:], *a_batch, *b_batch
    aligned = not shifted and all(step % 16 == 0 for step in every)
    if device is not None and epilogue is None:
        # Limited by memory, and tiles have 16 of each at least.
        other = Plan(shape, strides, None, (), {}, factors=(alpha, addend.beta))
        if depth == 1 and not summed:
            return other._replace(outer=operands)
        if min(m, n) == 1:
            return other._replace(sums=_sums(*operands, dtype, device, summed))
    tile = _tile(dtype, precision, aligned, (batch, m, n))
    a_reach = m * stride_am + depth * stride_ak
    b_reach = depth * stride_bk + n * stride_bn
    if parts:
        count, a_step, b_step = parts
        a_reach, b_reach = a_reach + count * a_step, b_reach + count * b_step
    added_reach = m * stride_dm + n * stride_dn
    meta = {
        "PRECISION": precision,
        "EVEN_K": depth % tile.k == 0,
        "EPILOGUE": epilogue,
        "WIDE": max(m * n, a_reach, b_reach, added_reach) > INT32_MAX,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "PIECES": _pieces(tile, bool(stride_dm and stride_dn), epilogue is not None),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    geometry = (
        m, n, depth, stride_am, stride_ak, stride_bk, stride_bn,
        tuple(sizes), tuple(a_batch), tuple(b_batch),
        tuple(added_batch), stride_dm or None, stride_dn or None,
        _factor(addend.beta, dtype), _factor(alpha, dtype), *(parts or (None, None, None)),
    )  # fmt: skip
    grid = (batch * -(-m // tile.m) * -(-n // tile.n),)
    twin = plan(*operands, *how, True) if aligned else None
    return Plan(shape, strides, grid, geometry, meta, shifted=twin)


def _sums(
    a_shape: torch.Size,
    a_strides: Strides,
    b_shape: torch.Size,
    b_strides: Strides,
    dtype: torch.dtype,
    device: int,
    summed: bool,
) -> reduction.Plan:
    """A product of matrices as a reduction: each of its elements is a sum of products."""
    outer = 3 if summed else 2
    shapes = (
        torch.Size((*a_shape[:-outer], a_shape[-2], 1, *a_shape[-outer:-2], a_shape[-1])),
        torch.Size((*b_shape[:-outer], 1, b_shape[-1], *b_shape[-outer:-2], b_shape[-2])),
    )
    strides = (
        (*a_strides[:-outer], a_strides[-2], 0, *a_strides[-outer:-2], a_strides[-1]),
        (*b_strides[:-outer], 0, b_strides[-1], *b_strides[-outer:-2], b_strides[-2]),
    )
    rank = max(len(a_shape), len(b_shape)) + 1
    return reduction.plan(
        reduction.PRODUCT, shapes, strides, tuple(range(rank + 1 - outer, rank)), False, dtype,
        device,
    )  # fmt: skip


def _side_by_side(
    a_shape: torch.Size, a_strides: Strides, b_shape: torch.Size, b_strides: Strides
) -> tuple[torch.Size, Strides, torch.Size, Strides, tuple[int, ...]]:
    """Shapes and strides of one product that is the sum over the last dimension of the batch, of
    the matrices side by side, if their strides are those of such; else of a single one of them,
    and how many there are, and how far apart those of ``a`` and of ``b``."""
    count, (m, depth), n = a_shape[-3], a_shape[-2:], b_shape[-1]
    along = [(a_strides[-3], a_strides[-1]), (b_strides[-3], b_strides[-2])]
    sizes, ((a_inner, *a_outer), (b_inner, *b_outer)) = collapse((count, depth), along, (1, 0))
    parts = (sizes[1], a_outer[0], b_outer[0]) if len(sizes) > 1 else ()
    return (
        torch.Size((*a_shape[:-3], m, sizes[0])),
        (*a_strides[:-3], a_strides[-2], a_inner),
        torch.Size((*b_shape[:-3], sizes[0], n)),
        (*b_strides[:-3], b_inner, b_strides[-1]),
        parts,
    )


def _factor(value: Number, dtype: torch.dtype) -> Number | None:
    return None if value == 1 else encode(value, COMPUTE_DTYPE[dtype])


def matrix_product(
    a: Tensor,
    b: Tensor,
    added: Tensor | None = None,
    *,
    alpha: Number = 1,
    beta: Number = 1,
    summed: bool = False,
) -> Tensor:
    """``alpha * a[..., M, K] @ b[..., K, N] + beta * added``, their batches broadcast, in one
    launch; ``added`` broadcasts to the product, which is ``summed`` as in ``plan``.

    Shapes fit, and dtypes are equal (checked when the call was bound). The result is contiguous.
    """
    addend = None if added is None else Addend(added.shape, added.stride(), beta)
    found = plan(
        a.shape, a.stride(), b.shape, b.stride(), a.dtype, float32_precision(), alpha, addend,
        summed=summed, device=a.get_device(),
    )  # fmt: skip
    return run(found, a, b, added)


def run(
    plan: Plan, a: Tensor, b: Tensor, added: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """``matrix_product`` of operands of the shapes and strides that ``plan`` was made for, with a
    number of ``bias`` added to each column."""
    if plan.outer is not None:
        x, y = a.as_strided(*plan.outer[:2]), b.as_strided(*plan.outer[2:])
        return _add_products(plan, x, y, added, a.dtype)
    if plan.sums is not None:
        return _run_sums(plan, plan.sums, a, b, added)
    # Not new_empty(): of torch's allocators the strided ones have the least overhead.
    out = a.new_empty_strided(plan.shape, plan.strides)
    _launch(plan, out, a, b, added, bias, None)
    return out


def _run_sums(
    plan: Plan, sums: reduction.Plan, a: Tensor, b: Tensor, added: Tensor | None
) -> Tensor:
    if added is None and plan.factors[0] == 1:
        out = reduction.run(sums, (a, b), a.dtype)
        # In place: a view made inside a Function could not be modified in place by the user.
        return out if out.shape == plan.shape else out.as_strided_(plan.shape, plan.strides)
    # Rounded once, at the end.
    total = reduction.run(sums, (a, b), COMPUTE_DTYPE[a.dtype])
    return _add_products(plan, total, None, added, a.dtype)


def _add_products(
    plan: Plan, x: Tensor, y: Tensor | None, added: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``alpha * x * y + beta * added``, absent ones being 1 and 0."""
    alpha, beta = plan.factors
    out = x.new_empty_strided(plan.shape, plan.strides, dtype=dtype)
    into = out.view(x.shape if y is None else torch.broadcast_shapes(x.shape, y.shape))
    scalars = 0 if added is None else None, None, 1 if y is None else None
    elementwise(
        arithmetic.addr, 0, (added, x, y), scalars, (beta, alpha), COMPUTE_DTYPE[dtype], (dtype,),
        (into,),
    )  # fmt: skip
    return out


def product_into(out: Tensor, a: Tensor, b: Tensor, added: Tensor | None = None) -> None:
    """Write ``a @ b + added``, of matrices, into ``out``, which is dense, of any dtype, and may be
    what is added: each program reads its tile before it writes it."""
    addend = None if added is None else Addend(added.shape, added.stride())
    found = plan(a.shape, a.stride(), b.shape, b.stride(), a.dtype, float32_precision(), 1, addend)
    _launch(found, out, a, b, added, None, None)


def run_keeping(plan: Plan, a: Tensor, b: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
    """``run``, and what the plan's epilogue was applied to."""
    out, z = (a.new_empty_strided(plan.shape, plan.strides) for _ in range(2))
    _launch(plan, out, a, b, added, None, z)
    return out, z


def _launch(
    plan: Plan,
    out: Tensor,
    a: Tensor,
    b: Tensor,
    added: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
) -> None:
    if plan.shifted is not None and (a.data_ptr() | b.data_ptr()) % 16:
        plan = plan.shifted
    if plan.grid is not None:
        stride = None if bias is None else bias.stride(0)
        args = (out, a, b, added, *plan.geometry, bias, stride, z)
        launch_prepared(k.gemm, plan.grid, args, out, plan.meta)
