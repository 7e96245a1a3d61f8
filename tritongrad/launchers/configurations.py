"""In which configuration a kernel is launched: rows and columns of a block, and warps.

A launcher says what problem a launch solves, which configuration its heuristic takes, which parts
of that may be others, and what the launch is in each. What was measured on the architecture at hand
(``tritongrad.tuning``) stands in the heuristic's place. Nothing is measured here.

Only launches that do not read what they write are given a problem: made again they change nothing,
so that they can be timed. Those that go on from what an earlier one left (a further piece of a
linear loss), or that write over an operand (``inplace_grad``), have none, and what is measured is
tried on copies before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from ..layout import next_power_of_two
from ..runtime import INTERPRETED

Grid = tuple[int, ...]

ROWS, COLUMNS, WARPS = (
    frozenset(("rows", "warps")),
    frozenset(("columns", "warps")),
    frozenset(("warps",)),
)
BLOCK = ROWS | COLUMNS
"""Parts of a configuration that a launcher may let differ from what its heuristic says."""

MOST_BLOCK = 2**16
"""Elements of a block, so that launchers know how far past the end a program may count."""


class Configuration(NamedTuple):
    """Rows and columns of a program's block, and its warps. All are powers of two."""

    rows: int
    columns: int
    warps: int


class Problem(NamedTuple):
    """What a configuration is for.

    Attributes:
        kernel: name of the kernel.
        function: names of the device functions that it is made of.
        rows, columns: the next powers of two, of which the sizes are a class.
        operands: how many tensors it reads.
        itemsize: bytes of an element of what it reads.
    """

    kernel: str
    function: str
    rows: int
    columns: int
    operands: int
    itemsize: int


Build = Callable[[Configuration], tuple[Grid, dict[str, Any]]]


class Chosen(dict[str, Any]):
    """The constexprs of a launch that may be tuned.

    Attributes:
        problem, configuration: what they are for, and were made from.
        parts: of the configuration, that may differ.
        build: the grid and the constexprs of another configuration.
    """

    __slots__ = ("build", "configuration", "parts", "problem")

    def __init__(
        self,
        meta: dict[str, Any],
        problem: Problem,
        configuration: Configuration,
        parts: frozenset[str],
        build: Build,
    ) -> None:
        super().__init__(meta)
        self.problem, self.configuration = problem, configuration
        self.parts, self.build = parts, build


Table = dict[Problem, Configuration]

TABLES: dict[str, Table] = {}
"""Architecture -> problem -> what was measured to be the fastest. Empty until somebody tunes, or
loads what was tuned."""

_plans: list[Callable[[], None]] = []


def planned(function: Callable[..., Any]) -> Any:
    """``lru_cache`` for what depends on ``TABLES``."""
    cached = lru_cache(maxsize=4096)(function)
    _plans.append(cached.cache_clear)
    return cached


def forget_plans() -> None:
    """After a change of ``TABLES``: what was planned before is not used again."""
    for clear in _plans:
        clear()


@cache
def compute_capability() -> tuple[int, int]:
    """Of the CUDA GPU at hand; (0, 0) without one. Asked at the first launch, not at import: asking
    initialises CUDA."""
    if torch.version.hip or not torch.cuda.is_available():
        return 0, 0
    return torch.cuda.get_device_capability()


@cache
def architecture(device: int) -> str:
    """Of a GPU, as its vendor names it: ``sm_90``, ``gfx942``."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def problem_of(
    kernel: str, functions: tuple[Any, ...], sizes: tuple[int, int], operands: int, itemsize: int
) -> Problem:
    """The problem of a launch over so many rows and columns."""
    names = ".".join([getattr(f, "__name__", str(f)) for f in functions if f is not None])
    rows, columns = (next_power_of_two(max(n, 1)) for n in sizes)
    return Problem(kernel, names, rows, columns, operands, itemsize)


def choose(
    device: int, problem: Problem, default: Configuration, parts: frozenset[str], build: Build
) -> tuple[Grid, Chosen]:
    """The grid and the constexprs of a launch, in the configuration that was measured to be the
    fastest, else in the one that the launcher's heuristic takes."""
    found = default
    measured = TABLES.get(architecture(device), {}).get(problem)
    if measured is not None:
        found = default._replace(**{part: getattr(measured, part) for part in parts})
    grid, meta = build(found)
    return grid, Chosen(meta, problem, found, parts, build)
