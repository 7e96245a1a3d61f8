"""Launching the reduction kernel: over which collapsed dimensions, in which tiles and parts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import COMPUTE_DTYPE, TRITON_DTYPE, Number, encode_all
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
from .configurations import WARPS, Configuration, choose, planned, problem_of

PROGRAMS_PER_PROCESSOR = 4
"""Programs that a launch should have for each multiprocessor, to hide the latency of its loads."""

LEAST_STEPS = 8
"""Steps of a tile along the reduced dimensions below which sharing them does not pay a launch."""


@dataclasses.dataclass(frozen=True, eq=False)
class Reduction:
    """A reduction as device functions of ``kernels.reduction``.

    Compared by identity, so that it is cheap to look up by: make each once.

    Attributes:
        map: each operand's element to what is combined, a tuple; None: the elements are that.
        combine: of two such tuples.
        identity: of ``combine``, in place of what is past the end.
        finish: what was combined to the results; None: it is them.
        indexed: whether ``map`` receives each element's place among those that are reduced
            together, and the last of what is combined is one.
    """

    map: Any
    combine: Any
    identity: tuple[float, ...]
    finish: Any = None
    indexed: bool = False

    def but(self, **changes: Any) -> Reduction:
        """It with some functions changed."""
        return dataclasses.replace(self, **changes)

    @cached_property
    def partial(self) -> Reduction:
        """It as the first of two launches does it: the results are parts, not finished."""
        return self.but(finish=None)

    @cached_property
    def total(self) -> Reduction:
        """It as the second launch does it: the elements are parts, mapped already."""
        return self.but(map=None)


SUM = Reduction(k.keep, k.add, (0.0,))
MEAN = SUM.but(finish=k.divide)
PRODUCT = Reduction(k.product, k.add, (0.0,))
AMAX = Reduction(k.keep, k.maximum, (-math.inf,))
AMIN = Reduction(k.keep, k.minimum, (math.inf,))


class Plan(NamedTuple):
    """How operands of certain shapes and strides are reduced.

    Attributes:
        shape, strides: of the result.
        geometry: the kernel's arguments from ``kept_shape`` to ``span``.
        rows: elements of the result.
        grid: of the launch.
        parts: programs that share a row.
        meta: the kernel's constexprs.
        accumulators: dtypes of the parts.
        numbers: the further arguments of the reduction's map and finish, encoded.
        second: of the launch that reduces the parts, where rows are shared.
    """

    shape: torch.Size
    strides: Strides
    geometry: tuple[Any, ...]
    rows: int
    grid: tuple[int]
    parts: int
    meta: dict[str, Any]
    accumulators: tuple[torch.dtype, ...]
    numbers: tuple[tuple[Number, ...], tuple[Number, ...]]
    second: Plan | None = None


@planned
def plan(
    reduction: Reduction,
    shapes: tuple[torch.Size, ...],
    strides: tuple[Strides, ...],
    dims: tuple[int, ...],
    keepdim: bool,
    element: torch.dtype,
    device: int,
    map_params: tuple[Number, ...] = (),
    finish_params: tuple[Number, ...] = (),
) -> Plan:
    """How to reduce operands of these shapes and strides. Args: as ``reduce`` has them."""
    compute = COMPUTE_DTYPE[element]
    before = encode_all(map_params, compute)
    after = encode_all(finish_params, compute)
    processors = processors_of(device)
    whole = _plan(reduction, shapes, strides, dims, keepdim, element, processors)
    if whole.parts == 1:
        return _tuned(whole._replace(numbers=(before, after)), len(shapes), element, device)
    # Few rows of many elements: several programs share each, and a second launch their parts.
    shared = _plan(reduction.partial, shapes, strides, dims, False, element, processors)
    shared = _tuned(shared, len(shapes), element, device)
    count = len(whole.accumulators)
    own = (torch.Size((whole.parts, whole.rows)),) * count, ((whole.rows, 1),) * count
    # For no processors: one program a row from here on, or the parts would be shared out again.
    second = _plan(reduction.total, *own, (0,), False, compute, 0)
    second = second._replace(shape=whole.shape, strides=whole.strides, numbers=((), after))
    return shared._replace(numbers=(before, ()), second=second)


def _plan(
    reduction: Reduction,
    shapes: tuple[torch.Size, ...],
    own_strides: tuple[Strides, ...],
    dims: tuple[int, ...],
    keepdim: bool,
    element: torch.dtype,
    processors: int,
) -> Plan:
    """One launch of ``plan``."""
    shape = broadcast_sizes(shapes)
    strides = [strides_as(own, s, shape) for own, s in zip(shapes, own_strides, strict=True)]
    reduced = [d for d in range(len(shape)) if d in dims]
    kept = [d for d in range(len(shape)) if d not in dims]
    kept_shape = torch.Size([shape[d] for d in kept])

    sizes = [shape[d] for d in reduced]
    own = [tuple([s[d] for d in reduced]) for s in strides]
    if reduction.indexed:
        own.append(dense_strides(sizes, range(len(sizes) - 1, -1, -1)))
    reduced_sizes, reduced_strides = collapse(sizes, own, fastest_first(sizes, own))
    own = [tuple([s[d] for d in kept]) for s in strides]
    out = dense_strides(kept_shape, range(len(kept) - 1, -1, -1))
    kept_sizes, (out_strides, *kept_strides) = collapse(
        kept_shape, [out, *own], fastest_first(kept_shape, own)
    )
    rows, columns = math.prod(kept_sizes), math.prod(reduced_sizes)

    runs = len(reduced_sizes) == 1 or reduced_sizes[0] >= k.RUN
    length = reduced_sizes[0] if runs else columns
    several = len(reduction.identity) > 1
    tile = (k.TILE_BYTES // 2 if several else k.TILE_BYTES) // COMPUTE_DTYPE[element].itemsize
    if along_rows(kept_strides, reduced_strides):
        block_columns = min(next_power_of_two(length), tile)
        block_rows = min(next_power_of_two(rows), tile // block_columns)
    else:
        block_rows = min(next_power_of_two(rows), k.KEPT_BLOCK)
        block_columns = min(next_power_of_two(length), tile // block_rows)
    steps = -(-length // block_columns) * (columns // max(length, 1))
    row_tiles = -(-rows // block_rows)
    parts = 1
    if row_tiles and steps >= LEAST_STEPS:
        parts = max(1, min(steps, processors * PROGRAMS_PER_PROCESSOR // row_tiles))
    span = -(-steps // parts)
    parts = max(1, -(-steps // max(span, 1)))

    every = list(zip(kept_strides, reduced_strides, strict=False))
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
    # 16 bytes a thread or more; of more in half precision, or of many operands, a few are spilled.
    most = 8 if element.itemsize == 2 or len(own_strides) > 3 else 4
    meta = {
        "MAP": reduction.map,
        "COMBINE": reduction.combine,
        "FINISH": reduction.finish,
        "IDENTITY": reduction.identity,
        "INDEXED": reduction.indexed,
        "RESULT": TRITON_DTYPE[element],
        "COMPUTE": TRITON_DTYPE[COMPUTE_DTYPE[element]],
        "RUNS": runs,
        "WIDE": wide,
        "BLOCK_ROWS": block_rows,
        "BLOCK_COLUMNS": block_columns,
        "num_warps": min(max(block_rows * block_columns * element.itemsize // 512, 1), most),
    }
    if len(shapes) > 1 and block_rows * block_columns * len(shapes) > 2048:
        # Of several operands twice as many threads hold as many numbers each, and none spills.
        meta["num_warps"] = 8
    result = kept_shape
    if keepdim:
        result = torch.Size([1 if d in dims else n for d, n in enumerate(shape)])
    result_strides = dense_strides(result, range(len(result) - 1, -1, -1))
    dtypes = [COMPUTE_DTYPE[element]] * len(reduction.identity)
    if reduction.indexed:
        dtypes[-1] = torch.int64
    grid = (row_tiles * parts,)
    return Plan(result, result_strides, geometry, rows, grid, parts, meta, tuple(dtypes), ((), ()))


def _tuned(plan: Plan, operands: int, element: torch.dtype, device: int) -> Plan:
    """``plan`` in the warps that were measured to be the fastest, if they were. Its blocks decide
    how many parts there are, and stay."""
    meta = plan.meta

    def build(c: Configuration) -> tuple[tuple[int], dict[str, Any]]:
        return plan.grid, {**meta, "num_warps": c.warps}

    kinds = meta["MAP"], meta["COMBINE"], meta["FINISH"]
    sizes = plan.rows, plan.geometry[6] * plan.geometry[7]
    problem = problem_of("reduce", kinds, sizes, operands, element.itemsize)
    default = Configuration(meta["BLOCK_ROWS"], meta["BLOCK_COLUMNS"], meta["num_warps"])
    return plan._replace(meta=choose(device, problem, default, WARPS, build)[1])


def along_rows(kept: Sequence[Sequence[int]], reduced: Sequence[Sequence[int]]) -> bool:
    """Whether the fastest reduced dimension moves faster in memory than the fastest kept one."""
    for a, b in zip(kept, reduced, strict=False):
        if a[0] and b[0]:
            return abs(b[0]) <= abs(a[0])
    return True


@cache
def processors_of(device: int) -> int:
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
    found = plan_for(operands, reduction, dims, keepdim, element, map_params, finish_params)
    return run(found, operands, result)


def plan_for(
    operands: tuple[Tensor, ...],
    reduction: Reduction,
    dims: tuple[int, ...],
    keepdim: bool,
    element: torch.dtype,
    map_params: tuple[Number, ...] = (),
    finish_params: tuple[Number, ...] = (),
) -> Plan:
    """``plan`` for tensors at hand."""
    if len(operands) == 1:
        (only,) = operands
        shapes: tuple[torch.Size, ...] = (only.shape,)
        strides: tuple[Strides, ...] = (only.stride(),)
    else:
        shapes = tuple([t.shape for t in operands])
        strides = tuple([t.stride() for t in operands])
    device = operands[0].get_device()
    return plan(
        reduction, shapes, strides, dims, keepdim, element, device, map_params, finish_params
    )


def run(plan: Plan, operands: tuple[Tensor, ...], result: torch.dtype) -> Tensor:
    """Reduce operands of the shapes and strides that ``plan`` was made for."""
    if plan.second is not None:
        parts = _parts(plan, operands)
        return run(plan.second, parts, result)
    out = _result(plan, operands[0], result)
    if plan.rows:
        _launch(plan, (out,), operands)
    return out


def run_many(
    plan: Plan, operands: tuple[Tensor, ...], results: tuple[torch.dtype | None, ...]
) -> tuple[Tensor | None, ...]:
    """``run`` with several results, of these dtypes; None for one that is not wanted."""
    if plan.second is not None:
        parts = _parts(plan, operands)
        return run_many(plan.second, parts, results)
    outs = tuple([None if d is None else _result(plan, operands[0], d) for d in results])
    if plan.rows:
        _launch(plan, outs, operands)
    return outs


def _result(plan: Plan, first: Tensor, dtype: torch.dtype) -> Tensor:
    # Not empty(): of torch's allocators the strided ones have the least overhead.
    if dtype is first.dtype:
        return first.new_empty_strided(plan.shape, plan.strides)
    return first.new_empty_strided(plan.shape, plan.strides, dtype=dtype)


def _parts(plan: Plan, operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What programs that share rows each make of their part."""
    shape, device = (plan.parts, plan.rows), operands[0].device
    parts = tuple([torch.empty(shape, dtype=d, device=device) for d in plan.accumulators])
    _launch(plan, parts, operands)
    return parts


def _launch(plan: Plan, outs: tuple[Tensor | None, ...], operands: tuple[Tensor, ...]) -> None:
    args = (outs, operands, *plan.numbers, *plan.geometry)
    launch_prepared(k.reduce, plan.grid, args, operands[0], plan.meta)


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
