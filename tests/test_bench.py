"""``compare bench`` without a GPU: what is refused, what is written, what a cut run leaves."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stub_device import SIZES, Stub, log, row

from tritongrad.compare import (
    bench,
    cold,
    peers,
    phases,
    results,
    tasks,
    timing,
    worker,
    workloads,
)
from tritongrad.compare.results import Cell, Row
from tritongrad.compare.tasks import Place, Task
from tritongrad.compare.terminal import make_console
from tritongrad.compare.timing import Floor
from tritongrad.compare.worker import Gone, Worker, compile_ahead
from tritongrad.op import OPS

F = torch.nn.functional


@pytest.fixture(autouse=True)
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a millisecond for each."""
    for name in ("LEAST_ROUNDS", "MOST_ROUNDS", "WARM_UP", "HOST_CALLS"):
        monkeypatch.setattr(timing, name, 1)


# -------------------------------------------------------------------------------------------- tasks


def do(op: str, *wanted: str, phase: str = "forward", dtype: str = "float32") -> list[Row]:
    rows: list[Row] = []
    announced: list[tuple[str, str]] = []
    place = Place(
        Stub(), Floor(1e9, {}), rows.append, lambda *at: announced.append(at), SIZES
    )  # fmt: skip
    tasks.run(
        Task("quick", op, "tiny", dtype, (phase,), wanted or (peers.OURS, peers.EAGER), 0.0), place
    )
    ran = {(row.phase, row.implementation) for row in rows if row.status != "unsupported"}
    assert ran <= set(announced)
    return rows


def plant(monkeypatch: pytest.MonkeyPatch, name: str, entry: Callable[..., Any]) -> None:
    monkeypatch.setitem(vars(OPS[name]), "entry", entry)


def test_a_row_has_what_was_measured() -> None:
    ours, theirs = do("softmax", phase="backward")
    assert (ours.implementation, theirs.implementation) == (peers.OURS, peers.EAGER)
    assert (ours.status, ours.shape, ours.phase) == ("ok", "4x6, 1", "backward")
    assert ours.bytes == theirs.bytes == 3 * 4 * 24  # cotangent, saved output, gradient
    assert ours.floor_us == pytest.approx(0.288)
    assert ours.fraction == pytest.approx(0.288 / 5)
    assert ours.gb_s == pytest.approx(288 / 5e3)
    comparison, addition = do("ge")[0], do("add")[0]
    assert 12 * comparison.bytes == 9 * addition.bytes  # one byte for each bool, not four
    product, _ = do("mm", phase="both")
    assert product.operations == 3 * 2 * 4**3
    assert product.tflop_s == pytest.approx(384 / 5e6)


def test_wrong_numbers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = OPS["softmax"].entry
    plant(monkeypatch, "softmax", lambda *args: real(*args) * 1.001)
    ours, theirs = do("softmax")
    assert ours.status == "refused"
    assert ours.device_us is None
    assert "relative to its norm" in ours.note
    assert theirs.status == "ok"


def test_wrong_gradients_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = OPS["tanh"].entry
    plant(monkeypatch, "tanh", lambda x: real(x.detach()) + 2 * (x - x.detach()))
    assert [row.status for row in do("tanh", phase="forward")] == ["ok", "ok"]
    assert do("tanh", phase="backward")[0].status == "refused"


def test_what_runs_on_torch_is_not_timed_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "exp", torch.exp)
    assert do("exp")[0].note == "launches no kernel"
    # One that has nothing for the call, which it leaves to torch.
    plant(monkeypatch, "exp", lambda x: OPS["mul"](x, x.cfloat()).real)
    assert do("exp")[0].note.startswith("ran on torch: torch.mul")


def test_an_exception_costs_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*args: Any) -> Any:
        raise RuntimeError("planted")

    plant(monkeypatch, "exp", raises)
    ours, theirs = do("exp")
    assert (ours.status, ours.note) == ("failed", "RuntimeError: planted")
    assert theirs.status == "ok"


def test_a_broken_device_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Stub) -> None:
        raise RuntimeError("device-side assert")

    def raises(*args: Any) -> Any:
        monkeypatch.setattr(Stub, "synchronize", broken)
        raise RuntimeError("an illegal memory access")

    plant(monkeypatch, "exp", raises)
    rows: list[Row] = []
    place = Place(Stub(), Floor(1e9, {}), rows.append, lambda *at: None, SIZES)
    task = Task("quick", "exp", "tiny", "float32", ("forward",), (peers.OURS,), 0.0)
    with pytest.raises(tasks.Fatal, match="device-side assert"):
        tasks.run(task, place)
    assert rows[0].note.endswith("an illegal memory access")


def test_a_derivative_that_torch_lacks_is_not_timed() -> None:
    for op, phase in (("eq", "backward"), ("sign", "second")):
        ours, theirs = do(op, phase=phase)
        assert ours.status == theirs.status == "unsupported"
        assert ours.note.startswith("torch has no such derivative")


def test_random_results_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(x: torch.Tensor) -> torch.Tensor:
        return torch.exp(x) * torch.rand_like(x)

    # An op of its own, under the name of one that there is.
    monkeypatch.setitem(OPS, "exp", dataclasses.replace(OPS["exp"], replaces=(noisy,)))
    vars(OPS["exp"])["entry"] = OPS["erf"].entry
    ours, _ = do("exp")
    assert ours.status == "ok"
    assert "random" in ours.note


def test_a_missing_peer_is_a_note() -> None:
    rows = do("softmax", peers.EAGER, "Liger-Kernel", "quack", "SDPA flash", "FlagGems")
    assert [row.status for row in rows if row.implementation != peers.EAGER] == ["unsupported"] * 4
    notes = {row.implementation: row.note for row in rows}
    if peers.version("Liger-Kernel") is None:
        assert notes["Liger-Kernel"] == "not installed: pip install liger-kernel"
    assert notes["SDPA flash"] == "no attention"


def test_sdpa_backends_are_peers_of_attention() -> None:
    q = torch.randn(1, 2, 4, 8)
    found = peers.resolve("SDPA math", OPS["scaled_dot_product_attention"])(q, q, q)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, q, q))


def test_peers_stand_for_torch_functions_that_there_are() -> None:
    targets = {target for op in OPS.values() for target in op.replaces}
    for table in peers._tables().values():
        assert set(table) <= targets


# ---------------------------------------------------------------------------------- what is written


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    written = log(tmp_path)
    assert written.path == tmp_path / "stub-9000" / "2030-01-02-0123456789ab.csv"
    rows = [row(), row(phase="both", status="refused", note='a "note",\nin lines', device_us=None)]
    for one in rows:
        written.append([one])
    pairs = list(results.read(written.path))
    assert [found for found, _ in pairs] == rows
    about = pairs[0][1]
    assert about["gpu"] == "Stub 9000"
    assert about["sm_mhz"] == "1980"
    assert about["time"] == "2030-01-02T03:04:05+00:00"
    assert written.done("quick") == {found.cell for found in rows}
    assert written.done("full") == set()
    with written.path.open(newline="") as file:
        head = next(csv.reader(file))
    assert tuple(head) == results.COLUMNS
    assert set(head) >= {
        "gpu", "driver", "cuda", "torch", "triton", "peers", "commit", "command", "time",
        "sm_mhz", "memory_mhz", "power_w", "op", "shape", "dtype", "phase", "implementation",
        "status", "device_us", "device_us_20", "device_us_80", "host_us", "host_us_20",
        "host_us_80", "gb_s", "tflop_s", "fraction", "peak_bytes", "cold_s", "warm_s",
    }  # fmt: skip


def test_a_row_that_was_cut_off_is_not_a_row(tmp_path: Path) -> None:
    written = log(tmp_path)
    written.append([row()])
    whole = written.path.read_text()
    written.path.write_text(whole + whole.splitlines()[1][:30])
    assert written.done("quick") == {row().cell}
    written.append([row(op="log")])
    assert [found.op for found, _ in results.read(written.path)] == ["exp", "log"]


def test_files_of_another_version_are_not_misread(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    path.write_text("op,time\nexp,1\n")
    with pytest.raises(ValueError, match="columns"):
        list(results.read(path))


def test_the_gpu_is_asked_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    now = 0.0
    monkeypatch.setattr(
        results.Sensor, "_ask", staticmethod(lambda: asked.append(1) or ("1", "2", "3", "4", "5"))
    )
    sensor = results.Sensor(clock=lambda: now, seconds=5.0)
    for later, count in ((0.0, 1), (4.0, 0), (2.0, 1)):
        now += later
        asked.clear()
        assert sensor.moment().temperature_c == "5"
        assert len(asked) == count


# ------------------------------------------------------------------------------------ the whole run

STUB = str(Path(__file__).with_name("stub_device.py"))
OPS_OF_RUN = ("exp", "add")


def run(folder: Path, *plants: str, budget: float = 1e9, implementations: Any = None) -> bench.Run:
    both = implementations or (peers.OURS, peers.EAGER)
    planned = [
        Task("quick", name, "tiny", "float32", ("forward",), both, 0.0) for name in OPS_OF_RUN
    ]
    process = Worker([sys.executable, STUB, *plants])
    return bench.Run(
        "quick", planned, process, log(folder), make_console(), budget,
        sizes={"copied": 1000, "side": 8},
    )  # fmt: skip


class Inline:
    """A worker that is no process."""

    running = False

    def start(self) -> None:
        self.running = True

    stop = close = lambda self: setattr(self, "running", False)

    def ask(self, message: Any, seconds: float = math.inf) -> Iterator[Any]:
        said = io.StringIO()
        worker.serve(Stub(), io.StringIO(json.dumps(message) + "\n"), said, SIZES)
        _, *answers, end = map(json.loads, said.getvalue().splitlines())
        assert end == {"end": True}
        yield from answers


def statuses(folder: Path) -> dict[Cell, str]:
    return {found.cell: found.status for found, _ in results.read_all(folder)}


def test_a_crash_costs_one_row_and_the_run_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with _closing(run(tmp_path, "exp:exit")) as first:
        first.work()
    found = statuses(tmp_path)
    crashed = [cell for cell, status in found.items() if status == "crashed"]
    assert crashed == [Cell("exp", "tiny", "float32", "forward", peers.OURS)]
    assert Counter(found.values()) == {"ok": 5, "crashed": 1}  # 3 of 2 ops, and 2 of the floor
    assert "status 7" in capsys.readouterr().out
    before = (first.log.path).read_bytes()
    with _closing(run(tmp_path, "add:exit", "exp:exit")) as second:
        second.work()
        assert not second.worker.running  # nothing was left to do
    assert first.log.path.read_bytes() == before
    assert bench.summarise(first) == 1
    assert "1 crashed" in capsys.readouterr().out


@contextlib.contextmanager
def _closing(opened: bench.Run) -> Iterator[bench.Run]:
    try:
        yield opened
    finally:
        opened.worker.close()


def test_time_that_is_up_leaves_the_rest_for_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ticks = iter((0.0, 0.0, 0.0, 1.0))
    cut = dataclasses.replace(
        run(tmp_path, budget=0.0), worker=Inline(), clock=lambda: next(ticks)
    )  # fmt: skip
    cut.work()
    assert cut.left == 1
    assert {cell.op for cell in statuses(tmp_path)} == {"floor", "exp"}
    assert bench.summarise(cut) == 0
    assert "1 task not begun" in capsys.readouterr().out


def test_a_worker_that_hangs_is_ended(tmp_path: Path) -> None:
    with _closing(run(tmp_path, "exp:hang", implementations=(peers.OURS,))) as hung:
        hung._ensure_worker()  # which takes as long as importing torch does
        hung.worker.silence = 1.0
        hung.planned = hung.planned[:1]
        hung.work()
    cell = Cell("exp", "tiny", "float32", "forward", peers.OURS)
    assert statuses(tmp_path)[cell] == "crashed"


def test_a_worker_that_does_not_start_ends_the_run(tmp_path: Path) -> None:
    none = Worker([sys.executable, "-c", "raise SystemExit('no GPU left')"])
    with (
        _closing(dataclasses.replace(run(tmp_path), worker=none)) as stopped,
        pytest.raises(Gone, match="status 1 no GPU left"),
    ):
        stopped.work()


def test_what_is_under_way_is_cut_off_and_not_called_a_crash(tmp_path: Path) -> None:
    now = 0.0

    class Slow(Inline):
        def ask(self, message: Any, seconds: float = math.inf) -> Iterator[Any]:
            nonlocal now
            if "op" not in message:
                yield from super().ask(message)
                return
            assert seconds == 100.0 + bench.GRACE
            now += seconds
            raise Gone("it was ended")

    cut = dataclasses.replace(run(tmp_path, budget=100.0), worker=Slow(), clock=lambda: now)
    cut.work()
    assert cut.left == 2
    assert not cut.worker.running
    assert {cell.op for cell in statuses(tmp_path)} == {"floor"}


def test_compiling_ahead_writes_nothing_and_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "GRACE", -60.0)  # all of the time: a worker is cut off at once
    planned = run(tmp_path).planned[:1]
    compile_ahead(planned, [sys.executable, STUB, "exp:hang"], workers=1, seconds=60.0)
    assert statuses(tmp_path) == {}


def test_first_calls(tmp_path: Path) -> None:
    task = Task("cold", "exp", "tiny", "float32", ("both",), (peers.OURS,), 0.0)
    found = cold.first_calls(task, [sys.executable, STUB])
    assert (found.status, found.shape) == ("ok", "4x6")
    assert found.cold_s is not None
    assert found.warm_s is not None
    assert "first call" in bench.line(found)


def test_suites_have_every_op() -> None:
    sizes = workloads.SIZES | workloads.ROWS
    assert {task.op for task in bench.plan("quick", list(OPS), sizes)} == set(OPS)
    few = ["exp", "softmax", "mm"]
    assert [t.case for t in bench.plan("quick", few, sizes)] == ["2^20"] * 3 + ["2^26"] * 3
    full = Counter(task.op for task in bench.plan("full", few, sizes))
    assert full["exp"] == full["mm"] == 3 * len(workloads.SIZES)
    assert full["softmax"] == 3 * (len(workloads.SIZES) + len(workloads.ROWS))
    assert all(task.phases == phases.PHASES for task in bench.plan("full", few, sizes))
    some = {"sizes": ("2^24",), "phases": ("second",)}
    some["implementations"] = (peers.OURS, "SDPA math")
    for op, count in (("softmax", 1), ("scaled_dot_product_attention", 2)):
        (task, *others) = bench.plan("full", [op], sizes, some)
        assert {(t.case, t.phases) for t in (task, *others)} == {("2^24", ("second",))}
        assert len({t.dtype for t in (task, *others)}) == 1 + len(others) == 3
        assert len(task.implementations) == count
    for suite, about in bench.SUITES.items():
        assert about.budget + bench.GRACE < (240 if suite in ("quick", "host") else 540)


def test_part() -> None:
    assert bench.part_of("2/5") == (2, 5)
    for wrong in ("0/5", "6/5", "x/5", "3"):
        with pytest.raises(Exception, match="expected I/N"):
            bench.part_of(wrong)
