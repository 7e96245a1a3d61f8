"""Attention in torch mathematics: its definition, and the formulas that its kernels evaluate.

The notation is that of ``kernels/attention.py``. Here everything of the size of all pairs is a
tensor. Third derivatives, second ones forward over forward, tracers, and calls that the kernels do
not take are evaluated from this.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import COMPUTE_DTYPE
from ..launchers.attention import Inputs, Options, Tangents
from .contraction import RULES

Pair = tuple[Tensor, Tensor]
Gradients = list[Tensor | None]


class Pairs(NamedTuple):
    """What there is of each pair of a query and a key, in the type that is computed in.

    Attributes:
        q, k, v: the inputs, keys and values once for each head.
        p: probabilities.
        p_sink: those of the sink, of each query.
        lse: of each query.
        steep, bent: first and second derivative of the soft cap, None without.
        keep: dropout's factors, None without.
        apart: distance of the two, None without slopes.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    p: Tensor
    p_sink: Tensor | None
    lse: Tensor
    scale: float
    steep: Tensor | None
    bent: Tensor | None
    keep: Tensor | None
    apart: Tensor | None

    def kept(self, t: Tensor) -> Tensor:
        return t if self.keep is None else t * self.keep

    def sloped(self, t: Tensor) -> Tensor:
        return t if self.steep is None else t * self.steep


def group(q: Tensor, k: Tensor) -> int:
    """How many heads of queries share one of keys."""
    return q.shape[-3] // k.shape[-3] if q.dim() > 2 and k.shape[-3] else 1


def _each_head(t: Tensor, times: int) -> Tensor:
    return t if times == 1 else t.repeat_interleave(times, -3)


def _to_key_heads(t: Tensor, times: int) -> Tensor:
    """The gradient of what ``_each_head`` repeated."""
    return t if times == 1 else t.unflatten(-3, (-1, times)).sum(-3)


def visible(options: Options, x: Inputs) -> tuple[Tensor | None, Tensor | None]:
    """Which keys each query sees, None for all; and how far away each is."""
    length, keys, device = x.q.shape[-2], x.k.shape[-2], x.q.device
    at = torch.arange(length, device=device)[:, None]
    there = torch.arange(keys, device=device)
    seen: Tensor | None = None
    if x.cu_q is not None:
        assert x.cu_k is not None
        numbers = [
            torch.searchsorted(cu, place.to(cu.dtype), right=True) - 1
            for cu, place in ((x.cu_q, at), (x.cu_k, there))
        ]
        last = x.cu_q.numel() - 1
        number = numbers[0].clamp(0, max(last - 1, 0))
        seen = (numbers[0] == numbers[1]) & (numbers[0] >= 0) & (numbers[0] < last)
        at = at + (x.cu_k[number] - x.cu_q[number])
    apart = at - there
    if options.down is not None:
        near = apart <= options.down
        seen = near if seen is None else seen & near
    if options.up is not None:
        near = apart >= -options.up
        seen = near if seen is None else seen & near
    return seen, apart if x.slopes is not None else None


def pairs(options: Options, x: Inputs, keep: Tensor | None) -> Pairs:
    compute = COMPUTE_DTYPE[x.q.dtype]
    times = group(x.q, x.k)
    q, k, v = (x.q.to(compute), *[_each_head(t.to(compute), times) for t in (x.k, x.v)])
    scale = x.q.shape[-1] ** -0.5 if options.scale is None else options.scale
    s = torch.matmul(q, k.mT) * scale
    steep = bent = None
    if options.softcap is not None:
        u = torch.tanh(s / options.softcap)
        s, steep = u * options.softcap, 1 - u * u
        bent = u * steep * (-2 / options.softcap)
    seen, apart = visible(options, x)
    if apart is not None:
        assert x.slopes is not None
        apart = apart.abs().to(compute)
        s = s - x.slopes.to(compute)[..., None, None] * apart
    if x.mask is not None:
        bias: Any = x.mask
        if bias.dtype is torch.bool:
            bias = torch.where(bias, 0.0, -torch.inf)
        s = s + bias.to(compute)
    if seen is not None:
        s = torch.where(seen, s, -torch.inf)
    if x.sinks is not None:
        sinks = x.sinks.to(compute)[..., None, None]
        s = torch.cat([s, sinks.expand(*s.shape[:-1], 1)], -1)
    if s.shape[-1] == 0:
        return Pairs(q, k, v, s, None, s.sum(-1) - torch.inf, scale, steep, bent, keep, apart)
    # A row of nothing but -inf has probabilities of 0, and none of their slopes is NaN.
    hidden = (s == -torch.inf).all(-1, keepdim=True)
    s = torch.where(hidden, 0.0, s)
    p = torch.where(hidden, 0.0, torch.softmax(s, -1))
    lse = torch.where(hidden.squeeze(-1), -torch.inf, torch.logsumexp(s, -1))
    p_sink = None
    if x.sinks is not None:
        p, p_sink = p[..., :-1], p[..., -1]
    return Pairs(q, k, v, p, p_sink, lse, scale, steep, bent, keep, apart)


def value(options: Options, x: Inputs, keep: Tensor | None = None) -> Pair:
    """The result and lse."""
    of = pairs(options, x, keep)
    return torch.matmul(of.kept(of.p), of.v).to(x.q.dtype), of.lse


def _score_tangent(of: Pairs, x: Inputs, t: Tangents) -> tuple[Tensor | None, Tensor]:
    """y and t."""
    y: Any = None
    compute, times = of.p.dtype, group(x.q, x.k)
    if t.q is not None:
        y = torch.matmul(t.q.to(compute), of.k.mT)
    if t.k is not None:
        other = torch.matmul(of.q, _each_head(t.k.to(compute), times).mT)
        y = other if y is None else y + other
    y = y if y is None else y * of.scale
    found: Any = y if y is None else of.sloped(y)
    if t.mask is not None:
        bias = t.mask.to(compute)
        found = bias.expand(of.p.shape) if found is None else found + bias
    if t.slopes is not None:
        assert of.apart is not None
        reach = -t.slopes.to(compute)[..., None, None] * of.apart
        found = reach.expand(of.p.shape) if found is None else found + reach
    return y, of.p.new_zeros(of.p.shape) if found is None else found


def jvp(options: Options, x: Inputs, t: Tangents, keep: Tensor | None = None) -> Pair:
    """Tangents of the result and of lse."""
    of = pairs(options, x, keep)
    tangent, mu = _jvp(of, x, t)[1:3]
    return tangent.to(x.q.dtype), mu


def _jvp(of: Pairs, x: Inputs, t: Tangents) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    compute = of.p.dtype
    y, slope = _score_tangent(of, x, t)
    mu = (of.p * slope).sum(-1)
    if t.sinks is not None:
        assert of.p_sink is not None
        mu = mu + of.p_sink * t.sinks.to(compute)[..., None]
    away = slope - mu[..., None]
    tangent = torch.matmul(of.kept(of.p * away), of.v)
    if t.v is not None:
        values = _each_head(t.v.to(compute), group(x.q, x.k))
        tangent = tangent + torch.matmul(of.kept(of.p), values)
    return y, tangent, mu, away


def _error(of: Pairs, g: Tensor | None, h: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """g, e - delta and delta."""
    if g is None:
        g = of.q.new_zeros(()).expand(*of.q.shape[:-1], of.v.shape[-1])
    g = g.to(of.p.dtype)
    e = of.kept(torch.matmul(g, of.v.mT))
    delta = (of.p * e).sum(-1)
    delta = delta if h is None else delta - h
    return g, e - delta[..., None], delta


def _collect(
    of: Pairs, x: Inputs, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None
) -> Gradients:
    times = group(x.q, x.k)
    dmask = dsinks = dslopes = None
    if x.mask is not None and x.mask.is_floating_point():
        dmask = RULES.sum_to(mask, x.mask.shape).to(x.mask.dtype)
    if x.sinks is not None:
        assert sinks is not None
        dsinks = _to_heads(sinks, x.sinks)
    if x.slopes is not None:
        assert of.apart is not None
        dslopes = _to_heads(-(mask * of.apart).sum(-1), x.slopes)
    return [
        (q * of.scale).to(x.q.dtype),
        _to_key_heads(k * of.scale, times).to(x.k.dtype),
        _to_key_heads(v, times).to(x.v.dtype),
        dmask,
        dsinks,
        dslopes,
    ]


def _to_heads(rows: Tensor, of: Tensor) -> Tensor:
    """The gradient of what each row of a head has the number of."""
    return RULES.sum_to(rows, torch.Size((*of.shape, 1))).squeeze(-1).to(of.dtype)


def backward(
    options: Options, x: Inputs, g: Tensor | None, h: Tensor | None, keep: Tensor | None = None
) -> Gradients:
    """Gradients of the inputs."""
    of = pairs(options, x, keep)
    g, error, delta = _error(of, g, h)
    r = of.p * error
    dz = of.sloped(r)
    dv = torch.matmul(of.kept(of.p).mT, g)
    dsinks = None if of.p_sink is None else -(of.p_sink * delta)
    return _collect(of, x, torch.matmul(dz, of.k), torch.matmul(dz.mT, of.q), dv, r, dsinks)


def second(
    options: Options,
    x: Inputs,
    t: Tangents,
    g: Tensor | None,
    h: Tensor | None,
    keep: Tensor | None = None,
) -> Gradients:
    """Gradients of the tangent along its primals."""
    of = pairs(options, x, keep)
    compute, times = of.p.dtype, group(x.q, x.k)
    y, tangent, mu, away = _jvp(of, x, t)
    g, error, delta = _error(of, g, h)
    omega = (g * tangent).sum(-1)
    w = away * error - omega[..., None]
    if t.v is not None:
        w = w + of.kept(torch.matmul(g, _each_head(t.v.to(compute), times).mT))
    r, w = of.p * error, of.p * w
    dz, dy = of.sloped(w), of.sloped(r)
    if of.bent is not None and y is not None:
        dz = dz + of.bent * r * y
    dq, dk = torch.matmul(dz, of.k), torch.matmul(dz.mT, of.q)
    if t.k is not None:
        dq = dq + torch.matmul(dy, _each_head(t.k.to(compute), times))
    if t.q is not None:
        dk = dk + torch.matmul(dy.mT, t.q.to(compute))
    dv = torch.matmul(of.kept(of.p * away).mT, g)
    dsinks = None
    if of.p_sink is not None:
        here = mu.neg() if t.sinks is None else t.sinks.to(compute)[..., None] - mu
        dsinks = -(of.p_sink * (here * delta + omega))
    return _collect(of, x, dq, dk, dv, w, dsinks)
