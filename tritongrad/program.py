"""Composites as programs: the calls that a definition makes of tensors it was given before.

Of tensors of the same shapes, strides and dtypes, and of the same numbers, a definition makes the
same calls. They are recorded the first time that ``recall`` knows a call, and made again without
the definition, the mode that reads it, and its look at shapes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from .op import Tensors

Function = Callable[..., Any]

_LOOKS = frozenset(("__get__", "dim", "size", "stride", "numel", "is_floating_point"))
"""Functions of what ``recall`` has compared: their results need no call."""


class Recalled:
    """Params of a composite's call that is known, and its program once it was recorded.

    Attributes:
        params: what the definition takes.
        program: None before the first run, and where there can be none.
        recording: whether one is still to be recorded.
    """

    __slots__ = ("params", "program", "recording")

    def __init__(self, params: Any, *_: Tensor | None) -> None:
        self.params = params
        self.program: Program | None = None
        self.recording = True


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
            (function if not named else partial(function, **named), _arguments(places))
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
    """Notes the calls of a definition. It gives up on what a program cannot be made of: values
    that depend on what is in a tensor, several results."""

    def __init__(self, tensors: Tensors) -> None:
        self.constants: list[Any] = []
        # Kept, so that no id is another's later. A place is a constant's, or past all of those.
        self.known: list[Tensor | None] = list(tensors)
        self.calls: list[tuple[Function, list[tuple[bool, int]], dict[str, Any]]] = []
        self.failed = False

    def note(self, run: Function, func: Function, args: tuple, kwargs: dict, result: Any) -> None:
        """``func`` of these arguments gave ``result``, as ``run`` gives it again."""
        if not isinstance(result, Tensor):
            self.failed |= getattr(func, "__name__", "") not in _LOOKS
            return
        if self._place(result) is not None:
            return  # one of those that are there
        places = [self._argument(value) for value in args]
        if any(_holds_tensor(value) for value in kwargs.values()):
            self.failed = True
        self.calls.append((run, places, dict(kwargs)))
        self.known.append(result)

    def _place(self, value: Any) -> int | None:
        return next((i for i, known in enumerate(self.known) if known is value), None)

    def _argument(self, value: Any) -> tuple[bool, int]:
        if isinstance(value, Tensor):
            place = self._place(value)
            if place is not None:
                return True, place
        if _holds_tensor(value):
            self.failed = True  # of unknown origin, or in a list
        self.constants.append(value)
        return False, len(self.constants) - 1

    def program(self, result: Any) -> Program | None:
        """What was noted, of which ``result`` came; None if that is no program."""
        place = self._place(result)
        if self.failed or place is None:
            return None
        before = len(self.constants)

        def absolute(is_tensor: bool, place: int) -> int:
            return before + place if is_tensor else place

        calls = [(run, [absolute(*p) for p in places], kw) for run, places, kw in self.calls]
        return Program(self.constants, calls, absolute(True, place))


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_holds_tensor, value))
    return isinstance(value, Tensor)
