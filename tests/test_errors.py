"""HAZARDS 28: what torch refuses is refused, with torch's exception type.

Every op's samples are spoiled in one argument at a time: another shape, dtype, device, kind of
value. Whether that is an error, torch itself says, called with the same arguments. Where it is one,
ours has torch's type, names the argument with what came for it, and has launched nothing; where it
is none, ours gives what torch gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import launches
from support import (
    ALL,
    DEVICE,
    FLOAT32_CONSTANTS,
    Call,
    assert_same,
    calls,
    flatten,
    on_the_cpu,
    stops_a_gpu,
)
from torch import Tensor

import tritongrad
from tritongrad.compare.parity import STAND_INS, seeded
from tritongrad.dispatch import describe, positional
from tritongrad.op import OPS, OVERLOADS, TARGETS, Bind
from tritongrad.reroute import HARMLESS
from tritongrad.sampling import Sample, clone, tensors

pytestmark = [
    # torch's, of ranks that it will refuse.
    pytest.mark.filterwarnings("ignore:dropout.d. Received a:UserWarning"),
    # torch's, of a variance of fewer elements than it corrects for.
    pytest.mark.filterwarnings("ignore:.*degrees of freedom is <= 0:UserWarning"),
    # torch's, of the two options that reduction has replaced.
    pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning"),
    pytest.mark.filterwarnings("ignore:`eps` parameter is deprecated:UserWarning"),
    # torch's, where it has no use of them.
    pytest.mark.filterwarnings("ignore:.*``options`` ignored:UserWarning"),
]


class Spoiled(NamedTuple):
    """A call with one argument that is wrong, perhaps: its name in ``bind``, and its value."""

    name: str
    value: Any
    sample: Sample


def few(name: str, most: int = 3) -> list[Call]:
    """The first small samples of an op."""
    return [c for c in calls(OPS[name]) if 0 < sum(t.numel() for t in c.inputs) <= 40][:most]


def bind_of(name: str) -> Bind:
    bind = OPS[name].bind
    assert bind is not None
    return bind


def overloads(func: Callable[..., Any]) -> Iterator[tuple[str, Bind]]:
    """The ops that are asked in turn to take a call of ``func``, with their signatures."""
    op, bind = TARGETS[func]
    yield op.name, bind
    while (func, bind) in OVERLOADS:
        op, bind = OVERLOADS[func, bind]
        yield op.name, bind


def parameters(name: str) -> list[str]:
    return list(inspect.signature(bind_of(name)).parameters)


def places(name: str, sample: Sample) -> Iterator[tuple[str, int | str, Any]]:
    """Each argument of a call: its name, its position or keyword, its value."""
    names = positional(bind_of(name), len(sample.args))
    for i, (argument, value) in enumerate(zip(names, sample.args, strict=True)):
        yield argument, i, value
    for argument, value in sample.kwargs.items():
        yield argument, argument, value


def spoil(sample: Sample, argument: str, place: int | str, value: Any) -> Spoiled:
    """``sample`` with ``value`` at a position or keyword."""
    args, kwargs, note = sample
    if isinstance(place, int):
        args = (*args[:place], value, *args[place + 1 :])
    else:
        kwargs = kwargs | {place: value}
    return Spoiled(argument, value, Sample(args, kwargs, note))


def spoiled_tensors(name: str, others: Callable[[Tensor], Iterator[Any]]) -> Iterator[Spoiled]:
    """Calls with one of the tensors replaced."""
    for call in few(name):
        for argument, place, value in places(name, call.sample):
            if isinstance(value, Tensor):
                for other in others(value.detach()):
                    yield spoil(call.sample, argument, place, other)
            elif isinstance(value, list) and isinstance(value[0], Tensor):
                for other in others(value[0].detach()):
                    yield spoil(call.sample, argument, place, [other, *value[1:]])


def outcome(function: Callable[[], Any]) -> Any:
    """What a call returns or raises."""
    try:
        return function()
    except Exception as error:
        return error


MIXED = RuntimeError("expected all tensors to be on the same device, one is on meta")


def is_mixed(sample: Sample) -> bool:
    """Whether some tensors have memory and some have not: native torch has read what is not there
    and returned numbers."""
    return len({t.is_meta for t in tensors(sample) if t.dim()}) > 1


def check(name: str, spoiled: Spoiled) -> bool:
    """The op, called itself and by torch's name under ``use()``, does what torch does. Returns
    whether that is to refuse."""
    op, func, bind = OPS[name], OPS[name].replaces[0], bind_of(name)
    native = seeded(op, STAND_INS[func]) if op.random else func
    _, _, sample = spoiled

    def on_copies(function: Callable[..., Any]) -> Callable[[], Any]:
        args, kwargs, _ = clone(sample)
        return lambda: outcome(lambda: function(*args, **kwargs))

    what = f"{name}({describe(bind, sample.args, sample.kwargs)})"
    if stops_a_gpu(name, func, *sample.args, **sample.kwargs):
        return True
    expected = MIXED if is_mixed(sample) else on_copies(native)()
    direct, launched = launches(on_copies(seeded(op, op)))
    rerouted_call = on_copies(seeded(op, func))
    with tritongrad.use() as session:
        rerouted = rerouted_call()
    if not isinstance(expected, Exception):
        if name in FLOAT32_CONSTANTS and DEVICE.type != "cpu":
            expected = on_the_cpu(func, *sample.args, **sample.kwargs)
        for result in (direct, rerouted):
            assert not isinstance(result, Exception), f"{what}: torch takes it"
            assert_equal(result, expected, what)
        return False
    for result in (direct, rerouted):
        assert type(result) is type(expected), f"{what}: {result!r}, torch gives {expected!r}"
    assert (launched, session.launches) == (0, 0), what
    # Only the first line: the rest may be a trace with addresses.
    refusal = str(expected).partition("\n")[0]
    heads = tuple(
        f"{taker}({describe(b, sample.args, sample.kwargs)}): {refusal}"
        for taker, b in overloads(func)
    )
    assert str(direct).startswith(heads)
    # What torch's own random numbers ask of a device, some versions of it, is no call.
    if {reason for _, reason in session.fell_back} - HARMLESS:
        # Python functions of torch's hand on their defaults, too.
        assert str(rerouted).startswith(tuple(f"{taker}(" for taker, _ in overloads(func)))
        assert f": {refusal}" in str(rerouted)
        if spoiled.name:
            assert describe(bind, (), {spoiled.name: spoiled.value}) in str(rerouted)
    else:
        # Arguments that fit no overload are refused by torch's parser, before any mode is asked.
        assert str(rerouted).startswith(refusal)
    return True


def assert_equal(actual: Any, expected: Any, what: str) -> None:
    """``assert_same``, for complex and meta tensors as well."""
    ours, theirs = flatten(actual), flatten(expected)
    for i, (a, e) in enumerate(zip(ours, theirs, strict=True)):
        if isinstance(e, Tensor) and (e.is_complex() or e.is_meta):
            assert (a.shape, a.dtype, a.device) == (e.shape, e.dtype, e.device), what
            assert e.is_meta or torch.equal(a, e), what
        else:
            assert_same(a, e, f"{what}[{i}]")


@pytest.mark.parametrize("name", ALL)
def test_no_tensor(name: str) -> None:
    """Something else in a tensor's place."""

    def others(tensor: Tensor) -> Iterator[Any]:
        yield from ("text", None, [1.0, 2.0], {}, 1j, 2.5, True, 2**70, tensor.numpy(force=True))

    refused = [check(name, spoiled) for spoiled in spoiled_tensors(name, others)]
    assert sum(refused) >= len(refused) / 2


# Once, of its rms_norm: that two dtypes are not fused, and what becomes of a complex weight.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.filterwarnings("ignore:Casting complex values to real discards:UserWarning")
@pytest.mark.parametrize("name", ALL)
def test_dtype(name: str) -> None:
    def others(tensor: Tensor) -> Iterator[Any]:
        for dtype in (torch.float32, torch.int32, torch.bool, torch.complex64):
            yield tensor.to(dtype)

    for spoiled in spoiled_tensors(name, others):
        check(name, spoiled)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.mechanism
def test_device(name: str) -> None:
    def others(tensor: Tensor) -> Iterator[Any]:
        yield tensor.to("meta")

    for spoiled in spoiled_tensors(name, others):
        assert check(name, spoiled) or not is_mixed(spoiled.sample)


ANY_SHAPES = {"kron"}
"""Ops of several tensors that take them in all shapes."""


@pytest.mark.parametrize("name", ALL)
def test_shape(name: str) -> None:
    def others(tensor: Tensor) -> Iterator[Any]:
        shape = tensor.shape
        yield tensor.new_ones((*shape, 7))
        yield tensor.new_ones((7, *shape))
        for d, n in enumerate(shape):
            yield tensor.new_ones((*shape[:d], n + 1, *shape[d + 1 :]))

    found = list(spoiled_tensors(name, others))
    refused = [check(name, spoiled) for spoiled in found]
    several = any(len(tensors(spoiled.sample)) > 1 for spoiled in found)
    assert any(refused) or not several or name in ANY_SHAPES


LOSES_OUT = {"chain_matmul"}
"""Python functions of torch's that hand no ``out`` to a mode."""


@pytest.mark.parametrize("name", ALL)
def test_options(name: str) -> None:
    """Numbers, flags, dimensions, dtypes: of another type, or out of range."""
    values = (
        "text", None, [], {}, 1j, 2.5, -7, 99, 2**70, True, False, (0, 0), (0, -1), (0, "a"),
        torch.int32, Tensor,
    )  # fmt: skip
    for call in few(name, 2):
        taken = {n for n, place, _ in places(name, call.sample) if isinstance(place, int)}
        for argument in parameters(name):
            if argument not in taken and not (argument == "out" and name in LOSES_OUT):
                for value in values:
                    check(name, spoil(call.sample, argument, argument, value))


READS_LISTS = {"einsum"}
"""Python functions of torch's that compare what may be numbers before they ask a mode; without its
equation, einsum so compares the elements of a tensor."""


@pytest.mark.parametrize("name", ALL)
def test_signature(name: str) -> None:
    """Arguments too many, too few, unknown, and results that cannot be written."""
    assert check(name, Spoiled("", None, Sample(())))
    for call in few(name):
        sample = call.sample
        assert check(name, spoil(sample, "nonsense", "nonsense", 1))
        extra = Sample((*sample.args, *[1j] * 12), sample.kwargs)
        *_, last = positional(bind_of(name), len(extra.args))
        assert check(name, Spoiled(last, 1j, extra))
        if name not in READS_LISTS:
            missing = Sample(sample.args[1:], sample.kwargs)
            check(name, Spoiled("", None, missing))
        if name in LOSES_OUT:
            continue
        assert check(name, spoil(sample, "out", "out", "text"))
        # Of the shape of the result: torch would change it before it refuses the dtype.
        shape = flatten(call.torch(*call.inputs))[0].shape
        unfit = call.inputs[0].new_empty(shape, dtype=torch.int32, requires_grad=False)
        check(name, spoil(sample, "out", "out", unfit))


RANDOM = settings(max_examples=12)
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
DIM = st.integers(-4, 4)


@pytest.mark.parametrize("name", ALL)
@RANDOM
@given(data=st.data())
@pytest.mark.mechanism
def test_random_shapes(name: str, data: st.DataObject) -> None:
    """Whether operands fit each other is torch's decision for any two shapes."""
    sample = few(name, 1)[0].sample
    spoiled = None
    for argument, place, value in places(name, sample):
        other: Any = None
        if isinstance(value, Tensor):
            other = value.new_ones(data.draw(SHAPES, argument))
        elif isinstance(value, list) and isinstance(value[0], Tensor):
            other = [t.new_ones(data.draw(SHAPES, argument)) for t in value]
        if other is not None:
            spoiled = spoil(sample, argument, place, other)
            sample = spoiled.sample
    assert spoiled is not None
    check(name, spoiled)


@pytest.mark.parametrize("name", [n for n in ALL if "dim" in parameters(n)])
@RANDOM
@given(shape=SHAPES, dim=st.one_of(DIM, st.lists(DIM, max_size=3), st.tuples(DIM, DIM)))
def test_random_dims(name: str, shape: tuple[int, ...], dim: Any) -> None:
    tensor = few(name, 1)[0].inputs[0].new_ones(shape)
    check(name, spoil(Sample((tensor,)), "dim", "dim", dim))
