"""``compare static --against FILE``: machine code that got worse since a table was checked in.

Of all that ``compare bench`` would launch at one size, the table has one specialisation for each
kind: a kernel with its dtypes, tile and alignment. Of the device functions that a kernel can be
given, so one stands for all: what they share is what the table is for, and spills and vectors are
looked for in each by ``compare static`` itself. ``--table`` makes it; with ``--only OP``, of what
these ops launch, and the rest stays.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

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

    op: str
    name: str
    registers: int
    spill_bytes: int
    wide_loads: int
    wide_stores: int
    tensor_core: int

    @classmethod
    def of(cls, specialisation: Specialisation, code: Code) -> Entry:
        return cls(
            min(specialisation.ops),
            name_of(specialisation),
            code.registers,
            code.spill_bytes,
            code.wide_loads or 0,
            code.wide_stores or 0,
            sum(code.tensor_core.values()),
        )


Table = dict[str, Entry]
"""By kind."""


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


def kind_of(specialisation: Specialisation) -> str:
    """What specialisations have in common that one row of the table stands for."""
    meta = specialisation.description["meta"]
    tile = [f"{k}={_argument(v)}" for k, v in meta.items() if not _is_function(v)]
    dense = ["dense"] * specialisation.vectorisable
    return " ".join([specialisation.kernel, *specialisation.dtypes, *dense, *tile])


def _is_function(value: Json) -> bool:
    return isinstance(value, dict) and "jit" in value


def representatives(
    found: Iterable[Specialisation], table: Mapping[str, Entry] | None = None
) -> list[Specialisation]:
    """One of each kind: that of the table, if it is there, else the first by name. Kinds whose row
    is of another specialisation have none."""
    chosen: dict[str, Specialisation] = {}
    for specialisation in sorted(found, key=name_of):
        kind = kind_of(specialisation)
        if table is None or kind not in table or table[kind].name == name_of(specialisation):
            chosen.setdefault(kind, specialisation)
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


def tabulate(pairs: Iterable[tuple[Specialisation, Code]]) -> Table:
    """The table of what these were compiled to."""
    return {kind_of(s): Entry.of(s, code) for s, code in pairs}


def write(table: Table, path: Path) -> None:
    """Write a table, one kind a line."""
    head = {"target": TARGET, "triton": installed("triton"), "columns": list(Entry._fields)}
    rows = [f"  {json.dumps(kind)}: {json.dumps(table[kind])}" for kind in sorted(table)]
    path.write_text(json.dumps(head)[:-1] + ', "code": {\n' + ",\n".join(rows) + "\n}}\n")


def read(path: Path) -> Table:
    """A table that was written.

    Raises:
        ValueError: the file is no such table.
    """
    table = json.loads(path.read_text())
    if not isinstance(table, dict) or table.get("columns") != list(Entry._fields):
        raise ValueError(f"{path} is no table of `compare static --table`")
    return {kind: Entry(*row) for kind, row in table["code"].items()}


def regressions(before: Entry, code: Code | None) -> Iterator[str]:
    """What is worse in ``code`` than in the table."""
    if code is None:
        yield "does not compile any more"
        return
    if code.registers > max(REGISTERS * before.registers, before.registers + SLACK):
        yield f"{code.registers} registers, before {before.registers}"
    if code.spill_bytes > before.spill_bytes:
        yield f"spills {code.spill_bytes} bytes a thread, before {before.spill_bytes}"
    counts = code.wide_loads or 0, code.wide_stores or 0, sum(code.tensor_core.values())
    for what, now in zip(("wide_loads", "wide_stores", "tensor_core"), counts, strict=True):
        if now < getattr(before, what):
            yield f"{now} {what.replace('_', ' ')}, before {getattr(before, what)}"


def out_of_date(table: Table, found: Iterable[Specialisation]) -> Iterator[str]:
    """Kinds of which the table has a row that nothing launches, or none for what is launched."""
    names: dict[str, set[str]] = {}
    for specialisation in found:
        names.setdefault(kind_of(specialisation), set()).add(name_of(specialisation))
    for kind in sorted(table.keys() | names.keys()):
        if kind not in table:
            yield f"{kind}: not in the table"
        elif table[kind].name not in names.get(kind, ()):
            yield f"{kind}: nothing launches what the table has"
