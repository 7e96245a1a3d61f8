"""What is particular to scans: parts and blocks in both directions, and products with zeros.

Derivatives of every order, transforms and layouts are covered by the suites that walk OPS.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from scenarios import launches
from support import DEVICE, assert_same, random_like
from torch import Tensor
from torch.autograd import forward_ad as fwAD
from torch.fx.experimental.proxy_tensor import make_fx

import tritongrad
from tritongrad.launchers import scan as launcher
from tritongrad.launchers.scan import CUMPROD, CUMSUM, RECURRENCE, Scan
from tritongrad.ops import scan as ops
from tritongrad.ops.scan import ScanParams

INF, NAN = math.inf, math.nan


def rerouted(f: Callable[..., Any], *inputs: Tensor) -> Any:
    with tritongrad.use() as session:
        result = f(*inputs)
    assert session.ran, session
    return result


def solved(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """y[i] = a[i] y[i-1] + b[i], one after the other."""
    total = torch.zeros_like(b.select(dim, 0))
    steps = []
    for x, y in zip(a.unbind(dim), b.unbind(dim), strict=True):
        total = x * total + y
        steps.append(total)
    return torch.stack(steps, dim)


def near_one(*shape: int) -> Tensor:
    return 1 + torch.randn(shape, dtype=torch.float64, device=DEVICE) / 100


# ------------------------------------------------------------------------------- blocks and parts

SHAPES = {
    "one block": ((3, 5), 1, 1),
    "columns": ((5, 3), 0, 1),
    "middle dim": ((2, 37, 3), 1, 3),
    "several blocks": ((2, 300), 1, 3),
    "blocks of columns": ((33, 9), 0, 3),
    "a single row": ((200,), 0, 3),
}
"""Shape, dimension, and launches: three where programs share rows."""


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small blocks, and rows shared whenever they have two: what long rows meet on a GPU."""
    monkeypatch.setattr(launcher.k, "TILE", 32)
    monkeypatch.setattr(launcher, "HALVED", None)
    monkeypatch.setattr(launcher.k, "ROW_BLOCK", 4)
    monkeypatch.setattr(launcher, "LEAST_STEPS", 2)
    monkeypatch.setattr(launcher, "PROGRAMS_PER_PROCESSOR", 64)
    launcher._plan.cache_clear()
    yield
    launcher._plan.cache_clear()


def scan(kind: Scan, operands: tuple[Tensor, ...], dim: int, reverse: bool) -> Tensor:
    return launcher.run(launcher.prepare(kind, operands, dim, reverse, operands[0].dtype), operands)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("case", SHAPES)
def test_every_part_takes_in_those_before_it(case: str, reverse: bool, many_parts: None) -> None:
    shape, dim, expected_launches = SHAPES[case]
    a, b = near_one(*shape), near_one(*shape)
    flip: Callable[[Tensor], Tensor] = (lambda t: t.flip(dim)) if reverse else lambda t: t
    expected = {
        CUMSUM: flip(flip(b).cumsum(dim)),
        CUMPROD: flip(flip(b).cumprod(dim)),
        RECURRENCE: flip(solved(flip(a), flip(b), dim)),
    }
    for kind, truth in expected.items():
        operands = (a, b) if kind is RECURRENCE else (b,)
        run = partial(scan, kind, operands, dim, reverse)
        found, count = launches(run)
        assert_same(found, truth, case)
        assert count == expected_launches
        assert torch.equal(found, run()), "not deterministic"


@pytest.mark.parametrize("f", [torch.cumsum, torch.cumprod], ids=["cumsum", "cumprod"])
def test_gradient_of_shared_rows(f: Callable[..., Tensor], many_parts: None) -> None:
    x = near_one(2, 301).requires_grad_()  # a shape that nobody has had before, in fewer parts
    (g,) = random_like([x])
    y, count = launches(lambda: rerouted(lambda x: f(x, 1), x))
    assert count == 3
    found = torch.autograd.grad(y, x, g)
    assert_same(found, torch.autograd.grad(f(x, 1), x, g))


def test_a_long_row() -> None:
    x = near_one(40_000).float()
    assert_same(rerouted(lambda x: x.cumsum(0), x), x.cumsum(0))
    assert_same(rerouted(lambda x: x.cumsum(0, dtype=torch.float64), x), x.double().cumsum(0))


def test_float32_sums_keep_the_digits_of_small_ones() -> None:
    """Scanned in float64, as torch's on the CPU."""
    x = torch.tensor([1e8, 1.0, 1.0, -1e8], device=DEVICE)
    assert rerouted(lambda x: x.cumsum(0), x)[-1] == 2


@pytest.mark.parametrize("f", [torch.cumsum, torch.cumprod], ids=["cumsum", "cumprod"])
def test_what_torch_refuses(f: Callable[..., Tensor]) -> None:
    x = torch.ones(2, 3, device=DEVICE)
    for dim in (2, -3, None, (0,), 1.0):
        with pytest.raises(Exception) as native:  # noqa: PT011
            f(x, dim)
        with tritongrad.use() as session, pytest.raises(type(native.value)) as ours:
            f(x, dim)
        assert str(ours.value).endswith(str(native.value))
        assert not session.ran


# ------------------------------------------------------------------------------------------- zeros

ZEROS = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 1], [0, 1, 1, 1]], dtype=torch.bool)


def orders(f: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Value, and three derivatives along random directions."""
    x = x.detach().requires_grad_()
    found = [f(x)]
    for seed in range(3):
        (direction,) = random_like(found[-1:], seed)
        scalar = (found[-1] * direction).sum()
        found += torch.autograd.grad(scalar, x, create_graph=True)
    return found


@pytest.mark.parametrize(
    "f",
    [torch.prod, lambda x: x.prod(0), lambda x: x.cumprod(0), lambda x: x.view(2, 2).prod(1)],
    ids=["prod", "prod along a dim", "cumprod", "rows"],
)
def test_zeros_anywhere(f: Callable[[Tensor], Tensor]) -> None:
    """Exact at every order, with none, one and several factors that are zero."""
    for zero in ZEROS:
        x = torch.where(zero.to(DEVICE), 0.0, near_one(4) * torch.arange(1, 5, device=DEVICE))
        assert_same(rerouted(lambda x: orders(f, x), x), orders(f, x), str(zero.tolist()))


def cumprod_slopes(x: list[float], t: list[float]) -> tuple[list[float], list[float]]:
    """Of a row: the gradient for ones, and the tangent along ``t``; nothing is divided by."""
    total, following, gradient = 0.0, 0.0, []
    for i, value in reversed(list(enumerate(x))):
        # What follows a zero no longer depends on what is before it.
        total = 1.0 if following == 0 else following * total + 1.0
        gradient.append(total * math.prod(x[:i]))
        following = value
    moved, tangent = 0.0, []
    for i, value in enumerate(x):
        step = t[i] * math.prod(x[:i])
        moved = step if value == 0 or i == 0 else value * moved + step
        tangent.append(moved)
    return gradient[::-1], tangent


WILD = [
    [1.0, INF, 3.0], [-INF, -INF], [1e200, 1.0, 1e200], [INF, 2.0, 0.0, 3.0], [1.0, NAN, 2.0],
    [0.0, INF, 1.0], [1.0, 0.0, INF, 2.0], [1.0, 2.0, 0.0, NAN],
    [INF] + [1.0] * 199, [1.0] * 150 + [INF] + [1.0] * 49, [1.0] * 70 + [0.0, INF] + [1.0] * 128,
    [1.0] * 3 + [INF, 0.0] + [1.0] * 195, [1.0] * 33 + [0.0] + [1.0] * 90 + [NAN] + [1.0] * 75,
]  # fmt: skip


@pytest.mark.parametrize("row", WILD, ids=lambda row: f"{row[:6]}, {len(row)}")
def test_what_is_not_finite_reaches_only_its_own(row: list[float], many_parts: None) -> None:
    """Derivatives of a cumulative product beside infinities and NaN, where torch divides by x."""
    x = torch.tensor(row, dtype=torch.float64, device=DEVICE, requires_grad=True)
    t = torch.ones_like(x)
    gradient, tangent = (x.new_tensor(d) for d in cumprod_slopes(row, t.tolist()))
    out = rerouted(lambda x: x.cumprod(0), x)
    assert_same(torch.autograd.grad(out, x, torch.ones_like(out), create_graph=True)[0], gradient)
    with tritongrad.use(), fwAD.dual_level():
        dual = fwAD.make_dual(x.detach(), t).cumprod(0)
        assert_same(fwAD.unpack_dual(dual).tangent, tangent)


def test_zeros_cost_no_more_memory_than_none() -> None:
    """torch's second derivative of a product with zeros has a matrix for each row."""
    x = near_one(2000)
    x[7] = 0.0
    x.requires_grad_()
    with tritongrad.use():
        (first,) = torch.autograd.grad(x.prod(), x, create_graph=True)
        (second,) = torch.autograd.grad(first[7:9].sum(), x)
    others = x.detach().clone()
    others[7:9] = 1.0
    assert_same(second[8], others.prod() * 1.0)


# ------------------------------------------------------------------------- what only torch can see


def test_rules_on_torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a tracer the rules are torch's operations; they give what the kernels give."""
    a, b = near_one(3, 7), near_one(3, 7)
    for dims, reverse in itertools.product(((), (0,), (1,)), (False, True)):
        params = ScanParams(dims, reverse, torch.float64)
        for function, operands in ((ops._sums, (b,)), (ops._products, (b,)), (ops._solved, (a, b))):
            operands = operands if dims else tuple(t[0, 0] for t in operands)
            expected = function(*operands, params)
            with monkeypatch.context() as patch:
                patch.setattr(ops, "launchable", lambda tensors: False)
                assert_same(function(*operands, params), expected, function.__name__)


def test_a_backward_pass_can_be_traced() -> None:
    x = near_one(5).requires_grad_()
    out = rerouted(lambda x: x.cumprod(0), x)

    def gradient(g: Tensor) -> Tensor:
        return torch.autograd.grad(out, x, g, retain_graph=True)[0]

    (g,) = random_like([x])
    traced = make_fx(gradient)(g)
    assert_same(traced(g), torch.autograd.grad(x.cumprod(0), x, g)[0])


# ------------------------------------------------------------------------------------ what it costs


@pytest.mark.parametrize(
    ("f", "forward", "backward"),
    [(torch.cumsum, 1, 1), (torch.cumprod, 1, 1), (torch.prod, 1, 2)],
    ids=["cumsum", "cumprod", "prod"],
)
def test_launches(f: Callable[..., Tensor], forward: int, backward: int) -> None:
    x = torch.randn(3, 5, device=DEVICE, requires_grad=True)
    out, count = launches(lambda: rerouted(lambda x: f(x, 1), x))
    assert count == forward
    _, count = launches(lambda: torch.autograd.grad(out, x, torch.ones_like(out)))
    assert count == backward
