"""Launching the cross entropy of linear logits, which are made piece by piece and never together.

A piece is the logits of some classes for all rows, one product of matrices. Forward, the kernel of
the loss carries what it knows of each row from piece to piece; backward, each piece is made again,
turned into its gradient where it lies, and multiplied into the gradients: that of the classes'
own weights is complete with the piece, that of the input is summed over all of them.

Made again, because what would be kept instead (the gradients, computed forward and scaled backward)
is as large as the weights, serves no loss that is not reduced, and is rounded before it is scaled.
It costs a fourth product to the three.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..dtypes import Number
from ..runtime import INTERPRETED
from . import classification
from .classification import Call, Rows
from .matmul import product_into
from .reduction import SUM, reduce

SCRATCH = 2**10 if INTERPRETED else 2**23
"""Elements of the logits that are made at a time, if the input has not twice as many: products that
fill a GPU, and what they make fits its cache. The interpreter's are few, so that small calls have
several pieces."""

ALIGNED = 16
"""Classes of a piece are a multiple of this: rows of logits begin at aligned addresses."""


class Factors(NamedTuple):
    """What logits are made of: of T rows, H features, C classes and D losses of each row.

    Attributes:
        x: (T, H).
        weight: (C, D, H).
        bias: (C, D).
        target: (T, D) labels, or (T, C, D) probabilities.
        class_weight: (C,).
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    class_weight: Tensor | None


class Piece(NamedTuple):
    """The logits of classes from ``first`` on, (T, classes, D), and what they are made of."""

    first: int
    last: int
    weight: Tensor
    logits: Tensor


def _pieces(call: Call, factors: Factors) -> Iterator[Piece]:
    """The logits, piece by piece, each in the memory of the one before it; not rounded, because an
    error in them is relative to the largest, and one in their exponentials to each."""
    x, weight, bias, *_ = factors
    (rows, features), (classes, losses, _) = x.shape, weight.shape
    wide = max(features // 2, SCRATCH // max(rows, 1)) // losses
    step = min(classes, max(-(-wide // ALIGNED), 1) * ALIGNED)
    scratch = x.new_empty(rows * step * losses, dtype=call.compute)
    for first in range(0, classes, step):
        last = min(first + step, classes)
        columns = (last - first) * losses
        own = weight[first:last].reshape(columns, features)
        logits = scratch[: rows * columns].view(rows, columns)
        added = None if bias is None else bias[first:last].reshape(columns)
        product_into(logits, x, own.t(), added)
        yield Piece(first, last, own, logits.view(rows, last - first, losses))


def losses(call: Call, factors: Factors, dtype: torch.dtype, shares: bool) -> Rows:
    """``classification.rows`` of the logits."""
    found: Rows | None = None
    for first, last, _, logits in _pieces(call, factors):
        found = classification.rows(
            call._replace(first=first),
            logits,
            factors.target,
            factors.class_weight,
            dtype,
            shares,
            found,
            last == call.classes,
        )
    assert found is not None
    return found


class Gradients(NamedTuple):
    """In the order of the op's tensors; None for one that is not wanted."""

    x: Tensor | None
    weight: Tensor | None
    target: Tensor | None
    bias: Tensor | None
    class_weight: Tensor | None


def gradients(
    call: Call,
    factors: Factors,
    g: Tensor,
    scale: Tensor | None,
    factor: Number | None,
    found: Rows,
    needs: tuple[bool, ...],
) -> Gradients:
    """Gradients of the factors that need one, in the order of ``Gradients``.

    Args:
        g, scale, factor: as ``classification.gradients`` has them.
    """
    x, weight, bias, target, _ = factors
    need_x, need_weight, need_target, need_bias, need_class_weight = needs
    through = need_x or need_weight or need_bias
    dx = x.new_empty(x.shape) if need_x else None
    dweight = weight.new_empty(weight.shape) if need_weight else None
    dtarget = target.new_empty(target.shape) if need_target else None
    dbias: list[Tensor] = []
    dclasses: list[Tensor] = []
    total: Tensor | None = None  # of what is known of dx, not rounded
    rounded: Tensor | None = None  # gradients of the logits, in a dtype that products are made in
    for first, last, own, logits in _pieces(call, factors):
        part = call._replace(first=first)
        if need_class_weight:
            assert factors.class_weight is not None
            here = target[:, first:last]
            dclasses.append(
                classification.weight_gradient(
                    part, g, factor or 1.0, logits, here, found, 0, factors.class_weight.dtype
                )
            )
        if not (through or need_target):
            continue
        slopes = logits.view(len(x), len(own))
        if through and x.dtype is not call.compute:
            if rounded is None:
                rounded = x.new_empty(slopes.numel())
            slopes = rounded[: slopes.numel()].view(slopes.shape)
        classification.gradients(
            part, g, scale, factor, logits, target, factors.class_weight, found,
            slopes.view(logits.shape) if through else None,
            None if dtarget is None else dtarget[:, first:last],
        )  # fmt: skip
        if dweight is not None:
            product_into(dweight[first:last].view(own.shape), slopes.t(), x)
        if need_bias:
            assert bias is not None
            dbias.append(reduce(SUM, (slopes,), (0,), False, call.compute, bias.dtype))
        if dx is not None:
            complete = last == call.classes
            if total is None and not complete:
                total = dx if dx.dtype is call.compute else x.new_empty(x.shape, dtype=call.compute)
            out = dx if complete or total is None else total
            product_into(out, slopes, own, total if first else None)
    return Gradients(
        dx,
        dweight,
        dtarget,
        torch.cat(dbias) if dbias else None,
        torch.cat(dclasses) if dclasses else None,
    )
