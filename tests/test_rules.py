"""Derivative rules run on our ops alone, at every order, whatever mode is open."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scenarios import gradients, linked, small, square_sum

from tritongrad.dispatch import rules
from tritongrad.op import OPS, TARGETS
from tritongrad.reroute import HARMLESS, why_not


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.differentiable])
def test_rules_do_no_arithmetic_on_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that used an operation without an op would run on torch, and nobody would know."""
    on_torch: set[tuple[str, str]] = set()
    original = rules.__torch_function__

    def watch(self: rules, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = original(self, func, types, args, kwargs)
        if func not in TARGETS:
            reason = why_not(func, args, kwargs or {}, result)
            if reason not in HARMLESS:
                on_torch.add((func.__name__, reason))
        return result

    monkeypatch.setattr(rules, "__torch_function__", watch)
    for call in small(name, most=2):
        results = linked(call.triton(*call.inputs))
        first = gradients(results, call.inputs, create_graph=True)
        total = square_sum(first)
        if total.requires_grad:
            second = torch.autograd.grad(total, call.inputs, create_graph=True, allow_unused=True)
            total = square_sum(second)
        if total.requires_grad:
            torch.autograd.grad(total, call.inputs, allow_unused=True)
    # torch's own engine starts inside a rule's derivative; that is not arithmetic.
    assert not on_torch - {("grad", "no kernel"), ("vjp", "no kernel")}


def test_a_rule_that_leaves_our_ops_would_be_seen() -> None:
    """The check above can fail: erfinv is no op."""
    x = torch.ones(2)
    assert torch.erfinv not in TARGETS
    assert why_not(torch.erfinv, (x,), {}, torch.erfinv(x)) not in HARMLESS
