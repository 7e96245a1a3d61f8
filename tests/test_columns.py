"""Long rows and short ones: the machine code of what training time is spent in spills at none of
these widths, forward, backward and in second order, which are kernels of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scenarios import launches
from support import DEVICE, assert_same
from torch import Tensor

import tritongrad
from tritongrad import runtime
from tritongrad.compare import disassembly, static
from tritongrad.compare.specialisations import Collection, Specialisation, cover, exercise
from tritongrad.compare.terminal import make_console
from tritongrad.nn import functional as TF
from tritongrad.op import OPS
from tritongrad.sampling import Random, Sample

COLUMNS = (256, 4096, 32768, 65536, 262144)


def samples(x: Tensor) -> dict[str, Sample]:
    rows, columns = x.shape
    row = torch.zeros(columns, dtype=x.dtype, device=DEVICE).requires_grad_()
    labels = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    return {
        "softmax": Sample((x, -1), {}),
        "log_softmax": Sample((x, -1), {}),
        "layer_norm": Sample((x, (columns,), row, row), {}),
        "rms_norm": Sample((x, (columns,), row), {}),
        "cross_entropy": Sample((x, labels), {}),
    }


@functools.cache
def launched(dtype: torch.dtype) -> list[Specialisation]:
    """What these ops launch for rows of so many columns, beside pointwise kernels, which know no
    rows; nothing is computed."""
    collection = Collection()
    for columns in COLUMNS:
        x = torch.zeros(max(16, 2**16 // columns), columns, dtype=dtype, device=DEVICE)
        for name, sample in samples(x.requires_grad_()).items():
            with runtime.stub(), collection.recording(OPS[name]):
                exercise(OPS[name], sample)
    of_rows = [s for s in collection.specialisations if not s.kernel.startswith("pointwise")]
    return list(cover(of_rows))


@pytest.mark.parametrize("target", disassembly.TARGETS)
def test_no_spills(
    target: str, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = pytestconfig.getoption("every_op")
    if target != "sm_90" and not every:
        pytest.skip("compiled with --every-op")
    # Nothing is computed, so no memory need be filled.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    dtypes = (torch.bfloat16, torch.float32) if every else (torch.bfloat16,)
    wanted = [s for dtype in dtypes for s in launched(dtype)]
    # One pass and several, of rows that a program holds and of longer ones.
    for kernel in ("norm_fwd", "norm_bwd", "norm_bwd_bwd"):
        assert {s.constexprs["LONG"] for s in wanted if s.kernel == kernel} == {"True", "False"}
    assert {"rowwise", "reduce", "cross_entropy_fwd", "cross_entropy_bwd"} <= {
        s.kernel for s in wanted
    }
    rows = static.compile_for(wanted, [target], 1, make_console(), listing=False)
    assert {
        (row.kernel, row.ops, str(row.constexprs)): row.faults for row in rows if row.faults
    } == {}


@pytest.mark.parametrize("name", samples(torch.zeros(1, 1)))
def test_a_row_of_262144(name: str) -> None:
    """Value and gradient; sums of so many terms are as far from float64 as torch's."""
    x = Random(torch.float32, DEVICE)(1, 2**18)

    def results(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        own = x.detach().to(dtype).requires_grad_()
        y = function(*samples(own)[name].args)
        upstream = torch.linspace(0.5, 1.5, y.numel(), device=DEVICE, dtype=dtype).view(y.shape)
        return y, torch.autograd.grad(y, own, upstream)[0]

    ours, native = OPS[name].entry, OPS[name].replaces[0]
    assert_same(
        results(ours, torch.float32),
        results(native, torch.float32),
        exact=lambda: results(native, torch.float64),
    )


SECOND: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: F.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "layer_norm": lambda x: F.layer_norm(x, (6,)),
    "rms_norm": lambda x: F.rms_norm(x, (6,)),
    "gelu": F.gelu,
    "silu": F.silu,
    "swiglu": TF.swiglu,
}


@pytest.mark.parametrize("name", SECOND)
def test_second_order_is_one_kernel(name: str) -> None:
    """The gradients of a gradient, of x and of what came in, are made in one launch. What is kept
    of softmax is its result, the gradient of which is handed on to x by another."""
    make = Random(torch.float64, DEVICE)
    x = make(3, 6)
    with tritongrad.use():
        y = SECOND[name](x)
    g = torch.rand_like(y).requires_grad_()
    (dx,) = torch.autograd.grad(y, x, g, create_graph=True)
    seen: list[str] = []

    def note(kernel: Any, grid: Any, args: Any, meta: dict[str, Any]) -> None:
        seen.extend(str(getattr(f, "__name__", "")) for f in (kernel, *meta.values()))

    with runtime.observe(note):
        torch.autograd.grad(dx, (x, g), torch.rand_like(dx), retain_graph=True)
    _, count = launches(lambda: torch.autograd.grad(dx, (x, g), torch.rand_like(dx)))
    assert count == (2 if "softmax" in name else 1)
    assert any("_bwd_bwd" in found for found in seen), seen
