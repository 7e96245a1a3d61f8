"""Triton's interpreter, quickened: the bits are those of the interpreter as it comes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def arithmetic(out, x_ptr, n_ptr, n, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Of blocks and numbers of all types and shapes, in either order."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = row[:, None] * COLUMNS + column[None, :]
    x = tl.load(x_ptr + at)
    edge = tl.load(x_ptr + column, mask=column < n, other=2)
    k = tl.load(n_ptr + at)
    u = k.to(tl.uint32)
    first = tl.load(x_ptr)
    cases = (
        x + edge,
        edge[None, :] - x,
        x * first,
        first / (x + 0.5),
        2 - x,
        x % 0.75,
        tl.trans(x) * 3 + first,
        x + k,
        tl.where(x > edge[None, :], x, first),
        tl.where(row[:, None] < 3, 1.5, edge[None, :]),
        tl.maximum(tl.trans(x) - 1, edge),
        tl.sum(tl.trans(x) * first, 0)[:, None] + edge,
        tl.sum(x + edge, 1)[:, None],
        tl.max(x * edge, 1)[:, None] + tl.cumsum(x, 0),
        tl.dot(x, tl.trans(x), out_dtype=x.dtype, input_precision="ieee"),
        tl.abs(x).to(tl.float32).to(x.dtype),
        k // 3 + k % 3 - (k >> 1) + (k << 2),
        (u >> 1) + u // 7,
        (k & 5) | (row ^ column[:, None]),
        k * 7 - n + (n - k),
        (k < 4) & (x < edge) | (n == k),
        tl.zeros((ROWS, COLUMNS), x.dtype) + tl.cdiv(n, 2) + tl.program_id(0),
        tl.full((ROWS, COLUMNS), 0.1, x.dtype) * -n,
        x * -0.0,
    )
    for i in tl.static_range(len(cases)):
        value = tl.broadcast_to(cases[i], (ROWS, COLUMNS))
        tl.store(out + i * ROWS * COLUMNS + at, value.to(tl.float64), mask=at < 61)


CASES = 24


def run(dtype: torch.dtype) -> list[str]:
    """What the kernel stores, bit by bit; a case a line."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, dtype=torch.float64, generator=generator).to(dtype)
    n = torch.randint(1, 100, (64,), dtype=torch.int32, generator=generator)
    out = torch.full((CASES, 64), -7.0, dtype=torch.float64)
    arithmetic[(1,)](out, x, n, 5, COLUMNS=8, ROWS=8)
    assert (out[:, 61:] == -7).all()
    return [row.numpy().tobytes().hex() for row in out]


DTYPES = (torch.float64, torch.float32, torch.float16)  # bfloat16 is wrong in the interpreter


@pytest.fixture(scope="module")
def plain() -> dict[str, list[str]]:
    """What it stores in the interpreter as it comes."""
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_those_of_the_interpreter_as_it_comes(
    plain: dict[str, list[str]], dtype: torch.dtype
) -> None:
    expected = plain[str(dtype)]
    assert len(set(expected)) == CASES
    assert run(dtype) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the interpreter")
def test_errors_are_those_of_the_interpreter() -> None:
    @triton.jit
    def mismatched(x_ptr):
        tl.arange(0, 4) + tl.arange(0, 8)

    @triton.jit
    def beyond(x_ptr):
        tl.zeros((4,), tl.int8) + 300

    for kernel, message in ((mismatched, "incompatible dimensions"), (beyond, "out of range")):
        with pytest.raises(triton.runtime.errors.InterpreterError, match=message):
            kernel[(1,)](torch.zeros(1))


if __name__ == "__main__":
    assert "tritongrad" not in sys.modules
    print(json.dumps({str(dtype): run(dtype) for dtype in DTYPES}))
