"""A device for the harness of ``compare bench``: where our kernels run, without a GPU torch's CPU,
with a clock of its own; and rows that were measured nowhere.

Run as a program it is a worker of ``compare bench`` on this device, with small sizes.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tritongrad.compare import peers, worker
from tritongrad.compare.results import Environment, Log, Moment, Row
from tritongrad.compare.workloads import Size
from tritongrad.runtime import INTERPRETED

ABOUT = Environment(
    gpu="Stub 9000", driver="1.2", cuda="13.0", torch="2.13", triton="3.7", tritongrad="0.1",
    python="3.12", peers="", commit="0123456789ab", command="python -m compare bench",
)  # fmt: skip
TODAY = datetime.date(2030, 1, 2)

SIZES = {
    "tiny": Size("tiny", 24, 6, 4, 4),
    "small": Size("small", 96, 12, 6, 8),
}


class Still:
    """A sensor without a GPU, at a time that does not pass."""

    def moment(self) -> Moment:
        return Moment("2030-01-02T03:04:05+00:00", sm_mhz="1980", power_w="412.5")


def row(**values: Any) -> Row:
    own: dict[str, Any] = {
        "suite": "quick", "op": "exp", "case": "2^20", "shape": "512x2048, 'a'", "dtype": "float32",
        "phase": "forward", "implementation": peers.OURS, "status": "ok", "device_us": 12.5,
        "host_us": 3.25, "repeats": 7, "bytes": 8 * 2**20, "fraction": 0.93,
    }  # fmt: skip
    return Row(**own | values)


def log(folder: Path, **about: Any) -> Log:
    opened = Log.open(dataclasses.replace(ABOUT, **about), folder, TODAY)
    opened.sensor = Still()  # type: ignore[assignment]
    return opened


class Stub:
    """Each event is ``tick`` microseconds after the one before; each reading of the clock, a
    microsecond."""

    name = "Stub 9000"
    torch_device = torch.device("cpu" if INTERPRETED else "cuda")
    cache = 64

    def __init__(self, tick: float = 5.0) -> None:
        self.tick = tick
        self.seconds = 0.0
        self.events = 0
        self.did: list[str] = []

    def clock(self) -> float:
        self.seconds += 1e-6
        return self.seconds

    def mark(self) -> float:
        self.events += 1
        self.did.append("mark")
        return self.events * self.tick

    def between(self, start: float, end: float) -> float:
        return end - start

    def synchronize(self) -> None:
        self.did.append("synchronize")

    def occupy(self, microseconds: float) -> None:
        self.did.append("occupy")

    def flush(self) -> None:
        self.did.append("flush")

    def start_peak(self) -> None:
        pass

    def peak(self) -> int:
        return 640


def main(plants: list[str]) -> None:
    """Serve; each of ``plants`` is ``op:what``: break this op so."""
    from tritongrad.op import OPS

    for plant in plants:
        name, _, what = plant.partition(":")
        op = OPS[name]
        entry = op.entry

        def broken(*args: Any, what: str = what, entry: Any = entry, **kwargs: Any) -> Any:
            if what == "exit":
                os._exit(7)
            if what == "hang":
                time.sleep(600)
            return entry(*args, **kwargs)

        vars(op)["entry"] = broken
    worker.serve(Stub(), sys.stdin, sys.stdout, SIZES)


if __name__ == "__main__":
    main(sys.argv[1:])
