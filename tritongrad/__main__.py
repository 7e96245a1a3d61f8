"""``tritongrad COMMAND``, also ``python -m tritongrad COMMAND``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .compare.__main__ import main as compare

USAGE = """\
usage: tritongrad COMMAND ...

  doctor   what this machine has, what runs on it, and what is wrong with it
  ops      what each op promises
  tune     time configurations of kernels on this GPU, and write the fastest to a file
  compare  check and measure the ops against torch and against other libraries

tritongrad COMMAND --help says more."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Hand the command line over. Returns the exit status, 2 for a command that there is not."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command == "compare":
        return compare(rest)
    if command in ("doctor", "ops", "tune"):
        return compare([command, *rest])
    print(f"tritongrad: no command is named {command!r}\n\n{USAGE}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
