"""``compare sanitize`` and ``compare gpu``: what they would run on a GPU, without one."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tritongrad.compare import bench, gpu, sanitize
from tritongrad.compare.__main__ import main

FAKE = """\
#!{python}
import json, os, sys
tool = sys.argv[sys.argv.index("--tool") + 1]
told = [*sys.argv[1:], os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"]]
open(os.path.join({folder!r}, tool), "w").write(json.dumps(told))
sys.exit({statuses!r}[tool])
"""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a GPU, and no CUDA toolkit but what is put in this folder."""
    monkeypatch.setattr(sanitize, "why_no_gpu", lambda: None)
    monkeypatch.setattr(gpu, "why_no_gpu", lambda: None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    monkeypatch.setattr(sanitize, "USUAL", str(tmp_path / "none"))
    return tmp_path


@pytest.mark.parametrize(
    ("found", "status"),
    [({"memcheck": 0, "racecheck": 0}, 0), ({"memcheck": 0, "racecheck": 9}, 1)],
)
def test_hazards_are_tested_under_each_tool(
    elsewhere: Path, capsys: pytest.CaptureFixture[str], found: dict[str, int], status: int
) -> None:
    program = elsewhere / "compute-sanitizer"
    fake = FAKE.format(python=sys.executable, folder=str(elsewhere), statuses=found)
    program.write_text(fake)
    program.chmod(0o755)
    file = elsewhere / "told.json"
    assert main(["sanitize", "--json", str(file), "-k", "exp"]) == status
    for tool in ("memcheck", "racecheck"):
        *arguments, caching = json.loads((elsewhere / tool).read_text())
        assert caching == "1"
        assert arguments[-2:] == ["-k", "exp"]
        assert arguments[arguments.index("--error-exitcode") + 1] == str(sanitize.FOUND)
        assert str(sanitize.TESTS / "test_hazards.py") in arguments
    told = json.loads(file.read_text())
    assert told["racecheck"] == ("found something" if status else "nothing found")
    assert "memcheck: nothing found" in capsys.readouterr().out


def test_what_lacks_is_told(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sanitize"]) == 2
    assert "needs compute-sanitizer, which is not installed" in capsys.readouterr().err
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert main(["sanitize"]) == 2
    assert "needs a GPU of NVIDIA" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU does")
@pytest.mark.parametrize("command", ["bench", "sanitize", "gpu"])
def test_without_a_gpu(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command]) == 2
    said = capsys.readouterr().err
    assert f"compare {command} needs a GPU, and torch sees none here" in said
    assert "python -m compare static" in said


def test_tests_come_first_and_what_fails_does_not_stop_the_rest() -> None:
    planned = list(gpu.steps(workers=3))
    names = [step.name for step in planned]
    assert names[:3] == ["tests", "sanitize", "bench quick"]
    assert names[-3:] == ["report", "README's section", "policy's table"]
    suites = {step.command[step.command.index("--suite") + 1] for step in planned[2:-3]}
    assert suites == set(bench.SUITES)
    called: list[Sequence[str]] = []
    now = 0.0

    def call(command: Sequence[str]) -> int:
        nonlocal now
        called.append(command)
        now += 600.0
        return int("sanitize" in command)

    told = gpu.run(planned, 60.0, call, clock=lambda: now)
    assert told["tests"] == "done"
    assert told["sanitize"] == "ended with status 1"
    assert told["bench peers 1/8"] == "done"
    assert told["bench peers 3/8"] == told["bench full 40/40"] == "not begun when the time was up"
    assert told["policy's table"] == "done"
    assert len(called) == sum(what != told["bench peers 3/8"] for what in told.values())


def test_the_command_tells_of_each_step(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        gpu, "steps",
        lambda workers: [gpu.Step(str(n), (sys.executable, "-c", f"exit({n})")) for n in (0, 3)],
    )  # fmt: skip
    assert main(["gpu"]) == 1
    assert capsys.readouterr().out.endswith("0: done\n3: ended with status 3\n")
