"""The vector norms: ``torch.linalg.vector_norm``, and ``torch.norm`` where it means one.

The rule is torch's ``norm_backward`` (FunctionsManual.cpp), which gives subgradient 0 at a norm of
0 and shares the gradient of an infinity norm evenly among ties.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..dtypes import COMPUTE_DTYPE, FLOATING, Number, is_number
from ..kernels import reduction as k
from ..kernels import reduction_backward as kb
from ..launchers.reduction import AMAX, AMIN, SUM
from ..op import Op, Spec, Tensors, Unsupported
from ..sampling import Make, Sample
from .reduction import (
    Dim,
    Kind,
    Params,
    exact_pointwise,
    hits_per_row,
    read,
    reduction,
    refuse_empty,
    restored,
    row_jvp,
    standard_samples,
    total_of,
    value_of,
)

# ---------------------------------------------------------------------- reading torch's signatures


def _bind_vector_norm(
    input: Tensor,
    ord: Number = 2,
    dim: Dim = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensors, Params]:
    if type(ord) not in (int, float) or not is_number(ord):
        raise Unsupported(f"order is a {type(ord).__name__}")
    params = read(input, dim, keepdim, dtype, kind_of, float(ord))
    if input.dtype is not params.result and (
        input.dtype not in FLOATING
        or torch.promote_types(input.dtype, params.result) is not params.result
    ):
        raise Unsupported("dtype would narrow the input")
    return (input,), params


def _bind_norm(
    input: Tensor,
    p: Number | str | None = "fro",
    dim: Dim = None,
    keepdim: bool = False,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensors, Params]:
    if out is not None:
        raise Unsupported("out=")
    if p is None:
        p = 2
    elif isinstance(p, str):
        if p != "fro" or not (dim is None or isinstance(dim, int) or len(dim) <= 2):
            raise Unsupported("matrix norm")
        p = 2
    return _bind_vector_norm(input, p, dim, keepdim, dtype=dtype)


def _bind_norm_method(
    input: Tensor,
    p: Number | str | None = "fro",
    dim: Dim = None,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensors, Params]:
    return _bind_norm(input, p, dim, keepdim, None, dtype)


def _bind_linalg_norm(
    input: Tensor,
    ord: Number | str | None = None,
    dim: Dim = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensors, Params]:
    if not isinstance(input, Tensor):
        raise Unsupported(f"input is a {type(input).__name__}")
    # How many dimensions decide whether an order is a vector's or a matrix's.
    count = input.dim() if dim is None else 1 if isinstance(dim, int) else len(dim)
    if dim is not None and count not in (1, 2):
        raise Unsupported("norm over other than one or two dimensions")
    if ord is None:
        return _bind_vector_norm(input, 2, dim, keepdim, dtype=dtype)
    if count != 1:
        raise Unsupported("matrix norm")
    return _bind_vector_norm(input, ord, dim, keepdim, dtype=dtype)  # type: ignore[arg-type]


# -------------------------------------------------------------------------- values and derivatives


def kind_of(p: float, count: int) -> Kind:
    """The reduction that a norm of order ``p`` is."""
    if p < 0 or p == math.inf:
        refuse_empty(count)
    # The norm of a single element is its absolute value, exactly.
    return _kind(1.0 if count == 1 and p != 0 else p)


@lru_cache(maxsize=64)
def _kind(p: float) -> Kind:
    if p == 0:
        return Kind(SUM.but(map=k.nonzero))
    if p == 1:
        return Kind(SUM.but(map=k.absolute))
    if p == 2:
        return Kind(SUM.but(map=k.square, finish=k.root))
    if math.isinf(p):
        return Kind((AMAX if p > 0 else AMIN).but(map=k.absolute))
    return Kind(SUM.but(map=k.absolute_power, finish=k.power), (p,), (1 / p,))


def rule(params: Params, spec: Spec, g: Tensor, x: Tensor, out: Tensor) -> Tensor | None:
    if params.number == 0:
        return None  # a count: undefined, says torch
    x, out, g = x.to(params.result), restored(out, params), restored(g, params)
    return _slope(g, x, out, params).to(spec.dtype)


def _slope(g: Tensor, x: Tensor, out: Tensor, params: Params) -> Tensor:
    p = params.number
    if p == 1:
        return torch.sign(x) * g
    if p == 2:
        return g * torch.where(out == 0, 0.0, x / out)
    if math.isinf(p):
        hits = torch.abs(x) == out
        count = total_of(hits, params, True, COMPUTE_DTYPE[params.result])
        # A NaN hits nothing; its row has gradient zero, not 0 / 0.
        count = torch.where(out != out, 1.0, count)
        return torch.sign(x) * ((g / count) * hits)
    if p < 1:
        return _steepness(x, p) * g * out ** (1 - p)
    scale = torch.where(out == 0, 0.0, g / out ** (p - 1))
    if p < 2:
        return torch.sign(x) * torch.abs(x) ** (p - 1) * scale
    return x * torch.abs(x) ** (p - 2) * scale


def _steepness(x: Tensor, p: float) -> Tensor:
    """What an element adds to the slope of a norm of order below 1, up to a factor of its row."""
    return torch.sign(x) * torch.where(x == 0, 0.0, torch.abs(x) ** (p - 1))


def backward(params: Params, spec: Spec, g: Tensor, x: Tensor, out: Tensor) -> Tensor | None:
    p = params.number
    if p == 0:
        return None
    g = restored(g, params)
    if p == 1:
        return exact_pointwise(kb.norm_1_bwd, (g, x), params.result, spec.dtype)
    out = restored(out, params)
    if p == 2:
        return exact_pointwise(kb.norm_2_bwd, (g, x, out), params.result, spec.dtype)
    if math.isinf(p):
        count = hits_per_row(k.absolute_hit, params, x, out)
        return exact_pointwise(kb.norm_inf_bwd, (g, x, out, count), params.result, spec.dtype)
    compute = COMPUTE_DTYPE[params.result]
    if compute is not params.result:
        # out ** (p - 1) would multiply the rounding of a half precision result by p - 1.
        out = value_of(kind_of, params._replace(keepdim=True, result=compute), x)
    scale = exact_pointwise(kb.norm_scale, (g, out), compute, compute, (p,))
    return exact_pointwise(kb.norm_p_bwd, (scale, x), params.result, spec.dtype, (p,))


def jvp(op: Op, params: Params, x: Tensor, out: Tensor, tangent: Tensor) -> Tensor:
    if params.number == 0:
        return torch.zeros_like(out)
    p = params.number
    if p < 1 and not math.isinf(p):
        # The factor of the row after the sum, as torch has it: where it is infinite, infinities of
        # either sign would make NaN.
        compute = COMPUTE_DTYPE[params.result]
        terms = _steepness(x.to(compute), p) * tangent
        total = total_of(terms, params, params.keepdim, compute)
        return (total * out.to(compute) ** (1 - p)).to(params.result)
    return row_jvp(op, params, x, out, tangent)


def _samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 0), 3), {"dim": 1}, "of nothing")
    yield from standard_samples(make)
    for order in (1, -math.inf, math.inf, 0.5, 1.5, 3, -1):
        yield Sample((make(3, 5), order), {"dim": 1}, f"order {order}")
    yield Sample((make(2, 3, 4), 3), {"dim": (0, 2), "keepdim": True}, "order 3, several dims")
    yield Sample((make(3, 1), 3), {"dim": 1}, "of one element")
    yield Sample((make(3, 5),), {"dim": 1, "dtype": torch.float64}, "dtype")


# ------------------------------------------------------------------------------------------- TABLE

T = Tensor
_norm: dict[str, Any] = {
    "kind_of": kind_of,
    "rule": rule,
    "backward": backward,
    "jvp": jvp,
    "samples": _samples,
    "formula": "dx = g * sign(x) * (abs(x) / out) ** (p - 1)",
    "autocast": {"cuda": "float32"},
}

reduction(
    "vector_norm", torch.linalg.vector_norm,
    bind=_bind_vector_norm, **_norm,
    opinfo=("linalg.vector_norm",),
)  # fmt: skip
reduction(
    "norm", torch.norm,
    bind=_bind_norm,
    variants={T.norm: _bind_norm_method, torch.linalg.norm: _bind_linalg_norm},
    **_norm,
    opinfo=("norm", "norm.fro", "norm.inf", "linalg.norm", "linalg.norm.subgradients_at_zero"),
)  # fmt: skip
