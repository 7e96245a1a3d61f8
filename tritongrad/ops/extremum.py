"""``max`` and ``min`` in their three overloads, ``argmax`` and ``argmin``.

Of a whole tensor, ties (and NaN among NaN) share the gradient evenly; along a dimension it goes to
the element that the index names, the first of equals. Of two tensors they are ``maximum`` and
``minimum``, which share the torch names with the ops here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dtypes import COMPUTE_DTYPE
from ..kernels import extremum as k
from ..kernels import reduction as kr
from ..kernels import reduction_backward as kb
from ..launchers.extremum import place
from ..launchers.reduction import AMAX, AMIN, LAST, Reduction
from ..op import Bind, Needs, Op, OtherOverload, Spec, Tensors, Unsupported
from ..sampling import Make, Sample
from .reduction import (
    Kind,
    KindOf,
    Params,
    exact_pointwise,
    extremum_jvp,
    hits_per_row,
    read,
    reduction,
    refuse_empty,
    restored,
    short_samples,
    total_of,
)

FIRST_MAXIMUM = Reduction(
    k.indexed, k.first_maximum, (-math.inf, LAST), step=k.next_maximum, indexed=True
)
FIRST_MINIMUM = Reduction(
    k.indexed, k.first_minimum, (math.inf, LAST), step=k.next_minimum, indexed=True
)

# ---------------------------------------------------------------------- reading torch's signatures


def _read(input: Tensor, dim: Any, keepdim: bool, kind_of: KindOf) -> tuple[Tensors, Params]:
    if dim is not None and type(dim) is not int:
        raise Unsupported(f"dim={dim!r}")
    return (input,), read(input, dim, keepdim, None, kind_of)


def _kind_of(kind: Reduction, number: float, count: int) -> Kind:
    refuse_empty(count)
    return Kind(kind)


def _signatures(whole: KindOf, first: KindOf) -> tuple[Bind, Bind, Bind]:
    """Of an extremum of everything, of one along a dimension, and of an index."""

    def bind_whole(input: Tensor) -> tuple[Tensors, Params]:
        return _read(input, None, False, whole)

    def bind_along(input: Tensor, dim: Any = None, keepdim: bool = False) -> tuple[Tensors, Params]:
        if dim is None or isinstance(dim, Tensor):
            raise OtherOverload
        return _read(input, dim, keepdim, first)

    def bind_index(input: Tensor, dim: Any = None, keepdim: bool = False) -> tuple[Tensors, Params]:
        return _read(input, dim, keepdim, first)

    return bind_whole, bind_along, bind_index


# ---------------------------------------------------------------------------------- a whole tensor


def _same(params: Params, x: Tensor, out: Tensor) -> Tensor:
    out = restored(out, params)
    return (x == out) | ((x != x) & (out != out))


def _whole_rule(params: Params, spec: Spec, g: Tensor, x: Tensor, out: Tensor) -> Tensor:
    hits = _same(params, x, out)
    count = total_of(hits, params, True, COMPUTE_DTYPE[spec.dtype])
    return torch.where(hits, restored(g, params) / count, 0.0).to(spec.dtype)


def _whole_backward(params: Params, spec: Spec, g: Tensor, x: Tensor, out: Tensor) -> Tensor:
    g, out = restored(g, params), restored(out, params)
    count = hits_per_row(kr.same, params, x, out)
    return exact_pointwise(kb.evenly_bwd, (g, x, out, count), params.result, spec.dtype)


def _whole_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 5),), {}, "small")
    yield Sample((make(),), {}, "0-dim")
    yield Sample((make(4, 9)[:, ::2].t(),), {}, "strided")
    yield Sample((make(2, 4099),), {}, "past one block")
    yield Sample((make(8, 5000),), {}, "shared by several programs")


# ------------------------------------------------------------------------------- along a dimension


def _places(params: Params, shape: torch.Size, index: Tensor) -> Tensor:
    """0, 1, ... along the dimension of a call."""
    if not params.dims:
        return index  # of a number, whose place it is
    (dim,) = params.dims
    return torch.arange(shape[dim], device=index.device).view(-1, *[1] * (len(shape) - dim - 1))


def _chosen(params: Params, shape: torch.Size, index: Tensor) -> Tensor:
    return restored(index, params) == _places(params, shape, index)


def _along_rule(
    params: Params, spec: Spec, g: Tensor, _: None, x: None, out: None, index: Tensor
) -> Tensor:
    chosen = _chosen(params, spec.shape, index)
    return torch.where(chosen, restored(g, params), 0.0).to(spec.dtype)


def _along_backward(
    params: Params, spec: Spec, g: Tensor, _: None, x: None, out: None, index: Tensor
) -> Tensor:
    return place(g, index, spec.shape, params.dims[0] if params.dims else None, spec.dtype)


def _along_jvp(
    op: Op, params: Params, x: Tensor, out: Tensor, index: Tensor, tangent: Tensor
) -> tuple[Tensor, None]:
    chosen = torch.where(_chosen(params, x.shape, index), tangent, 0.0)
    return total_of(chosen, params, params.keepdim), None


def _saves_index(params: Params, needs: Needs) -> tuple[int, ...]:
    return (2,)


def _along_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 5), 1), {"keepdim": True}, "keepdim")
    for sample in short_samples(make):
        if isinstance(sample.args[1], int):
            yield sample
    yield Sample((make(2, 40_000), 1), {}, "rows shared by several programs")


def _index_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 5),), {}, "all")
    # Numbered in torch's order, walked in that of memory.
    yield Sample((make(4, 3, 9)[..., ::2].transpose(0, 2),), {}, "all, strided")
    yield from _along_samples(make)


# ------------------------------------------------------------------------------------------- TABLE

T = Tensor
for _name, _whole, _first, _pair in (
    ("max", AMAX, FIRST_MAXIMUM, torch.return_types.max),
    ("min", AMIN, FIRST_MINIMUM, torch.return_types.min),
):
    _targets = getattr(torch, _name), getattr(T, _name)
    _kinds = partial(_kind_of, _whole), partial(_kind_of, _first)
    _bind_whole, _bind_along, _bind_index = _signatures(*_kinds)
    reduction(
        _name, *_targets, shares=_targets,
        bind=_bind_whole, kind_of=_kinds[0],
        rule=_whole_rule, backward=_whole_backward, jvp=extremum_jvp, samples=_whole_samples,
        constants=(2,),
        formula="dx = g / sum(x == out) where x == out, else 0",
        opinfo=(f"{_name}.reduction_no_dim",),
    )  # fmt: skip
    reduction(
        f"{_name}_dim", *_targets, shares=_targets,
        bind=_bind_along, kind_of=_kinds[1], results=lambda dtype: (dtype, torch.int64),
        rule=_along_rule, backward=_along_backward, jvp=_along_jvp, saves=_saves_index,
        outputs=2, returns=_pair, samples=_along_samples,
        formula="dx = g where place == index, else 0",
        opinfo=(f"{_name}.reduction_with_dim",),
    )  # fmt: skip
    reduction(
        f"arg{_name}", getattr(torch, f"arg{_name}"), getattr(T, f"arg{_name}"),
        bind=_bind_index, kind_of=_kinds[1], results=lambda dtype: (None, torch.int64),
        samples=_index_samples,
    )  # fmt: skip
