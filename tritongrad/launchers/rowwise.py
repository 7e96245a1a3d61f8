"""Launching functions of whole rows: how many rows a program holds, if it can hold one."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import COMPUTE_DTYPE, TRITON_DTYPE, Number, encode_all
from ..kernels import rowwise as k
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
from .configurations import MOST_BLOCK, ROWS, Configuration, choose, planned, problem_of


class Plan(NamedTuple):
    """How rows of operands of certain shapes and strides are computed.

    Attributes:
        shape, strides: of the results that have a row's length.
        geometry: the kernel's arguments from ``constants`` on.
        grid: None if there is nothing to compute.
        meta: the kernel's constexprs.
    """

    shape: torch.Size
    strides: Strides
    geometry: tuple[Any, ...]
    grid: tuple[int, ...] | None
    meta: dict[str, Any]


@planned
def plan(
    function: Any,
    shapes: tuple[torch.Size, ...],
    strides: tuple[Strides, ...],
    dims: tuple[int, ...],
    element: torch.dtype,
    device: int,
    outs: int = 1,
    constants: tuple[Number, ...] = (),
    as_first: bool = False,
) -> Plan | None:
    """How to apply a device function to rows along ``dims``.

    Args:
        function: ROW of ``kernels.rowwise``.
        shapes, strides: of the operands; the first has the shape of the results, to which the
            others broadcast.
        element: dtype that each operand is converted to before it is computed with.
        device: index of the GPU.
        outs: number of results, each of the first operand's shape.
        constants: further arguments of the function.
        as_first: whether results lie in memory as the first operand does; else they are contiguous.

    Returns:
        None where a row is longer than a program can hold.
    """
    shape = shapes[0]
    order = fastest_first(shape, strides[:1]) if as_first else range(len(shape) - 1, -1, -1)
    result = dense_strides(shape, order)
    walks = [result] * outs
    walks += [strides_as(own, s, shape) for own, s in zip(shapes, strides, strict=True)]
    kept_shape, kept = merged(shape, walks, [d for d in range(len(shape)) if d not in dims])
    row_shape, row = merged(shape, walks, list(dims))
    rows, columns = math.prod(kept_shape), math.prod(row_shape)

    compute = COMPUTE_DTYPE[element]
    # A float64 fills two registers, and its exponential takes twice as many to compute.
    wide_by = compute.itemsize // 4
    tile, limit = k.TILE // wide_by**2, k.LIMIT // (4 * wide_by**2)
    limit //= next_power_of_two(max(len(shapes), outs))
    block_columns = next_power_of_two(max(columns, 1))
    first = outs  # the first operand's walk decides: it is the largest that is read
    side_by_side = kept[first][0] and abs(kept[first][0]) < abs(row[first][0])
    least = k.SIDE_BY_SIDE if side_by_side else 1
    block_rows = max(min(least, next_power_of_two(max(rows, 1))), tile // block_columns)
    block_rows = min(block_rows, next_power_of_two(max(rows, 1)))
    if block_rows * block_columns > limit:
        return None

    reaches = [reach(kept_shape, a) + reach(row_shape, b) for a, b in zip(kept, row, strict=True)]
    wide = max(*reaches, rows) > INT32_MAX - MOST_BLOCK
    elements = block_rows * block_columns * len(shapes) * wide_by

    def build(c: Configuration) -> tuple[tuple[int], dict[str, Any]]:
        meta = {
            "ROW": function,
            "RESULT": TRITON_DTYPE[element],
            "COMPUTE": TRITON_DTYPE[compute],
            "WIDE": wide,
            "BLOCK_ROWS": c.rows,
            "BLOCK_COLUMNS": c.columns,
            "num_warps": c.warps,
        }
        return (-(-rows // c.rows),), meta

    warps = min(max(next_power_of_two(elements // 1024), 4), k.MOST_WARPS)
    problem = problem_of(
        "rowwise",
        (function, "across" if side_by_side else None),
        (rows, columns),
        len(shapes),
        element.itemsize,
    )
    grid, meta = choose(
        device, problem, Configuration(block_rows, block_columns, warps), ROWS, build
    )
    geometry = (
        encode_all(constants, compute),
        tuple(kept_shape), tuple(row_shape),
        tuple(map(tuple, kept)), tuple(map(tuple, row)), rows, columns,
    )  # fmt: skip
    return Plan(shape, result, geometry, grid if shape.numel() else None, meta)


def merged(
    shape: torch.Size, walks: list[Strides], dims: list[int]
) -> tuple[list[int], list[list[int]]]:
    """The dimensions ``dims`` alone, merged where every operand walks them as one."""
    sizes = [shape[d] for d in dims]
    own = [tuple([walk[d] for d in dims]) for walk in walks]
    return collapse(sizes, own, fastest_first(sizes, own))


def run(
    plan: Plan, operands: tuple[Tensor, ...], dtypes: tuple[torch.dtype | None, ...]
) -> tuple[Tensor | None, ...]:
    """Results of these dtypes, None for one that is not wanted. The operands have the shapes and
    strides that ``plan`` was made for."""
    first = operands[0]
    outs = tuple(
        [
            None if d is None else first.new_empty_strided(plan.shape, plan.strides, dtype=d)
            for d in dtypes
        ]
    )
    if plan.grid is not None:
        launch_prepared(k.rowwise, plan.grid, (outs, operands, *plan.geometry), first, plan.meta)
    return outs
