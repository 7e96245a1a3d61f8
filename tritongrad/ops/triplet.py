"""``triplet_margin_loss``: how much less than a margin a row is further from one than from another.

The rule is that of torch's own composition (Loss.cpp, Distance.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import reduction as combine
from ..kernels import row_loss as k
from ..launchers.reduction import Reduction
from ..layout import broadcast_shape
from ..op import OPS, Spec, Tensors, Unsupported
from ..sampling import Make, Sample
from .distance import PairParams
from .loss_calls import modern
from .row_loss import Form, Params, read, row_loss

F = torch.nn.functional


class _Triplet(NamedTuple):
    margin: float
    p: float
    eps: float
    swap: bool


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
) -> tuple[Tensors, Params]:
    modern(size_average, reduce)
    tensors = (anchor, positive, negative)
    found = read(tensors, margin, reduction)
    if margin <= 0 or type(swap) is not bool:
        raise Unsupported(f"margin={margin!r}, swap={swap!r}")
    if not anchor.dim() == positive.dim() == negative.dim():
        raise Unsupported("tensors of different numbers of dimensions")
    distance = OPS["pairwise_distance"].bind
    assert distance is not None
    # Its own reading of them, so that what it refuses is refused.
    for pair in ((anchor, positive), (anchor, negative), (positive, negative)):
        distance(*pair, p, eps)
    call = _Triplet(float(margin), float(p), float(eps), swap)
    form, before, after, numbers = _triplet_form(call, broadcast_shape(tensors)[-1] == 1)
    return tensors, Params(form, call, before, after, numbers, **found)


def _triplet_of(map: Any, finish: Any, backward: Any) -> Form:
    return Form(Reduction(map, combine.add_three, (0.0, 0.0, 0.0), finish), 3, backward)


def _extreme(combine: Any, identity: float) -> Form:
    identities = (identity, 0.0) * 3
    return Form(
        Reduction(k.triplet_counted, combine, identities, k.triplet_count), 6, k.triplet_count_bwd
    )


_COUNT = _triplet_of(k.triplet_nonzero, k.triplet, None)
_ABSOLUTE = _triplet_of(k.triplet_absolute, k.triplet, k.triplet_absolute_bwd)
_SQUARE = _triplet_of(k.triplet_square, k.triplet_root, k.triplet_square_bwd)
_POWER = _triplet_of(k.triplet_power, k.triplet_power_root, k.triplet_power_bwd)
# The norm of a single element is its absolute value, exactly; its slope is that of the order.
_SINGLE = _triplet_of(k.triplet_absolute, k.triplet, k.triplet_power_bwd)
_LARGEST = _extreme(k.three_larger, -math.inf)
_SMALLEST = _extreme(k.three_smaller, math.inf)


@lru_cache(maxsize=64)
def _triplet_form(call: _Triplet, single: bool) -> tuple[Form, Any, Any, Any]:
    """The formula, and the numbers of its map, its finish and its backward function."""
    margin, p, eps, swap = call
    after = (margin, float(swap))
    numbers = (*after, eps)
    if p == 0:
        return _COUNT, (eps,), after, ()
    if p == 1:
        return _ABSOLUTE, (eps,), after, numbers
    if p == 2:
        return _SQUARE, (eps,), after, numbers
    if math.isinf(p):
        return (_LARGEST if p > 0 else _SMALLEST), (eps,), after, numbers
    if single:
        return _SINGLE, (eps,), after, (*numbers, p)
    return _POWER, (eps, p), (*after, 1 / p), (*numbers, p)


def _distances(
    call: _Triplet, anchor: Tensor, positive: Tensor, negative: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Those of the pairs that count, and how far they are apart."""
    pairs = ((anchor, positive), (anchor, negative), (positive, negative))
    count = 3 if call.swap else 2
    return [(*pair, F.pairwise_distance(*pair, call.p, call.eps)) for pair in pairs[:count]]


def _distance_params(call: _Triplet, x: Tensor) -> PairParams:
    return PairParams((x.dim() - 1,), False, x.dtype, call.p, call.eps)


def _triplet_rule(call: _Triplet, g: Tensor, a: Tensor, p: Tensor, n: Tensor) -> Tensors:
    shares: tuple[Tensor, ...]
    found = _distances(call, a, p, n)
    near, far = found[0][2], found[1][2]
    if call.swap:
        between = found[2][2]
        g = torch.where(call.margin + near - torch.minimum(far, between) >= 0, g, 0.0)
        tied = torch.where(far == between, g / 2, g)
        shares = (g, -torch.where(far > between, 0.0, tied), -torch.where(far < between, 0.0, tied))
    else:
        g = torch.where(call.margin + near - far >= 0, g, 0.0)
        shares = (g, -g)
    rule: Any = OPS["pairwise_distance"].rule
    params, spec = _distance_params(call, a), Spec(a.shape, a.dtype)
    parts = [
        rule(params, (True, True), (spec, spec), (share,), pair)
        for share, pair in zip(shares, found, strict=True)
    ]
    if call.p == 0:
        return None, None, None
    (a_near, p_near), (a_far, n_far), *swapped = parts
    da, dp, dn = a_near + a_far, p_near, n_far
    for p_between, n_between in swapped:
        dp, dn = dp + p_between, dn + n_between
    return da, dp, dn


def _triplet_tangent(call: _Triplet, tensors: tuple[Any, ...], tangents: list[Any]) -> Tensor:
    found = _distances(call, *tensors)
    jvp: Any = OPS["pairwise_distance"].jvp
    params, moves = _distance_params(call, tensors[0]), []
    for (x, y, out), pair in zip(found, ((0, 1), (0, 2), (1, 2)), strict=False):
        moving = tuple([tangents[i] for i in pair])
        still = all(t is None for t in moving)
        moves.append(torch.zeros_like(out) if still else jvp(params, (x, y), (out,), moving))
    near, far, *swapped = [out for _, _, out in found]
    move = moves[1]
    for between in swapped:
        part = torch.where(far == between, 0.5, torch.where(far <= between, 1.0, 0.0))
        move, far = moves[2] + part * (move - moves[2]), torch.minimum(far, between)
    return torch.where(call.margin + near - far >= 0, moves[0] - move, 0.0)


def _triplet_samples(make: Make) -> Iterator[Sample]:
    def triple(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
        return make(*shape), make(*shape), make(*shape)

    yield Sample(triple(3, 4), {"reduction": "none"}, "each")
    yield Sample(triple(3, 4), {"swap": True, "p": 3.0, "margin": 0.4}, "swap")
    broadcast = (make(3, 1, 3), make(1, 2, 3), make(3, 2, 3))
    yield Sample(broadcast, {"reduction": "sum"}, "broadcast")
    yield Sample(triple(0, 4), {"reduction": "sum"}, "empty")
    for p in (0.5, 1.0, math.inf):
        yield Sample(triple(3, 4), {"swap": True, "p": p}, f"p={p}")
    # Small: the difference of two distances has the roundings of both.
    rows = (make(2, 1031, low=0.0, high=0.2) for _ in range(3))
    yield Sample(tuple(rows), {}, "past one block")


# ------------------------------------------------------------------------------------------- TABLE

row_loss(
    "triplet_margin_loss", F.triplet_margin_loss,
    bind=_bind_triplet, arity=3, rule=_triplet_rule, tangent=_triplet_tangent,
    formula="that of max(margin + |anchor - positive| - |anchor - negative|, 0)",
    samples=_triplet_samples,
)  # fmt: skip
