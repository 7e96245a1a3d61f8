"""Result and gradient dtypes against torch: promotion, autocast, exact float64."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from support import (
    ALL,
    DEVICE,
    DIFFERENTIABLE,
    FLOATS,
    TOLERANCE,
    Call,
    Tolerance,
    assert_same,
    calls,
    floats,
)
from torch import Tensor

import tritongrad
from tritongrad.op import OPS
from tritongrad.runtime import INTERPRETED

DTYPES = (*FLOATS, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
UNARY = (torch.exp, torch.neg, torch.abs, torch.sqrt, torch.relu, torch.sigmoid, torch.sign)
BINARY = (torch.add, torch.sub, torch.mul, torch.div, torch.pow, torch.maximum, torch.lt)


def name_of(value: Any) -> str:
    return getattr(value, "__name__", str(value).removeprefix("torch."))


def values(dtype: torch.dtype, shape: tuple[int, ...] = (4,)) -> Tensor:
    """Small positive values that every dtype can hold, above 1 where there are fractions."""
    counted = torch.arange(1, 1 + torch.Size(shape).numel(), device=DEVICE).view(shape)
    found = counted.remainder(3).add(1).to(dtype)
    return found + found / 8 if dtype.is_floating_point else found


def attempt(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result, or the type of the exception; then gradients with respect to the inputs."""
    inputs = [a.detach().requires_grad_(a.is_floating_point()) for a in args if torch.is_tensor(a)]
    given = iter(inputs)
    try:
        result = function(*[next(given) if torch.is_tensor(a) else a for a in args], **kwargs)
        if not result.requires_grad:
            return [result]
        # torch's slope of x ** b for a bool b is an error, found here.
        result.sum().backward()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        return [f"raises {type(error).__name__}"]
    return [result, *[t.grad for t in inputs]]


def agree(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Same value, result dtype and gradient dtypes, or same exception type, as native torch."""
    expected = attempt(function, *args, **kwargs)
    with tritongrad.use():
        found = attempt(function, *args, **kwargs)
    shown = [f"{name_of(a.dtype)}{list(a.shape)}" if torch.is_tensor(a) else repr(a) for a in args]
    # A wide gradient may be a sum of what torch, or we, rounded to a narrower operand's dtype.
    dtypes = [a.dtype for a in args if torch.is_tensor(a) and a.is_floating_point()]
    coarsest = max(torch.finfo(d).eps for d in dtypes or [torch.get_default_dtype()])
    tolerance = Tolerance(max(2 * coarsest, TOLERANCE[torch.float64].rtol), 0.0)
    assert_same(
        found, expected, f"{name_of(function)}({', '.join(shown)}, {kwargs})", tolerance=tolerance
    )


@pytest.mark.parametrize("function", UNARY, ids=name_of)
def test_unary_results(function: Callable[..., Tensor]) -> None:
    for dtype in DTYPES:
        agree(function, values(dtype))


@pytest.mark.parametrize("function", BINARY, ids=name_of)
@pytest.mark.parametrize("left", DTYPES, ids=name_of)
def test_tensors_are_promoted_as_torchs(function: Callable[..., Tensor], left: torch.dtype) -> None:
    """Tensors of every pair of dtypes, and 0-dim ones, which have a lower rank in promotion."""
    for right, shape in itertools.product(DTYPES, [(4,), ()]):
        agree(function, values(left), values(right, shape))
        if not shape:
            agree(function, values(left, shape), values(right))


@pytest.mark.parametrize("function", [f for f in BINARY if f is not torch.maximum], ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_numbers_are_promoted_as_torchs(
    function: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    """Python numbers of each type: the function's second argument, both sides of the operator."""
    operators = {
        torch.add: lambda a, b: a + b,
        torch.sub: lambda a, b: a - b,
        torch.mul: lambda a, b: a * b,
        torch.div: lambda a, b: a / b,
        torch.pow: lambda a, b: a**b,
        torch.lt: lambda a, b: a < b,
    }
    for number, shape in itertools.product((2, 0.1, True), [(4,), ()]):
        if number is True and function is torch.pow:
            continue  # torch's own backward fails an internal assertion on a bool exponent
        tensor = values(dtype, shape)
        agree(function, tensor, number)
        agree(operators[function], tensor, number)
        agree(operators[function], number, tensor)


@pytest.mark.parametrize("function", [torch.add, torch.sub, torch.rsub], ids=name_of)
def test_alpha(function: Callable[..., Tensor]) -> None:
    for dtype, alpha in itertools.product(DTYPES, (2, 2.5, True)):
        agree(function, values(dtype), values(torch.float32), alpha=alpha)
        agree(function, values(dtype), values(dtype), alpha=alpha)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_where_promotes_its_branches(dtype: torch.dtype) -> None:
    condition = values(torch.int64) > 1
    for other in (*map(values, DTYPES), 0.1, 2):
        agree(torch.where, condition, values(dtype), other)
        agree(torch.where, condition, other, values(dtype))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=name_of)
def test_default_dtype(dtype: torch.dtype) -> None:
    """What becomes of integers follows the default dtype of the moment, not of the import."""
    with default_dtype(dtype):
        agree(torch.exp, values(torch.int64))
        agree(torch.div, values(torch.int64), values(torch.int32))
        agree(torch.mul, values(torch.int64), 0.1)
        agree(torch.mul, values(torch.float32), 0.1)


def test_float64_constants_are_exact() -> None:
    """HAZARDS 16: a number on its way to a kernel must not pass through float32."""
    x = values(torch.float64)
    for function in (torch.add, torch.sub, torch.mul, torch.div, torch.pow):
        with tritongrad.use() as session:
            found = function(x, 0.1), function(x, torch.tensor(0.1, dtype=torch.float64))
        assert session.ran.total() == 2
        for value in found:
            # To the last bit, but for the power, of which a library may round the last.
            torch.testing.assert_close(value, function(x, 0.1), rtol=3e-16, atol=0)
    with tritongrad.use():
        scaled = torch.add(x, x, alpha=0.1)
        chosen = torch.where(x > 2, x, 0.1)
    assert torch.equal(scaled, torch.add(x, x, alpha=0.1))
    assert torch.equal(chosen, torch.where(x > 2, x, 0.1))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.mechanism
def test_gradients_have_their_inputs_dtype(name: str, dtype: torch.dtype) -> None:
    call = calls(OPS[name], dtype)[0]
    outputs = floats(call.triton(*call.inputs))
    assert [t.dtype for t in outputs] == [t.dtype for t in floats(call.torch(*call.inputs))]
    found = torch.autograd.grad(outputs, call.inputs, [torch.ones_like(t) for t in outputs])
    assert [g.dtype for g in found] == [t.dtype for t in call.inputs]


ANOTHER_LISTED = {
    ("square", "cuda"): "torch calls pow, which is listed",
    ("inner", "cuda"): "torch calls tensordot, which is listed",
    ("pairwise_distance", "cuda"): "torch calls norm, which is listed",
    ("nll_loss", "cuda"): "reads half precision as it is, and gives float32",
    ("nll_loss", "cpu"): "reads half precision as it is, and gives float32",
    ("binary_cross_entropy", "cuda"): "listed as an error",
}
"""Ops for which autocast does something, or not, and torch's dispatcher says otherwise; and why."""


def is_autocast(name: str, key: str) -> bool | None:
    """Whether torch's autocast has a kernel of its own for a function; None: it is no operator."""
    packet = getattr(torch.ops.aten, name, getattr(torch.ops.aten, f"linalg_{name}", None))
    if packet is None:
        return None
    found = []
    for overload in packet.overloads():
        which = packet._qualified_op_name + ("" if overload == "default" else f".{overload}")
        # TorchScript has overloads, of numbers, that no dispatcher knows.
        with suppress(RuntimeError):
            found.append(torch._C._dispatch_has_kernel_for_dispatch_key(which, key))
    return any(found)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_autocast_lists_are_this_torchs(device: str) -> None:
    """Also those of a GPU, on a machine without one; they change between versions of torch."""
    differ, asked = set(), 0
    for name, op in OPS.items():
        listed = is_autocast(op.replaces[0].__name__, f"Autocast{device.upper()}")
        asked += listed is not None
        if listed is not None and listed != (op.autocast.get(device, "keep") != "keep"):
            differ.add(name)
    assert differ == {name for name, where in ANOTHER_LISTED if where == device}
    assert asked > 150


REFUSES_AUTOCAST = {"add_layer_norm", "add_rms_norm"}
"""Ops that on a GPU leave calls under autocast to their definition, which has two dtypes there."""


def under_autocast(
    function: Callable[..., Any], call: Call, lower: torch.dtype
) -> tuple[list[torch.dtype], list[Tensor], list[Tensor]]:
    inputs = [t.detach().requires_grad_() for t in call.inputs]
    with torch.autocast(DEVICE.type, lower):
        outputs = floats(function(*inputs))
    if not any(t.requires_grad for t in outputs):
        return [t.dtype for t in outputs], outputs, []
    found = torch.autograd.grad(outputs, inputs, [torch.ones_like(t) for t in outputs])
    return [t.dtype for t in outputs], outputs, list(found)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name_of)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    """HAZARDS 24. float64 is never lowered; what is lowered has its gradient in its own dtype."""
    for call in calls(OPS[name], dtype)[:3]:
        # What stands in for torch's function elsewhere is in no list of autocast's.
        native = call.torch if OPS[name].random else call.original
        try:
            theirs = under_autocast(native, call, torch.bfloat16)
        except RuntimeError as refusal:  # binary_cross_entropy on a GPU
            with (
                tritongrad.use(),
                pytest.raises(RuntimeError, match=re.escape(str(refusal).splitlines()[0])),
            ):
                under_autocast(call.original, call, torch.bfloat16)
            continue
        if name in REFUSES_AUTOCAST and not INTERPRETED:
            with tritongrad.use() as session:
                ours = under_autocast(call.original, call, torch.bfloat16)
            assert name not in session.ran
        else:
            ours = under_autocast(call.triton, call, torch.bfloat16)
        assert ours[0] == theirs[0], call
        assert [t.dtype for t in ours[2]] == [t.dtype for t in theirs[2]], call
        # As exact as the lowest dtype in between; how exact each dtype is has suites of its own.
        torch.testing.assert_close(ours[1:], theirs[1:], rtol=3e-2, atol=3e-2, equal_nan=True)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.mechanism
def test_autocast_off_inside(name: str) -> None:
    """A region that switches autocast off computes in the inputs' dtype."""
    call = calls(OPS[name], torch.float32)[0]
    with torch.autocast(DEVICE.type, torch.bfloat16), torch.autocast(DEVICE.type, enabled=False):
        found, expected = call.triton(*call.inputs), call.torch(*call.inputs)
    assert_same(found, expected, repr(call))
