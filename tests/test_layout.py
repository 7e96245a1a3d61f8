"""layout.py against torch: output layouts, broadcasting, collapsing, for operands of any stride."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DEVICE
from torch import Tensor

import tritongrad
from tritongrad.layout import (
    broadcast_shape,
    broadcasts,
    collapse,
    dense_strides,
    fastest_first,
    next_power_of_two,
    reach,
    strides_as,
)

SHAPES = st.lists(st.integers(0, 4), min_size=0, max_size=4).map(tuple)


@st.composite
def operand(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    """A tensor that broadcasts to ``shape``: permuted, sliced, expanded, lacking dimensions."""
    own = list(shape[draw(st.integers(0, len(shape))) :])
    for d in range(len(own)):
        if draw(st.integers(0, 3)) == 0:
            own[d] = 1
    order = draw(st.permutations(range(len(own))))
    steps = [draw(st.integers(1, 2)) for _ in own]
    expanded = [draw(st.integers(0, 5)) == 0 for _ in own]
    sizes = [1 if e else n * s for n, s, e in zip(own, steps, expanded, strict=True)]
    memory = torch.zeros([sizes[d] for d in order], device=DEVICE)
    view = memory.permute([order.index(d) for d in range(len(own))])
    view = view[
        tuple(slice(None, None, 1 if e else s) for s, e in zip(steps, expanded, strict=True))
    ]
    return view.expand(own)


@st.composite
def operands(draw: st.DrawFn, count: int) -> list[Tensor]:
    """Tensors that broadcast together."""
    shape = draw(SHAPES)
    return [draw(operand(shape)) for _ in range(count)]


def show(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{tuple(t.shape)} with strides {t.stride()}" for t in tensors)


def walked(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """The strides that lead somewhere: where a size is 1 or there are no elements, they may be
    anything."""
    return [] if 0 in shape else [s for n, s in zip(shape, strides, strict=True) if n > 1]


def ordered(tensors: Sequence[Tensor]) -> tuple[torch.Size, list[tuple[int, ...]], list[int]]:
    """Common shape, strides in it, dimensions in memory order."""
    shape = broadcast_shape(tensors)
    strides = [strides_as(t.shape, t.stride(), shape) for t in tensors]
    return shape, strides, fastest_first(shape, strides)


@pytest.mark.parametrize(
    ("function", "count"), [(torch.exp, 1), (torch.add, 2), (torch.addcmul, 3)], ids=["1", "2", "3"]
)
@settings(max_examples=150)
@given(data=st.data())
def test_output_layout_is_torchs(
    function: Callable[..., Tensor], count: int, data: st.DataObject
) -> None:
    """HAZARDS 9: results keep the memory format that torch's would have."""
    tensors = data.draw(operands(count))
    shape, _, order = ordered(tensors)
    expected = function(*tensors)
    assert shape == expected.shape
    assert walked(shape, dense_strides(shape, order)) == walked(shape, expected.stride()), show(
        tensors
    )


@settings(max_examples=60)
@given(tensors=operands(2))
def test_kernel_results_have_that_layout(tensors: list[Tensor]) -> None:
    """The whole way, and the values: what a kernel reads and writes through strides."""
    for t in tensors:
        # Every element of the storage differs from the others, so that a wrong offset is seen.
        values = torch.arange(1.0, t.untyped_storage().size() // 4 + 1, device=DEVICE)
        t.set_(values, t.storage_offset(), t.shape, t.stride())
    expected = torch.div(*tensors)
    with tritongrad.use() as session:
        result = torch.div(*tensors)
    assert session.ran["div"] == 1
    assert torch.equal(result, expected)
    assert walked(result.shape, result.stride()) == walked(expected.shape, expected.stride()), show(
        tensors
    )


@settings(max_examples=150)
@given(data=st.data())
def test_collapse_walks_the_same_elements(data: st.DataObject) -> None:
    """The collapsed dimensions enumerate the offsets of the full ones, in all operands at once."""
    tensors = data.draw(operands(data.draw(st.integers(1, 3))))
    shape, strides, order = ordered(tensors)
    everything = [dense_strides(shape, order), *strides]
    sizes, merged = collapse(shape, everything, order)

    def walk(dims: Sequence[int], steps: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        # Fastest dimension last, as itertools.product varies the last one first.
        return [
            tuple(sum(i * s for i, s in zip(index, own, strict=True)) for own in steps)
            for index in itertools.product(*map(range, dims))
        ]

    full = [[own[d] for d in reversed(order)] for own in everything]
    short = [list(reversed(own)) for own in merged]
    expected = walk([shape[d] for d in reversed(order)], full)
    assert walk(list(reversed(sizes)), short) == expected, show(tensors)
    assert len(sizes) <= max(len(shape), 1)


def test_collapse_merges_what_is_walked_as_one() -> None:
    dense = torch.empty(4, 5, 6)
    shape, strides, order = ordered([dense, dense])
    assert collapse(shape, strides, order) == ([120], [[1], [1]])
    shape, strides, order = ordered([dense, torch.empty(6)])
    assert collapse(shape, strides, order) == ([6, 20], [[1, 6], [1, 0]])


@settings(max_examples=150)
@given(shapes=st.lists(SHAPES, min_size=1, max_size=3))
def test_broadcasts_where_torch_does(shapes: list[tuple[int, ...]]) -> None:
    try:
        expected = torch.broadcast_shapes(*shapes)
    except RuntimeError:
        assert not broadcasts(*shapes)
    else:
        assert broadcasts(*shapes)
        tensors = [torch.empty(shape) for shape in shapes]
        assert broadcast_shape(tensors) == expected
        for t in tensors:
            strides = strides_as(t.shape, t.stride(), expected)
            assert walked(expected, strides) == walked(expected, t.expand(expected).stride())


@given(data=st.data())
def test_reach_is_the_last_offset(data: st.DataObject) -> None:
    tensor = data.draw(operands(1))[0]
    offsets = [
        sum(i * s for i, s in zip(index, tensor.stride(), strict=True))
        for index in itertools.product(*map(range, tensor.shape))
    ]
    if offsets:
        assert reach(tensor.shape, tensor.stride()) == max(offsets)


@given(n=st.integers(1, 2**40))
def test_next_power_of_two(n: int) -> None:
    power = next_power_of_two(n)
    assert power.bit_count() == 1
    assert power // 2 < n <= power
