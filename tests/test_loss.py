"""Losses: one kernel forward and one backward, whatever the reduction and the weights."""

from __future__ import annotations

from functools import partial

import pytest
from scenarios import gradients, launches, linked, small

from tritongrad.op import OPS
from tritongrad.ops import criterion

LOSSES = [name for name, op in OPS.items() if op.forward is criterion.evaluate]


@pytest.mark.parametrize("name", LOSSES)
def test_launches(name: str) -> None:
    alike = [c for c in small(name, most=100) if len({t.shape for t in c.inputs}) == 1]
    seen = set()
    for call in alike:
        if not call.inputs[0].numel():
            continue
        found, forward = launches(partial(call.triton, *call.inputs))
        _, backward = launches(partial(gradients, linked(found), call.inputs))
        assert (forward, backward) == (1, 1), str(call)
        seen.add(call.sample.kwargs.get("reduction", "mean"))
    assert {"none", "mean"} <= seen


def test_weight_of_l1_loss() -> None:
    """torch's l1_loss hands its weight to no mode; it is not left out all the same."""
    weighted = [call for call in small("l1_loss", most=100) if "weight" in call.sample.kwargs]
    assert weighted
    for call in weighted:
        args, kwargs = call.arguments(call.inputs)
        del kwargs["weight"]
        assert not call.triton(*call.inputs).equal(call.func(*args, **kwargs)), str(call)
