"""The processes of ``compare bench``: one that times, spoken to by one that writes down.

Lines of JSON go both ways. A worker says what it is about to run before it does, and each row as it
comes, so that what takes it down is known.
"""

from __future__ import annotations

import contextlib
import json
import math
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import IO, Any, TextIO

from . import peers, tasks, timing, workloads
from .results import Row
from .tasks import Task
from .timing import Floor

Json = Any

GRACE = 20.0
"""Seconds for what is under way when the time for it is up; then it is cut off. What it has not
measured by then, the same command measures next time."""

SILENCE = 300.0  # seconds without a word from a worker, after which it hangs


# ------------------------------------------------------------------------------------ in the worker


def serve(
    device: timing.Device, source: TextIO, sink: TextIO, sizes: dict[str, workloads.Size]
) -> None:
    """Do the tasks that come as lines of JSON; tell of each row, and of what is about to run."""

    def say(**message: Json) -> None:
        print(json.dumps(message), file=sink, flush=True)

    say(gpu=device.name)
    floor = Floor(1.0, {})
    for line in source:
        message = json.loads(line)
        if "floor" in message:
            floor = Floor(**message["floor"])
        elif "measure_floor" in message:
            floor, timings = timing.measure_floor(
                device, [tasks.DTYPES[d] for d in message["measure_floor"]], **message["sizes"]
            )
            say(rows=[_floor_row(name, found, floor, message) for name, found in timings.items()])
            say(floor=asdict(floor))
        else:
            first = message.pop("first_call", False)
            place = tasks.Place(
                device,
                floor,
                emit=lambda row: say(rows=[asdict(row)]),
                announce=lambda phase, name: say(at=[phase, name]),
                sizes=sizes,
            )
            try:
                (tasks.first_call if first else tasks.run)(_task(message), place)
            except tasks.Fatal as problem:
                # Nothing that this process measures from here on is worth anything.
                say(fatal=str(problem))
                return
        say(end=True)


def _task(message: Json) -> Task:
    lists = {name: tuple(message[name]) for name in ("phases", "implementations")}
    return Task(**message | lists | {"skip": tuple(map(tuple, message["skip"]))})


def _floor_row(name: str, found: timing.Timing, floor: Floor, message: Json) -> Json:
    what, _, dtype = name.partition(" ")
    moved = 2 * message["sizes"].get("copied", timing.COPIED)
    operations = 2 * message["sizes"].get("side", timing.SIDE) ** 3
    time = found.device.median
    own: Json = {"bytes": moved, "gb_s": moved / (1e3 * time)}
    if dtype:
        own = {"operations": operations, "tflop_s": operations / (1e6 * time)}
    row = Row(
        suite=message["suite"], op="floor", case=what, shape="", dtype=dtype or "uint8",
        phase="forward", implementation=peers.EAGER, status="ok", device_us=time,
        device_us_20=found.device.low, device_us_80=found.device.high,
        host_us=found.host.median, host_us_20=found.host.low, host_us_80=found.host.high,
        repeats=found.repeats, floor_us=time, fraction=1.0,
    )  # fmt: skip
    return asdict(replace(row, **own))


# --------------------------------------------------------------------------------- in this process


class Gone(Exception):
    """The worker ended or fell silent; the message says how."""


class Worker:
    """A process that times, started when it is first spoken to."""

    def __init__(self, command: Sequence[str], silence: float = SILENCE) -> None:
        self.command = list(command)
        self.silence = silence
        self.gpu = ""
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[str] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        """Start the process, and wait until it has a GPU.

        Raises:
            Gone: it has none.
        """
        if self._log is None:
            self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the worker)
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.gpu = self._read(SILENCE)["gpu"]

    def ask(self, message: Json, seconds: float = math.inf) -> Iterator[Json]:
        """Send a message, and yield what is said until it is done with.

        Raises:
            Gone: the process did not live to the end of it, or it took longer than ``seconds``.
        """
        end = time.monotonic() + seconds
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Gone(self._last_words()) from None
        while not (answer := self._read(min(self.silence, end - time.monotonic()))).get("end"):
            if "fatal" in answer:
                raise Gone(answer["fatal"])
            yield answer

    def _read(self, silence: float) -> Json:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        clock = threading.Timer(max(silence, 0.0), process.kill)
        clock.start()
        try:
            line = process.stdout.readline()
        finally:
            clock.cancel()
        if not line.endswith("\n"):
            raise Gone(self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        assert self._process is not None
        assert self._log is not None
        status = self._process.wait()
        self._log.seek(0)
        last = self._log.read().strip().splitlines()[-1:]
        how = f"no word for {self.silence:g} s" if status == -9 else f"ended with status {status}"
        return " ".join([f"the worker {how}", *last])[:300]

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def close(self) -> None:
        self.stop()
        if self._log is not None:
            self._log.close()
            self._log = None


def compile_ahead(
    planned: Sequence[Task], command: Sequence[str], workers: int, seconds: float
) -> None:
    """Call ours once for each task, in many processes, so that kernels are compiled when they are
    timed; begin none after so many seconds. What goes wrong here goes wrong there again."""
    end = time.monotonic() + seconds
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()

    def once(task: Task) -> None:
        worker = idle.get()
        try:
            if time.monotonic() > end:
                return
            if not worker.running:
                worker.start()
            own = replace(task, warm=True, implementations=(peers.OURS,), skip=())
            for _ in worker.ask(asdict(own), end - time.monotonic() + GRACE):
                pass
        except Gone:
            worker.stop()
        finally:
            idle.put(worker)

    with contextlib.ExitStack() as stack:
        for _ in range(workers):
            idle.put(stack.enter_context(contextlib.closing(Worker(command))))
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        list(pool.map(once, planned))
