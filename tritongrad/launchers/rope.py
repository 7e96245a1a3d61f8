"""Launching rotary position embedding: any layout of batch, heads and positions, read as it is."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import COMPUTE_DTYPE, TRITON_DTYPE
from ..kernels import rope as k
from ..layout import INT32_MAX, Strides, next_power_of_two, reach
from ..runtime import launch, launch_prepared

Shape = tuple[int, ...]


def axes(rank: int, seq_dim: int) -> tuple[int | None, int, int | None, int]:
    """Which dimensions are batch, positions, heads and features. ``seq_dim`` is from the end; of
    the other two the first is the batch, and either may be missing."""
    seq = rank + seq_dim
    others = [d for d in range(rank - 1) if d != seq]
    batch, heads = (*others, None, None)[:2]
    return batch, seq, heads, rank - 1


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What tensors of these dtypes are computed in."""
    dtypes = [t.dtype for t in tensors if t is not None]
    wide = dtypes[0]
    for dtype in dtypes[1:]:
        wide = torch.promote_types(wide, dtype)
    return COMPUTE_DTYPE[wide]


class Blocks(NamedTuple):
    """Positions, heads and pairs of one program."""

    s: int
    h: int
    j: int


def _blocks(s: int, h: int, pairs: int, compute: torch.dtype) -> Blocks:
    """As many heads as fit beside a row of pairs, for they share its angles; then positions."""
    room = k.PAIRS * 4 // compute.itemsize
    j = min(next_power_of_two(max(pairs, 8)), k.ROW_PAIRS)
    heads = min(next_power_of_two(h), room // j)
    return Blocks(min(next_power_of_two(s), room // (j * heads)), heads, j)


def _four(values: tuple[int, ...], rank: int, seq_dim: int, missing: int) -> tuple[int, ...]:
    return tuple([missing if d is None else values[d] for d in axes(rank, seq_dim)])


def _walk(own: torch.Size, strides: Strides, rank: int) -> Strides:
    """Strides with the batch first: 0 where all of it shares what there is."""
    if len(own) < rank:
        return (0, *strides)
    return (0, *strides[1:]) if own[0] == 1 else strides


class Plan(NamedTuple):
    """How tensors of certain shapes and strides are turned: grid None if there is nothing to do,
    the kernel's arguments after its pointers, its constexprs."""

    grid: tuple[int] | None
    geometry: tuple[Any, ...]
    meta: dict[str, Any]


@lru_cache(maxsize=4096)
def _plan(
    shape: torch.Size,
    strides: tuple[Strides, Strides],
    seq_dim: int,
    table: torch.Size,
    table_strides: tuple[Strides | None, Strides | None, Strides | None],
    compute: torch.dtype,
    flags: tuple[bool, bool, bool],
) -> Plan:
    rank = len(shape)
    batch, s, h, features = _four(shape, rank, seq_dim, 1)
    out, x = (_four(own, rank, seq_dim, 0) for own in strides)
    rows, pairs = table[-2:]

    cos, sin = (None if own is None else _walk(table, own, 3) for own in table_strides[:2])
    position = table_strides[2]
    blocks = _blocks(s, h, pairs, compute)
    tiles = -(-s // blocks.s) * -(-h // blocks.h) * max(-(-pairs // blocks.j), 1)
    sizes = (s, h, features)
    far = max(reach(sizes, own[1:]) for own in (x, out))
    far = max(far, *[reach((rows, pairs), own[1:]) for own in (cos, sin) if own is not None])
    interleaved, inverse, copy = flags
    meta = {
        "INTERLEAVED": interleaved,
        "INVERSE": inverse,
        "COPY": copy,
        "COMPUTE": TRITON_DTYPE[compute],
        "WIDE": far > INT32_MAX - k.PAIRS * k.ROW_PAIRS,
        "BLOCK_S": blocks.s,
        "BLOCK_H": blocks.h,
        "BLOCK_J": blocks.j,
    }
    geometry = s, h, pairs, features, rows, out, x, cos, sin, position
    return Plan((batch * tiles,) if shape.numel() else None, geometry, meta)


def turn(
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    seq_dim: int,
    interleaved: bool,
    inverse: bool,
    copy: bool,
) -> Tensor:
    """``x`` turned by the angles of its positions, or of the rows that ``positions`` names; the
    result is contiguous. ``inverse``: the other way; ``copy``: with the features past the pairs,
    which are 0 else. A table that is None is 0; one of them is there."""
    table = cos if cos is not None else sin
    assert table is not None
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    plan = _plan(
        x.shape,
        (out.stride(), x.stride()),
        seq_dim,
        table.shape,
        (
            None if cos is None else cos.stride(),
            None if sin is None else sin.stride(),
            None if positions is None else _walk(positions.shape, positions.stride(), 2),
        ),
        compute_dtype(x, cos, sin),
        (interleaved, inverse, copy),
    )
    if plan.grid is not None:
        args = (out, x, cos, sin, positions, *plan.geometry)
        launch_prepared(k.rope_fwd, plan.grid, args, out, plan.meta)
    return out


def angle_gradients(
    g: Tensor,
    x: Tensor,
    positions: Tensor | None,
    seq_dim: int,
    interleaved: bool,
    inverse: bool,
    table: torch.Size,
    dtypes: tuple[torch.dtype | None, torch.dtype | None],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the cosines and sines in tables of shape ``table``, None for one without a
    dtype: sums in one order, first over heads (and the batch, where it shares the angles), then
    over the positions that read a row."""
    rank = x.dim()
    batch, s, h, _ = _four(x.shape, rank, seq_dim, 1)
    pairs = table[-1]
    compute = compute_dtype(g, x, *[torch.empty((), dtype=d) for d in dtypes if d is not None])
    by_batch = (len(table) == 3 and table[0] != 1) or (
        positions is not None and positions.dim() == 2
    )
    kept = batch if by_batch else 1
    outs = [
        None
        if dtype is None
        else x.new_empty(table, dtype=dtype)
        if positions is None
        else x.new_empty((kept, s, pairs), dtype=compute)
        for dtype in dtypes
    ]
    if kept * s * pairs:
        blocks = _blocks(s, h, pairs, compute)
        strides = [_four(t.stride(), rank, seq_dim, 0) for t in (g, x)]
        far = max(reach((s, h, x.shape[-1]), own[1:]) for own in strides)
        launch(
            k.rope_angles_bwd,
            (kept * -(-s // blocks.s) * -(-pairs // blocks.j),),
            (*outs, g, x, s, h, pairs, batch // kept, *strides),
            x,
            INTERLEAVED=interleaved,
            INVERSE=inverse,
            COMPUTE=TRITON_DTYPE[compute],
            WIDE=max(far, batch * s * pairs) > INT32_MAX - k.PAIRS * k.ROW_PAIRS,
            BLOCK_S=blocks.s,
            BLOCK_H=blocks.h,
            BLOCK_J=blocks.j,
        )
    if positions is None:
        return outs[0], outs[1]
    found = []
    listed = positions.expand(kept, s).contiguous()
    for dangles, dtype in zip(outs, dtypes, strict=True):
        dtable = None
        if dangles is not None and dtype is not None:
            dtable = x.new_empty(table, dtype=dtype)
            block = min(next_power_of_two(pairs), k.ROW_PAIRS) if pairs else 1
            if dtable.numel():
                launch(
                    k.rope_table_bwd,
                    (table[0] * -(-pairs // block),),
                    (dtable, dangles, listed, listed.numel(), table[0], pairs),
                    x,
                    BLOCK_N=max(k.PAIRS * 4 // (compute.itemsize * block), 16),
                    BLOCK_J=block,
                )
        found.append(dtable)
    return found[0], found[1]
