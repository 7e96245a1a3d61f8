"""Shapes and strides: broadcasting, torch's choice of an output's layout, collapsing dimensions.

The output layout follows TensorIterator, so that results keep the memory format of the inputs:
dimensions are ordered by the strides of the operands, the first operand that tells them apart
deciding, and the output is dense in that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Strides = tuple[int, ...]

INT32_MAX = 2**31 - 1


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """``like.new_empty``, contiguous, in less than half of its time: of torch's allocators the
    strided ones have the least overhead."""
    if dtype is None or dtype is like.dtype:
        return like.new_empty_strided(shape, row_major(shape))
    return like.new_empty_strided(shape, row_major(shape), dtype=dtype)


def broadcast_shape(tensors: Sequence[Tensor]) -> torch.Size:
    """Common shape of ``tensors``. They must broadcast (checked when the call was bound)."""
    return broadcast_sizes([t.shape for t in tensors])


def broadcast_sizes(shapes: Sequence[torch.Size]) -> torch.Size:
    """Common shape of tensors of ``shapes``, which must broadcast."""
    rank = max([len(s) for s in shapes])
    shape = [1] * rank
    for own in shapes:
        for i, size in enumerate(own, rank - len(own)):
            if size != 1:
                shape[i] = size
    return torch.Size(shape)


def broadcasts(*shapes: Sequence[int]) -> bool:
    """Whether ``shapes`` broadcast together."""
    rank = max(len(shape) for shape in shapes)
    common = [1] * rank
    for shape in shapes:
        for i, size in enumerate(shape, rank - len(shape)):
            if size != 1:
                if common[i] not in (1, size):
                    return False
                common[i] = size
    return True


def strides_as(own: Sequence[int], strides: Strides, shape: Sequence[int]) -> Strides:
    """Strides of a tensor of shape ``own`` seen as ``shape``: 0 where it is broadcast."""
    missing = len(shape) - len(own)
    return (0,) * missing + tuple(
        [
            0 if n == 1 != full else s
            for n, s, full in zip(own, strides, shape[missing:], strict=True)
        ]
    )


def fastest_first(shape: Sequence[int], strides: Sequence[Strides]) -> list[int]:
    """Dimensions from the one that moves fastest in memory to the slowest.

    An insertion sort, because the comparison is partial: an operand that is broadcast along either
    dimension has no say, and where none has, the dimensions keep their order.
    """

    def slower(a: int, b: int) -> int:
        for operand in strides:
            sa, sb = operand[a], operand[b]
            if sa == 0 or sb == 0:
                continue
            if sa != sb:
                return 1 if sa > sb else -1
            if shape[a] > shape[b]:
                return 1
        return 0

    order = list(range(len(shape) - 1, -1, -1))
    for i in range(1, len(order)):
        moving = i
        for j in range(i - 1, -1, -1):
            verdict = slower(order[j], order[moving])
            if verdict > 0:
                order[j], order[moving] = order[moving], order[j]
                moving = j
            elif verdict < 0:
                break
    return order


def dense_strides(shape: Sequence[int], order: Sequence[int]) -> Strides:
    """Strides of a dense tensor whose dimensions lie in memory in ``order``, fastest first."""
    strides = [0] * len(shape)
    step = 1
    for d in order:
        strides[d] = step
        step *= max(shape[d], 1)
    return tuple(strides)


@lru_cache(maxsize=4096)
def row_major(shape: Sequence[int]) -> Strides:
    """Strides of a contiguous tensor."""
    return dense_strides(shape, range(len(shape) - 1, -1, -1))


def collapse(
    shape: Sequence[int], strides: Sequence[Strides], order: Sequence[int]
) -> tuple[list[int], list[list[int]]]:
    """Merge dimensions that every operand walks as one.

    Returns the sizes, fastest first, and for each operand its strides in the same order. Sizes of
    one disappear; the result has at least one dimension.
    """
    sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in strides]
    for d in order:
        if shape[d] == 1:
            continue
        if sizes and all(
            operand[d] == own[-1] * sizes[-1] for operand, own in zip(strides, merged, strict=True)
        ):
            sizes[-1] *= shape[d]
            continue
        sizes.append(shape[d])
        for operand, own in zip(strides, merged, strict=True):
            own.append(operand[d])
    if not sizes:
        return [1], [[0] for _ in strides]
    return sizes, merged


def reach(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Largest distance, in elements, between the first element and any other."""
    return sum((n - 1) * abs(s) for n, s in zip(sizes, strides, strict=True))


def overlaps(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements may share memory: not if each dimension steps over those within it."""
    within = 0
    for stride, n in sorted((abs(s), n) for n, s in zip(sizes, strides, strict=True) if n > 1):
        if stride <= within:
            return True
        within += stride * (n - 1)
    return False


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``: Triton's blocks have no other size."""
    return 1 << (n - 1).bit_length()


def batch_first(tensor: Tensor, dim: int | None, rank: int) -> Tensor:
    """The dimension of vmap in front of ``rank`` others, so that operands of lower rank broadcast
    against it; one without that dimension as it is."""
    if dim is None:
        return tensor
    tensor = tensor.movedim(dim, 0)
    padding = rank + 1 - tensor.dim()
    return tensor.reshape(tensor.shape[0], *[1] * padding, *tensor.shape[1:]) if padding else tensor


def batched(tensors: Sequence[Tensor | None], dims: Sequence[int | None], size: int = 1) -> Any:
    """Each with the dimension of vmap in front; where it has none, with one of ``size``."""
    return tuple(
        [
            t if t is None else t.expand(size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip(tensors, dims, strict=True)
        ]
    )
