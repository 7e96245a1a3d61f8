"""What is particular to variances, extrema with indices, logsumexp and sums that pass over NaN.

Derivatives of every order, transforms and layouts are covered by the suites that walk OPS.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import DEVICE, assert_same
from torch import Tensor

import tritongrad
from tritongrad.reroute import HARMLESS

NAN, INF = math.nan, math.inf


def rerouted(f: Callable[..., Any], *inputs: Tensor) -> Any:
    """``f`` on our kernels; fails if any of its arithmetic ran on torch."""
    with tritongrad.use() as session:
        result = f(*inputs)
    assert session.ran, session
    assert not {reason for _, reason in session.fell_back} - HARMLESS, session
    return result


def with_gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = f(x)
    return out, torch.autograd.grad(out, x, torch.ones_like(out))[0]


def same(f: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Value and gradient are torch's."""
    assert_same(rerouted(lambda x: with_gradient(f, x), x), with_gradient(f, x))


# ------------------------------------------------------------------------------------ variances


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(7,), (3, 1031), (40_000,)], ids=str)
def test_a_constant_row_has_variance_zero(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for value in (0.1, 1e7 + 0.1, -1e-30):
        x = torch.full(shape, value, dtype=dtype, device=DEVICE)
        variance, mean = rerouted(lambda x: torch.var_mean(x, -1), x)
        assert not variance.any()
        assert torch.equal(mean, x[..., 0])


def test_an_offset_costs_no_digits() -> None:
    x = torch.arange(5000.0, device=DEVICE).remainder(7)
    shifted = x + 2**20  # exact
    assert_same(rerouted(torch.var, shifted), torch.var(x.double()).float())


def test_every_signature_of_a_variance() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, device=DEVICE)
    for call in (
        lambda x: x.var(),
        lambda x: x.var(False),
        lambda x: x.std(unbiased=False),
        lambda x: torch.std(x, 1, True, True),
        lambda x: torch.var(x, (0, 1), unbiased=False),
        lambda x: torch.var(x, dim=0, correction=2),
        lambda x: torch.var(x, correction=0.5),
        lambda x: torch.var(x, [], correction=0, keepdim=True),
        lambda x: torch.std_mean(x, False),
        lambda x: torch.var_mean(x, -1, keepdim=True),
    ):
        assert_same(rerouted(call, x), call(x))


@pytest.mark.parametrize("f", [torch.var, torch.std], ids=["var", "std"])
def test_one_element_has_no_variance(f: Callable[..., Tensor]) -> None:
    """NaN, and torch's warning."""
    x = torch.ones(3, 1, device=DEVICE)
    with pytest.warns(UserWarning, match="degrees of freedom"), tritongrad.use():
        assert f(x, 1).isnan().all()
    with pytest.warns(UserWarning, match="degrees of freedom"), tritongrad.use():
        assert f(x[:0]).isnan()


def test_slope_of_a_deviation_of_zero_is_zero() -> None:
    same(lambda x: x.std(1), torch.tensor([[2.0, 2.0, 2.0], [1.0, 2.0, 4.0]], device=DEVICE))


# -------------------------------------------------------------------------------------- extrema

ROWS = torch.tensor(
    [
        [3.0, 1.0, 3.0, -1.0, -1.0],
        [NAN, 1.0, NAN, -1.0, 0.0],
        [INF, -INF, INF, -INF, 0.0],
        [0.0, -0.0, 0.0, -0.0, 0.0],
        [-INF, -INF, -INF, -INF, -INF],
    ],
    dtype=torch.float64,
)


@pytest.mark.parametrize("name", ["max", "min"])
def test_ties_and_nan(name: str) -> None:
    """Of a whole tensor they share evenly; along a dimension the first has it all."""
    rows, f = ROWS.to(DEVICE), getattr(torch, name)
    for row in rows:
        same(f, row)
    same(lambda x: f(x, 1).values, rows)
    indices = rerouted(lambda x: f(x, 1).indices, rows)
    assert_same(indices, f(rows, 1).indices)
    assert_same(rerouted(getattr(torch, f"arg{name}"), rows), getattr(torch, f"arg{name}")(rows))


@pytest.mark.parametrize("name", ["max", "min"])
def test_each_overload_is_an_op(name: str) -> None:
    x, f = torch.randn(3, 4, device=DEVICE), getattr(torch, name)
    kind = getattr(torch.return_types, name)
    for call, op in (
        (lambda: f(x), name),
        (lambda: f(x, 1), f"{name}_dim"),
        (lambda: f(x, dim=-1, keepdim=True), f"{name}_dim"),
        (lambda: getattr(x, name)(0), f"{name}_dim"),
        (lambda: f(x, x.flip(0)), f"{name}imum"),
        (lambda: f(x, other=x.flip(0)), f"{name}imum"),
    ):
        with tritongrad.use() as session:
            result = call()
        assert dict(session.ran) == {op: 1}
        assert_same(result, call())
        assert isinstance(result, kind) == op.endswith("_dim")
        with tritongrad.use(exclude=op) as session:
            call()
        assert not session.ran
        with tritongrad.use(only=op) as session:
            call()
        assert dict(session.ran) == {op: 1}


@pytest.mark.parametrize("f", [torch.argmax, torch.argmin], ids=["argmax", "argmin"])
def test_indices_count_in_torchs_order(f: Callable[..., Tensor]) -> None:
    """Whatever order memory is walked in, and however rows are shared."""
    for shape in ((3, 4, 5), (2, 131, 9), (40_000,)):
        x = torch.randn(shape, device=DEVICE).round()
        for order in itertools.permutations(range(len(shape))):
            y = x.permute(order)
            assert_same(rerouted(f, y), f(y), str((shape, order)))
            for dim in range(y.dim()):
                assert_same(rerouted(lambda y, d=dim: f(y, d, True), y), f(y, dim, True))
    x = torch.randn(2, 3, device=DEVICE)
    assert_same(rerouted(lambda x: f(x, keepdim=True), x), f(x, keepdim=True))


def test_an_index_has_no_gradient() -> None:
    x = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    values, indices = rerouted(lambda x: x.max(1), x)
    assert values.requires_grad
    assert not indices.requires_grad
    assert not rerouted(torch.argmax, x).requires_grad


def test_extremum_of_nothing() -> None:
    x = torch.ones(3, 0, device=DEVICE)
    assert rerouted(lambda x: x.max(0).values, x).shape == (0,)
    for call in (torch.max, torch.argmin, lambda x: x.min(1), lambda x: x.argmax(1)):
        with tritongrad.use() as session, pytest.raises((RuntimeError, IndexError)):
            call(x)
        assert not session.ran


# --------------------------------------------------------------------- logsumexp and sums with NaN


def test_logsumexp_at_the_infinities() -> None:
    same(lambda x: torch.logsumexp(x, 1), ROWS.to(DEVICE))
    x = torch.tensor([[1000.0, 1000.0], [-1000.0, -1000.0]], device=DEVICE)
    same(lambda x: torch.logsumexp(x, 1), x)
    integers = torch.tensor([[1, 2], [3, 4]], device=DEVICE)
    assert_same(rerouted(lambda x: x.logsumexp(0), integers), integers.logsumexp(0))


@pytest.mark.parametrize("f", [torch.nansum, torch.nanmean], ids=["nansum", "nanmean"])
def test_nan_is_passed_over(f: Callable[..., Tensor]) -> None:
    x = torch.tensor([[NAN, 1.0, 2.0], [NAN, NAN, NAN], [1.0, 2.0, 4.0]], device=DEVICE)
    same(lambda x: f(x, 1), x)
    same(f, x)


# ------------------------------------------------------------------------------------- distances


def test_rows_of_zeros() -> None:
    """The norm that is divided by is at least eps, and its slope is torch's."""
    x = torch.tensor([[0.0, 0.0], [1e-13, 0.0], [3.0, 4.0]], dtype=torch.float64, device=DEVICE)
    y = torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.0, 1.0]], dtype=torch.float64, device=DEVICE)
    same(F.normalize, x)
    same(lambda x: F.cosine_similarity(x, y), x)
    same(lambda x: F.cosine_similarity(y, x), x)
    same(lambda x: F.pairwise_distance(x, x.detach()), x)
    same(lambda x: F.pairwise_distance(x, x.detach(), eps=0.0), x)


@pytest.mark.parametrize("f", [F.cosine_similarity, F.pairwise_distance])
def test_distances_are_one_kernel(f: Callable[..., Tensor]) -> None:
    x, y = torch.randn(2, 3, 5, device=DEVICE)
    with tritongrad.use() as session:
        f(x, y)
    assert session.launches == 1
