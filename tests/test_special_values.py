"""Kinks, ties, NaN, infinities and the ends of the number range (HAZARDS 6 and 14).

Values, gradients, second derivatives and forward-mode derivatives are native torch's there, NaN
where torch has NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, nan

import pytest
import torch
from scenarios import small
from support import DEVICE, DIFFERENTIABLE, Call, Derivatives, assert_same, derivatives
from torch import Tensor

from tritongrad.op import OPS
from tritongrad.sampling import Sample

F = torch.nn.functional

TINY, LEAST, HUGE = 2.2250738585072014e-308, 5e-324, 1.7e308
"""The smallest normal and subnormal numbers, and one near the largest."""

POINTS = (0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 3.0, -2.0, inf, -inf, nan, TINY / 4, -LEAST, HUGE, -HUGE)
"""Where pointwise functions have kinks, poles, overflow and underflow."""

POINTWISE = [n for n in DIFFERENTIABLE if "pointwise_dense" in OPS[n].kernels]


def assert_agrees(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: Sequence[Tensor], what: str
) -> None:
    """Value and derivatives of ``ours`` are those of ``theirs``, special values included."""
    mine, torchs = (present(derivatives(f, inputs, torch.float64), inputs) for f in (ours, theirs))
    for order, actual, expected in zip(Derivatives._fields, mine, torchs, strict=True):
        assert_same(actual, expected, f"{what}, {order}")


def present(found: Derivatives, inputs: Sequence[Tensor]) -> Derivatives:
    """``found`` with zeros where there is no derivative: here a derivative that is zero everywhere
    may be a tensor of zeros where it is None in torch."""
    second = [*found.second, *[None] * (len(inputs) - len(found.second))][: len(inputs)]
    zeros = [torch.zeros_like(x) if d is None else d for x, d in zip(inputs, second, strict=True)]
    return found._replace(second=zeros, attached=[])


def with_inputs(call: Call, values: Sequence[Tensor]) -> Call:
    """``call`` of other inputs."""
    args, kwargs = call.arguments([v.requires_grad_() for v in values])
    return Call(call.op, Sample(args, kwargs, call.sample.note), call.func)


# --------------------------------------------------------------------------------------- pointwise


# Differences from torch that are known, each at an infinity or a pole.
KNOWN = {
    "div": "forward mode at y = 0: torch divides the sum of both parts, we add two quotients",
    "pow": "second derivative at infinite operands: a number where torch has NaN",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.xfail(reason=KNOWN[n], strict=True)) if n in KNOWN else n
        for n in POINTWISE
    ],
)
def test_pointwise(name: str) -> None:
    """Every pair of special points, or every point with the sample's own numbers."""
    for call in small(name, most=100):
        if len({t.shape for t in call.inputs}) > 1 or not call.inputs[0].numel():
            continue
        # At NaN torch's own two directions disagree for these: reverse mode gives the gradient to
        # both operands, forward mode takes the tangent of one. Ours follow its reverse mode.
        special = [p for p in POINTS if name not in ("maximum", "minimum") or p == p]
        points = torch.tensor(special, dtype=torch.float64, device=DEVICE)
        grid = torch.cartesian_prod(*[points] * len(call.inputs))
        columns = grid.reshape(len(grid), -1).unbind(1)
        # A condition keeps its own shape, so the points fill the sample's shape again and again.
        shape = call.inputs[0].shape
        for chunk in zip(*[c.split(shape.numel()) for c in columns], strict=True):
            if chunk[0].numel() == shape.numel():
                changed = with_inputs(call, [c.reshape(shape).clone() for c in chunk])
                assert_agrees(changed.triton, changed.torch, changed.inputs, str(call))
