"""Losses of rows: ``cosine_embedding_loss`` and ``triplet_margin_loss``, of whole rows' angle or
distance as far as a margin.

Composites, of the kernels that reduce two operands: torch's own compositions (Loss.cpp), without
the products and differences in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..admission import admit
from ..dtypes import COMPUTE_DTYPE, FLOATING, is_number
from ..op import OPS, Tensors, Unsupported
from ..sampling import Make, Sample
from .composite import POINTWISE, composite
from .contraction import REDUCTION
from .criterion import FLOAT32
from .loss_calls import INTEGRAL_TARGETS, REDUCTIONS, modern

F = torch.nn.functional


def _read(tensors: tuple[Tensor, ...], margin: float, reduction: str) -> None:
    for tensor in tensors:
        admit(tensor)
        if tensor.device != tensors[0].device or tensor.dtype is not tensors[0].dtype:
            raise Unsupported("tensors on different devices or of different dtypes")
    if tensors[0].dtype not in FLOATING:
        raise Unsupported("integer input")
    if not is_number(margin) or isinstance(margin, bool):
        raise Unsupported(f"margin={margin!r}")
    if type(reduction) is not str or reduction not in REDUCTIONS:
        raise Unsupported(f"reduction={reduction!r}")


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``tensors`` in their computing dtype: half precision is not rounded to on the way, because in
    the gradients terms cancel."""
    return tuple([t.to(COMPUTE_DTYPE[t.dtype]) for t in tensors])


def _reduced(losses: Tensor, reduction: str, result: torch.dtype) -> Tensor:
    if reduction == "mean":
        losses = losses.mean()
    elif reduction == "sum":
        losses = losses.sum()
    return losses.to(result)


# --------------------------------------------------------------------------- cosine_embedding_loss


class _Cosine(NamedTuple):
    margin: float
    reduction: str


def _bind_cosine(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> tuple[Tensors, _Cosine]:
    modern(size_average, reduce)
    _read((input1, input2), margin, reduction)
    admit(target)
    if target.device != input1.device or target.dtype not in FLOATING | INTEGRAL_TARGETS:
        raise Unsupported("target on another device, or of a dtype that has no -1")
    if target.dim() > 1 or not input1.dim() == input2.dim() == target.dim() + 1:
        raise Unsupported("other than rows with a label each")
    rows = {n for t in (input1, input2, target) for n in t.shape[: target.dim()]}
    if len(rows - {1}) > 1 or len({input1.shape[-1], input2.shape[-1]} - {1}) > 1:
        raise Unsupported("shapes do not broadcast")
    return (input1, input2, target), _Cosine(float(margin), reduction)


_EPSILON = 9.999999960041972e-13  # torch's 1e-12 is a float32


def _cosine(params: _Cosine, x: Tensor, y: Tensor, target: Tensor) -> Tensor:
    result = x.dtype
    x, y = _wide(x, y)
    xx, yy, xy = (torch.linalg.vecdot(a, b) for a, b in ((x, x), (y, y), (x, y)))
    cosine = xy / torch.sqrt((xx + _EPSILON) * (yy + _EPSILON))
    alike = torch.where(target == 1, 1 - cosine, 0.0)
    apart = torch.where(target == -1, torch.clamp_min(cosine - params.margin, 0), 0.0)
    return _reduced(alike + apart, params.reduction, result)


def _cosine_samples(make: Make) -> Iterator[Sample]:
    def labels(*shape: int) -> Tensor:
        return make(*shape, requires_grad=False).sign()

    triple = (make(3, 4), make(3, 4), labels(3))
    yield Sample(triple, {"margin": 0.2, "reduction": "none"}, "each")
    yield Sample((make(5), make(5), labels()), {"reduction": "sum"}, "one row")
    yield Sample((make(1, 5), make(5, 3).t(), labels(3)), {}, "broadcast, transposed")
    yield Sample((make(0, 4), make(0, 4), labels(0)), {"reduction": "sum"}, "empty")
    yield Sample((make(2, 1031), make(2, 1031), labels(2)), {}, "past one block")


# ----------------------------------------------------------------------------- triplet_margin_loss


class _Triplet(NamedTuple):
    margin: float
    p: float
    eps: float
    swap: bool
    reduction: str


def _bind_triplet(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-6,
    swap: bool = False,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> tuple[Tensors, _Triplet]:
    modern(size_average, reduce)
    _read((anchor, positive, negative), margin, reduction)
    if margin <= 0 or type(swap) is not bool:
        raise Unsupported(f"margin={margin!r}, swap={swap!r}")
    if not anchor.dim() == positive.dim() == negative.dim():
        raise Unsupported("tensors of different numbers of dimensions")
    distance = OPS["pairwise_distance"].bind
    assert distance is not None
    # Their own reading of them, so that what is refused is refused before anything runs.
    for pair in ((anchor, positive), (anchor, negative), (positive, negative)):
        distance(*pair, p, eps)
    return (anchor, positive, negative), _Triplet(
        float(margin), float(p), float(eps), swap, reduction
    )


def _triplet(params: _Triplet, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    def distance(x: Tensor, y: Tensor) -> Tensor:
        return F.pairwise_distance(x, y, params.p, params.eps)

    result = anchor.dtype
    anchor, positive, negative = _wide(anchor, positive, negative)
    near, far = distance(anchor, positive), distance(anchor, negative)
    if params.swap:
        far = torch.minimum(far, distance(positive, negative))
    losses = torch.clamp_min(params.margin + near - far, 0)
    return _reduced(losses, params.reduction, result)


def _triplet_samples(make: Make) -> Iterator[Sample]:
    def triple(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
        return make(*shape), make(*shape), make(*shape)

    yield Sample(triple(3, 4), {"reduction": "none"}, "each")
    yield Sample(triple(3, 4), {"swap": True, "p": 3.0, "margin": 0.4}, "swap")
    broadcast = (make(3, 1, 3), make(1, 2, 3), make(3, 2, 3))
    yield Sample(broadcast, {"reduction": "sum"}, "broadcast")
    yield Sample(triple(0, 4), {"reduction": "sum"}, "empty")
    # Small: the difference of two distances has the roundings of both.
    rows = (make(2, 1031, low=0.0, high=0.2) for _ in range(3))
    yield Sample(tuple(rows), {}, "past one block")


# ------------------------------------------------------------------------------------------- TABLE

composite(
    "cosine_embedding_loss", F.cosine_embedding_loss,
    bind=_bind_cosine, value=_cosine, kernels=REDUCTION + POINTWISE,
    formula="that of 1 - cos(x, y), or of max(cos(x, y) - margin, 0)",
    samples=_cosine_samples, autocast=FLOAT32,
    opinfo=("nn.functional.cosine_embedding_loss",),
)  # fmt: skip
composite(
    "triplet_margin_loss", F.triplet_margin_loss,
    bind=_bind_triplet, value=_triplet, kernels=REDUCTION + POINTWISE,
    formula="that of max(margin + |anchor - positive| - |anchor - negative|, 0)",
    samples=_triplet_samples, autocast=FLOAT32,
    opinfo=("nn.functional.triplet_margin_loss",),
)  # fmt: skip
