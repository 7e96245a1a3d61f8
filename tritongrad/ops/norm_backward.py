"""Gradients of ``layer_norm`` and ``rms_norm``, and gradients of those, each an op with a kernel.

The formulas, in the notation of ``kernels/norm.py``, are here in torch mathematics, from which
third orders and forward mode come. They compute the statistics of rows again, and so are
differentiated in full; the kernels read those that ``forward`` kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import COMPUTE_DTYPE, FLOATING
from ..launchers import norm as launch
from ..op import BackwardParams, Needs, Op, Spec, Tensors
from .rows import reduce_to

KERNELS = ("norm_fwd", "norm_bwd", "norm_bwd_bwd", "reduce")


class Params(NamedTuple):
    """What a call is beside its tensors.

    Attributes:
        axes: number of trailing dimensions that a row lies along.
        eps: what the mean square is raised by.
        centred: whether the mean is taken away: layer_norm.
        specs: of the tensors; not under a transform.
    """

    axes: int
    eps: float
    centred: bool
    specs: tuple[Spec | None, ...] | None = None


# ------------------------------------------------------------------------------- torch mathematics


def _average(value: Tensor, params: Params) -> Tensor:
    return torch.mean(value, tuple(range(-params.axes, 0)), True)


def _centred(value: Tensor, params: Params) -> Tensor:
    return value - _average(value, params) if params.centred else value


def _scaled(params: Params, x: Tensor) -> tuple[Tensor, Tensor]:
    """``xh`` and ``r``."""
    x = _centred(x.to(COMPUTE_DTYPE[x.dtype]), params)
    rstd = torch.rsqrt(_average(x * x, params) + params.eps)
    return x * rstd, rstd


def times(value: Tensor, factor: Tensor | None) -> Tensor:
    return value if factor is None else value * factor


def _gradients(params: Params, needs: Needs, specs: Any, g: Tensor, inputs: Tensors) -> Tensors:
    """Of x, weight and bias."""
    x, weight, _ = inputs
    dx = dweight = dbias = None
    if needs[0] or needs[1]:
        assert x is not None
        g = g.to(COMPUTE_DTYPE[x.dtype])
        xh, rstd = _scaled(params, x)
        if needs[0]:
            u = times(g, weight)
            dx = rstd * (_centred(u, params) - xh * _average(u * xh, params))
        if needs[1]:
            dweight = reduce_to(g * xh, specs[1])
    if needs[2]:
        dbias = reduce_to(g, specs[2])
    return dx, dweight, dbias


def _second_gradients(
    params: Params, needs: Needs, vs: Tensors, g: Tensor, x: Tensor, weight: Tensor | None
) -> Tensors:
    """Of g, x and weight, the last not summed yet."""
    v, p, q = vs
    compute = COMPUTE_DTYPE[x.dtype]
    g = g.to(compute)
    xh, rstd = _scaled(params, x)
    u = times(g, weight)
    dg: Tensor | None = None
    dx: Tensor | None = None
    dweight: Tensor | None = None
    if v is not None:
        v = v.to(compute)
        a, b = _average(v * xh, params), _average(u * xh, params)
        v, mean_free = _centred(v, params), _centred(u, params)
        pushed = rstd * (v - xh * a)
        dg, dweight = times(pushed, weight), g * pushed
        if needs[1]:
            bent = b * v + a * mean_free + xh * (_average(v * mean_free, params) - 3 * a * b)
            dx = -rstd * rstd * bent
    if p is not None:
        t = g * p
        part = p * xh
        dg = part if dg is None else dg + part
        if needs[1]:
            bent = rstd * (_centred(t, params) - xh * _average(t * xh, params))
            dx = bent if dx is None else dx + bent
    if q is not None:
        dg = q.to(compute).expand(g.shape) if dg is None else dg + q
    return dg, dx, dweight


# ----------------------------------------------------------------------------------- made into ops


class Layout(NamedTuple):
    """Where the tensors of an op are: ``arity`` inputs (x, weight, perhaps bias), ``outputs`` that
    are public (the value, perhaps x itself), then the statistics of rows."""

    arity: int
    outputs: int

    def inputs(self, tensors: Tensors) -> Tensors:
        """x, weight and bias among those of a backward op."""
        return three(tensors[self.outputs : self.outputs + self.arity])

    def statistics(self, params: Params, tensors: Tensors) -> tuple[Tensor | None, Tensor]:
        """Those that ``forward`` kept, or computed again for a caller that has only its results."""
        start = 2 * self.outputs + self.arity
        found = tensors[start : start + 1 + params.centred]
        if not found or found[-1] is None:
            (x, *_) = self.inputs(tensors)
            assert x is not None
            _, _, mean, rstd = launch.forward(
                (x,), params.axes, params.centred, params.eps, value=False
            )
            return mean, rstd
        return (found[0] if params.centred else None), found[-1]


def three(values: Sequence[Any], missing: Any = None) -> Any:
    """What belongs to x, weight and bias, of an op that may have no bias."""
    return (*values, missing) if len(values) == 2 else tuple(values)


def _needed(found: Sequence[Tensor | None], needs: Needs) -> Any:
    """What a backward op returns: those of its results that are needed."""
    kept = tuple([t for t, need in zip(found, needs, strict=False) if need])
    return kept[0] if len(kept) == 1 else kept


def _wanted(needs: Needs, specs: Sequence[Spec | None]) -> Any:
    return tuple([s.dtype if n and s else None for n, s in zip(needs, specs, strict=True)])


def backward_op(name: str, layout: Layout) -> Op:
    """The op of ``(*gradients, x, weight, bias, *outputs, *statistics)`` that computes the
    gradients of the three. A second gradient is that of x itself: what it has beside the value."""

    def forward(bp: BackwardParams, *tensors: Tensor | None) -> Any:
        params, needs, specs = bp.params, three(bp.needs, False), three(bp.specs)
        g, (x, weight, _) = tensors[0], layout.inputs(tensors)
        assert g is not None
        if not (needs[0] or needs[1]):
            return launch.bias_gradient(g, params.axes, specs[2].dtype)
        assert x is not None
        added = tensors[1] if layout.outputs == 2 else None
        mean, rstd = layout.statistics(params, tensors)
        found = launch.backward(g, x, added, params.axes, mean, rstd, weight, _wanted(needs, specs))
        return _needed(found, needs)

    def reference(bp: BackwardParams, *tensors: Tensor | None) -> Tensors:
        found = gradients_by_rule(layout, bp, tensors[: layout.outputs], layout.inputs(tensors))
        return tuple([t for t in found if t is not None])

    def saves(bp: BackwardParams, needs: Needs) -> tuple[int, ...]:
        dx, dweight, _ = three(bp.needs, False)
        if not (dx or dweight):
            return ()
        x, statistics = layout.outputs, 2 * layout.outputs + layout.arity
        return (0, x, x + 1, *range(statistics, statistics + 1 + bp.params.centred))

    def rule(
        bp: BackwardParams, needs: Needs, specs: tuple, grads: Tensors, saved: Tensors
    ) -> Tensors:
        return _second_by_rule(layout, BackwardParams(bp, needs, specs), grads, saved)

    return Op(
        name=f"{name}_backward",
        bind=None,
        forward=forward,
        outputs=layout.arity,
        saves=saves,
        rule=rule,
        reference=reference,
        backward=_second_op(name, layout),
        kernels=KERNELS[1:],
        dtypes=FLOATING,
        formula=f"autograd through the rule of {name}",
    )


def gradients_by_rule(
    layout: Layout, bp: BackwardParams, grads: Tensors, inputs: Tensors
) -> Tensors:
    """What a backward op computes, in torch mathematics."""
    needs, specs = three(bp.needs, False), three(bp.specs)
    (g, *added) = grads
    assert g is not None
    dx, dweight, dbias = _gradients(bp.params, needs, specs, g, inputs)
    if dx is not None:
        if added and added[0] is not None:
            dx = dx + added[0]
        dx = dx.to(specs[0].dtype)
    return (dx, dweight, dbias)[: layout.arity]


def _second_op(name: str, layout: Layout) -> Op:
    """The op of ``(*gradients of a backward op's results, *its tensors, *its results)`` that
    computes the gradients of its gradients, of x, and of weight."""

    def forward(bp: BackwardParams, *tensors: Tensor | None) -> Any:
        vs: Any
        vs, own = _directions(bp, tensors)
        params, inner, h_spec = bp.params.params, _inner(layout, bp.needs), bp.specs[1]
        x, weight, _ = layout.inputs(own)
        specs = _inner(layout, bp.specs)
        if own[0] is None:  # of the gradient of a bias alone nothing was saved
            dense = torch.contiguous_format
            return vs[2].to(specs[0].dtype).expand(specs[0].shape).clone(memory_format=dense)
        assert x is not None
        v, p, q = vs
        mean, rstd = layout.statistics(params, own)
        dg, dx, dweight = launch.second(
            v, p, q, own[0], x, params.axes, mean, rstd, weight, _wanted(inner, specs)
        )
        results: list[Tensor | None] = [dg, dx, dweight]
        if layout.outputs == 2:
            passed = bp.needs[1] and vs[0] is not None
            # No spec of a sum that nothing is differentiated by.
            dtype = None if h_spec is None else h_spec.dtype
            results.insert(1, vs[0].to(dtype, copy=True) if passed and dtype else None)
        return _needed(results, bp.needs)

    def reference(bp: BackwardParams, *tensors: Tensor | None) -> Tensors:
        count = sum(bp.params.needs)
        found = _second_by_rule(layout, bp, tensors[:count], tensors[count:])
        like = next(t for t in tensors if t is not None)
        return tuple(
            [
                torch.zeros(s.shape, dtype=s.dtype, device=like.device) if t is None else t
                for t, s, need in zip(found, bp.specs, bp.needs, strict=True)
                if need and s is not None
            ]
        )

    return Op(
        name=f"{name}_backward_backward",
        bind=None,
        forward=forward,
        outputs=layout.outputs + 2,
        reference=reference,
        kernels=KERNELS[2:],
        dtypes=FLOATING,
        formula=f"autograd through the rule of {name}_backward",
    )


def _inner(layout: Layout, values: Sequence[Any]) -> Any:
    """Of what belongs to the tensors of a backward op, that of g, x and weight."""
    return values[0], values[layout.outputs], values[layout.outputs + 1]


def _directions(bp: BackwardParams, tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Gradients of dx, dweight and dbias, None for one that was not computed; the other tensors."""
    needs = three(bp.params.needs, False)
    given = iter(tensors)
    vs = tuple([next(given) if need else None for need in needs])
    return vs, tuple(given)


def _second_by_rule(layout: Layout, bp: BackwardParams, grads: Tensors, saved: Tensors) -> Tensors:
    vs, own = _directions(bp, (*grads, *saved))
    x, weight, _ = layout.inputs(own)
    needs, specs = _inner(layout, bp.needs), _inner(layout, bp.specs)
    found: Tensors = (None, None, None)
    if any(needs):
        (g, *_) = own
        if g is None:  # as there
            (_, _, q), shape = vs, specs[0].shape
            found = (None if q is None else q.expand(shape), None, None)
        else:
            assert x is not None
            found = _second_gradients(bp.params.params, needs, vs, g, x, weight)
    results: list[Tensor | None] = [None] * len(bp.needs)
    places = (0, layout.outputs, layout.outputs + 1)
    for place, part in zip(places, found, strict=True):
        spec = bp.specs[place]
        if bp.needs[place] and spec is not None and part is not None:
            results[place] = reduce_to(part, spec)
    if layout.outputs == 2 and bp.needs[1] and vs[0] is not None:
        spec = bp.specs[1]
        assert spec is not None
        results[1] = vs[0].to(spec.dtype)
    return tuple(results)
