"""How long a call takes: on the device and on the host, two numbers that have little to do with
each other.

Device time is what lies between two events on the stream. Before the first of them the device is
kept busy for longer than the host takes to make the call, so that no gap in which it waits for the
host is counted, and its cache is overwritten, so that operands come from memory. Host time is what
the call takes to return while the device is behind.

What is compared is timed in turns, in an order that rotates, so that a clock that falls or a
machine that is busy strikes all alike.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Call = Callable[[int], Any]
"""Makes the n-th call: which of the inputs it uses changes with n."""

LEAST_ROUNDS, MOST_ROUNDS = 5, 50
WARM_UP = 3  # calls before any is timed: compiling, tuning, allocating
HOST_CALLS = 20  # at most timed together: fewer than a stream queues before the host waits


class Device(Protocol):
    """What a measurement needs of a device. Times are in microseconds.

    Attributes:
        cache: bytes of its last-level cache.
    """

    name: str
    torch_device: torch.device
    cache: int

    def clock(self) -> float:
        """Host time, in seconds."""

    def mark(self) -> Any:
        """An event on the stream, here."""

    def between(self, start: Any, end: Any) -> float:
        """Time from one event to another; both have happened."""

    def synchronize(self) -> None:
        """Wait for the device."""

    def occupy(self, microseconds: float) -> None:
        """Keep the device busy for at least so long, without waiting for it."""

    def flush(self) -> None:
        """Overwrite the device's cache."""

    def start_peak(self) -> None:
        """Begin to watch memory."""

    def peak(self) -> int:
        """Most bytes in use since, beyond those that were in use then."""


class Cuda:
    """The current CUDA (or ROCm) device."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.torch_device)
        self.name = properties.name
        self.cache = max(getattr(properties, "L2_cache_size", 0), 2**25)
        self._filler = torch.empty(2 * self.cache, dtype=torch.int8, device=self.torch_device)
        self._before = 0

    def clock(self) -> float:
        return time.perf_counter()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return 1e3 * start.elapsed_time(end)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def occupy(self, microseconds: float) -> None:
        # In cycles, of which no GPU makes more than two thousand in a microsecond.
        torch.cuda._sleep(int(2000 * microseconds))

    def flush(self) -> None:
        self._filler.zero_()

    def start_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self._before


class Spread(NamedTuple):
    """Median of some times, and the 20th and 80th percentile."""

    median: float
    low: float
    high: float


def spread(times: Sequence[float]) -> Spread:
    """The spread of at least one time."""
    if len(times) == 1:
        return Spread(times[0], times[0], times[0])
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return Spread(statistics.median(times), fifths[0], fifths[3])


@dataclass(frozen=True)
class Timing:
    """What one implementation took; microseconds a call.

    Attributes:
        repeats: calls whose device time was taken.
        peak_bytes: most memory that a call had allocated at once.
    """

    device: Spread
    host: Spread
    repeats: int
    peak_bytes: int


def measure(
    calls: Mapping[str, Call],
    device: Device,
    seconds: float,
    watch: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing | Exception]:
    """Time ``calls`` in turns, for about ``seconds`` in all.

    A call that raises is left out from then on, and its exception is the answer for it.

    Args:
        watch: called with the name of a call before it is made: after a crash, somebody will want
            to know which it was.
    """
    found: dict[str, Timing | Exception] = {}
    host_estimate: dict[str, float] = {}
    elapsed: dict[str, float] = {}
    for name, call in calls.items():
        watch(name)
        try:
            for n in range(WARM_UP):
                call(n)
            device.synchronize()
            start = device.clock()
            call(0)
            host_estimate[name] = 1e6 * (device.clock() - start)
            device.synchronize()
            elapsed[name] = device.clock() - start
        except Exception as problem:
            found[name] = problem
    alive = [name for name in calls if name not in found]
    total = sum(elapsed.values())
    # Half of the time is for the rest: writing the cache, host time, memory.
    rounds = round(seconds / (2 * total)) if total > 0 else MOST_ROUNDS
    rounds = min(max(rounds, LEAST_ROUNDS), MOST_ROUNDS)

    def attempt(name: str, what: Callable[[], Any]) -> Any:
        watch(name)
        try:
            return what()
        except Exception as problem:
            found[name] = problem
            alive.remove(name)
            return None

    gc.disable()
    try:
        events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in alive}
        host: dict[str, list[float]] = {name: [] for name in alive}
        peaks: dict[str, int] = {}
        for n in range(rounds):
            for name in _rotated(alive, n):
                once = _once(device, calls[name], n, 1.5 * host_estimate[name] + 20)
                events[name].append(attempt(name, once))
            device.synchronize()
        for n in range(LEAST_ROUNDS):
            for name in _rotated(alive, n):
                count = max(min(HOST_CALLS, int(seconds / (20 * elapsed[name] + 1e-9))), 1)
                host[name].append(attempt(name, partial(_host, device, calls[name], count)))
        for name in list(alive):
            peaks[name] = attempt(name, partial(_peak, device, calls[name]))
    finally:
        gc.enable()
    for name in alive:
        device_times = [device.between(*pair) for pair in events[name]]
        found[name] = Timing(spread(device_times), spread(host[name]), rounds, peaks[name])
    return {name: found[name] for name in calls}


def _rotated(names: list[str], n: int) -> list[str]:
    if not names:
        return []
    first = n % len(names)
    return list(itertools.chain(names[first:], names[:first]))


def _once(device: Device, call: Call, n: int, ahead: float) -> Callable[[], tuple[Any, Any]]:
    """One call between two events, ``ahead`` microseconds of the host's time before it."""

    def once() -> tuple[Any, Any]:
        device.flush()
        device.occupy(ahead)
        start = device.mark()
        call(n)
        return start, device.mark()

    return once


def _host(device: Device, call: Call, count: int) -> float:
    device.synchronize()
    start = device.clock()
    for n in range(count):
        call(n)
    elapsed = device.clock() - start
    device.synchronize()
    return 1e6 * elapsed / count


def _peak(device: Device, call: Call) -> int:
    device.synchronize()
    device.start_peak()
    call(0)
    device.synchronize()
    return device.peak()


@dataclass(frozen=True)
class Floor:
    """What this GPU can do at best, measured.

    Attributes:
        bandwidth: bytes a second, read and written, of a copy.
        rates: operations a second in a large matrix product, by dtype.
    """

    bandwidth: float
    rates: dict[str, float]

    def microseconds(self, moved: int, operations: int, dtype: str) -> float:
        """The least time for so many bytes and operations."""
        rate = self.rates.get(dtype)
        arithmetic = operations / rate if rate else 0.0
        return 1e6 * max(moved / self.bandwidth, arithmetic)


COPIED, SIDE = 2**30, 8192
"""Bytes of the copy, and side of the matrices, that the floor is measured with."""


def measure_floor(
    device: Device, dtypes: Sequence[torch.dtype], copied: int = COPIED, side: int = SIDE
) -> tuple[Floor, dict[str, Timing]]:
    """The floor, and the timings that it is computed from."""
    where: dict[str, Any] = {"device": device.torch_device}
    source = torch.randint(256, (copied,), dtype=torch.uint8, **where)
    timings = {"copy": _timed(device, partial(_copy, torch.empty_like(source), source))}
    bandwidth = 2e6 * copied / timings["copy"].device.median
    del source
    rates: dict[str, float] = {}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        a: Tensor = torch.randn(side, side, dtype=dtype, **where)
        b: Tensor = torch.randn(side, side, dtype=dtype, **where)
        timings[f"matmul {name}"] = timing = _timed(device, partial(_product, a, b))
        rates[name] = 2e6 * side**3 / timing.device.median
    return Floor(bandwidth, rates), timings


def _copy(target: Tensor, source: Tensor, n: int) -> Tensor:
    return target.copy_(source)


def _product(a: Tensor, b: Tensor, n: int) -> Tensor:
    return a @ b


def _timed(device: Device, call: Call) -> Timing:
    answer = measure({"": call}, device, 1.0)[""]
    if isinstance(answer, Exception):
        raise answer
    return answer
