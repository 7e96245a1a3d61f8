"""Fused linear layers: launches, what is kept for backward, each gradient alone, machine code."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from scenarios import launches
from support import DEVICE, assert_as_accurate, assert_same, random_like
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import tritongrad
from tritongrad import runtime
from tritongrad.compare import disassembly
from tritongrad.compare.specialisations import describe, make_job
from tritongrad.extension import EXTENSIONS
from tritongrad.launchers import matmul
from tritongrad.ops.linear_fused import ACTIVATIONS
from tritongrad.sampling import Random

G = tritongrad.nn.functional
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def operands(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    make = Random(dtype, DEVICE)
    return [make(18, 5), make(3, 5), make(3)]


@each_activation
def test_one_kernel_and_what_is_kept(activation: str) -> None:
    """The argument of gelu and silu is a second result only where a gradient will be taken, also of
    a call that was seen without one before; relu and tanh keep their result."""
    inputs = operands()
    run = partial(G.linear_act, *inputs, activation=activation)
    kept: list[Tensor] = []
    arguments: list[Any] = []
    with (
        saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        runtime.observe(lambda kernel, grid, args, meta: arguments.append(args[-1])),
    ):
        with torch.no_grad():
            run()
        G.linear_act(*[t.detach() for t in inputs], activation=activation)
        out = run()
    by_result = ACTIVATIONS[activation].by_result
    assert [z is not None for z in arguments] == [False, False, not by_result]
    assert sum(t.shape == out.shape for t in kept) == 1
    # dz, its products with weight and input, its sum.
    _, count = launches(partial(torch.autograd.grad, out, inputs, random_like([out])))
    assert count == 4


@each_activation
@pytest.mark.parametrize("which", range(3), ids=["input", "weight", "bias"])
def test_each_gradient_alone(activation: str, which: int) -> None:
    inputs = [t.detach().requires_grad_(i == which) for i, t in enumerate(operands())]
    found, expected = (
        torch.autograd.grad(
            (out := function(*inputs, activation=activation)), inputs[which], random_like([out])
        )
        for function in (G.linear_act, EXTENSIONS["linear_act"])
    )
    assert_same(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """No further from float64 than torch's, which rounds the product first."""
    inputs = operands(dtype)
    wide = [t.detach().double() for t in inputs]
    residual = random_like([inputs[0][:, :3]], dtype=dtype)[0]
    calls = [(G.linear_act, EXTENSIONS["linear_act"], (name,)) for name in ACTIVATIONS]
    calls += [(G.linear_add, EXTENSIONS["linear_add"], (residual,))]  # type: ignore[list-item]
    for ours, theirs, more in calls:
        exact = theirs(*wide, *[t.double() if isinstance(t, Tensor) else t for t in more])
        assert_as_accurate(ours(*inputs, *more), theirs(*inputs, *more), exact, str(more))


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="one of gelu"):
        G.linear_act(*operands(), activation="swish")


def test_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 layers, z kept or a residual added: tensor cores of sm_90, and no spill."""
    monkeypatch.setattr(matmul, "has_wgmma", lambda: True)
    matmul.plan.cache_clear()
    seen: list[Any] = []
    x, weight = (
        torch.zeros(2048, 2048, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
        for _ in range(2)
    )
    bias = torch.zeros(2048, dtype=torch.bfloat16, device=DEVICE)
    with runtime.stub(), runtime.observe(lambda *launch: seen.append(launch)):
        G.linear_act(x, weight, bias, activation="gelu_tanh")
        G.linear_add(x, weight, bias, x)
    matmul.plan.cache_clear()
    jobs = [make_job(describe(kernel, args, meta), "sm_90") for kernel, _, args, meta in seen]
    for index, answer in disassembly.compile_all(jobs, workers=1):
        meta = seen[index][3]
        where = f"{meta['BLOCK_M']} x {meta['BLOCK_N']}"
        assert where == "128 x 256"  # as of the layer alone
        assert answer.get("spill_bytes") == 0, f"{where}: {answer}"
        assert "HGMMA" in answer["tensor_core"], where
