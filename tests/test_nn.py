"""``tritongrad.nn``: torch's modules on our ops."""

from __future__ import annotations

import copy
import pickle

import torch
from support import DEVICE, assert_same
from torch import nn

import tritongrad


def test_they_are_torchs_modules() -> None:
    linear = tritongrad.nn.Linear(3, 4)
    assert isinstance(linear, nn.Linear)
    assert tritongrad.nn.Linear is tritongrad.nn.Linear
    assert repr(linear) == repr(nn.Linear(3, 4))
    for copied in (pickle.loads(pickle.dumps(linear)), copy.deepcopy(linear)):
        assert type(copied) is tritongrad.nn.Linear
        assert_same(list(copied.parameters()), list(linear.parameters()))
    assert tritongrad.nn.Module is nn.Module
    assert tritongrad.nn.ModuleList is nn.ModuleList


def test_what_they_contain_runs_on_our_ops() -> None:
    """Modules that torch, or the user, has made."""
    model = tritongrad.nn.Sequential(nn.Linear(3, 4), nn.Tanh()).to(DEVICE)
    x = torch.randn(2, 3, device=DEVICE)
    with tritongrad.use() as session:
        model(x)
    assert session.ran == {"linear": 1, "tanh": 1}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), model(x))
