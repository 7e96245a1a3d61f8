"""``compare report``, from rows that were measured nowhere."""

from __future__ import annotations

import datetime
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from stub_device import ABOUT, TODAY, Still, log, row

from tritongrad import policy
from tritongrad.compare import peers, plots, report
from tritongrad.compare.__main__ import main
from tritongrad.compare.results import Log, Row

OURS, EAGER = peers.OURS, peers.EAGER


def product(op: str, shape: str, implementation: str, **values: Any) -> Row:
    about = {"operations": 10**9, "tflop_s": 400.0, "dtype": "bfloat16", "bytes": 2**20}
    return row(op=op, shape=shape, implementation=implementation, **about | values)


ROWS = [
    row(op="floor", case="copy", implementation=EAGER, gb_s=3000.0, dtype="uint8"),
    row(op="floor", case="matmul", implementation=EAGER, tflop_s=700.0, dtype="bfloat16"),
    *(
        row(op="exp", case=case, phase=phase, implementation=name, elements=n, bytes=8 * n,
            device_us=time, host_us=2.0, gb_s=8 * n / time / 1e3, peak_bytes=peak)
        for case, n in (("2^20", 2**20), ("2^24", 2**24))
        for phase in ("forward", "backward", "both")
        for name, time, peak in (
            (OURS, 10.0, 2**20), (EAGER, 15.0, 2**22), ("Liger-Kernel", 8.0, 2**21)
        )
    ),
    row(op="log", elements=64, device_us=9.0, host_us=40.0),
    row(op="log", elements=64, implementation=EAGER, device_us=6.0, host_us=5.0),
    row(op="erf", status="refused", note="0.3 from torch's", device_us=None),
    *(
        product("attend", f"1x16x{n}x128, 1x16x{n}x128", name, case=str(n), phase=phase)
        for n in (512, 1024) for name in (OURS, "SDPA flash") for phase in ("forward", "backward")
    ),
    product("mm", "64x64, 64x64", OURS),
    row(op="exp", suite="cold", phase="both", cold_s=2.5, warm_s=0.5, device_us=None),
]  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    log(tmp_path).append(ROWS)
    return tmp_path


def test_without_results_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    given = ["report", "--results", str(tmp_path)]
    assert main(given) == 0
    assert "not measured" in capsys.readouterr().out
    assert "Not measured yet" in (tmp_path / "report" / "index.html").read_text()
    assert main([*given, "--check", str(readme)]) == 1
    assert main([*given, "--write", str(readme)]) == 0
    assert main([*given, "--check", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\nNot measured yet")
    assert text.endswith(f"{report.END}\nafter\n")
    assert main([*given, "--table", str(tmp_path / "tables")]) == 2
    readme.write_text("no place")
    assert main([*given, "--write", str(readme)]) == 2


def test_page_holds_every_row_and_needs_nothing_else(results: Path) -> None:
    assert main(["report", "--results", str(results)]) == 0
    page = (results / "report" / "index.html").read_text()
    assert page.count("<svg") == len(list((results / "report").glob("*.svg"))) >= 6
    assert page.count("<tr><td>") >= len(ROWS)
    for text in ("Stub 9000", "0123456789ab", "refused: 0.3 from torch&#x27;s", "10.0", "2.50"):
        assert text in page
    for outside in ("<link", "<script", "src=", "url(http", 'href="http'):
        assert outside not in page


def test_pictures_are_svg_and_do_not_change_by_themselves(results: Path) -> None:
    (found,) = report.collect(report.read_all(results))
    first = report.pictures(found)
    assert first["Memory"] == plots.memory(found.rows)
    assert list(first) == [
        "Beside torch", "Beside Liger-Kernel", "Beside SDPA flash", "Attention", "Matrix products",
        "Memory", "Bandwidth of exp", "Bandwidth of log",
    ]  # fmt: skip
    for picture in first.values():
        ElementTree.fromstring(picture)
    assert "floor" in first["Bandwidth of exp"]
    assert "attend forward, bfloat16" in first["Attention"]


def test_ratios_are_of_the_same_call() -> None:
    found = plots.ratios(ROWS, EAGER, lambda row: row.device_us)
    values = {(row.op, row.case, row.phase): ratio for row, ratio in found.items()}
    assert values["exp", "2^20", "forward"] == pytest.approx(1.5)
    assert values["log", "2^20", "forward"] == pytest.approx(2 / 3)
    assert ("erf", "2^20", "forward") not in values


def test_readme_section_says_what_is_slower(results: Path) -> None:
    (found,) = report.collect(report.read_all(results))
    text = report.markdown([found])
    assert "a copy 3.00 TB/s, bfloat16 products 700 TFLOP/s" in text
    assert "| torch | forward | 3 | 1.50 | 67% |" in text
    assert "| Liger-Kernel | both | 2 | 0.80 | 0% |" in text
    assert "worst size: `log` 0.67" in text
    assert "`erf` (refused)" in text
    assert "torch 2.13, triton 3.7, CUDA 13.0, driver 1.2, commit 0123456789ab" in text


def test_a_later_measurement_takes_the_place_of_an_earlier_one(results: Path) -> None:
    later = Log.open(ABOUT, results, TODAY + datetime.timedelta(days=1))
    later.sensor = Still()  # type: ignore[assignment]
    later.append([row(op="log", elements=64, device_us=3.0, host_us=1.0)])
    (found,) = report.collect(report.read_all(results))
    assert [r.device_us for r in found.rows if r.op == "log" and r.implementation == OURS] == [3.0]


def test_table_for_the_policy(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tables"
    assert main(["report", "--results", str(results), "--table", str(folder)]) == 0
    written = json.loads((folder / "stub-9000.json").read_text())
    assert written["measured"]["commit"] == "0123456789ab"
    monkeypatch.setattr(policy, "DIRECTORY", folder)
    found = policy.load("Stub 9000")
    assert found is not None
    assert found.ratios["exp"] == {"float32": [(2**20, 1.5), (2**24, 1.5)]}
    # The host is what a call waits for here: 40 us against 6 on torch's device.
    assert found.ratios["log"] == {"float32": [(64, 0.15)]}
    assert "erf" not in found.ratios
