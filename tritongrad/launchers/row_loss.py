"""Launching the kernel of losses of rows: tiles of whole rows, and programs that add them up."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import COMPUTE_DTYPE, TRITON_DTYPE, Number, encode_all
from ..kernels import row_loss as k
from ..layout import (
    INT32_MAX,
    Strides,
    broadcast_sizes,
    collapse,
    empty,
    next_power_of_two,
    reach,
    strides_as,
)
from ..runtime import launch_prepared
from .configurations import WARPS, Configuration, choose, planned, problem_of
from .reduction import (
    MEAN,
    SUM,
    Reduction,
    along_rows,
    processors_of,
    reduce,
)

PROGRAMS_PER_PROCESSOR, LEAST_STEPS = 4, 8
"""Programs for each multiprocessor, of rows that are summed; and steps of a tile below which to
share them does not pay a launch."""


class Plan(NamedTuple):
    """How rows of certain shapes and strides become losses.

    Attributes:
        rows: shape of all rows.
        losses: shape of the losses.
        parts: programs that share one.
        divisor: count of rows that one is the mean of; None: it is no mean.
        geometry: the kernel's arguments from ``map_params`` on.
        grid: None if there is nothing to compute.
        meta: the kernel's constexprs.
    """

    rows: torch.Size
    losses: torch.Size
    parts: int
    divisor: int | None
    geometry: tuple[Any, ...]
    grid: tuple[int] | None
    meta: dict[str, Any]


@planned
def plan(
    reduction: Reduction,
    shapes: tuple[torch.Size, ...],
    strides: tuple[Strides, ...],
    label_shapes: tuple[torch.Size, ...],
    label_strides: tuple[Strides, ...],
    batch: int | None,
    mean: bool,
    element: torch.dtype,
    device: int,
    map_params: tuple[Number, ...],
    finish_params: tuple[Number, ...],
) -> Plan:
    """How to compute losses.

    Args:
        reduction: of the last dimension of the operands, with further arguments, in ``finish`` the
            labels first. The first result is the loss.
        batch: dimensions in front whose losses are not added up; None: all.
        mean: whether the sum is divided by the count of rows.
        element: dtype that each element is rounded to before it is computed with.
    """
    full = broadcast_sizes([*shapes, *[torch.Size((*s, 1)) for s in label_shapes]])
    row_shape, columns = full[:-1], full[-1]
    losses = row_shape if batch is None else row_shape[:batch]
    groups, rows = (1, row_shape.numel()) if batch is None else (
        losses.numel(), row_shape[batch:].numel()
    )  # fmt: skip
    walks = [strides_as(own, s, full) for own, s in zip(shapes, strides, strict=True)]
    own = [walk[:-1] for walk in walks]
    column_strides = tuple([walk[-1] for walk in walks])
    own += [strides_as(s, w, row_shape) for s, w in zip(label_shapes, label_strides, strict=True)]
    sizes, kept = collapse(row_shape, own, range(len(row_shape) - 1, -1, -1))

    compute = COMPUTE_DTYPE[element]
    # A program of few threads, where six accumulators fill the registers of each.
    tile = k.TILE_BYTES // (4 if len(reduction.identity) > 3 else 1) // compute.itemsize
    if along_rows(kept, [(s,) for s in column_strides]):
        block_columns = min(next_power_of_two(max(columns, 1)), tile)
        block_rows = min(next_power_of_two(max(rows, 1)), tile // block_columns)
    else:
        block_rows = min(next_power_of_two(max(rows, 1)), k.SIDE_BY_SIDE)
        block_columns = min(next_power_of_two(max(columns, 1)), tile // block_rows)
    tiles = -(-rows // block_rows)
    parts = tiles
    if batch is not None:
        parts = 1
        if tiles * -(-columns // block_columns) >= LEAST_STEPS:
            programs = processors_of(device) * PROGRAMS_PER_PROCESSOR
            parts = max(1, min(tiles, programs // max(groups, 1)))
    span = -(-tiles // max(parts, 1))
    parts = -(-tiles // max(span, 1)) if batch is None else max(1, -(-tiles // max(span, 1)))

    reaches = [
        reach(sizes, w) + (columns - 1) * s for w, s in zip(kept, column_strides, strict=False)
    ]
    wide = max(*reaches, row_shape.numel(), columns) > INT32_MAX - tile
    count = rows if mean else None
    divisor = (rows,) if mean and parts == 1 else ()
    geometry = (
        encode_all(map_params, compute), encode_all(finish_params, compute),
        encode_all(divisor, compute), tuple(sizes),
        tuple(map(tuple, kept[: len(shapes)])), tuple(map(tuple, kept[len(shapes) :])),
        column_strides, rows, columns, tiles, span, parts,
    )  # fmt: skip
    constants = {
        "MAP": reduction.map,
        "COMBINE": reduction.combine,
        "FINISH": reduction.finish,
        "IDENTITY": reduction.identity,
        "RESULT": TRITON_DTYPE[element],
        "COMPUTE": TRITON_DTYPE[compute],
        "EACH": batch is None,
        "WIDE": wide,
        "BLOCK_ROWS": block_rows,
        "BLOCK_COLUMNS": block_columns,
        # 16 bytes a thread: of more the compiler spills a few.
        "num_warps": max(block_rows * block_columns * element.itemsize // 512, 1),
    }
    programs = groups * parts
    grid = (programs,) if programs else None

    def build(c: Configuration) -> tuple[tuple[int], dict[str, Any]]:
        return (programs,), {**constants, "num_warps": c.warps}

    kinds = reduction.map, reduction.combine, reduction.finish
    extent = row_shape.numel(), columns
    problem = problem_of("row_loss", kinds, extent, len(shapes), element.itemsize)
    default = Configuration(block_rows, block_columns, constants["num_warps"])
    meta = choose(device, problem, default, WARPS, build)[1]
    return Plan(row_shape, losses, 1 if batch is None else parts, count, geometry, grid, meta)


def plan_for(
    reduction: Reduction,
    operands: tuple[Tensor, ...],
    labels: tuple[Tensor, ...],
    batch: int | None,
    mean: bool,
    element: torch.dtype,
    map_params: tuple[Number, ...],
    finish_params: tuple[Number, ...],
) -> Plan:
    """``plan`` for tensors at hand."""
    return plan(
        reduction,
        tuple([t.shape for t in operands]),
        tuple([t.stride() for t in operands]),
        tuple([t.shape for t in labels]),
        tuple([t.stride() for t in labels]),
        batch,
        mean,
        element,
        operands[0].get_device(),
        map_params,
        finish_params,
    )


def losses(
    found: Plan,
    operands: tuple[Tensor, ...],
    labels: tuple[Tensor, ...],
    kept: int,
    result: torch.dtype,
) -> tuple[Tensor, ...]:
    """The losses, and for each row ``kept`` further results, of tensors like those of the plan."""
    first, compute = operands[0], COMPUTE_DTYPE[result]
    shared = found.parts > 1
    shape = (*found.losses, found.parts) if shared else found.losses
    out = empty(first, shape, dtype=compute if shared else result)
    sides = tuple([empty(first, found.rows, dtype=compute) for _ in range(kept)])
    if found.grid is not None:
        args = ((out, *sides), operands, labels, *found.geometry)
        launch_prepared(k.row_loss, found.grid, args, first, found.meta)
    if shared:
        last = (len(found.losses),)
        after = () if found.divisor is None else (found.divisor,)
        total = SUM if found.divisor is None else MEAN
        out = reduce(total, (out,), last, False, compute, result, (), after)
    return (out, *sides)
