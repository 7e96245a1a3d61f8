"""``python -m compare tune FILE``: time configurations of kernels on this GPU, keep the fastest.

Each op, forward and backward, at the row lengths that users have (see ``ROWS`` in workloads.py), on
``tritongrad.tune``. ``tritongrad.tuning.load(FILE)`` takes what was found, on GPUs of the same
architecture.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritongrad import runtime, tuning
from tritongrad.op import OPS, Op, select

from .terminal import add_json_option, write_json
from .workloads import ROWS, SIZES, Size, Unscalable, at, recipe

KERNELS = frozenset(
    ("rowwise", "norm_fwd", "cross_entropy_fwd", "nll_loss_fwd", "row_loss", "reduce")
)
"""Launched in a configuration that may be tuned, or beside such in backward."""
DTYPES = ("bfloat16", "float32")


def calls(
    ops: Sequence[Op], sizes: Sequence[Size], dtypes: Sequence[torch.dtype], device: str
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is tuned, forward and backward, and what it is called."""
    for op in ops:
        try:
            how = recipe(op)
        except Unscalable as reason:
            print(f"{op.name}: {reason}", file=sys.stderr)
            continue
        for size in sizes:
            for dtype in dtypes:
                yield f"{op.name} {size.name} {dtype}", _call(op, how, size, dtype, device)


def _call(op: Op, how: Any, size: Size, dtype: torch.dtype, device: str) -> Callable[[], Any]:
    def run() -> None:
        sample = at(op, how, size, dtype, device)
        found = op(*sample.args, **sample.kwargs)
        for out in (found,) if isinstance(found, Tensor) else found:
            if out.requires_grad:
                out.backward(torch.randn_like(out), retain_graph=True)

    return run


def told(call: str, choice: tuning.Choice) -> dict[str, Any]:
    """A row of ``--json``."""
    times = [{"configuration": list(c), "ms": ms} for c, ms in choice.times.items()]
    taken = {"before": list(choice.before), "fastest": list(choice.fastest)}
    return {"call": call, **choice.problem._asdict(), **taken, "times": times}


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune. Returns the exit status: 2 where there is no GPU to tune for."""
    parser = argparse.ArgumentParser(prog="compare tune", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="JSON to write; added to if it is")
    parser.add_argument("--only", action="append", metavar="OP", help="an op")
    parser.add_argument("--size", action="append", choices=[*ROWS, *SIZES], help="default: ROWS")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default: both")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    try:
        names = select("--only", options.only or [n for n in OPS if KERNELS & {*OPS[n].kernels}])
    except ValueError as problem:
        parser.error(str(problem))
    if runtime.INTERPRETED:
        print("compare tune: no GPU was found, and an interpreter has no speed", file=sys.stderr)
        return 2
    if options.file.exists():
        tuning.load(options.file)
    sizes = [{**SIZES, **ROWS}[name] for name in options.size or ROWS]
    dtypes = [getattr(torch, name) for name in options.dtype or DTYPES]
    rows: list[dict[str, Any]] = []
    for name, run in calls([OPS[n] for n in sorted(names)], sizes, dtypes, "cuda"):
        try:
            tuned = tuning.tune(run)
            print(f"{name}: {tuned}", flush=True)
            rows += [told(name, choice) for choice in tuned]
        except (Unscalable, torch.OutOfMemoryError) as problem:
            print(f"{name}: {problem}", file=sys.stderr)
        tuning.save(options.file)  # each time: what was found is not lost to what comes after it
    if options.json is not None:
        write_json(options.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
