"""``compare static``: compile every kernel our ops use for GPUs that are not here.

Registers, spills, 16-byte accesses and tensor-core instructions decide most of a kernel's speed and
are all in the machine code, so they can be checked without a GPU. Two halves:

1. collect the specialisations that our ops use, without running a kernel (``specialisations.py``);
2. compile each for each target in worker processes (``disassembly.py``), and judge the result.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tritongrad.op import OPS

from . import baseline
from .disassembly import TARGETS, Code, Json, compile_all
from .specialisations import (
    Collection,
    Specialisation,
    cover,
    differing,
    make_job,
    own_sizes,
    sizes,
)
from .terminal import add_json_option, dtype_name, make_console, tracked, write_json

DTYPES = {dtype_name(d): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


@dataclass(frozen=True)
class Vector:
    """A kernel that must move aligned, dense data 16 bytes at a time, and why.

    Attributes:
        broadcasts: not each of its operands is dense.
        where: constants of the specialisations that must, others being for other layouts.
        tiled: tiles may be small, and shared by more threads where operands are many: those must
            that have 16 bytes for each.
    """

    reason: str
    loads: bool = True
    stores: bool = True
    broadcasts: bool = False
    where: Mapping[str, str] = field(default_factory=dict)
    tiled: bool = False


VECTORISED: dict[str, Vector] = {
    "pointwise_dense": Vector("it does nothing but move memory"),
    "pointwise_strided": Vector(
        "a broadcast bias must not make the large operand slow", broadcasts=True, tiled=True
    ),
    "dropout_dense": Vector("its random numbers take no longer than the memory, if that is wide"),
    # Not all of its launches store rows: some are for statistics alone.
    "norm_fwd": Vector("it reads and writes every row once", stores=False, broadcasts=True),
    "norm_bwd": Vector("as its forward", stores=False, broadcasts=True),
    "rowwise": Vector("it reads and writes every element once, and does little else"),
    "reduce": Vector("it does little but read", stores=False, tiled=True),
    "row_loss": Vector("as a reduction", stores=False, tiled=True),
}


@dataclass(frozen=True)
class Row:
    """One specialisation compiled for one target."""

    specialisation: int  # equal for the rows of one specialisation
    kernel: str
    ops: tuple[str, ...]
    constexprs: dict[str, str]
    target: str
    signature: str
    num_warps: int
    num_stages: int
    code: Code | None
    faults: tuple[str, ...]


def judge(number: int, specialisation: Specialisation, target: str, answer: Json) -> Row:
    """A worker's answer as a row, with what is wrong with it."""
    facts = {name: answer[name] for name in Code.__dataclass_fields__ if name in answer}
    code = Code(**facts) if facts else None
    return Row(
        specialisation=number,
        kernel=specialisation.kernel,
        ops=tuple(sorted(specialisation.ops)),
        constexprs=specialisation.constexprs,
        target=target,
        signature=answer.get("signature", ""),
        num_warps=answer.get("num_warps", 0),
        num_stages=answer.get("num_stages", 0),
        code=code,
        faults=(answer["error"],) if code is None else tuple(_faults(specialisation, target, code)),
    )


def _faults(specialisation: Specialisation, target: str, code: Code) -> Iterator[str]:
    if code.spill_bytes:
        yield f"spills {code.spill_bytes} bytes a thread"
    if code.shared_bytes > (limit := TARGETS[target].shared_limit):
        yield f"needs {code.shared_bytes} bytes of shared memory of {limit}"
    if code.serialised:
        yield "ptxas serialised its wgmma instructions"
    vector = VECTORISED.get(specialisation.kernel)
    # An AMD program of the same block has twice the threads, so half the bytes for each.
    if vector is None or not specialisation.vectorisable or TARGETS[target].backend != "cuda":
        return
    if code.wide_loads is None:  # no listing was read
        return
    if vector.where.items() - specialisation.constexprs.items():
        return
    if vector.tiled and not _fills_threads(specialisation):
        return
    # Nor has a thread 16 bytes of bools: of a comparison to store, or of a mask to load where that
    # is the one operand that is not broadcast.
    bools = "bool" in specialisation.dtypes
    if vector.loads and not code.wide_loads and not (bools and vector.broadcasts):
        yield f"no 16-byte load ({vector.reason})"
    if vector.stores and not code.wide_stores and not bools:
        yield f"no 16-byte store ({vector.reason})"


def _fills_threads(specialisation: Specialisation) -> bool:
    """Whether a tile has 16 bytes for each thread of four warps or more, and its rows have them."""
    meta = specialisation.description["meta"]
    size = min(getattr(torch, d).itemsize for d in specialisation.dtypes)
    row = size * meta["BLOCK_COLUMNS"]
    threads = 32 * max(meta.get("num_warps", 4), 4)
    return row >= 16 and row * meta["BLOCK_ROWS"] >= 16 * threads


def compile_for(
    wanted: Sequence[Specialisation],
    targets: Sequence[str],
    workers: int,
    console: Console,
    listing: bool = True,
) -> list[Row]:
    """Compile each for each target, and judge; without a ``listing`` of instructions in half the
    time, by resources alone."""
    triples = [(i, s, target) for i, s in enumerate(wanted) for target in targets]
    jobs = [make_job(s.description, target, listing) for _, s, target in triples]
    answers = dict(tracked(compile_all(jobs, workers), "compiling", console, len(jobs)))
    return [judge(*triple, answers[index]) for index, triple in enumerate(triples)]


def refused(
    wanted: Sequence[Specialisation], target: str, workers: int, console: Console
) -> list[str]:
    """What Triton's front end refuses, and why: a variable of two types, an absent operand that is
    read. That is a tenth of the work of compiling."""
    jobs = [make_job(s.description, target, None) for s in wanted]
    answers = dict(tracked(compile_all(jobs, workers), "reading", console, len(jobs)))
    return [
        f"{s.kernel} ({', '.join(sorted(s.ops))}): {answers[i]['error']}"
        for i, s in enumerate(wanted)
        if answers[i]
    ]


def present(rows: Sequence[Row], problems: Sequence[str], console: Console) -> None:
    """Print the rows, one table row for all targets of a specialisation, then what is wrong."""
    table = Table(show_lines=True)
    table.add_column("kernel, constants, arguments, ops", overflow="fold")
    table.add_column("target")
    for heading in ("warps", "regs", "spill", "shared", "ld128", "st128"):
        table.add_column(heading, justify="right")
    table.add_column("tensor core")
    for _, group in itertools.groupby(rows, key=lambda row: row.specialisation):
        compiled = list(group)
        cells = ("\n".join(column) for column in zip(*map(_line, compiled), strict=True))
        first = compiled[0]
        constants = " ".join(f"{name}={value}" for name, value in first.constexprs.items())
        signature = next((row.signature for row in compiled if row.code is not None), "")
        about = (f"[bold]{first.kernel}[/] {constants}", escape(signature), ", ".join(first.ops))
        table.add_row("\n".join(filter(None, about)), *cells)
    console.print(table)
    faulty: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        for fault in row.faults:
            faulty.setdefault((row.kernel, fault), []).append(row)
    for (kernel, fault), where in faulty.items():
        targets = ", ".join(dict.fromkeys(row.target for row in where))
        ops = ", ".join(sorted({op for row in where for op in row.ops}))
        console.print(f"{kernel}, {targets} ({ops}): {fault}", markup=False, style="red")
    for problem in problems:
        console.print(f"not collected: {problem}", markup=False, style="red")
    count = sum(bool(row.faults) for row in rows)
    console.print(f"{len(rows)} compiled, {count} with faults; {len(problems)} not collected")


def _line(row: Row) -> tuple[str, ...]:
    """The cells of one target."""
    code = row.code
    if code is None:
        return (f"[red]{row.target}[/]", *[""] * 6, "[red]does not compile[/]")
    return (
        f"[red]{row.target}[/]" if row.faults else row.target,
        str(row.num_warps),
        str(code.registers),
        str(code.spill_bytes),
        str(code.shared_bytes),
        str(code.wide_loads),
        str(code.wide_stores),
        " ".join(f"{count} {name}" for name, count in code.tensor_core.items()),
    )


def compare_with_table(options: argparse.Namespace, console: Console) -> int:
    """``--against`` and ``--table``, of all ops or of some."""
    names = options.only or list(OPS)
    collection = baseline.collect(OPS[name] for name in tracked(names, "collecting", console))
    for problem in collection.problems:
        console.print(f"not collected: {problem}", markup=False, style="red")
    compare = make_table if options.table is not None else compare_with
    return compare(collection, options, console) or int(bool(collection.problems))


def make_table(collection: Collection, options: argparse.Namespace, console: Console) -> int:
    """Write the table of what was collected. Of some ops: take its rows into the one there is."""
    path: Path = options.table
    old = baseline.read(path) if options.only and path.exists() else {}
    others = {kind: entry for kind, entry in old.items() if entry.op not in options.only}
    wanted = baseline.representatives(collection.specialisations, others)
    rows = compile_for(wanted, [baseline.TARGET], options.workers, console)
    pairs = [(s, row.code) for s, row in zip(wanted, rows, strict=True) if row.code is not None]
    made = baseline.tabulate(pairs)
    made |= {kind: made[kind]._replace(op=others[kind].op) for kind in made.keys() & others.keys()}
    baseline.write(others | made, path)
    console.print(f"{len(pairs)} of {len(wanted)} specialisations in {path}")
    return int(len(pairs) < len(wanted))


def compare_with(collection: Collection, options: argparse.Namespace, console: Console) -> int:
    """Compare what was collected with the table. Returns 1 where something got worse, the table is
    out of date, or it has no row of the ops that were asked for."""
    table = every = baseline.read(options.against)
    if options.only:
        table = {kind: entry for kind, entry in every.items() if entry.op in options.only}
    if not table:
        kinds = every.keys() & {baseline.kind_of(s) for s in collection.specialisations}
        others = sorted({every[kind].op for kind in kinds})
        console.print(f"nothing to compare: what they launch has its rows under {others}")
        return 1
    wanted = [
        s
        for s in collection.specialisations
        if (kind := baseline.kind_of(s)) in table and table[kind].name == baseline.name_of(s)
    ]
    rows = compile_for(wanted, [baseline.TARGET], options.workers, console)
    worse = 0
    for specialisation, row in zip(wanted, rows, strict=True):
        kind = baseline.kind_of(specialisation)
        for problem in baseline.regressions(table[kind], row.code):
            console.print(f"{kind}: {problem}", markup=False, style="red", soft_wrap=True)
            worse += 1
    # Some ops launch much of which the row is another's.
    stale = list(
        baseline.out_of_date(table, wanted if options.only else collection.specialisations)
    )
    for problem in stale:
        console.print(f"{problem}; make it anew with --table", markup=False, soft_wrap=True)
    console.print(f"{len(wanted)} compared, {worse} worse; {len(stale)} out of date")
    return int(bool(worse or stale))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 1 where a kernel does not compile, spills, or lost its vectors."""
    parser = argparse.ArgumentParser(prog="compare static", description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="an op or a kernel")
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    add_json_option(parser)
    parser.add_argument("--all", action="store_true", help="also what differs in alignment alone")
    parser.add_argument(
        "--front", action="store_true",
        help="whether Triton's front end takes each, in all dtypes and with each operand absent",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--against", type=Path, nargs="?", const=baseline.FILE, metavar="FILE",
        help="has anything got worse than in this table (compare/static-table.json)?",
    )  # fmt: skip
    parser.add_argument(
        "--table", type=Path, nargs="?", const=baseline.FILE, metavar="FILE", help="make the table"
    )
    options = parser.parse_args(arguments)

    console = make_console()
    if options.against is not None or options.table is not None:
        return compare_with_table(options, console)
    collection = Collection()
    few = DTYPES if options.front else ("float32", "bfloat16")
    dtypes = [DTYPES[name] for name in options.dtype or few]
    only = set(options.only or ())
    # A name that is no op is a kernel's, and any op may launch it.
    ops = [OPS[name] for name in only] if only and only <= OPS.keys() else list(OPS.values())
    for op in tracked(ops, "collecting", console):
        collection.add(op, dtypes, own_sizes if options.front else sizes)
    wanted = [s for s in collection.specialisations if not only or only & {s.kernel, *s.ops}]
    targets = options.target or list(TARGETS)
    if options.front:
        wanted = list(differing(wanted))
        problems = collection.problems + refused(wanted, targets[0], options.workers, console)
        for problem in problems:
            console.print(problem, markup=False, style="red")
        console.print(f"{len(wanted)} read, {len(problems)} refused or not collected")
        return 1 if problems else 0
    if not options.all:
        wanted = list(cover(wanted))
    rows = compile_for(wanted, targets, options.workers, console)
    present(rows, collection.problems, console)
    if options.json is not None:
        write_json(options.json, [asdict(row) for row in rows])
    return 1 if collection.problems or any(row.faults for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
