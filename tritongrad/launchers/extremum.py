"""Launching the gradient of an extremum along a dimension: zeros, and one value a row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels import extremum as k
from ..layout import INT32_MAX, empty, next_power_of_two
from ..runtime import launch

SIDE_BY_SIDE = 128
"""Elements of a tile along the dimension that is contiguous, where that is not the one of a row."""


def place(
    g: Tensor, index: Tensor, shape: torch.Size, dim: int | None, dtype: torch.dtype
) -> Tensor:
    """A tensor of ``shape`` with ``g`` where ``index`` says along ``dim``, and zeros elsewhere.

    Args:
        g, index: of as many elements as ``shape`` has without ``dim``, in its order.
        dim: None of a number.
    """
    out = empty(g, shape, dtype=dtype)
    if not out.numel():
        return out
    if dim is None:
        before = length = after = 1
    else:
        before, length, after = math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])
    tile = k.TILE_BYTES // dtype.itemsize
    block_after = min(next_power_of_two(after), SIDE_BY_SIDE)
    block = min(next_power_of_two(length), tile // block_after)
    block_before = min(next_power_of_two(before), tile // (block_after * block))
    programs = -(-after // block_after) * -(-length // block) * -(-before // block_before)
    # They are small, and dense but for a `g` that a sum has expanded.
    tensors = out, g.contiguous(), index.contiguous()
    launch(
        k.place,
        (programs,),
        (*tensors, before, length, after),
        out,
        WIDE=out.numel() > INT32_MAX - tile * 4,
        BLOCK_BEFORE=block_before,
        BLOCK=block,
        BLOCK_AFTER=block_after,
    )
    return out
