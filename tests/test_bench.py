"""``compare bench`` without a GPU: what is timed, what is refused, what is written. No test asserts
how long anything takes: the clock is a stub."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import datetime
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stub_device import SIZES, Stub

from tritongrad.compare import bench, cold, peers, phases, results, tasks, timing, workloads
from tritongrad.compare.__main__ import main
from tritongrad.compare.results import Cell, Environment, Log, Moment, Row
from tritongrad.compare.tasks import Place, Task
from tritongrad.compare.terminal import make_console
from tritongrad.compare.timing import Floor, Spread
from tritongrad.compare.worker import Gone, Worker, compile_ahead
from tritongrad.op import OPS
from tritongrad.sampling import Random, Sample, tensors

F = torch.nn.functional

ABOUT = Environment(
    gpu="Stub 9000", driver="1.2", cuda="13.0", torch="2.13", triton="3.7", tritongrad="0.1",
    python="3.12", peers="", commit="0123456789ab", command="python -m compare bench",
)  # fmt: skip
TODAY = datetime.date(2030, 1, 2)


class Still:
    """A sensor without a GPU, at a time that does not pass."""

    def moment(self) -> Moment:
        return Moment("2030-01-02T03:04:05+00:00", sm_mhz="1980", power_w="412.5")


@pytest.fixture(autouse=True)
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a millisecond for each."""
    for name in ("LEAST_ROUNDS", "MOST_ROUNDS", "WARM_UP", "HOST_CALLS"):
        monkeypatch.setattr(timing, name, 1)


# ------------------------------------------------------------------------------------- measurements


def test_spread() -> None:
    assert timing.spread([5.0, 1.0, 2.0, 3.0, 4.0]) == pytest.approx(Spread(3.0, 1.8, 4.2))
    assert timing.spread([7.0]) == Spread(7.0, 7.0, 7.0)


def test_calls_are_timed_in_turns_after_the_cache_was_flushed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "MOST_ROUNDS", 4)
    device = Stub()
    order: list[str] = []

    def call(name: str) -> timing.Call:
        def run(n: int) -> None:
            order.append(f"{name}{n}")
            device.did.append(name)

        return run

    found = timing.measure({"a": call("a"), "b": call("b")}, device, seconds=1.0)
    timed = [order[i : i + 2] for i in range(4, 12, 2)]  # after warming up and an estimate
    assert timed == [["a0", "b0"], ["b1", "a1"], ["a2", "b2"], ["b3", "a3"]]
    start = device.did.index("mark") - 2
    assert device.did[start : start + 5] == ["flush", "occupy", "mark", "a", "mark"]
    assert isinstance(found["a"], timing.Timing)
    assert found["a"].device == Spread(5.0, 5.0, 5.0)
    assert found["a"].host.median == pytest.approx(1.0)
    assert found["a"].repeats == 4
    assert found["a"].peak_bytes == 640


def test_rounds_follow_from_the_time_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LEAST_ROUNDS", 2)
    monkeypatch.setattr(timing, "MOST_ROUNDS", 30)
    for seconds, rounds in ((0.0, 2), (4e-5, 10), (1.0, 30)):  # the stub's call takes 2 us
        found = timing.measure({"a": lambda n: None}, Stub(), seconds)["a"]
        assert isinstance(found, timing.Timing)
        assert found.repeats == rounds


@pytest.mark.parametrize("when", [1, 3, 4, 5])
def test_a_call_that_fails_is_left_out(when: int) -> None:
    """While it warms up, while the device's or the host's time is taken, or memory is watched."""
    count, seen = 0, []

    def fails(n: int) -> None:
        nonlocal count
        count += 1
        if count == when:
            raise ValueError("planted")

    calls = {"bad": fails, "good": lambda n: None}
    found = timing.measure(calls, Stub(), 0.0, seen.append)
    assert isinstance(found["bad"], ValueError)
    assert isinstance(found["good"], timing.Timing)
    assert list(found) == ["bad", "good"]
    assert set(seen) == {"bad", "good"}


def test_floor() -> None:
    floor, found = timing.measure_floor(Stub(tick=4.0), [torch.float32], copied=1000, side=8)
    assert list(found) == ["copy", "matmul float32"]
    assert floor.bandwidth == pytest.approx(2 * 1000 / 4e-6)
    assert floor.rates == {"float32": pytest.approx(2 * 8**3 / 4e-6)}
    assert floor.microseconds(5000, 0, "float32") == pytest.approx(10.0)
    assert floor.microseconds(0, 512, "float32") == pytest.approx(2.0)
    assert floor.microseconds(500, 512, "bfloat16") == pytest.approx(1.0)


# -------------------------------------------------------------------------------------------- sizes


@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated")
@pytest.mark.parametrize("name", OPS)
def test_every_op_has_calls_of_any_size(name: str) -> None:
    op = OPS[name]
    recipe = workloads.recipe(op)
    counts = []
    for size in ("2^12", "2^24"):
        sample = workloads.at(op, recipe, workloads.SIZES[size], torch.bfloat16, "meta")
        assert all(t.dtype is torch.bfloat16 for t in tensors(sample) if t.is_floating_point())
        results_ = tensors(Sample((op.replaces[0](*sample.args, **sample.kwargs),)))
        counts.append(max(t.numel() for t in (*tensors(sample), *results_)))
    # Attention has as many tokens at each length, an embedding as many entries.
    assert counts[1] >= (1 if recipe.kind in ("heads", "own") else 32) * counts[0]
    if recipe.kind in ("pointwise", "rows"):
        assert 2**11 <= counts[0] <= 2**13
        assert 2**23 <= counts[1] <= 2**25


def shapes(name: str, size: str) -> list[list[int]]:
    op = OPS[name]
    sample = workloads.at(
        op, workloads.recipe(op), workloads.SIZES[size], torch.float32, "meta"
    )  # fmt: skip
    return [list(t.shape) for t in tensors(sample)]


def test_sizes_are_those_of_the_kind_of_op() -> None:
    assert shapes("softmax", "2^26") == [[8192, 8192]]
    assert shapes("linear", "2^26") == [[4096, 4096], [4096, 4096]]
    assert shapes("bmm", "2^20") == [[2, 1024, 1024]] * 2
    assert shapes("dot", "2^16") == [[2**16]] * 2
    assert shapes("outer", "2^20") == [[2**10]] * 2
    assert shapes("cosine_embedding_loss", "2^20") == [[512, 2048], [512, 2048], [512]]
    op = OPS["softmax"]
    wide = workloads.ROWS["2^26 x 65536"]
    sample = workloads.at(op, workloads.recipe(op), wide, torch.float32, "meta")
    assert list(sample.args[0].shape) == [1024, 65536]


def op_of(samples: Callable[[Any], Iterator[Sample]], function: Any, **fields: Any) -> Any:
    return dataclasses.replace(OPS["softmax"], replaces=(function,), samples=samples, **fields)


def test_sizes_of_ops_that_are_to_come() -> None:
    def norm(make: Any) -> Iterator[Sample]:
        yield Sample((make(3, 5), (5,), make(5), make(5)))

    def entropy(make: Any) -> Iterator[Sample]:
        yield Sample((make(3, 5), make(3, low=0, high=5, dtype=torch.int64)))

    def attention(make: Any) -> Iterator[Sample]:
        yield Sample((make(2, 3, 5, 8), make(2, 3, 7, 8), make(2, 3, 7, 8)))

    size = workloads.SIZES["2^16"]

    def made(op: Any) -> Sample:
        return workloads.at(op, workloads.recipe(op), size, torch.float32, "cpu")

    x, normalized_shape, weight, _ = made(op_of(norm, F.layer_norm)).args
    assert (x.shape, normalized_shape, weight.shape) == ((64, 1024), (1024,), (1024,))
    logits, target = made(op_of(entropy, F.cross_entropy)).args
    assert (logits.shape, target.shape) == ((64, 1024), (64,))
    assert target.max() > 5
    op = op_of(attention, F.scaled_dot_product_attention)
    recipe = workloads.recipe(op)
    sample = workloads.at(op, recipe, size, torch.float32, "meta")
    assert recipe.kind == "heads"
    assert [t.shape for t in tensors(sample)] == [(16, 16, 1024, 128)] * 3
    own = op_of(norm, F.layer_norm, bench=lambda make, size: Sample((make(size.columns), 0)))
    assert made(own).args[0].shape == (1024,)


def test_op_that_cannot_be_brought_to_a_size_says_so() -> None:
    for samples, function, reason in (
        (lambda make: [Sample((make(3, 5), torch.ones(3, 5)))], torch.add, "RuntimeError"),
        (lambda make: [Sample((torch.ones(3, 5),))], torch.exp, "its sizes are its own"),
        (lambda make: [Sample((make(0, 5),))], torch.exp, "dense"),
    ):
        with pytest.raises(workloads.Unscalable, match=reason):
            workloads.recipe(op_of(samples, function))


def test_values_are_random_and_in_the_range_that_the_op_is_defined_in() -> None:
    make = workloads.Scaling(torch.float32, "cpu", seed=3)
    make.sizes = lambda n, place: 100 * n
    assert 0.9 < make(5, 5).std() < 1.1
    assert make(5, low=0.5, high=1.0).min() >= 0.5
    assert make(5, dtype=torch.bool).float().mean().item() == pytest.approx(0.5, abs=0.1)
    other = workloads.Scaling(torch.float32, "cpu", seed=4)
    other.sizes = make.sizes
    assert not torch.equal(make(5), other(5))


# ------------------------------------------------------------------------------------- right or not


def test_differences_are_seen() -> None:
    x = torch.linspace(-1, 1, 1001)
    for wrong in (x * 1.0001, x.clone().index_fill_(0, torch.tensor([7]), 0.5), x[:-1]):
        assert phases.difference([wrong], [x], 2e-5) is not None
    assert phases.difference([x + 1e-6], [x], 2e-5) is None
    assert phases.difference([x.to(torch.bfloat16)], [x], 3e-2) is None
    assert phases.difference([], [x], 1.0) is not None
    special = torch.tensor([1.0, torch.nan, torch.inf])
    assert phases.difference([special], [special.clone()], 0.0) is None
    for other in (torch.nan, -torch.inf, 5.0):
        assert phases.difference(
            [special.clone().index_fill_(0, torch.tensor([2]), other)], [special], 1.0
        )
    assert (
        phases.difference([torch.tensor([1])], [torch.tensor([2])], 1.0)
        == "result 0: other integers"
    )


def test_what_cancels_is_compared_with_float64() -> None:
    expected, exact = torch.tensor([1.0e-8]), torch.tensor([1.2e-8], dtype=torch.float64)
    close, far = torch.tensor([1.4e-8]), torch.tensor([9.0e-8])
    assert phases.check(lambda: [close], [expected], lambda: [exact], 1e-5) is None
    assert phases.check(lambda: [far], [expected], lambda: [exact], 1e-5) is not None


def test_phases_are_torchs_derivatives() -> None:
    sample = Sample((Random(torch.float64)(3, 4), Random(torch.float64, seed=1)(3, 4)))
    points = phases.Points(torch.mul, [sample, sample])
    x, y = sample.args
    assert torch.equal(points.prepare("forward")(0)[0], x * y)
    g = points._directions([x])[0]
    for phase in ("backward", "both"):
        call = points.prepare(phase)
        for n in (0, 1, 2):
            assert torch.equal(call(n)[0], g * y)
    value, tangent = points.prepare("jvp")(0)
    u, v = points._directions([x, y])
    torch.testing.assert_close((value, tangent), (x * y, u * y + v * x))
    assert len(points.prepare("second")(0)) == 3  # of x, y and the cotangent
    with pytest.raises(phases.Nothing, match="no result"):
        phases.Points(torch.eq, [sample]).prepare("backward")


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
    op = op_of(lambda make: iter(()), F.scaled_dot_product_attention)
    q = torch.randn(1, 2, 4, 8)
    found = peers.resolve("SDPA math", op)(q, q, q)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, q, q))


def test_peers_stand_for_torch_functions_that_there_are() -> None:
    targets = {target for op in OPS.values() for target in op.replaces}
    known = {F.layer_norm, F.rms_norm, F.cross_entropy, F.scaled_dot_product_attention}
    for table in peers._tables().values():
        assert set(table) <= targets | known


# ---------------------------------------------------------------------------------- what is written


def row(**values: Any) -> Row:
    own: dict[str, Any] = {
        "suite": "quick", "op": "exp", "case": "2^20", "shape": "512x2048, 'a'", "dtype": "float32",
        "phase": "forward", "implementation": peers.OURS, "status": "ok", "device_us": 12.5,
        "host_us": 3.25, "repeats": 7, "bytes": 8 * 2**20, "fraction": 0.93,
    }  # fmt: skip
    return Row(**own | values)


def log(folder: Path, **about: Any) -> Log:
    opened = Log.open(dataclasses.replace(ABOUT, **about), folder, TODAY)
    opened.sensor = Still()  # type: ignore[assignment]
    return opened


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
        assert tuple(next(csv.reader(file))) == results.COLUMNS


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
    worker = Worker([sys.executable, STUB, *plants])
    return bench.Run(
        "quick", planned, worker, log(folder), make_console(), budget,
        sizes={"copied": 1000, "side": 8},
    )  # fmt: skip


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
    with _closing(run(tmp_path, budget=0.0)) as cut:
        ticks = iter((0.0, 0.0, 1.0))
        cut.clock = lambda: next(ticks)
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


def test_compiling_ahead_writes_nothing_and_survives_a_crash(tmp_path: Path) -> None:
    planned = run(tmp_path).planned
    compile_ahead(planned[:1], [sys.executable, STUB, "exp:exit"], workers=1, seconds=60)
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
    for suite, about in bench.SUITES.items():
        assert about.budget < (240 if suite in ("quick", "host") else 540)


def test_part() -> None:
    assert bench.part_of("2/5") == (2, 5)
    for wrong in ("0/5", "6/5", "x/5", "3"):
        with pytest.raises(Exception, match="expected I/N"):
            bench.part_of(wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU does")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 2
    said = capsys.readouterr().err
    assert "needs a GPU" in said
    assert "python -m compare static" in said
