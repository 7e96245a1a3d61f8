"""Composites as programs: made again as they were made, and never where that might differ."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import DEVICE
from torch import Tensor
from torch.autograd import forward_ad as fwAD

from tritongrad.dispatch import apply
from tritongrad.op import Op, Tensors


class Composite:
    """An op by a definition, which counts how often it is read."""

    def __init__(self, definition: Callable[..., Tensor]) -> None:
        self.reads = 0

        def reference(params: Any, *tensors: Tensor) -> Tensors:
            self.reads += 1
            return (definition(*tensors),)

        self.op = Op(name="composite", bind=lambda *tensors: (tensors, None), reference=reference)

    def __call__(self, *tensors: Tensor) -> Tensor:
        bound, params = self.op.bind(*tensors)
        found: Tensor = apply(self.op, params, bound)
        return found


def make(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device=DEVICE)


def scaled(x: Tensor, y: Tensor) -> Tensor:
    rows = x.shape[0]
    return torch.where(x > 0, x.mT.reshape(rows, -1) @ y, y.sum(0, keepdim=True) / rows)


def test_a_definition_is_read_once() -> None:
    """Values and gradients are those of the tensors at hand."""
    composite = Composite(scaled)
    for _ in range(3):
        inputs = [make(4, 4).requires_grad_() for _ in range(2)]
        found = composite(*inputs)
        torch.testing.assert_close(found, scaled(*inputs))
        mine, torchs = (torch.autograd.grad(f.sum(), inputs) for f in (found, scaled(*inputs)))
        torch.testing.assert_close(mine, torchs)
    assert composite.reads == 1
    composite(make(4, 4), make(4, 4))  # neither requires a gradient
    composite(make(3, 3), make(3, 3))
    assert composite.reads == 3


def in_place(x: Tensor) -> Tensor:
    y = x * 1
    y += x
    return y


def in_place_by_function(x: Tensor) -> Tensor:
    y = x * 1
    torch.nn.functional.relu(y, inplace=True)
    return y


def into(x: Tensor) -> Tensor:
    y = x * 1
    torch.add(x, x, out=y)
    return y


ELSEWHERE = make(3)
WITHOUT = {
    "in place": in_place,
    "in place, by an argument": in_place_by_function,
    "out=": into,
    "assignment": lambda x: (y := x * 1, y.__setitem__(0, 5.0))[0],
    "value": lambda x: x * 2 if x.sum() > 0 else x * 3,
    "number": lambda x: x * x.amax().item(),
    "list": lambda x: torch.cat([x, x]) * 2,
    "several results": lambda x: torch.max(x, 0)[0] * 2,
    "data": lambda x: x.data * 2,
    "another tensor": lambda x: x * ELSEWHERE,
}


@pytest.mark.parametrize("case", WITHOUT)
def test_what_is_no_program_is_read_each_time(case: str) -> None:
    composite = Composite(WITHOUT[case])
    for sign in (1, -1, 1):
        x = sign * make(3).abs()
        torch.testing.assert_close(composite(x), WITHOUT[case](x.clone()))
    assert composite.reads == 3


def of_state(x: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        x = x * 2
    if torch.is_inference_mode_enabled():
        x = x * 3
    if fwAD._current_level >= 0:
        x = x * 5
    if torch.is_autocast_enabled(DEVICE.type):
        x = x * 7
    return x * torch.ones(3, device=DEVICE)


@contextlib.contextmanager
def half_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def test_ops_without_a_name_are_in_programs() -> None:
    """What a definition calls by ``apply`` is noted once, and not what that calls in turn."""
    inner = Composite(scaled)
    outer = Composite(lambda x, y: apply(inner.op, None, (x + y, y)).exp())
    for _ in range(3):
        x, y = make(4, 4), make(4, 4)
        torch.testing.assert_close(outer(x, y), scaled(x + y, y).exp())
    assert outer.reads == 1


def test_of_another_state_is_another_program() -> None:
    composite = Composite(of_state)
    x = make(3)

    contexts: list[Callable[[], Any]] = [
        torch.enable_grad,
        torch.no_grad,
        fwAD.dual_level,
        torch.inference_mode,
        lambda: torch.autocast(DEVICE.type, torch.bfloat16),
        half_by_default,
    ]
    for context in (*contexts, *contexts):
        with context():
            expected = of_state(x)
            found = composite(x)
        assert torch.equal(found, expected)


def test_random_numbers_are_drawn_anew() -> None:
    composite = Composite(lambda x: x * torch.rand(3, device=DEVICE))
    x = make(3)
    assert not torch.equal(composite(x), composite(x))
    torch.manual_seed(1)
    first = composite(x)
    torch.manual_seed(1)
    assert torch.equal(first, composite(x))
    assert composite.reads == 1


def test_no_tensor_is_kept() -> None:
    composite = Composite(scaled)
    inputs = [make(4, 4) for _ in range(2)]
    found = [weakref.ref(t) for t in inputs]
    composite(*inputs)
    composite(*inputs)
    del inputs
    gc.collect()
    assert [ref() for ref in found] == [None, None]


def test_forward_mode() -> None:
    composite = Composite(scaled)
    for _ in range(2):
        primals, tangents = [[make(4, 4) for _ in range(2)] for _ in range(2)]
        with fwAD.dual_level():
            duals = [fwAD.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)]
            found = fwAD.unpack_dual(composite(*duals)).tangent
        torch.testing.assert_close(found, torch.func.jvp(scaled, (*primals,), (*tangents,))[1])
    assert composite.reads == 1
