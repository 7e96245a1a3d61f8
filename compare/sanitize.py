"""``compare sanitize``: the tests of hazards on a GPU, each access to memory watched.

NVIDIA's compute-sanitizer runs the tests twice: memcheck sees an access that is outside of its
tensor or misaligned, racecheck threads of a program that meet in shared memory unsynchronised. Both
want a GPU, and slow kernels down many times.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .bench import why_no_gpu
from .terminal import add_json_option, write_json

TESTS = Path(__file__).parents[1] / "tests"
HAZARDS = ("test_hazards.py", "test_shapes.py")

TOOLS = ("memcheck", "racecheck")

USUAL = "/usr/local/cuda"
"""Where the CUDA toolkit is, unless CUDA_HOME says otherwise."""

FOUND = 9
"""The sanitizer's exit status where the tests passed and it found something."""

# torch carves tensors out of large blocks, between which nothing would be seen to be out of bounds.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

WITHOUT = """\
compare sanitize {why}.
It wants an NVIDIA GPU, and compute-sanitizer of the CUDA toolkit on PATH or in CUDA_HOME. Without:
  python -m pytest tests/test_hazards.py tests/test_shapes.py    the same tests, interpreted
  python -m compare static                                       kernels compiled, spills counted"""


def sanitizer() -> str | None:
    """Where compute-sanitizer is; None if it is not installed."""
    folders = [os.environ.get("PATH", "")]
    folders += [
        os.path.join(home, "bin")
        for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), USUAL)
        if home
    ]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def what_lacks() -> str | None:
    """Why nothing can be watched here; None if it can."""
    why = why_no_gpu()
    if why is not None:
        return f"needs a GPU, and {why}"
    if torch.version.hip is not None:
        return "needs a GPU of NVIDIA, and this torch is for AMD's"
    if sanitizer() is None:
        return "needs compute-sanitizer, which is not installed"
    if not TESTS.is_dir():
        return f"needs a checkout: there are no tests in {TESTS}"
    return None


def command(tool: str, arguments: Sequence[str]) -> list[str]:
    """The tests under one of TOOLS, in one process and with further ``arguments`` to pytest."""
    program = sanitizer()
    assert program is not None
    watch = [program, "--tool", tool, "--target-processes", "all", "--error-exitcode", str(FOUND)]
    tests = [str(TESTS / name) for name in HAZARDS]
    return [*watch, sys.executable, "-m", "pytest", *tests, *arguments]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 1 where a tool or a test found something, 2 where none can run."""
    parser = argparse.ArgumentParser(
        prog="compare sanitize", description=__doc__, epilog="Further arguments go to pytest."
    )
    parser.add_argument("--tool", action="append", choices=TOOLS, help="both")
    add_json_option(parser)
    options, further = parser.parse_known_args(arguments)
    lacks = what_lacks()
    if lacks is not None:
        print(WITHOUT.format(why=lacks), file=sys.stderr)
        return 2
    told = {}
    for tool in options.tool or TOOLS:
        wanted = command(tool, further)
        print(shlex.join(wanted), flush=True)
        status = subprocess.run(wanted, env=os.environ | ENVIRONMENT, check=False).returncode
        told[tool] = {0: "nothing found", FOUND: "found something"}.get(
            status, f"the tests ended with status {status}"
        )
    for tool, what in told.items():
        print(f"{tool}: {what}")
    if options.json is not None:
        write_json(options.json, told)
    return int(set(told.values()) != {"nothing found"})
