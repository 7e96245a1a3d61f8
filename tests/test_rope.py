"""Rotary position embedding: layouts, tails, positions, launches, machine code."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from scenarios import launches
from support import DEVICE, TOLERANCE, Tolerance, assert_same, derivatives, random_like
from torch import Tensor

import tritongrad
from tritongrad import runtime
from tritongrad.compare import disassembly
from tritongrad.compare.specialisations import describe, make_job
from tritongrad.extension import EXTENSIONS
from tritongrad.sampling import Random

rope = tritongrad.nn.functional.rope
definition = EXTENSIONS["rope"]


def make(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return Random(dtype, DEVICE)(*shape)


def both(x: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> None:
    """The op is what its definition is on torch, to second order and in forward mode."""
    ours, theirs = (
        derivatives(lambda *t, f=f: f(*t, *args, **kwargs), [x, cos, sin], torch.float64)
        for f in (rope, definition)
    )
    assert_same(ours, theirs, f"{list(x.shape)}, {list(cos.shape)}, {args}, {kwargs}")


def test_it_turns() -> None:
    """By a quarter, in pairs of halves and of neighbours; the fifth feature stays."""
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]], device=DEVICE)
    cos, sin = torch.zeros(1, 2, device=DEVICE), torch.ones(1, 2, device=DEVICE)
    assert rope(x, cos, sin).tolist() == [[-3.0, -4.0, 1.0, 2.0, 5.0]]
    assert rope(x, cos, sin, interleaved=True).tolist() == [[-2.0, 1.0, -4.0, 3.0, 5.0]]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("shape", "seq_dim", "table"),
    [
        ((2, 3, 5, 7), -2, (5, 3)),
        ((2, 5, 3, 8), 1, (2, 5, 3)),
        ((5, 2, 3, 4), 0, (1, 5, 2)),
        ((5, 3, 4), 0, (5, 1)),
        ((5, 4), 0, (5, 2)),
        ((2, 5, 4), -2, (2, 5, 0)),
    ],
    ids=str,
)
def test_layouts(
    shape: tuple[int, ...], seq_dim: int, table: tuple[int, ...], interleaved: bool
) -> None:
    """Batch, heads and positions in any order; strided; tables of each or of all; partial."""
    wide = make(*shape[:-1], 2 * shape[-1])
    x = wide.detach()[..., 1 : 1 + shape[-1]].requires_grad_()
    both(x, make(*table), make(*table), interleaved=interleaved, seq_dim=seq_dim)


@pytest.mark.parametrize(
    "shape",
    [(1, 2, 300, 4), (1, 9, 2, 256), (1, 1, 2, 600)],
    ids=["positions", "heads", "features"],
)
def test_tails(shape: tuple[int, ...]) -> None:
    """Past one block of each, by a part of one."""
    for interleaved in (False, True):
        table = shape[2], shape[3] // 2 - 1
        both(make(*shape), make(*table), make(*table), interleaved=interleaved)


@pytest.mark.parametrize("at", [[0, 4, 4], [[6, 0, -1], [-7, 2, 2]], [[3, 3, 3]]], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_positions(at: list[Any], dtype: torch.dtype) -> None:
    """Repeated, negative, left out: the gradient of each row of the tables is torch's."""
    positions = torch.tensor(at, dtype=dtype, device=DEVICE)
    both(make(2, 2, 3, 4), make(7, 2), make(7, 2), positions)


def test_positions_out_of_range() -> None:
    x, cos, sin = make(2, 1, 3, 4), make(5, 2), make(5, 2)
    for outside in (5, -6):
        positions = torch.tensor([0, outside, 1], device=DEVICE)
        if DEVICE.type == "cpu":
            with pytest.raises(IndexError):
                rope(x, cos, sin, positions)
        else:
            found = rope(x, cos, sin, positions).isnan()
            assert found[:, :, 1].all()
            assert not found[:, :, ::2].any()


def test_each_pass_is_one_kernel_and_tables_cost_only_what_they_need() -> None:
    x, cos, sin = make(2, 2, 3, 4), make(3, 2), make(3, 2)
    for fixed in itertools.product((False, True), repeat=2):
        tables = [t.detach().requires_grad_(not f) for t, f in zip((cos, sin), fixed, strict=True)]
        out, forward = launches(partial(rope, x, *tables))
        wanted = [x, *[t for t in tables if t.requires_grad]]
        _, backward = launches(partial(torch.autograd.grad, out, wanted, random_like([out])))
        assert (forward, backward) == (1, 2 - all(fixed))


def test_dtypes() -> None:
    """The result has the dtype of x; computed in the widest of the three."""
    for x_dtype, table_dtype in itertools.product((torch.bfloat16, torch.float32), repeat=2):
        x = make(2, 2, 3, 4, dtype=x_dtype)
        cos, sin = make(3, 2, dtype=table_dtype), make(3, 2, dtype=table_dtype)
        ours, theirs = (
            derivatives(f, [x, cos, sin], torch.float64, second=False) for f in (rope, definition)
        )
        # A gradient that is a sum is rounded once; torch rounds each factor.
        coarse = x_dtype if x_dtype is torch.bfloat16 else table_dtype
        tolerance = Tolerance(2e-2, 2e-2) if coarse is torch.bfloat16 else TOLERANCE[coarse]
        assert_same(ours, theirs, f"{x_dtype}, {table_dtype}", tolerance=tolerance)
        assert ours.value.dtype is x_dtype


REFUSED: dict[str, tuple[type[Exception], tuple[Any, ...]]] = {
    "integers": (TypeError, (torch.ones(2, 4, dtype=torch.int64), make(2, 2), make(2, 2))),
    "cos and sin differ": (RuntimeError, (make(2, 4), make(2, 2), make(2, 1))),
    "too many pairs": (RuntimeError, (make(2, 3), make(2, 2), make(2, 2))),
    "positions": (RuntimeError, (make(2, 4), make(3, 2), make(3, 2))),
    "batches": (RuntimeError, (make(3, 2, 4), make(2, 2, 2), make(2, 2, 2))),
    "seq_dim": (IndexError, (make(2, 4), make(2, 2), make(2, 2), None, False, 1)),
    "float positions": (TypeError, (make(2, 4), make(2, 2), make(2, 2), make(2))),
    "five dimensions": (RuntimeError, (make(1, 1, 1, 2, 4), make(2, 2), make(2, 2))),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    error, args = REFUSED[case]
    with pytest.raises(error, match="rope"):
        rope(*args)


def test_machine_code() -> None:
    """bfloat16 heads of 128 with float32 tables, both ways of pairing: 16 bytes at a time."""
    seen: list[Any] = []
    with runtime.stub(), runtime.observe(lambda *launch: seen.append(launch)):
        for interleaved in (False, True):
            x = torch.zeros(2, 16, 32, 128, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
            cos = torch.zeros(32, 64, device=DEVICE).requires_grad_()
            out = rope(x, cos, cos, interleaved=interleaved)
            torch.autograd.grad(out, [x, cos], torch.zeros_like(out))
    assert len(seen) == 6
    jobs = [make_job(describe(kernel, args, meta), "sm_90") for kernel, _, args, meta in seen]
    for index, answer in disassembly.compile_all(jobs, workers=1):
        assert answer["spill_bytes"] == 0
        assert answer["wide_loads"] > 0
        # Of the tables' gradients there are few.
        assert answer["wide_stores"] > 0 or seen[index][0].fn.__name__ == "rope_angles_bwd"
