"""A fault on purpose, to see that the comparison would see one: a check never seen to fail may be
checking nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from tritongrad import runtime
from tritongrad.kernels import arithmetic


@triton.jit
def mul_bwd(g: Any, x: Any, y: Any) -> Any:
    return g * y, g * tl.abs(x)


@contextlib.contextmanager
def plant() -> Iterator[None]:
    """Give mul's backward kernel a derivative in y that has lost the sign of x."""
    run = runtime._run

    def run_faulty(
        kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]
    ) -> None:
        if meta.get("F") is arithmetic.mul_bwd:
            meta = meta | {"F": mul_bwd}
        run(kernel, grid, args, meta)

    runtime._run = run_faulty
    try:
        yield
    finally:
        runtime._run = run
