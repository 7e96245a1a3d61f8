"""``use(policy="fastest")``, with tables that were measured nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEVICE

import tritongrad
from tritongrad import policy
from tritongrad.op import OPS

TABLE: dict[str, Any] = {
    "gpu": "Stub 9000",
    "ops": {
        "exp": {"float32": [[10, 0.5], [100, 1.0], [1000, 2.0]], "float64": [[100, 0.9]]},
        "max_dim": {"float32": [[1, 2.0]]},
    },
}


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, and a table for it."""
    monkeypatch.setattr(policy, "DIRECTORY", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Stub 9000")
    (tmp_path / "stub-9000.json").write_text(json.dumps(TABLE))


@pytest.mark.parametrize(
    ("elements", "dtype", "allowed"),
    [
        (5, torch.float32, False),  # smaller than any: as the smallest
        (10, torch.float32, False),
        (50, torch.float32, False),  # between one that loses and one that does not
        (100, torch.float32, True),
        (500, torch.float32, True),
        (5000, torch.float32, True),
        (100, torch.float64, False),
        (100, torch.bfloat16, False),  # never measured
    ],
)
def test_only_what_was_measured_to_be_as_fast(
    gpu: None, elements: int, dtype: torch.dtype, allowed: bool
) -> None:
    x = torch.zeros(elements, dtype=dtype, device=DEVICE)
    with tritongrad.use(policy="fastest") as session:
        torch.exp(x)
    assert session.ran["exp"] == int(allowed)
    assert session.fell_back["torch.exp", policy.SLOWER] == int(not allowed)
    assert 'policy "fastest": by what was measured on Stub 9000' in str(session)


def test_an_op_that_was_not_measured_is_left_to_torch(gpu: None) -> None:
    with tritongrad.use(policy="fastest") as session:
        torch.tanh(torch.zeros(3, device=DEVICE))
    assert not session.ran


def test_overloads_have_policies_of_their_own(gpu: None) -> None:
    x = torch.zeros(3, 4, device=DEVICE)
    with tritongrad.use(policy="fastest") as session:
        torch.max(x, 1)
        torch.max(x)
    assert session.ran == {"max_dim": 1}


def test_derivatives_follow_the_call_and_direct_calls_are_ours(gpu: None) -> None:
    x = torch.zeros(100, device=DEVICE, requires_grad=True)
    with tritongrad.use(policy="fastest") as session:
        y = torch.exp(x)
        y.sum().backward()
        tritongrad.tanh(x)
    assert session.ran == {"exp": 1, "tanh": 1}
    assert session.launches == 3


def test_policy_ends_with_its_session(gpu: None) -> None:
    x = torch.zeros(3, device=DEVICE)
    with tritongrad.use() as outer:
        with tritongrad.use(policy="fastest"):
            torch.exp(x)
        torch.exp(x)
    assert outer.ran == {"exp": 1}
    session = tritongrad.enable(policy="fastest")
    torch.exp(x)
    tritongrad.disable()
    assert not session.ran


@pytest.mark.parametrize("available", [False, True])
def test_without_a_table_every_op_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, available: bool
) -> None:
    monkeypatch.setattr(policy, "DIRECTORY", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Unheard of")
    with tritongrad.use(policy="fastest") as session:
        torch.exp(torch.zeros(3, device=DEVICE))
    assert session.ran["exp"] == 1
    assert "so every op is used" in str(session)
    assert ("Unheard of" if available else "no GPU") in str(session)


def test_wrong_names_and_wrong_tables(gpu: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one of 'all', 'fastest', got 'fast'"):
        tritongrad.use(policy="fast")
    (tmp_path / "stub-9000.json").write_text('{"gpu": "Stub 9000"}')
    with pytest.raises(ValueError, match="no table of measurements"):
        tritongrad.use(policy="fastest")


def test_tables_that_are_shipped_are_of_ops_that_there_are() -> None:
    for path in policy.DIRECTORY.glob("*.json"):
        found = policy.load(json.loads(path.read_text())["gpu"])
        assert found is not None
        assert set(found.ratios) <= set(OPS)
