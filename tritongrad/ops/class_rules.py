"""Losses of classes in torch mathematics, from which forward mode and all orders beyond the first
come: targets are written out as a row's classes, in tensors of the size of the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..admission import settle
from ..op import Needs, Tensors
from .class_calls import Params


def spread(params: Params, value: Tensor, rank: int) -> Tensor:
    """What is as the result is, with a dimension for each of the ``rank`` that number the rows."""
    if params.reduction == "none":
        return value
    return value.reshape((*value.shape, *[1] * (rank - params.batch)))


def upstream(params: Params, g: Tensor, scale: Tensor | None, rank: int) -> Tensor:
    """The gradient of each row's loss, expanded along the classes."""
    g = spread(params, g.to(params.call.compute), rank)
    if scale is not None:
        g = g * spread(params, scale, rank)
    if params.factor is not None:
        g = g * params.factor
    return g


class Wanted(NamedTuple):
    """Targets in the shape of the logits.

    Attributes:
        y: how much of each class is wanted.
        w: weights of classes, None: 1.
        q: their product.
        counted: whether a row counts, expanded along the classes; None: all do.
    """

    y: Tensor
    w: Tensor | None
    q: Tensor
    counted: Tensor | None


def wanted(params: Params, target: Tensor, weight: Tensor | None, rank: int) -> Wanted:
    call = params.call
    dim, compute = call.dim, call.compute
    w = counted = None
    if weight is not None:
        *front, classes = weight.shape
        w = weight.to(compute).reshape(
            *front, *[1] * (dim - len(front)), classes, *[1] * (rank - dim - 1)
        )
    if call.labelled:
        label = target.unsqueeze(dim)
        counted = label != call.ignored
        numbers = torch.arange(call.classes, device=target.device)
        y = (label == numbers.view(-1, *[1] * (rank - dim - 1))).to(compute)
    else:
        y = target.to(compute)
    if call.smoothing is not None:
        y = y * call.smoothing.keep + call.smoothing.spread
    return Wanted(y, w, y if w is None else y * w, counted)


def weight_of_all(params: Params, target: Tensor, weight: Tensor | None) -> Tensor:
    """What the mean of labels' losses divides by."""
    call = params.call._replace(smoothing=None)
    rank = target.dim() + 1
    _, _, q, counted = wanted(params._replace(call=call), target, weight, rank)
    assert counted is not None
    return _summed(params, torch.where(counted, q, 0.0).sum(call.dim))


def slopes(
    params: Params, needs: Needs, g: Tensor, x: Tensor, target: Tensor, weight: Any, scale: Any
) -> Tensors:
    """The gradients of logits, targets and weights of classes, in the computing dtype."""
    call = params.call
    dim, rank = call.dim, x.dim()
    x = x.to(call.compute)
    if scale is None and params.averaged:
        scale = 1.0 / weight_of_all(params, target, weight)
    g = upstream(params, g, scale, rank - 1).unsqueeze(dim)
    y, w, q, counted = wanted(params, target, weight, rank)
    if counted is not None:
        g = torch.where(counted, g, 0.0)
    dx = dy = dw = None
    if needs[0]:
        slope = q.sum(dim, keepdim=True)
        if call.z:
            slope = slope + 2 * call.z * torch.logsumexp(x, dim, keepdim=True)
        dx = g * (torch.softmax(x, dim) * slope - q)
    if needs[1] or needs[2]:
        downhill = -g * torch.log_softmax(x, dim)
        if needs[1]:
            dy = downhill if w is None else downhill * w
            dy = dy if call.smoothing is None else dy * call.smoothing.keep
        if needs[2]:
            dims = [d for d in range(params.batch, rank) if d != dim]
            dw = downhill * y
            dw = dw.sum(dims) if dims else dw
    return dx, dy, dw


def _summed(params: Params, value: Tensor) -> Tensor:
    """The sum over rows, but for the dimensions in front."""
    dims = tuple(range(params.batch, value.dim()))
    return value.sum(dims) if dims else value


def reduced_losses(params: Params, losses: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    if params.reduction != "none":
        losses = _summed(params, losses)
    if params.averaged:
        losses = losses / weight_of_all(params, target, weight)
    elif params.factor is not None:
        losses = losses * params.factor
    return losses.to(params.result)


def moved(params: Params, tensors: Tensors, tangents: Tensors) -> Tensor:
    """The tangent of a cross entropy."""
    (x, target, weight), (dx, dy, dw) = tensors, tangents
    assert x is not None
    assert target is not None
    call = params.call
    dim, compute = call.dim, call.compute
    x = x.to(compute)
    y, w, q, counted = wanted(params, target, weight, x.dim())
    logp = torch.log_softmax(x, dim)
    parts: list[Tensor] = []
    if dx is not None:
        dx = settle(dx).to(compute)
        away = (torch.exp(logp) * dx).sum(dim, keepdim=True)
        parts.append((q * (away - dx)).sum(dim))
        if call.z:
            parts.append(2 * call.z * torch.logsumexp(x, dim) * away.squeeze(dim))
    if dy is not None:
        part = settle(dy).to(compute) * logp
        part = part if w is None else part * w
        keep = 1.0 if call.smoothing is None else call.smoothing.keep
        parts.append(-keep * part.sum(dim))
    if dw is not None:
        like = wanted(params, target, settle(dw), x.dim()).w
        assert like is not None
        parts.append(-(y * like * logp).sum(dim))
    losses = parts[0]
    for part in parts[1:]:
        losses = losses + part
    if counted is not None:
        losses = torch.where(counted.squeeze(dim), losses, 0.0)
    return reduced_losses(params, losses, target, weight)
