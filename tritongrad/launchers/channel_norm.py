"""Launching the norms of channels: statistics in one reduction, the value in one pointwise kernel,
gradients in one of each, with small reductions between them where weights differ within a group."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..dtypes import COMPUTE_DTYPE, Number
from ..kernels import channel_norm as k
from ..kernels import norm_second
from ..op import Spec, Tensors
from .pointwise import elementwise
from .reduction import MOMENTS, Reduction, plan_for, run_many, sum_to

STATISTICS = MOMENTS.but(finish=k.statistics)
SLOPES = Reduction(k.slopes, norm_second.add_two, (0.0, 0.0))
AVERAGES = Reduction(None, norm_second.add_two, (0.0, 0.0), k.averages)
WEIGHTED = AVERAGES.but(map=k.weighted)


def statistics(x: Tensor, dims: tuple[int, ...], eps: float) -> tuple[Tensor, ...]:
    """Of ``kernels.channel_norm``: origin, offset, r, and the variance, in the computing dtype."""
    compute, count = COMPUTE_DTYPE[x.dtype], _count(x, dims)
    plan = plan_for((x,), STATISTICS, dims, True, x.dtype, (), (count, eps))
    found = run_many(plan, (x,), (compute,) * 4)
    return tuple([t for t in found if t is not None])


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, dims: tuple[int, ...], eps: float
) -> tuple[Tensor, ...]:
    """The value, and the statistics."""
    found = statistics(x, dims, eps)
    affine = (None if weight is not None else 1, None if bias is not None else 0)
    y = _pointwise(k.normed, (x, *found[:3], weight, bias), affine, x.dtype)
    return (y, *found)


def update(
    running: tuple[Tensor, Tensor],
    found: tuple[Tensor, ...],
    momentum: float,
    count: int,
) -> None:
    """Average what ``statistics`` found of ``count`` elements each into the running mean and
    variance, in place."""
    origin, offset, _, variance = found
    of_channels = [t.view(-1) for t in (origin, offset, variance)]
    numbers = momentum, 1 - momentum, count / (count - 1)
    dtypes = tuple([t.dtype for t in running])
    compute = COMPUTE_DTYPE[variance.dtype]
    elementwise(k.running, 0, (*running, *of_channels), (), numbers, compute, dtypes, running)
    torch.autograd.graph.increment_version(running)


def backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    of_rows: tuple[Tensor, Tensor, Tensor],
    dims: tuple[int, ...],
    wanted: tuple[Spec | None, Spec | None, Spec | None],
) -> Tensors:
    """Gradients of x, weight and bias, of which the first two not both None; ``of_rows``: origin,
    offset and r."""
    dx_spec, *affine = wanted
    compute = COMPUTE_DTYPE[x.dtype]
    # First over what weights and statistics share, then each over what is left.
    apart = {d for s in affine if s is not None for d in _varying(s.shape, x.dim())}
    if weight is not None and dx_spec is not None:
        apart |= _varying(weight.shape, x.dim())
    shared = tuple([d for d in dims if d not in apart])
    operands = g, x, *of_rows
    plan = plan_for(operands, SLOPES, shared, True, compute)
    sum_g, sum_gx = run_many(plan, operands, (compute, compute))
    assert sum_g is not None
    assert sum_gx is not None
    dx = None
    if dx_spec is not None:
        rest = tuple([d for d in dims if d in apart])
        sums = (sum_g, sum_gx) if weight is None else (sum_g, sum_gx, weight)
        kind = AVERAGES if weight is None else WEIGHTED
        plan = plan_for(sums, kind, rest, True, compute, (), (_count(x, dims),))
        means = run_many(plan, sums, (compute, compute))
        numbers = (None if weight is not None else 1, None, None)
        dx = _pointwise(k.normed_bwd, (g, x, *of_rows, weight, *means), numbers, dx_spec.dtype)
    dweight, dbias = (
        None if s is None else total(t, s) for t, s in zip((sum_gx, sum_g), affine, strict=True)
    )
    return dx, dweight, dbias


def _count(x: Tensor, dims: tuple[int, ...]) -> int:
    return math.prod([x.shape[d] for d in dims])


def _varying(shape: torch.Size, rank: int) -> set[int]:
    """Dimensions, of ``rank``, along which an operand is not broadcast."""
    return {d for d, n in enumerate(shape, rank - len(shape)) if n > 1}


def total(sums: Tensor, spec: Spec) -> Tensor:
    """``sums`` over what is left of the dimensions that ``spec`` is broadcast along."""
    if sums.numel() == math.prod(spec.shape):  # a tuple, where a transform has taken it apart
        return sums.reshape(spec.shape).to(spec.dtype)
    return sum_to(sums, spec.shape, spec.dtype)


def _pointwise(
    function: object, operands: Tensors, last: tuple[Number | None, ...], dtype: torch.dtype
) -> Tensor:
    """In the computing dtype; ``last``: numbers in the places of the last operands."""
    (x, *_) = operands
    assert x is not None
    scalars = (*[None] * (len(operands) - len(last)), *last)
    compute = COMPUTE_DTYPE[dtype]
    (out,) = elementwise(function, 0, operands, scalars, (), compute, (dtype,))
    assert out is not None
    return out
