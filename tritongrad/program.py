"""Composites as programs: the calls that a definition makes of the tensors it is given.

Of tensors that ``recall`` takes for those of an earlier call, and of the same params, a definition
makes the same calls. They are recorded the first time, and made again without the definition, the
mode that reads it, and its look at shapes. It is the calls that are made again, of ops and of torch
alike, each read as any other: nothing of an earlier result, of values or of random numbers is in a
program, and no tensor of a caller.

A definition may look at what ``recall`` compares, ``LOOKS`` and ``PROPERTIES`` of its tensors, and
at what ``state`` has, under which alone a program is used. One that looks at anything else of a
tensor (its values), that writes in place, or that hands tensors on in lists or takes several
results of one call, has no program and is evaluated each time.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .op import Tensors

Function = Callable[..., Any]

LOOKS = frozenset(("dim", "ndimension", "size", "stride", "numel", "is_floating_point"))
PROPERTIES = frozenset(("shape", "dtype", "device", "ndim", "layout", "requires_grad"))
VIEWS = frozenset(("T", "mT"))
"""Properties that are tensors: calls like others."""


def state() -> Hashable:
    """What definitions may depend on beside their arguments."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch._C._is_any_autocast_enabled(),
        forward_ad._current_level,
    )


class Recalled:
    """Params of a composite's call that ``recall`` remembers.

    Attributes:
        params: what the definition takes.
        programs: by ``state``; None where there can be none.
    """

    __slots__ = ("params", "programs")

    def __init__(self, params: Any, *_: Tensor | None) -> None:
        self.params = params
        self.programs: dict[Hashable, Program | None] = {}


class Program:
    """Calls in a row, of the tensors given, of constants, and of each other's results."""

    def __init__(
        self,
        constants: Sequence[Any],
        calls: Sequence[tuple[Function, Sequence[int], dict[str, Any]]],
        result: int,
    ) -> None:
        self.constants = list(constants)
        self.calls = [
            (partial(function, **named) if named else function, _arguments(places))
            for function, places, named in calls
        ]
        self.result = result

    def __call__(self, tensors: Tensors) -> Any:
        values: list[Any] = [*self.constants, *tensors]
        for function, arguments in self.calls:
            values.append(function(*arguments(values)))
        return values[self.result]


def _arguments(places: Sequence[int]) -> Callable[[list[Any]], tuple[Any, ...]]:
    if len(places) == 1:
        (place,) = places
        return lambda values: (values[place],)
    return operator.itemgetter(*places) if places else lambda values: ()


class Recorder:
    """Notes the calls of a definition, until one that has no place in a program."""

    def __init__(self, tensors: Tensors) -> None:
        self.known: list[Tensor | None] = list(tensors)
        self.constants: list[Any] = []
        # Of each argument: whether it is a tensor, and its place among those, or the constants.
        self.calls: list[tuple[Function, list[tuple[bool, int]], dict[str, Any]]] = []
        self.failed = False

    def note(
        self, run: Function, func: Function, args: tuple, kwargs: dict[str, Any], result: Any
    ) -> None:
        """``func`` of these arguments gave ``result``, as ``run`` of them gives it again."""
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
            allowed = VIEWS if isinstance(result, Tensor) else PROPERTIES
            self.failed |= name not in allowed
        elif not isinstance(result, Tensor):
            self.failed |= name not in LOOKS
        self.failed |= name.endswith("_") or "out" in kwargs  # __setitem__ and the like, too
        if not isinstance(result, Tensor) or self._place(result) is not None:
            return  # nothing new: of a tensor in the dtype it has, ``to`` returns itself
        places = [self._argument(value) for value in args]
        self.failed |= any(map(_holds_tensor, kwargs.values()))
        self.calls.append((run, places, dict(kwargs)))
        self.known.append(result)

    def _place(self, value: Any) -> int | None:
        return next((i for i, known in enumerate(self.known) if known is value), None)

    def _argument(self, value: Any) -> tuple[bool, int]:
        place = self._place(value) if isinstance(value, Tensor) else None
        if place is not None:
            return True, place
        self.failed |= _holds_tensor(value)  # of unknown origin, or in a list
        self.constants.append(value)
        return False, len(self.constants) - 1

    def program(self, result: Any) -> Program | None:
        """What was noted, of which ``result`` came; None if that is no program."""
        place = self._place(result)
        if self.failed or place is None:
            return None
        before = len(self.constants)
        calls = [
            (run, [before + i if is_tensor else i for is_tensor, i in places], named)
            for run, places, named in self.calls
        ]
        return Program(self.constants, calls, before + place)


def versions(values: Any) -> list[int]:
    """How often each tensor in ``values`` was written to; -1 for one that does not count."""
    if isinstance(values, (tuple, list)):
        return [version for value in values for version in versions(value)]
    if isinstance(values, Tensor):
        return [-1 if values.is_inference() else values._version]
    return []


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_holds_tensor, value))
    return isinstance(value, Tensor)
