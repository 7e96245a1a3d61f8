"""``rope`` in torch mathematics: its definition, the calls it refuses, sums of its gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..extension import extension
from ..launchers.rope import axes, compute_dtype
from ..op import Needs, Spec


class Params(NamedTuple):
    """What a rotation is beside its tensors.

    Attributes:
        interleaved: as ``rope`` has it.
        seq_dim: of the positions, from the end.
        inverse: by the negative angles.
        copy: with the features that do not turn; they are 0 else.
    """

    interleaved: bool
    seq_dim: int
    inverse: bool = False
    copy: bool = True


def _pairs(x: Tensor, pairs: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        both = x.narrow(-1, 0, 2 * pairs).unflatten(-1, (pairs, 2))
        return both.select(-1, 0), both.select(-1, 1)
    return x.narrow(-1, 0, pairs), x.narrow(-1, pairs, pairs)


def _as_angles(table: Tensor, rank: int, seq_dim: int) -> Tensor:
    """A table of rows for each position, seen beside tensors of ``rank`` dimensions."""
    sizes = [1] * rank
    batch, seq, _, features = axes(rank, seq_dim)
    sizes[seq], sizes[features] = table.shape[-2:]
    if table.dim() == 3 and batch is not None:
        sizes[batch] = table.shape[0]
    return table.reshape(sizes)


def turned(
    params: Params, x: Tensor, cos: Tensor | None, sin: Tensor | None, positions: Tensor | None
) -> Tensor:
    """``launchers.rope.turn`` in torch mathematics."""
    table = cos if cos is not None else sin
    assert table is not None
    pairs, wide = table.shape[-1], compute_dtype(x, cos, sin)
    a, b = _pairs(x.to(wide), pairs, params.interleaved)
    first = second = torch.zeros_like(a)
    angles = []
    for found in (cos, sin):
        if found is not None:
            found = found if positions is None else found[positions]
            found = _as_angles(found.to(wide), x.dim(), params.seq_dim)
        angles.append(found)
    c, s = angles
    if c is not None:
        first, second = a * c, b * c
    if s is not None:
        s = -s if params.inverse else s
        first, second = first - b * s, second + a * s
    if params.interleaved:
        turned = torch.stack([first, second], -1).flatten(-2)
    else:
        turned = torch.cat([first, second], -1)
    rest = x.narrow(-1, 2 * pairs, x.shape[-1] - 2 * pairs)
    rest = rest if params.copy else torch.zeros_like(rest)
    return torch.cat([turned.to(x.dtype), rest], -1).contiguous()


def check(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, seq_dim: int
) -> int:
    """``seq_dim`` from the end, of a call that is as it should be."""
    for name, t in (("x", x), ("cos", cos), ("sin", sin)):
        if not isinstance(t, Tensor) or not t.is_floating_point():
            raise TypeError(f"rope: {name} must be a floating-point tensor")
    if type(interleaved) is not bool:
        raise TypeError(f"rope: interleaved must be a bool, got {interleaved!r}")
    if type(seq_dim) is not int:
        raise TypeError(f"rope: seq_dim must be an int, got {seq_dim!r}")
    rank = x.dim()
    if not 2 <= rank <= 4:
        raise RuntimeError(f"rope: x must have 2, 3 or 4 dimensions, got {list(x.shape)}")
    if not -rank <= seq_dim < rank or seq_dim % rank == rank - 1:
        raise IndexError(f"rope: seq_dim {seq_dim} is no dimension of {list(x.shape)} but the last")
    seq_dim = seq_dim if seq_dim < 0 else seq_dim - rank
    if cos.shape != sin.shape or cos.dim() not in (2, 3):
        raise RuntimeError(
            "rope: cos and sin must have one shape, (positions, pairs) or (batch, positions, "
            f"pairs), got {list(cos.shape)} and {list(sin.shape)}"
        )
    if 2 * cos.shape[-1] > x.shape[-1]:
        raise RuntimeError(f"rope: {cos.shape[-1]} pairs in rows of {x.shape[-1]} features")
    sizes = cos.shape[:-1]
    if positions is not None:
        if not isinstance(positions, Tensor) or positions.dtype not in (torch.int32, torch.int64):
            raise TypeError("rope: position_ids must be an int32 or int64 tensor")
        if cos.dim() != 2 or positions.dim() not in (1, 2):
            raise RuntimeError(
                "rope: position_ids, (positions,) or (batch, positions), name rows of cos and sin, "
                f"(rows, pairs), got {list(positions.shape)} and {list(cos.shape)}"
            )
        sizes = positions.shape
    batch, seq, *_ = axes(rank, seq_dim)
    batches = (1, 1 if batch is None else x.shape[batch])
    if sizes[-1] != x.shape[seq] or (len(sizes) == 2 and sizes[0] not in batches):
        raise RuntimeError(
            f"rope: angles for {list(sizes)} positions do not fit x of shape {list(x.shape)}"
        )
    return seq_dim


@extension
def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
    seq_dim: int = -2,
) -> Tensor:
    """Rotary position embedding: pairs of features turned by the angle of their position.

    Args:
        x: (B, H, S, D), or (B, S, H, D) with ``seq_dim=1``, or without heads, or without batch too.
        cos, sin: of R pairs, 2 R <= D; (S, R), or (B, S, R). Differentiable. Features from 2 R on
            are handed through.
        position_ids: (S,) or (B, S), the rows of ``cos`` and ``sin`` to use, which have any number
            of them then, for all of the batch. From the end if negative.
        interleaved: pairs are neighbours, (x[2 j], x[2 j + 1]); else (x[j], x[j + R]).
        seq_dim: the dimension of ``x`` that positions are counted along.

    Returns:
        A contiguous tensor of the shape and dtype of ``x``; computed in the widest dtype of all
        three, in float32 at least.

    Raises:
        TypeError: ``x``, ``cos`` or ``sin`` is not floating-point, ``position_ids`` is no integers.
        RuntimeError, IndexError: shapes do not fit; a position is out of range (on a GPU, the
            result is NaN there).

    Su et al., "RoFormer", arXiv 2104.09864.
    """
    seq_dim = check(x, cos, sin, position_ids, interleaved, seq_dim)
    return turned(Params(interleaved, seq_dim), x, cos, sin, position_ids)


class AngleParams(NamedTuple):
    """What the gradients of cosines and sines are beside their tensors.

    Attributes:
        turn: of the rotation.
        wanted: whether that of the cosines is, that of the sines.
        specs: of both tables.
    """

    turn: Params
    wanted: Needs
    specs: tuple[Spec | None, ...]

    @property
    def table(self) -> torch.Size:
        return next(s.shape for s in self.specs if s is not None)


def angles_summed(
    call: AngleParams, g: Tensor, x: Tensor, positions: Tensor | None
) -> tuple[Tensor, ...]:
    """T in torch mathematics."""
    params, table = call.turn, call.table
    batch, seq, heads, features = axes(x.dim(), params.seq_dim)
    ga, gb = _pairs(g, table[-1], params.interleaved)
    a, b = _pairs(x, table[-1], params.interleaved)
    sine = gb * a - ga * b
    found = []
    for part, wanted, spec in zip(
        (ga * a + gb * b, -sine if params.inverse else sine), call.wanted, call.specs, strict=True
    ):
        if not wanted or spec is None:
            continue
        # (batch, heads, positions, pairs)
        order = [d for d in (batch, heads, seq, features) if d is not None]
        part = part.permute(order)
        while part.dim() < 4:
            part = part.unsqueeze(-3)
        total = part.sum(1)
        if positions is not None:
            at = positions.expand(total.shape[:2])
            total = total.new_zeros(table).index_put((at,), total, accumulate=True)
        elif len(table) == 2:
            total = total.sum(0)
        elif table[0] == 1 != len(total):
            total = total.sum(0, keepdim=True)
        found.append(total.to(spec.dtype))
    return tuple(found)
