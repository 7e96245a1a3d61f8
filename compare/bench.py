"""``compare bench``: every op on a GPU, beside torch and other libraries, against the GPU's limits.

A worker process times one op at a time and tells of each row as it comes; this process writes them
down. So what takes the worker down costs one row, which says so, and what was measured before a run
was cut short is not measured again: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tritongrad import runtime
from tritongrad.op import OPS, Op

from . import cold, peers, timing, workloads
from .phases import PHASES
from .results import STATUSES, Log, Row, environment, read
from .tasks import DTYPES, Task, crashed, remaining
from .terminal import add_json_option, choose, make_console, plural, write_json
from .worker import GRACE, Gone, Worker, compile_ahead, serve


@dataclass(frozen=True)
class Suite:
    """What is measured together.

    Attributes:
        sizes: names of sizes; with ``rows``, functions of rows have further ones.
        seconds: about how long each phase of a task is timed for.
        budget: seconds after which no task is begun; GRACE later, one that is not done is cut off.
    """

    about: str
    sizes: tuple[str, ...]
    dtypes: tuple[str, ...]
    phases: tuple[str, ...]
    implementations: tuple[str, ...]
    seconds: float
    budget: float
    rows: bool = False


TORCH = (peers.EAGER, *peers.COMPILED)
HALVES = ("bfloat16", "float16")

SUITES = {
    "quick": Suite(
        "every op beside eager torch, in the cache and out of it",
        workloads.QUICK, HALVES[:1], ("forward", "backward"), (peers.OURS, peers.EAGER), 0.06, 210,
    ),
    "full": Suite(
        "every op, size, dtype and derivative beside torch, eager and compiled",
        tuple(workloads.SIZES), (*HALVES, "float32"), PHASES, (peers.OURS, *TORCH), 0.3, 510,
        rows=True,
    ),
    "peers": Suite(
        "beside the libraries that are installed",
        ("2^16", "2^20", "2^24", "2^26", "2^28"), HALVES[:1], PHASES[:3],
        (peers.OURS, *TORCH, *peers.PEERS), 0.3, 510, rows=True,
    ),
    "host": Suite(
        "where the host's time is all: the smallest size",
        ("2^7",), ("float32",), PHASES, (peers.OURS, *TORCH[:2]), 0.1, 210,
    ),
    "cold": Suite(
        "the first call of a process, without and with compiled kernels on disk",
        ("2^20",), HALVES[:1], ("both",), (peers.OURS, TORCH[1]), 0.0, 510,
    ),
}  # fmt: skip

INSTEAD: dict[str, tuple[str, Sequence[str]]] = {
    "size": ("sizes", (*workloads.SIZES, *workloads.ROWS)),
    "dtype": ("dtypes", tuple(DTYPES)),
    "phase": ("phases", PHASES),
    "beside": ("implementations", (*TORCH, *peers.PEERS)),
}
"""Option -> the field of the suite that it gives, and what it may be."""

NO_GPU = """\
{command} needs a GPU, and {why}. Without one:
  python -m compare           correctness of every op, in Triton's interpreter
  python -m compare static    registers, spills, 16-byte loads, tensor cores, compiled for four GPUs
  python -m compare host      what a call costs beside its kernels
On a machine with a GPU: python -m compare bench --suite quick; then python -m compare report;
or all of it, tests first: python -m compare gpu"""


def plan(
    suite: str,
    names: Sequence[str],
    sizes: dict[str, workloads.Size],
    instead: dict[str, Any] | None = None,
) -> Iterator[Task]:
    """The tasks of a suite for these ops, in the order in which they are done. ``instead`` are
    fields of the suite to be others, of which sizes are then all there are."""
    about = replace(SUITES[suite], **(instead or {}))
    if instead and "sizes" in instead:
        about = replace(about, rows=False)
    # Where the budget may not be enough, each op at its first size before any at its second;
    # else all of one op together, whose kernels are compiled once.
    order: Iterator[tuple[str, str]] = (
        ((op, size) for size in about.sizes for op in names)
        if suite == "quick"
        else itertools.product(names, about.sizes + tuple(workloads.ROWS) * about.rows)
    )
    for name, size in order:
        op = OPS[name]
        if size in workloads.ROWS and not _has_rows(op):
            continue
        implementations = tuple(i for i in about.implementations if _might(i, op))
        if suite == "peers" and not set(implementations) & set(peers.PEERS):
            continue
        for dtype in about.dtypes:
            yield Task(suite, name, size, dtype, about.phases, implementations, about.seconds)


def _has_rows(op: Op) -> bool:
    try:
        return workloads.recipe(op).kind == "rows"
    except workloads.Unscalable:
        return False


def _might(implementation: str, op: Op) -> bool:
    """Whether a peer has a function for this op; of one that is not installed nobody knows."""
    if implementation not in peers.PEERS:
        return True
    try:
        peers.resolve(implementation, op)
    except peers.Absent as problem:
        return implementation in peers.LIBRARIES and "not installed" in str(problem)
    except Exception:  # one that cannot be imported: the worker says why
        return True
    return True


@dataclass
class Run:
    """A run of a suite.

    Attributes:
        sizes: of what the floor is measured with.
    """

    suite: str
    planned: Sequence[Task]
    worker: Worker
    log: Log
    console: Console
    budget: float
    clock: Callable[[], float] = time.monotonic
    sizes: dict[str, int] = field(default_factory=dict)
    left: int = 0
    _floor: Any = None

    def work(self) -> None:
        """Do the tasks that are not done, until the budget is spent; ``left`` says how many are not
        begun.

        Raises:
            Gone: no worker can be started.
        """
        start = self.clock()
        done = self.log.done(self.suite)
        tasks_left = [t for task in self.planned if (t := remaining(task, done)) is not None]
        for position, task in enumerate(tasks_left):
            if self.clock() - start > self.budget or not self._do(task, start):
                self.left = len(tasks_left) - position
                return

    def _do(self, task: Task, start: float) -> bool:
        """One task, again without what took the worker down until it is done. Answers whether there
        was time for all of it."""
        while True:
            self._ensure_worker()
            at = next(pair for pair in task.pairs if pair not in task.skip)
            try:
                for message in self.worker.ask(asdict(task), self._until(start)):
                    if "at" in message:
                        at = (message["at"][0], message["at"][1])
                    else:
                        rows = [Row(**row) for row in message["rows"]]
                        self._write(rows)
                        task = replace(
                            task, skip=task.skip + tuple((r.phase, r.implementation) for r in rows)
                        )
                return True
            except Gone as problem:
                self.worker.stop()
                if self._until(start) <= 0:
                    return False
                if at not in task.skip:
                    self._write([crashed(task, at, str(problem))])
                    task = replace(task, skip=(*task.skip, at))
            if set(task.skip) >= set(task.pairs):
                return True

    def _until(self, start: float) -> float:
        """Seconds until what is under way is cut off."""
        return start + self.budget + GRACE - self.clock()

    def _ensure_worker(self) -> None:
        if self.worker.running:
            return
        self.worker.start()
        if self._floor is not None:
            list(self.worker.ask({"floor": self._floor}))
            return
        wanted = sorted({task.dtype for task in self.planned})
        request = {"measure_floor": wanted, "suite": self.suite, "sizes": self.sizes}
        for message in self.worker.ask(request):
            if "floor" in message:
                self._floor = message["floor"]
            else:
                self._write([Row(**row) for row in message["rows"]])

    def _write(self, rows: Sequence[Row]) -> None:
        self.log.append(rows)
        for row in rows:
            self.console.print(line(row), markup=False, highlight=False)


def line(row: Row) -> str:
    """A row for whoever watches."""
    what = f"{row.op} {row.case} {row.dtype} {row.phase}, {row.implementation}: "
    if row.status != "ok":
        return f"{what}{row.status}: {row.note}"
    if row.cold_s is not None:
        return f"{what}first call {row.cold_s:.2f} s, with compiled kernels {row.warm_s:.2f} s"
    fraction = "" if row.fraction is None else f", {row.fraction:.2f} of the floor"
    return f"{what}{row.device_us:.1f} us on the device, {row.host_us:.1f} on the host{fraction}"


WORKER = (sys.executable, "-m", "tritongrad.compare", "bench", "--worker")


def part_of(text: str) -> tuple[int, int]:
    """``2/5`` as a pair."""
    first, _, last = text.partition("/")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"expected I/N with 1 <= I <= N, got {text!r}")
    return int(first), int(last)


def why_no_gpu() -> str | None:
    """Why kernels do not run on a GPU here; None if they do."""
    if not torch.cuda.is_available():
        return "torch sees none here"
    if runtime.INTERPRETED:
        return "TRITON_INTERPRET is set, so that kernels are interpreted"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 1 where ours was refused, failed or crashed, 2 without a GPU."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="compare bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    suites = "\n".join(f"{name}: {suite.about}" for name, suite in SUITES.items())
    parser.add_argument("--suite", choices=SUITES, default="quick", help=suites)
    parser.add_argument("--only", action="append", metavar="OP", help="an op")
    parser.add_argument(
        "--part", type=part_of, default=(1, 1), metavar="I/N", help="one of N parts"
    )
    parser.add_argument("--budget", type=float, help="seconds after which no op is begun")
    for option, (name, choices) in INSTEAD.items():
        told = f"{name}, not the suite's, among {', '.join(choices)}"
        parser.add_argument(
            f"--{option}", action="append", choices=choices, metavar=option.upper(), help=told
        )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    add_json_option(parser)
    options = parser.parse_args(arguments)
    why = why_no_gpu()
    if why is not None:
        print(NO_GPU.format(command="compare bench", why=why), file=sys.stderr)
        return 2
    if options.worker:
        answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # compilers and tuners print on stdout; the answers must stay alone there
        serve(timing.Cuda(), sys.stdin, answers, workloads.SIZES | workloads.ROWS)
        return 0

    console = make_console()
    index, parts = options.part
    names = choose(parser, options.only, OPS)[index - 1 :: parts]
    command = shlex.join(["python", "-m", "compare", "bench", *arguments])
    about = environment(torch.cuda.get_device_name(), command)
    budget = SUITES[options.suite].budget if options.budget is None else options.budget
    start = time.monotonic()
    given = vars(options)
    instead = {name: tuple(given[o]) for o, (name, _) in INSTEAD.items() if given[o]}
    if "implementations" in instead:
        instead["implementations"] = (peers.OURS, *instead["implementations"])
    planned = list(plan(options.suite, names, workloads.SIZES | workloads.ROWS, instead))
    with contextlib.closing(Worker(WORKER)) as worker:
        work = Run(options.suite, planned, worker, Log.open(about), console, budget)
        if options.suite == "cold":
            cold.work(work, WORKER)
        else:
            if options.suite == "quick":
                workers = min(max((os.cpu_count() or 2) // 2, 1), 8)
                compile_ahead(planned, WORKER, workers, budget / 3)
            work.budget = max(budget - (time.monotonic() - start), 0.0)
            try:
                work.work()
            except Gone as problem:
                print(f"compare bench: {problem}", file=sys.stderr)
                return 1
    return summarise(work, options.json)


def summarise(run: Run, json: Path | None = None) -> int:
    """Say what came of a run. Returns the exit status."""
    wanted = {(task.op, task.case, task.dtype) for task in run.planned}
    rows = [
        row
        for row, _ in read(run.log.path)
        if row.suite == run.suite and (row.op, row.case, row.dtype) in wanted
    ]
    if json is not None:
        write_json(json, [asdict(row) for row in rows])
    counts = {status: sum(row.status == status for row in rows) for status in STATUSES}
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    run.console.print(f"{plural(len(rows), 'row')} in {run.log.path}: {told}")
    if run.left:
        run.console.print(
            f"{plural(run.left, 'task')} not begun when the time was up; the same command goes on"
        )
    bad = ("refused", "failed", "crashed")
    return int(any(r.implementation == peers.OURS and r.status in bad for r in rows))
