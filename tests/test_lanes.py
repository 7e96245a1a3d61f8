"""What a GPU does with lanes that are masked off, and programs with each other's memory.

Where a load has a mask and no value for what is masked off, the interpreter gives zero, and a GPU
whatever is in the register. The interpreter runs programs one after the other, a GPU at once: what
two of them write, or one writes and another reads, has no order. Neither shows in a result here,
nor when kernels are compiled; hence loads and stores are watched.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
import triton
import triton.language as tl
from support import ALL, Derivatives, calls, derivatives, flatten
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tritongrad import runtime
from tritongrad.op import OPS
from tritongrad.runtime import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="of the interpreter's loads and stores")

SAMPLES = 3


def poison(shape: tuple[int, ...], kind: Any) -> Any:
    """What no result may depend on."""
    dtype = numpy.dtype(interpreter._get_np_dtype(kind))
    if kind == tl.bfloat16:
        return numpy.full(shape, 0x7FC0, dtype)  # the bits of a NaN
    if dtype.kind == "f":
        return numpy.full(shape, numpy.nan, dtype)
    return numpy.full(shape, True if dtype.kind == "b" else numpy.iinfo(dtype).max // 3, dtype)


class Watch:
    """Loads and stores of the launches that are watched.

    Attributes:
        poisoned: loads in which a lane was poisoned.
        clashes: (kernel, what is wrong) of launches whose programs are not independent.
    """

    def __init__(self) -> None:
        self.poisoned = 0
        self.clashes: set[tuple[str, str]] = set()
        self._loads: dict[Any, list[Any]] = defaultdict(list)
        self._stores: dict[Any, list[Any]] = defaultdict(list)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        load, store, run = (
            InterpreterBuilder.create_masked_load,
            InterpreterBuilder.create_masked_store,
            runtime._run,
        )

        def masked_load(builder: Any, pointers: Any, mask: Any, other: Any, *options: Any) -> Any:
            self._loads[builder.grid_idx].append(pointers.data[mask.data])
            if other is None and not mask.data.all():
                self.poisoned += 1
                kind = pointers.get_element_ty()
                other = TensorHandle(poison(pointers.data.shape, kind), kind)
            return load(builder, pointers, mask, other, *options)

        def masked_store(builder: Any, pointers: Any, value: Any, mask: Any, *options: Any) -> Any:
            self._stores[builder.grid_idx].append(pointers.data[mask.data])
            return store(builder, pointers, value, mask, *options)

        def watched(kernel: Any, *launch: Any) -> None:
            self._loads.clear()
            self._stores.clear()
            run(kernel, *launch)
            self.clashes |= {(kernel.fn.__name__, what) for what in self._wrong()}

        patch.setattr(InterpreterBuilder, "create_masked_load", masked_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", masked_store)
        patch.setattr(runtime, "_run", watched)

    def _wrong(self) -> Iterator[str]:
        written: dict[int, Any] = {}
        for program, stores in self._stores.items():
            every = numpy.concatenate([addresses.ravel() for addresses in stores])
            own = numpy.unique(every).tolist()
            if len(own) != every.size:
                yield "a program writes an address twice"
            if not written.keys().isdisjoint(own):
                yield "two programs write one address"
            written.update(dict.fromkeys(own, program))
        for program, loads in self._loads.items():
            for addresses in loads:
                writers = {written.get(a) for a in numpy.unique(addresses).tolist()}
                if writers - {None, program}:
                    yield "a program reads what another writes"


@triton.jit
def faulty(out, x_ptr, n, KIND: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    if KIND == "lanes":
        tl.store(out + i, tl.sum(x, 0), mask=i < n)
    elif KIND == "same":
        tl.store(out + i, x, mask=i < n)
    elif KIND == "twice":
        tl.store(out + i // 2, x, mask=i < n)
    elif KIND == "other":
        tl.store(x_ptr + BLOCK * (1 - tl.program_id(0)) + i, x, mask=i < n)


@pytest.mark.parametrize("kind", ["lanes", "same", "twice", "other"])
def test_a_fault_is_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, out = torch.ones(32), torch.zeros(32)
    watch = Watch()
    runtime.launch(faulty, (1,), (out, x, 13), x, KIND="lanes", BLOCK=16)
    assert out.eq(13).sum() == 13
    watch.install(monkeypatch)
    runtime.launch(faulty, (2,), (out, x, 13), x, KIND=kind, BLOCK=16)
    assert watch.poisoned == 2
    assert out.isnan().any() == (kind == "lanes")
    expected = {
        "lanes": {"two programs write one address"},
        "same": {"two programs write one address"},
        "twice": {"a program writes an address twice", "two programs write one address"},
        "other": {"a program reads what another writes"},
    }[kind]
    assert {what for _, what in watch.clashes} == expected


@pytest.mark.mechanism
@pytest.mark.parametrize("name", ALL)
def test_masked_lanes_and_programs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and derivatives are, bit by bit, the same where masked-off lanes are poisoned, and no
    program of a launch has to do with what another one writes."""

    def run() -> list[Derivatives]:
        return [
            derivatives(call.triton, call.inputs, torch.float32)
            for call in calls(OPS[name], torch.float32)[:SAMPLES]
        ]

    torch.manual_seed(0)
    expected = [t for t in flatten(run()) if isinstance(t, Tensor)]
    watch = Watch()
    watch.install(monkeypatch)
    torch.manual_seed(0)
    found = [t for t in flatten(run()) if isinstance(t, Tensor)]
    assert not watch.clashes
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.nan_to_num(nan=7.0), theirs.nan_to_num(nan=7.0))
