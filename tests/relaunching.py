"""Launches on a driver that is not there, in a process where kernels are compiled: prints, as JSON,
what was seen. Run by test_relaunch.py."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import json
import threading
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime.jit import JITFunction

from tritongrad import relaunch, runtime
from tritongrad.compare.launching import Absent


@triton.jit
def copy(outs, x_ptr, bias_ptr, n, scale, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    if bias_ptr is not None:
        x += tl.load(bias_ptr)
    tl.store(outs[0] + i, x * scale, mask=i < n)


absent = Absent.take_over()
ordinary = JITFunction.run
binder_ran = 0


def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
    global binder_ran
    binder_ran += 1
    return ordinary(self, *args, **kwargs)


JITFunction.run = counting
X = torch.randn(64)


def launch(x: Any = X, bias: Any = None, n: Any = 48, scale: Any = 2.0, **meta: Any) -> str:
    """The identity of the compiled kernel that a launch ran."""
    absent.launches = []
    own = {"WIDE": False, "BLOCK": 64} | meta
    runtime.launch(copy, (1,), ((X,), x, bias, n, scale), X, **own)
    ((function, *_),) = absent.launches
    return str(id(function))


def without(**arguments: Any) -> tuple[str, list[Any]]:
    """The same, in the ordinary way: and what the launcher was given."""
    relaunch._known.clear()
    return launch(**arguments), absent.launches[0][1:]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "misaligned": {"x": X[1:]},
    "float64": {"x": X.double()},
    "parameter": {"x": torch.nn.Parameter(X)},
    "with bias": {"bias": X},
    "misaligned bias": {"bias": X[3:]},
    "n of 1": {"n": 1},
    "odd n": {"n": 47},
    "64-bit n": {"n": 2**40},
    "unsigned n": {"n": 2**63},
    "integer scale": {"scale": 3},
    "scale of 1": {"scale": 1},
    "boolean scale": {"scale": True},
    "wide": {"WIDE": True},
    "wide is 1": {"WIDE": 1},
    "block": {"BLOCK": 32},
    "warps": {"num_warps": 2},
}


def kinds() -> dict[str, Any]:
    """For each variant, whether a launch ran what the ordinary one would, with the same arguments,
    and how often it went through Triton's binder."""
    expected = {name: without(**arguments) for name, arguments in VARIANTS.items()}
    relaunch._known.clear()
    found: dict[str, Any] = {}
    for turn in (1, 2, 3):
        # One after the other, so that each follows a launch of another kind.
        for name, arguments in VARIANTS.items():
            before = binder_ran
            function = launch(**arguments)
            (_, grid, warps, args) = absent.launches[0]
            given = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args[1:]]
            wanted = [
                a.data_ptr() if isinstance(a, torch.Tensor) else a for a in expected[name][1][2][1:]
            ]
            same = (function, given, [grid, warps]) == (
                expected[name][0], wanted, list(expected[name][1][:2]),
            )  # fmt: skip
            found[f"{name}, turn {turn}"] = [same, binder_ran - before]
    return found


def hooks() -> dict[str, Any]:
    """Hooks of a profiler, at launches that are remembered."""
    seen: list[str] = []
    launch()
    enter, leave = (lambda about: seen.append("enter")), (lambda about: seen.append("exit"))
    knobs.runtime.launch_enter_hook.add(enter)
    knobs.runtime.launch_exit_hook.add(leave)
    launch()
    knobs.runtime.launch_enter_hook.remove(enter)
    knobs.runtime.launch_exit_hook.remove(leave)
    launch()
    before = binder_ran
    copy.pre_run_hooks.append(lambda *args, **kwargs: seen.append("pre-run"))
    launch()
    copy.pre_run_hooks.clear()
    return {"seen": seen, "binder": binder_ran - before}


def threads() -> bool:
    """Whether threads that launch different kinds get each its own."""
    expected = {name: without(**VARIANTS[name])[0] for name in ("plain", "misaligned", "odd n")}
    relaunch._known.clear()
    own = threading.local()
    wrong: list[str] = []

    class Seen:
        def append(self, launched: Any) -> None:
            own.function = str(id(launched[0]))

    absent.launches = Seen()  # type: ignore[assignment]

    def work(name: str) -> None:
        arguments: dict[str, Any] = {"x": X, "n": 48} | VARIANTS[name]
        for _ in range(300):
            args = ((X,), arguments["x"], None, arguments["n"], 2.0)
            runtime.launch(copy, (1,), args, X, WIDE=False, BLOCK=64)
            if own.function != expected[name]:
                wrong.append(name)

    workers = [threading.Thread(target=work, args=(name,)) for name in expected for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return not wrong


def refused() -> str:
    """What an argument is refused with that no kernel can take."""
    try:
        launch(scale=object())
    except TypeError as problem:
        return str(problem)
    return "not refused"


def bounded() -> bool:
    """Whether it forgets at some point, and is right afterwards."""
    most, relaunch.MOST = relaunch.MOST, 3
    try:
        first = [launch(**arguments) for arguments in VARIANTS.values()]
        again = [launch(**arguments) for arguments in VARIANTS.values()]
        return first == again and len(relaunch._known) <= 3
    finally:
        relaunch.MOST = most


def without_convention() -> bool:
    """Whether a Triton of another version is launched by its public interface alone."""
    parts = relaunch.triton()
    assert parts is not None
    expected = launch()
    relaunch.triton.cache_clear()
    old, relaunch.CONVENTION = relaunch.CONVENTION, ()
    try:
        assert not relaunch.triton().direct  # type: ignore[union-attr]
        before = binder_ran
        return launch() == expected and binder_ran == before
    finally:
        relaunch.CONVENTION = old
        relaunch.triton.cache_clear()


def without_parts() -> int:
    """Launches in the ordinary way where a part of Triton is missing."""
    real = relaunch.triton
    relaunch.triton = lambda: None  # type: ignore[assignment]
    try:
        before = binder_ran
        launch()
        launch()
        return binder_ran - before
    finally:
        relaunch.triton = real


SCENARIOS: tuple[Callable[[], Any], ...] = (
    kinds, hooks, threads, refused, bounded, without_convention, without_parts,
)  # fmt: skip

if __name__ == "__main__":
    print(json.dumps({scenario.__name__: scenario() for scenario in SCENARIOS}))
