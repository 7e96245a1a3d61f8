"""What a wheel carries: every package of the checkout, and nothing at top level but tritongrad."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_every_package_is_listed() -> None:
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = set()
    for top, name in (
        ("tritongrad", "tritongrad"),
        ("compare", "tritongrad.compare"),
        ("kernels", "tritongrad.kernels"),
    ):
        for init in (ROOT / top).rglob("__init__.py"):
            found.add(".".join((name, *init.parent.relative_to(ROOT / top).parts)))
    assert set(settings["packages"]) == found
