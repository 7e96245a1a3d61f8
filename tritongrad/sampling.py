"""Sample calls of ops, for parity, tests, static compilation and benchmarks.

An op's ``samples(make)`` yields calls built with the factory ``make``, so that the same list
serves random tensors of any dtype as well as the big empty ones that static compilation needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Sample(NamedTuple):
    """One call: ``func(*args, **kwargs)``; ``note`` says what it is there for."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = {}  # noqa: RUF012  (read only, as all of a NamedTuple)
    note: str = ""


class Make(Protocol):
    """Makes an input tensor.

    Args:
        shape: its shape.
        low, high: range of the values, when the op is not defined (or not smooth) everywhere.
        dtype: another dtype than the one asked for (a condition's bool).
        requires_grad: whether derivatives are taken with respect to it.
    """

    def __call__(
        self,
        *shape: int,
        low: float = ...,
        high: float = ...,
        dtype: torch.dtype | None = ...,
        requires_grad: bool = ...,
    ) -> Tensor: ...


class Random:
    """Uniform random tensors of one dtype from a seed of their own."""

    def __init__(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(
        self,
        *shape: int,
        low: float = -2.0,
        high: float = 2.0,
        dtype: torch.dtype | None = None,
        requires_grad: bool = True,
    ) -> Tensor:
        unit = torch.rand(shape, dtype=torch.float64, generator=self.generator)
        values = low + (high - low) * unit
        if dtype is torch.bool:
            return (values > (low + high) / 2).to(self.device)
        tensor = values.to(device=self.device, dtype=dtype or self.dtype)
        return tensor.requires_grad_(requires_grad and tensor.is_floating_point())


def clone(sample: Sample) -> Sample:
    """``sample`` with leaves of its own, laid out in memory as the originals are."""

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            return (
                value.detach()
                .clone(memory_format=torch.preserve_format)
                .requires_grad_(value.requires_grad)
            )
        if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
            return type(value)(copy(v) for v in value)
        return value

    return Sample(
        tuple(copy(v) for v in sample.args),
        {name: copy(v) for name, v in sample.kwargs.items()},
        sample.note,
    )


def tensors(sample: Sample) -> list[Tensor]:
    """The tensors of a call, in the order of its arguments."""
    found: list[Tensor] = []

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            for v in value:
                visit(v)

    for value in (*sample.args, *sample.kwargs.values()):
        visit(value)
    return found
