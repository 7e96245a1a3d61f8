"""Launching dropout: in the order of memory where elements are numbered so, else by strides."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import COMPUTE_DTYPE, TRITON_DTYPE, Number, encode_all
from ..kernels import dropout as k
from ..kernels.philox import LANES
from ..layout import (
    INT32_MAX,
    Strides,
    collapse,
    dense_strides,
    fastest_first,
    next_power_of_two,
    reach,
    strides_as,
)
from ..runtime import launch_prepared

DENSE_BLOCK = 4 * LANES.value


class Plan(NamedTuple):
    """How a tensor of a certain shape and strides is walked.

    Attributes:
        strides: of the result.
        kernel, grid: None if it is empty.
        geometry: the kernel's arguments after the limit.
        meta: its constexprs that depend on shapes.
    """

    strides: Strides
    kernel: Any
    grid: tuple[int] | None
    geometry: tuple[Any, ...]
    meta: dict[str, Any]


@lru_cache(maxsize=4096)
def in_memory(shape: torch.Size, strides: Strides) -> Strides:
    """Strides of the result of a tensor of these strides, which keeps its order in memory."""
    return dense_strides(shape, fastest_first(shape, [strides]))


@lru_cache(maxsize=4096)
def _plan(
    shape: torch.Size,
    own: Strides,
    index: Strides,
    seeds: tuple[torch.Size, Strides] | None,
    compute: torch.dtype,
) -> Plan:
    """How to walk a tensor of this shape and these strides, whose elements are numbered by the
    strides ``index``, with seeds of a shape that broadcasts to its own, None if nothing is kept."""
    out = in_memory(shape, own)
    n = shape.numel()
    if n == 0:
        return Plan(out, None, None, (), {})
    of_seeds = (0,) * len(shape) if seeds is None else strides_as(*seeds, shape)
    walks = [out, own, index, of_seeds]
    sizes, merged = collapse(shape, walks, fastest_first(shape, walks))
    merged = [[0 if n == 1 else s for n, s in zip(sizes, walk, strict=True)] for walk in merged]
    wide = n > INT32_MAX - DENSE_BLOCK or any(reach(sizes, walk) > INT32_MAX for walk in merged)
    meta = {"COMPUTE": TRITON_DTYPE[compute], "WIDE": wide}
    if seeds is not None and (n == 1 or merged == [[1], [1], [1], [0]]):
        meta["num_warps"] = k.DENSE_WARPS
        return Plan(out, k.dropout_dense, (-(-n // DENSE_BLOCK),), (n,), meta)
    columns, outer = sizes[0], tuple(sizes[1:]) or (1,)
    rows = n // columns
    meta["ROW_AT_ONCE"] = merged[2][0] == merged[3][0] == 0
    meta["BLOCK_COLUMNS"] = min(next_power_of_two(columns), k.TILE)
    meta["BLOCK_ROWS"] = k.TILE // meta["BLOCK_COLUMNS"]
    grid = (-(-rows // meta["BLOCK_ROWS"]) * -(-columns // meta["BLOCK_COLUMNS"]),)
    strides = tuple([tuple(walk) if len(walk) > 1 else (*walk, 0) for walk in merged])
    return Plan(out, k.dropout_strided, grid, (outer, strides, rows, columns), meta)


def dropout(
    x: Tensor, seed: Tensor | None, index: Strides, limit: int, constants: tuple[Number, ...]
) -> Tensor:
    """Elements of ``x`` times the factor that kept ones have, or 0.

    Args:
        seed: broadcasts to the shape of ``x``; None where nothing is kept.
        index: strides by which elements are numbered, of those that are dropped together equal.
        limit: see ``launchers.philox.limit``.
        constants: the factor, and what is added to kept elements and to dropped ones, if anything.
    """
    compute = COMPUTE_DTYPE[x.dtype]
    seeds = None if seed is None else (seed.shape, seed.stride())
    plan = _plan(x.shape, x.stride(), index, seeds, compute)
    y = x.new_empty_strided(x.shape, plan.strides)
    if plan.grid is not None:
        args = (y, x, seed, encode_all(constants, compute), limit, *plan.geometry)
        launch_prepared(plan.kernel, plan.grid, args, x, plan.meta)
    return y
