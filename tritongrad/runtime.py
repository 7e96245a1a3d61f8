"""Where kernels run, how they are launched, and what a session counts.

Triton decides whether a kernel is compiled or interpreted when the kernel is decorated, and it
decides once for its own library when ``triton.language`` is first imported. So this module is the
first of the package to be imported, settles the question before anything else imports triton, and
refuses to go on where it is too late.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import relaunch


class EnvironmentProblem(ImportError):
    """The environment cannot run Triton kernels; the message says how to mend it."""


def _interpreter_wanted() -> bool:
    """``TRITON_INTERPRET`` where the user has set it, else: is there no GPU?"""
    asked = os.environ.get("TRITON_INTERPRET")
    if asked is not None:
        return asked.lower() in ("1", "true", "on", "y", "yes")
    return not torch.cuda.is_available()


def _settle() -> bool:
    """Turn the interpreter on where it is needed. Returns whether kernels are interpreted."""
    interpreted = _interpreter_wanted()
    already = "triton.language" in sys.modules
    if interpreted:
        os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    # tl.cdiv is one of the jit functions that Triton's own library is made of.
    if interpreted and already and isinstance(tl.cdiv, JITFunction):
        raise EnvironmentProblem(
            "tritongrad needs Triton's interpreter here (no GPU was found), but triton was "
            "imported before tritongrad without it. Import tritongrad first, or set "
            "TRITON_INTERPRET=1 in the environment before Python starts."
        )
    return interpreted


INTERPRETED: bool = _settle()
"""Whether kernels run in Triton's interpreter (no GPU) rather than compiled."""

if INTERPRETED:
    import numpy  # what the interpreter computes with

    from ._interpreter import correct_bfloat16, quicken

    correct_bfloat16()
    quicken()

DEVICE_TYPES: frozenset[str] = frozenset(("cuda", "cpu") if INTERPRETED else ("cuda",))
"""Types of the devices whose tensors our kernels accept."""


class Session:
    """What one ``use()`` saw.

    Attributes:
        ran: op name -> calls that ran on our kernels.
        fell_back: (torch name, reason) -> calls that torch ran.
        names: names of the ops that it was asked to use, None for all.
        policy: in words, which calls it takes, if not all that it can.
        launches: Triton kernels launched on behalf of the session, those of the backward passes of
            its calls included, even when they run after the session was closed.
    """

    def __init__(
        self,
        parent: Session | None = None,
        names: frozenset[str] | None = None,
        policy: str = "",
    ) -> None:
        self.names = names
        self.policy = policy
        self.ran: Counter[str] = Counter()
        self.fell_back: Counter[tuple[str, str]] = Counter()
        self.launches = 0
        self._parent = parent
        # Autograd runs the backward passes of different devices on threads of its own.
        self._lock = threading.Lock()

    def takes(self, name: str) -> bool:
        """Whether it was asked to use the op of this name."""
        return self.names is None or name in self.names

    def _count_launch(self) -> None:
        with self._lock:
            self.launches += 1
        if self._parent is not None:
            self._parent._count_launch()

    def _count_run(self, name: str) -> None:
        with self._lock:
            self.ran[name] += 1
        if self._parent is not None:
            self._parent._count_run(name)

    def _count_fall_back(self, name: str, reason: str) -> None:
        with self._lock:
            self.fell_back[name, reason] += 1
        if self._parent is not None:
            self._parent._count_fall_back(name, reason)

    def __str__(self) -> str:
        from .reroute import HARMLESS

        calls = sum(self.ran.values())
        lines = [f"tritongrad session: {calls} calls on Triton, {self.launches} kernels launched"]
        if self.policy:
            lines.append(self.policy)
        lines += [f"  {name:<24} {count:>6}" for name, count in sorted(self.ran.items())]
        arithmetic = {k: n for k, n in self.fell_back.items() if k[1] not in HARMLESS}
        harmless = sum(self.fell_back.values()) - sum(arithmetic.values())
        if arithmetic:
            lines.append("on torch:")
            lines += [
                f"  {name:<24} {count:>6}  {reason}"
                for (name, reason), count in sorted(arithmetic.items())
            ]
        if harmless:
            lines.append(f"on torch, no differentiable arithmetic (views, creation): {harmless}")
        return "\n".join(lines)

    __repr__ = __str__


class _Local(threading.local):
    session: Session | None = None
    # > 0 while torch itself must run a call that a session has already decided about.
    bypass: int = 0
    # Of the definition of a composite that is evaluated: what it calls is noted there.
    recorder: Any = None


local = _Local()

Observer = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]
_observer: Observer | None = None
_stubbed = False
# The interpreter patches triton.language while a kernel runs, so one kernel at a time.
_interpreter_lock = threading.Lock()
_single_device = INTERPRETED or torch.cuda.device_count() <= 1


def _run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    """Run one kernel on the current device: all device work of tritongrad starts here."""
    if INTERPRETED:
        # NumPy warns of the infinities and NaNs that a GPU computes in silence.
        with _interpreter_lock, numpy.errstate(all="ignore"):
            kernel[grid](*args, **meta)
    else:
        relaunch.run(kernel, grid, args, meta)


def launch(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], on: torch.Tensor, **meta: Any
) -> None:
    """Launch ``kernel`` over ``grid`` on the device of ``on``, a tensor.

    ``args`` are its run-time arguments (tensors, numbers, ``None``, tuples of these) and ``meta``
    its constexprs by name, with ``num_warps`` and ``num_stages`` where they are not the default.
    """
    launch_prepared(kernel, grid, args, on, meta)


def launch_prepared(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    on: torch.Tensor,
    meta: dict[str, Any],
) -> None:
    """``launch`` with the constexprs in a dictionary, which is only read."""
    session = local.session
    if session is not None:
        session._count_launch()
    if _observer is not None:
        _observer(kernel, grid, args, meta)
    if _stubbed:
        return
    if _single_device or on.get_device() == torch.cuda.current_device():
        _run(kernel, grid, args, meta)
    else:
        with torch.cuda.device(on.device):
            _run(kernel, grid, args, meta)


@contextlib.contextmanager
def observe(callback: Observer) -> Iterator[None]:
    """Call ``callback(kernel, grid, args, meta)`` before each launch of the process."""
    global _observer
    previous, _observer = _observer, callback
    try:
        yield
    finally:
        _observer = previous


@contextlib.contextmanager
def stub() -> Iterator[None]:
    """Make launches do nothing (outputs stay uninitialised): for measuring host time."""
    global _stubbed
    previous, _stubbed = _stubbed, True
    try:
        yield
    finally:
        _stubbed = previous


@contextlib.contextmanager
def attribute_to(session: Session | None) -> Iterator[None]:
    """Count what happens inside for ``session`` (the backward pass of a call it made)."""
    previous, local.session = local.session, session
    try:
        yield
    finally:
        local.session = previous
