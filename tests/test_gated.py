"""Gated units and second-order kernels: launches, memory, special values, machine code."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from scenarios import gradients, launches
from support import DEVICE, assert_same, derivatives, random_like
from test_special_values import POINTS
from torch import Tensor

import tritongrad
from tritongrad import runtime
from tritongrad.compare import disassembly
from tritongrad.compare.specialisations import describe, make_job
from tritongrad.sampling import Random

F = torch.nn.functional
G = tritongrad.nn.functional

geglu_tanh = partial(G.geglu, approximate="tanh")
UNITS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "swiglu": (G.swiglu, lambda a, b: F.silu(a) * b),
    "geglu": (G.geglu, lambda a, b: F.gelu(a) * b),
    "geglu tanh": (geglu_tanh, lambda a, b: F.gelu(a, approximate="tanh") * b),
    "reglu": (G.reglu, lambda a, b: F.relu(a) * b),
}
"""Each with its definition in torch mathematics."""

each_unit = pytest.mark.parametrize("name", UNITS)


def make(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return Random(dtype, DEVICE)(*shape)


PASSES = {
    **{f"{name}, two tensors": (unit, [(3, 5), (3, 5)], 1) for name, (unit, _) in UNITS.items()},
    **{f"{name}, packed": (unit, [(3, 6)], 1) for name, (unit, _) in UNITS.items()},
    "glu": (G.glu, [(3, 6)], 1),
    "silu": (G.silu, [(3, 5)], 1),
    "gelu": (G.gelu, [(3, 5)], 1),
    "gelu tanh": (partial(G.gelu, approximate="tanh"), [(3, 5)], 1),
    # Their slopes are functions of the result, whose own gradient follows.
    "sigmoid": (tritongrad.sigmoid, [(3, 5)], 2),
    "tanh": (tritongrad.tanh, [(3, 5)], 2),
}


@pytest.mark.parametrize("case", PASSES)
def test_each_order_is_one_kernel(case: str) -> None:
    """Value, all gradients, and the gradients of those by everything they depend on."""
    function, shapes, expected = PASSES[case]
    inputs = [make(*shape) for shape in shapes]
    out, forward = launches(partial(function, *inputs))
    (g,) = (t.requires_grad_() for t in random_like([out]))
    first, backward = launches(partial(torch.autograd.grad, out, inputs, g, create_graph=True))
    cotangents = random_like(first, 1)
    _, second = launches(partial(torch.autograd.grad, first, [g, *inputs], cotangents))
    assert (forward, backward, second) == (1, 1, expected)


@each_unit
def test_packed_is_the_halves(name: str) -> None:
    """Gate first; strided both ways; tail rows; every order."""
    unit, formula = UNITS[name]
    projection = make(3001, 8)

    def packed(x: Tensor) -> Tensor:
        return unit(x[:, 1:7])

    def apart(x: Tensor) -> Tensor:
        return formula(x[:, 1:4], x[:, 4:7])

    ours, theirs = (derivatives(f, [projection], torch.float64) for f in (packed, apart))
    assert_same(ours, theirs, name)


@each_unit
def test_special_values(name: str) -> None:
    """Every pair of special points; gradients where the products that torch forms are not of three
    factors of which two overflow."""
    unit, formula = UNITS[name]
    pairs = torch.tensor(list(itertools.product(POINTS, repeat=2)), dtype=torch.float64)
    gate, up = (column.contiguous().to(DEVICE).requires_grad_() for column in pairs.unbind(1))
    packed = pairs.t().reshape(1, -1).to(DEVICE)
    assert_same(unit(gate, up), formula(gate, up), name)
    assert_same(unit(packed)[0], formula(gate, up), f"{name}, packed")
    modest = [i for i, pair in enumerate(pairs.tolist()) if 1e300 not in map(_size, pair)]
    inputs = [t.detach()[modest].requires_grad_() for t in (gate, up)]
    found, expected = (gradients([f(*inputs)], inputs) for f in (unit, formula))
    assert_same(found, expected, f"{name}, gradients")


def _size(value: float) -> float:
    return 1e300 if 1e300 < abs(value) < float("inf") else value


@pytest.mark.parametrize("shapes", [[(4, 1), (1, 16)], [(16,), (3, 4, 16)], [(), (2, 3)]], ids=str)
def test_operands_broadcast(shapes: Sequence[tuple[int, ...]]) -> None:
    """Kernels elsewhere read (4, 1) beside (1, 16) out of bounds."""
    inputs = [make(*shape) for shape in shapes]
    unit, formula = UNITS["swiglu"]
    ours, theirs = (derivatives(f, inputs, torch.float64) for f in (unit, formula))
    assert_same(ours, theirs, str(shapes))


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_operand(which: int) -> None:
    """An infinity in the other is no NaN of the second derivative."""
    fixed = make(3, 5).detach()
    fixed[0, 0] = float("inf")

    def along(function: Callable[..., Tensor], x: Tensor) -> Tensor:
        return function(*((x, fixed) if which == 0 else (fixed, x)))

    x = make(3, 5)
    found, expected = (
        derivatives(partial(along, f), [x], torch.float64, forward=False) for f in UNITS["reglu"]
    )
    assert_same(found, expected)


@pytest.mark.parametrize("shape", [(3, 5), (0, 7), ()], ids=str)
def test_what_cannot_be_halved(shape: tuple[int, ...]) -> None:
    for unit in (G.swiglu, G.geglu, G.reglu, G.glu):
        with pytest.raises(RuntimeError, match=r"even|scalars"):
            unit(make(*shape))


def test_machine_code() -> None:
    """A packed bfloat16 projection: 16 bytes at a time, at each order, without spills."""
    seen: list[Any] = []
    with runtime.stub(), runtime.observe(lambda *launch: seen.append(launch)):
        for unit in (G.swiglu, G.geglu):
            x = make(128, 2048, dtype=torch.bfloat16)
            out = unit(x)
            g = torch.zeros_like(out).requires_grad_()
            (dx,) = torch.autograd.grad(out, x, g, create_graph=True)
            torch.autograd.grad(dx, [g, x], torch.zeros_like(dx))
    assert len(seen) == 6
    jobs = [make_job(describe(kernel, args, meta), "sm_90") for kernel, _, args, meta in seen]
    for _, answer in disassembly.compile_all(jobs, workers=1):
        assert answer["spill_bytes"] == 0
        assert answer["wide_loads"] > 0
        assert answer["wide_stores"] > 0
