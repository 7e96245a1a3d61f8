"""What is particular to bags: offsets, empty bags, padding, weights, and derivatives of any order,
of which torch has the first alone."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import DEVICE, assert_same
from test_embedding import indices, rerouted, same, table
from torch import Tensor
from torch.func import grad, vmap

import tritongrad
from tritongrad.compare.parity import STAND_INS
from tritongrad.dispatch import apply
from tritongrad.launchers import embedding as launchers
from tritongrad.launchers.embedding import NO_PADDING
from tritongrad.ops.embedding import Params
from tritongrad.ops.embedding_bag import ANOTHERS_FREQUENCY, BagParams, bag
from tritongrad.reroute import HARMLESS
from tritongrad.runtime import INTERPRETED

BEGINS = [0, 2, 2, 7, 12]
"""Of twelve indices; the second bag is empty, and so is the last."""


def offsets(dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(BEGINS, dtype=dtype, device=DEVICE)


def call(index: Tensor, options: dict[str, Any], weights: Tensor | None) -> Any:
    """As a function of the table, and of weights if there are any."""
    if weights is None:
        return partial(F.embedding_bag, index, **options)
    return lambda w, s: F.embedding_bag(index, w, per_sample_weights=s, **options)


@pytest.mark.parametrize("padding", [None, 1, -1])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags(mode: str, padding: int | None) -> None:
    """Rows or offsets, of either dtype, with the end or without, more entries than indices and
    fewer; a bag of nothing but padding."""
    for entries, dtype in itertools.product((5, 40), (torch.int32, torch.int64)):
        index = indices(12, entries=5, dtype=dtype)
        index[2:7] = entries - 1
        common = {"mode": mode, "padding_idx": padding}
        forms = (
            (index, {"offsets": offsets(dtype)}),
            (index, {"offsets": offsets(), "include_last_offset": True}),
            (index.view(4, 3), {}),
            (index.view(3, 4).t(), {}),
        )
        for rows, form in forms:
            same(call(rows, common | form, None), table(entries))
            if mode == "sum":
                weights = torch.randn_like(rows, dtype=torch.float64).requires_grad_()
                same(call(rows, common | form, weights), table(entries), weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_are_in_single_precision(dtype: torch.dtype) -> None:
    one = 1 + torch.finfo(dtype).eps
    w = torch.full((2, 3), one, dtype=dtype, device=DEVICE)
    index = torch.ones(1, 1000, dtype=torch.int64, device=DEVICE)
    assert torch.equal(rerouted(partial(F.embedding_bag, mode="sum"), index, w)[0], 1000 * w[0])


def test_only_what_is_needed() -> None:
    """The table is kept for the weights' gradient alone, the weights for the table's."""
    index = indices(4, 3)
    for which in range(2):
        inputs = [table().detach(), torch.randn(4, 3, dtype=torch.float64, device=DEVICE)]
        inputs[which].requires_grad_()
        kept: list[Tensor] = []
        f = call(index, {"mode": "sum"}, inputs[1])
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
            y = rerouted(f, *inputs)
        floating = [t for t in kept if t.is_floating_point()]
        assert [t.shape for t in floating] == [inputs[1 - which].shape]
        expected = torch.autograd.grad(f(*inputs).sum(), inputs[which])
        assert_same(torch.autograd.grad(y.sum(), inputs[which]), expected)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_every_order_with_offsets(mode: str) -> None:
    """gradcheck to second order, both ways, by the table and, of sums, by weights."""
    inputs, begins = [table(3, 2)], torch.tensor([0, 2, 2, 4], device=DEVICE)
    if mode == "sum":
        inputs.append(torch.randn(4, dtype=torch.float64, device=DEVICE, requires_grad=True))
    f = call(indices(4, entries=3), {"mode": mode, "offsets": begins}, (*inputs, None)[1])
    assert torch.autograd.gradcheck(partial(rerouted, f), inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(partial(rerouted, f), inputs, check_fwd_over_rev=True)


def test_gradient_by_frequency() -> None:
    """What the documentation says, and a GPU does: divided by how often the entry occurs. torch's
    CPU divides by the frequency of another entry; there, the call is left to it."""
    index, w = torch.tensor([[0, 0, 1], [2, 1, 0]], device=DEVICE), table()
    params = BagParams(True, Params(-1, True))
    (dw,) = torch.autograd.grad(apply(bag, params, (w, index, None, None)).sum(), w)
    assert_same(dw[:, 0], torch.tensor([1, 1, 1, 0, 0, 0], device=DEVICE).double() / 3)
    with tritongrad.use() as session:
        y = F.embedding_bag(index, w, scale_grad_by_freq=True)
    if DEVICE.type == "cpu":
        assert ANOTHERS_FREQUENCY in {reason for _, reason in session.fell_back}
    else:
        assert_same(torch.autograd.grad(y.sum(), w)[0], dw)


def test_max_norm() -> None:
    index, w = indices(4, 3, entries=4), table()
    ours, theirs = (w.detach().clone().requires_grad_() for _ in range(2))
    with tritongrad.use() as session:
        found = F.embedding_bag(index, ours, max_norm=0.5)
    expected = F.embedding_bag(index, theirs, max_norm=0.5)
    assert session.ran["embedding_bag"] == 1
    assert_same([found, ours.detach()], [expected, theirs.detach()])


@pytest.mark.parametrize(
    "options",
    [{"mode": "max"}, {"sparse": True}, {"offsets": torch.tensor([0, 3, 1])}],
    ids=["max", "sparse", "offsets that descend"],
)
def test_left_to_torch(options: dict[str, Any]) -> None:
    if "offsets" in options and not INTERPRETED:
        pytest.skip("a GPU is not waited for; torch does not look at offsets there either")
    index, w = indices(4), table()
    if "offsets" not in options:
        index = index.view(2, 2)
    with tritongrad.use() as session:
        found = F.embedding_bag(index, w, **options)
    assert {reason for _, reason in session.fell_back} - HARMLESS
    assert not session.ran
    assert_same(found, F.embedding_bag(index, w, **options))


@pytest.mark.skipif(not INTERPRETED, reason="a GPU is not waited for")
def test_what_torch_refuses() -> None:
    w, good = table(), indices(4)
    for index, begins, error in (
        (torch.tensor([0, 6, 1, 1]), [0, 1], "num_embeddings"),
        (torch.tensor([0, -1, 1, 1]), [0, 1], "num_embeddings"),
        (good, [1, 2], "has to be 0"),
        (good, [0, 5], "greater than input's length"),
    ):
        with tritongrad.use() as session, pytest.raises(RuntimeError, match=error):
            F.embedding_bag(index, w, torch.tensor(begins))
        assert not session.ran


@pytest.mark.parametrize("begins", [[1, 2], [0, 9, 3], [5, 4], [-3, 2]], ids=str)
@pytest.mark.parametrize("mean", [False, True])
def test_offsets_that_torch_refuses_are_no_addresses(begins: list[int], mean: bool) -> None:
    """What a GPU computes, where nobody waits for them: with rows and bags that there are, of which
    the first begins at 0. The row of an index out of range is NaN."""
    w, index = table().detach(), torch.tensor([0, 1, -1, 3, 2**40], device=DEVICE)
    places = torch.tensor(begins, device=DEVICE)
    found, size = launchers.bags(w, index, places, None, mean, NO_PADDING)
    assert found.shape == (len(begins), w.shape[1])
    assert size is None or (size.min() >= 0 and size.max() <= len(index))
    source = launchers.bag_of(index, places, 1)
    assert source.min() >= 0
    assert source.max() < len(begins)
    if begins == [1, 2]:
        if not mean:
            assert_same(found[0], w[0] + w[1])
        assert source.tolist() == [0, 0, 1, 1, 1]
        assert found[1].isnan().all()


def test_module() -> None:
    module = torch.nn.EmbeddingBag(6, 5, mode="sum", device=DEVICE, dtype=torch.float64)
    index = indices(4, 3)
    assert_same(rerouted(module, index), module(index))


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_vmap(mode: str) -> None:
    """Over tables, indices, weights and offsets; nested; values and gradients per sample."""
    native = STAND_INS[F.embedding_bag]
    w = torch.randn(2, 3, 6, 5, dtype=torch.float64, device=DEVICE)
    index = indices(2, 3, 12)
    weights = torch.randn(2, 3, 12, dtype=torch.float64, device=DEVICE) if mode == "sum" else None

    def value(f: Any, index: Tensor, w: Tensor, s: Tensor | None) -> Tensor:
        return f(index, w, offsets=offsets(), mode=mode, per_sample_weights=s)

    def slope(f: Any, index: Tensor, w: Tensor, s: Tensor | None) -> Tensor:
        return grad(lambda w: value(f, index, w, s).sin().sum())(w)

    for function in (value, slope):
        for own in itertools.product((True, False), repeat=2):
            dims = [0 if o else None for o in (*own, weights is not None)]
            args = [
                t if d == 0 or t is None else t[0, 0]
                for t, d in zip((index, w, weights), dims, strict=True)
            ]
            run = vmap(vmap(partial(function, F.embedding_bag), tuple(dims)), tuple(dims))
            if not any(d == 0 for d in dims):
                continue
            expected = [
                function(native, *[t[i, j] if d == 0 else t for t, d in zip(args, dims)])  # noqa: B905
                for i in range(2)
                for j in range(3)
            ]
            found = rerouted(run, *args)
            assert_same(found, torch.stack(expected).view(found.shape), str(dims))
    both = vmap(lambda o: F.embedding_bag(index[0, 0], w[0, 0], o, mode=mode))
    places = torch.stack([offsets(), torch.tensor([0, 1, 2, 3, 4], device=DEVICE)])
    expected = [F.embedding_bag(index[0, 0], w[0, 0], o, mode=mode) for o in places]
    assert_same(rerouted(both, places), torch.stack(expected))
