"""Variance and standard deviation, alone and with the mean: ``var std var_mean std_mean``.

One pass over the input, by Welford's method in Chan's form, so that a constant row has variance 0
and a large offset costs no digits. The rules are torch's ``var_backward`` and ``std_backward``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dtypes import COMPUTE_DTYPE, Number, is_number
from ..kernels import moments as k
from ..kernels import reduction_backward as kb
from ..launchers.reduction import MEAN, MOMENTS, Reduction, reduce
from ..op import Bind, OtherOverload, Spec, Tensors, Unsupported
from ..sampling import Make, Sample
from .reduction import (
    Dim,
    Kind,
    KindOf,
    Params,
    count_of,
    exact_pointwise,
    read,
    reduction,
    restored,
    short_samples,
)

VARIANCE = MOMENTS.but(finish=k.variance)
DEVIATION = VARIANCE.but(finish=k.deviation)

NO_FREEDOM = "no degrees of freedom, of which torch warns"


def _signatures(kind_of: KindOf) -> tuple[Bind, Bind, Bind]:
    """torch's three of each of these functions."""

    def bind(
        input: Tensor, dim: Dim = None, *, correction: Number | None = None, keepdim: bool = False
    ) -> tuple[Tensors, Params]:
        if type(dim) is bool:
            raise OtherOverload
        if correction is None:
            correction = 1
        elif not is_number(correction):
            raise Unsupported(f"correction is a {type(correction).__name__}")
        params = read(input, dim, keepdim, None, kind_of, float(correction))
        if 0 in input.shape:
            raise Unsupported(NO_FREEDOM)
        return (input,), params

    def bind_along(
        input: Tensor, dim: Dim, unbiased: bool = True, keepdim: bool = False
    ) -> tuple[Tensors, Params]:
        if type(unbiased) is not bool:
            raise OtherOverload
        return bind(input, dim, correction=int(unbiased), keepdim=keepdim)

    def bind_whole(input: Tensor, unbiased: bool = True) -> tuple[Tensors, Params]:
        return bind_along(input, None, unbiased)

    return bind, bind_along, bind_whole


def _kind_of(kind: Reduction, correction: float, count: int) -> Kind:
    if count <= correction:
        # There the slope depends on whether dim was given.
        raise Unsupported(NO_FREEDOM)
    return Kind(kind, (), (count - correction,))


def _freedom(params: Params, shape: torch.Size) -> float:
    return count_of(shape, params.dims) - params.number


def _mean(params: Params, x: Tensor) -> Tensor:
    """Of each row, not rounded to half precision."""
    compute, count = COMPUTE_DTYPE[params.result], count_of(x.shape, params.dims)
    return reduce(MEAN, (x,), params.dims, True, params.result, compute, (), (count,))


def _rule(params: Params, spec: Spec, g: Tensor | None, h: Tensor | None, x: Tensor) -> Tensor:
    """``g`` is the variance's gradient, ``h`` that of the mean."""
    total: Tensor | None = None
    if g is not None:
        distance = x - torch.mean(x, params.dims, True)
        total = restored(g, params) * (2 / _freedom(params, spec.shape)) * distance
    if h is not None:
        share = (restored(h, params) / count_of(spec.shape, params.dims)).expand(spec.shape)
        total = share if total is None else total + share
    assert total is not None
    return total.to(spec.dtype)


def _root_rule(
    params: Params, spec: Spec, g: Tensor | None, h: Tensor | None, x: Tensor, out: Tensor
) -> Tensor:
    if g is not None:
        g = torch.where(out == 0, 0.0, g / (2 * out))
    return _rule(params, spec, g, h, x)


def _backward(
    function: Any,
    params: Params,
    spec: Spec,
    g: Tensor | None,
    h: Tensor | None,
    x: Tensor,
    *out: Tensor,
) -> Tensor:
    if g is None:
        return _rule(params, spec, g, h, x)
    g, h, *of_rows = [t if t is None else restored(t, params) for t in (g, h, *out)]
    operands = (g, h, x, _mean(params, x), *of_rows)
    consts = (2 / _freedom(params, spec.shape), count_of(spec.shape, params.dims))
    return exact_pointwise(function, operands, params.result, spec.dtype, consts)


def _samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 5),), {}, "all")
    for sample in short_samples(make):
        # Of one element, or of none, torch warns.
        if sample.note not in ("0-dim", "empty"):
            yield sample
    yield Sample((make(3, 5), 1), {"correction": 0}, "correction")


# ------------------------------------------------------------------------------------------- TABLE

T = Tensor


def _moments(name: str, kind: Reduction, with_mean: bool, *targets: Any, formula: str) -> None:
    """``var``, ``std``, or one of them with the mean."""
    root = kind is DEVIATION
    device_function = kb.deviation_bwd if root else kb.variance_bwd
    names = ("g", "h", "x", "out", "mean") if with_mean else ("g", "x", "out")
    wanted = ("g", "h", "x", "out") if root else ("g", "h", "x")

    def chosen(function: Any) -> Any:
        """``function`` of those of a call's tensors that it wants, by name."""

        def call(params: Params, spec: Spec, *tensors: Tensor | None) -> Tensor:
            values = dict(zip(names, tensors, strict=True))
            return function(params, spec, *[values.get(n) for n in wanted])

        return call

    kind_of = partial(_kind_of, kind)
    bind, *overloads = _signatures(kind_of)
    reduction(
        name, *targets,
        bind=bind,
        overloads=tuple(overloads),
        kind_of=kind_of,
        results=lambda dtype: (dtype, dtype if with_mean else None),
        rule=chosen(_root_rule if root else _rule),
        backward=chosen(partial(_backward, device_function)),
        outputs=2 if with_mean else 1,
        saves=lambda params, needs: (0, 1) if root else (0,),
        samples=_samples,
        formula=formula,
        opinfo=(name, f"{name}.unbiased"),
    )  # fmt: skip


_of_variance = "dx = g * 2 / (n - correction) * (x - mean)"
_of_deviation = "dx = g / out / (n - correction) * (x - mean)"
_moments("var", VARIANCE, False, torch.var, T.var, formula=_of_variance)
_moments("std", DEVIATION, False, torch.std, T.std, formula=_of_deviation)
_moments("var_mean", VARIANCE, True, torch.var_mean, formula=f"{_of_variance} + h / n")
_moments("std_mean", DEVIATION, True, torch.std_mean, formula=f"{_of_deviation} + h / n")
