"""``compare static --against``: what got worse is seen, and the table is of our kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tritongrad.compare import baseline, static
from tritongrad.compare.baseline import Entry
from tritongrad.compare.disassembly import Code
from tritongrad.compare.terminal import make_console
from tritongrad.op import OPS

CODE = Code(64, 0, 0, 1024, 8, 4, {"HGMMA": 4})


NOT_IN_THE_TABLE = {"rope_table_bwd": "the gradient of tables, where bench gives rope angles"}
"""Kernel -> why it has no row."""


def entry(*numbers: int, op: str = "mul", name: str = "gemm() A=1") -> Entry:
    return Entry(op, name, *numbers)


@pytest.mark.parametrize(
    ("before", "problem"),
    [
        (entry(64, 0, 8, 4, 4), None),
        (entry(80, 16, 4, 2, 0), None),  # it got better
        (entry(60, 0, 8, 4, 4), None),
        (entry(50, 0, 8, 4, 4), "64 registers, before 50"),
        (entry(64, 0, 9, 4, 4), "8 wide loads, before 9"),
        (entry(64, 0, 8, 5, 4), "4 wide stores, before 5"),
        (entry(64, 0, 8, 4, 8), "4 tensor core, before 8"),
    ],
)
def test_what_is_worse(before: Entry, problem: str | None) -> None:
    assert list(baseline.regressions(before, CODE)) == ([problem] if problem else [])


def test_spills_and_what_does_not_compile_are_worse() -> None:
    before = entry(64, 0, 8, 4, 4)
    spilling = Code(64, 64, 48, 1024, 8, 4, {"HGMMA": 4})
    assert list(baseline.regressions(before, spilling)) == [
        "spills 48 bytes a thread, before 0"
    ]  # fmt: skip
    assert list(baseline.regressions(before, None)) == ["does not compile any more"]


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
    assert len(chosen) == len({baseline.kind_of(s) for s in found}) < len(found)
    assert baseline.representatives(reversed(found)) == chosen


def test_a_table_that_is_out_of_date_says_so(collected: Any) -> None:
    chosen = baseline.representatives(collected.specialisations)
    table = baseline.tabulate((s, CODE) for s in chosen)
    assert list(baseline.out_of_date(table, collected.specialisations)) == []
    first, second, *_ = table
    table[first] = table[first]._replace(name="gone() BLOCK=16")
    table["gone"] = table.pop(second)
    assert sorted(baseline.out_of_date(table, collected.specialisations)) == sorted(
        [
            f"{first}: nothing launches what the table has",
            "gone: nothing launches what the table has",
            f"{second}: not in the table",
        ]
    )
    # Of kinds that are another's row, none is chosen.
    assert baseline.representatives(collected.specialisations, table) == [
        s for s in chosen if baseline.kind_of(s) != first
    ]


def test_our_kernels_are_no_worse_than_the_table() -> None:
    """Of each kernel its first row; `python -m compare static --against` has all."""
    table = baseline.read(baseline.FILE)
    rows = {table[kind].name.partition("(")[0]: table[kind] for kind in sorted(table, reverse=True)}
    collection = baseline.collect([OPS[name] for name in sorted({row.op for row in rows.values()})])
    assert collection.problems == []
    found = {baseline.name_of(s): s for s in collection.specialisations}
    assert [row.name for row in rows.values() if row.name not in found] == []
    wanted = [found[row.name] for row in rows.values()]
    compiled = static.compile_for(wanted, [baseline.TARGET], 1, make_console())
    worse = {
        before.name: problems
        for before, now in zip(rows.values(), compiled, strict=True)
        if (problems := list(baseline.regressions(before, now.code)))
    }
    assert worse == {}


def test_every_kernel_is_in_the_table() -> None:
    named = {name for op in OPS.values() for name in op.kernels}
    kernels = {entry.name.partition("(")[0] for entry in baseline.read(baseline.FILE).values()}
    assert named - kernels == set(NOT_IN_THE_TABLE)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "table.json"
    assert static.main(["--only", "neg", "--table", str(file)]) == 0
    assert static.main(["--only", "neg", "--against", str(file)]) == 0
    assert "compared, 0 worse; 0 out of date" in capsys.readouterr().out
    assert static.main(["--only", "abs", "--against", str(file)]) == 1
    assert "its rows under ['neg']" in capsys.readouterr().out
    table = baseline.read(file)
    kind = next(iter(table))
    worse = table[kind]._replace(wide_loads=table[kind].wide_loads + 1)
    other = entry(1, 0, 0, 0, 0, op="exp")
    baseline.write(table | {kind: worse, "other": other}, file)
    assert static.main(["--only", "neg", "--against", str(file)]) == 1
    assert "wide loads, before" in capsys.readouterr().out
    # What is made anew is what neg launches.
    assert static.main(["--only", "neg", "--table", str(file)]) == 0
    assert baseline.read(file) == table | {"other": other}
    file.write_text('{"code": {}}')
    with pytest.raises(ValueError, match="no table"):
        baseline.read(file)


def test_all_ops_are_compared_with_all_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(static, "OPS", {"neg": OPS["neg"]})
    file = tmp_path / "table.json"
    baseline.write({"gone": entry(1, 0, 0, 0, 0)}, file)
    monkeypatch.setattr(static, "compile_for", lambda wanted, *_: [])
    assert static.main(["--against", str(file)]) == 1
    out = capsys.readouterr().out
    assert "gone: nothing launches what the table has; make it anew with --table" in out
    assert "pointwise_dense float32 dense" in out
