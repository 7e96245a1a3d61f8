"""``compare host``: what a call costs on the host, beside its kernels.

Launches do nothing, so what is left is ours: reading arguments, allocating, recording for backward.
The yardstick is the least that any op of its kind costs in Python, a ``torch.autograd.Function``
that clones and saves its input, timed in turns with the op, so that a busy machine slows both, and
in time of the processor, of which others take none.
Every path has its own: under a transform, the same function under the same transform.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tritongrad import runtime, use
from tritongrad.op import OPS, Op
from tritongrad.sampling import Random, Sample, tensors

from .launching import Launch
from .launching import measure as measure_launches
from .measure import DEVICE
from .terminal import add_json_option, choose, make_console, plural, tracked, write_json

Clock = Callable[[], float]
Call = Callable[[], Any]
Batch = Callable[[int], None]
"""Makes so many calls."""


class Bare(torch.autograd.Function):
    """The yardstick of eager calls."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class BareTransformable(torch.autograd.Function):
    """The yardstick of calls under ``torch.func``, which wants another form of Function."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


@dataclass(frozen=True)
class Path:
    """A way into an op.

    Attributes:
        limit: how many yardsticks it may cost, None where none is promised.
        calls: calls timed together.
    """

    title: str
    limit: float | None
    calls: int


PATHS = {
    "direct": Path("no gradient", 1.0, 50),
    "gradient": Path("with gradient", 2.0, 50),
    "mode": Path("with gradient, use()", None, 50),
    "vjp": Path("torch.func.vjp", None, 4),
    "vmap": Path("torch.vmap", None, 4),
}


@dataclass(frozen=True)
class Timing:
    """Host time of one op on one path; medians, in microseconds a call.

    Attributes:
        ratio: median of the quotients of neighbouring measurements, not quotient of the medians.
    """

    op: str
    path: str
    microseconds: float
    bare_microseconds: float
    ratio: float

    @property
    def exceeds(self) -> bool:
        limit = PATHS[self.path].limit
        return limit is not None and self.ratio > limit


def repeated(call: Call) -> Batch:
    """``call`` so many times."""

    def batch(count: int) -> None:
        for _ in range(count):
            call()

    return batch


def rerouted(call: Call) -> Batch:
    """``call`` so many times inside one ``use()``."""

    def batch(count: int) -> None:
        with use():
            for _ in range(count):
                call()

    return batch


def prepare(op: Op, path: str) -> tuple[Batch, Batch] | None:
    """The first sample of ``op`` on ``path``, and the yardstick; None if the op has no such path.

    Derivatives are with respect to what the sample has them of; batched are all of its
    floating-point tensors.
    """
    if op.samples is None or (path != "vmap" and path != "direct" and not op.differentiable):
        return None
    args, kwargs, _ = next(iter(op.samples(Random(torch.float32, DEVICE))))
    given = [t for t in tensors(Sample(args)) if t.is_floating_point()]
    plain = [t.detach() for t in given]

    def filled(new: Sequence[Tensor]) -> Any:
        values = iter(new)

        def replace(value: Any) -> Any:
            if isinstance(value, Tensor):
                return next(values) if value.is_floating_point() else value
            return type(value)(map(replace, value)) if type(value) in (list, tuple) else value

        return replace(args)

    def function(*tensors: Tensor) -> Any:
        found = op.entry(*filled(tensors), **kwargs)
        # torch.func.vjp takes no indices.
        return found if type(found) is Tensor else [t for t in found if t.is_floating_point()]

    if path == "vjp":
        wanted = [i for i, t in enumerate(given) if t.requires_grad] or list(range(len(given)))

        def of_wanted(*tensors: Tensor) -> Any:
            values = list(plain)
            for i, t in zip(wanted, tensors, strict=True):
                values[i] = t
            return function(*values)

        primals = [plain[i] for i in wanted]
        return (
            repeated(lambda: torch.func.vjp(of_wanted, *primals)),
            repeated(lambda: torch.func.vjp(BareTransformable.apply, plain[0])),
        )
    if path == "vmap":
        batched = [torch.stack([t, t]) for t in plain]
        ours = torch.vmap(function, randomness="different" if op.random else "error")
        bare = torch.vmap(BareTransformable.apply)
        return repeated(lambda: ours(*batched)), repeated(lambda: bare(batched[0]))
    copies = [t.clone(memory_format=torch.preserve_format) for t in plain]
    leaves = [c.requires_grad_(t.requires_grad) for c, t in zip(copies, given, strict=True)]
    entry = op.entry  # what tritongrad.mul is
    derived = next((t for t in leaves if t.requires_grad), leaves[0])
    yardstick = repeated(lambda: Bare.apply(derived))
    if path == "direct":
        # Nothing is recorded; the yardstick records, and that is the limit.
        values = filled(plain)
        return repeated(lambda: entry(*values, **kwargs)), yardstick
    values = filled(leaves)
    if path == "mode":
        return rerouted(lambda: op.replaces[0](*values, **kwargs)), yardstick
    return repeated(lambda: entry(*values, **kwargs)), yardstick


def measure(op: Op, path: str, repeats: int, clock: Clock = time.thread_time) -> Timing | None:
    """Time ``op`` on ``path`` and the yardstick in turns; None if the op has no such path."""
    batches = prepare(op, path)
    if batches is None:
        return None
    calls = PATHS[path].calls
    pairs: list[list[float]] = []
    with runtime.stub(), no_collection():
        for batch in batches:
            batch(calls)  # what is computed once is computed now
        for _ in range(repeats):
            seconds = []
            for batch in batches:
                start = clock()
                batch(calls)
                seconds.append((clock() - start) / calls)
            pairs.append(seconds)
    return Timing(
        op=op.name,
        path=path,
        microseconds=1e6 * statistics.median(ours for ours, _ in pairs),
        bare_microseconds=1e6 * statistics.median(bare for _, bare in pairs),
        ratio=statistics.median(ours / bare for ours, bare in pairs),
    )


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection inside: it would strike one side or the other by chance."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def present(timings: Sequence[Timing], console: Console) -> None:
    """Print one row for each op, and which ops are over a limit."""
    table = Table(title="host microseconds a call, and × the yardstick's")
    table.add_column("op")
    for path in PATHS.values():
        limit = "" if path.limit is None else f"\nat most {path.limit:g}×"
        table.add_column(path.title + limit, justify="right")
    for op, group in itertools.groupby(timings, key=lambda timing: timing.op):
        found = {timing.path: timing for timing in group}
        table.add_row(op, *(_cell(found.get(path)) for path in PATHS))
    console.print(table)
    for name, path in PATHS.items():
        bare = [timing.bare_microseconds for timing in timings if timing.path == name]
        if bare:
            yardstick = f"yardstick, {path.title}: {statistics.median(bare):.1f} us"
            console.print(yardstick, highlight=False)
    for name, path in PATHS.items():
        over = [f"{t.op} {t.ratio:.2f}×" for t in timings if t.path == name and t.exceeds]
        if over:
            console.print(f"over {path.limit:g}× {path.title}: {', '.join(over)}", style="red")
    count = sum(timing.exceeds for timing in timings)
    console.print(f"{plural(len(timings), 'timing')}, {count} over the limit")


def _cell(timing: Timing | None) -> str:
    if timing is None:
        return "–"
    text = f"{timing.microseconds:.1f}  {timing.ratio:.2f}×"
    return f"[red]{text}[/]" if timing.exceeds else text


def present_launches(launches: Sequence[Launch], console: Console) -> None:
    """Print what a launch of each kernel costs by itself."""
    table = Table(title="host microseconds a launch, without the driver's own")
    table.add_column("kernel")
    for heading in ("Triton", "tritongrad", "ratio"):
        table.add_column(heading, justify="right")
    for launch in launches:
        ratio = launch.ours / launch.triton
        table.add_row(launch.kernel, f"{launch.triton:.1f}", f"{launch.ours:.1f}", f"{ratio:.2f}")
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 0: a time depends on the machine, so none is a failure."""
    parser = argparse.ArgumentParser(prog="compare host", description=__doc__)
    parser.add_argument("--only", action="append", metavar="OP", help="an op")
    parser.add_argument("--repeats", type=int, default=51, help="measurements of each (51)")
    parser.add_argument(
        "--launch", action="store_true", help="also what launches cost, compiled for an H100"
    )
    add_json_option(parser)
    options = parser.parse_args(arguments)
    names = choose(parser, options.only, OPS)
    console = make_console()
    found = [
        measure(OPS[name], path, options.repeats)
        for name in tracked(names, "timing", console)
        for path in PATHS
    ]
    timings = [timing for timing in found if timing is not None]
    present(timings, console)
    rows = [asdict(t) | {"exceeds": t.exceeds} for t in timings]
    if options.launch:
        launches = measure_launches(names)
        present_launches(launches, console)
        rows += [asdict(launch) for launch in launches]
    if options.json is not None:
        write_json(options.json, rows)
    return 0
