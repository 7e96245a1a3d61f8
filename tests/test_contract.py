"""``compare ops``: the table of what each op promises, derived from the records."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tritongrad.compare import contract
from tritongrad.compare.__main__ import main
from tritongrad.op import OPS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", OPS)
def test_contract_of(name: str) -> None:
    found = contract.contract(OPS[name])
    assert found.torch
    assert found.dtypes
    assert found.kernels
    assert set(found.kernels) <= contract.kernel_files().keys()
    assert found.deterministic, "an atomic operation in a kernel file"
    assert (found.orders == "none") == (not OPS[name].differentiable)
    if found.orders != "none":
        assert found.jvp
        assert found.derivative


def test_contract_is_derived(monkeypatch: pytest.MonkeyPatch) -> None:
    op = dataclasses.replace(
        OPS["mul"], max_order=2, jvp=None, vmap=None, schema="(Tensor x) -> Tensor"
    )
    found = contract.contract(op)
    assert (found.orders, found.jvp, found.vmap, found.compile) == ("2", False, False, "library")
    assert contract.contract(OPS["mm"]).torch[0] == "torch.mm"
    files = dict.fromkeys(OPS["mul"].kernels, "tl.atomic_add(p, x)")
    monkeypatch.setattr(contract, "kernel_files", lambda: files)
    assert not contract.contract(op).deterministic


def test_markdown_table() -> None:
    record = dataclasses.replace(contract.contract(OPS["mul"]), derivative="dx = |g|; dy = 0")
    begin, head, rule, row, end = contract.markdown([record]).splitlines()
    assert (begin, end) == (contract.BEGIN, contract.END)
    assert row.startswith("| `mul` | `torch.mul`<br>")
    assert row.endswith(r"| `dx = \|g\|`<br>`dy = 0` |")
    assert head.count("|") == rule.count("|") == row.count("|") - row.count(r"\|")


def test_checking_and_writing_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "README.md"
    assert main(["ops", "--check", str(file)]) == 2
    file.write_text("no table")
    assert main(["ops", "--write", str(file)]) == 2
    assert f"no lines {contract.BEGIN}" in capsys.readouterr().err
    file.write_text(f"before\n{contract.BEGIN}\nold\n{contract.END}\nafter\n")
    assert main(["ops", "--check", str(file)]) == 1
    assert "out of date" in capsys.readouterr().out
    assert main(["ops", "--write", str(file)]) == 0
    text = file.read_text()
    assert text.startswith(f"before\n{contract.BEGIN}\n| op |")
    assert text.endswith(f"{contract.END}\nafter\n")
    assert main(["ops", "--check", str(file)]) == 0


@pytest.mark.skipif(
    "linear_cross_entropy" not in OPS,
    reason="torch has no linear_cross_entropy before 2.13, of which README.md has a row",
)
def test_the_readme_is_up_to_date() -> None:
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md")
    assert main(["ops", "--check", str(readme)]) == 0, "run `tritongrad ops --write README.md`"


def test_ops_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ops.json"
    assert main(["ops", "--json", str(file)]) == 0
    assert [row["name"] for row in json.loads(file.read_text())] == list(OPS)
    assert "torch.tanh" in capsys.readouterr().out
