"""Machine code of attention: products on tensor cores, spills, shared memory.

test_static.py leaves these kernels out: they take minutes to compile in all tiles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from tritongrad import runtime
from tritongrad.compare import static
from tritongrad.compare.specialisations import Specialisation, describe
from tritongrad.compare.terminal import make_console
from tritongrad.dtypes import COMPUTE_DTYPE
from tritongrad.launchers import attention as launcher


class Cell(NamedTuple):
    """What kernels are compiled for: ``about`` names what a call has beside q, k and v."""

    dtype: torch.dtype
    size: int
    about: str

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.size} {self.about}"


HALF, BF16, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64

USUAL = Cell(BF16, 128, "causal")
CELLS = [
    USUAL,
    Cell(BF16, 64, "causal"),
    Cell(HALF, 128, "bias"),
    Cell(HALF, 64, "packed softcap dropout"),
    Cell(BF16, 16, "packed window"),
    Cell(HALF, 48, "shared bools"),
    Cell(BF16, 96, "window sinks ALiBi"),
    Cell(HALF, 256, "bias"),
    Cell(BF16, 192, "shared bools"),
    Cell(SINGLE, 40, "packed softcap dropout"),
    Cell(SINGLE, 64, "bias"),
    Cell(SINGLE, 128, "causal"),
    Cell(SINGLE, 256, "bias"),
    Cell(DOUBLE, 32, "window sinks ALiBi"),
    Cell(DOUBLE, 64, "causal"),
    Cell(DOUBLE, 128, "bias"),
    Cell(DOUBLE, 256, "bias"),
]

SPILLS: dict[str, dict[str, int]] = {}
"""Cell -> kernel -> bytes a thread that it spills on sm_90."""


def kernels_of(cell: Cell) -> dict[str, Specialisation]:
    """The kernels of all four sets as they are launched for a cell. What backward launches, too,
    has another name for the second derivatives."""
    heads, length, words = 16, 2048, cell.about.split()
    q = torch.zeros(4, heads, length, cell.size, dtype=cell.dtype)
    k = q[:, :4] if "shared" in words else q
    lse = torch.zeros(4, heads, length, dtype=COMPUTE_DTYPE[cell.dtype])
    options = launcher.Options(
        up=None if {"bias", "bools"}.intersection(words) else 0,
        down=256 if "window" in words else None,
        softcap=5.0 if "softcap" in words else None,
        dropout=0.1 if "dropout" in words else 0.0,
    )
    pairs, each = (length, length), lse[0, :, 0].clone()
    x = launcher.Inputs(q, k, k)
    if "bias" in words:
        x = x._replace(mask=q.new_zeros(pairs))
    if "bools" in words:
        x = x._replace(mask=torch.zeros(pairs, dtype=torch.bool))
    if "sinks" in words:
        x = x._replace(sinks=each)
    if "ALiBi" in words:
        x = x._replace(slopes=each)
    if "packed" in words:
        places = torch.zeros(3, dtype=torch.int32)
        x = x._replace(cu_q=places, cu_k=places)
    if "dropout" in words:
        x = x._replace(seed=torch.zeros(1, dtype=torch.int64))
    tangents = launcher.Tangents(
        *[t if t is not None and t.is_floating_point() else None for t in x[: launcher.DERIVED]]
    )
    needs = [t is not None for t in tangents]
    found: dict[str, Specialisation] = {}

    def record(kernel: Any, grid: Any, args: Any, meta: Any) -> None:
        name = kernel.fn.__name__
        name += " of the tangent" if name in found else ""
        assert name not in found
        found[name] = Specialisation(describe(kernel, args, meta))

    h = lse if "sinks" in words else None
    with runtime.stub(), runtime.observe(record):
        launcher.forward(options, x)
        launcher.jvp(options, x, tangents, q, lse)
        launcher.backward(options, x, needs, q, h, q, lse)
        launcher.second(options, x, needs, q, h, q, lse, tangents, q, lse)
    return {name: s for name, s in found.items() if s.kernel.startswith("attention")}


def compiled(kernels: dict[str, Specialisation], target: str, listing: bool) -> dict[str, Any]:
    """Of each its machine code for a target, in whose shared memory it has room."""
    rows = static.compile_for(list(kernels.values()), [target], 1, make_console(), listing)
    found = dict(zip(kernels, rows, strict=True))
    limit = static.TARGETS[target].shared_limit
    for name, row in found.items():
        assert row.code is not None, (name, row.faults)
        assert row.code.shared_bytes <= limit, (name, row)
    return {name: row.code for name, row in found.items()}


def test_every_type_with_every_kind_of_tile() -> None:
    """Head dimensions make tiles of 16 to 256 columns, with ends in them and without."""
    tiles = {(c.dtype, static_size(c.size)) for c in CELLS}
    assert {(d, n) for d in (SINGLE, DOUBLE) for n in (64, 128, 256)} <= tiles
    halves = {
        (n, c.size == n) for c in CELLS if c.dtype.itemsize == 2 for n in [static_size(c.size)]
    }
    assert {(n, whole) for n in (64, 128, 256) for whole in (True, False)} <= halves


def static_size(size: int) -> int:
    return launcher.next_power_of_two(size)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_machine_code(cell: Cell, pytestconfig: pytest.Config) -> None:
    """On sm_90: all compile and fit, half precision has wgmma in every product at 64 and 128, and
    nothing spills but what is recorded."""
    if cell != USUAL and not pytestconfig.getoption("every_op"):
        pytest.skip("a minute of compiling: with --every-op")
    tensor_cores = cell.dtype.itemsize == 2 and cell.size in (64, 128)
    found = compiled(kernels_of(cell), "sm_90", tensor_cores)
    assert len(found) >= 8
    for name, code in found.items():
        if tensor_cores and "rows" not in name:
            assert {*code.tensor_core} == {"HGMMA"}, (name, code)
    spilled = {name: code.spill_bytes for name, code in found.items() if code.spill_bytes}
    assert spilled == SPILLS.get(str(cell), {})
