"""``compare gpu``: all that waits for a GPU, in one command.

The tests, where the interpreter was less strict than a GPU is; the tests of hazards watched by
compute-sanitizer; the suites of ``compare bench``, as far as time goes; and what is made of their
results. A step that fails is told of, and the next one begins. What was measured is not measured
again, so that the same command goes on where it was cut short.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from . import sanitize
from .bench import NO_GPU, why_no_gpu
from .terminal import add_json_option, write_json

PARTS = {"peers": 8, "full": 40}
"""Suite -> parts that it is measured in."""

MINUTES = 60.0

COMPARE = (sys.executable, "-m", "tritongrad.compare")
README = sanitize.TESTS.parent / "README.md"


class Step(NamedTuple):
    """A command.

    Attributes:
        optional: left out when the time is up.
    """

    name: str
    command: tuple[str, ...]
    optional: bool = False


def steps(workers: int) -> Iterator[Step]:
    """What is done, in the order of how much rests on it."""
    tests = ("-m", "pytest", str(sanitize.TESTS), "-n", str(workers))
    yield Step("tests", (sys.executable, *tests))
    yield Step("sanitize", (*COMPARE, "sanitize"))
    for suite in ("quick", "host", "cold"):
        yield Step(f"bench {suite}", (*COMPARE, "bench", "--suite", suite))
    for suite, parts in PARTS.items():
        for part in range(1, parts + 1):
            command = (*COMPARE, "bench", "--suite", suite, "--part", f"{part}/{parts}")
            yield Step(f"bench {suite} {part}/{parts}", command, optional=True)
    yield Step("report", (*COMPARE, "report"))
    yield Step("README's section", (*COMPARE, "report", "--write", str(README)))
    yield Step("policy's table", (*COMPARE, "report", "--table"))


def run(
    planned: Sequence[Step],
    minutes: float,
    call: Callable[[Sequence[str]], int],
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, str]:
    """Take the steps. Answers of each what came of it."""
    start = clock()
    told = {}
    for step in planned:
        if step.optional and clock() - start > 60 * minutes:
            told[step.name] = "not begun when the time was up"
            continue
        print(f"--- {step.name}: {shlex.join(step.command)}", flush=True)
        status = call(step.command)
        told[step.name] = "done" if status == 0 else f"ended with status {status}"
    return told


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 1 where a step failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="compare gpu", description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=MINUTES,
        help=f"after which no part of the suites full and peers is begun ({MINUTES:g})",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=4, help="processes that test at once (4)")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    why = why_no_gpu()
    if why is not None:
        print(NO_GPU.format(command="compare gpu", why=why), file=sys.stderr)
        return 2

    def call(command: Sequence[str]) -> int:
        return subprocess.run(command, check=False).returncode

    told = run(list(steps(options.workers)), options.minutes, call)
    print()
    for name, what in told.items():
        print(f"{name}: {what}")
    if options.json is not None:
        write_json(options.json, told)
    return int(any(what.startswith("ended") for what in told.values()))
