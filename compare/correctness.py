"""``compare``: the document's examples and every op, on our kernels and on torch, in one table.

Errors are multiples of the dtype's tolerance: 1 is the limit. A row fails too where part of it ran
on torch without saying so, or launched no kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tritongrad.op import OPS

from . import document, parity
from .measure import QUANTITIES, TOLERANCES, Errors
from .plant import plant
from .terminal import (
    add_json_option,
    choose,
    dtype_name,
    make_console,
    plural,
    tracked,
    write_json,
)

SHOWN = 3
"""Problems of one row that the table has room for; the JSON has all."""


@dataclass(frozen=True)
class Row:
    """An example of the document, or an op, and how it compares."""

    kind: str
    name: str
    errors: Errors

    @property
    def facts(self) -> dict[str, Any]:
        """The row for JSON."""
        passed = self.errors.passed
        return {"kind": self.kind, "name": self.name, "passed": passed, **vars(self.errors)}


def check(kind: str, name: str) -> Row:
    """The row of the example or op of this name. Whatever is raised on the way is a problem."""
    try:
        if kind == "example":
            errors = document.check(document.EXAMPLES[name])
        else:
            errors = parity.check_all(OPS[name])
    except Exception as problem:
        errors = Errors(problems=[f"{type(problem).__name__}: {problem}"])
    return Row(kind, name, errors)


def present(rows: Sequence[Row], console: Console) -> None:
    """Print the table and what it rests on."""
    table = Table(title="errors in tolerances")
    table.add_column("example or op", no_wrap=True)
    for heading in ("forward", "gradient", "second order", "jvp", "kernels fwd", "kernels bwd"):
        table.add_column(heading, justify="right")
    table.add_column("fell back to torch", overflow="fold")
    table.add_column("verdict", overflow="fold")
    for kind, group in itertools.groupby(rows, key=lambda row: row.kind):
        table.add_section()
        for row in group:
            table.add_row(f"{kind} {row.name}", *_cells(row.errors))
    console.print(table)
    if any(row.kind == "example" for row in rows):
        console.print(document.FOOTNOTE, markup=False, highlight=False)
    tolerances = "; ".join(
        f"{dtype_name(d)} {TOLERANCES[d].absolute:g} + {TOLERANCES[d].relative:g} |torch's|"
        for d in parity.DTYPES
    )
    console.print(f"Tolerances: {tolerances}.", markup=False, highlight=False)
    console.print("Kernels: launched by all samples, or all seeds, together.", highlight=False)
    failed = sum(not row.errors.passed for row in rows)
    console.print(f"{plural(len(rows), 'row')}, {failed} failed")


def _cells(errors: Errors) -> list[str]:
    fell_back = [f"{what} ({count})" for what, count in errors.fell_back.items()]
    return [
        *[_number(getattr(errors, quantity)) for quantity in QUANTITIES],
        str(errors.forward_kernels),
        str(errors.backward_kernels),
        escape("\n".join(fell_back)),
        _verdict(errors),
    ]


def _number(error: float | None) -> str:
    if error is None:
        return "–"
    return f"{error:.2g}" if error <= 1.0 else f"[red]{error:.2g}[/]"


def _verdict(errors: Errors) -> str:
    if errors.passed:
        return "[green]ok[/]"
    lines = errors.problems[:SHOWN]
    if len(errors.problems) > SHOWN:
        lines.append(f"and {len(errors.problems) - SHOWN} more")
    return "\n".join(["[red]FAILED[/]", *map(escape, lines)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 1 where anything differs from torch, or ran on it unasked."""
    parser = argparse.ArgumentParser(prog="compare", description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="an example or an op")
    parser.add_argument(
        "--plant", action="store_true", help="break a kernel on purpose: this must be reported"
    )
    add_json_option(parser)
    options = parser.parse_args(arguments)
    known = [("example", name) for name in document.EXAMPLES] + [("op", name) for name in OPS]
    wanted = choose(parser, options.only, dict.fromkeys(name for _, name in known))

    console = make_console()
    chosen = [(kind, name) for kind, name in known if name in wanted]
    with plant() if options.plant else contextlib.nullcontext():
        rows = [check(kind, name) for kind, name in tracked(chosen, "comparing", console)]
    present(rows, console)
    if options.json is not None:
        write_json(options.json, [row.facts for row in rows])
    return 0 if all(row.errors.passed for row in rows) else 1
