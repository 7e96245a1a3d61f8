"""Launching the reduction kernel: over which collapsed dimensions, in which tiles and parts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..dtypes import COMPUTE_DTYPE, TRITON_DTYPE, Number, encode, encode_all
from ..kernels import moments
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

WARPS_PER_PROCESSOR = 32
"""That a launch should have on each multiprocessor, to hide the latency of its loads: half of what
may be resident, so that with up to 64 registers a thread all of them are at once."""

LEAST_STEPS, LEAST_COLUMNS = 16, 128
"""Tiles along the reduced dimensions, and elements, below which sharing them does not pay a launch.
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Reduction:
    """A reduction as device functions of ``kernels.reduction``.

    Compared by identity, so that it is cheap to look up by: make each once.

    Attributes:
        map: each operand's element to what is combined, a tuple; None: the elements are that.
        combine: of two such tuples.
        identity: of ``combine``, in place of what is past the end.
        finish: what was combined to the results; None: it is them.
        step: ``combine`` of what came before and of one more element, where that is less work; of
            indices it may count on their order. None: ``combine``.
        indexed: whether ``map`` receives each element's place among those that are reduced
            together, and the last of what is combined is one; it is ``LAST`` past the end.
        column: which of the results of ``map`` is combined; None: all of them.
        raw: bit i set: operand i (a condition) is not converted to the computing type.
        ahead: tiles that are loaded before the first is mapped: few of a map that needs many
            registers, or is long.
    """

    map: Any
    combine: Any
    identity: tuple[float, ...]
    finish: Any = None
    step: Any = None
    indexed: bool = False
    column: int | None = None
    raw: int = 0
    ahead: int = k.AHEAD

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
        return self.but(map=None, step=None, column=None, raw=0)


SUM = Reduction(k.keep, k.add, (0.0,))
MEAN = SUM.but(finish=k.divide)
PRODUCT = Reduction(k.product, k.add, (0.0,))
MOMENTS = Reduction(
    moments.moments, moments.merge_moments, (0.0, 0.0, 0.0, 0.0), step=moments.add_moment
)

LAST = 2**63 - 1
"""An index after all others, of what is past the end."""

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
        numbers: those in the operands' places and the further arguments of the reduction's map and
            finish, encoded.
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
    numbers: tuple[tuple[Number | None, ...], tuple[Number, ...], tuple[Number, ...]]
    second: Plan | None = None


@planned
def plan(
    reduction: Reduction,
    shapes: tuple[torch.Size | None, ...],
    strides: tuple[Strides | None, ...],
    dims: tuple[int, ...],
    keepdim: bool,
    element: torch.dtype,
    device: int,
    map_params: tuple[Number, ...] = (),
    finish_params: tuple[Number, ...] = (),
) -> Plan:
    """How to reduce operands of these shapes and strides, None where there is a number, or nothing,
    in an operand's place. Args: as ``reduce`` has them."""
    compute = COMPUTE_DTYPE[element]
    before = encode_all(map_params, compute)
    after = encode_all(finish_params, compute)
    none = (None,) * len(shapes)
    processors = processors_of(device)
    whole = _plan(reduction, shapes, strides, dims, keepdim, element, processors)
    if whole.parts == 1:
        return _tuned(whole._replace(numbers=(none, before, after)), len(shapes), element, device)
    # Few rows of many elements: several programs share each, and a second launch their parts.
    shared = _plan(reduction.partial, shapes, strides, dims, False, element, processors)
    shared = _tuned(shared, len(shapes), element, device)
    count = len(whole.accumulators)
    own = (torch.Size((whole.parts, whole.rows)),) * count, ((whole.rows, 1),) * count
    # For no processors: one program a row from here on, or the parts would be shared out again.
    second = _plan(reduction.total, *own, (0,), False, compute, 0)
    if reduction.indexed:
        second.meta.update({name: shared.meta[name] for name in ("INDEX", "IDENTITY")})
    numbers = (None,) * count, (), after
    second = second._replace(shape=whole.shape, strides=whole.strides, numbers=numbers)
    return shared._replace(numbers=(none, before, ()), second=second)


def _plan(
    reduction: Reduction,
    shapes: tuple[torch.Size | None, ...],
    own_strides: tuple[Strides | None, ...],
    dims: tuple[int, ...],
    keepdim: bool,
    element: torch.dtype,
    processors: int,
) -> Plan:
    """One launch of ``plan``."""
    shape = broadcast_sizes([own for own in shapes if own is not None])
    strides = [
        strides_as(own, s, shape)
        for own, s in zip(shapes, own_strides, strict=True)
        if own is not None and s is not None
    ]
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
    # Three accumulators and more are the most of what a thread keeps: half as many in half types,
    # and a quarter fewer threads, in 80 registers each.
    many = len(reduction.identity) > 2
    size = COMPUTE_DTYPE[element].itemsize if many else element.itemsize
    tile = k.TILE_BYTES // size
    if along_rows(kept_strides, reduced_strides):
        block_columns = min(next_power_of_two(length), tile)
        block_rows = min(next_power_of_two(rows), tile // block_columns)
    else:
        block_rows = min(next_power_of_two(rows), k.KEPT_BLOCK)
        block_columns = min(next_power_of_two(length), tile // block_rows)
    tiles, row_tiles = -(-length // block_columns), -(-rows // block_rows)
    several = columns // max(length, 1)
    warps = min(max(block_rows * block_columns * size // 512, 1), 4)
    parts = 1
    if row_tiles and tiles * several >= LEAST_STEPS and columns >= LEAST_COLUMNS:
        resident = WARPS_PER_PROCESSOR * 3 // 4 if many else WARPS_PER_PROCESSOR
        programs = processors * (resident // warps)
        parts = max(1, min(tiles * several, programs // row_tiles))
    # No more than there are in a row, and in a program's part of it.
    moving = sum(any(a) and any(b) for a, b in zip(kept_strides, reduced_strides, strict=False))
    share = reduction.ahead // max(moving, 1)
    ahead = max(1, min(share, tiles, tiles * several // parts))
    ahead = 1 << (ahead.bit_length() - 1)
    steps = -(-tiles // ahead) * several
    span = -(-steps // parts)
    parts = max(1, -(-steps // max(span, 1)))

    every = list(zip(kept_strides, reduced_strides, strict=False))
    reaches = [reach(kept_sizes, a) + reach(reduced_sizes, b) for a, b in every]
    wide = max(*reaches, parts * rows, columns) > INT32_MAX - ahead * tile
    step = reduction.step or reduction.combine
    index = None
    if reduction.indexed:
        index = tl.int64 if wide else tl.int32
        if reduced_strides[-1] != list(dense_strides(reduced_sizes, range(len(reduced_sizes)))):
            step = reduction.combine  # they do not come in their order
    identity = reduction.identity
    if index is tl.int32:
        identity = (*identity[:-1], INT32_MAX)

    def placed(walks: list[list[int]]) -> tuple[tuple[int, ...] | None, ...]:
        """Of each operand: None where it does not move, or there is none."""
        walk = iter([tuple(s) if any(s) else None for s in walks[: len(strides)]])
        return tuple([None if own is None else next(walk) for own in shapes])

    geometry = (
        tuple(kept_sizes),
        tuple(out_strides),
        placed(kept_strides),
        tuple(reduced_sizes),
        placed(reduced_strides) + tuple(map(tuple, reduced_strides[len(strides) :])),
        rows,
        length,
        steps,
        span,
    )
    meta = {
        "MAP": reduction.map,
        "COMBINE": reduction.combine,
        "STEP": step,
        "FINISH": reduction.finish,
        "IDENTITY": identity,
        "INDEX": index,
        "COLUMN": reduction.column,
        "RAW": reduction.raw,
        "RESULT": TRITON_DTYPE[element],
        "COMPUTE": TRITON_DTYPE[COMPUTE_DTYPE[element]],
        "RUNS": runs,
        "WIDE": wide,
        "BLOCK_ROWS": block_rows,
        "BLOCK_COLUMNS": block_columns,
        "AHEAD": ahead,
        "num_warps": warps,
    }
    result = kept_shape
    if keepdim:
        result = torch.Size([1 if d in dims else n for d, n in enumerate(shape)])
    result_strides = dense_strides(result, range(len(result) - 1, -1, -1))
    dtypes = [COMPUTE_DTYPE[element]] * len(reduction.identity)
    if reduction.indexed:
        dtypes[-1] = torch.int64 if wide else torch.int32
    grid = (row_tiles * parts,)
    return Plan(
        result, result_strides, geometry, rows, grid, parts, meta, tuple(dtypes), ((), (), ())
    )  # fmt: skip


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
    operands: tuple[Tensor | None, ...],
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
        assert only is not None
        shapes: tuple[torch.Size | None, ...] = (only.shape,)
        strides: tuple[Strides | None, ...] = (only.stride(),)
    else:
        shapes = tuple([t if t is None else t.shape for t in operands])
        strides = tuple([t if t is None else t.stride() for t in operands])
    device = _first(operands).get_device()
    return plan(
        reduction, shapes, strides, dims, keepdim, element, device, map_params, finish_params
    )


def _first(operands: tuple[Tensor | None, ...]) -> Tensor:
    return next(t for t in operands if t is not None)


def run(plan: Plan, operands: tuple[Tensor | None, ...], result: torch.dtype) -> Tensor:
    """Reduce operands of the shapes and strides that ``plan`` was made for."""
    if plan.second is not None:
        parts = _parts(plan, operands)
        return run(plan.second, parts, result)
    out = _result(plan, _first(operands), result)
    if plan.rows:
        _launch(plan, (out,), operands)
    return out


def run_many(
    plan: Plan, operands: tuple[Tensor | None, ...], results: tuple[torch.dtype | None, ...]
) -> tuple[Tensor | None, ...]:
    """``run`` with several results, of these dtypes; None for one that is not wanted."""
    if plan.second is not None:
        parts = _parts(plan, operands)
        return run_many(plan.second, parts, results)
    outs = tuple([None if d is None else _result(plan, _first(operands), d) for d in results])
    if plan.rows:
        _launch(plan, outs, operands)
    return outs


def _result(plan: Plan, first: Tensor, dtype: torch.dtype) -> Tensor:
    # Not empty(): of torch's allocators the strided ones have the least overhead.
    if dtype is first.dtype:
        return first.new_empty_strided(plan.shape, plan.strides)
    return first.new_empty_strided(plan.shape, plan.strides, dtype=dtype)


def _parts(plan: Plan, operands: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """What programs that share rows each make of their part."""
    shape, device = (plan.parts, plan.rows), _first(operands).device
    parts = tuple([torch.empty(shape, dtype=d, device=device) for d in plan.accumulators])
    _launch(plan, parts, operands)
    return parts


def _launch(
    plan: Plan, outs: tuple[Tensor | None, ...], operands: tuple[Tensor | None, ...]
) -> None:
    args = (outs, operands, *plan.numbers, *plan.geometry)
    launch_prepared(k.reduce, plan.grid, args, _first(operands), plan.meta)


def reduced_to(full: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """The dimensions of ``full`` along which a tensor of ``shape`` is broadcast to it."""
    missing = len(full) - len(shape)
    return tuple(range(missing)) + tuple(
        [d for d, n in enumerate(shape, missing) if n == 1 and full[d] != 1]
    )


def sum_to(tensor: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """``tensor`` summed over what ``shape`` was broadcast along, in ``dtype``."""
    dims = reduced_to(tensor.shape, shape)
    if not dims:
        return tensor.to(dtype)
    return reduce(SUM, (tensor,), dims, True, tensor.dtype, dtype).view(shape)


@cache
def _sum_of(function: Any, column: int, raw: int) -> Reduction:
    return SUM.but(map=function, column=column, raw=raw)


def sum_of(
    function: Any,
    raw: int,
    operands: tuple[Tensor | None, ...],
    scalars: tuple[Number | None, ...],
    consts: tuple[Number, ...],
    element: torch.dtype,
    column: int,
    full: torch.Size,
    shape: torch.Size,
    dtype: torch.dtype,
) -> Tensor:
    """One result of a pointwise device function over ``full``, the common shape of the operands,
    summed over what ``shape`` was broadcast along, in ``dtype``; nothing of its size is stored.

    Args: as ``launchers.pointwise.elementwise`` has them; ``column`` is the result's place.
    """
    kind = _sum_of(function, column, raw)
    found = plan_for(operands, kind, reduced_to(full, shape), True, element)
    compute = COMPUTE_DTYPE[element]
    numbers = tuple([v if v is None else encode(v, compute) for v in scalars])
    numbers = numbers or (None,) * len(operands)
    found = found._replace(numbers=(numbers, encode_all(consts, compute), ()))
    return run(found, operands, dtype).view(shape)


def reduce_product(
    x: Tensor, y: Tensor, dims: tuple[int, ...], dtype: torch.dtype, keepdim: bool = False
) -> Tensor:
    """``(x * y).sum(dims)`` in ``dtype``, without the product in memory.

    ``x`` and ``y`` broadcast and may be expanded (stride 0); ``dims`` are dimensions of their
    common shape. A dot product is ``reduce_product(x, y, (0,), dtype)`` and ``A @ x`` is
    ``reduce_product(A, x, (1,), dtype)``.
    """
    return reduce(PRODUCT, (x, y), dims, keepdim, torch.promote_types(x.dtype, y.dtype), dtype)
