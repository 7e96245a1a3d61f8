"""What the norms of channels come down to, with its derivatives: an op of its own, of a tensor that
may have its channels in groups, and of a weight and a bias that broadcast against it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..admission import settle
from ..dispatch import apply
from ..dtypes import COMPUTE_DTYPE, FLOATING
from ..function import vjp
from ..kernels import channel_norm as k
from ..launchers import channel_norm as launch
from ..layout import batched
from ..op import BackwardParams, Needs, Op, Spec, Tensors
from .norm_backward import times
from .operands import Params
from .row_gradients import batch_all, gradients_by_sample, reduce_to
from .rows import row

KERNELS = ("reduce", "pointwise_dense", "pointwise_strided")


class Over(NamedTuple):
    """The dimensions that statistics are taken over, what the variance is raised by, and the share
    of a call's statistics in the running ones, if there are any."""

    dims: tuple[int, ...]
    eps: float
    momentum: float = 0.0

    def batched(self) -> Over:
        """With one more dimension, in front."""
        return self._replace(dims=tuple([d + 1 for d in self.dims]))


# ------------------------------------------------------------------------------- torch mathematics


def _mean(value: Tensor, over: Over) -> Tensor:
    return torch.mean(value, over.dims, True)


def _gradients(
    over: Over, needs: Needs, specs: tuple[Spec | None, ...], g: Tensor, inputs: Tensors
) -> Tensors:
    x, weight, *_ = inputs
    dx = dweight = dbias = None
    if needs[0] or needs[1]:
        assert x is not None
        x = x.to(COMPUTE_DTYPE[x.dtype])
        g = g.to(x.dtype)
        x = x - _mean(x, over)
        x = x - _mean(x, over)  # once more, of what the first was rounded by
        rstd = torch.rsqrt(_mean(x * x, over) + over.eps)
        xh = x * rstd
        if needs[0]:
            assert specs[0] is not None
            u = times(g, weight)
            dx = rstd * (u - _mean(u, over) - xh * _mean(u * xh, over))
            dx = dx.to(specs[0].dtype)
        if needs[1]:
            assert specs[1] is not None
            dweight = reduce_to(g * xh, specs[1])
    if needs[2]:
        assert specs[2] is not None
        dbias = reduce_to(g, specs[2])
    return dx, dweight, dbias


def _rule(over: Over, needs: Needs, specs: tuple, grads: Tensors, saved: Tensors) -> Tensors:
    (g,) = grads
    assert g is not None
    return (*_gradients(over, needs, specs, g, saved[:3]), None, None)


def _tangent(over: Over, tensors: Tensors, outputs: Tensors, tangents: Tensors) -> Tensor:
    """The Jacobian, without the weight, is symmetric: the gradient's kernel computes it."""
    x, weight, *_ = tensors
    assert x is not None
    compute = COMPUTE_DTYPE[x.dtype]
    dx, dweight, dbias = [t if t is None else settle(t).to(compute) for t in tangents[:3]]
    total: Tensor | None = None
    if dx is not None:
        needs, specs = (True, *[False] * 4), (Spec(x.shape, compute), *[None] * 4)
        saved = (x, *[None] * 9)
        total = vjp(NORMED, over, needs, specs, (dx,), saved, own_level=1)[0]
        assert total is not None
        total = times(total, weight)
    if dweight is not None:
        part = apply(NORMED, over, (x.to(compute), *[None] * 4)) * dweight
        total = part if total is None else total + part
    if dbias is not None:
        total = dbias.expand(x.shape) if total is None else total + dbias
    assert total is not None
    return total.to(x.dtype)


# ----------------------------------------------------------------------------------- made into ops


def _forward(
    over: Over,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
) -> Any:
    y, *found = launch.forward(x, weight, bias, over.dims, over.eps)
    if running_mean is not None and running_var is not None:
        count = math.prod([x.shape[d] for d in over.dims])
        launch.update((running_mean, running_var), tuple(found), over.momentum, count)
    return (y, *found)


def _saves(over: Over, needs: Needs) -> tuple[int, ...]:
    """x, weight and statistics, of what the gradients that are needed depend on."""
    if not (needs[0] or needs[1]):
        return ()
    return (0, *((1,) if needs[0] else ()), 6, 7, 8)


def _vmap(info: Any, over: Over, tensors: Tensors, dims: tuple) -> Any:
    (x,) = batched(tensors[:1], dims[:1], info.batch_size)
    affine = batch_all(tensors[1:3], dims[1:3], x.dim() - 1)
    found = apply(NORMED, over.batched(), (x, *affine, None, None), everything=True)
    return found, (0,) * len(found)


def _backward_forward(bp: BackwardParams, g: Tensor, *saved: Tensor | None) -> Any:
    x, weight, _, _, _, _, *of_rows = saved
    wanted: Any = tuple(
        [s if need else None for s, need in zip(bp.specs[:3], bp.needs[:3], strict=True)]
    )
    if not (bp.needs[0] or bp.needs[1]):
        return launch.total(g, wanted[2])
    assert x is not None
    found: Any = tuple(of_rows[:3])
    if found[0] is None:  # a caller that has only the value
        found = launch.statistics(x, bp.params.dims, bp.params.eps)[:3]
    results = launch.backward(g, x, weight, found, bp.params.dims, wanted)
    kept = tuple([t for t in results if t is not None])
    return kept[0] if len(kept) == 1 else kept


def _backward_reference(bp: BackwardParams, g: Tensor, *saved: Tensor | None) -> Tensors:
    found = _gradients(bp.params, bp.needs, bp.specs, g, saved[:3])
    return tuple([t for t in found if t is not None])


def _backward_vmap(info: Any, bp: BackwardParams, tensors: Tensors, dims: tuple) -> Any:
    if tensors[1] is None:  # of the bias alone
        rows = batched(tensors[:1], dims[:1], info.batch_size)
        rank = rows[0].dim() - 1
    else:
        rows = batched(tensors[:2], dims[:2], info.batch_size)
        rank = rows[1].dim() - 1
    count = len(rows)
    everything = (*rows, *batch_all(tensors[count:], dims[count:], rank))
    bp = bp._replace(params=bp.params.batched())
    return gradients_by_sample(NORMED_BACKWARD, info.batch_size, bp, rank, everything)


NORMED_BACKWARD: Op = Op(
    name="channel_norm_backward",
    bind=None,
    forward=_backward_forward,
    outputs=3,
    reference=_backward_reference,
    vmap=_backward_vmap,
    kernels=KERNELS,
    dtypes=FLOATING,
    formula="autograd through the rule of channel_norm",
)

NORMED: Op = Op(
    name="channel_norm",
    bind=None,
    forward=_forward,
    saves=_saves,
    rule=_rule,
    backward=NORMED_BACKWARD,
    jvp=_tangent,
    vmap=_vmap,
    kernels=KERNELS,
    dtypes=FLOATING,
    formula="dx = r (u - E u - xh E[u xh]), u = g w; dw = sum of g xh; db = sum of g",
    sources="see kernels/channel_norm.py",
)
"""Of ``(x, weight, bias)`` and of a running mean and variance, None or brought up to date by it;
beyond the value: origin, offset, r and the variance."""

_SHIFTED = row(
    k, "shifted", bind=None, inputs=("x", "mean", "scale", "bias"),
    rules={
        "x": lambda g, scale: g * scale,
        "mean": lambda g, scale: -(g * scale),
        "scale": lambda g, x, mean: g * (x - mean),
        "bias": lambda g: g,
    },
)  # fmt: skip


def shifted(x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``(x - mean) * scale + bias`` in one kernel, in the computing dtype."""
    number = None if bias is not None else 0.0
    params = Params((None, None, None, number), (), COMPUTE_DTYPE[x.dtype])
    found: Tensor = apply(_SHIFTED, params, (x, mean, scale, bias))
    return found
