"""Hazards of shapes, strides and sizes. Every test walks OPS.

The tests' numbers are those of the project's list of hazards, which each docstring restates.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from scenarios import gradients, launches, linked, small
from support import (
    ALL,
    DIFFERENTIABLE,
    READ_BY_INDEX,
    Call,
    Tolerance,
    assert_same,
    flatten,
    random_like,
    stops_a_gpu,
)
from torch import Tensor

import tritongrad
from tritongrad import runtime
from tritongrad.op import OPS
from tritongrad.runtime import INTERPRETED
from tritongrad.sampling import Sample, tensors

each_op = pytest.mark.parametrize("name", DIFFERENTIABLE)


def strides(value: Any) -> list[list[int]]:
    """Strides of results, where an element's address depends on them."""
    return [
        [step for step, n in zip(t.stride(), t.shape, strict=True) if n > 1]
        for t in linked(value)
        if t.numel()
    ]


# -------------------------------------------------------------------------- 9: inputs' layout


def every_other(t: Tensor) -> Tensor:
    return torch.stack([t, t + 1], -1).flatten(-2)[..., ::2] if t.dim() else t


def offset(t: Tensor) -> Tensor:
    return torch.cat([t.new_ones(1), t.flatten()])[1:].view(t.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "every other": every_other,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "permuted": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0) if t.dim() else t,
    "rows expanded": lambda t: t[:1].expand(t.shape) if t.dim() and t.shape[0] else t,
    "columns expanded": lambda t: t[..., :1].expand(t.shape) if t.dim() and t.shape[-1] else t,
    "offset by one": offset,
    "overlapping": lambda t: torch.as_strided(
        t.contiguous(), t.shape, (1,) * t.dim()
    ) if t.numel() else t,
    "negated lazily": torch._neg_view,
}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.mechanism
def test_input_layout(name: str, layout: str) -> None:
    """9: inputs of any layout; values, gradients and the layout of results are torch's."""
    if layout == "overlapping" and name == "kron":
        pytest.skip("torch's own kron refuses a product that it cannot view as the result")
    if layout == "negated lazily" and name in REFUSES_NEGATIVE:
        pytest.skip("torch refuses the numbers negated")
    arrange = LAYOUTS[layout]

    def run(f: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
        found = f(*[arrange(x) for x in inputs])
        return found, gradients(linked(found), inputs)

    for call in small(name, most=3):
        if layout == "negated lazily" and call.native is not call.func:
            continue  # torch runs it, and would be compared with what stands in for it
        ours = run(lambda *inputs, call=call: direct(call, inputs), call.inputs)
        theirs = run(call.torch, call.inputs)
        assert_same(ours, theirs, str(call))
        keeps = name not in MADE_CONTIGUOUS and (INTERPRETED or name != "batch_norm")
        if theirs[0].__class__ is Tensor and keeps:
            assert strides(ours[0]) == strides(theirs[0]), str(call)


# torch's CPU kernel computes on a contiguous copy; ours keeps the layout, as its neighbours do.
# soft_margin_loss's layout is that of the input where that has stride 0, too; ours is the target's.
# rms_norm's is contiguous in both, but torch's keeps channels_last.
# Attention's has heads inside where the query has, as of torch's fused kernels; it is compared with
# the formula in separate operations.
MADE_CONTIGUOUS = {
    "logsigmoid",
    "soft_margin_loss",
    "rms_norm",
    "add_rms_norm",
    "scaled_dot_product_attention",
}

REFUSES_NEGATIVE = {"binary_cross_entropy", "gaussian_nll_loss"}


def direct(call: Call, inputs: Sequence[Tensor]) -> Any:
    """The call rerouted, whether or not the op takes it."""
    with tritongrad.use():
        return call.original(*inputs)


@each_op
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.preserve_format], ids=str)
@pytest.mark.mechanism
def test_memory_format(name: str, memory_format: torch.memory_format) -> None:
    """9: channels-last inputs, and permuted ones, give results in the layout that torch's have."""

    def arrange(t: Tensor) -> Tensor:
        if memory_format is torch.channels_last:
            return t.contiguous(memory_format=memory_format) if t.dim() == 4 else t
        return t.permute(*range(1, t.dim()), 0) if t.dim() == 4 else t

    for call in solid(name):
        wide = resized(call, lambda shape: (3, 3, 3, 3) if len(shape) == 2 else shape)
        inputs = [arrange(x) for x in wide.inputs]
        try:
            theirs = wide.torch(*inputs)
        except (RuntimeError, IndexError, TypeError, ValueError):
            continue  # not an op of four dimensions
        ours = direct(wide, inputs)
        assert name in MADE_CONTIGUOUS or strides(ours) == strides(theirs), str(wide)
        expected = theirs, gradients(linked(theirs), wide.inputs)
        assert_same((ours, gradients(linked(ours), wide.inputs)), expected, str(wide))


# --------------------------------------------------------------------- 10, 11, 13: inputs' sizes


def solid(name: str) -> list[Call]:
    """Small samples none of whose tensors is empty."""
    return [c for c in small(name, most=3) if all(t.numel() for t in tensors(c.sample))]


def mapped(call: Call, function: Callable[[Tensor], Tensor]) -> Call:
    """``call`` with ``function`` of each of its tensors."""

    def change(value: Any) -> Any:
        if isinstance(value, Tensor):
            return function(value.detach()).requires_grad_(value.requires_grad)
        if isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value):
            return type(value)(map(change, value))
        return value

    args, kwargs, note = call.sample
    sample = Sample(tuple(map(change, args)), {n: change(v) for n, v in kwargs.items()}, note)
    return Call(call.op, sample, call.func)


def resized(call: Call, reshape: Callable[[torch.Size], Sequence[int]]) -> Call:
    """``call`` with every tensor's shape changed by ``reshape``, filled with its own values over
    and over, and so every ``torch.Size`` among the arguments, which is the end of a tensor's."""

    def refill(t: Tensor) -> Tensor:
        shape = torch.Size(reshape(t.shape))
        times = -(-shape.numel() // t.numel())
        return t.flatten().repeat(times)[: shape.numel()].view(shape)

    args, kwargs, note = mapped(call, refill).sample
    args = tuple(torch.Size(reshape(v)) if isinstance(v, torch.Size) else v for v in args)
    return Call(call.op, Sample(args, kwargs, note), call.func)


def same_or_same_error(call: Call) -> None:
    """Value and gradients are torch's, or the error is of torch's type."""
    try:
        theirs = call.torch(*call.inputs)
    except Exception as error:
        with pytest.raises(type(error)):
            direct(call, call.inputs)
        return
    ours = direct(call, call.inputs)
    assert_same(ours, theirs, str(call))
    ours, theirs = linked(ours), linked(theirs)
    assert_same(gradients(ours, call.inputs), gradients(theirs, call.inputs), str(call))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [0, 1])
def test_degenerate_sizes(name: str, size: int) -> None:
    """10: every dimension of size zero or one, one at a time and all at once; 0-dim."""
    if not INTERPRETED and name in READ_BY_INDEX and size == 0:
        pytest.skip("torch's kernels stop at an index past the end, and the process with them")
    for call in solid(name):
        reshapes: list[Callable[[torch.Size], Sequence[int]]] = [
            lambda shape, old=old: [size if n == old else n for n in shape]
            for old in {n for t in call.inputs for n in t.shape}
        ]
        for reshape in (*reshapes, lambda shape: [size] * len(shape), lambda shape: ()):
            changed = resized(call, reshape)
            args, kwargs = changed.arguments(changed.inputs)
            if not stops_a_gpu(name, changed.native, *args, **kwargs):
                same_or_same_error(changed)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.mechanism
def test_wrong_shapes(name: str, dim: int) -> None:
    """13: shapes that do not go together raise torch's error, and no kernel is launched on them."""
    for call in solid(name):
        if len(tensors(call.sample)) < 2:
            continue
        number = count()

        def longer(shape: torch.Size, number: Iterator[int] = number) -> list[int]:
            # Every second tensor disagrees with the others.
            sizes = list(shape)
            if next(number) % 2 and sizes:
                sizes[dim] += 2
            return sizes

        changed = resized(call, longer)
        try:
            changed.torch(*changed.inputs)
        except (RuntimeError, ValueError):
            _, launched = launches(partial(same_or_same_error, changed))
            assert not launched, f"{changed}: launched {launched} kernels"
        else:
            same_or_same_error(changed)


def within(size: int) -> Callable[[Tensor], Tensor]:
    """Tensors as they are, of labels and indices those below ``size``."""
    return lambda t: t if t.dtype is not torch.int64 else t.remainder(size)


def lengthened(name: str, length: int, others: int, most: int) -> Iterator[Call]:
    """Calls with each of the sizes of a sample in turn set to ``length`` and the others to
    ``others``, as long as torch takes them and no tensor has over ``most`` elements."""
    for call in solid(name):
        for old in {n for t in call.inputs for n in t.shape if n > 1}:

            def reshape(shape: torch.Size, old: int = old) -> list[int]:
                return [length if n == old else others for n in shape]

            if max(math.prod(reshape(t.shape)) for t in call.inputs) > most:
                continue
            changed = mapped(resized(call, reshape), within(others))
            try:
                meta = mapped(changed, lambda t: t.to("meta"))
                found = meta.torch(*meta.inputs)
            except RuntimeError:
                continue
            if max(t.numel() for t in flatten(found)) <= most:
                yield changed


@each_op
@pytest.mark.mechanism
def test_long_dimensions(name: str) -> None:
    """11: each dimension longer than any block and no multiple of one, the others short."""
    if all(kernel.startswith("pointwise") for kernel in OPS[name].kernels):
        pytest.skip(
            "pointwise kernels see one flat dimension, and a sample is past one block of it"
        )
    # A block of a contraction spans at most 256, and the interpreter takes minutes for more.
    # A whole row fits a program up to 16384 elements of float32.
    # A bag is a program of its own, of at most 1024 columns.
    short = {"gemm", "attention_fwd", "embedding_bag_fwd"}.intersection(OPS[name].kernels)
    length = 1031 if short else 16411
    for call in lengthened(name, length, 2, 2 * length):
        same_or_same_error(call)


@each_op
@pytest.mark.mechanism
def test_grid_limits(name: str) -> None:
    """11: a GPU's grid has at most 65535 programs in y and in z, whatever the sizes."""
    grids: list[tuple[int, ...]] = []
    with runtime.stub(), runtime.observe(lambda kernel, grid, args, meta: grids.append(grid)):
        for call in lengthened(name, 1_000_000, 2, 8_000_000):
            gradients(linked(direct(call, call.inputs)), call.inputs)
    assert grids
    for grid in grids:
        assert grid[0] < 2**31
        assert all(n <= 65535 for n in grid[1:]), grid


# -------------------------------------------------------------------------- 16: float64 throughout


@each_op
def test_float64_throughout(name: str) -> None:
    """16: numbers reach a float64 call in float64: 0.1 is not float32's 0.1."""

    def change(value: Any) -> Any:
        return 0.1 if type(value) is float and 0 < value < float("inf") else value

    if name == "celu":
        pytest.skip("torch's own derivative takes 1 / alpha in float32; ours is exact")
    for call in small(name, most=100):
        args, kwargs, note = call.sample
        sample = Sample(tuple(map(change, args)), {n: change(v) for n, v in kwargs.items()}, note)
        if any(type(v) is float for v in (*args, *kwargs.values())):
            same_or_same_error(Call(call.op, sample))


# -------------------------------------------------------------------- 12: offsets beyond 32 bits


@pytest.mark.parametrize("part", range(2))
def test_beyond_32_bits(part: int) -> None:
    """12: strides that reach past 2**31 elements, of inputs and of upstream gradients, in a process
    of its own: the failure is a segmentation fault. The memory between is never touched."""
    if not INTERPRETED and torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    names = DIFFERENTIABLE[part::2]
    process = subprocess.run(
        [sys.executable, __file__, *names],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    assert process.returncode == 0, f"{process.stdout[-300:]}\n{process.stderr[-3000:]}"
    assert process.stdout.split() == names


def far(t: Tensor) -> Tensor:
    """``t`` in float16 with 2**31 elements or more between its first and its last."""
    longest = max(t.shape, default=1)
    if longest < 2:
        return t.detach().half()
    dim = t.shape.index(longest)
    layout = list(torch.empty([1 if d == dim else n for d, n in enumerate(t.shape)]).stride())
    layout[dim] = 2**31 // (longest - 1) + 1
    memory = torch.empty(2**31 + 2**20, dtype=torch.float16, device=t.device)
    return memory.as_strided(t.shape, layout).copy_(t.detach())


def reach_far(name: str) -> None:
    """Run the op and its backward on tensors whose strides reach beyond 32 bits."""
    for call in small(name, most=2, limit=60):
        if not all(t.numel() for t in call.inputs):
            continue
        # What has no gradient too: a loss wants its target in the dtype of its input.
        call = mapped(call, lambda t: t.half() if t.is_floating_point() else t)
        inputs = [far(x).requires_grad_() for x in call.inputs]
        near = [x.detach().clone() for x in inputs]
        if not call.op.random:  # random numbers go by the order in memory
            near = [x.contiguous() for x in near]
        for x in near:
            x.requires_grad_()
        outputs, theirs = linked(call.triton(*inputs)), linked(call.torch(*near))
        upstream = [g.half() for g in random_like(theirs)]
        ours = gradients(outputs, inputs, [far(g) for g in upstream])
        # Where torch rounds each step of a derivative to float16 it is off by several roundings;
        # what is read elsewhere is off by everything.
        loose = Tolerance(2e-2, 2e-3)
        expected = theirs, gradients(theirs, near, upstream)
        assert_same((outputs, ours), expected, str(call), tolerance=loose)


if __name__ == "__main__":
    for op_name in sys.argv[1:]:
        # Before the run: the last name printed is the op that crashed.
        print(op_name, flush=True)
        reach_far(op_name)
