"""What ``compare bench`` writes: a CSV row for each implementation, phase, dtype and size of an op.

Rows are appended as they come, each with everything that a reader must know to believe it, so that
a run that is cut short is not lost and one that is started again goes on. A row never changes.
"""

from __future__ import annotations

import csv
import datetime
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tritongrad.doctor import driver_version, installed
from tritongrad.policy import slug

from . import peers

DIRECTORY = Path(__file__).parent / "results"

STATUSES = {
    "ok": "measured",
    "refused": "its numbers are not torch's, so it was not timed",
    "unsupported": "the implementation has nothing for this call",
    "failed": "it raised an exception",
    "crashed": "it took the process down, or hung",
}


class Cell(NamedTuple):
    """What a row is about."""

    op: str
    case: str
    dtype: str
    phase: str
    implementation: str


@dataclass(frozen=True)
class Row:
    """One measurement, or why there is none.

    Attributes:
        case: name of the size, see workloads.py; ``shape`` are the arguments themselves.
        elements: of the largest tensor among them.
        status: one of STATUSES; ``note`` says more.
        device_us, host_us: medians a call, with the 20th and 80th percentile.
        bytes, operations: the least that this phase moves and computes in matrix products.
        floor_us: the time for that at the rates measured in the same run.
        gb_s, tflop_s: bytes and operations in the device time.
        fraction: floor in the device time: 1 cannot be beaten, but by what stays in the cache.
        peak_bytes: most memory that a call had allocated at once, beside its inputs.
        cold_s, warm_s: of the suite "cold", the first call of a process, without and with the disk
            cache of compiled kernels.
    """

    suite: str
    op: str
    case: str
    shape: str
    dtype: str
    phase: str
    implementation: str
    status: str
    note: str = ""
    elements: int | None = None
    device_us: float | None = None
    device_us_20: float | None = None
    device_us_80: float | None = None
    host_us: float | None = None
    host_us_20: float | None = None
    host_us_80: float | None = None
    repeats: int | None = None
    bytes: int | None = None
    operations: int | None = None
    floor_us: float | None = None
    gb_s: float | None = None
    tflop_s: float | None = None
    fraction: float | None = None
    peak_bytes: int | None = None
    cold_s: float | None = None
    warm_s: float | None = None

    @property
    def cell(self) -> Cell:
        return Cell(self.op, self.case, self.dtype, self.phase, self.implementation)


@dataclass(frozen=True)
class Environment:
    """Where and by what a row was measured."""

    gpu: str
    driver: str
    cuda: str
    torch: str
    triton: str
    tritongrad: str
    python: str
    peers: str
    commit: str
    command: str


@dataclass(frozen=True)
class Moment:
    """The state of the GPU when a row was measured; empty where no tool tells."""

    time: str
    sm_mhz: str = ""
    memory_mhz: str = ""
    power_w: str = ""
    power_limit_w: str = ""
    temperature_c: str = ""


COLUMNS = tuple(f.name for kind in (Row, Environment, Moment) for f in fields(kind))


def environment(gpu: str, command: str) -> Environment:
    """This machine, now."""
    return Environment(
        gpu=gpu,
        driver=driver_version() or "",
        cuda=torch.version.hip or torch.version.cuda or "",
        torch=torch.__version__,
        triton=installed("triton") or "",
        tritongrad=installed("tritongrad") or "",
        python=platform.python_version(),
        peers="; ".join(f"{name} {version}" for name, version in peers.versions().items()),
        commit=commit(),
        command=command,
    )


@cache
def commit() -> str:
    """The commit of this checkout, with a ``+`` where files differ from it; "" without one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    if shutil.which("git") is None:
        return ""
    found = git("rev-parse", "--short=12", "HEAD")
    # The results themselves are written beside the files that are measured.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!*/results/*")
    return found + ("+" if found and changed else "")


QUERY = ("clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")


class Sensor:
    """Clocks, power and temperature, asked for at most every few seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, seconds: float = 5.0) -> None:
        self._clock = clock
        self._seconds = seconds
        self._known: tuple[float, tuple[str, ...]] | None = None

    def moment(self) -> Moment:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        if self._known is None or self._clock() - self._known[0] > self._seconds:
            self._known = self._clock(), self._ask()
        return Moment(now, *self._known[1])

    @staticmethod
    def _ask() -> tuple[str, ...]:
        if shutil.which("nvidia-smi") is None:
            return ()
        # The first of the devices that this process may use.
        device = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
        query = f"--query-gpu={','.join(QUERY)}"
        command = ["nvidia-smi", query, "--format=csv,noheader,nounits", "-i", device]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
        except subprocess.TimeoutExpired:
            return ()
        values = [
            value.strip() for value in done.stdout.splitlines()[:1] for value in value.split(",")
        ]
        return tuple(values) if done.returncode == 0 and len(values) == len(QUERY) else ()


@dataclass
class Log:
    """A file of results that is appended to."""

    path: Path
    environment: Environment
    sensor: Sensor = field(default_factory=Sensor)

    @classmethod
    def open(
        cls,
        environment: Environment,
        directory: Path = DIRECTORY,
        today: datetime.date | None = None,
    ) -> Log:
        """Today's file for this GPU and commit, new or to be gone on with."""
        today = today or datetime.datetime.now(datetime.timezone.utc).date()
        name = f"{today}-{environment.commit or 'unknown'}.csv"
        return cls(directory / slug(environment.gpu) / name, environment)

    def append(self, rows: Iterable[Row]) -> None:
        """Write rows, whole and at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._mend()
        moment = asdict(self.sensor.moment())
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if not file.tell():
                writer.writeheader()
            for row in rows:
                writer.writerow(_cells(asdict(row) | asdict(self.environment) | moment))
            file.flush()
            os.fsync(file.fileno())

    def _mend(self) -> None:
        """Take away the piece of a row that a process left which was killed while it wrote."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        if content and not content.endswith(b"\n"):
            self.path.write_bytes(content[: content.rfind(b"\n") + 1])

    def done(self, suite: str) -> set[Cell]:
        """The cells of a suite that have a row already."""
        return {row.cell for row, _ in read(self.path) if row.suite == suite}


def _cells(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: "" if value is None else f"{value:.6g}" if isinstance(value, float) else value
        for name, value in values.items()
    }


_KINDS = {f.name: str(f.type).partition(" ")[0] for f in fields(Row)}
_READ: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float}


def read(path: Path) -> Iterator[tuple[Row, dict[str, str]]]:
    """The rows of a file, each with where it was measured. A file that is not there has none.

    Raises:
        ValueError: it was written with other columns.
    """
    if not path.exists():
        return
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is not None and tuple(reader.fieldnames) != COLUMNS:
            raise ValueError(f"{path}: its columns are not those of this version")
        for cells in reader:
            if None in cells.values():  # cut off
                continue
            values = {
                name: _READ[kind](cells[name]) if cells[name] or kind == "str" else None
                for name, kind in _KINDS.items()
            }
            about = {name: cells[name] for name in COLUMNS if name not in _KINDS}
            yield Row(**values), about  # type: ignore[arg-type]


def read_all(directory: Path = DIRECTORY) -> list[tuple[Row, dict[str, str]]]:
    """Every row under a directory, the oldest file first."""
    return [pair for path in sorted(directory.glob("*/*.csv")) for pair in read(path)]
