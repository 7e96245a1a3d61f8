"""Launching the scan kernel: along which dimension, in which tiles and parts."""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import COMPUTE_DTYPE, TRITON_DTYPE
from ..kernels import reduction
from ..kernels import scan as k
from ..layout import (
    INT32_MAX,
    Strides,
    broadcast_sizes,
    collapse,
    dense_strides,
    empty,
    fastest_first,
    next_power_of_two,
    reach,
    strides_as,
)
from ..runtime import launch_prepared
from .reduction import processors_of

PROGRAMS_PER_PROCESSOR = 4
"""Programs that a launch should have for each multiprocessor, to hide the latency of its loads."""

LEAST_STEPS = 16
"""Blocks of a row below which sharing it does not pay two more launches."""

ACCUMULATED = COMPUTE_DTYPE | {torch.float32: torch.float64}
"""Result dtype -> the dtype it is scanned in. float32 in float64, as torch's on the CPU: elements
near zero would keep nothing of the large sums on the way to them, and memory is what takes time."""

HALVED: torch.dtype | None = torch.float64
"""What is scanned in it has half a tile: of 8 such numbers a thread ptxas spills some, to keep what
it takes to be enough warps resident. Not of a recurrence along rows, which it gives all registers
and which is the quicker for them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Scan:
    """A scan as device functions of ``kernels.scan``. Compared by identity: make each once.

    Attributes:
        combine: of two tuples of what is scanned.
        identity: of ``combine``.
        map: the operands' elements to such a tuple; None: they are it.
        finish: what was scanned and the operands' elements to the result; None: it is the result.
        shifts: how many elements further on each operand is read.
        fills: its value where there is none.
    """

    combine: Any
    identity: tuple[float, ...]
    map: Any = None
    finish: Any = None
    shifts: tuple[int, ...] = (0,)
    fills: tuple[float, ...] = (0.0,)


CUMSUM = Scan(reduction.add, (0.0,))
CUMPROD = Scan(reduction.multiply, (1.0,))
RECURRENCE = Scan(
    k.affine, (1.0, 0.0), finish=k.solution, shifts=(0, 0), fills=(0.0, 0.0)
)  # fmt: skip
CUMPROD_BACKWARD = {
    # Of (x, g, out), by the direction of the product: its gradient is scanned the other way.
    reverse: Scan(
        k.affine, (1.0, 0.0), k.cumprod_terms, k.cumprod_finish,
        (-1, 0, 1) if reverse else (1, 0, -1), (0.0, 0.0, 1.0),
    )
    for reverse in (False, True)
}  # fmt: skip


class Plan(NamedTuple):
    """How operands of certain shapes and strides are scanned.

    Attributes:
        geometry: the kernel's arguments from ``rows_shape`` to ``span``.
        rows: number of them.
        grid: of the launch.
        parts: programs that share a row.
        meta: the kernel's constexprs.
    """

    geometry: tuple[Any, ...]
    rows: int
    grid: tuple[int]
    parts: int
    meta: dict[str, Any]


@lru_cache(maxsize=4096)
def _plan(
    kind: Scan,
    shapes: tuple[torch.Size, ...],
    strides: tuple[Strides, ...],
    dim: int,
    reverse: bool,
    element: torch.dtype,
    processors: int,
) -> Plan:
    shape = broadcast_sizes(shapes)
    walks = [strides_as(own, s, shape) for own, s in zip(shapes, strides, strict=True)]
    out = dense_strides(shape, range(len(shape) - 1, -1, -1))
    others = [d for d in range(len(shape)) if d != dim]
    sizes = [shape[d] for d in others]
    own = [tuple([s[d] for d in others]) for s in walks]
    out_own = tuple([out[d] for d in others])
    rows_shape, (out_rows, *in_rows) = collapse(sizes, [out_own, *own], fastest_first(sizes, own))
    rows, length = math.prod(sizes), shape[dim]
    along = [s[dim] for s in walks]

    by_rows = 0 < abs(along[0]) <= abs(in_rows[0][0]) or rows == 1
    half = ACCUMULATED[element] is HALVED and not (by_rows and len(kind.identity) > 1)
    tile = k.TILE // 2 if half else k.TILE
    if by_rows:
        block = min(next_power_of_two(length), tile)
        block_rows = min(next_power_of_two(rows), tile // block)
    else:
        block_rows = min(next_power_of_two(rows), k.ROW_BLOCK)
        block = min(next_power_of_two(length), tile // block_rows)
    blocks, row_tiles = -(-length // block), -(-rows // block_rows)
    parts = 1
    if blocks >= LEAST_STEPS:
        parts = max(1, min(blocks, processors * PROGRAMS_PER_PROCESSOR // row_tiles))
    span = -(-blocks // parts)
    parts = -(-blocks // span)

    every = zip(in_rows, along, strict=True)
    reaches = [reach(rows_shape, r) + (length + 1) * abs(s) for r, s in every]
    geometry = (
        tuple(rows_shape), tuple(out_rows), tuple([tuple(s) for s in in_rows]),
        out[dim], tuple(along), rows, length, span,
    )  # fmt: skip
    meta = {
        "MAP": kind.map,
        "COMBINE": kind.combine,
        "FINISH": kind.finish,
        "IDENTITY": kind.identity,
        "SHIFTS": kind.shifts,
        "FILLS": kind.fills,
        "REVERSE": reverse,
        "RESULT": TRITON_DTYPE[element],
        "COMPUTE": TRITON_DTYPE[ACCUMULATED[element]],
        "WIDE": max(*reaches, shape.numel()) > INT32_MAX - k.TILE,
        "BLOCK_ROWS": block_rows,
        "BLOCK": block,
    }
    return Plan(geometry, rows, (row_tiles * parts,), parts, meta)


class Launch(NamedTuple):
    """A scan, ready for operands of certain shapes and strides; no plan if they are empty."""

    shape: torch.Size
    plan: Plan | None
    kind: Scan
    dtype: torch.dtype


def prepare(
    kind: Scan, operands: tuple[Tensor, ...], dim: int, reverse: bool, dtype: torch.dtype
) -> Launch:
    """The scan along ``dim`` of operands of one shape, or broadcast.

    Args:
        dim: not negative.
        reverse: whether to begin at the last element.
        dtype: that each element is rounded to before it is computed with, and of the result.
    """
    shapes, strides = tuple([t.shape for t in operands]), tuple([t.stride() for t in operands])
    shape = broadcast_sizes(shapes)
    if not shape.numel():
        return Launch(shape, None, kind, dtype)
    processors = processors_of(operands[0].get_device())
    return Launch(shape, _plan(kind, shapes, strides, dim, reverse, dtype, processors), kind, dtype)


def run(launch: Launch, operands: tuple[Tensor, ...]) -> Tensor:
    """Scan operands like those that ``launch`` was prepared for; the result is contiguous."""
    shape, plan, kind, dtype = launch
    out = empty(operands[0], shape, dtype=dtype)
    if plan is None:
        return out
    outs = (None,) * (len(kind.identity) - 1) + (out,) if kind.finish is None else (out,)
    before = None if plan.parts == 1 else _before(kind, plan, operands, dtype)
    _launch(plan, outs, operands, None, before)
    return out


def _before(
    kind: Scan, plan: Plan, operands: tuple[Tensor, ...], element: torch.dtype
) -> tuple[Tensor, ...]:
    """What each part of a row has to begin with: the scan of all parts' totals."""
    compute, device = ACCUMULATED[element], operands[0].device

    def buffers() -> tuple[Tensor, ...]:
        shape = (plan.parts, plan.rows)
        return tuple([torch.empty(shape, dtype=compute, device=device) for _ in kind.identity])

    totals, before = buffers(), buffers()
    _launch(plan, (), operands, totals, None)
    shapes, strides = tuple([t.shape for t in totals]), tuple([t.stride() for t in totals])
    count = len(totals)
    bare = _bare(kind, count)
    # For no processors: one program a row, or the parts would be shared out again.
    again = _plan(bare, shapes, strides, 0, False, compute, 0)
    _launch(again, before, totals, None, None)
    return before


@lru_cache(maxsize=64)
def _bare(kind: Scan, count: int) -> Scan:
    """``kind`` of what has been mapped already and is not finished."""
    return Scan(kind.combine, kind.identity, shifts=(0,) * count, fills=(0.0,) * count)


def _launch(
    plan: Plan,
    outs: tuple[Tensor | None, ...],
    operands: tuple[Tensor, ...],
    totals: tuple[Tensor, ...] | None,
    before: tuple[Tensor, ...] | None,
) -> None:
    args = (outs, operands, totals, before, *plan.geometry)
    launch_prepared(k.scan, plan.grid, args, operands[0], plan.meta)
