"""Machine code of attention: products on tensor cores, spills, shared memory.

test_static.py leaves these kernels out: they take minutes to compile in all tiles.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tritongrad import runtime
from tritongrad.compare import static
from tritongrad.compare.specialisations import Specialisation, describe
from tritongrad.compare.terminal import make_console
from tritongrad.dtypes import COMPUTE_DTYPE
from tritongrad.launchers import attention as launcher

SPILLS: dict[tuple[str, str, int], int] = {
    **{("attention_jvp_bwd_kv", half, 128): 368 for half in ("bfloat16", "float16")},
    ("attention_jvp", "bfloat16", 256): 1872,
    ("attention_bwd_kv", "bfloat16", 256): 1936,
    ("attention_jvp_bwd_q", "bfloat16", 256): 2692,
    ("attention_jvp_bwd_kv", "bfloat16", 256): 9008,
    ("attention_jvp", "float32", 128): 896,
    ("attention_jvp_bwd_q", "float32", 128): 8,
    ("attention_jvp_bwd_kv", "float32", 128): 1108,
    ("attention_jvp_bwd_q", "float64", 64): 40,
}
"""(kernel, dtype, head dimension) -> bytes a thread that it spills on sm_90."""

MACHINE_CODE = [
    (torch.bfloat16, 128), (torch.bfloat16, 64), (torch.bfloat16, 256), (torch.float16, 128),
    (torch.float32, 64), (torch.float32, 128), (torch.float64, 64),
]  # fmt: skip


def kernels_of(dtype: torch.dtype, size: int) -> dict[str, Specialisation]:
    """The kernels of all four sets as they are launched for heads of ``size``."""
    q = torch.zeros(4, 16, 2048, size, dtype=dtype)
    lse = torch.zeros(4, 16, 2048, dtype=COMPUTE_DTYPE[dtype])
    options, x = launcher.Options(up=0), launcher.Inputs(q, q, q)
    needs = (True, True, True, False, False, False)
    tangents = launcher.Tangents(q, q, q, None, None, None)
    wanted: list[Specialisation] = []

    def record(kernel: Any, grid: Any, args: Any, meta: Any) -> None:
        wanted.append(Specialisation(describe(kernel, args, meta)))

    with runtime.stub(), runtime.observe(record):
        launcher.forward(options, x)
        launcher.jvp(options, x, tangents, q, lse)
        launcher.backward(options, x, needs, q, None, q, lse)
        launcher.second(options, x, needs, q, None, q, lse, tangents, q, lse)
    kernels = {s.kernel: s for s in wanted}
    assert len(kernels) == 7
    return kernels


@pytest.mark.parametrize(("dtype", "size"), MACHINE_CODE, ids=str)
def test_machine_code(dtype: torch.dtype, size: int, pytestconfig: pytest.Config) -> None:
    """wgmma in every product of half precision, and no spill on sm_90 but for what is recorded."""
    if (dtype, size) != MACHINE_CODE[0] and not pytestconfig.getoption("every_op"):
        pytest.skip("half a minute of compiling: with --every-op")
    kernels = kernels_of(dtype, size)
    name, half = str(dtype).removeprefix("torch."), dtype.itemsize == 2
    found = {}
    for row in static.compile_for(list(kernels.values()), ["sm_90"], 1, make_console()):
        assert row.code is not None, row.faults
        found[row.kernel] = row.code.spill_bytes
        products = {"HGMMA"} if half and row.kernel != "attention_rows" else set()
        assert {*row.code.tensor_core} == products or not half, row
    recorded = {kernel: SPILLS.get((kernel, name, size), 0) for kernel in kernels}
    assert found == recorded


@pytest.mark.parametrize("size", [64, 128, 256])
def test_shared_memory_of_amd(
    size: int, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    """Programs get the 64 KiB that a gfx942 has; more, and the launch would fail."""
    monkeypatch.setattr(launcher, "MOST_STAGES", 2)
    kernels = kernels_of(torch.bfloat16, size)
    if not pytestconfig.getoption("every_op"):
        if size != 128:
            pytest.skip("half a minute of compiling: with --every-op")
        kernels = {"attention_fwd": kernels["attention_fwd"]}
    for row in static.compile_for(list(kernels.values()), ["gfx942"], 1, make_console(), False):
        assert row.code is not None, row.faults
        assert row.code.shared_bytes <= 64 * 1024, row
