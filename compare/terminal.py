"""What every part of compare prints with: a console, progress on terminals only, JSON files."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def make_console() -> Console:
    """The console that tables go to."""
    # Not a terminal (a log, a file): wide enough that no signature is cut into pieces.
    return Console(width=None if sys.stdout.isatty() else 160)


def tracked(
    items: Iterable[T], doing: str, console: Console, total: float | None = None
) -> Iterable[T]:
    """``items``, with a progress bar while they are consumed if ``console`` is a terminal."""
    quiet = not console.is_terminal
    return track(items, doing, total, console=console, disable=quiet, transient=True)


def plural(count: int, noun: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """``--json FILE``, the same in every command."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row there")


def write_json(path: Path, value: Any) -> None:
    """Write ``value``; NaN and infinities, which JSON lacks, as strings."""
    path.write_text(json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def choose(
    parser: argparse.ArgumentParser, wanted: Sequence[str] | None, known: Iterable[str]
) -> list[str]:
    """The names to work on: those of ``--only``, in the order of ``known``, or all.

    A name that is not known ends the program with status 2 and the nearest ones.
    """
    known = list(known)
    for name in wanted or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
            parser.error(f"argument --only: no example or op is named {name!r}; {hint}")
    return [name for name in known if not wanted or name in wanted]
