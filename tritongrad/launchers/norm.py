"""Launching the normalisation of rows and its derivatives: how many rows a program takes, if it can
hold one, and how sums over rows are put together."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import COMPUTE_DTYPE, TRITON_DTYPE, encode
from ..kernels import norm as k
from ..kernels import norm_second as k2
from ..kernels import reduction as combine
from ..layout import INT32_MAX, Strides, dense_strides, empty, next_power_of_two, reach
from ..op import Tensors
from ..runtime import launch_prepared
from .configurations import (
    COLUMNS,
    MOST_BLOCK,
    ROWS,
    Configuration,
    choose,
    planned,
    problem_of,
)
from .reduction import SUM, Reduction, plan_for, processors_of, run_many
from .rowwise import merged

PROGRAMS_PER_PROCESSOR = 2
"""Programs for each multiprocessor where each adds up rows: one reads while the other computes."""

Walks = tuple[Strides | None, ...]

# Sums over rows, of what a first launch summed, and of long rows.
BOTH = Reduction(None, k2.add_two, (0.0, 0.0))
ONE = Reduction(None, combine.add, (0.0,))
WEIGHT_AND_BIAS = Reduction(k2.weight_and_bias, k2.add_two, (0.0, 0.0))
CENTRED_WEIGHT, WEIGHT = SUM.but(map=k2.centred_weight), SUM.but(map=k2.weight)
CENTRED_SECOND, SECOND = SUM.but(map=k2.centred_weight_second), SUM.but(map=k2.weight_second)


class Plan(NamedTuple):
    """How the rows of operands of certain shapes and strides are computed.

    Attributes:
        geometry: the kernels' arguments from ``kept_shape`` on.
        grid: None if there is nothing to compute.
        long: whether a row is walked in blocks.
        meta: the kernels' constexprs.
    """

    geometry: tuple[Any, ...]
    grid: tuple[int, ...] | None
    long: bool
    meta: dict[str, Any]


@planned
def plan(
    kernel: str,
    shape: torch.Size,
    walks: Walks,
    axes: int,
    budget: int,
    sums: bool,
    centred: bool,
    compute: torch.dtype,
    itemsize: int,
    device: int,
) -> Plan:
    """How to compute with operands of ``shape``, of which the last ``axes`` dimensions are a row.

    Args:
        kernel: name of the one that is launched.
        walks: strides of each operand, None where there is none.
        budget: numbers that a row may have, one of those of ``kernels.norm``.
        itemsize: bytes of an element that is read.
        sums: whether programs add up rows, for which they need as many registers again.
    """
    kept = len(shape) - axes
    dense = dense_strides(shape, range(len(shape) - 1, -1, -1))
    # The results' first, so that rows and columns are numbered as they lie in those.
    present = [dense, *[w for w in walks if w is not None]]
    kept_shape, kept_strides = merged(shape, present, list(range(kept)))
    row_shape, row_strides = merged(shape, present, list(range(kept, len(shape))))
    rows, columns = math.prod(kept_shape), math.prod(row_shape)

    # A float64 fills two registers, and takes as many again to be computed.
    limit = budget // (compute.itemsize // 4) ** 2 // (2 if sums else 1)
    block_columns = next_power_of_two(max(columns, 1))
    long = block_columns > limit
    if long:
        block_columns = k.LONG_BLOCK * 4 // compute.itemsize * budget // k.FORWARD
        block_rows = 1
    else:
        tile = k.TILE * limit // k.FORWARD
        block_rows = max(1, min(tile // block_columns, next_power_of_two(max(rows, 1))))
    tiles = -(-rows // block_rows)
    programs = min(tiles, PROGRAMS_PER_PROCESSOR * processors_of(device)) if sums else tiles

    every = zip(kept_strides, row_strides, strict=True)
    reaches = [reach(kept_shape, a) + reach(row_shape, b) for a, b in every]
    wide = max(*reaches, rows, programs * columns) > INT32_MAX - MOST_BLOCK
    elements = block_rows * block_columns
    least = 4 if long else min(4, elements // 256)

    def build(c: Configuration) -> tuple[tuple[int], dict[str, Any]]:
        meta = {
            "CENTRED": centred,
            "LONG": long,
            "COMPUTE": TRITON_DTYPE[compute],
            "WIDE": wide,
            "BLOCK_ROWS": c.rows,
            "BLOCK_COLUMNS": c.columns,
            "num_warps": c.warps,
        }
        # Of programs that add up rows there are as many as there is memory for their sums.
        return (programs if sums else -(-rows // c.rows),), meta

    default = Configuration(block_rows, block_columns, min(max(elements // 512, least, 1), 16))
    kinds = ("centred" if centred else None, "sums" if sums else None, "long" if long else None)
    given = sum(w is not None for w in walks)
    problem = problem_of(kernel, kinds, (rows, columns), given, itemsize)
    grid, meta = choose(device, problem, default, COLUMNS if long else ROWS, build)
    taken = zip(iter(kept_strides[1:]), iter(row_strides[1:]), strict=True)
    pairs = [((), ()) if w is None else next(taken) for w in walks]
    geometry = (
        tuple(kept_shape), tuple(row_shape),
        tuple([tuple(a) for a, _ in pairs]), tuple([tuple(b) for _, b in pairs]),
        rows, columns,
    )  # fmt: skip
    return Plan(geometry, grid if shape.numel() else None, long, meta)


def _plan(
    kernel: str,
    operands: Tensors,
    axes: int,
    budget: int,
    sums: bool,
    centred: bool,
    compute: torch.dtype,
) -> Plan:
    first = next(t for t in operands if t is not None)
    walks = tuple([None if t is None else t.stride() for t in operands])
    return plan(
        kernel, first.shape, walks, axes, budget, sums, centred, compute, first.itemsize,
        first.get_device(),
    )  # fmt: skip


def _dense(vector: Tensor | None) -> Tensor | None:
    """A weight or bias as the kernels read it: small, and read by every row."""
    return vector if vector is None else vector.contiguous()


def forward(
    operands: tuple[Tensor, ...],
    axes: int,
    centred: bool,
    eps: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    value: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """The normalised operand, or sum of two; that sum; the mean, if it is centred, and the
    reciprocal of the deviation, of each row and not rounded. Without ``value`` those alone."""
    first = operands[0]
    compute = COMPUTE_DTYPE[first.dtype]
    budget = k.FORWARD
    if weight is not None and bias is not None and weight.itemsize == 4:
        # Rows of the most numbers do not fit beside these two.
        budget //= 1 if weight.numel() <= budget // 2 else 2
    found = _plan("norm_fwd", operands, axes, budget, False, centred, compute)
    kept = first.shape[: first.dim() - axes]
    y = empty(first, first.shape) if value else None
    total = empty(first, first.shape) if len(operands) == 2 else None
    mean = empty(first, kept, dtype=compute) if centred else None
    rstd = empty(first, kept, dtype=compute)
    if found.grid is not None:
        args = (
            y, total, mean, rstd, _dense(weight), _dense(bias), operands, encode(eps, compute),
            *found.geometry,
        )  # fmt: skip
        launch_prepared(k.norm_fwd, found.grid, args, first, found.meta)
    return y, total, mean, rstd


def backward(
    g: Tensor,
    x: Tensor,
    added: Tensor | None,
    axes: int,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    dtypes: tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None],
) -> Tensors:
    """Gradients of x, weight and bias, of these dtypes; None for one that is not wanted.

    Args:
        added: a further gradient, which dx is the sum with.
    """
    centred = mean is not None
    dx_dtype, dweight_dtype, dbias_dtype = dtypes
    compute = COMPUTE_DTYPE[x.dtype]
    sums = dweight_dtype is not None or dbias_dtype is not None
    operands: Tensors = (g, x) if added is None else (g, x, added)
    # One more operand does not fit beside rows of the most numbers.
    budget = k.BACKWARD if added is None else k.BACKWARD // 2
    found = _plan("norm_bwd", operands, axes, budget, sums, centred, compute)
    row = x.shape[x.dim() - axes :]
    if found.grid is None:  # sums of nothing are zeros
        shapes = x.shape, row, row
        return tuple(
            [
                None if d is None else x.new_zeros(s, dtype=d)
                for s, d in zip(shapes, dtypes, strict=True)
            ]
        )
    apart = sums and found.long
    if apart:  # then a program need not add up rows, and may hold them after all
        found = _plan("norm_bwd", operands, axes, budget, False, centred, compute)
    assert found.grid is not None
    dx = None if dx_dtype is None else empty(x, x.shape, dtype=dx_dtype)
    parts = [
        None if d is None or apart else empty(x, (*found.grid, *row), dtype=compute)
        for d in dtypes[1:]
    ]
    if dx is not None or not apart:
        args = dx, *parts, mean, rstd, _dense(weight), operands, *found.geometry
        launch_prepared(k.norm_bwd, found.grid, args, x, found.meta)
    if not sums:
        return dx, None, None
    if apart:
        return dx, *_long_sums(g, x, axes, mean, rstd, compute, dweight_dtype, dbias_dtype)
    present = tuple([p for p in parts if p is not None])
    wanted = tuple([d for d in dtypes[1:] if d is not None])
    added_up = iter(_over_rows(BOTH if len(present) == 2 else ONE, present, axes, compute, wanted))
    return dx, *[None if d is None else next(added_up) for d in dtypes[1:]]


def _long_sums(
    g: Tensor,
    x: Tensor,
    axes: int,
    mean: Tensor | None,
    rstd: Tensor,
    compute: torch.dtype,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
) -> Tensors:
    """Gradients of weight and bias of rows that are too long to be added up on the way."""
    if dweight_dtype is None:
        assert dbias_dtype is not None
        return None, bias_gradient(g, axes, dbias_dtype)
    if mean is None:
        operands = (g, x, _column(rstd, axes))
        return _over_rows(WEIGHT, operands, axes, compute, (dweight_dtype,))[0], None
    both = (g, x, _column(rstd, axes), _column(mean, axes))
    if dbias_dtype is None:
        return _over_rows(CENTRED_WEIGHT, both, axes, compute, (dweight_dtype,))[0], None
    return _over_rows(WEIGHT_AND_BIAS, both, axes, compute, (dweight_dtype, dbias_dtype))


def second(
    v: Tensor | None,
    p: Tensor | None,
    q: Tensor | None,
    g: Tensor,
    x: Tensor,
    axes: int,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    dtypes: tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None],
) -> Tensors:
    """Gradients of g, x and weight, of these dtypes, for those of dx, dweight and dbias, of which
    some may be None; so may results that are not wanted."""
    centred = mean is not None
    dg_dtype, dx_dtype, dweight_dtype = dtypes
    compute = COMPUTE_DTYPE[x.dtype]
    operands = v, g, x
    sums = dweight_dtype is not None
    found = _plan("norm_bwd_bwd", operands, axes, k.SECOND, sums, centred, compute)
    row = x.shape[x.dim() - axes :]
    if found.grid is None:
        shapes = x.shape, x.shape, row
        return tuple(
            [
                None if d is None else x.new_zeros(s, dtype=d)
                for s, d in zip(shapes, dtypes, strict=True)
            ]
        )
    apart = sums and found.long
    if apart:
        found = _plan("norm_bwd_bwd", operands, axes, k.SECOND, False, centred, compute)
    assert found.grid is not None
    dg = None if dg_dtype is None else empty(x, x.shape, dtype=dg_dtype)
    dx = None if dx_dtype is None else empty(x, x.shape, dtype=dx_dtype)
    part = empty(x, (*found.grid, *row), dtype=compute) if sums and not apart else None
    ev, evx = (torch.empty_like(rstd) if apart else None for _ in range(2))
    args = (
        dg, dx, part, ev, evx, mean, rstd, _dense(weight), _dense(p), _dense(q), operands,
        *found.geometry,
    )  # fmt: skip
    launch_prepared(k2.norm_bwd_bwd, found.grid, args, x, found.meta)
    if not sums:
        return dg, dx, None
    wanted = (dweight_dtype,)
    if part is not None:
        return dg, dx, _over_rows(ONE, (part,), axes, compute, wanted)[0]
    if v is None:
        return dg, dx, x.new_zeros(row, dtype=dweight_dtype)
    assert ev is not None
    assert evx is not None
    columns = [_column(t, axes) for t in (rstd, evx)]
    if mean is None:
        return dg, dx, _over_rows(SECOND, (g, v, x, *columns), axes, compute, wanted)[0]
    columns += [_column(t, axes) for t in (mean, ev)]
    return dg, dx, _over_rows(CENTRED_SECOND, (g, v, x, *columns), axes, compute, wanted)[0]


def bias_gradient(g: Tensor, axes: int, dtype: torch.dtype) -> Tensor:
    """That of the bias alone, which needs nothing but g."""
    if not g.numel():
        return g.new_zeros(g.shape[g.dim() - axes :], dtype=dtype)
    (found,) = _over_rows(SUM, (g,), axes, COMPUTE_DTYPE[g.dtype], (dtype,))
    assert found is not None
    return found


def _column(of_rows: Tensor, axes: int) -> Tensor:
    """One number a row, as operands that rows are broadcast along."""
    return of_rows.reshape(*of_rows.shape, *[1] * axes)


def _over_rows(
    kind: Reduction,
    operands: tuple[Tensor, ...],
    axes: int,
    compute: torch.dtype,
    dtypes: tuple[torch.dtype | None, ...],
) -> Tensors:
    """Sums over all dimensions but the last ``axes``."""
    dims = tuple(range(operands[0].dim() - axes))
    return run_many(plan_for(operands, kind, dims, False, compute), operands, dtypes)
