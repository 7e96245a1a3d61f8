"""Launching the reduction kernel: over which collapsed dimensions, in which tiles and parts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import COMPUTE_DTYPE, TRITON_DTYPE, Number, encode
from ..kernels import reduction as k
from ..layout import (
    INT32_MAX,
    Strides,
    broadcast_sizes,
    collapse,
    dense_strides,
    fastest_first,
    next_power_of_two,
    reach,
    strides_as,
)
from ..runtime import INTERPRETED, launch_prepared

PROGRAMS_PER_PROCESSOR = 4
"""Programs that a launch should have for each multiprocessor, to hide the latency of its loads."""

LEAST_STEPS = 8
"""Steps of a tile along the reduced dimensions below which sharing them does not pay a launch."""


@dataclasses.dataclass(frozen=True, eq=False)
class Reduction:
    """A reduction as device functions of ``kernels.reduction``.

    Compared by identity, so that it is cheap to look up by: make each once.

    Attributes:
        map: each operand's element to what is combined.
        combine, fold: of two tiles, and of a tile into its rows' results.
        identity: of ``combine``, in place of what is past the end.
        finish: the combined value to the result.
    """

    map: Any
    combine: Any
    fold: Any
    identity: float
    finish: Any = k.keep

    def but(self, **changes: Any) -> Reduction:
        """It with some functions changed."""
        return dataclasses.replace(self, **changes)

    @cached_property
    def partial(self) -> Reduction:
        """It as the first of two launches does it: the results are parts, not finished."""
        return self.but(finish=k.keep)

    @cached_property
    def total(self) -> Reduction:
        """It as the second launch does it: the elements are parts, mapped already."""
        return self.but(map=k.keep)


SUM = Reduction(k.keep, k.add, k.fold_add, 0.0)
MEAN = SUM.but(finish=k.divide)
PRODUCT = Reduction(k.product, k.add, k.fold_add, 0.0)
AMAX = Reduction(k.keep, k.maximum, k.fold_maximum, -math.inf)
AMIN = Reduction(k.keep, k.minimum, k.fold_minimum, math.inf)


class Plan(NamedTuple):
    """How operands of certain shapes and strides are reduced.

    Attributes:
        shape, strides: of the result.
        geometry: the kernel's arguments from ``kept_shape`` to ``span``.
        rows: elements of the result.
        grid: of the launch.
        parts: programs that share a row; more than one need a second launch.
        meta: the kernel's constexprs.
    """

    shape: torch.Size
    strides: Strides
    geometry: tuple[Any, ...]
    rows: int
    grid: tuple[int]
    parts: int
    meta: dict[str, Any]


@lru_cache(maxsize=4096)
def _plan(
    reduction: Reduction,
    shapes: tuple[torch.Size, ...],
    own_strides: tuple[Strides, ...],
    dims: tuple[int, ...],
    keepdim: bool,
    element: torch.dtype,
    processors: int,
) -> Plan:
    """Args: as ``reduce`` has them, with the shape and strides of each operand."""
    shape = broadcast_sizes(shapes)
    strides = [strides_as(own, s, shape) for own, s in zip(shapes, own_strides, strict=True)]
    reduced = [d for d in range(len(shape)) if d in dims]
    kept = [d for d in range(len(shape)) if d not in dims]
    kept_shape = torch.Size([shape[d] for d in kept])

    sizes = [shape[d] for d in reduced]
    own = [tuple([s[d] for d in reduced]) for s in strides]
    reduced_sizes, reduced_strides = collapse(sizes, own, fastest_first(sizes, own))
    own = [tuple([s[d] for d in kept]) for s in strides]
    out = dense_strides(kept_shape, range(len(kept) - 1, -1, -1))
    kept_sizes, (out_strides, *kept_strides) = collapse(
        kept_shape, [out, *own], fastest_first(kept_shape, own)
    )
    rows, columns = math.prod(kept_sizes), math.prod(reduced_sizes)

    runs = len(reduced_sizes) == 1 or reduced_sizes[0] >= k.RUN
    length = reduced_sizes[0] if runs else columns
    tile = k.TILE_BYTES // COMPUTE_DTYPE[element].itemsize
    if _along_rows(kept_strides, reduced_strides):
        block_columns = min(next_power_of_two(length), tile)
        block_rows = min(next_power_of_two(rows), tile // block_columns)
    else:
        block_rows = min(next_power_of_two(rows), k.KEPT_BLOCK)
        block_columns = min(next_power_of_two(length), tile // block_rows)
    steps = -(-length // block_columns) * (columns // max(length, 1))
    row_tiles = -(-rows // block_rows)
    parts = 1
    if steps >= LEAST_STEPS:
        parts = max(1, min(steps, processors * PROGRAMS_PER_PROCESSOR // row_tiles))
    span = -(-steps // parts)
    parts = max(1, -(-steps // max(span, 1)))

    every = list(zip(kept_strides, reduced_strides, strict=True))
    reaches = [reach(kept_sizes, a) + reach(reduced_sizes, b) for a, b in every]
    wide = max(*reaches, parts * rows, columns) > INT32_MAX - tile
    geometry = (
        tuple(kept_sizes),
        tuple(out_strides),
        tuple([tuple(s) for s in kept_strides]),
        tuple(reduced_sizes),
        tuple([tuple(s) for s in reduced_strides]),
        rows,
        length,
        steps,
        span,
    )
    meta = {
        "MAP": reduction.map,
        "COMBINE": reduction.combine,
        "FOLD": reduction.fold,
        "FINISH": reduction.finish,
        "IDENTITY": reduction.identity,
        "RESULT": TRITON_DTYPE[element],
        "COMPUTE": TRITON_DTYPE[COMPUTE_DTYPE[element]],
        "RUNS": runs,
        "WIDE": wide,
        "BLOCK_ROWS": block_rows,
        "BLOCK_COLUMNS": block_columns,
    }
    result = kept_shape
    if keepdim:
        result = torch.Size([1 if d in dims else n for d, n in enumerate(shape)])
    result_strides = dense_strides(result, range(len(result) - 1, -1, -1))
    return Plan(result, result_strides, geometry, rows, (row_tiles * parts,), parts, meta)


def _along_rows(kept: Sequence[Sequence[int]], reduced: Sequence[Sequence[int]]) -> bool:
    """Whether the fastest reduced dimension moves faster in memory than the fastest kept one."""
    for a, b in zip(kept, reduced, strict=True):
        if a[0] and b[0]:
            return abs(b[0]) <= abs(a[0])
    return True


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a device; the interpreter, where programs cost milliseconds, has one."""
    if INTERPRETED:
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def reduce(
    reduction: Reduction,
    operands: tuple[Tensor, ...],
    dims: tuple[int, ...],
    keepdim: bool,
    element: torch.dtype,
    result: torch.dtype,
    map_params: tuple[Number, ...] = (),
    finish_params: tuple[Number, ...] = (),
) -> Tensor:
    """Reduce broadcast operands over ``dims``; the result is contiguous.

    Args:
        dims: dimensions of the broadcast shape, not negative; none means that nothing is reduced.
        element: dtype that each element is rounded to before it is computed with.
        result: dtype of the result.
        map_params, finish_params: further arguments of the reduction's functions.
    """
    first = operands[0]
    device = first.device
    if len(operands) == 1:
        shapes: tuple[torch.Size, ...] = (first.shape,)
        strides: tuple[Strides, ...] = (first.stride(),)
    else:
        shapes = tuple([t.shape for t in operands])
        strides = tuple([t.stride() for t in operands])
    plan = _plan(reduction, shapes, strides, dims, keepdim, element, _processors(device))
    # Not empty(): of torch's allocators the strided ones have the least overhead.
    if result is first.dtype:
        out = first.new_empty_strided(plan.shape, plan.strides)
    else:
        out = torch.empty_strided(plan.shape, plan.strides, dtype=result, device=device)
    if not plan.rows:
        return out
    if map_params or finish_params:
        compute = COMPUTE_DTYPE[element]
        map_params = tuple([encode(v, compute) for v in map_params])
        finish_params = tuple([encode(v, compute) for v in finish_params])
    if plan.parts == 1:
        args = (out, operands, map_params, finish_params, *plan.geometry)
        launch_prepared(k.reduce, plan.grid, args, device, plan.meta)
    else:
        _in_parts(reduction, plan.parts, operands, out, dims, element, map_params, finish_params)
    return out


def _in_parts(
    reduction: Reduction,
    count: int,
    operands: tuple[Tensor, ...],
    out: Tensor,
    dims: tuple[int, ...],
    element: torch.dtype,
    map_params: tuple[Number, ...],
    finish_params: tuple[Number, ...],
) -> None:
    """Few rows of many elements: ``count`` programs share each, and a second launch their parts."""
    device, compute = out.device, COMPUTE_DTYPE[element]
    parts = torch.empty((count, out.numel()), dtype=compute, device=device)
    shapes, strides = tuple([t.shape for t in operands]), tuple([t.stride() for t in operands])
    processors = _processors(device)
    plan = _plan(reduction.partial, shapes, strides, dims, False, element, processors)
    args = (parts, operands, map_params, (), *plan.geometry)
    launch_prepared(k.reduce, plan.grid, args, device, plan.meta)
    # For no processors: one program a row from here on, or the parts would be shared out again.
    whole = _plan(reduction.total, (parts.shape,), (parts.stride(),), (0,), False, compute, 0)
    args = (out, (parts,), (), finish_params, *whole.geometry)
    launch_prepared(k.reduce, whole.grid, args, device, whole.meta)


def sum_to(tensor: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """``tensor`` summed over what ``shape`` was broadcast along, in ``dtype``."""
    missing = tensor.dim() - len(shape)
    dims = tuple(range(missing)) + tuple(
        [d for d, n in enumerate(shape, missing) if n == 1 and tensor.shape[d] != 1]
    )
    if not dims:
        return tensor.to(dtype)
    return reduce(SUM, (tensor,), dims, True, tensor.dtype, dtype).view(shape)


def reduce_product(
    x: Tensor, y: Tensor, dims: tuple[int, ...], dtype: torch.dtype, keepdim: bool = False
) -> Tensor:
    """``(x * y).sum(dims)`` in ``dtype``, without the product in memory.

    ``x`` and ``y`` broadcast and may be expanded (stride 0); ``dims`` are dimensions of their
    common shape. A dot product is ``reduce_product(x, y, (0,), dtype)`` and ``A @ x`` is
    ``reduce_product(A, x, (1,), dtype)``.
    """
    return reduce(PRODUCT, (x, y), dims, keepdim, torch.promote_types(x.dtype, y.dtype), dtype)
