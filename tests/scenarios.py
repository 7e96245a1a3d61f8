"""Scenarios: what a user does with a function and its inputs, done on an op and on native torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from support import DEVICE, Call, Tolerance, assert_same, calls, floats, random_like
from torch import Tensor

from tritongrad import runtime
from tritongrad.op import OPS

Scenario = Callable[[Callable[..., Any], Sequence[Tensor]], Any]

# A sum of second derivatives of a few hundred elements: their rounding adds up.
SUMMED = Tolerance(1e-10, 1e-10)


def small(
    name: str, dtype: torch.dtype = torch.float64, limit: int = 120, most: int = 6
) -> list[Call]:
    """Samples of the op with something to derive, none of over ``limit`` elements, and of many an
    even selection: the interpreter takes a millisecond for each program."""
    found = [
        call
        for call in calls(OPS[name], dtype)
        if call.inputs and sum(t.numel() for t in call.inputs) <= limit
    ]
    return found[:: -(-len(found) // most)]


def agree(name: str, scenario: Scenario, tolerance: Tolerance | None = None, most: int = 4) -> None:
    """``scenario`` gives on the op what it gives on native torch, for its small samples."""
    for call in small(name, most=most):
        assert_same(
            scenario(call.triton, call.inputs),
            scenario(call.torch, call.inputs),
            str(call),
            tolerance=tolerance,
        )


def linked(value: Any) -> list[Tensor]:
    """The results of a call that are on the graph."""
    return [t for t in floats(value) if t.requires_grad]


def gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], grads: Any = None, **options: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of ``inputs``; random upstream gradients unless ``grads`` are given."""
    grads = random_like(outputs) if grads is None else grads
    if not any_graph(outputs):
        return (None,) * len(inputs)
    return torch.autograd.grad(outputs, inputs, grads, allow_unused=True, **options)


def any_graph(values: Sequence[Tensor | None]) -> bool:
    """Whether there is anything to differentiate."""
    return any(v is not None and v.requires_grad for v in values)


def square_sum(values: Sequence[Tensor | None]) -> Tensor:
    """A scalar with a gradient everywhere; what carries no graph has no part in it."""
    total = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for value in values:
        if value is not None and value.requires_grad:
            total = total + (value * value).sum()
    return total


def launches(run: Callable[[], Any]) -> tuple[Any, int]:
    """What ``run`` returns, and how many kernels it launches."""
    seen: list[Any] = []
    with runtime.observe(lambda kernel, grid, args, meta: seen.append(kernel)):
        result = run()
    return result, len(seen)


def copies(run: Callable[[], Any]) -> int:
    """How often ``run`` copies a tensor."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    # Stubbed: the interpreter copies what a kernel would read.
    # With acc_events it does not warn that it keeps no events of earlier cycles.
    recording = torch.profiler.profile(activities=activities, acc_events=True)
    with runtime.stub(), recording as profile:
        run()
    return sum(e.count for e in profile.key_averages() if e.key in ("aten::copy_", "aten::clone"))
