"""Every order and direction of every op's derivatives: numerically, and against native torch.

gradcheck compares with finite differences, so it needs no reference; native torch is exact, so it
sees what finite differences cannot. Both are asked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support import DEVICE, DIFFERENTIABLE, Call, assert_same, calls, floats, random_like
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import hessian as autograd_hessian
from torch.func import jacfwd, jacrev

from tritongrad.op import OPS

# What a size adds (blocks, tails) is seen by the suites that compare values; here, each order
# multiplies the work.
SMALL = 80


# Of many samples an even selection: test_opinfo.py compares all that torch has, to second order.
MOST = 4
FEW = 2  # where each takes a second


def small(name: str) -> list[Call]:
    """The op's samples that are small and not empty, in float64."""
    found = [c for c in calls(OPS[name]) if 0 < sum(t.numel() for t in c.inputs) <= SMALL]
    assert found, f"op {name!r} has no small sample"
    return found


def some(found: list[Call], most: int = MOST) -> list[Call]:
    """At most ``most`` of them, and always the first."""
    return found[:: -(-len(found) // most)]


def separable(name: str) -> list[Call]:
    """Those whose elements gradcheck can move one by one: no input is expanded."""
    return [c for c in small(name) if all(0 not in t.stride() for t in c.inputs)]


def projected(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """The outputs' sum with unequal weights: a scalar whose derivatives mix all of theirs."""

    def weighted(output: Tensor) -> Tensor:
        weights = torch.arange(1.0, output.numel() + 1, dtype=output.dtype, device=output.device)
        return (output * weights.cos().view(output.shape)).sum()

    def scalar(*inputs: Tensor) -> Tensor:
        return torch.stack([weighted(t) for t in floats(function(*inputs))]).sum()

    return scalar


def along(function: Callable[..., Any], call: Call) -> Callable[[Tensor], Tensor]:
    """A scalar function of two numbers: how far to move all inputs in two random directions.

    Its Hessian needs every derivative of the call, at the price of a batch of two, not one as large
    as the inputs.
    """
    scalar = projected(function)
    bases = [t.detach() for t in call.inputs]
    first, second = random_like(bases, 1), random_like(bases, 2)

    def moved(steps: Tensor) -> Tensor:
        a, b = steps.unbind()
        moves = zip(bases, first, second, strict=True)
        return scalar(*[x + a * d + b * e for x, d, e in moves])

    return moved


def gradients(scalar: Tensor, inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """Gradients with zeros where there is none, so that orders can be chained."""
    found = torch.autograd.grad(scalar, inputs, allow_unused=True, **options)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name: str, pytestconfig: pytest.Config) -> None:
    every_element = pytestconfig.getoption("every_op")
    for i, call in enumerate(some(separable(name), MOST if every_element else FEW)):
        assert gradcheck(
            call.triton,
            call.inputs,
            check_forward_ad=True,
            # Batched gradients by the old vmap see no user Function; those of torch.func do.
            check_batched_grad=False,
            # Random projections of the Jacobian; every element of it once, with --every-op.
            fast_mode=i > 0 or not every_element,
        ), call


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.mechanism
def test_gradgradcheck(name: str, pytestconfig: pytest.Config) -> None:
    # One sample: all of OpInfo's are compared with torch to this order.
    call = max(separable(name), key=lambda c: (len(c.inputs), -sum(t.numel() for t in c.inputs)))
    assert gradgradcheck(
        call.triton,
        call.inputs,
        # By test_second_order_transforms, too.
        check_fwd_over_rev=pytestconfig.getoption("every_op"),
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

    for call in some(small(name), FEW):
        assert_same(orders(call.triton, call.inputs), orders(call.torch, call.inputs), repr(call))


# Of a random op all directions see the same numbers, as they are those of one call.
forward = partial(jacfwd, randomness="same")

TRANSFORMS: dict[str, Callable[..., Any]] = {
    "jacfwd(jacfwd)": lambda f: forward(forward(f)),
    "jacfwd(jacrev)": lambda f: forward(jacrev(f)),
    "jacrev(jacfwd)": lambda f: jacrev(forward(f)),
    "jacrev(jacrev)": lambda f: jacrev(jacrev(f)),
}

TORCH_LACKS = {
    ("jacfwd(jacfwd)", "binary_cross_entropy_with_logits"): "writes into a zero tensor",
    ("jacrev(jacfwd)", "binary_cross_entropy"): "writes into a zero tensor",
    ("jacfwd(jacfwd)", "glu"): "no forward mode of its tangent",
    ("jacrev(jacfwd)", "glu"): "no derivative of its tangent",
    ("jacfwd(jacfwd)", "soft_margin_loss"): "no forward mode of its backward",
    ("jacfwd(jacrev)", "soft_margin_loss"): "no forward mode of its backward",
}
"""(transform, op) -> why torch raises there; its jacrev(jacrev) is the same derivative."""


# torch's own cumprod has operations that its vmap does one by one.
@pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")
@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("transform", [t for t in TRANSFORMS if t != "jacrev(jacrev)"])
def test_second_order_transforms(name: str, transform: str) -> None:
    ours = TRANSFORMS[transform]
    theirs = TRANSFORMS["jacrev(jacrev)"] if (transform, name) in TORCH_LACKS else ours
    # By forward over reverse mode more than by those that users seldom take.
    for call in some(small(name), FEW if transform == "jacfwd(jacrev)" else 1):
        origin = torch.zeros(2, dtype=torch.float64, device=DEVICE)
        found = ours(along(call.triton, call))(origin)
        assert_same(found, theirs(along(call.torch, call))(origin), repr(call))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_expanded_gradient(name: str) -> None:
    """HAZARDS 1: `.sum()` hands back one number seen as a whole tensor (stride 0)."""

    def scenario(function: Callable[..., Any], call: Call) -> list[Tensor | None]:
        inputs = [t.detach().requires_grad_() for t in call.inputs]
        outputs = [t for t in floats(function(*inputs)) if t.requires_grad]
        torch.autograd.backward([t.sum() for t in outputs])
        return [t.grad for t in inputs]

    for call in calls(OPS[name]):
        assert_same(scenario(call.triton, call), scenario(call.torch, call), repr(call))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.mechanism
def test_functional_hessian(name: str) -> None:
    """HAZARDS 2: in other libraries these are zeros, and no error."""
    for call in some(small(name)):
        origin = torch.zeros(2, dtype=torch.float64, device=DEVICE)
        ours = autograd_hessian(along(call.triton, call), origin)
        assert_same(ours, autograd_hessian(along(call.torch, call), origin), repr(call))
