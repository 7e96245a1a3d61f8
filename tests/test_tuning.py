"""Tuning on request: every candidate computes the same, the fastest is taken, and nothing else.

The clock is a stub: it likes some configurations better.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from support import DEVICE, assert_same
from torch import Tensor

import tritongrad
from tritongrad import launchers, runtime, tuning
from tritongrad.__main__ import main
from tritongrad.extension import EXTENSIONS
from tritongrad.launchers.configurations import (
    ROWS,
    TABLES,
    Chosen,
    Configuration,
    Problem,
    architecture,
    choose,
)
from tritongrad.sampling import Random

Launch = tuple[Any, tuple[int, ...], tuple[Any, ...], Any]


@pytest.fixture(autouse=True)
def nothing_tuned() -> Iterator[None]:
    tuning.reset()
    yield
    tuning.reset()


def make(*shape: int) -> Tensor:
    return Random(torch.float64, DEVICE)(*shape)


def differentiated(result: Tensor, x: Tensor) -> None:
    """To second order, by kernels of the gradient's own."""
    (g,) = torch.autograd.grad(result.square().sum(), x, create_graph=True)
    torch.autograd.grad(g.square().sum(), x)


def labels(rows: int, classes: int) -> Tensor:
    return torch.arange(rows, device=DEVICE).remainder(classes)


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], make(x.shape[-1]), make(x.shape[-1]))


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "softmax along columns": lambda x: x.log_softmax(0),
    "norm": norm,
    "labels": lambda x: F.cross_entropy(x, labels(*x.shape)),
    "probabilities": lambda x: F.cross_entropy(x, x.detach().softmax(-1), label_smoothing=0.1),
    "likelihood": lambda x: F.nll_loss(x.square(), labels(*x.shape)),
    "reduction": lambda x: x.sum(0) * x.std(),
    "rows' losses": lambda x: F.cosine_embedding_loss(x, x.roll(1), labels(len(x), 2) * 2 - 1),
}


def candidates_agree(launch: Launch) -> int:
    """That a launch leaves the same numbers in each configuration; how many there are."""
    kernel, programs, args, meta = launch
    copies: dict[Any, Tensor] = {}
    own = tuning._copied(args, copies)
    first = [tuning._bits(t).clone() for t in copies.values()]
    expected: list[Tensor] = []
    configurations = tuning.candidates(meta)
    for configuration in configurations:
        for copy, value in zip(copies.values(), first, strict=True):
            tuning._bits(copy).copy_(value)
        grid, constants = meta.build(configuration)
        runtime._run(kernel, grid, own, constants)
        # What each program summed depends on which rows it had.
        parts = "sums" in meta.problem.function
        found = [
            t.sum(0) if parts and t.shape[0] == programs[0] else t.clone() for t in copies.values()
        ]
        expected = expected or found
        torch.testing.assert_close(found, expected, equal_nan=True)
    return len(configurations)


@pytest.mark.parametrize("about", CALLS)
def test_every_candidate_computes_the_same(about: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = make(37, 21)
    tried: dict[Problem, int] = {}

    def observe(*launch: Any) -> None:
        if type(launch[3]) is Chosen and launch[3].problem not in tried:
            tried[launch[3].problem] = candidates_agree(launch)

    for long in (False, True):
        if long:  # rows and classes that are walked in several tiles
            for module, names in (
                ("norm", ("FORWARD", "BACKWARD", "SECOND")),
                ("classification", ("LONGEST", "TILE")),
            ):
                for name in names:
                    monkeypatch.setattr(getattr(launchers, module).k, name, 32)
            monkeypatch.setattr(launchers.norm.k, "LONG_BLOCK", 8)
            tuning._forget()
        with tritongrad.use(), runtime.observe(observe):
            differentiated(CALLS[about](x), x)
    assert max(tried.values()) > 2


def likes(wanted: Callable[[Configuration], bool]) -> Callable[[Any], float]:
    """A clock for which a launch in a configuration like this takes half of the time."""

    def timer(run: Callable[[], None]) -> float:
        constants = run.__defaults__[1]  # type: ignore[attr-defined]
        c = Configuration(
            constants["BLOCK_ROWS"], constants["BLOCK_COLUMNS"], constants["num_warps"]
        )
        return 1.0 if wanted(c) else 2.0

    return timer


def metas(run: Callable[[], Any]) -> list[Any]:
    found: list[Any] = []
    with runtime.observe(lambda kernel, grid, args, meta: found.append(meta)):
        run()
    return found


def test_the_fastest_is_taken_from_then_on() -> None:
    x, y = make(64, 21), make(60, 30)
    op = tritongrad.OPS["softmax"]
    single = x.detach().float()
    (before,), (of_single,) = metas(lambda: op(x, 1)), metas(lambda: op(single, 1))
    expected = op(x, 1)
    rows = before.configuration.rows
    tuned = tuning.tune_by(likes(lambda c: c.rows == rows // 2), lambda: op(x, 1))
    assert [choice.fastest.rows for choice in tuned] == [rows // 2]
    assert "rowwise softmax_row" in str(tuned)
    for of_the_same_class in (x, y):
        (after,) = metas(lambda z=of_the_same_class: op(z, 1))
        assert after["BLOCK_ROWS"] == rows // 2
    assert torch.equal(op(x, 1), expected)
    assert metas(lambda: op(single, 1)) == [of_single]
    tuning.reset()
    (again,) = metas(lambda: op(x, 1))
    assert again == before


def test_a_little_less_is_noise() -> None:
    x = make(64, 21)
    (now,) = metas(lambda: tritongrad.softmax(x, 1))
    clock = likes(lambda c: c == now.configuration)
    tuned = tuning.tune_by(lambda run: 100 - clock(run), lambda: tritongrad.softmax(x, 1))
    assert [choice.fastest for choice in tuned] == [now.configuration]


def test_nothing_is_tuned_unless_it_is_asked_for() -> None:
    with tritongrad.use():
        F.cross_entropy(make(5, 7).softmax(-1), labels(5, 7)).backward()
    assert TABLES == {}


@pytest.mark.skipif(not runtime.INTERPRETED, reason="there is a GPU to tune on")
def test_no_gpu_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="on a GPU"):
        tritongrad.tune(torch.exp, make(3))
    assert main(["tune", "none.json"]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_saved_and_loaded(tmp_path: Path) -> None:
    x, path = make(64, 21), tmp_path / "tuned.json"
    (before,) = metas(lambda: tritongrad.softmax(x, 1))
    clock = likes(lambda c: c.warps == 2 * before.configuration.warps)
    tuning.tune_by(clock, lambda: tritongrad.softmax(x, 1))
    tuned = dict(TABLES[architecture(x.get_device())])
    tuning.save(path)
    tuning.reset()
    document = json.loads(path.read_text())
    (rows,) = document["architectures"].values()
    document["architectures"]["sm_1"] = [{**rows[0], "configuration": [1, 1, 1]}]
    path.write_text(json.dumps(document))
    assert tuning.load(path) == 2
    assert TABLES[architecture(x.get_device())] == tuned
    assert TABLES["sm_1"]
    (after,) = metas(lambda: tritongrad.softmax(x, 1))
    assert after["num_warps"] == 2 * before["num_warps"]
    # What holds a row whole must go on to do so, whatever a table says.
    rows[0]["configuration"] = [1, 1, 1]
    document["architectures"] = {architecture(x.get_device()): rows}
    path.write_text(json.dumps(document))
    tuning.load(path)
    assert_same(tritongrad.softmax(x, 1), torch.softmax(x, 1))


@pytest.mark.parametrize(
    "change",
    [
        {"configuration": [3, 1, 1]}, {"configuration": [1, 1, 64]}, {"configuration": [1, 1]},
        {"configuration": [1024, 1024, 4]}, {"rows": "many"}, {"colour": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_file_that_is_no_table(change: dict[str, Any], tmp_path: Path) -> None:
    row = {**Problem("k", "f", 1, 1, 1, 4)._asdict(), "configuration": [1, 1, 1], **change}
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"format": 1, "architectures": {"sm_90": [row]}}))
    with pytest.raises(ValueError, match="no table of configurations"):
        tuning.load(path)
    assert TABLES == {}


@triton.jit
def add_one(x_ptr, n, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    at = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tl.store(x_ptr + at, tl.load(x_ptr + at, mask=at < n) + 1, mask=at < n)


def test_what_accumulates_is_left_out() -> None:
    """Though its launcher let it: it runs on copies, and is not timed."""
    x = torch.zeros(8, device=DEVICE)

    def build(c: Configuration) -> tuple[tuple[int], dict[str, Any]]:
        meta = {"BLOCK_ROWS": c.rows, "BLOCK_COLUMNS": c.columns, "num_warps": c.warps}
        return (-(-8 // c.rows),), meta

    problem = Problem("add_one", "", 8, 1, 1, 4)
    grid, meta = choose(x.get_device(), problem, Configuration(8, 1, 4), ROWS, build)

    def clock(run: Callable[[], None]) -> float:
        raise AssertionError("it was timed")

    tuned = tuning.tune_by(clock, lambda: runtime.launch_prepared(add_one, grid, (x, 8), x, meta))
    assert [choice.excluded for choice in tuned] == [True]
    assert "left out" in str(tuned)
    assert x.tolist() == [1.0] * 8
    assert TABLES == {}


def test_what_writes_over_an_operand_has_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    if "linear_cross_entropy" not in tritongrad.OPS:
        pytest.skip("torch has no linear_cross_entropy before 2.13")
    x, target = make(16, 400), labels(16, 400)
    in_place = EXTENSIONS["cross_entropy"]

    def overwriting() -> None:
        in_place(x * 2, target, inplace_grad=True).backward()

    monkeypatch.setattr(launchers.linear_loss, "SCRATCH", 1)

    def in_pieces() -> None:
        tritongrad.OPS["linear_cross_entropy"](make(16, 8), make(400, 8), target).backward()

    for run, kernels in (
        (overwriting, {"cross_entropy_bwd"}),
        (in_pieces, {"cross_entropy_fwd", "cross_entropy_bwd"}),
    ):
        seen: list[Launch] = []
        with tritongrad.use(), runtime.observe(lambda *launch, seen=seen: seen.append(launch)):
            run()
        own = [launch for launch in seen if launch[0].__name__ in kernels]
        assert len(own) >= len(kernels)
        assert [launch[0].__name__ for launch in own if type(launch[3]) is Chosen] == []


def test_the_call_is_what_it_is_without_tuning() -> None:
    """Gradients are summed once, tensors are as they were."""
    x, w = make(37, 21), make(21)

    def gradients() -> list[Tensor]:
        x.grad = w.grad = None
        F.cross_entropy(F.layer_norm(x, (21,), w), labels(37, 21)).backward()
        assert x.grad is not None
        assert w.grad is not None
        return [x.grad, w.grad]

    with tritongrad.use():
        expected, before = gradients(), (x.detach().clone(), w.detach().clone())
        found: list[Tensor] = []
        tuned = tuning.tune_by(likes(lambda c: c.warps == 1), lambda: found.extend(gradients()))
        assert len(tuned) >= 4
        assert_same(found, expected)
        assert_same((x.detach(), w.detach()), before)
        assert_same(gradients(), expected)
