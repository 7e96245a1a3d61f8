"""``embedding``: rows of a table, and a gradient that is a sum of rows in a fixed order.

The gradient leaves out ``padding_idx``, and divides by an entry's frequency on request, while
value and tangent know of neither; that is torch's definition. So there are two linear maps, each
the other's derivative from then on: ``lookup``, with rows of padding 0 where it is the derivative
of a gradient, and ``embedding_backward``.
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
from ..runtime import INTERPRETED, local
from ..sampling import Make, Sample

F = torch.nn.functional

OUT_OF_RANGE = (
    "On a GPU an index past the end gives a row of NaN, where torch's kernel stops the process; on "
    "the CPU both raise IndexError."
)


class Params(NamedTuple):
    """What a call is beside its table and its indices.

    Attributes:
        padding: the entry without a gradient, ``NO_PADDING`` if there is none.
        by_frequency: whether gradients are divided by how often an entry occurs.
        masked: whether rows of padding are 0, as those of a gradient's derivative.
        batched: whether both tensors have a batch in front, that each has a table for.
    """

    padding: int
    by_frequency: bool
    masked: bool = False
    batched: bool = False


# ---------------------------------------------------------------------- reading torch's signatures


def check_table(weight: Tensor, index: Tensor) -> None:
    """Raise Unsupported for what is no table, or no indices of it."""
    admit(weight)
    admit(index)
    if weight.dtype not in FLOATING or index.dtype not in (torch.int32, torch.int64):
        raise Unsupported("dtype of weight or indices")
    if weight.dim() != 2:
        raise Unsupported("weight is not two-dimensional")
    if weight.device != index.device:
        raise Unsupported("tensors on different devices")
    if out_of_range(index, weight.shape[0]):
        raise Unsupported("index out of range")


def out_of_range(index: Tensor, entries: int) -> bool:
    """Whether torch would refuse an index. A GPU is not waited for: there, as said in
    ``kernels/embedding.py``, the row is NaN."""
    index = memory(index)
    if not INTERPRETED or not index.numel():
        return False
    least, most = torch.aminmax(index)
    return least.item() < 0 or most.item() >= entries


# Interpreted, every call is read: whether it is taken depends on values.
AMBIENT = object if INTERPRETED else None


def renormalise(weight: Tensor, index: Tensor, max_norm: Any, norm_type: Any) -> Tensor:
    """Do to the table, in place, what torch does before a lookup. Returns a copy of the indices, so
    that ``recall`` reads the next call too: a view it would make anew, and not touch the table."""
    with torch.no_grad():
        torch.embedding_renorm_(weight.detach(), index.contiguous(), max_norm, norm_type)
    if local.session is not None:
        local.session._count_fall_back("torch.embedding_renorm_", "max_norm, in place")
    return index.clone()


def padding_entry(padding: Any, entries: int) -> int:
    """``padding_idx`` of torch.nn.functional as an entry."""
    if padding is None:
        return NO_PADDING
    if type(padding) is not int or not -entries <= padding < max(entries, 1):
        raise Unsupported(f"padding_idx={padding!r}")
    return padding + entries if padding < 0 else padding


def _bind(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> tuple[Tensors, Params]:
    (weight, input), params = _bind_torch(weight, input, 0, scale_grad_by_freq, sparse)
    padding = padding_entry(padding_idx, weight.shape[0])
    if max_norm is not None:
        input = renormalise(weight, input, max_norm, norm_type)
    return (weight, input), params._replace(padding=padding)


def _bind_torch(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> tuple[tuple[Tensor, Tensor], Params]:
    check_table(weight, indices)
    if type(padding_idx) is not int or type(scale_grad_by_freq) is not bool:
        raise Unsupported(f"padding_idx={padding_idx!r}, scale_grad_by_freq={scale_grad_by_freq!r}")
    if sparse is not False:
        raise Unsupported("sparse gradient")
    return (weight, indices), Params(max(padding_idx, NO_PADDING), scale_grad_by_freq)


# ------------------------------------------------------------------------------------------- maps


def lookup(params: Params, w: Tensor, index: Tensor) -> Tensor:
    """Rows of ``w``, on our kernel or, for tracers, in torch mathematics."""
    w = settle(w)
    if launchable((w, index)):
        return apply(embedding, params, (w, index))
    with bypass():
        rows = w.flatten(0, -2)[_flat(index, w.shape[-2], params.batched)]
        if params.masked:
            rows = rows.masked_fill((index == params.padding).unsqueeze(-1), 0)
        return rows


def transposed(params: Params, g: Tensor, index: Tensor, table: torch.Size) -> Tensor:
    """The sum for each entry of a table, or tables, of a shape of the rows of ``g``."""
    g = settle(g)
    if launchable((g, index)):
        bp = BackwardParams(params, (True, False), (Spec(table, g.dtype), None))
        return apply(backward, bp, (g, None, index, None))
    with bypass():
        kept = (index != params.padding).unsqueeze(-1)
        rows = (g * kept).reshape(-1, table[-1])
        flat = _flat(index, table[-2], params.batched).reshape(-1)
        sums = rows.new_zeros(table[:-1].numel(), table[-1]).index_add(0, flat, rows)
        return _by_frequency(params, sums.view(table), index)


def _flat(index: Tensor, entries: int, batched: bool) -> Tensor:
    """``index`` into all tables, one after the other."""
    if not batched:
        return index
    first = torch.arange(0, index.shape[0] * entries, entries, device=index.device)
    return index + first.view(-1, *[1] * (index.dim() - 1))


def _by_frequency(params: Params, v: Tensor, index: Tensor) -> Tensor:
    """``v``, of the shape of the tables, divided by how often each entry occurs."""
    if not params.by_frequency:
        return v
    with bypass():
        flat = _flat(index, v.shape[-2], params.batched).reshape(-1).long()
        counts = flat.new_zeros(v.shape[:-1].numel()).scatter_add(0, flat, torch.ones_like(flat))
        share = counts.clamp(min=1).to(COMPUTE_DTYPE[v.dtype]).reciprocal()
    return (v * share.view(v.shape[:-1]).unsqueeze(-1)).to(v.dtype)


# ------------------------------------------------------------------------------------------- rules


def _forward(params: Params, w: Tensor, index: Tensor) -> Tensor:
    return launchers.lookup(w, index, params.padding if params.masked else NO_PADDING)


def _rule(
    params: Params, needs: Needs, specs: tuple[Spec | None, ...], grads: Tensors, saved: Tensors
) -> Tensors:
    (g,), (_, index, _), (spec, _) = grads, saved, specs
    assert g is not None
    assert index is not None
    assert spec is not None
    return transposed(params, g, index, spec.shape), None


def _jvp(params: Params, tensors: Tensors, outputs: Tensors, tangents: Tensors) -> Tensor:
    (_, index), (tangent, _) = tensors, tangents
    assert index is not None
    assert tangent is not None
    return lookup(params, tangent, index)


def fold(size: int, nested: bool, *pairs: tuple[Tensor, int | None]) -> list[Tensor]:
    """Tensors with the dimension of vmap in front; ``nested`` in one with the batch they have."""
    found = [t.expand(size, *t.shape) if d is None else t.movedim(d, 0) for t, d in pairs]
    return [t.flatten(0, 1) for t in found] if nested else found


def unfold(result: Tensor, size: int, nested: bool) -> Tensor:
    """A result of folded tensors."""
    return result.view(size, result.shape[0] // size, *result.shape[1:]) if nested else result


def _vmap(info: Any, params: Params, tensors: Tensors, dims: tuple) -> tuple[Tensor, int]:
    (w, index), (w_dim, index_dim), size = tensors, dims, info.batch_size
    assert w is not None
    assert index is not None
    if w_dim is None and not params.batched:  # more indices
        return apply(embedding, params, (w, index.movedim(index_dim, 0))), 0
    w, index = fold(size, params.batched, (w, w_dim), (index, index_dim))
    found = apply(embedding, params._replace(batched=True), (w, index))
    return unfold(found, size, params.batched), 0


def _backward_forward(bp: BackwardParams, g: Tensor, w: None, index: Tensor, y: None) -> Tensor:
    params, (spec, _) = bp.params, bp.specs
    assert spec is not None
    return launchers.gradient(g, index, spec.shape, params.padding, params.by_frequency)


def _backward_rule(
    bp: BackwardParams, needs: Needs, specs: tuple, grads: Tensors, saved: Tensors
) -> Tensors:
    (v,), (_, _, index, *_) = grads, saved
    assert v is not None
    assert index is not None
    v = _by_frequency(bp.params, v, index)
    masked = bp.params._replace(by_frequency=False, masked=True)
    return lookup(masked, v, index), None, None, None


def _backward_jvp(
    bp: BackwardParams, tensors: Tensors, outputs: Tensors, tangents: Tensors
) -> Tensor:
    tangent, index, (spec, _) = tangents[0], tensors[2], bp.specs
    assert tangent is not None
    assert index is not None
    assert spec is not None
    return transposed(bp.params, tangent, index, spec.shape)


def _backward_vmap(info: Any, bp: BackwardParams, tensors: Tensors, dims: tuple) -> Any:
    (g, _, index, _), params, (spec, _), size = tensors, bp.params, bp.specs, info.batch_size
    assert g is not None
    assert index is not None
    assert spec is not None
    g, index = fold(size, params.batched, (g, dims[0]), (index, dims[2]))
    batch = size * spec.shape[0] if params.batched else size
    table = torch.Size((batch, *spec.shape[-2:]))
    found = transposed(params._replace(batched=True), g, index, table)
    return unfold(found, size, params.batched), 0


backward = Op(
    name="embedding_backward",
    bind=None,
    forward=_backward_forward,
    saves=lambda bp, needs: (2,),
    rule=_backward_rule,
    jvp=_backward_jvp,
    vmap=_backward_vmap,
    kernels=("embedding_bwd", "embedding_chunk"),
    formula="dg[n] = v[i[n]], 0 where i[n] is padding_idx",
    dtypes=FLOATING,
)


def _cost(params: Params, w: Tensor, index: Tensor) -> tuple[int, int]:
    moved = 2 * index.numel() * w.shape[-1] * w.element_size()
    return moved + index.numel() * index.element_size(), 0


def indices(make: Make, *shape: int, entries: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Indices of a table, the first two entries among them more often than not."""
    return make(*shape, low=0.0, high=entries - 0.01, dtype=dtype, requires_grad=False)


def _samples(make: Make) -> Iterator[Sample]:
    yield Sample((indices(make, 3, entries=2), make(2, 5)), {}, "each entry several times")
    yield Sample((indices(make, 2, 3, entries=7), make(7, 4)), {}, "more entries than indices")
    transposed = indices(make, 3, 2, entries=3, dtype=torch.int32).t()
    yield Sample((transposed, make(2, 4).t()), {}, "transposed")
    yield Sample((indices(make, entries=4), make(4, 3)), {}, "0-dim")
    # Too large for finite differences, of which the gradient with padding is none.
    many = indices(make, 5, 60, entries=4)
    yield Sample((many, make(20, 5)), {"padding_idx": 0}, "whole chunks, padding")
    yield Sample((indices(make, 17, entries=2), make(30, 1031)), {}, "several blocks of columns")


def _bench(make: Make, size: Any) -> Sample:
    """A vocabulary's rows, each of which some tokens ask for."""
    columns = min(size.columns, 2**12)
    rows = max(size.elements // columns, 1)
    return Sample((indices(make, rows, entries=2**15), make(2**15, columns)))


embedding = Op(
    name="embedding",
    bind=_bind,
    forward=_forward,
    replaces=(F.embedding,),
    variants={torch.embedding: _bind_torch},
    ambient=AMBIENT,
    saves=lambda params, needs: (1,),
    rule=_rule,
    backward=backward,
    jvp=_jvp,
    vmap=_vmap,
    opinfo=("nn.functional.embedding",),
    kernels=("embedding_fwd",),
    formula="dw[v] = sum of g[n] where i[n] = v",
    dtypes=FLOATING,
    cost=_cost,
    samples=_samples,
    bench=_bench,
    differs=f"{OUT_OF_RANGE} The second derivative with scale_grad_by_freq is that of the "
    "gradient; torch's is not scaled.",
    sources="torch derivatives.yaml: embedding, embedding_dense_backward",
)
register(embedding)
