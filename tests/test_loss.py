"""Losses: one kernel forward and one backward, whatever the reduction and the weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scenarios import gradients, launches, linked, small
from support import DEVICE, Call, assert_same, derivatives
from torch import Tensor

import tritongrad
from tritongrad.op import OPS
from tritongrad.ops import criterion
from tritongrad.sampling import Random, Sample

LOSSES = [
    name
    for name, op in OPS.items()
    if op.forward is criterion.evaluate or op.kernels[:1] == ("row_loss",)
]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_launches(name: str, reduction: str) -> None:
    """Whatever the options, one each; what is broadcast is summed besides."""
    alike = [c for c in small(name, most=100) if len({t.shape for t in c.inputs}) == 1]
    for call in [c for c in alike if c.inputs[0].numel()]:
        args, kwargs, note = call.sample
        reduced = Call(call.op, Sample(args, kwargs | {"reduction": reduction}, note), call.func)
        found, forward = launches(partial(reduced.triton, *reduced.inputs))
        _, backward = launches(partial(gradients, linked(found), reduced.inputs))
        assert (forward, backward) == (1, 1), str(reduced)
    assert alike


def test_every_loss_is_there() -> None:
    assert {
        "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy",
        "binary_cross_entropy_with_logits", "kl_div", "poisson_nll_loss", "gaussian_nll_loss",
        "soft_margin_loss", "hinge_embedding_loss", "margin_ranking_loss", "cosine_embedding_loss",
        "triplet_margin_loss",
    } <= set(LOSSES)  # fmt: skip


def test_weight_of_l1_loss() -> None:
    """torch's l1_loss hands its weight to no mode; it is not left out all the same."""
    weighted = [call for call in small("l1_loss", most=100) if "weight" in call.sample.kwargs]
    assert weighted
    for call in weighted:
        args, kwargs = call.arguments(call.inputs)
        del kwargs["weight"]
        assert not call.triton(*call.inputs).equal(call.func(*args, **kwargs)), str(call)


def test_variance_below_eps() -> None:
    """gaussian_nll_loss raises it to eps, where its slope stays; in forward mode it has none."""
    inputs = [x.requires_grad_() for x in Random(torch.float64, DEVICE)(3, 4, requires_grad=False)]
    inputs[2].data.copy_(torch.tensor([0.0, 0.3, 0.5, 0.7]))
    call = Call(OPS["gaussian_nll_loss"], Sample(tuple(inputs), {"eps": 0.5}))
    mine, torchs = (derivatives(f, call.inputs, torch.float64) for f in (call.triton, call.torch))
    assert mine.gradient[2] is not None
    assert mine.gradient[2].all()
    assert_same(mine, torchs, str(call))

    def mixed(f: Callable[..., Tensor]) -> Tensor:
        by_variance = torch.func.grad(lambda v: f(*inputs[:2], v))
        return torch.func.jacfwd(by_variance)(inputs[2])

    assert_same(mixed(call.triton), mixed(call.torch), str(call))


@pytest.mark.parametrize("var", [-1.0, [0.5, -1e-9]])
def test_negative_variance(var: Any) -> None:
    x = torch.zeros(2, device=DEVICE)
    var = torch.tensor(var, device=DEVICE) if isinstance(var, list) else var
    with tritongrad.use(), pytest.raises(ValueError, match=r"var has negative entry/entries"):
        F.gaussian_nll_loss(x, x, var)
