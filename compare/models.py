"""``compare models``: small models trained on our kernels and on torch alone, step by step.

Each is a training loop that people write: unmodified torch code from the same seed.
Its loss curve under ``use()`` must be torch's, and no arithmetic may have run on torch: only views
and the creation of tensors may. The optimizer steps outside of ``use()``: its updates are in place.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tritongrad import use

from .attentive import ATTENTIVE
from .classifiers import CLASSIFIERS
from .measure import arithmetic_on_torch
from .networks import NETWORKS, Model
from .terminal import (
    add_json_option,
    choose,
    dtype_name,
    make_console,
    plural,
    tracked,
    write_json,
)

STEPS = 20
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Largest relative difference of a loss: the curves start from the same parameters."""

MODELS: dict[str, Model] = NETWORKS | CLASSIFIERS | ATTENTIVE


@dataclass
class Row:
    """How one model trained.

    Attributes:
        losses, torchs: after each step, on our kernels and on torch.
        fell_back: arithmetic that ran on torch under ``use()``.
        launches: Triton kernels launched.
    """

    model: str
    losses: list[float] = field(default_factory=list)
    torchs: list[float] = field(default_factory=list)
    fell_back: dict[str, int] = field(default_factory=dict)
    launches: int = 0
    problem: str = ""

    @property
    def difference(self) -> float:
        """The largest relative one."""
        pairs = zip(self.losses, self.torchs, strict=True)
        return max((abs(a - b) / abs(b) if a != b else 0.0 for a, b in pairs), default=0.0)

    @property
    def tolerance(self) -> float:
        """How large it may be."""
        return TOLERANCES[MODELS[self.model].dtype]

    @property
    def passed(self) -> bool:
        right = self.difference <= self.tolerance and self.launches > 0
        return right and not self.fell_back and not self.problem


def train(model: Model, row: Row | None) -> list[float]:
    """Loss before each of the steps; on our kernels, counted in ``row``, if there is one."""
    torch.manual_seed(0)
    parameters, loss_of = model.build()
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    losses = []
    for _ in range(STEPS):
        with nullcontext() if row is None else use() as session:
            loss = loss_of()
            optimizer.zero_grad()
            loss.backward()
        if row is not None and session is not None:
            row.launches += session.launches
            for what, count in arithmetic_on_torch(session).items():
                row.fell_back[what] = row.fell_back.get(what, 0) + count
        optimizer.step()
        losses.append(loss.item())
    return losses


def check(name: str) -> Row:
    """Train the model of this name twice. What is raised on the way is its problem."""
    row = Row(name)
    try:
        row.losses = train(MODELS[name], row)
        row.torchs = train(MODELS[name], None)
    except Exception as problem:
        row.problem = f"{type(problem).__name__}: {problem}"
    return row


def present(rows: Sequence[Row], console: Console) -> None:
    """Print the table."""
    table = Table(title=f"{STEPS} steps of training")
    table.add_column("model", no_wrap=True)
    table.add_column("asks for")
    table.add_column("dtype")
    for heading in ("first loss", "last loss", "relative difference", "limit", "kernels"):
        table.add_column(heading, justify="right")
    table.add_column("fell back to torch", overflow="fold")
    table.add_column("verdict", overflow="fold")
    for row in rows:
        model = MODELS[row.model]
        table.add_row(row.model, model.about, dtype_name(model.dtype), *_cells(row))
    console.print(table)
    failed = sum(not row.passed for row in rows)
    console.print(f"{plural(len(rows), 'model')}, {failed} failed")


def _cells(row: Row) -> Iterator[str]:
    yield f"{row.losses[0]:.6g}" if row.losses else "–"
    yield f"{row.losses[-1]:.6g}" if row.losses else "–"
    yield f"{row.difference:.1e}" if row.torchs else "–"
    yield f"{row.tolerance:g}"
    yield str(row.launches)
    yield escape("\n".join(f"{what} ({count})" for what, count in row.fell_back.items()))
    yield "[green]ok[/]" if row.passed else "\n".join(["[red]FAILED[/]", escape(row.problem)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 1 where a model trains otherwise than on torch."""
    parser = argparse.ArgumentParser(prog="compare models", description=__doc__)
    parser.add_argument("--only", action="append", metavar="MODEL", help="a model")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    names = choose(parser, options.only, MODELS)
    console = make_console()
    rows = [check(name) for name in tracked(names, "training", console)]
    present(rows, console)
    if options.json is not None:
        write_json(options.json, [asdict(row) | {"passed": row.passed} for row in rows])
    return 0 if all(row.passed for row in rows) else 1
