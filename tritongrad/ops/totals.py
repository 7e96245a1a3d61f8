"""Sums and their like: ``sum mean nansum nanmean amax amin logsumexp``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..admission import admit
from ..dtypes import COMPUTE_DTYPE, INTEGRAL
from ..kernels import reduction as k
from ..kernels import reduction_backward as kb
from ..launchers.reduction import AMAX, AMIN, MEAN, SUM, Reduction, reduce
from ..op import Bind, Needs, Op, Spec, Tensors, Unsupported
from ..sampling import Make, Sample
from .reduction import (
    Dim,
    Kind,
    KindOf,
    Params,
    bind_total,
    count_of,
    counting,
    exact_pointwise,
    extremum_jvp,
    hits_per_row,
    read,
    reduction,
    refuse_empty,
    restored,
    short_samples,
    standard_samples,
    total_of,
    value_of,
)

# ---------------------------------------------------------------------- reading torch's signatures


def bind_nan(kind_of: KindOf) -> Bind:
    """The signature of nansum and nanmean, of which keepdim needs no dim."""

    def bind(
        input: Tensor, dim: Dim = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
    ) -> tuple[Tensors, Params]:
        return (input,), read(input, dim, keepdim, dtype, kind_of)

    return bind


def bind_extremum(kind_of: KindOf) -> Bind:
    """The signature of amax and amin."""

    def bind(input: Tensor, dim: Dim = (), keepdim: bool = False) -> tuple[Tensors, Params]:
        return (input,), read(input, dim, keepdim, None, kind_of)

    return bind


# ------------------------------------------------------------------------------------ sum and mean


def _total_samples(make: Make) -> Iterator[Sample]:
    yield from standard_samples(make)
    yield Sample((make(3, 0),), {"dim": 1}, "of nothing")
    yield Sample((make(3, 5),), {"dim": 1, "dtype": torch.float64}, "dtype")


def _spread(params: Params, spec: Spec, g: Tensor) -> Tensor:
    # A view, unless dtype= was given. Converted after it is expanded, as torch does: the derivative
    # of this sums what has not been rounded to the input's dtype yet.
    return restored(g, params).expand(spec.shape).to(spec.dtype)


def _sum_rule(params: Params, spec: Spec, g: Tensor, x: None, out: None) -> Tensor:
    return _spread(params, spec, g)


def _mean_rule(params: Params, spec: Spec, g: Tensor, x: None, out: None) -> Tensor:
    # Of no elements each gets nothing, and no number is divided by 0 on the way.
    return _spread(params, spec, g / max(count_of(spec.shape, params.dims), 1))


def _linear_jvp(op: Op, params: Params, x: Tensor, out: Tensor, tangent: Tensor) -> Tensor:
    if not params.dims:
        return tangent.to(params.result)
    # By torch's name rather than by apply(): a tangent may be zeros that were never stored.
    return op.replaces[0](tangent, params.dims, params.keepdim, dtype=params.result)


def _saves_nothing(params: Params, needs: Needs) -> tuple[int, ...]:
    return ()


def _saves_input(params: Params, needs: Needs) -> tuple[int, ...]:
    return (0,)


# --------------------------------------------------------------------------------- amax and amin


def _extremum_rule(params: Params, spec: Spec, g: Tensor, x: Tensor, out: Tensor) -> Tensor:
    hits = x == restored(out, params)
    count = total_of(hits, params, True, COMPUTE_DTYPE[spec.dtype])
    # Ties share evenly.
    return ((restored(g, params) / count) * hits).to(spec.dtype)


def _extremum_backward(params: Params, spec: Spec, g: Tensor, x: Tensor, out: Tensor) -> Tensor:
    g, out = restored(g, params), restored(out, params)
    count = hits_per_row(k.hit, params, x, out)
    return exact_pointwise(kb.extremum_bwd, (g, x, out, count), params.result, spec.dtype)


# ------------------------------------------------------------------------- sums that pass over NaN

NANSUM = SUM.but(map=k.numeric_value)
NANMEAN = Reduction(k.numeric, k.add_and_count, (0.0, 0.0), k.ratio)


def _nansum_rule(params: Params, spec: Spec, g: Tensor, x: Tensor, out: None) -> Tensor:
    return _spread(params, spec, g) * (x == x)


def _nansum_backward(params: Params, spec: Spec, g: Tensor, x: Tensor, out: None) -> Tensor:
    return exact_pointwise(kb.nansum_bwd, (restored(g, params), x), params.result, spec.dtype)


def _nanmean_rule(params: Params, spec: Spec, g: Tensor, x: Tensor, out: None) -> Tensor:
    count = total_of(x == x, params, True, COMPUTE_DTYPE[params.result])
    return ((restored(g, params) / count) * (x == x)).to(spec.dtype)


def _nanmean_backward(params: Params, spec: Spec, g: Tensor, x: Tensor, out: None) -> Tensor:
    compute = COMPUTE_DTYPE[params.result]
    count = reduce(counting(k.is_number), (x,), params.dims, True, x.dtype, compute)
    return exact_pointwise(
        kb.nanmean_bwd, (restored(g, params), x, count), params.result, spec.dtype
    )


# --------------------------------------------------------------------------------------- logsumexp

LOGSUMEXP = Reduction(k.exponential, k.add_exponentials, (-math.inf, 0.0), k.logarithm)


def _bind_logsumexp(input: Tensor, dim: Dim, keepdim: bool = False) -> tuple[Tensors, Params]:
    admit(input)
    if dim is None or dim in ((), []):
        raise Unsupported(f"dim={dim!r}")
    dtype = torch.get_default_dtype() if input.dtype in INTEGRAL else None
    return (input,), read(input, dim, keepdim, dtype, _logsumexp)


def _logsumexp(number: float, count: int) -> Kind:
    return Kind(LOGSUMEXP)


def _logsumexp_rule(params: Params, spec: Spec, g: Tensor, x: Tensor, out: Tensor) -> Tensor:
    return (restored(g, params) * torch.exp(x - restored(out, params))).to(spec.dtype)


def _logsumexp_backward(params: Params, spec: Spec, g: Tensor, x: Tensor, out: Tensor) -> Tensor:
    compute = COMPUTE_DTYPE[params.result]
    if compute is not params.result:
        # The exponential would multiply the rounding of a half precision result.
        out = value_of(_logsumexp, params._replace(result=compute), x)
    operands = (restored(g, params), x, restored(out, params))
    return exact_pointwise(kb.logsumexp_bwd, operands, params.result, spec.dtype)


def _logsumexp_jvp(op: Op, params: Params, x: Tensor, out: Tensor, tangent: Tensor) -> Tensor:
    compute = COMPUTE_DTYPE[params.result]
    weights = torch.exp(x.to(compute) - restored(out, params))
    total = total_of(weights * tangent, params, params.keepdim, compute)
    # Their sum is 1 but for the rounding of `out`, which is large where x is.
    return (total / total_of(weights, params, params.keepdim, compute)).to(params.result)


def _nan_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 5),), {}, "all")
    yield from short_samples(make)
    yield Sample((make(3, 5).sqrt().detach().requires_grad_(), 1), {}, "with NaN")


# ------------------------------------------------------------------------------------------- TABLE

T = Tensor


def _sum(number: float, count: int) -> Kind:
    return Kind(SUM)


def _mean(number: float, count: int) -> Kind:
    return Kind(MEAN, (), (count,))


def _amax(number: float, count: int) -> Kind:
    refuse_empty(count)
    return Kind(AMAX)


def _amin(number: float, count: int) -> Kind:
    refuse_empty(count)
    return Kind(AMIN)


def _nansum(number: float, count: int) -> Kind:
    return Kind(NANSUM)


def _nanmean(number: float, count: int) -> Kind:
    return Kind(NANMEAN)


_linear: dict[str, Any] = {"jvp": _linear_jvp, "saves": _saves_nothing, "samples": _total_samples}
_extremum: dict[str, Any] = {
    "constants": (2,),
    "rule": _extremum_rule,
    "backward": _extremum_backward,
    "jvp": extremum_jvp,
    "samples": standard_samples,
    "formula": "dx = g / sum(x == out) * (x == out)",
}
reduction(
    "sum", torch.sum, T.sum,
    bind=bind_total(_sum), kind_of=_sum, rule=_sum_rule, **_linear,
    formula="dx = g",
    autocast={"cuda": "float32"},
)  # fmt: skip
reduction(
    "mean", torch.mean, T.mean,
    bind=bind_total(_mean), kind_of=_mean, rule=_mean_rule, **_linear,
    formula="dx = g / n",
)  # fmt: skip
reduction("amax", torch.amax, T.amax, bind=bind_extremum(_amax), kind_of=_amax, **_extremum)
reduction("amin", torch.amin, T.amin, bind=bind_extremum(_amin), kind_of=_amin, **_extremum)
_nan: dict[str, Any] = {"saves": _saves_input, "samples": _nan_samples}
reduction(
    "nansum", torch.nansum, T.nansum,
    bind=bind_nan(_nansum), kind_of=_nansum, rule=_nansum_rule, backward=_nansum_backward, **_nan,
    formula="dx = g * (x == x)",
)  # fmt: skip
reduction(
    "nanmean", torch.nanmean, T.nanmean,
    bind=bind_nan(_nanmean), kind_of=_nanmean,
    rule=_nanmean_rule, backward=_nanmean_backward, **_nan,
    formula="dx = g / sum(x == x) * (x == x)",
)  # fmt: skip
reduction(
    "logsumexp", torch.logsumexp, torch.special.logsumexp, T.logsumexp,
    bind=_bind_logsumexp, kind_of=_logsumexp,
    rule=_logsumexp_rule, backward=_logsumexp_backward, jvp=_logsumexp_jvp, samples=short_samples,
    formula="dx = g * exp(x - out)",
    autocast={"cuda": "float32"},
)  # fmt: skip
