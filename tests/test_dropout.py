"""What is particular to random ops (HAZARDS 19), and to the mask of a dropout.

Derivatives, transforms and layouts are covered by the suites that walk OPS, in which every call
draws the same numbers. Here calls draw as a user's do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from scenarios import launches
from support import DEVICE, assert_same
from torch import Tensor
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import tritongrad
from tritongrad.kernels import philox as k
from tritongrad.launchers import philox
from tritongrad.layout import row_major
from tritongrad.ops import dropout
from tritongrad.reroute import UNCHANGED
from tritongrad.runtime import launch

P = 0.4
ELEMENTS: dict[str, Callable[..., Tensor]] = {
    "dropout": lambda x, p=P: F.dropout(x, p),
    "torch.dropout": lambda x, p=P: torch.dropout(x, p, True),
    "alpha_dropout": lambda x, p=P: F.alpha_dropout(x, p, True),
    "torch.alpha_dropout": lambda x, p=P: torch.alpha_dropout(x, p, True),
}
CHANNELS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "dropout1d": (lambda x, p=P: F.dropout1d(x, p), 3),
    "dropout1d without a batch": (lambda x, p=P: F.dropout1d(x, p), 2),
    "dropout2d": (lambda x, p=P: F.dropout2d(x, p), 4),
    "dropout3d": (lambda x, p=P: F.dropout3d(x, p), 5),
    "dropout3d without a batch": (lambda x, p=P: F.dropout3d(x, p), 4),
    "feature_dropout": (lambda x, p=P: torch.feature_dropout(x, p, True), 3),
    "feature_alpha_dropout": (lambda x, p=P: F.feature_alpha_dropout(x, p, True), 4),
    "torch.feature_alpha_dropout": (lambda x, p=P: torch.feature_alpha_dropout(x, p, True), 2),
}
EVERY = {name: (f, 2) for name, f in ELEMENTS.items()} | CHANNELS


def shape_of(rank: int) -> tuple[int, ...]:
    return (7, 9, 3, 2, 2)[:rank]


def rerouted(f: Callable[..., Any], *args: Any) -> Any:
    """``f`` on our kernels; fails if any of it ran on torch."""
    with tritongrad.use() as session:
        result = f(*args)
    assert session.launches
    assert not session.fell_back, session
    return result


def noise(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """Of absolute value 1 at least: what is 0 was dropped."""
    x = torch.randn(shape, dtype=torch.float64, device=DEVICE)
    return (x + x.sign()).to(dtype).requires_grad_()


# -------------------------------------------------------------------------------- random numbers


@triton.jit
def write(out_ptr, seed_ptr, counter_ptr, n, limit, KEEP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    seed, counter = tl.load(seed_ptr), tl.load(counter_ptr + i, mask=i < n)
    if KEEP:
        tl.store(out_ptr + i, k.keep(seed, counter, limit), mask=i < n)
    else:
        drawn = k.words(seed, counter)
        for j in tl.static_range(4):
            tl.store(out_ptr + j * n + i, drawn[j].to(tl.int64), mask=i < n)


def test_philox_is_the_published_one() -> None:
    """The answer that Random123 tests itself with, for seven rounds, key and counter zero."""
    zero = torch.zeros(1, dtype=torch.int64)
    words = [int(w) for w in philox.words(zero, zero)]
    assert words == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_kernels_and_torch_mathematics_draw_the_same(dtype: torch.dtype) -> None:
    """Counters beyond 32 bits too."""
    counter = torch.tensor([0, 1, 511, 512, 2047, 2048, 2**31 - 1], device=DEVICE, dtype=dtype)
    if dtype is torch.int64:
        counter = torch.cat([counter, counter + 2**32, counter + 2**40])
    n = counter.numel()
    limit = philox.limit(0.5)
    for seed in (0, 1, -1, 2**62 + 5, -(2**63)):
        key = torch.tensor(seed, device=DEVICE)
        words = torch.empty(4, n, dtype=torch.int64, device=DEVICE)
        launch(write, (1,), (words, key, counter, n, 0), key, KEEP=False, BLOCK=32)
        assert torch.equal(words, torch.stack(philox.words(key, counter.long())))
        mask = torch.empty(n, dtype=torch.bool, device=DEVICE)
        launch(write, (1,), (mask, key, counter, n, limit), key, KEEP=True, BLOCK=32)
        assert torch.equal(mask, philox.keep(key, counter.long(), limit))


@pytest.mark.parametrize("p", [1e-12, 0.1, 0.25, 0.5, 0.9, 1 - 1e-12])
def test_limit(p: float) -> None:
    """As many of the numbers as are kept, of those that there are."""
    count = philox.limit(p) + 2**31 + 1
    assert 1 <= count <= 2**32
    assert abs(count / 2**32 - (1 - p)) <= 2**-32


@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
def test_keep_rate(p: float) -> None:
    """Within five standard deviations: of all elements, of each quarter of a block (whose numbers
    are other words of the same counters), and of neighbours that are both kept."""
    n = 40_960
    kept = rerouted(F.dropout, noise((n,)), p).ne(0).double()

    def within(found: Tensor, rate: float) -> bool:
        deviation = math.sqrt(rate * (1 - rate) / found.numel())
        return abs(found.mean().item() - rate) < 5 * deviation

    assert within(kept, 1 - p)
    for quarter in kept.view(-1, 4, 512).unbind(1):
        assert within(quarter, 1 - p)
    for distance in (1, 512, 2048):
        pairs = kept[distance:] * kept[:-distance]
        assert within(pairs[:: 2 * distance + 1], (1 - p) ** 2)


def test_mean_and_variance() -> None:
    """Dropout keeps the mean; alpha dropout of a standard normal both."""
    x = torch.ones(40_960, dtype=torch.float64, device=DEVICE)
    assert abs(rerouted(F.dropout, x, 0.3).mean() - 1) < 5 * math.sqrt(0.3 / 0.7 / x.numel())
    y = rerouted(ELEMENTS["alpha_dropout"], torch.randn_like(x), 0.3)
    assert abs(y.mean()) < 0.03
    assert abs(y.var() - 1) < 0.05


# --------------------------------------------------------------------------------- torch's seed


@pytest.mark.parametrize("name", EVERY)
def test_seed(name: str) -> None:
    """manual_seed reproduces; calls differ, also recalled ones; the generator is torch's own."""
    f, rank = EVERY[name]
    x = noise((16, 16, 2, 2, 1)[:rank])
    torch.manual_seed(3)
    first, second, after = rerouted(f, x), rerouted(f, x), torch.rand(1)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    again, state = rerouted(f, x), torch.get_rng_state()
    assert torch.equal(first, again)
    torch.set_rng_state(state)
    assert torch.equal(second, rerouted(f, x))
    assert torch.equal(after, torch.rand(1)) or DEVICE.type == "cuda"


@pytest.mark.parametrize("name", EVERY)
def test_one_mask_for_every_derivative(name: str) -> None:
    """Recovered from the value: gradient, its gradient, and tangent are the same multiple of what
    they are given. The seed is all that is kept."""
    f, rank = EVERY[name]
    x, g = noise(shape_of(rank)), noise(shape_of(rank))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = rerouted(f, x)
    assert [(t.numel(), t.dtype) for t in kept] == [(1, torch.int64)]
    (dx,) = torch.autograd.grad(y, x, g, create_graph=True)
    factor = (dx / g).detach()
    scale = factor.max()
    assert torch.allclose(factor, torch.where(factor > 0, scale, 0.0))
    added = (y - x * factor).detach()
    for part in (factor > 0, factor == 0):
        assert torch.allclose(added[part], added[part][0])
    assert ("alpha" in name) == bool((added.abs() > 0.1).any())
    (dg,) = torch.autograd.grad(dx, g, x)
    assert_same(dg, (x * factor).detach(), name)
    torch.manual_seed(11)
    y = rerouted(f, x)
    torch.manual_seed(11)
    value, tangent = torch.func.jvp(partial(rerouted, f), (x.detach(),), (torch.ones_like(x),))
    assert_same(value, y.detach(), name)
    assert_same(tangent, torch.autograd.grad(y.sum(), x)[0], name)


@pytest.mark.parametrize("name", CHANNELS)
def test_channels_are_dropped_whole(name: str) -> None:
    f, rank = CHANNELS[name]
    x = noise(shape_of(rank))
    (factor,) = torch.autograd.grad(rerouted(f, x).sum(), x)
    count = 1 if "without" in name else 2
    channels = factor.flatten(count) if rank > count else factor.unsqueeze(-1)
    assert torch.equal(channels, channels[..., :1].expand_as(channels))
    # As torch: neither all of a sample, nor a channel of all samples.
    assert channels[..., 0].unique().numel() == 2
    if count == 2:
        assert not torch.equal(channels[0, :, 0], channels[1, :, 0])
        assert not torch.equal(channels[:, 0, 0], channels[:, 1, 0])


@pytest.mark.parametrize("name", ["dropout2d", "dropout3d", "feature_alpha_dropout"])
def test_layouts_of_channels(name: str) -> None:
    """The mask is that of the shape, whatever the strides of input and gradient."""
    f, rank = CHANNELS[name]
    contiguous = noise(shape_of(rank)).detach()
    results = []
    for order in [(*range(rank),), (*range(rank)[::-1],), (0, *range(2, rank), 1)]:
        back = [order.index(d) for d in range(rank)]
        x = contiguous.permute(order).contiguous().permute(back).requires_grad_()
        torch.manual_seed(5)
        y = rerouted(f, x)
        assert y.stride() == x.stride()
        torch.manual_seed(6)
        g = torch.randn(contiguous.shape[:-1], dtype=torch.float64, device=DEVICE)
        results.append((y, *torch.autograd.grad(y, x, g.unsqueeze(-1).expand_as(y))))
    for other in results[1:]:
        assert_same(other, results[0], name)


# ------------------------------------------------------------------------------ nothing is random


@pytest.mark.parametrize("name", EVERY)
def test_nothing_kept_is_torchs_to_the_bit(name: str) -> None:
    """A product with zero: NaN of what is not finite; and no number is drawn."""
    f, rank = EVERY[name]
    x = noise(shape_of(rank)).detach()
    x.view(-1)[:4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    state = torch.get_rng_state()
    x.requires_grad_()
    ours, native = rerouted(f, x, 1.0), f(x, 1.0)
    assert torch.equal(ours.view(torch.int64), native.view(torch.int64))
    found, expected = (torch.autograd.grad(y, x, x.detach())[0] for y in (ours, native))
    assert torch.equal(found.view(torch.int64), expected.view(torch.int64))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "f",
    [
        partial(F.dropout, p=0),
        partial(F.dropout, training=False),
        partial(F.dropout2d, p=0.0),
        F.alpha_dropout,
        F.feature_alpha_dropout,
    ],
)
def test_nothing_dropped_is_the_input_itself(f: Callable[..., Tensor]) -> None:
    for x in (noise((2, 3, 4, 5)), noise((2, 3, 0, 5))):
        with tritongrad.use() as session:
            assert f(x) is x
        assert {reason for _, reason in session.fell_back} == {UNCHANGED}
    with tritongrad.use():
        empty = noise((2, 3, 0, 5))
        assert F.dropout2d(empty) is empty


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan, "half", None])
def test_p_is_refused_as_by_torch(p: Any) -> None:
    x = noise((3, 4))
    for f in (F.dropout, F.alpha_dropout, partial(torch.dropout, train=True)):
        with pytest.raises(Exception) as native:  # noqa: PT011  (whatever torch raises)
            f(x, p=p)
        with tritongrad.use() as session, pytest.raises(native.type) as ours:
            f(x, p=p)
        assert str(native.value).splitlines()[0] in str(ours.value)
        assert not session.ran


def test_in_place_is_torchs() -> None:
    x = noise((3, 4)).detach()
    with tritongrad.use() as session:
        assert F.dropout(x, 0.5, inplace=True) is x
    assert {reason for _, reason in session.fell_back} == {"in-place"}


def test_modules() -> None:
    modules = (
        torch.nn.Dropout(), torch.nn.Dropout1d(), torch.nn.Dropout2d(), torch.nn.Dropout3d(),
        torch.nn.AlphaDropout(), torch.nn.FeatureAlphaDropout(),
    )  # fmt: skip
    for module, rank in zip(modules, (2, 3, 4, 5, 2, 4), strict=True):
        x = noise(shape_of(rank))
        assert not torch.equal(rerouted(module, x), x)
        with tritongrad.use():
            assert module.eval()(x) is x


# ----------------------------------------------------------------- checkpoints, transforms, tracers


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpoint_computes_the_same_mask_again(reentrant: bool) -> None:
    x = noise((6, 50))

    def block(x: Tensor) -> Tensor:
        return F.dropout(F.alpha_dropout(x.tanh(), 0.3, True) * x, 0.5)

    def step(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(8)
        y = run(x)
        torch.rand(7)  # the generator has gone on when the block is computed again
        return [y, *torch.autograd.grad(y.sin().sum(), x)]

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=reentrant)

    with tritongrad.use():
        expected = step(block)
        if reentrant:
            torch.manual_seed(8)
            y = checkpointed(x)
            torch.rand(7)
            y.sin().sum().backward()
            found = [y, x.grad]
        else:
            found = step(checkpointed)
    assert_same(found, expected)


@pytest.mark.parametrize("dim", [0, None])
@pytest.mark.parametrize("name", ["dropout", "alpha_dropout", "dropout2d"])
def test_randomness_of_vmap(name: str, dim: int | None) -> None:
    """An error unless told how, as in torch; all samples alike; or each with a mask of its own."""
    f, rank = EVERY[name]
    shape = (4, 8, 2, 2)[:rank]
    x = noise(shape).detach().expand(3, *shape)

    def sample(x: Tensor) -> Tensor:
        return f(x if dim == 0 else noise(shape).detach() * 0 + 1)

    with pytest.raises(RuntimeError) as native:
        vmap(sample)(x)
    with pytest.raises(RuntimeError) as ours, tritongrad.use():
        vmap(sample)(x)
    assert str(native.value) in str(ours.value)
    with tritongrad.use():
        alike = vmap(f, randomness="same")(x)
        own = vmap(f, randomness="different")(x)
        unbatched = vmap(lambda _: f(x[0]), randomness="different")(torch.zeros(3))
    assert torch.equal(alike, alike[:1].expand_as(alike))
    for found in (own, unbatched):
        for a, b in itertools.combinations(found, 2):
            assert not torch.equal(a, b)
    # p = 1 draws nothing, which is no error.
    with tritongrad.use():
        assert not vmap(lambda x: F.dropout(x, 1.0))(x).any()


def test_gradients_per_sample_under_vmap() -> None:
    """Nested, of either kind: each sample's gradient has its own mask."""
    x = noise((2, 3, 40)).detach()
    for outer, inner in itertools.product(("same", "different"), repeat=2):
        with tritongrad.use():
            per_sample = vmap(grad(lambda x: F.dropout(x).sum()), randomness=inner)
            slopes = vmap(per_sample, randomness=outer)(x)
        assert torch.equal(slopes[0, 0], slopes[0, 1]) == (inner == "same")
        assert torch.equal(slopes[0, 0], slopes[1, 0]) == (outer == "same")
        assert set(slopes.unique().tolist()) == {0.0, 2.0}


def test_what_a_tracer_sees_has_the_same_mask() -> None:
    """Where operators of torch's must stand for the kernel: a gradient that is traced."""
    x, g = noise((5, 7)), noise((5, 7)).detach()
    y = rerouted(F.dropout, x)
    expected = torch.autograd.grad(y, x, g, retain_graph=True)[0]
    traced = make_fx(lambda g: torch.autograd.grad(y, x, g, retain_graph=True)[0])(g)
    assert_same(traced(g), expected)


@pytest.mark.parametrize("shape", [(3, 5), (2049,), ()], ids=str)
def test_one_kernel_each_way(shape: tuple[int, ...]) -> None:
    x = noise(shape)
    y, forward = launches(lambda: rerouted(F.dropout, x))
    _, back = launches(lambda: torch.autograd.grad(y, x, torch.ones_like(y)))
    assert (forward, back) == (1, 1)


def test_half_precision_rounds_once() -> None:
    """torch's CPU rounds 1 / (1 - p) to the half type before it multiplies."""
    for dtype in (torch.float16, torch.bfloat16):
        x = noise((300,), dtype).detach()
        y = rerouted(F.dropout, x, 0.3)
        expected = torch.where(y != 0, x.double() * (1 / 0.7), 0.0).to(dtype)
        assert (y.double() - expected.double()).abs().max() <= torch.finfo(dtype).eps * 4


def test_numbers_beyond_32_bits() -> None:
    """A channel's number that 32 bits do not hold is drawn from a counter of 64."""
    x = noise((3, 5)).detach()
    seed = torch.tensor(9, device=DEVICE)
    for numbering in ((2**33, 1), (2**31, 2**20)):
        params = dropout.Params(numbering, philox.limit(0.5), (2.0,))
        (expected,) = dropout._reference(params, x, seed)
        assert_same(dropout.launch(x, seed, *params), expected)
    assert row_major(x.shape) == x.stride()


@pytest.mark.gpu
def test_graph_capture() -> None:
    """Every replay has a new mask, the same one forward and backward."""
    x = noise((64, 64), torch.float32).cuda()
    with tritongrad.use():
        F.dropout(x).sum().backward()  # compiled outside of the capture
        x.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = F.dropout(x)
            (slope,) = torch.autograd.grad(y.sum(), x)
    seen = []
    for _ in range(3):
        graph.replay()
        assert torch.equal(slope != 0, y != 0)
        seen.append(slope.clone())
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
