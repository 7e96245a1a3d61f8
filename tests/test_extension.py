"""Functions that torch has no name for: seen by modes and subclasses as torch's own are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import tritongrad
from tritongrad.dispatch import torch_name
from tritongrad.extension import EXTENSIONS, extended, extension


@pytest.fixture
def halve() -> Iterator[Callable[..., Tensor]]:
    def halved_sum(input: Tensor, scale: float = 0.5) -> Tensor:
        """Half the sum."""
        return input.sum() * scale

    yield extension(halved_sum)
    del EXTENSIONS["halved_sum"]


class Seen(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        self.names.append(torch_name(func))
        return func(*args, **(kwargs or {}))


def test_runs_its_definition_and_is_public(halve: Callable[..., Tensor]) -> None:
    assert halve(torch.ones(4)) == 2
    assert torch_name(halve) == "tritongrad.nn.functional.halved_sum"
    assert "halved_sum" in dir(tritongrad.nn.functional)
    assert tritongrad.nn.functional.halved_sum(torch.ones(4), scale=1.0) == 4


def test_a_mode_sees_the_call_and_then_what_it_is_made_of(halve: Callable[..., Tensor]) -> None:
    x = torch.ones(4)
    with Seen() as outer, Seen() as inner:
        halve(x)
    assert inner.names == ["tritongrad.nn.functional.halved_sum"]  # it is popped for the rest
    assert outer.names == ["tritongrad.nn.functional.halved_sum"]


def test_a_subclass_sees_the_call(halve: Callable[..., Tensor]) -> None:
    seen = []

    class Marked(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    halve(torch.ones(4).as_subclass(Marked))
    assert seen[0] is halve


def test_a_compiler_sees_what_it_is_made_of(halve: Callable[..., Tensor]) -> None:
    compiled = torch.compile(lambda x: halve(x) + 1, fullgraph=True, backend="aot_eager")
    assert compiled(torch.ones(4)) == 3
    with tritongrad.use():
        assert compiled(torch.ones(4)) == 3


def test_names_are_not_taken_twice(halve: Callable[..., Tensor]) -> None:
    def softmax() -> None: ...

    def halved_sum() -> None: ...

    for function in (softmax, halved_sum):
        with pytest.raises(ValueError, match=f"{function.__name__}' already"):
            extension(function)


def test_options_beside_torchs() -> None:
    """Of torch's name, in our namespace: torch's parameters first, ours by keyword alone."""
    name = "cross_entropy"
    options = list(inspect.signature(EXTENSIONS[name]).parameters.values())
    theirs = list(inspect.signature(getattr(torch.nn.functional, name)).parameters)
    assert [p.name for p in options[: len(theirs)]] == theirs
    assert all(p.kind is p.KEYWORD_ONLY for p in options[len(theirs) :])

    def relu(input: Tensor, inplace: bool = False, slope: float = 0.0) -> None: ...

    def selu(x: Tensor) -> None: ...

    def halved_sum() -> None: ...

    for function in (relu, selu, halved_sum):
        with pytest.raises(ValueError, match=function.__name__):
            extended(function)
