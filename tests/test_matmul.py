"""Products of matrices and vectors: what their strides, batches and tiles can get wrong."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from scenarios import copies, gradients
from support import DEVICE, Call, Tolerance, assert_same, calls, derivatives, random_like
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap

import tritongrad
from tritongrad import runtime
from tritongrad.launchers import matmul as launcher
from tritongrad.op import OPS

F = torch.nn.functional
NAMES = ("dot", "mv", "mm", "bmm", "matmul", "linear")
each_op = pytest.mark.parametrize("name", NAMES)


def make(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    values = torch.randn(shape, dtype=torch.float64, generator=generator)
    return values.to(DEVICE, dtype).requires_grad_()


def launched(run: Callable[[], Any]) -> list[tuple[Any, ...]]:
    """The arguments of every gemm that ``run`` launches, after its four pointers."""
    seen = []

    def note(kernel: Any, grid: Any, args: tuple[Any, ...], meta: Any) -> None:
        if kernel.fn.__name__ == "gemm":
            seen.append(args[4:])

    with runtime.observe(note):
        run()
    return seen


# ------------------------------------------------------------------------------------ derivatives


@each_op
def test_every_sample_equals_torch(name: str) -> None:
    """Values, gradients, second derivatives and tangents, for each layout and rank."""
    for call in calls(OPS[name]):
        # torch gives no tangent to an expanded tensor.
        forward = all(0 not in t.stride() for t in call.inputs)
        ours, theirs = (
            derivatives(function, call.inputs, torch.float64, forward=forward)
            for function in (call.triton, call.torch)
        )
        assert_same(ours, theirs, str(call))
        assert_same(call.triton(*call.inputs).stride(), call.torch(*call.inputs).stride())


@each_op
@pytest.mark.parametrize(
    "nest",
    [
        lambda f: jacfwd(jacrev(jacfwd(f))),
        lambda f: jacrev(jacfwd(jacrev(f))),
        lambda f: jacfwd(jacfwd(jacfwd(f))),
    ],
    ids=["forward-reverse-forward", "reverse-forward-reverse", "forward three times"],
)
def test_third_order_nests(name: str, nest: Callable[..., Any]) -> None:
    """Of a cubic in all the operands, each a function of one vector: no term of it is zero."""
    shapes = {
        "dot": [(2,), (2,)],
        "mv": [(1, 2), (2,)],
        "mm": [(1, 2), (2, 2)],
        "bmm": [(1, 1, 2), (1, 2, 1)],
        "matmul": [(2, 1, 2), (2, 1)],
        "linear": [(1, 2), (2, 2), (2,)],
    }[name]

    def function(x: Tensor) -> Tensor:
        operands = [
            (x.sum() * torch.arange(1.0, 1 + torch.Size(s).numel()).to(x) + x[0]).view(s)
            for s in shapes
        ]
        out = OPS[name].replaces[0](*operands)
        return (out * out * out).sum()

    x = make(2).detach()
    with tritongrad.use() as session:
        found = nest(function)(x)
    assert session.ran[name]
    assert_same(found, nest(function)(x), name, tolerance=Tolerance(1e-11, 1e-11))


def in_dims(ranks: tuple[int, ...]) -> Iterator[tuple[int | None, ...]]:
    """Operands of these ranks batched first, last or not at all, in every combination with any."""
    choices = itertools.product(*[(None, 0, rank) for rank in ranks])
    return (dims for dims in choices if any(d is not None for d in dims))


VMAPPED = {
    "dot": [(3,), (3,)],
    "mv": [(2, 3), (3,)],
    "mm": [(2, 3), (3, 4)],
    "bmm": [(2, 2, 3), (2, 3, 2)],
    "matmul": [(2, 1, 3), (3, 4)],
    "linear": [(2, 3), (4, 3), (4,)],
}


@each_op
def test_vmap(name: str) -> None:
    """Operands batched or shared: values, per-sample gradients, and the derivatives of both."""
    function, shapes = OPS[name].replaces[0], VMAPPED[name]

    def energy(*operands: Tensor) -> Tensor:
        out = function(*operands)
        return (out * out).sum()

    every = tuple(range(len(shapes)))
    for dims in in_dims(tuple(map(len, shapes))):
        batched = [
            (*s[:d], 2, *s[d:]) if d is not None else s for s, d in zip(shapes, dims, strict=True)
        ]
        operands = [make(*s, seed=i) for i, s in enumerate(batched)]

        def both(dims: Any = dims, operands: Any = operands) -> Any:
            values = vmap(function, dims)(*operands)
            per_sample = vmap(grad(energy, every), dims)(*operands)
            loss = sum((g * g).sum() for g in per_sample)
            return values, per_sample, gradients([loss, values], operands)

        with tritongrad.use() as session:
            ours = both()
        assert session.ran[name], session
        assert_same(ours, both(), f"{name}, in_dims {dims}")


@pytest.mark.parametrize(
    "shapes",
    [[(3,), (4, 3), (4,)], [(2, 2, 3), (4, 3), (4,)], [(2, 3), (4, 3)], [(3,), (4, 3)]],
    ids=["vector", "batch", "without bias", "vector without bias"],
)
def test_linear_vmap(shapes: list[tuple[int, ...]]) -> None:
    for choice in itertools.product((None, 0), repeat=len(shapes)):
        if not any(d == 0 for d in choice):
            continue
        operands = [
            make(*(s if d is None else (2, *s)), seed=i)
            for i, (s, d) in enumerate(zip(shapes, choice, strict=True))
        ]

        def run(choice: Any = choice, operands: Any = operands) -> Any:
            value = vmap(F.linear, choice)(*operands)
            return value, gradients([value], operands)

        with tritongrad.use():
            ours = run()
        assert_same(ours, run(), f"in_dims {choice}")


@pytest.mark.parametrize("name", ["mv", "mm"])
def test_backward_traced(name: str) -> None:
    """A tracer that meets the backward of an op that ran before sees ATen operators, no kernel."""
    from torch.fx.experimental.proxy_tensor import make_fx

    call = calls(OPS[name])[0]
    out = call.triton(*call.inputs)
    (upstream,) = random_like([out])

    def backward(g: Tensor) -> Any:
        return torch.autograd.grad(out, call.inputs, g, retain_graph=True)

    traced = make_fx(backward)(upstream)
    assert not launched(lambda: traced(upstream))
    assert_same(list(traced(upstream)), list(backward(upstream)), name)


# ---------------------------------------------------------------------------- memory and launches


def poisoned(tensor: Tensor) -> Tensor:
    """The same values and strides, in memory that is NaN wherever ``tensor`` is not."""
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    pad = 4096
    memory = torch.full((reach + 2 * pad,), torch.nan, dtype=tensor.dtype, device=tensor.device)
    view = memory.as_strided(tensor.shape, tensor.stride(), pad)
    view.copy_(tensor.detach()) if 0 not in tensor.stride() else view.fill_(0.5)
    return view.detach().requires_grad_()


@each_op
def test_nothing_read_out_of_bounds(name: str) -> None:
    for call in calls(OPS[name]):
        if any(t.numel() == 0 for t in call.inputs):
            continue
        inputs = [poisoned(t) for t in call.inputs]
        out = call.triton(*inputs)
        upstream = [poisoned(g) for g in random_like([out])]
        found = [out, *gradients([out], inputs, upstream)]
        assert all(t is not None and t.isfinite().all() for t in found), call
        expected = call.torch(*inputs)
        assert_same(found, [expected, *gradients([expected], inputs, upstream)], str(call))


def test_offsets_beyond_32_bits() -> None:
    """HAZARDS 12: rows 2^30 elements apart. Of these 4 GiB only the pages touched exist."""
    if DEVICE.type != "cpu":
        pytest.skip("4 GiB of GPU memory for three rows")
    stride = 2**30
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (2 * stride + 64)), dtype=torch.float16)
    values = make(3, 20, dtype=torch.float16).detach()
    a = memory.as_strided((3, 20), (stride, 1))
    a.copy_(values)
    b = make(20, 5, dtype=torch.float16).detach()
    for ours, left, right in (
        (lambda: a @ b, values, b),
        (lambda: b.t() @ a.t(), b.t(), values.t()),
        (lambda: a.t() @ b[:3], values.t(), b[:3]),
    ):
        with tritongrad.use() as session:
            found = ours()
        assert session.ran["matmul"]
        expected = (left.double() @ right.double()).half()
        assert_same(found, expected, tolerance=Tolerance(1e-3, 1e-3))
    assert launcher.plan(a.shape, a.stride(), b.shape, b.stride(), a.dtype, "ieee").meta["WIDE"]


@pytest.mark.parametrize(
    ("a", "b", "batch"),
    [
        (make(4, 3, 5), make(5, 2), ()),
        (make(2, 3, 4, 5), make(5, 2), ()),
        (make(4, 3, 5), make(1, 5, 2).expand(4, 5, 2), ()),
        (make(3, 4, 5).transpose(0, 1), make(5, 2), (4,)),
        (make(2, 3, 4, 5), make(2, 3, 5, 2), (6,)),
        (make(2, 1, 4, 5), make(3, 5, 2), (3, 2)),
    ],
    ids=["weight", "two dims", "expanded", "does not fold", "collapses", "broadcast"],
)
def test_batches_fold(a: Tensor, b: Tensor, batch: tuple[int, ...]) -> None:
    """One launch, over rows where one b serves the whole batch, else over the fewest dimensions."""
    with tritongrad.use():
        (found,) = launched(lambda: torch.matmul(a, b))
    assert found[7] == batch


@pytest.mark.parametrize(
    ("function", "operands"),
    [
        (torch.mm, (make(5, 3).t(), make(4, 5).t())),
        (torch.bmm, (make(2, 5, 3).mT, make(4, 2, 5).permute(1, 2, 0))),
        (torch.mv, (make(5, 3).t(), make(5, 2)[:, 0])),
        (torch.addmm, (make(4, 3).t(), make(5, 3).t(), make(4, 5).t())),
        (torch.baddbmm, (make(3, 4), make(2, 5, 3).mT, make(2, 4, 5).mT)),
        (torch.matmul, (make(2, 1, 5, 3).mT, make(6, 4, 5).mT)),
        (F.linear, (make(5, 3).t(), make(5, 4).t())),
        (torch.inner, (make(5, 3).t(), make(5, 4).t())),
        (torch.tensordot, (make(2, 5, 3), make(2, 5, 4), ([0, 1], [0, 1]))),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)  # fmt: skip
def test_operands_are_read_in_place(function: Callable[..., Any], operands: Any) -> None:
    """Transposed and sliced, forward and backward."""
    inputs = [t for t in operands if torch.is_tensor(t)]
    with tritongrad.use():
        out = function(*operands)
        assert not copies(lambda: function(*operands))
    (g,) = random_like([out])
    assert not copies(lambda: gradients([out], inputs, [g]))


def test_weight_gradient_is_one_product() -> None:
    """Not a batch of products that are summed afterwards."""
    x, weight, bias = make(4, 3, 5), make(2, 5), make(2)
    with tritongrad.use():
        out = F.linear(x.detach(), weight, bias)
    found = launched(lambda: gradients([out], [weight]))
    assert [(args[:3], args[7]) for args in found] == [((2, 5, 12), ())]
    with tritongrad.use():
        out = x @ weight.mT
    assert [args[7] for args in launched(lambda: gradients([out], [x, weight]))] == [(), ()]


def test_gradients_are_laid_out_as_their_operands() -> None:
    """As torch's are, so that accumulating the gradient of a transposed weight copies nothing."""
    for x, weight in ((make(3, 5), make(4, 5)), (make(5, 3).t(), make(4, 5))):
        with tritongrad.use():
            out = x @ weight.t()
        ours = gradients([out], [x, weight])
        theirs = gradients([x @ weight.t()], [x, weight])
        assert [g.stride() for g in ours] == [g.stride() for g in theirs]


# ------------------------------------------------------------------------------ dtypes and tiles


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_accumulates_in_float32(dtype: torch.dtype) -> None:
    """HAZARDS 15: sums of 3000 products round once, in the forward and in the gradients."""
    a, b, bias = (make(*s, dtype=dtype) for s in ((3, 3000), (4, 3000), (4,)))
    g = make(3, 4, dtype=dtype).detach()
    with tritongrad.use():
        out = F.linear(a, b, bias)
    found = [out, *gradients([out], [a, b, bias], [g])]
    wide = [t.detach().double().requires_grad_() for t in (a, b, bias)]
    out = F.linear(*wide)
    exact = [out, *gradients([out], wide, [g.double()])]
    for ours, truth in zip(found, exact, strict=True):
        # Half an ulp of the result, and float32's error in the sum of terms of this size.
        rounding = torch.finfo(dtype).eps * (1 + 1e-3) * truth.abs() / 2 + 1e-4
        assert ((ours.double() - truth).abs() <= rounding).all()


AUTOCAST_SHAPES = {
    "dot": [(3,), (3,)],
    "mv": [(2, 3), (3,)],
    "mm": [(2, 3), (3, 4)],
    "bmm": [(2, 2, 3), (2, 3, 4)],
    "matmul": [(2, 3), (3,)],
    "linear": [(2, 3), (4, 3), (4,)],
}


@each_op
@pytest.mark.parametrize("dtypes", list(itertools.product(("half", "single", "double"), repeat=2)))
def test_autocast(name: str, dtypes: tuple[str, str]) -> None:
    """HAZARDS 24: dtypes of results and gradients, or torch's refusal."""
    kinds = {"half": torch.bfloat16, "single": torch.float32, "double": torch.float64}
    shapes = AUTOCAST_SHAPES[name]
    operands = [make(*s, dtype=kinds[dtypes[min(i, 1)]]) for i, s in enumerate(shapes)]

    def run() -> Any:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            out = OPS[name].replaces[0](*operands)
        return [out.dtype, *[g.dtype for g in gradients([out], operands)]]

    try:
        expected = run()
    except RuntimeError:
        with tritongrad.use(), pytest.raises(RuntimeError):
            run()
    else:
        with tritongrad.use() as session:
            assert run() == expected
        assert session.ran[name]


REFUSED: dict[str, Callable[[], Any]] = {
    "integers": lambda: torch.mm(torch.ones(2, 3).long(), torch.ones(3, 2).long()),
    "complex": lambda: torch.mm(torch.ones(2, 3) + 1j, torch.ones(3, 2) + 1j),
    "dtypes": lambda: torch.mm(torch.ones(2, 3), torch.ones(3, 2).double()),
    "inner sizes": lambda: torch.matmul(torch.ones(2, 3), torch.ones(2, 3)),
    "batches": lambda: torch.matmul(torch.ones(2, 3, 4), torch.ones(3, 4, 5)),
    "unequal batches": lambda: torch.bmm(torch.ones(2, 3, 4), torch.ones(1, 4, 5)),
    "rank of mm": lambda: torch.mm(torch.ones(2, 3, 4), torch.ones(4, 5)),
    "rank of mv": lambda: torch.mv(torch.ones(2, 3), torch.ones(3, 1)),
    "0-dim": lambda: torch.matmul(torch.ones(()), torch.ones(3)),
    "number": lambda: torch.ones(3) @ 2,
    "sizes of dot": lambda: torch.dot(torch.ones(3), torch.ones(4)),
    "linear's vector weight": lambda: F.linear(torch.ones(2, 3), torch.ones(3)),
    "linear's broadcast bias": lambda: F.linear(
        torch.ones(2, 3), torch.ones(4, 3), torch.ones(1)
    ),
    "linear's inner sizes": lambda: F.linear(torch.ones(2, 3), torch.ones(4, 2)),
    "out=": lambda: torch.mm(torch.ones(2, 3), torch.ones(3, 2), out=torch.empty(2, 2)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_we_do_not_take_is_torchs(case: str) -> None:
    """HAZARDS 17 and 28: torch's result or torch's error, and the session counts the reason."""
    run = REFUSED[case]
    try:
        expected: Any = run()
    except (RuntimeError, TypeError) as refusal:
        with tritongrad.use() as session, pytest.raises(type(refusal)):
            run()
    else:
        with tritongrad.use() as session:
            found = run()
        assert torch.equal(found, expected)
    assert not session.ran
    assert session.fell_back


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
    monkeypatch.setattr(launcher, "_HAS_WGMMA", True)
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

    monkeypatch.setattr(launcher, "_HAS_WGMMA", target != "sm_80")
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


def test_calls_are_taken() -> None:
    """Every spelling of a product reaches an op."""
    a, b = make(2, 3), make(3, 4)
    spellings: list[tuple[str, Callable[[], Any]]] = [
        ("matmul", lambda: a @ b),
        ("matmul", lambda: a.matmul(b)),
        ("matmul", lambda: b.__rmatmul__(a)),
        ("mm", lambda: a.mm(b)),
        ("mv", lambda: a.mv(b[:, 0])),
        ("dot", lambda: a[0].dot(b[:, 0])),
        ("bmm", lambda: a[None].bmm(b[None])),
        ("linear", lambda: F.linear(a, b.t(), bias=None)),
    ]
    for name, call in spellings:
        with tritongrad.use() as session:
            found = call()
        assert session.ran == {name: 1}
        assert_same(found, call(), name)
    assert isinstance(Call(OPS["mm"], calls(OPS["mm"])[0].sample).triton(a, b), Tensor)


@pytest.mark.parametrize("layout", ["dense", "transposed", "strided", "expanded"])
def test_a_sum_of_products_reads_its_batches_in_place(layout: str) -> None:
    """``addbmm`` is one launch, which is given the operands' own memory."""
    a, b = make(5, 19, 33), make(5, 33, 7)
    if layout == "transposed":
        a, b = make(5, 33, 19).mT, make(5, 7, 33).mT
    elif layout == "strided":
        a, b = make(5, 19, 66)[..., ::2], make(10, 33, 7)[::2]
    elif layout == "expanded":
        a, b = make(19, 33).expand(5, -1, -1), make(33, 7).expand(5, -1, -1)
    added = make(19, 7)
    seen: list[tuple[str, Any]] = []
    with runtime.observe(lambda k, grid, args, meta: seen.append((k.fn.__name__, args))):
        found = tritongrad.addbmm(added, a, b, alpha=0.5)
    ((kernel, args),) = seen
    assert kernel == "gemm"
    assert [t.data_ptr() for t in args[1:4]] == [t.data_ptr() for t in (a, b, added)]
    assert_same(found, torch.addbmm(added, a, b, alpha=0.5))
