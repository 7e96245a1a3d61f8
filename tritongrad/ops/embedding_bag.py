"""``embedding_bag``: sums and means of rows of a table, which are never in memory themselves.

torch has no derivative of its gradients. Here they are linear maps that ``embedding`` has already:
rows of g, a table of a row for each bag, and their sums for each entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..admission import admit, launchable, memory, settle
from ..dispatch import apply, bypass
from ..dtypes import COMPUTE_DTYPE, FLOATING
from ..launchers import embedding as launchers
from ..launchers.embedding import NO_PADDING
from ..op import BackwardParams, Needs, Op, Spec, Tensors, Unsupported, register
from ..runtime import INTERPRETED
from ..sampling import Make, Sample
from .embedding import (
    AMBIENT,
    OUT_OF_RANGE,
    Params,
    check_table,
    fold,
    indices,
    lookup,
    padding_entry,
    renormalise,
    transposed,
    unfold,
)

F = torch.nn.functional


class BagParams(NamedTuple):
    """What a call is beside its table, its indices, offsets and weights.

    Attributes:
        mean: whether sums are divided by the number of rows, without padding.
        table: see ``embedding.Params``.
    """

    mean: bool
    table: Params


ANOTHERS_FREQUENCY = "scale_grad_by_freq, where torch's CPU divides by other entries' frequencies"


# ------------------------------------------------------------------------ reading torch's signature


def _bind(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Tensors, BagParams]:
    check_table(weight, input)
    if mode not in ("sum", "mean") or type(scale_grad_by_freq) is not bool:
        raise Unsupported(f"mode={mode!r}, scale_grad_by_freq={scale_grad_by_freq!r}")
    if sparse is not False:
        raise Unsupported("sparse gradient")
    if scale_grad_by_freq and weight.device.type == "cpu":
        # Wrong, but not ours to replace: on a GPU torch's are right, and ours are the same.
        raise Unsupported(ANOTHERS_FREQUENCY)
    padding = padding_entry(padding_idx, weight.shape[0])
    offsets = _offsets(input, offsets, include_last_offset)
    if per_sample_weights is not None:
        admit(per_sample_weights)
        like = weight.dtype, weight.device, input.shape
        own = per_sample_weights.dtype, per_sample_weights.device, per_sample_weights.shape
        if own != like or mode != "sum":
            raise Unsupported("per_sample_weights of another kind, or of a mean")
    if max_norm is not None:
        input = renormalise(weight, input, max_norm, norm_type)
    params = BagParams(mode == "mean", Params(padding, scale_grad_by_freq))
    return (weight, input, offsets, per_sample_weights), params


def _offsets(index: Tensor, offsets: Tensor | None, with_end: Any) -> Tensor | None:
    """Where bags begin, None for those that are rows of ``index``."""
    if index.dim() == 2 and offsets is None:
        if not index.shape[1]:
            raise Unsupported("bags of no rows")
        return None
    if offsets is None or index.dim() != 1:
        raise Unsupported("other than rows of bags, or indices with offsets")
    admit(offsets)
    if offsets.dtype not in (torch.int32, torch.int64) or offsets.device != index.device:
        raise Unsupported("dtype or device of offsets")
    if offsets.dim() != 1 or type(with_end) is not bool or offsets.shape[0] <= with_end:
        raise Unsupported("no bags")
    if INTERPRETED:
        places, end = memory(offsets), index.shape[0]
        if places[..., 0].any() or places.max() > end or (places.diff() < 0).any():
            raise Unsupported("offsets that do not ascend from 0")
        if with_end and (places[..., -1] != end).any():
            # torch's CPU ends the last bag there for some dtypes, for others with the input.
            raise Unsupported("a last offset that is not the end of the input")
    return offsets[:-1] if with_end else offsets


# -------------------------------------------------------------------------------------- the kernels


def _tables(params: BagParams, index: Tensor) -> int:
    return index.shape[0] if params.table.batched else 1


def _forward(
    params: BagParams, w: Tensor, index: Tensor, offsets: Tensor | None, scale: Tensor | None
) -> Any:
    y, size = launchers.bags(w, index, offsets, scale, params.mean, params.table.padding)
    return y if size is None else (y, size)


def _share(size: Tensor, source: Tensor, dtype: torch.dtype) -> Tensor:
    """What a row's part in the mean of its bag is."""
    return size.reshape(-1)[source].clamp(min=1).to(dtype).reciprocal()


def _backward_forward(
    bp: BackwardParams,
    g: Tensor,
    w: Tensor | None,
    index: Tensor,
    offsets: Tensor | None,
    scale: Tensor | None,
    y: None,
    size: Tensor | None = None,
) -> Any:
    params: BagParams = bp.params
    source = launchers.bag_of(index, offsets, _tables(params, index))
    found = []
    if bp.needs[0]:
        factor = None if scale is None else scale.contiguous().view(-1)
        if size is not None:
            factor = _share(size, source, COMPUTE_DTYPE[g.dtype])
        (spec, *_), table = bp.specs, params.table
        assert spec is not None
        found.append(
            launchers.gradient(
                g, index, spec.shape, table.padding, table.by_frequency, source, factor
            )
        )
    if bp.needs[3]:
        assert w is not None
        found.append(launchers.scale_gradient(w, g, index, source, params.table.padding))
    return found[0] if len(found) == 1 else tuple(found)


# ------------------------------------------------------------------------------------------- rules


def _rule(
    params: BagParams, needs: Needs, specs: tuple[Spec | None, ...], grads: Tensors, saved: Tensors
) -> Tensors:
    (g,), (w, index, offsets, scale, _, *size) = grads, saved
    spec, table = specs[0], params.table
    assert g is not None
    assert index is not None
    assert spec is not None
    with bypass():
        source = launchers.bag_of(index, offsets, _tables(params, index))
    rows = lookup(Params(NO_PADDING, False), g.flatten(0, -2), source.view(index.shape))
    if params.mean:
        assert size[0] is not None
        with bypass():
            share = _share(size[0], source, g.dtype).view(index.shape).unsqueeze(-1)
        rows = rows * share
    dw = ds = None
    if needs[0]:
        own = rows if scale is None else rows * scale.unsqueeze(-1)
        dw = transposed(table, own, index, spec.shape)
    if needs[3]:
        assert w is not None
        of_table = lookup(table._replace(by_frequency=False, masked=True), w, index)
        ds = (of_table * rows).sum(-1)
    return dw, None, None, ds


def _backward_reference(bp: BackwardParams, g: Tensor, *saved: Tensor | None) -> Tensors:
    found = _rule(bp.params, bp.needs, bp.specs, (g,), saved)
    return tuple([t for t in found if t is not None])


def _value(
    params: BagParams, w: Tensor, index: Tensor, offsets: Tensor | None, scale: Tensor | None
) -> Tensor:
    """The op of a tangent: on its kernel or, where only torch can see what it is, by its parts."""
    w, scale = settle(w), None if scale is None else settle(scale)
    if launchable((w, index, offsets, scale)):
        return apply(bag, params, (w, index, offsets, scale))
    with bypass():
        source = launchers.bag_of(index, offsets, _tables(params, index)).view(index.shape)
        counts = (index != params.table.padding).to(w.dtype)
    rows = lookup(params.table._replace(by_frequency=False, masked=True), w, index)
    if scale is not None:
        rows = rows * scale.unsqueeze(-1)
    shape = index.shape[:-1] if offsets is None else offsets.shape
    plain, bags = Params(NO_PADDING, False), torch.Size((shape.numel(), w.shape[-1]))
    sums = transposed(plain, rows, source, bags)
    if params.mean:
        size = transposed(plain, counts.unsqueeze(-1), source, torch.Size((shape.numel(), 1)))
        sums = sums / size.clamp(min=1)
    return sums.view(*shape, w.shape[-1])


def _jvp(params: BagParams, tensors: Tensors, outputs: Tensors, tangents: Tensors) -> Tensor:
    (w, index, offsets, scale), (dw, _, _, ds) = tensors, tangents
    assert w is not None
    assert index is not None
    parts = []
    if dw is not None:
        parts.append(_value(params, dw, index, offsets, scale))
    if ds is not None:
        parts.append(_value(params, w, index, offsets, ds))
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _vmap(info: Any, params: BagParams, tensors: Tensors, dims: tuple) -> Any:
    """Bags of as many tables."""
    nested, size = params.table.batched, info.batch_size
    folded = [
        t if t is None else fold(size, nested, (t, d))[0]
        for t, d in zip(tensors, dims, strict=True)
    ]
    params = params._replace(table=params.table._replace(batched=True))
    found = apply(bag, params, tuple(folded), everything=True)
    if type(found) is tuple:
        return tuple([unfold(t, size, nested) for t in found]), (0,) * len(found)
    return unfold(found, size, nested), 0


def _saves(params: BagParams, needs: Needs) -> list[int]:
    kept = [1, 2]
    if needs[3]:
        kept = [0, *kept]
    if needs[0]:
        kept += [3, 5] if params.mean else [3]
    return kept


def _cost(
    params: BagParams, w: Tensor, index: Tensor, offsets: Tensor | None, scale: Tensor | None
) -> tuple[int, int]:
    bags = (index.shape[:-1] if offsets is None else offsets.shape).numel()
    elements = (index.numel() + bags) * w.shape[-1]
    return elements * w.element_size() + index.numel() * 8, 2 * index.numel() * w.shape[-1]


def _samples(make: Make) -> Iterator[Sample]:
    yield Sample((indices(make, 2, 3, entries=2), make(2, 5)), {"mode": "sum"}, "sums")
    weighted = {"mode": "sum", "per_sample_weights": make(3, 2)}
    yield Sample((indices(make, 3, 2, entries=2), make(5, 4)), weighted, "weights")
    yield Sample((indices(make, 4, 3, entries=2), make(2, 4).t().contiguous().t()), {}, "means")
    # As large as this, because of the other sizes that suites give tables offsets are refused.
    begins = torch.tensor([0, 4, 4, 25], device=make(1).device)
    apart = {"offsets": begins, "padding_idx": 1}
    yield Sample((indices(make, 40, entries=3), make(30, 5)), apart, "offsets, padding")
    weighted = {"mode": "sum", "per_sample_weights": make(3, 90)}
    yield Sample((indices(make, 3, 90, entries=2), make(5, 1031)), weighted, "whole chunks")


backward = Op(
    name="embedding_bag_backward",
    bind=None,
    forward=_backward_forward,
    outputs=2,
    reference=_backward_reference,
    kernels=("embedding_bwd", "embedding_chunk", "embedding_bag_scale_bwd"),
    formula="autograd through the rule of embedding_bag",
    dtypes=FLOATING,
)
bag = Op(
    name="embedding_bag",
    bind=_bind,
    forward=_forward,
    replaces=(F.embedding_bag,),
    ambient=AMBIENT,
    saves=_saves,
    rule=_rule,
    backward=backward,
    jvp=_jvp,
    vmap=_vmap,
    opinfo=("nn.functional.embedding_bag",),
    kernels=("embedding_bag_fwd",),
    formula="dw[v] = sum of s[n] * g[b[n]] where i[n] = v; ds[n] = sum(w[i[n]] * g[b[n]])",
    dtypes=FLOATING,
    cost=_cost,
    samples=_samples,
    differs=OUT_OF_RANGE,
    sources="torch aten/src/ATen/native/EmbeddingBag.cpp",
)
register(bag)
