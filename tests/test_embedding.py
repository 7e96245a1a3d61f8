"""What is particular to tables: indices, padding, frequencies, norms, and the order of sums.

Derivatives, transforms and layouts by the table are covered by the suites that walk OPS.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import DEVICE, Tolerance, assert_same, on_the_cpu
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import tritongrad
from tritongrad.launchers import embedding as launchers
from tritongrad.op import OPS
from tritongrad.recall import remembering
from tritongrad.reroute import HARMLESS
from tritongrad.runtime import INTERPRETED


def table(entries: int = 6, columns: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(entries, columns, dtype=dtype, device=DEVICE, requires_grad=True)


def indices(*shape: int, entries: int = 6, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(entries, shape, dtype=dtype, device=DEVICE)


def rerouted(f: Callable[..., Any], *args: Any) -> Any:
    """``f`` on our kernels; fails if any of it ran on torch."""
    with tritongrad.use() as session:
        result = f(*args)
    assert session.ran.total()
    assert not {reason for _, reason in session.fell_back} - HARMLESS, session
    return result


def with_gradient(f: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Value and gradients for an upstream gradient that is the same for both."""
    value = f(*inputs)
    g = torch.linspace(-1, 2, value.numel(), dtype=value.dtype, device=value.device)
    return [value, *torch.autograd.grad(value, inputs, g.view(value.shape))]


def same(f: Callable[..., Tensor], *inputs: Tensor, tolerance: Tolerance | None = None) -> None:
    """Value and gradients are torch's."""
    ours = rerouted(with_gradient, f, *inputs)
    assert_same(ours, with_gradient(f, *inputs), tolerance=tolerance)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 0, 3), (5, 1, 2)], ids=str)
def test_indices(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of every shape, empty ones too; more entries than indices, and fewer."""
    for entries in (3, 40):
        for options in ({}, {"padding_idx": 1}, {"padding_idx": -2}, {"scale_grad_by_freq": True}):
            index = indices(*shape, entries=3, dtype=dtype)
            for f in (partial(F.embedding, **options), lambda i, w: torch.embedding(w, i, 1)):
                same_of_nothing(f, index, table(entries))


def test_no_table() -> None:
    for entries, columns in ((0, 5), (4, 0)):
        index = indices(0 if not entries else 3, entries=4)
        same_of_nothing(F.embedding, index, table(entries, columns))


def same_of_nothing(f: Callable[..., Tensor], index: Tensor, w: Tensor) -> None:
    """Value and gradient are torch's, whose kernels for a GPU fault on what is empty: those of its
    CPU."""

    def run(index: Tensor, w: Tensor) -> list[Tensor]:
        return with_gradient(partial(f, index), w)

    assert_same(rerouted(run, index, w), on_the_cpu(run, index, w))


def test_one_entry_that_most_have() -> None:
    """Whole chunks are summed apart, wherever they begin and end, in one or several tiles."""
    for before, most, after in [(0, 0, 0), (1, 200, 0), (63, 129, 64), (64, 1200, 1)]:
        counts = torch.tensor([before, most, after, 260])
        index = torch.repeat_interleave(torch.tensor([0, 2, 3, 5]), counts).to(DEVICE)
        order = torch.randperm(len(index), device=DEVICE)
        same(partial(F.embedding, index[order], padding_idx=3), table())


def test_same_bits_in_whatever_order_of_entries() -> None:
    """The sum of an entry depends on the order of its own rows alone, up to where chunks begin."""
    index, g = indices(500, entries=3), torch.randn(500, 7, device=DEVICE)
    runs = [launchers.gradient(g, index, torch.Size((3, 7)), -1, False) for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_summed_in_single(dtype: torch.dtype) -> None:
    """A thousand times 1 + eps: in half precision the sum would stop growing."""
    one = 1 + torch.finfo(dtype).eps
    w = torch.zeros(1, 3, dtype=dtype, device=DEVICE, requires_grad=True)
    y = rerouted(F.embedding, torch.zeros(1000, dtype=torch.int64, device=DEVICE), w)
    (dw,) = torch.autograd.grad(y, w, torch.full_like(y, one))
    assert torch.equal(dw, torch.full_like(w, 1000 * one))


@pytest.mark.parametrize("index", [-1, 6, 2**40])
def test_index_out_of_range(index: int) -> None:
    """torch's error where kernels are interpreted; a GPU is not waited for, and the row is NaN.
    Also when a call of the same shapes has been taken before."""
    w, good = table(), torch.tensor([[1, 2]], device=DEVICE)
    bad = torch.tensor([[1, index]], device=DEVICE)
    rerouted(F.embedding, good, w)
    found = launchers.lookup(w.detach(), bad)
    assert torch.equal(found[0, 0], w[1])
    assert found[0, 1].isnan().all()
    dw = launchers.gradient(torch.ones_like(found), bad, w.shape, -1, False)
    assert dw.count_nonzero() == 5
    tables = w.detach().expand(2, *w.shape)
    pairs = torch.cat([bad, good])
    found = launchers.lookup(tables, pairs)
    assert found.isnan().sum() == 5
    dw = launchers.gradient(torch.ones_like(found), pairs, tables.shape, -1, False)
    assert dw.count_nonzero() == 15
    if INTERPRETED:
        for call in (lambda: F.embedding(bad, w), lambda: torch.embedding(w, bad)):
            with tritongrad.use(), pytest.raises(IndexError, match="index out of range in self"):
                call()
        with tritongrad.use(), pytest.raises(IndexError, match="out of range"):
            vmap(lambda i: F.embedding(i, w))(torch.cat([good, bad]))


def test_padding() -> None:
    """No gradient, nor one of a gradient; but a value and a tangent, as in torch."""
    index, w, v = indices(9, entries=3), table(), torch.randn(6, 5, device=DEVICE).double()
    f = partial(F.embedding, index, padding_idx=1)

    def everything(w: Tensor) -> list[Tensor]:
        y = f(w)
        g = torch.ones_like(y, requires_grad=True)
        (dw,) = torch.autograd.grad(y, w, g, create_graph=True)
        (dg,) = torch.autograd.grad(dw, g, v, create_graph=True)
        return [y, dw, dg, jvp(f, (w.detach(),), (v,))[1]]

    ours, theirs = rerouted(everything, w), everything(w)
    assert_same(ours, theirs)
    assert not ours[1][1].any()


def test_gradient_by_frequency_is_differentiated_as_it_is() -> None:
    """dw[v] = sum g[n] / count: linear, and its transpose divides as well; torch's does not."""
    index, w = torch.tensor([[0, 1, 1], [4, 1, 2]], device=DEVICE), table()
    count = torch.bincount(index.flatten(), minlength=6).clamp(min=1).double()[:, None]
    f = partial(F.embedding, index, scale_grad_by_freq=True, padding_idx=2)
    y = rerouted(f, w)
    g = torch.randn_like(y).requires_grad_()
    (dw,) = torch.autograd.grad(y, w, g, create_graph=True)
    assert_same(dw.detach(), torch.autograd.grad(f(w), w, g)[0])
    v = torch.randn_like(w)
    (dg,) = torch.autograd.grad(dw, g, v)
    expected = (v / count)[index] * (index != 2).unsqueeze(-1)
    assert_same(dg, expected.detach())
    assert_same((dw * v).sum().detach(), (g * dg).sum().detach())


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_max_norm_renormalises_the_table(norm_type: float) -> None:
    """In place, before each lookup, the rows that are looked up; what torch does, and reports."""
    index, w = indices(3, 4, entries=4), table()
    ours, theirs = (w.detach().clone().requires_grad_() for _ in range(2))
    for _ in range(2):
        with tritongrad.use() as session:
            found = with_gradient(
                lambda w: F.embedding(index, w, max_norm=0.5, norm_type=norm_type), ours
            )
        expected = with_gradient(
            lambda w: F.embedding(index, w, max_norm=0.5, norm_type=norm_type), theirs
        )
        assert session.ran["embedding"] == 1
        on_torch = {k: n for k, n in session.fell_back.items() if k[1] not in HARMLESS}
        assert on_torch == {("torch.embedding_renorm_", "max_norm, in place"): 1}
        assert_same([*found, ours.detach()], [*expected, theirs.detach()])
        assert torch.equal(ours[4:], theirs[4:])
        with torch.no_grad():
            ours.mul_(3)
            theirs.mul_(3)


@pytest.mark.parametrize("name", ["embedding", "embedding_bag"])
def test_a_call_that_is_remembered_renormalises_too(name: str) -> None:
    """As on a GPU, where indices are not looked at: the table's new numbers must not be passed by,
    and the session must say so again."""
    bind = remembering(inspect.unwrap(OPS[name].bind), None)
    index = indices(2, 3)
    for _ in range(3):
        w = torch.full((6, 5), 2.0, device=DEVICE)
        with tritongrad.use() as session:
            bind(index, w, max_norm=0.5)
        assert_same(w[index].norm(dim=-1), torch.full_like(w[:2, :3], 0.5))
        assert session.fell_back["torch.embedding_renorm_", "max_norm, in place"] == 1


def test_sparse_is_torchs() -> None:
    w = table()
    with tritongrad.use() as session:
        F.embedding(indices(3), w, sparse=True).sum().backward()
    assert w.grad.is_sparse
    assert "sparse gradient" in {reason for _, reason in session.fell_back}


def test_module() -> None:
    module = torch.nn.Embedding(6, 5, padding_idx=2, dtype=torch.float64, device=DEVICE)
    index = indices(4, 3)
    y = rerouted(module, index)
    assert_same(y, module(index))
    y.sum().backward()
    assert not module.weight.grad[2].any()


@pytest.mark.parametrize("options", [{}, {"padding_idx": 1, "scale_grad_by_freq": True}], ids=str)
def test_vmap_over_tables_and_indices(options: dict[str, Any]) -> None:
    """Either, both, nested: values, gradients per sample, tangents."""
    w = torch.randn(2, 3, 4, 5, dtype=torch.float64, device=DEVICE)
    index = indices(2, 3, 7, entries=4)
    f = partial(F.embedding, **options)

    def slope(index: Tensor, w: Tensor) -> Tensor:
        return grad(lambda w: f(index, w).sin().sum())(w)

    def pushed(index: Tensor, w: Tensor) -> Tensor:
        return jvp(lambda w: f(index, w).sin(), (w,), (w.cos(),))[1]

    def pulled(index: Tensor, w: Tensor) -> Tensor:
        y, pull = vjp(partial(f, index), w)
        return vmap(pull)(torch.stack([y, y.cos()]))[0]

    for function in (f, slope, pushed, pulled):
        for dims in ((0, 0), (0, None), (None, 0), (1, 1)):
            args = [t[0, 0] if d is None else t[0].movedim(0, d) for t, d in zip((index, w), dims)]  # noqa: B905
            expected = vmap(function, dims)(*args)
            assert_same(rerouted(vmap(function, dims), *args), expected, str(dims))
        nests = itertools.product([(0, 0), (0, None), (None, 0)], repeat=2)
        for dims in nests if function is slope else ():
            outer, inner = dims
            args = [
                t.select(1, 0) if i is None and o is not None
                else t[0] if o is None and i is not None
                else t[0, 0] if o is None
                else t
                for t, o, i in zip((index, w), outer, inner)  # noqa: B905
            ]  # fmt: skip
            nested = vmap(vmap(function, inner), outer)
            samples = [
                vmap(function, inner)(*[t if o is None else t[k] for t, o in zip(args, outer)])  # noqa: B905
                for k in range(2)
            ]
            assert_same(rerouted(nested, *args), torch.stack(samples), f"{dims}")


def test_what_a_tracer_sees() -> None:
    """Where operators of torch's must stand for the kernels."""
    index, w = indices(3, 4), table()
    for options in ({}, {"padding_idx": 1}, {"scale_grad_by_freq": True}):
        y = rerouted(partial(F.embedding, **options), index, w)
        g = torch.randn_like(y)
        (expected,) = torch.autograd.grad(y, w, g, retain_graph=True)
        traced = make_fx(partial(torch.autograd.grad, y, w, retain_graph=True))(g)
        assert_same(traced(g)[0], expected)
