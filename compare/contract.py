"""``compare ops``: what each op promises, derived from its record and from its kernels.

An op that has a derivative has its derivative too, and so on, so "any" order is what an op without
``max_order`` promises. An op is deterministic where no kernel file it uses has an atomic operation:
all sums then have one order.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from tritongrad import kernels
from tritongrad.dispatch import torch_name
from tritongrad.op import OPS, Op

from .terminal import add_json_option, choose, dtype_name, make_console, write_json

BEGIN, END = "<!-- ops:begin -->", "<!-- ops:end -->"
"""The table in README.md stands between these."""


@dataclass(frozen=True)
class Contract:
    """What one op promises.

    Attributes:
        torch: names of the torch callables whose calls it takes.
        orders: order of derivative up to which it goes, "any", or "none".
        jvp, vmap: whether forward mode and ``torch.vmap`` go through it.
        compile: what ``torch.compile`` sees, torch's op or a library op of ours.
        dtypes: dtypes of the results it computes.
        deterministic: whether twice the same call gives the same bits.
        kernels: Triton kernels of forward and backward.
        derivative: the formula.
        source: where that is from.
        differs: where numbers are not torch's on purpose.
    """

    name: str
    torch: tuple[str, ...]
    orders: str
    jvp: bool
    vmap: bool
    compile: str
    dtypes: tuple[str, ...]
    deterministic: bool
    kernels: tuple[str, ...]
    derivative: str
    source: str
    differs: str


def contract(op: Op) -> Contract:
    """The contract of ``op``."""
    names = dict.fromkeys(map(_public_name, (*op.replaces, *op.variants)))
    used = tuple(dict.fromkeys((*op.kernels, *op.backward_kernels)))
    orders = "any" if op.max_order is None else str(op.max_order)
    return Contract(
        name=op.name,
        torch=tuple(name.replace("torch.Tensor.", "Tensor.") for name in names),
        orders=orders if op.differentiable else "none",
        jvp=op.differentiable and (op.composite or op.jvp is not None),
        vmap=op.vmap is not None or op.reference is not None,
        compile="torch" if op.schema is None else "library",
        dtypes=tuple(sorted(map(dtype_name, op.dtypes), key=_by_kind_and_width)),
        deterministic=not any("atomic_" in kernel_files()[kernel] for kernel in used),
        kernels=used,
        derivative=op.formula,
        source=op.sources,
        differs=op.differs,
    )


def _public_name(function: Callable[..., Any]) -> str:
    """``torch.mm``, although torch has it under ``torch.spmm`` too."""
    name = getattr(function, "__name__", "")
    return f"torch.{name}" if getattr(torch, name, None) is function else torch_name(function)


def _by_kind_and_width(dtype: str) -> tuple[str, int, str]:
    width = re.search(r"\d+$", dtype)
    return dtype.lstrip("b").rstrip("0123456789"), int(width[0]) if width else 0, dtype


@cache
def kernel_files() -> dict[str, str]:
    """Kernel -> source of the file that it is in."""
    found: dict[str, str] = {}
    for module_info in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        module = importlib.import_module(module_info.name)
        source = inspect.getsource(module)
        found |= {name: source for name, value in vars(module).items() if hasattr(value, "fn")}
    return found


def markdown(contracts: Iterable[Contract]) -> str:
    """The table for README.md, with the lines that mark its place."""
    head = (
        "op", "torch", "orders", "jvp", "vmap", "compile", "dtypes", "deterministic", "kernels",
        "derivative",
    )  # fmt: skip
    rows = [head, ("---",) * len(head)]
    rows += [(f"`{c.name}`", *_cells(c, code="`", separator="<br>")) for c in contracts]
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join([BEGIN, *lines, END])


def _cells(c: Contract, code: str = "", separator: str = "\n") -> tuple[str, ...]:
    """Everything but the name, for people."""

    def yes(promised: bool) -> str:
        return "yes" if promised else "no"

    def listed(names: Iterable[str], separator: str = separator) -> str:
        return separator.join(f"{code}{name}{code}" for name in names)

    return (
        listed(c.torch),
        c.orders,
        # Where there is no derivative there is none to push forward.
        "–" if c.orders == "none" else yes(c.jvp),
        yes(c.vmap),
        c.compile,
        ", ".join(dtype.replace("bfloat", "bf").replace("float", "f") for dtype in c.dtypes),
        yes(c.deterministic),
        listed(c.kernels),
        listed(c.derivative.split("; ")) if c.derivative else "–",
    )


def replaced(text: str, table: str) -> str | None:
    """``text`` with ``table`` in its place; None if it has no place for one."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    return before + table + after if begin and end else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 1 where a file's table is not the present one."""
    parser = argparse.ArgumentParser(prog="tritongrad ops", description=__doc__)
    parser.add_argument("--only", action="append", metavar="OP", help="an op")
    parser.add_argument("--markdown", action="store_true", help="print the table for README.md")
    parser.add_argument("--check", type=Path, metavar="FILE", help="is the table there up to date?")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="bring the table there up to date"
    )
    add_json_option(parser)
    options = parser.parse_args(arguments)
    if options.only and (options.check or options.write):
        parser.error("--only: the table in a file has every op")
    contracts = [contract(OPS[name]) for name in choose(parser, options.only, OPS)]
    if options.json is not None:
        write_json(options.json, [asdict(c) for c in contracts])
    file = options.check or options.write
    if file is not None:
        return _update(file, markdown(contracts), write=options.write is not None)
    if options.markdown:
        print(markdown(contracts))
    else:
        _present(contracts)
    return 0


def _update(file: Path, table: str, write: bool) -> int:
    """Compare the table in ``file`` with ``table``, and replace it if asked."""
    try:
        text = file.read_text()
    except OSError as problem:
        print(f"{file}: {problem.strerror}", file=sys.stderr)
        return 2
    new = replaced(text, table)
    if new is None:
        print(f"{file}: no lines {BEGIN} and {END} for the table to stand between", file=sys.stderr)
        return 2
    if new == text:
        print(f"{file}: the table of ops is up to date")
        return 0
    if not write:
        print(f"{file}: the table of ops is out of date; run `tritongrad ops --write {file}`")
        return 1
    file.write_text(new)
    print(f"{file}: table of ops written")
    return 0


def _present(contracts: Sequence[Contract]) -> None:
    table = Table(show_lines=True)
    headings = ("op", "torch", "orders", "jvp", "vmap", "compile", "dtypes", "deterministic")
    for heading in (*headings, "kernels", "derivative"):
        table.add_column(heading, overflow="fold")
    for c in contracts:
        table.add_row(c.name, *map(escape, _cells(c)))
    make_console().print(table)
