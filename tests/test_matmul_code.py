"""Products as they are launched: the tile that is chosen, what takes none, and machine code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scenarios import gradients
from support import DEVICE, assert_same, random_like
from test_matmul import make
from torch import Tensor

import tritongrad
from tritongrad import runtime
from tritongrad.launchers import matmul as launcher

F = torch.nn.functional


def test_tile_table() -> None:
    """Tiles go from large to small, the last fits any shape, and big products get the big ones."""
    for table in (*launcher._TILES.values(), launcher._HOPPER):
        areas = [tile.m * tile.n for tile in table]
        assert areas == sorted(areas, reverse=True)
        assert (table[-1].m, table[-1].n) == (16, 16)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        big = launcher._tile(dtype, "ieee", True, (1, 8192, 8192))
        assert big.m * big.n >= 128 * 64
        thin = launcher._tile(dtype, "ieee", True, (1, 1, 8192))
        assert thin.m == 16


@pytest.mark.parametrize(
    ("sizes", "tile"),
    [
        ((1, 4096, 4096), (128, 256)),
        ((1, 1536, 1536), (128, 256)),  # 72 programs; 144 smaller ones have two turns
        ((2, 1024, 1024), (128, 128)),
        ((1, 1024, 1024), (64, 128)),
        ((1, 512, 512), (32, 64)),
        ((1, 65536, 64), (128, 64)),
        ((1, 1, 8192), (16, 64)),
    ],
)
def test_the_tile_that_reads_least(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int, int], tile: tuple[int, int]
) -> None:
    monkeypatch.setattr(launcher, "has_wgmma", lambda: True)
    assert launcher._tile(torch.bfloat16, "ieee", True, sizes)[:2] == tile


ADDED = [
    pytest.param(launcher.Tile(128, 256, 64, 8, 3), (130, 290), id="128 x 256"),
    pytest.param(launcher.Tile(64, 128, 64, 4, 4), (65, 131), id="64 x 128"),
    pytest.param(launcher.Tile(64, 64, 64, 4, 4), (63, 33), id="64 x 64"),
]


@pytest.mark.parametrize(("tile", "sizes"), ADDED)
def test_pieces(
    monkeypatch: pytest.MonkeyPatch, tile: launcher.Tile, sizes: tuple[int, int]
) -> None:
    """A tile that is finished in pieces: what is added, dense or transposed, and an activation with
    what it is of kept, at sizes where some pieces are cut and others past the edge."""
    monkeypatch.setattr(launcher, "_tile", lambda *args: tile)
    launcher.plan.cache_clear()
    m, n = sizes
    x, weight, bias = make(m, 5), make(n, 5), make(n)
    for added in (make(m, n), make(n, m).t()):
        ours = tritongrad.addmm(added, x, weight.t(), beta=0.5)
        assert_same(ours, torch.addmm(added, x, weight.t(), beta=0.5))
    pieces: list[int] = []
    with runtime.observe(lambda *launch: pieces.append(launch[3]["PIECES"])):
        ours = tritongrad.nn.functional.linear_act(x, weight, bias, activation="silu")
    assert pieces[0] > 1
    theirs = F.silu(F.linear(x, weight, bias))
    g = random_like([ours])
    assert_same(
        [ours, *gradients([ours], [x, weight, bias], g)],
        [theirs, *gradients([theirs], [x, weight, bias], g)],
    )
    launcher.plan.cache_clear()


A, COLUMN = make(37, 130), make(130, 1)
BATCH, COLUMNS = make(3, 19, 35), make(3, 35, 1)
NAN = torch.full((37, 1), torch.nan, dtype=torch.float64, device=DEVICE)
ONE_ROW_OR_COLUMN: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], dict[str, Any]]] = {
    "column": (torch.mm, (A, COLUMN), {}),
    "row": (torch.mm, (COLUMN.t(), A.t()), {}),
    "row and column": (torch.mm, (COLUMN.t(), COLUMN), {}),
    "nothing to sum": (torch.addmm, (make(4, 1), make(4, 0), make(0, 1)), {"beta": 2}),
    "added": (torch.addmm, (make(37, 1), A, COLUMN), {"beta": 0.5, "alpha": 2}),
    "a number added": (torch.addmm, (make(1), A, COLUMN), {}),
    "NaN that does not count": (torch.addmm, (NAN, A, COLUMN), {"beta": 0, "alpha": -1}),
    "transposed": (torch.addmm, (make(1, 37), COLUMN.t(), make(37, 130).t()), {}),
    "batch": (torch.bmm, (BATCH, COLUMNS), {}),
    "batch of rows": (torch.bmm, (COLUMNS.mT, BATCH.mT), {}),
    "batch, added": (torch.baddbmm, (make(19, 1), BATCH, COLUMNS), {"beta": -1}),
    "batch summed": (torch.addbmm, (make(19, 1), BATCH, COLUMNS), {"alpha": 3}),
    "batch inside, summed": (
        torch.addbmm, (make(1), BATCH.transpose(0, 1), make(35, 19).t().unsqueeze(-1)), {},
    ),
    "broadcast": (torch.matmul, (make(2, 1, 19, 35), COLUMNS), {}),
    "layer": (F.linear, (make(2, 35), make(1, 35), make(1)), {}),
    "layer of a vector": (F.linear, (make(35), make(7, 35), make(7)), {}),
    "vector": (torch.addmv, (make(37), A, COLUMN[:, 0]), {"beta": 0.5}),
    "outer": (torch.mm, (make(37, 1), make(1, 33)), {}),
    "outer, added": (torch.addmm, (make(33), make(37, 1), make(1, 33)), {"beta": 2, "alpha": 3}),
    "outer, strided": (torch.addmm, (NAN, make(1, 37).t(), make(33, 2)[:, :1].t()), {"beta": 0}),
    "batch of outers": (torch.bmm, (make(3, 5, 1), make(3, 7, 1).mT), {}),
    "layer of a feature": (F.linear, (make(2, 4, 1), make(5, 1), make(5)), {}),
    "layer of a number": (F.linear, (make(1), make(5, 1), make(5)), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", ONE_ROW_OR_COLUMN)
def test_one_row_column_or_product_takes_no_tiles(case: str) -> None:
    """It is limited by memory: a reduction as ``mv`` is, with what is added in a second launch,
    rounded once, or a pointwise product as ``outer`` is."""
    function, operands, numbers = ONE_ROW_OR_COLUMN[case]
    seen: list[str] = []
    with runtime.observe(lambda k, *launch: seen.append(k.fn.__name__)), tritongrad.use():
        ours = function(*operands, **numbers)
    assert "gemm" not in seen
    assert len(seen) <= 2
    theirs = function(*operands, **numbers)
    assert ours.stride() == theirs.stride()
    inputs = [t for t in operands if t.requires_grad]
    g = random_like([theirs])
    assert_same(
        [ours, *gradients([ours], inputs, g)], [theirs, *gradients([theirs], inputs, g)], case
    )


def test_one_row_of_half_precision() -> None:
    shapes = (37,), (37, 130), (130,)
    added, a, x = (make(*shape, dtype=torch.bfloat16).detach() for shape in shapes)
    exact = torch.addmv(added.double(), a.double(), x.double(), alpha=0.5)
    found = tritongrad.addmv(added, a, x, alpha=0.5).double()
    # Half an ulp of the result, and float32's error in the sum.
    bound = torch.finfo(torch.bfloat16).eps / 2 * exact.abs() * (1 + 1e-3) + 1e-5
    assert ((found - exact).abs() <= bound).all()


def test_alignment() -> None:
    """Neither how many products are summed nor the stride of a single row has a part in it."""
    square, row = torch.Size((256, 256)), torch.Size((1, 256))

    def depth(*operands: Any, summed: bool = False) -> int:
        sizes = [torch.Size(o) if i % 2 == 0 else o for i, o in enumerate(operands)]
        found = launcher.plan(*sizes, torch.bfloat16, "ieee", summed=summed)
        depth: int = found.meta["BLOCK_K"]
        return depth

    many = torch.Size((3, *square)), (256 * 256, 256, 1)
    assert depth(*many, *many, summed=True) == depth(square, (256, 1), square, (256, 1))
    assert depth(row, (256, 1), square, (256, 1)) == 128
    assert depth(row, (256, 1), square, (257, 1)) < 128
    assert depth(row, (256, 1), square, (512, 2)) < 128
    assert depth((2, *square), (65537, 256, 1), (2, *square), (65536, 256, 1)) == 32


@pytest.mark.parametrize("first", [0, 1], ids=["aligned", "shifted"])
def test_where_operands_begin(first: int) -> None:
    """At an unaligned address rows are read element by element, whatever their strides."""
    a = torch.zeros(256 * 256 + 1, dtype=torch.bfloat16, device=DEVICE)[first:][: 256 * 256]
    seen: list[Any] = []
    with runtime.stub(), runtime.observe(lambda *launch: seen.append(launch[3])):
        launcher.matrix_product(a.view(256, 256), big(torch.bfloat16, size=256))
    assert seen[0]["BLOCK_K"] == (64 if first else 128)


def test_tf32_as_torch_was_told() -> None:
    assert launcher.float32_precision() != "tf32"
    torch.set_float32_matmul_precision("high")
    try:
        assert launcher.float32_precision() == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


# --------------------------------------------------------------------------------- machine code


def compiled(
    monkeypatch: pytest.MonkeyPatch,
    a: Tensor,
    b: Tensor,
    target: str,
    precision: str = "ieee",
    added: Tensor | None = None,
    summed: bool = False,
) -> dict[str, Any]:
    """What the compiler makes of ``a @ b`` on ``target``, with the tiles it would have there."""
    from tritongrad.compare.disassembly import compile_all
    from tritongrad.compare.specialisations import describe, make_job

    monkeypatch.setattr(launcher, "has_wgmma", lambda: target != "sm_80")
    monkeypatch.setattr(launcher, "float32_precision", lambda: precision)
    launcher.plan.cache_clear()
    launches: list[Any] = []
    with runtime.stub(), runtime.observe(lambda *launch: launches.append(launch)):
        launcher.matrix_product(a, b, added, summed=summed)
    launcher.plan.cache_clear()
    ((kernel, _, args, meta),) = launches
    ((_, answer),) = compile_all([make_job(describe(kernel, args, meta), target)], 1)
    assert "error" not in answer, answer["error"]
    return answer


def big(
    dtype: torch.dtype, *, odd: bool = False, transposed: bool = False, size: int = 2048
) -> Tensor:
    """So many rows of as many zeros, or of one more."""
    matrix = torch.zeros(size, size + odd, dtype=dtype, device=DEVICE)
    return matrix.mT if transposed else matrix


@pytest.mark.parametrize(
    ("dtype", "target", "instruction"),
    [
        (torch.bfloat16, "sm_80", "HMMA"),
        (torch.bfloat16, "sm_90", "HGMMA"),
        (torch.float16, "sm_90", "HGMMA"),
        (torch.float64, "sm_90", "DMMA"),
        (torch.float32, "sm_90", None),
    ],
    ids=str,
)
def test_machine_code(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, target: str, instruction: str | None
) -> None:
    """Tensor cores where there are any, 16-byte accesses, and no spills."""
    code = compiled(monkeypatch, big(dtype), big(dtype, transposed=True), target)
    assert code["spill_bytes"] == 0
    assert code["wide_loads"] > 0
    assert code["wide_stores"] > 0
    assert set(code["tensor_core"]) == ({instruction} if instruction else set())
    assert not code["serialised"]


def test_machine_code_of_what_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop of the product alone, in its tile, and so are its registers: what is added comes
    after it, in pieces, 16 bytes at a time."""
    a, b = big(torch.bfloat16), big(torch.bfloat16, transposed=True)
    alone = compiled(monkeypatch, a, b, "sm_90")
    code = compiled(monkeypatch, a, b, "sm_90", added=a)
    assert code["spill_bytes"] == 0
    assert code["tensor_core"] == alone["tensor_core"]
    assert code["shared_bytes"] == alone["shared_bytes"]
    assert code["registers"] <= alone["registers"] + 8
    # A tile of 128 x 256 elements is 64 KiB, for 256 threads.
    assert code["wide_loads"] == alone["wide_loads"] + 16
    assert code["wide_stores"] == alone["wide_stores"]


def test_machine_code_of_a_small_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    a = big(torch.bfloat16, size=1024)
    code = compiled(monkeypatch, a, a, "sm_90")
    assert code["spill_bytes"] == 0
    assert set(code["tensor_core"]) == {"HGMMA"}
    # Two programs to a multiprocessor.
    assert code["registers"] <= 128
    assert code["shared_bytes"] <= 227 * 1024 // 2


def test_machine_code_of_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two loops, one in the other, of operands whose rows are not aligned: nothing is spilled."""
    a, target = torch.zeros(3, 1025, 1025, device=DEVICE), "sm_100"
    assert compiled(monkeypatch, a, a.mT, target, summed=True)["spill_bytes"] == 0


def test_unaligned_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of odd length are read element by element; the tile shrinks rather than spill."""
    a, b = big(torch.bfloat16, odd=True), big(torch.bfloat16, odd=True, transposed=True)
    code = compiled(monkeypatch, a, b, "sm_90")
    assert code["spill_bytes"] == 0
    assert code["wide_loads"] == 0


def test_tf32_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = big(torch.float32), big(torch.float32, transposed=True)
    code = compiled(monkeypatch, a, b, "sm_90", "tf32")
    assert code["spill_bytes"] == 0
    assert set(code["tensor_core"]) == {"HGMMA"}
