"""``python -m compare [COMMAND] ...``, which is ``tritongrad compare [COMMAND] ...``.

From the root of a checkout this file runs outside of the package, so it imports nothing relatively:
each command's module is found in ``tritongrad.compare``, where it exists once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "static": ("tritongrad.compare.static", "compile every kernel for GPUs that are not here"),
    "host": ("tritongrad.compare.host", "time what a call costs beside its kernels"),
    "bench": (
        "tritongrad.compare.bench",
        "time every op on a GPU, beside torch and other libraries",
    ),
    "tune": ("tritongrad.compare.tune", "time configurations of kernels, and keep the fastest"),
    "report": ("tritongrad.compare.report", "pictures and tables of what was measured"),
    "sanitize": (
        "tritongrad.compare.sanitize",
        "the tests of hazards, watched by compute-sanitizer",
    ),
    "gpu": ("tritongrad.compare.gpu", "all that waits for a GPU: tests, sanitizers, bench, report"),
    "models": ("tritongrad.compare.models", "train small models on our kernels and on torch"),
    "ops": ("tritongrad.compare.contract", "what each op promises"),
    "doctor": ("tritongrad.doctor", "what this machine has, and what is wrong with it"),
}
"""Command -> module whose ``main(arguments)`` it is, and what it does."""

DEFAULT = "tritongrad.compare.correctness"

# Optional dependencies, all of which the extra `compare` brings.
EXTRA = ("matplotlib", "numpy", "rich", "sklearn")


def main(arguments: Sequence[str] | None = None) -> int:
    """Hand the command line over to a command's module; without a command, compare with torch."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    module = DEFAULT
    if arguments and arguments[0] in COMMANDS:
        module, _ = COMMANDS[arguments.pop(0)]
    elif arguments and not arguments[0].startswith("-"):
        commands = "\n".join(f"  {name:<8} {about}" for name, (_, about) in COMMANDS.items())
        print(
            f"compare: no command is named {arguments[0]!r}. Commands:\n{commands}\n"
            "and without one: the document's examples and every op, compared with torch",
            file=sys.stderr,
        )
        return 2
    try:
        command = importlib.import_module(module)
    except ModuleNotFoundError as problem:
        missing = (problem.name or "").partition(".")[0]
        if missing not in EXTRA:
            raise
        print(f"compare needs {missing}: pip install tritongrad[compare]", file=sys.stderr)
        return 2
    return command.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
