"""Timing configurations of kernels, when asked to, and remembering the fastest.

Launchers choose blocks and warps by heuristics (``launchers/``). ``tune(function, *args)`` runs a
function on this GPU and times, for each launch in it that has a choice, the configurations around
the heuristic's; the fastest is what launches of the kernel take from then on, for sizes of the same
class, in the same dtype, on GPUs of the same architecture. ``save`` writes what is remembered to a
file and ``load`` reads one. Unless one of these is called, nothing is tuned or read.

Candidates run on copies of the launch's tensors, never on those of the call: the results of the
function are what they are without tuning. A launch that changes what it reads (it would accumulate,
or write over an operand) is no candidate: launchers give such a launch no problem, and one that
leaves other bits on its copies when it is made twice is left out here as well.

Softmax, norms, losses of classes and of rows, and reductions have a choice. The others have none:
tiles of products and of attention are tables by architecture, dtype and size in their launchers,
and pointwise kernels read 16 bytes a thread in any configuration.
"""

from __future__ import annotations

import itertools
import json
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import recall, runtime
from .launchers.configurations import (
    MOST_BLOCK,
    TABLES,
    Chosen,
    Configuration,
    Problem,
    architecture,
    forget_plans,
)

__all__ = ["Choice", "Tuned", "load", "reset", "save", "tune"]

FORMAT = 1
MOST_WARPS = 16
"""Of 64 threads each on AMD, where a program has 1024 at most."""
GAIN = 0.02
"""Part of its time that another configuration must save to be taken: less is noise."""

Timer = Callable[[Callable[[], None]], float]
_lock = threading.Lock()


@dataclass(frozen=True)
class Choice:
    """What was measured of one problem.

    Attributes:
        problem: kernel, size class and dtype.
        before: the configuration until now.
        times: milliseconds of each configuration that could be launched. Empty if the launch is no
            candidate, because made twice it left other numbers than made once.
    """

    problem: Problem
    before: Configuration
    times: dict[Configuration, float] = field(default_factory=dict)

    @property
    def excluded(self) -> bool:
        """Whether the launch is none that may be tuned."""
        return not self.times

    @property
    def fastest(self) -> Configuration:
        """The configuration to take."""
        if not self.times:
            return self.before
        found = min(self.times, key=self.times.__getitem__)
        enough = self.times[found] < (1 - GAIN) * self.times[self.before]
        return found if enough else self.before


class Tuned(list[Choice]):
    """What ``tune`` measured, one ``Choice`` for each problem. As text, a table."""

    def __str__(self) -> str:
        lines = [f"{len(self)} kernels tuned"]
        for choice in self:
            p = choice.problem
            name = f"{p.kernel} {p.function}".strip()
            line = f"  {name:<40} {p.rows} x {p.columns}, {p.itemsize} bytes: "
            if choice.excluded:
                lines.append(line + "left out, it changes what it reads")
                continue
            before, after = (choice.times[c] for c in (choice.before, choice.fastest))
            change = f"{tuple(choice.before)} {before:.4f} ms"
            if choice.fastest != choice.before:
                change += f" -> {tuple(choice.fastest)} {after:.4f} ms"
            lines.append(line + change)
        return "\n".join(lines)


def tune(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Tuned:
    """Run ``function(*args, **kwargs)`` once, and time configurations of the kernels it launches.

    Those of backward passes are among them if the function makes one. Each problem is measured
    once: what was tuned before is measured again, around the configuration it has now. Launches of
    other threads meanwhile count as the function's. While kernels are timed there are up to three
    copies of one launch's tensors in memory.

    Returns:
        what was measured. It is remembered already.

    Raises:
        RuntimeError: no GPU, or a stream that is being captured.
    """
    if runtime.INTERPRETED:
        raise RuntimeError(
            "tritongrad.tune times kernels on a GPU, and here they run in Triton's interpreter"
        )
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tritongrad.tune inside a CUDA graph capture: tune before capturing")
    from triton.testing import do_bench

    def timer(run: Callable[[], None]) -> float:
        milliseconds: float = do_bench(run, warmup=5, rep=25, return_mode="median")
        return milliseconds

    return tune_by(timer, lambda: function(*args, **kwargs))


def tune_by(timer: Timer, run: Callable[[], Any]) -> Tuned:
    """``tune`` by another clock."""
    tuned = Tuned()
    seen: set[Problem] = set()
    failed: list[BaseException] = []

    def observe(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: Any) -> None:
        if type(meta) is not Chosen or meta.problem in seen or failed:
            return
        seen.add(meta.problem)
        tensor = next(_tensors(args))
        with torch.cuda.device_of(tensor):
            choice = measure(timer, kernel, grid, args, meta)
        tuned.append(choice)
        if not choice.excluded:
            name = architecture(tensor.get_device())
            TABLES.setdefault(name, {})[choice.problem] = choice.fastest

    with _lock:
        try:
            with runtime.observe(observe):
                run()
        finally:
            _forget()
    return tuned


def measure(
    timer: Timer, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: Chosen
) -> Choice:
    """Time a launch in each configuration that it may have."""
    copies: dict[Any, Tensor] = {}
    own = _copied(args, copies)
    if not _changes_nothing(kernel, grid, own, meta, list(copies.values())):
        return Choice(meta.problem, meta.configuration)
    times: dict[Configuration, float] = {}
    for candidate in candidates(meta):
        other_grid, constants = meta.build(candidate)

        def launch(grid: tuple[int, ...] = other_grid, constants: Any = constants) -> None:
            runtime._run(kernel, grid, own, constants)

        try:
            launch()
        except Exception as problem:
            if type(problem).__name__ != "OutOfResources":
                raise
            continue  # Triton says so of one that does not fit the GPU
        times[candidate] = timer(launch)
    return Choice(meta.problem, meta.configuration, times)


def candidates(meta: Chosen) -> list[Configuration]:
    """The configuration that a launch has, and those of half and of twice its parts, as far as they
    are parts of the problem, and no thread gets more than twice as many numbers."""
    now, problem = meta.configuration, meta.problem

    def around(part: str, most: int) -> list[int]:
        value: int = getattr(now, part)
        if part not in meta.parts:
            return [value]
        return [n for n in (value, value // 2, 2 * value) if n == value or 1 <= n <= most]

    choices = itertools.product(
        around("rows", problem.rows), around("columns", problem.columns),
        around("warps", MOST_WARPS),
    )  # fmt: skip
    share = now.rows * now.columns / now.warps
    found = [Configuration(*c) for c in choices]
    return [
        c
        for c in found
        if c == now
        or (
            c.rows * c.columns <= MOST_BLOCK
            and share / 4 <= c.rows * c.columns / c.warps <= 2 * share
        )
    ]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def _copied(value: Any, copies: dict[Any, Tensor]) -> Any:
    """A launch's arguments with memory of their own, as far into a 16-byte word as theirs, and the
    same for those that are the same."""
    if isinstance(value, tuple):
        return tuple([_copied(part, copies) for part in value])
    if not isinstance(value, Tensor):
        return value
    key = value.data_ptr(), value.shape, value.stride(), value.dtype
    if key not in copies:
        copies[key] = _copy(value)
    return copies[key]


def _copy(tensor: Tensor) -> Tensor:
    if not tensor.numel():
        return tensor
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    extent = 1 + sum((n - 1) * s for n, s in steps)
    into = tensor.data_ptr() % 16 // tensor.itemsize
    room = tensor.new_empty(into + extent)
    room[into:] = tensor.detach().as_strided((extent,), (1,))
    return room.as_strided(tensor.shape, tensor.stride(), into)


def _changes_nothing(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: Chosen, copies: list[Tensor]
) -> bool:
    """Whether a launch leaves the same bits when it is made twice as when it is made once."""
    bits = [_bits(t) for t in copies]
    runtime._run(kernel, grid, args, meta)
    once = [b.clone() for b in bits]
    runtime._run(kernel, grid, args, meta)
    return all(torch.equal(a, b) for a, b in zip(bits, once, strict=True))


def _bits(tensor: Tensor) -> Tensor:
    """The memory of a tensor."""
    return tensor.new_empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _forget() -> None:
    """What was planned in other configurations, and what calls were read as with those plans."""
    forget_plans()
    recall.forget()


def save(path: str | Path) -> None:
    """Write all configurations that are remembered, of all architectures, as JSON."""
    rows = {
        name: [{**problem._asdict(), "configuration": list(c)} for problem, c in table.items()]
        for name, table in TABLES.items()
    }
    document = {"format": FORMAT, "architectures": rows}
    Path(path).write_text(json.dumps(document, indent=1) + "\n")


def load(path: str | Path) -> int:
    """Remember the configurations of a file that ``save`` wrote. Those of other architectures than
    this GPU's are kept, and not used. Returns how many there are.

    Raises:
        ValueError: it is no such file.
    """
    found: dict[str, dict[Problem, Configuration]] = {}
    try:
        document = json.loads(Path(path).read_text())
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']}")
        for name, rows in document["architectures"].items():
            table = found[str(name)] = {}
            for row in rows:
                configuration = Configuration(*row.pop("configuration"))
                problem = Problem(**row)
                _check(problem, configuration)
                table[problem] = configuration
    except (KeyError, TypeError, AttributeError, ValueError) as problem_found:
        raise ValueError(
            f"{path} is no table of configurations: {problem_found}"
        ) from problem_found
    for name, table in found.items():
        TABLES.setdefault(name, {}).update(table)
    _forget()
    return sum(map(len, found.values()))


def _check(problem: Problem, configuration: Configuration) -> None:
    texts, numbers = problem[:2], (*problem[2:], *configuration)
    if not all(type(t) is str for t in texts) or not all(type(n) is int for n in numbers):
        raise ValueError(f"{(*problem, *configuration)}")
    for number in configuration:
        if number < 1 or math.log2(number) % 1:
            raise ValueError(f"{configuration} has a number that is no power of two")
    if configuration.warps > MOST_WARPS:
        raise ValueError(f"{configuration} has more than {MOST_WARPS} warps")
    if configuration.rows * configuration.columns > MOST_BLOCK:
        raise ValueError(f"{configuration} has a block of more than {MOST_BLOCK} elements")


def reset() -> None:
    """Forget all configurations: heuristics alone decide again."""
    TABLES.clear()
    _forget()
