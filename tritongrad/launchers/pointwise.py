"""Launching the pointwise kernels: which of the two, over which collapsed dimensions."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import COMPUTE_DTYPE, TRITON_DTYPE, Number, encode, encode_all
from ..kernels import pointwise as k
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
from ..op import Tensors
from ..runtime import launch, launch_prepared

NARROW = INT32_MAX - k.DENSE_BLOCK
"""Up to this many elements the dense kernel's offsets fit 32 bits."""


def elementwise(
    function: Any,
    raw: int,
    operands: Tensors,
    scalars: tuple[Number | None, ...],
    consts: tuple[Number, ...],
    result: torch.dtype,
    out_dtypes: tuple[torch.dtype | None, ...],
    into: tuple[Tensor | None, ...] = (),
) -> list[Tensor | None]:
    """Evaluate a device function over broadcast operands.

    Args:
        function: the device function, over one block for each operand and then the constants.
        raw: bit i set: operand i (a condition) is not converted to the computing type.
        operands: tensors; None where ``scalars`` has the value, or where nothing depends on it.
        result: dtype every operand is promoted to before it is computed with.
        out_dtypes: dtype of each output, None for one that is not wanted.
        into: the outputs of which the memory is decided, None for others; none for all others.
    """
    first: Tensor | None = None
    dense = True
    shape: torch.Size = torch.Size()
    for t in operands:
        if t is None:
            continue
        if first is None:
            first, shape = t, t.shape
            dense = t.is_contiguous()
        elif t.shape != shape or not t.is_contiguous():
            dense = False
    assert first is not None
    compute = COMPUTE_DTYPE[result]
    if scalars:
        scalars = tuple([v if v is None else encode(v, compute) for v in scalars])
    if consts:
        consts = encode_all(consts, compute)
    if into:
        dense = dense and all(t is None or t.is_contiguous() for t in into)
    else:
        into = (None,) * len(out_dtypes)
    if not dense:
        return _strided(
            function, raw, operands, scalars, consts, result, compute, out_dtypes, first, into
        )
    outs: list[Tensor | None] = [
        given
        if dtype is None or given is not None
        else torch.empty_like(first)
        if dtype is first.dtype
        else torch.empty_like(first, dtype=dtype)
        for dtype, given in zip(out_dtypes, into, strict=True)
    ]
    n = first.numel()
    if n:
        launch(
            k.pointwise_dense,
            (-(-n // k.DENSE_BLOCK),),
            (tuple(outs), operands, scalars, consts, n),
            first,
            F=function,
            RAW=raw,
            RESULT=TRITON_DTYPE[result],
            COMPUTE=TRITON_DTYPE[compute],
            WIDE=n > NARROW,
            BLOCK=k.DENSE_BLOCK,
        )
    return outs


class Plan(NamedTuple):
    """How operands of certain shapes and strides are walked that are not all dense in one order.

    Attributes:
        shape, strides: of each result that is to be made.
        kernel, grid: None if the results are empty.
        geometry: the kernel's arguments after the numbers.
        meta: its constexprs that depend on shapes.
    """

    shape: torch.Size
    strides: Strides
    kernel: Any
    grid: tuple[int] | None
    geometry: tuple[Any, ...]
    meta: dict[str, Any]


@lru_cache(maxsize=4096)
def _plan(
    operands: tuple[tuple[torch.Size, Strides] | None, ...],
    itemsize: int,
    given: tuple[Strides | None, ...],
) -> Plan:
    """How to walk operands of these shapes and strides, None where there is none; ``itemsize`` is
    the computing type's, ``given`` are strides of the results, None for those of the plan."""
    present = [operand for operand in operands if operand is not None]
    shape = broadcast_sizes([own for own, _ in present])
    walks = [strides_as(own, strides, shape) for own, strides in present]
    order = fastest_first(shape, walks)
    out_strides = dense_strides(shape, order)
    n = shape.numel()
    if n == 0:
        return Plan(shape, out_strides, None, None, (), {})
    outs = len(given)
    out_walks = [out_strides if own is None else own for own in given]
    sizes, merged = collapse(shape, [*out_walks, *walks], order)
    wide = n > INT32_MAX - k.STRIDED_TILE_BYTES or any(reach(sizes, s) > INT32_MAX for s in merged)
    if all(s == merged[0] for s in merged) and merged[0] == [1]:
        # Dense in one order that is not the row-major one (transposed, channels last).
        meta = {"WIDE": wide, "BLOCK": k.DENSE_BLOCK}
        return Plan(
            shape, out_strides, k.pointwise_dense, (-(-n // k.DENSE_BLOCK),), (n,), meta
        )  # fmt: skip
    columns, outer = sizes[0], tuple(sizes[1:])
    rows = n // columns
    tile = k.STRIDED_TILE_BYTES // itemsize
    block_columns = min(next_power_of_two(columns), tile)
    block_rows = tile // block_columns
    walk = iter(merged[outs:])
    in_strides = tuple([() if operand is None else tuple(next(walk)) for operand in operands])
    # Many addresses and values a thread: fewer elements of each, or they spill. Of vectors the
    # addresses are few, and of one row of them very few.
    count = outs + len(present)
    few = columns % 16 == 0 and (count < 10 or block_rows == 1)
    meta = {
        "WIDE": wide,
        "BLOCK_ROWS": block_rows,
        "BLOCK_COLUMNS": block_columns,
        "num_warps": 4 if few else 8 if count < 10 else 16,
    }
    grid = (-(-rows // block_rows) * -(-columns // block_columns),)
    geometry = outer, tuple(map(tuple, merged[:outs])), in_strides, rows, columns
    return Plan(shape, out_strides, k.pointwise_strided, grid, geometry, meta)


class Launch(NamedTuple):
    """A call of ``elementwise`` with one result, ready for operands of certain shapes and strides.

    Attributes:
        shape, strides, dtype: of the result; no dtype if it is that of the first operand.
        kernel, grid: None if the result is empty.
        arguments: the kernel's after the operands.
        meta: its constexprs.
    """

    shape: torch.Size
    strides: Strides
    dtype: torch.dtype | None
    kernel: Any
    grid: tuple[int] | None
    arguments: tuple[Any, ...]
    meta: dict[str, Any]


def prepare(
    function: Any,
    raw: int,
    operands: Tensors,
    scalars: tuple[Number | None, ...],
    consts: tuple[Number, ...],
    result: torch.dtype,
    dtype: torch.dtype,
) -> Launch:
    """The launch of ``elementwise``, of the same arguments, for operands like these."""
    compute = COMPUTE_DTYPE[result]
    plan = _plan(
        tuple([None if t is None else (t.shape, t.stride()) for t in operands]),
        compute.itemsize,
        (None,),
    )
    first = next(t for t in operands if t is not None)
    numbers = tuple([v if v is None else encode(v, compute) for v in scalars])
    meta = {
        "F": function,
        "RAW": raw,
        "RESULT": TRITON_DTYPE[result],
        "COMPUTE": TRITON_DTYPE[compute],
        **plan.meta,
    }
    return Launch(
        plan.shape,
        plan.strides,
        None if dtype is first.dtype else dtype,
        plan.kernel,
        plan.grid,
        (numbers, encode_all(consts, compute), *plan.geometry),
        meta,
    )


def run(launch: Launch, operands: Tensors) -> Tensor:
    """``elementwise`` of operands like those that ``launch`` was prepared for."""
    shape, strides, dtype, kernel, grid, arguments, meta = launch
    first = operands[0]
    if first is None:
        first = next(t for t in operands if t is not None)
    if dtype is None:
        out = first.new_empty_strided(shape, strides)
    else:
        out = first.new_empty_strided(shape, strides, dtype=dtype)
    if grid is not None:
        launch_prepared(kernel, grid, ((out,), operands, *arguments), out, meta)
    return out


def _strided(
    function: Any,
    raw: int,
    operands: Tensors,
    scalars: tuple[Any, ...],
    consts: tuple[Any, ...],
    result: torch.dtype,
    compute: torch.dtype,
    out_dtypes: tuple[torch.dtype | None, ...],
    like: Tensor,
    into: tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    """``elementwise`` where the operands are not all dense in the same order."""
    plan = _plan(
        tuple([None if t is None else (t.shape, t.stride()) for t in operands]),
        compute.itemsize,
        tuple([None if t is None else t.stride() for t in into]),
    )
    outs: list[Tensor | None] = [
        given
        if dtype is None or given is not None
        else like.new_empty_strided(plan.shape, plan.strides)
        if dtype is like.dtype
        else torch.empty_strided(plan.shape, plan.strides, dtype=dtype, device=like.device)
        for dtype, given in zip(out_dtypes, into, strict=True)
    ]
    if plan.grid is not None:
        launch(
            plan.kernel,
            plan.grid,
            (tuple(outs), operands, scalars, consts, *plan.geometry),
            like,
            F=function,
            RAW=raw,
            RESULT=TRITON_DTYPE[result],
            COMPUTE=TRITON_DTYPE[compute],
            **plan.meta,
        )
    return outs
