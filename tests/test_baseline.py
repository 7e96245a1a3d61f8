"""``compare static --against``: what got worse is seen, and the table is of our kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tritongrad.compare import baseline, static
from tritongrad.compare.baseline import Entry
from tritongrad.compare.disassembly import Code
from tritongrad.compare.terminal import make_console
from tritongrad.op import OPS

CODE = Code(64, 0, 0, 1024, 8, 4, {"HGMMA": 4})


@pytest.mark.parametrize(
    ("before", "problem"),
    [
        (Entry(64, 0, 8, 4, 4), None),
        (Entry(80, 16, 4, 2, 0), None),  # it got better
        (Entry(60, 0, 8, 4, 4), None),
        (Entry(50, 0, 8, 4, 4), "64 registers, before 50"),
        (Entry(64, 0, 9, 4, 4), "8 wide loads, before 9"),
        (Entry(64, 0, 8, 5, 4), "4 wide stores, before 5"),
        (Entry(64, 0, 8, 4, 8), "4 tensor core, before 8"),
    ],
)
def test_what_is_worse(before: Entry, problem: str | None) -> None:
    assert list(baseline.regressions(before, CODE)) == ([problem] if problem else [])


def test_spills_and_what_does_not_compile_are_worse() -> None:
    before = Entry.of(CODE)
    spilling = Code(64, 64, 48, 1024, 8, 4, {"HGMMA": 4})
    assert list(baseline.regressions(before, spilling)) == [
        "spills 48 bytes a thread, before 0"
    ]  # fmt: skip
    assert list(baseline.regressions(before, None)) == ["does not compile any more"]


def test_a_table_of_kernels_that_are_gone_is_out_of_date() -> None:
    table = ["gemm(1) A=1", "gemm(1) A=2", "reduce(1)"]
    assert baseline.unlaunched(table, ["gemm(1) A=2", "other()"]) == ["reduce"]
    assert baseline.unlaunched(table, table) == []


@pytest.fixture(scope="module")
def collected() -> Any:
    return baseline.collect([OPS[name] for name in ("mul", "softmax", "mm")])


def test_names_tell_specialisations_apart(collected: Any) -> None:
    assert collected.problems == []
    found = collected.specialisations
    names = {baseline.name_of(s) for s in found}
    assert len(names) == len(found) > 10
    chosen = baseline.representatives(found)
    assert {s.kernel for s in chosen} == {s.kernel for s in found}
    assert len(chosen) < len(found)
    assert [baseline.name_of(s) for s in baseline.representatives(reversed(found))] == [
        baseline.name_of(s) for s in chosen
    ]


def test_our_kernels_are_no_worse_than_the_table(collected: Any) -> None:
    """A few of them: `python -m compare static --against` has all."""
    table = baseline.read(baseline.FILE)
    found = {baseline.name_of(s): s for s in collected.specialisations}
    shared = [name for name in table if name in found]
    for kernel in ("pointwise_dense", "rowwise", "gemm"):
        (name, *_) = [name for name in shared if name.startswith(kernel)]
        (row,) = static.compile_for([found[name]], [baseline.TARGET], 1, make_console())
        assert list(baseline.regressions(table[name], row.code)) == [], name


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "table.json"
    assert static.main(["--only", "neg", "--table", str(file)]) == 0
    assert static.main(["--only", "neg", "--against", str(file)]) == 0
    assert "compared, 0 worse; 0 of the table" in capsys.readouterr().out
    table = json.loads(file.read_text())
    assert table["target"] == "sm_90"
    name = next(iter(table["code"]))
    table["code"][name][2] += 1
    baseline.write(table, file)
    assert static.main(["--only", "neg", "--against", str(file)]) == 1
    assert "wide loads, before" in capsys.readouterr().out
    file.write_text('{"code": {}}')
    with pytest.raises(ValueError, match="no table"):
        baseline.read(file)


def test_a_table_that_is_out_of_date_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(static, "OPS", {"neg": OPS["neg"]})
    file = tmp_path / "table.json"
    code = {"gone(*float32) BLOCK=16": list(Entry.of(CODE))}
    head = {"target": "sm_90", "triton": "3.7.1", "columns": list(Entry._fields)}
    baseline.write(head | {"code": code}, file)
    assert static.main(["--against", str(file)]) == 1
    assert "gone: the table has nothing that is launched" in capsys.readouterr().out
