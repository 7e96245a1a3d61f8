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
    Cell(BF16, 256, "causal"),
    Cell(HALF, 64, "bias"),
    Cell(HALF, 64, "packed softcap dropout"),
    Cell(HALF, 128, "bias"),
    Cell(SINGLE, 128, "bias"),
    Cell(SINGLE, 256, "bias"),
    Cell(DOUBLE, 128, "bias"),
    Cell(DOUBLE, 256, "bias"),
]

# Of the first three sets, with each thing that a call may have beside its products.
VARIANTS = [
    *[Cell(BF16, size, about) for size in (64, 128) for about in ("bias", "shared", "sinks")],
    *[Cell(dtype, size, "dropout") for dtype in (HALF, BF16) for size in (64, 128)],
    *[
        Cell(dtype, size, about)
        for size, dtype, others in (
            (64, BF16, ("window", "softcap", "ALiBi", "bools")),
            (128, HALF, ("window", "ALiBi", "bools")),
        )
        for about in others
    ],
    Cell(HALF, 64, "packed"),
    Cell(BF16, 128, "packed"),
    Cell(BF16, 128, "softcap"),
    Cell(BF16, 16, "causal"),
    Cell(HALF, 32, "bias"),
    Cell(BF16, 40, "shared"),
    Cell(HALF, 80, "window"),
    Cell(BF16, 96, "ALiBi"),
    Cell(HALF, 192, "packed"),
    Cell(HALF, 256, "causal"),
]
FIRST = ("attention_fwd", "attention_jvp", "attention_bwd_q", "attention_bwd_kv")
APART = ("attention_bwd_kv of k", "attention_bwd_kv of v")

Q, KV = "attention_jvp_bwd_q", "attention_jvp_bwd_kv"
MASK, TANGENTS_MASK = "attention_bwd_mask", "attention_bwd_mask of the tangent"

SPILLS: dict[str, dict[str, int]] = {
    "bfloat16 64 causal": {KV: 88},
    "bfloat16 128 causal": {KV: 48},
    "bfloat16 256 causal": {
        "attention_jvp": 332,
        "attention_bwd_q": 8,
        Q: 888,
        f"{KV} of k": 1096,
        f"{KV} of v": 184,
    },
    "float16 192 packed": {"attention_jvp": 200},
    "float16 256 causal": {"attention_jvp": 324, "attention_bwd_q": 8},
    "float16 64 packed softcap dropout": {Q: 140, KV: 424},
    "float16 128 bias": {KV: 76, TANGENTS_MASK: 132},
    "float32 128 bias": {Q: 28, KV: 788, TANGENTS_MASK: 6024},
    "float32 256 bias": {
        "attention_jvp": 2200,
        Q: 2488,
        f"{KV} of k": 2800,
        f"{KV} of v": 1880,
        TANGENTS_MASK: 11196,
    },
    "float64 128 bias": {Q: 436, KV: 1808, TANGENTS_MASK: 9196},
    "float64 256 bias": {
        "attention_fwd": 144,
        "attention_jvp": 1884,
        "attention_bwd_q": 156,
        "attention_bwd_kv of k": 180,
        "attention_bwd_kv of v": 24,
        Q: 2504,
        f"{KV} of k": 17712,
        f"{KV} of v": 8540,
        TANGENTS_MASK: 20192,
    },
}
"""Cell -> kernel -> bytes a thread that it spills on sm_90."""


def kernels_of(cell: Cell) -> dict[str, Specialisation]:
    """The kernels of all four sets as they are launched for a cell. What backward launches, too,
    has another name for the second derivatives, and so have passes of their own for dk and dv."""
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
        if name.endswith("kv") and None in args[:2]:
            name += " of v" if args[0] is None else " of k"
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


PRODUCTS = {
    "attention_fwd": (1, 1),
    "attention_jvp": (3, 2),
    "attention_bwd_q": (2, 1),
    "attention_bwd_kv": (2, 2),
    Q: (5, 2),
    KV: (5, 3),
}
"""Kernel -> its products in a step: sums over the head dimension, and over what it walks along."""


def wgmma_of(kernel: Specialisation) -> int:
    """How many instructions all products of a kernel are, in the loop over whole blocks and that
    over edges: of sixteen terms each, for 64 rows of a group of four warps."""
    meta = kernel.description["meta"]
    over_heads, over_others = PRODUCTS[kernel.kernel]
    sides = meta["BLOCK_M"], meta["BLOCK_N"]
    own, walked = reversed(sides) if kernel.kernel.endswith("kv") else sides
    terms = over_heads * meta["BLOCK_D"] + over_others * walked
    return 2 * terms // 16 * own // (16 * meta["num_warps"])


def check_machine_code(cell: Cell, kernels: dict[str, Specialisation]) -> None:
    """On sm_90: all compile and fit, half precision has wgmma in every product at 64 and 128, and
    nothing spills but what is recorded."""
    tensor_cores = cell.dtype.itemsize == 2 and cell.size in (64, 128)
    found = compiled(kernels, "sm_90", tensor_cores)
    for name, code in found.items():
        if tensor_cores and "rows" not in name:
            assert {*code.tensor_core} == {"HGMMA"}, (name, code)
            if "mask" not in name:
                assert code.tensor_core["HGMMA"] == wgmma_of(kernels[name]), (name, code)
    spilled = {name: code.spill_bytes for name, code in found.items() if code.spill_bytes}
    assert spilled == SPILLS.get(str(cell), {})


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_machine_code(cell: Cell, pytestconfig: pytest.Config) -> None:
    """Of all four sets."""
    if cell != USUAL and not pytestconfig.getoption("every_op"):
        pytest.skip("a minute of compiling: with --every-op")
    kernels = kernels_of(cell)
    assert len(kernels) >= 8
    check_machine_code(cell, kernels)


@pytest.mark.parametrize("cell", VARIANTS, ids=str)
def test_variants_spill_nothing(cell: Cell, pytestconfig: pytest.Config) -> None:
    """Of the first three sets; at other head dimensions, but what is recorded."""
    if not pytestconfig.getoption("every_op"):
        pytest.skip("a minute of compiling: with --every-op")
    kernels = {n: s for n, s in kernels_of(cell).items() if n in (*FIRST, *APART, MASK)}
    assert len(kernels) >= len(FIRST)
    check_machine_code(cell, kernels)


ELSEWHERE: dict[str, dict[str, int]] = {
    "sm_80": {},
    "sm_100": {"attention_bwd_q": 8},
    "gfx942": {"attention_bwd_kv": 544},
}


@pytest.mark.parametrize("target", ELSEWHERE)
def test_other_targets(
    target: str, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    """Of a causal call in bfloat16 at 64, what spills is recorded."""
    if not pytestconfig.getoption("every_op"):
        pytest.skip("a minute of compiling: with --every-op")
    monkeypatch.setattr(launcher, "has_wgmma", lambda: False)
    if target == "gfx942":
        monkeypatch.setattr(launcher, "MOST_STAGES", 2)
    kernels = {n: s for n, s in kernels_of(Cell(BF16, 64, "causal")).items() if n in FIRST}
    found = compiled(kernels, target, False)
    assert {n: c.spill_bytes for n, c in found.items() if c.spill_bytes} == ELSEWHERE[target]


def test_recorded_spills() -> None:
    """None is of the first three sets at 64 and 128."""
    for cell in CELLS + VARIANTS:
        if cell.size in (64, 128):
            assert not {*FIRST, MASK} & {*SPILLS.get(str(cell), {})}, cell


def test_gradients_of_a_mask_compile() -> None:
    """Of the value and of the tangent, in every run: in loops Triton has variables keep their type,
    the interpreter does not."""
    kernels = kernels_of(Cell(HALF, 64, "bias"))
    chosen = {name: s for name, s in kernels.items() if "mask" in name}
    assert len(chosen) == 2
    assert not any(code.spill_bytes for code in compiled(chosen, "sm_90", False).values())


@pytest.mark.parametrize("cell", [c for c in CELLS if c.size != 64], ids=str)
def test_shared_memory_of_amd(
    cell: Cell, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    """Programs get the 64 KiB that a gfx942 has; more, and the launch would fail."""
    monkeypatch.setattr(launcher, "MOST_STAGES", 2)
    monkeypatch.setattr(launcher, "has_wgmma", lambda: False)
    kernels = kernels_of(cell)
    if not pytestconfig.getoption("every_op"):
        if cell != USUAL:
            pytest.skip("a minute of compiling: with --every-op")
        kernels = {"attention_fwd": kernels["attention_fwd"]}
    compiled(kernels, "gfx942", False)
