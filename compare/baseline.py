"""``compare static --against FILE``: machine code that got worse since a table was checked in.

The table has one specialisation of each kernel for each of its dtypes and tiles: those that
``compare bench`` would launch at one size. It is made by ``compare static --table FILE``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tritongrad import runtime
from tritongrad.doctor import installed
from tritongrad.op import Op

from . import workloads
from .disassembly import Code, Json
from .specialisations import Collection, Specialisation, exercise

FILE = Path(__file__).parent / "static-table.json"

TARGET = "sm_90"
"""What the table is compiled for: of the targets, the one that bench runs on."""

SIZE = workloads.SIZES["2^20"]

REGISTERS, SLACK = 1.15, 4
"""A compiler's whim is not a regression: registers may grow by this factor, and by so many."""


class Entry(NamedTuple):
    """What is kept of a compiled kernel's Code."""

    registers: int
    spill_bytes: int
    wide_loads: int
    wide_stores: int
    tensor_core: int

    @classmethod
    def of(cls, code: Code) -> Entry:
        return cls(
            code.registers,
            code.spill_bytes,
            code.wide_loads or 0,
            code.wide_stores or 0,
            sum(code.tensor_core.values()),
        )


def collect(ops: Iterable[Op]) -> Collection:
    """What ``compare bench`` launches of these ops at SIZE, in float32 and bfloat16."""
    collection = Collection()
    for op in ops:
        try:
            recipe = workloads.recipe(op)
            for dtype in (torch.float32, torch.bfloat16):
                sample = workloads.at(op, recipe, SIZE, dtype, "cpu")
                with runtime.stub(), collection.recording(op):
                    exercise(op, sample)
        except Exception as problem:
            collection.problems.append(f"{op.name}: {type(problem).__name__}: {problem}")
    return collection


def representatives(found: Iterable[Specialisation]) -> list[Specialisation]:
    """One of each kernel for each dtypes, tile and alignment, by name. The functions that kernels
    are given differ too little in what they need to have each a row of its own."""
    chosen: dict[str, Specialisation] = {}
    for specialisation in sorted(found, key=name_of):
        meta = specialisation.description["meta"]
        tile = {name: value for name, value in meta.items() if not isinstance(value, dict)}
        about = (specialisation.kernel, specialisation.dtypes, tile, specialisation.vectorisable)
        chosen.setdefault(json.dumps(about, sort_keys=True), specialisation)
    return list(chosen.values())


def name_of(specialisation: Specialisation) -> str:
    """A specialisation as text: its kernel, arguments and constants; two never have the same."""
    arguments = ", ".join(map(_argument, specialisation.description["args"]))
    constants = " ".join(
        f"{name}={_argument(value)}" for name, value in specialisation.description["meta"].items()
    )
    return f"{specialisation.kernel}({arguments}) {constants}"


def _argument(value: Json) -> str:
    if not isinstance(value, dict):
        return json.dumps(value)
    (kind, content), *_ = value.items()
    if kind == "tuple":
        return "(" + ", ".join(map(_argument, content)) + ")"
    if kind == "pointer":
        dtype, aligned, within_2gb = content
        return f"*{dtype}{':16' * aligned}{'' if within_2gb else ':far'}"
    return ".".join(content) if kind == "jit" else content


def tabulate(pairs: Iterable[tuple[Specialisation, Code]]) -> dict[str, Any]:
    """The table of what these were compiled to."""
    code = {name_of(specialisation): list(Entry.of(code)) for specialisation, code in pairs}
    return {
        "target": TARGET,
        "triton": installed("triton"),
        "columns": list(Entry._fields),
        "code": dict(sorted(code.items())),
    }


def write(table: dict[str, Any], path: Path) -> None:
    """Write a table, one specialisation a line."""
    rows = (f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in table["code"].items())
    head = {key: value for key, value in table.items() if key != "code"}
    text = json.dumps(head)[:-1] + ', "code": {\n' + ",\n".join(rows) + "\n}}\n"
    path.write_text(text)


def read(path: Path) -> dict[str, Entry]:
    """Name -> what it was compiled to.

    Raises:
        ValueError: the file is no such table.
    """
    table = json.loads(path.read_text())
    if not isinstance(table, dict) or table.get("columns") != list(Entry._fields):
        raise ValueError(f"{path} is no table of `compare static --table`")
    return {name: Entry(*row) for name, row in table["code"].items()}


def regressions(before: Entry, code: Code | None) -> Iterator[str]:
    """What is worse in ``code`` than in the table."""
    if code is None:
        yield "does not compile any more"
        return
    now = Entry.of(code)
    if now.registers > max(REGISTERS * before.registers, before.registers + SLACK):
        yield f"{now.registers} registers, before {before.registers}"
    if now.spill_bytes > before.spill_bytes:
        yield f"spills {now.spill_bytes} bytes a thread, before {before.spill_bytes}"
    for what in ("wide_loads", "wide_stores", "tensor_core"):
        count, old = getattr(now, what), getattr(before, what)
        if count < old:
            yield f"{count} {what.replace('_', ' ')}, before {old}"


def unlaunched(table: Iterable[str], launched: Iterable[str]) -> list[str]:
    """Kernels of which nothing that the table has is launched any more: it is out of date."""

    def kernels(names: Iterable[str]) -> set[str]:
        return {name.partition("(")[0] for name in names}

    table, launched = set(table), set(launched)
    return sorted(kernels(table) - kernels(table & launched))
