"""``compare host``: who is timed against what. No test asserts a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tritongrad import runtime
from tritongrad.compare import host, launching
from tritongrad.compare.__main__ import main
from tritongrad.op import OPS, Op


def ticking(*seconds: float) -> Callable[[], float]:
    """A clock whose successive intervals between two readings are ``seconds``, again and again."""
    now, turn, started = 0.0, 0, False

    def clock() -> float:
        nonlocal now, turn, started
        if started:
            now += seconds[turn % len(seconds)]
            turn += 1
        started = not started
        return now

    return clock


@pytest.mark.parametrize("path", host.PATHS)
def test_host_timing(path: str) -> None:
    calls = host.PATHS[path].calls
    clock = ticking(3e-6 * calls, 2e-6 * calls)
    found = host.measure(OPS["where"], path, repeats=3, clock=clock)
    assert found is not None
    assert found.microseconds == pytest.approx(3)
    assert found.bare_microseconds == pytest.approx(2)
    assert found.ratio == pytest.approx(1.5)
    assert found.exceeds == (path == "direct")


def test_host_time_runs_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritongrad.runtime._run", lambda *_: pytest.fail("a kernel ran"))
    for path in host.PATHS:
        assert host.measure(OPS["sum"], path, repeats=1) is not None


@pytest.mark.parametrize("path", host.PATHS)
def test_every_op_can_be_timed(path: str) -> None:
    timed = set()
    with runtime.stub():
        for name, op in OPS.items():
            for batch in host.prepare(op, path) or ():
                batch(1)
                timed.add(name)
    assert timed >= {name for name, op in OPS.items() if op.differentiable and op.samples}


def test_host_time_of_a_comparison_has_no_gradient() -> None:
    timed = {path for path in host.PATHS if host.prepare(OPS["eq"], path)}
    assert timed == {"direct", "vmap"}


def test_host_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def timed(op: Op, path: str, repeats: int) -> host.Timing | None:
        return host.Timing(op.name, path, 12.0, 4.0, 3.0) if path == "gradient" else None

    monkeypatch.setattr(host, "measure", timed)
    file = tmp_path / "host.json"
    launch = host.Launch("pointwise_dense", 30.0, 6.0)
    monkeypatch.setattr(host, "measure_launches", lambda ops: [launch] if ops == ["mul"] else [])
    assert main(["host", "--only", "mul", "--launch", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "over 2× with gradient: mul 3.00×" in out
    assert "1 timing, 1 over the limit" in out
    assert "pointwise_dense │   30.0 │        6.0 │  0.20" in out
    row, last = json.loads(file.read_text())
    assert (row["op"], row["path"], row["exceeds"]) == ("mul", "gradient", True)
    assert last == {"kernel": "pointwise_dense", "triton": 30.0, "ours": 6.0}


def test_launches_are_timed_where_there_is_no_gpu() -> None:
    (found,) = launching.measure(["mul"])
    assert found.kernel == "pointwise_dense"
    assert min(found.triton, found.ours) > 0
    with pytest.raises(RuntimeError, match="KeyError"):
        launching.measure(["no such op"])
