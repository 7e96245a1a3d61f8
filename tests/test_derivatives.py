"""Every order and direction of every op's derivatives: numerically, and against native torch.

gradcheck compares with finite differences, so it needs no reference; native torch is exact, so it
sees what finite differences cannot. Both are asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import DIFFERENTIABLE, Call, assert_same, calls, floats, random_like
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import hessian as autograd_hessian
from torch.func import hessian, jacfwd, jacrev

from tritongrad.op import OPS

# A numerical Jacobian costs two evaluations an input element, one of torch.func a launch that grows
# with it: what a size adds (blocks, tails) is seen by the suites that compare values.
SMALL = 40


def small(name: str) -> list[Call]:
    """The op's samples that are small and not empty, in float64."""
    found = [c for c in calls(OPS[name]) if 0 < sum(t.numel() for t in c.inputs) <= SMALL]
    assert found, f"op {name!r} has no small sample"
    return found


def apart(found: list[Call]) -> list[Call]:
    """Those whose elements can be moved one by one: not where an input is expanded."""
    return [c for c in found if all(0 not in t.stride() for t in c.inputs)]


def projected(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """The outputs' sum with unequal weights: a scalar whose derivatives mix all of theirs."""

    def weighted(output: Tensor) -> Tensor:
        weights = torch.arange(1.0, output.numel() + 1, dtype=output.dtype, device=output.device)
        return (output * weights.cos().view(output.shape)).sum()

    def scalar(*inputs: Tensor) -> Tensor:
        return torch.stack([weighted(t) for t in floats(function(*inputs))]).sum()

    return scalar


def gradients(scalar: Tensor, inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """Gradients with zeros where there is none, so that orders can be chained."""
    found = torch.autograd.grad(scalar, inputs, allow_unused=True, **options)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name: str) -> None:
    for call in apart(small(name)):
        # Batched gradients by the old vmap see no user Function: DESIGN says so; the new are below.
        assert gradcheck(
            call.triton, call.inputs, check_forward_ad=True, check_batched_grad=False
        ), call


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradgradcheck(name: str) -> None:
    for call in apart(small(name)):
        # fast_mode compares random projections of the Jacobians, all of which have been numerical
        # in test_gradcheck: in full they would be squared.
        assert gradgradcheck(
            call.triton,
            call.inputs,
            check_fwd_over_rev=True,
            check_rev_over_rev=True,
            fast_mode=True,
        ), call


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_third_order(name: str) -> None:
    def orders(function: Callable[..., Any], inputs: list[Tensor]) -> list[list[Tensor]]:
        found = []
        scalar = projected(function)(*inputs)
        for order in range(3):
            if scalar.requires_grad:
                found.append(gradients(scalar, inputs, create_graph=order < 2))
            else:
                found.append([torch.zeros_like(x) for x in inputs])
            directions = random_like(found[-1], order)
            scalar = sum((g * d).sum() for g, d in zip(found[-1], directions, strict=True))
        return found

    for call in small(name):
        assert_same(orders(call.triton, call.inputs), orders(call.torch, call.inputs), repr(call))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize(
    "transform",
    [lambda f, n: jacfwd(jacfwd(f, n), n), lambda f, n: jacfwd(jacrev(f, n), n), hessian],
    ids=["jacfwd(jacfwd)", "jacfwd(jacrev)", "hessian"],
)
def test_second_order_transforms(name: str, transform: Callable[..., Any]) -> None:
    call = max(small(name), key=lambda c: sum(t.numel() for t in c.inputs))
    numbers = tuple(range(len(call.inputs)))
    primals = [t.detach() for t in call.inputs]
    ours = transform(projected(call.triton), numbers)(*primals)
    assert_same(ours, transform(projected(call.torch), numbers)(*primals), repr(call))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_expanded_gradient(name: str) -> None:
    """HAZARDS 1: `.sum()` hands back one number seen as a whole tensor (stride 0)."""

    def scenario(function: Callable[..., Any], call: Call) -> list[Tensor | None]:
        inputs = [t.detach().requires_grad_() for t in call.inputs]
        for output in floats(function(*inputs)):
            output.sum().backward()
        return [t.grad for t in inputs]

    for call in calls(OPS[name]):
        assert_same(scenario(call.triton, call), scenario(call.torch, call), repr(call))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradient_penalty(name: str) -> None:
    """HAZARDS 2: the penalty has a gradient of its own, and the first gradient stays attached."""

    def scenario(function: Callable[..., Any], call: Call) -> tuple[list[bool], list[Any]]:
        inputs = [t.detach().requires_grad_() for t in call.inputs]
        loss = projected(function)(*inputs)
        found = torch.autograd.grad(loss, inputs, create_graph=True)
        penalty = sum(g.square().sum() for g in found)
        (loss + penalty).backward()
        return [g.requires_grad for g in found], [penalty, *[t.grad for t in inputs]]

    for call in small(name):
        attached, ours = scenario(call.triton, call)
        expected, theirs = scenario(call.torch, call)
        assert_same(ours, theirs, repr(call))
        # One way only: where a derivative is piecewise constant, ours says so with zeros.
        assert all(a or not e for a, e in zip(attached, expected, strict=True)), call


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_functional_hessian(name: str) -> None:
    """HAZARDS 2: in other libraries these are zeros, and no error."""
    call = small(name)[0]
    inputs = tuple(t.detach() for t in call.inputs)
    ours = autograd_hessian(projected(call.triton), inputs)
    assert_same(ours, autograd_hessian(projected(call.torch), inputs), repr(call))
