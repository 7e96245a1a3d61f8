"""What a launch costs on the host, measured where there is no GPU.

``Absent`` stands in for Triton's driver: kernels are compiled as for an H100, and what would start
them does nothing. So everything of a launch is there but the call of CUDA's driver. That needs a
process of its own, in which kernels are not interpreted; ``measure`` starts it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

CALLS, REPEATS = 200, 21


@dataclass(frozen=True)
class Launch:
    """Medians, in microseconds a launch."""

    kernel: str
    triton: float
    ours: float


class Absent:
    """A driver for a GPU that is not here.

    Attributes:
        launches: what was launched: the compiled kernel's name, grid and arguments.
    """

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] | None = None
        self.utils = self

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return object(), kernel, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(
            x: int, y: int, z: int, stream: int, function: Any, packed: Any, about: Any,
            enter: Any, exit: Any, *args: Any,
        ) -> None:  # fmt: skip
            if enter is not None:
                enter(about)
            if self.launches is not None:
                self.launches.append((function, (x, y, z), metadata.num_warps, args))
            if exit is not None:
                exit(about)

        return launch

    @classmethod
    def take_over(cls) -> Absent:
        """Make it Triton's driver in this process, and let ops take tensors of the CPU."""
        from triton.runtime import driver

        absent = cls()
        driver.set_active(absent)
        from tritongrad import admission, runtime

        assert not runtime.INTERPRETED
        runtime.DEVICE_TYPES = frozenset(("cpu",))
        admission._plain_key_sets.cache_clear()
        admission.PLAIN_KEY_SETS = admission._plain_key_sets()
        return absent


def measure(ops: Sequence[str]) -> list[Launch]:
    """What the first launch of each kernel costs, of those that these ops launch.

    Raises:
        RuntimeError: the process in which it is measured failed.
    """
    command = [sys.executable, "-m", "tritongrad.compare.launching", *ops]
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"timing launches failed: {done.stderr.strip().splitlines()[-1:]}")
    return [Launch(**launch) for launch in json.loads(done.stdout.splitlines()[-1])]


def main(ops: Sequence[str]) -> None:
    """Measure, and print JSON."""
    import torch

    from tritongrad import relaunch, runtime
    from tritongrad.op import OPS
    from tritongrad.sampling import Random

    def ordinary(kernel: Any, grid: Any, args: Any, meta: Any) -> None:
        kernel[grid](*args, **meta)

    Absent.take_over()
    processors = SimpleNamespace(multi_processor_count=132)
    seen: dict[str, tuple[Any, ...]] = {}
    for name in ops:
        op = OPS[name]
        if op.samples is None:
            continue
        sample = next(iter(op.samples(Random(torch.float32))))
        record = lambda *launch: seen.setdefault(launch[0].__name__, launch)  # noqa: E731
        with (
            runtime.stub(),
            runtime.observe(record),  # type: ignore[arg-type]
            torch.no_grad(),
            mock.patch.object(torch.cuda, "get_device_properties", return_value=processors),
        ):
            op(*sample.args, **sample.kwargs)
    found = []
    for name, (kernel, grid, args, meta) in seen.items():
        ways: list[Callable[[], Any]] = [
            partial(ordinary, kernel, grid, args, meta),
            partial(relaunch.run, kernel, grid, args, meta),
        ]
        times: list[list[float]] = [[], []]
        for _ in range(REPEATS):  # in turns, so that a busy machine slows both
            for way, own in zip(ways, times, strict=True):
                start = time.perf_counter()
                for _ in range(CALLS):
                    way()
                own.append(1e6 * (time.perf_counter() - start) / CALLS)
        triton, ours = map(statistics.median, times)
        found.append({"kernel": name, "triton": triton, "ours": ours})
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
