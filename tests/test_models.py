"""``compare models``: whole training loops, and that the comparison can fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tritongrad.compare import models
from tritongrad.compare.measure import DEVICE
from tritongrad.compare.networks import Loss, Model
from tritongrad.compare.plant import plant


@pytest.mark.parametrize("name", models.MODELS)
def test_trains_as_on_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name != "poisson":  # of which the full course is promised
        monkeypatch.setattr(models, "STEPS", 8)  # enough to go down; the command takes more
    row = models.check(name)
    assert not row.problem
    assert row.fell_back == {}
    assert row.launches > 0
    assert row.difference <= row.tolerance
    assert row.losses[-1] < row.losses[0]


def test_differences_and_falls_fail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def falls() -> tuple[list[torch.Tensor], Loss]:
        x = torch.rand(3, dtype=torch.float64, device=DEVICE, requires_grad=True)
        return [x], lambda: torch.relu(x).sum() + torch.linalg.inv(torch.diag(x)).sum()

    def raises() -> tuple[list[torch.Tensor], Loss]:
        raise ValueError("no such thing")

    found = {"falls": Model("", falls), "raises": Model("", raises)}
    monkeypatch.setattr(models, "STEPS", 2)
    monkeypatch.setattr(models, "MODELS", models.MODELS | found)
    row = models.check("falls")
    assert any("inv" in what for what in row.fell_back)
    assert not row.passed
    assert models.check("raises").problem == "ValueError: no such thing"
    with plant():
        assert not models.check("poisson").passed

    file = tmp_path / "models.json"
    assert models.main(["--only", "poisson", "--only", "raises", "--json", str(file)]) == 1
    assert [row["passed"] for row in json.loads(file.read_text())] == [True, False]
    assert "2 models, 1 failed" in capsys.readouterr().out
