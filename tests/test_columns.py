"""Long rows and short ones: the machine code of what training time is spent in spills at none of
these widths, forward, backward and in second order."""

from __future__ import annotations

import functools

import pytest
import torch
from support import DEVICE
from torch import Tensor

from tritongrad import runtime
from tritongrad.compare import disassembly, static
from tritongrad.compare.specialisations import Collection, Specialisation, cover, exercise
from tritongrad.compare.terminal import make_console
from tritongrad.op import OPS
from tritongrad.sampling import Sample

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
