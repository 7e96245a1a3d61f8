"""Losses that stop at a margin: torch's signatures, and one row a loss.

The rules are those that torch's own compositions have (Loss.cpp).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..kernels import loss as k
from ..op import Unsupported
from ..sampling import Make, Sample
from .criterion import Form, loss
from .loss_calls import Call, constant, modern, not_derived, read, same_size, samples_of

F = torch.nn.functional

SOFT_MARGIN = Form(
    ("x", "y"), k.soft_margin_loss, k.soft_margin_loss_bwd,
    {"x": lambda g, x, y: _soft_margin_slope(g, y, torch.exp(-y * x))},
)  # fmt: skip


def _soft_margin_slope(g: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return -g * y * (z / (1 + z))


HINGE = Form(
    ("x", "y"), k.hinge_embedding_loss, k.hinge_embedding_loss_bwd,
    {"x": lambda g, x, y, margin: _hinge_slope(g, y, margin - x)},
    ("margin",),
)  # fmt: skip


def _hinge_slope(g: Tensor, y: Tensor, gap: Tensor) -> Tensor:
    apart = torch.where(y != 1, torch.where(gap >= 0, g, 0.0), 0.0)
    return torch.where(y != -1, g, 0.0) - apart


RANKING = Form(
    ("x", "y", "t"), k.margin_ranking_loss, k.margin_ranking_loss_bwd,
    {
        "x": lambda g, x, y, t, margin: -_violating(g, x, y, t, margin) * t,
        "y": lambda g, x, y, t, margin: _violating(g, x, y, t, margin) * t,
        "t": lambda g, x, y, t, margin: _violating(g, x, y, t, margin) * (y - x),
    },
    ("margin",),
    # Forward mode selects last.
    pushes={
        "x": lambda g, x, y, t, margin: _violating(-g * t, x, y, t, margin),
        "y": lambda g, x, y, t, margin: _violating(g * t, x, y, t, margin),
        "t": lambda g, x, y, t, margin: _violating(g * (y - x), x, y, t, margin),
    },
)  # fmt: skip


def _violating(g: Tensor, x: Tensor, y: Tensor, t: Tensor, margin: float) -> Tensor:
    return torch.where(-t * (x - y) + margin >= 0, g, 0.0)


def bind_soft_margin(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Call:
    modern(size_average, reduce)
    same_size(input, target)
    tensors = (input, not_derived(target, "target"))
    return read(SOFT_MARGIN, tensors, reduction, integral=1)


def bind_hinge_embedding(
    input: Tensor,
    target: Tensor,
    margin: float = 1.0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Call:
    modern(size_average, reduce)
    tensors = (input, constant(target))
    return read(HINGE, tensors, reduction, numbers=(margin,), integral=1)


def bind_margin_ranking(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Call:
    modern(size_average, reduce)
    tensors = (input1, input2, target)
    call = read(RANKING, tensors, reduction, numbers=(margin,), integral=2)
    if len({t.dim() for t in tensors}) > 1:
        raise Unsupported("tensors of different numbers of dimensions")
    return call


def _ranking_samples(make: Make) -> Iterator[Sample]:
    def triple(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
        return make(*shape), make(*shape), make(*shape, requires_grad=False).sign()

    yield Sample(triple(3, 5), {"reduction": "none"}, "each")
    yield Sample(triple(3, 5), {"margin": 0.3}, "mean")
    yield Sample((make(3, 1), make(1, 5), make(3, 5)), {"reduction": "sum"}, "broadcast")
    yield Sample(triple(1031), {"reduction": "none"}, "past one block")
    yield Sample(tuple([t[:, 1:] for t in triple(9, 258)]), {}, "shared by several programs")


# -------------------------------------------------------------------------------------------- TABLE

loss(
    "soft_margin_loss", F.soft_margin_loss, bind=bind_soft_margin, form=SOFT_MARGIN,
    samples=samples_of(),
)  # fmt: skip
loss(
    "hinge_embedding_loss", F.hinge_embedding_loss, bind=bind_hinge_embedding, form=HINGE,
    samples=samples_of(margin=(0.5,)),
)  # fmt: skip
loss(
    "margin_ranking_loss", F.margin_ranking_loss, bind=bind_margin_ranking, form=RANKING,
    samples=_ranking_samples,
)  # fmt: skip
