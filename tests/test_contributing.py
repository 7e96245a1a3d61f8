"""CONTRIBUTING's way to add a pointwise op: its lines, as printed, make a whole one."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAME = "atan"
FILES = "kernels/elementary.py", "tritongrad/ops/elementary.py"


def printed() -> list[list[str]]:
    """The added lines of each diff."""
    blocks = re.findall(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    return [block.splitlines() for block in blocks]


def defines(node: ast.stmt) -> bool:
    """Whether a statement is a device function or the row of the op."""
    if isinstance(node, ast.FunctionDef):
        return node.name in (NAME, f"{NAME}_bwd")
    call = node.value if isinstance(node, ast.Expr) else None
    first = call.args[0] if isinstance(call, ast.Call) and call.args else None
    return isinstance(first, ast.Constant) and first.value == NAME


def without(text: str) -> str:
    """``text`` of a module without the statements that define the op."""
    lines = text.splitlines()
    for node in filter(defines, reversed(ast.parse(text).body)):
        first = min([node, *getattr(node, "decorator_list", [])], key=lambda n: n.lineno).lineno
        del lines[first - 1 : node.end_lineno]
    return "\n".join(lines) + "\n"


COMPARE = f"""
import sys, tritongrad
print(tritongrad.__file__)
from tritongrad.compare.__main__ import main
sys.exit(main(["--only", "{NAME}"]))
"""


def test_ten_lines_add_an_op(tmp_path: Path) -> None:
    for package in ("kernels", "tritongrad", "compare"):
        shutil.copytree(ROOT / package, tmp_path / package)
    diffs = printed()
    assert len(diffs) == len(FILES)
    assert sum(line.startswith("+") for diff in diffs for line in diff) <= 10
    for file, diff in zip(FILES, diffs, strict=True):
        text = (tmp_path / file).read_text()
        left = without(text)
        assert left != text
        assert not any(map(defines, ast.parse(left).body))
        added = "\n".join(line[1:] for line in diff)
        (tmp_path / file).write_text(f"{left}\n\n{added}\n")
    compared = subprocess.run(
        [sys.executable, "-c", COMPARE], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert compared.stdout.startswith(str(tmp_path))
    assert re.search(rf"\b{NAME}\b.*\bok\b", compared.stdout), compared.stdout
