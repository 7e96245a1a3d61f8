"""What is particular to reductions: dimensions, tiles and parts, ties and kinks, and their cost.

Derivatives of every order, transforms and layouts are covered by the suites that walk OPS.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import DEVICE, FLOATS, assert_as_accurate, assert_same
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap

import tritongrad
from tritongrad import runtime
from tritongrad.kernels import reduction as k
from tritongrad.launchers import reduction as launcher
from tritongrad.launchers.reduction import AMAX, AMIN, SUM, reduce_product, sum_to
from tritongrad.reroute import HARMLESS, NO_FLOATS
from tritongrad.runtime import INTERPRETED

Function = Callable[..., Any]
NAN, INF = math.nan, math.inf
ORDERS = (0, 0.5, 1, 1.5, 2, 3, INF, -INF, -1)

REDUCTIONS: dict[str, Function] = {
    "sum": torch.sum,
    "mean": torch.mean,
    "amax": torch.amax,
    "amin": torch.amin,
    "vector_norm": lambda x, dim, keepdim=False: torch.linalg.vector_norm(x, 2, dim, keepdim),
    "norm": lambda x, dim, keepdim=False: torch.norm(x, 3, dim, keepdim),
}
each = pytest.mark.parametrize("name", REDUCTIONS)


def rerouted(f: Function, *inputs: Tensor) -> Any:
    """``f`` on our kernels; fails if any of its arithmetic ran on torch."""
    with tritongrad.use() as session:
        result = f(*inputs)
    assert session.ran, session
    assert not {reason for _, reason in session.fell_back} - HARMLESS, session
    return result


def derivative(f: Function, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Value, and gradient for an upstream gradient of ones; on torch."""
    x = x.detach().requires_grad_()
    out = f(x)
    return out, torch.autograd.grad(out, x, torch.ones_like(out), allow_unused=True)[0]


def launches(f: Callable[[], Any]) -> int:
    with tritongrad.use() as session:
        f()
    return session.launches


# ------------------------------------------------------------------------------- dims and dtypes


@each
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3)], ids=str)
def test_every_choice_of_dims(name: str, shape: tuple[int, ...]) -> None:
    f, x = REDUCTIONS[name], torch.randn(shape, dtype=torch.float64, device=DEVICE)
    rank = len(shape)
    choices: list[Any] = [(), [], *range(-max(rank, 1), max(rank, 1))]
    for size in range(1, rank + 1):
        choices += itertools.permutations(range(-rank, 0), size)
    for dim, keepdim in itertools.product(choices, (False, True)):

        def call(x: Tensor, dim: Any = dim, keepdim: bool = keepdim) -> Tensor:
            return f(x, dim, keepdim)

        what = f"{name} dim={dim} keepdim={keepdim}"
        assert_same(rerouted(call, x), call(x), what)
        assert_same(rerouted(lambda x, c=call: derivative(c, x), x), derivative(call, x), what)


@each
def test_what_torch_refuses(name: str) -> None:
    x = torch.ones(2, 0, 3, device=DEVICE)
    for dim in (3, -4, (0, 3), (0, 0), (1, -2), (1.0,)):
        with tritongrad.use() as session, pytest.raises((IndexError, RuntimeError, TypeError)):
            REDUCTIONS[name](x, dim)
        assert not session.ran


@pytest.mark.parametrize("f", [torch.amax, torch.amin], ids=["amax", "amin"])
def test_extremum_of_nothing(f: Function) -> None:
    x = torch.ones(2, 0, 3, device=DEVICE)
    assert rerouted(lambda x: f(x, 2), x).shape == (2, 0)
    for dim in (1, (), (0, 1)):
        with tritongrad.use(), pytest.raises((IndexError, RuntimeError), match=r"reduc|dim"):
            f(x, dim)


@pytest.mark.parametrize("order", ORDERS)
def test_norm_of_nothing(order: float) -> None:
    x = torch.ones(3, 0, device=DEVICE)
    if order < 0 or order == INF:
        with tritongrad.use(), pytest.raises(RuntimeError, match="identity"):
            torch.linalg.vector_norm(x, order, 1)
    else:
        out = rerouted(lambda x: torch.linalg.vector_norm(x, order, 1), x)
        assert_same(out, torch.zeros(3, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int64])
def test_integer_input(dtype: torch.dtype) -> None:
    x = torch.tensor([[1, 0, 3], [4, 5, 6]], device=DEVICE).to(dtype)
    for f, result in itertools.product((torch.sum, torch.mean), FLOATS):
        assert_same(rerouted(lambda x: f(x, 1, dtype=result), x), f(x, 1, dtype=result))  # noqa: B023
    for f in (torch.sum, torch.amax):
        with tritongrad.use() as session:
            f(x)
        assert [reason for _, reason in session.fell_back] == [NO_FLOATS]


def test_dtype_rounds_the_input_first() -> None:
    x = torch.tensor([[1.0 + 2**-12] * 8], device=DEVICE, dtype=torch.float32)
    for dtype in FLOATS:
        assert_same(
            rerouted(lambda x: derivative(lambda x: x.sum(1, dtype=dtype), x), x),  # noqa: B023
            derivative(lambda x: x.sum(1, dtype=dtype), x),  # noqa: B023
        )


# ------------------------------------------------------------------------------- spellings of norm


def test_norm_is_the_vector_norm_where_torch_says_so() -> None:
    x = torch.randn(3, 4, device=DEVICE, dtype=torch.float64)
    for call in (
        lambda x: torch.norm(x),
        lambda x: torch.norm(x, p=None, dim=0),
        lambda x: torch.norm(x, dim=(0, 1)),
        lambda x: torch.norm(x, 1),
        lambda x: torch.norm(x, 3, (0, 1), True),
        lambda x: x.norm(),
        lambda x: x.norm(1, -1, True),
        lambda x: torch.linalg.norm(x),
        lambda x: torch.linalg.norm(x, dim=(0, 1)),
        lambda x: torch.linalg.norm(x, 1, 0),
        lambda x: torch.linalg.norm(x[0], 3),
    ):
        assert_same(rerouted(call, x), call(x))
    for call in (
        lambda x: torch.norm(x, "nuc"),
        lambda x: torch.linalg.norm(x, 2),
        lambda x: torch.linalg.norm(x, "fro"),
        lambda x: torch.linalg.norm(x, 1, (0, 1)),
    ):
        with tritongrad.use() as session:
            assert_same(call(x), call(x))
        assert ("matrix norm" in {reason for _, reason in session.fell_back}) or session.ran["norm"]


# ------------------------------------------------------------------- ties, kinks, special numbers

ROWS = torch.tensor(
    [
        [0.0, 0.0, 0.0],
        [1.0, -1.0, 1.0],
        [3.0, 0.0, -4.0],
        [NAN, 1.0, 2.0],
        [NAN, NAN, NAN],
        [INF, 1.0, INF],
        [-INF, 2.0, 0.0],
        [INF, -INF, 1.0],
        [-0.0, 0.0, 5.0],
        [1e30, 1e30, -1e30],
        [1e-30, 1e-30, 0.0],
    ],
    dtype=torch.float64,
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["sum", "mean", "amax", "amin", *map(str, ORDERS)])
def test_special_values(name: str, dtype: torch.dtype) -> None:
    def f(x: Tensor) -> Tensor:
        if name in REDUCTIONS:
            return REDUCTIONS[name](x, 1)
        return torch.linalg.vector_norm(x, float(name), 1)

    x = ROWS.to(DEVICE, dtype)
    if name == "1.5" and dtype is torch.float32 and not INTERPRETED:
        # The 1e-45 that (1e-30) ** 1.5 is has no digits in float32, and on a GPU is 0.
        x = x[:-1]
    expected = derivative(f, x)
    assert_same(rerouted(lambda x: derivative(f, x), x), expected, "kernel")

    def penalised(x: Tensor) -> Tensor:
        # create_graph: a gradient of the gradient needs the rule
        x = x.detach().requires_grad_()
        out = f(x)
        g = torch.ones_like(out).requires_grad_()
        (dx,) = torch.autograd.grad(out, x, g, create_graph=True, allow_unused=True)
        if dx is None or not dx.requires_grad:
            return torch.zeros(())
        # Zeros where there is no derivative: ours may be them, where torch has None.
        found = torch.autograd.grad(dx, (x, g), torch.ones_like(dx), materialize_grads=True)
        return torch.cat([t.flatten() for t in found])

    # Without the last two rows, where the terms of second derivatives overflow and cancel.
    assert_same(rerouted(penalised, x[:-2]), penalised(x[:-2]), "rule")


def test_large_and_single() -> None:
    for x in (torch.tensor([[1e200, 1e200]]).double(), torch.tensor([[1e200], [1e-200]]).double()):
        for order in ORDERS:
            assert_same(
                rerouted(lambda x: torch.linalg.vector_norm(x, order, 1), x.to(DEVICE)),  # noqa: B023
                torch.linalg.vector_norm(x, order, 1).to(DEVICE),
            )


def test_order_0_has_no_gradient() -> None:
    """torch counts: the gradient is undefined rather than zero, and zero under torch.func."""
    x = torch.randn(3, device=DEVICE, requires_grad=True)
    out = rerouted(lambda x: torch.linalg.vector_norm(x, 0), x)
    assert out.requires_grad
    out.backward()
    assert x.grad is None

    def count(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, 0)

    value = x.detach()
    for transform in (grad(count), jacfwd(count), jacrev(count), jacfwd(grad(count))):
        assert_same(rerouted(transform, value), transform(value))


# ---------------------------------------------------------------------------- transforms in depth


@pytest.mark.parametrize("name", ["mean", "amax", "vector_norm", "norm"])
@pytest.mark.parametrize("inner", [jacfwd, jacrev], ids=["jacfwd", "jacrev"])
@pytest.mark.parametrize("outer", [jacfwd, jacrev], ids=["jacfwd", "jacrev"])
def test_third_derivatives(name: str, inner: Function, outer: Function) -> None:
    x = torch.tensor([[1.0, -2.0, 1.5], [0.5, 0.5, 0.25]], dtype=torch.float64, device=DEVICE)

    def f(x: Tensor) -> Tensor:
        return REDUCTIONS[name](x * x * x, 1)

    # torch's own derivative of norm's forward mode fails: an in-place operation in it.
    assert_same(rerouted(outer(inner(jacfwd(f))), x), jacrev(jacrev(jacrev(f)))(x))


@each
def test_vmap(name: str) -> None:
    x = torch.randn(3, 4, 2, dtype=torch.float64, device=DEVICE)

    def f(x: Tensor) -> Tensor:
        return REDUCTIONS[name](x, 0).sin().sum()

    for dim in range(3):
        for call in (
            vmap(lambda x: REDUCTIONS[name](x, (0, 1)), dim),
            vmap(grad(f), dim),
            grad(lambda x, d=dim: vmap(f, d)(x).sum()),
            vmap(vmap(grad(f))),
            vmap(jacfwd(grad(f)), dim),
        ):
            if dim and "vmap.<locals>" not in call.__qualname__:
                continue
            data = x[..., None] if call.__qualname__.startswith("vmap") else x
            assert_same(rerouted(call, data), call(data))


def test_vmap_of_a_number() -> None:
    """Nothing is reduced within a sample: the batch must not be."""
    x = torch.randn(5, dtype=torch.float64, device=DEVICE)
    for f in (torch.sum, torch.amax, torch.linalg.vector_norm):
        for call in (vmap(f), vmap(grad(f)), vmap(grad(grad(lambda x: f(x) ** 2)))):  # noqa: B023
            assert_same(rerouted(call, x), call(x))


# ----------------------------------------------------------------------------------- the launcher


def plan(x: Tensor, dims: tuple[int, ...], processors: int = 4) -> launcher.Plan:
    return launcher._plan(
        launcher.SUM, (x.shape,), (x.stride(),), dims, False, torch.float32, processors
    )


def test_tiles_follow_the_contiguous_axis() -> None:
    x = torch.empty(512, 1024)
    assert plan(x, (1,)).meta["BLOCK_COLUMNS"] * plan(x, (1,)).meta["AHEAD"] == 1024
    assert plan(x, (0,)).meta["BLOCK_ROWS"] == k.KEPT_BLOCK
    assert plan(x.t(), (0,)).meta == plan(x, (1,)).meta
    assert plan(x, (0, 1)).geometry[3] == (512 * 1024,), "all dims of a dense tensor are one"


def test_parts_cover_every_step() -> None:
    for n, processors in itertools.product((1, 4096, 40_000, 10**6, 10**6 + 1), (1, 3, 132)):
        found = plan(torch.empty(n), (0,), processors)
        *_, steps, span = found.geometry
        assert (found.parts - 1) * span < steps <= found.parts * span
        warps = found.parts * found.meta["num_warps"]
        assert found.parts == 1 or warps <= processors * launcher.WARPS_PER_PROCESSOR
    assert plan(torch.empty(10**4, 10**4), (1,), 132).parts == 1, "enough rows to fill the GPU"


SHAPES = {
    "several parts": ((40_000,), (0,)),
    "rows in parts": ((3, 65_537), (1,)),
    "columns in parts": ((3000, 20), (0,)),
    "runs": ((3, 2, 513), (0, 2)),
    "runs in parts": ((17, 2, 257), (0, 2)),
    "short runs": ((4, 3, 5), (0, 2)),
    "three reduced dims": ((2, 3, 4, 3, 5), (0, 2, 4)),
    "rows of nothing": ((4, 0), (1,)),
    "no rows": ((0, 4), (1,)),
}


@pytest.mark.parametrize("case", SHAPES)
def test_shapes(case: str) -> None:
    shape, dims = SHAPES[case]
    x = torch.randn(shape, dtype=torch.float64, device=DEVICE)
    for kind, f in ((SUM, torch.sum), (AMAX, torch.amax), (AMIN, torch.amin)):
        if kind is not SUM and 0 in shape:
            continue
        found = launcher.reduce(kind, (x,), dims, False, x.dtype, x.dtype)
        assert_same(found, f(x, dims), case)
        again = launcher.reduce(kind, (x,), dims, False, x.dtype, x.dtype)
        assert torch.equal(found, again), "not deterministic"


def test_a_nan_anywhere_is_seen() -> None:
    for n, i in itertools.product((5, 4097, 40_000), (0, -1, 4)):
        x = torch.zeros(n, device=DEVICE)
        x[i] = NAN
        assert rerouted(torch.amax, x).isnan()
        assert rerouted(torch.amin, x).isnan()


def test_offsets_beyond_32_bits() -> None:
    """The untouched pages of the 2 GiB are never in memory."""
    memory = torch.empty(2**31 + 64, dtype=torch.int8, device="cpu")
    x = memory.as_strided((3, 16), (2**30, 1))
    x.copy_(torch.arange(48).view(3, 16))
    if DEVICE.type != "cpu":
        pytest.skip("the suite for shapes does this on a GPU")
    for dim in (0, 1):
        assert_same(rerouted(lambda x, d=dim: x.sum(d, dtype=torch.float64), x),
                    x.sum(dim, dtype=torch.float64))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each
def test_halves_accumulate_in_float32(name: str, dtype: torch.dtype) -> None:
    x = torch.rand(2, 5000, device=DEVICE, dtype=torch.float64).to(dtype)
    f = REDUCTIONS[name]
    exact = derivative(lambda x: f(x, 1), x.double())
    native = derivative(lambda x: f(x, 1), x)
    ours = rerouted(lambda x: derivative(lambda x: f(x, 1), x), x)
    assert_as_accurate(ours, native, exact, name)


# ------------------------------------------------------------------------- what other families use


def test_sum_to() -> None:
    x = torch.randn(4, 3, 5, device=DEVICE, dtype=torch.float64)
    for shape in ((4, 3, 5), (3, 5), (1, 5), (3, 1), (1, 1, 1), (), (5,), (4, 1, 5)):
        for dtype in FLOATS:
            found = sum_to(x, torch.Size(shape), dtype)
            assert_same(found, x.sum_to_size(shape).to(dtype), str(shape))


def test_reduce_product() -> None:
    a = torch.randn(7, 9, device=DEVICE, dtype=torch.float64)
    x, y = a[0], a[:, 0]
    assert_same(reduce_product(x, x, (0,), x.dtype), x @ x)
    assert_same(reduce_product(a, x, (1,), x.dtype), a @ x)
    assert_same(reduce_product(a.t(), y, (1,), x.dtype), a.t() @ y)
    assert_same(reduce_product(a, a.expand(2, 7, 9), (1,), x.dtype), (a * a).sum(0).expand(2, 9))
    assert_same(reduce_product(x[:0], x[:0], (0,), x.dtype), x[:0] @ x[:0])
    assert_same(reduce_product(a[:, :0], x[:0], (1,), x.dtype, True), torch.zeros_like(a[:, :1]))


# ----------------------------------------------------------- gradients of what was broadcast

BROADCAST: dict[str, tuple[Function, tuple[tuple[int, ...], ...], int]] = {
    # The function, its operands' shapes, and what backward may store: not the product of all.
    "mul": (torch.mul, ((40, 700), (700,)), 40 * 700 + 700),
    "of both": (torch.mul, ((40, 1), (1, 700)), 740),
    "columns": (torch.mul, ((3, 40, 1), (3, 1, 9)), 3 * 49),
    "number": (lambda x, y: torch.where(x > 0, y, 0.5), ((40, 30), ()), 1),
    "condition": (lambda x, y: torch.where(x > 0, x, y), ((40, 30), (30,)), 40 * 30 + 30),
    "addr": (torch.addr, ((33, 350), (33,), (350,)), 33 + 350),
    "scaled": (lambda *x: torch.addr(*x, beta=0.5), ((33, 35), (33,), (35,)), 33 * 36 + 35),
    "addcmul": (torch.addcmul, ((40, 30), (30,), (40, 1)), 70),
    "prelu": (torch.nn.functional.prelu, ((2, 3, 300), (3,)), 1800 + 3),
    "of nothing": (torch.mul, ((2, 0), (2, 1)), 2),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BROADCAST)
def test_gradients_of_what_was_broadcast(case: str, dtype: torch.dtype) -> None:
    """Summed as they are computed: backward stores nothing but gradients, in their shapes."""
    f, shapes, most = BROADCAST[case]
    inputs = [torch.randn(s, device=DEVICE).to(dtype).requires_grad_() for s in shapes]

    def gradients(inputs: list[Tensor]) -> tuple[Tensor, ...]:
        out = f(*inputs)
        g = torch.linspace(-1, 1, out.numel(), device=DEVICE).to(dtype).to(out.dtype)
        g = g.view(out.shape)
        stored.clear()
        return torch.autograd.grad(out, inputs, g, allow_unused=True)

    stored: list[int] = []

    def see(kernel: Any, grid: Any, args: Any, meta: Any) -> None:
        stored.extend(t.numel() for t in args[0] if t is not None)

    with tritongrad.use(), runtime.observe(see):
        ours = gradients(inputs)
        assert sum(stored) <= most, stored
    native = gradients(inputs)
    exact = gradients([x.detach().double().requires_grad_() for x in inputs])
    for a, b, c in zip(ours, native, exact, strict=True):
        if b is not None:
            assert_as_accurate(a, b, c, case)


# ------------------------------------------------------------------------------------ what it costs


@pytest.mark.parametrize(
    ("name", "most"), [("sum", 0), ("mean", 1), ("amax", 2), ("vector_norm", 1), ("norm", 2)]
)
def test_backward_launches(name: str, most: int) -> None:
    """One kernel forward; the gradient of a sum is a view, an extremum needs its number of ties."""
    x = torch.randn(3, 5, device=DEVICE, requires_grad=True)
    assert launches(lambda: REDUCTIONS[name](x, 1)) == 1
    with tritongrad.use() as session:
        out = REDUCTIONS[name](x, 1)
        out.backward(torch.ones_like(out))
    assert session.launches == 1 + most


def test_gradient_of_a_sum_is_a_view() -> None:
    x = torch.randn(3, 5, device=DEVICE, requires_grad=True)
    (dx,) = torch.autograd.grad(rerouted(torch.sum, x), x)
    assert dx.stride() == (0, 0)


def test_nothing_is_saved_for_a_sum() -> None:
    x = torch.randn(3, 5, device=DEVICE, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rerouted(lambda x: (x.sum(), x.mean(0)), x)
    assert not saved


@pytest.mark.parametrize("shape", [(0, 300_000), (300_000, 0), (2, 0, 300_000)], ids=str)
def test_no_rows_of_many_elements(shape: tuple[int, ...]) -> None:
    """Long enough that several programs would share each row, of which there are none."""
    dim = shape.index(300_000)
    for function in (torch.sum, torch.amax, torch.logsumexp, torch.linalg.vector_norm):
        x = torch.zeros(shape, device=DEVICE, requires_grad=True)
        with tritongrad.use() as session:
            found = function(x, dim=dim)
        assert session.ran, function
        assert_same(found, function(x, dim=dim))
        (gradient,) = torch.autograd.grad(found.sum(), x)
        assert gradient.shape == x.shape
