"""Launching the pointwise kernels: which of the two, over which collapsed dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dtypes import COMPUTE_DTYPE, TRITON_DTYPE, Number, encode, encode_all
from ..kernels import pointwise as k
from ..layout import (
    INT32_MAX,
    broadcast_shape,
    collapse,
    dense_strides,
    expanded_strides,
    fastest_first,
    next_power_of_two,
    reach,
)
from ..op import Tensors
from ..runtime import launch

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
) -> list[Tensor | None]:
    """Evaluate a device function over broadcast operands.

    Args:
        function: the device function, over one block for each operand and then the constants.
        raw: bit i set: operand i (a condition) is not converted to the computing type.
        operands: tensors; None where ``scalars`` has the value, or where nothing depends on it.
        result: dtype every operand is promoted to before it is computed with.
        out_dtypes: dtype of each output, None for one that is not wanted.
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
    if not dense:
        return _strided(
            function, raw, operands, scalars, consts, result, compute, out_dtypes, first
        )
    outs: list[Tensor | None] = [
        None
        if dtype is None
        else torch.empty_like(first)
        if dtype is first.dtype
        else torch.empty_like(first, dtype=dtype)
        for dtype in out_dtypes
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
) -> list[Tensor | None]:
    """``elementwise`` where the operands are not all dense in the same order."""
    present = [t for t in operands if t is not None]
    shape = broadcast_shape(present)
    strides = [expanded_strides(t, shape) for t in present]
    order = fastest_first(shape, strides)
    out_strides = dense_strides(shape, order)
    outs: list[Tensor | None] = [
        None
        if dtype is None
        else torch.empty_strided(shape, out_strides, dtype=dtype, device=like.device)
        for dtype in out_dtypes
    ]
    if 0 in shape:
        return outs
    sizes, merged = collapse(shape, [out_strides, *strides], order)
    n = shape.numel()
    wide = n > INT32_MAX - k.STRIDED_TILE_BYTES or any(reach(sizes, s) > INT32_MAX for s in merged)
    common = {
        "F": function,
        "RAW": raw,
        "RESULT": TRITON_DTYPE[result],
        "COMPUTE": TRITON_DTYPE[compute],
        "WIDE": wide,
    }
    if all(s == merged[0] for s in merged) and merged[0] == [1]:
        # Dense in one order that is not the row-major one (transposed, channels last).
        launch(
            k.pointwise_dense,
            (-(-n // k.DENSE_BLOCK),),
            (tuple(outs), operands, scalars, consts, n),
            like,
            BLOCK=k.DENSE_BLOCK,
            **common,
        )
        return outs
    columns, outer = sizes[0], tuple(sizes[1:])
    rows = n // columns
    tile = k.STRIDED_TILE_BYTES // compute.itemsize
    block_columns = min(next_power_of_two(columns), tile)
    block_rows = tile // block_columns
    walk = iter(merged[1:])
    in_strides = tuple([tuple(next(walk)) if t is not None else () for t in operands])
    grid = (-(-rows // block_rows) * -(-columns // block_columns),)
    launch(
        k.pointwise_strided,
        grid,
        (
            tuple(outs), operands, scalars, consts,
            outer, (tuple(merged[0]),) * len(outs), in_strides, rows, columns,
        ),
        like,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        # Many addresses and values a thread: fewer elements of each, or they spill.
        num_warps=4 if len(outs) + len(operands) < 7 else 8,
        **common,
    )  # fmt: skip
    return outs
