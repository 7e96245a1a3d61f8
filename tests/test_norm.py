"""Normalisation: what other libraries got wrong, how many kernels run, and running statistics."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scenarios import gradients, launches, linked
from support import DEVICE, Tolerance, assert_same
from torch import Tensor

import tritongrad
from tritongrad.nn import functional as TF
from tritongrad.runtime import INTERPRETED
from tritongrad.sampling import Random


def both(
    function: Callable[..., Any],
    *inputs: Tensor,
    what: str = "",
    tolerance: Tolerance | None = None,
) -> None:
    """Value and gradients are torch's, and nothing that computes ran on torch."""
    found = []
    for context in (tritongrad.use(), torch.enable_grad()):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        with context:
            value = function(*leaves)
        found.append((value, gradients(linked(value), leaves)))
    wide = [x.detach().double().requires_grad_() for x in inputs]

    def exact() -> Any:
        value = function(*wide)
        return value, gradients(linked(value), wide)

    assert_same(*found, what, exact=exact, tolerance=tolerance)


SHAPES = {
    "tail rows": ((3001, 6), (6,)),
    "65537 columns": ((2, 65537), (65537,)),
    "rows of nothing": ((4, 0), (0,)),
    "no rows": ((0, 4), (4,)),
    "one column": ((5, 1), (1,)),
    "two dims": ((3, 2, 5), (2, 5)),
}


@pytest.mark.parametrize("case", SHAPES)
def test_residual(case: str) -> None:
    """``norm(h) + h``, with weight and bias, each alone, and neither."""
    shape, row = SHAPES[case]
    make = Random(torch.float32, DEVICE)
    h, w, b = make(*shape), make(*row), make(*row)
    tolerance = None
    if case == "one column" and not INTERPRETED:
        # The slope is (g * w - its mean) * eps ** -0.5, and the first product is fused with the
        # subtraction: what is left of it is its rounding, of numbers below 4.
        tolerance = Tolerance(1.3e-6, 4 * 2**-24 * 1e-5**-0.5)
    both(lambda h, w, b: F.layer_norm(h, row, w, b) + h, h, w, b, what=case, tolerance=tolerance)
    if case == "65537 columns":  # at some seconds each, in the interpreter
        return
    both(lambda h, w: F.layer_norm(h, row, w) + h, h, w, what=case, tolerance=tolerance)
    both(lambda h, b: F.layer_norm(h, row, None, b) + h, h, b, what=case)
    both(lambda h: F.layer_norm(h, row) + h, h, what=case)
    both(lambda h, w: F.rms_norm(h, row, w) + h, h, w, what=case)


@pytest.mark.parametrize("columns", [40, 33000])
def test_offset(columns: int) -> None:
    """A mean far from 0 costs no more digits than it costs torch, in one pass and in blocks."""
    x = 1000 + Random(torch.float32, DEVICE)(3, columns)
    theirs, exact = F.layer_norm(x, (columns,)), F.layer_norm(x.double(), (columns,))
    with tritongrad.use():
        ours = F.layer_norm(x, (columns,))
    error = (ours.double() - exact).abs().max()
    assert error <= 4 * (theirs.double() - exact).abs().max() + 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_default_eps_of_rms_norm(dtype: torch.dtype) -> None:
    x = Random(dtype, DEVICE)(3, 5) * torch.finfo(dtype).eps ** 0.5
    with tritongrad.use() as session:
        ours = F.rms_norm(x, (5,))
    assert session.ran["rms_norm"]
    assert_same(ours, F.rms_norm(x, (5,)))


def kernels(function: Callable[..., Any], wanted: str, *inputs: Tensor) -> tuple[int, int]:
    """How many run forward, and backward for those of the inputs named by their letters."""
    leaves = [x.detach().requires_grad_(n in wanted) for n, x in zip("xwb", inputs, strict=False)]
    with tritongrad.use():
        value, forward = launches(partial(function, *leaves))
    needed = [x for x in leaves if x.requires_grad]
    _, backward = launches(partial(gradients, linked(value), needed))
    return forward, backward


@pytest.mark.parametrize(("wanted", "backward"), [("x", 1), ("w", 2), ("b", 1), ("xwb", 2)])
def test_launches(wanted: str, backward: int) -> None:
    """One kernel forward, one backward, and one more where it has sums over rows to add up."""
    make = Random(torch.float32, DEVICE)
    inputs = make(5, 8), make(8), make(8)
    function = lambda x, w, b: F.layer_norm(x, (8,), w, b)  # noqa: E731
    assert kernels(function, wanted, *inputs) == (1, backward)


def test_fused_residual_is_one_kernel() -> None:
    make = Random(torch.float32, DEVICE)
    x, r, w = make(5, 8), make(5, 8), make(8, requires_grad=False)
    found, forward = launches(lambda: TF.add_rms_norm(x, r, (8,), w))
    _, backward = launches(partial(gradients, linked(found), [x, r]))
    assert (forward, backward) == (1, 1)
    both(lambda x, r, w: TF.add_rms_norm(x, r, (8,), w)[0], x, r, w)
    both(lambda x, r, w: TF.add_rms_norm(x, r, (8,), w)[1], x, r, w)


@pytest.mark.parametrize("name", ["add_layer_norm", "add_rms_norm"])
def test_sum_has_a_gradient_where_a_summand_has(name: str) -> None:
    make = Random(torch.float32, DEVICE)
    function = getattr(TF, name)
    for wanted in itertools.product((False, True), repeat=3):
        sizes = zip([(5, 8), (5, 8), (8,)], wanted, strict=True)
        x, r, w = (make(*size, requires_grad=want) for size, want in sizes)
        y, total = function(x, r, (8,), w)
        assert (y.requires_grad, total.requires_grad) == (any(wanted), any(wanted[:2]))


CHANNELS: dict[str, Callable[..., Tensor]] = {
    "group_norm": lambda x, w, b: F.group_norm(x, 2, w, b),
    "instance_norm": lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
    "batch_norm": lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
    "evaluation": lambda x, w, b: F.batch_norm(x, x.detach()[0, :, 0], w.detach(), w, b),
}


@pytest.mark.parametrize("name", CHANNELS)
def test_channels_far_from_zero(name: str) -> None:
    """A mean of 10000 deviations costs no digit, in value and gradients, where torch's has an error
    of a thousand times the last one: ours is never the larger by more than the last two."""
    make = Random(torch.float32, DEVICE)
    inputs = [(make(4, 6, 40) + 1e4).detach(), make(6, low=0.5), make(6)]
    upstream = make(4, 6, 40).detach()

    def results(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        y = CHANNELS[name](*leaves)
        return [y, *torch.autograd.grad(y, leaves, upstream.to(dtype))]

    exact, theirs = results(torch.float64), results(torch.float32)
    with tritongrad.use() as session:
        ours = results(torch.float32)
    assert len(session.ran) == 1
    for mine, torchs, true in zip(ours, theirs, exact, strict=True):
        error, other = ((t.double() - true).abs().max() for t in (mine, torchs))
        assert error <= min(other, 1e-5) + 4e-7 * true.abs().max()


@pytest.mark.parametrize(
    ("name", "wanted", "expected"),
    [
        ("batch_norm", "xwb", (2, 3)), ("batch_norm", "b", (2, 1)), ("instance_norm", "x", (2, 3)),
        ("group_norm", "xwb", (2, 5)), ("evaluation", "x", (4, 1)),
    ],
)  # fmt: skip
def test_launches_of_channels(name: str, wanted: str, expected: tuple[int, int]) -> None:
    """Statistics, then the value; sums, their means, then the gradient. Sums of groups are those of
    several channels, so that weights have theirs added up apart."""
    make = Random(torch.float32, DEVICE)
    inputs = make(3, 4, 5), make(4, low=0.5), make(4)
    assert kernels(CHANNELS[name], wanted, *inputs) == expected


STATISTICS: dict[str, Callable[..., Tensor]] = {
    "batch_norm": lambda x, m, v: F.batch_norm(x, m, v, training=True, momentum=0.3),
    "instance_norm": lambda x, m, v: F.instance_norm(x, m, v, momentum=0.3),
    "torch.batch_norm": lambda x, m, v: torch.batch_norm(
        x, None, None, m, v, True, 0.3, 1e-5, False
    ),
}


def test_momentum_none_is_the_average_of_all_calls() -> None:
    """Of a module, which gives the op another momentum for each call."""
    x = Random(torch.float64, DEVICE)(3, 4, 3, 5)
    states = []
    for theirs, context in ((True, torch.enable_grad()), (False, tritongrad.use())):
        module = torch.nn.BatchNorm1d(3, momentum=None, device=DEVICE, dtype=torch.float64)
        with context as session:
            outputs = [module(call) for call in x]
            outputs.append(module.eval()(x[0]))
        states.append([*outputs, *module.state_dict().values()])
        assert theirs or session.ran["batch_norm"] == 4
    assert_same(states[1], states[0])
    assert_same(states[1][-3], x.mean((0, 1, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STATISTICS)
def test_running_statistics(name: str, dtype: torch.dtype) -> None:
    """Updated once for each call as torch updates them, whatever is differentiated afterwards."""
    if name == "instance_norm" and dtype is torch.bfloat16:
        pytest.skip("torch rounds the averages of instances to bfloat16 first")
    x = Random(dtype, DEVICE)(4, 3, 5)
    found = []
    for context in (tritongrad.use(), torch.enable_grad()):
        mean, var = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
        with context:
            for _ in range(2):
                y = STATISTICS[name](x, mean, var)
                (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
                first.square().sum().backward()
        x.grad = None
        found.append((mean, var))
    assert_same(*found)


def test_running_statistics_count_as_written() -> None:
    """By one launch, beside the two of the value; autograd sees that what it saved was changed."""
    x = Random(torch.float32, DEVICE)(4, 3, 5)
    mean, var = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    scale = torch.ones(3, device=DEVICE, requires_grad=True)
    product = (scale * mean).sum()
    with tritongrad.use():
        for calls in (1, 2, 3):
            _, kernels = launches(lambda: F.batch_norm(x, mean, var, training=True))
            assert kernels == 3
            assert (mean._version, var._version) == (calls, calls)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_running_statistics_in_one_place_are_torchs() -> None:
    """One number for all channels, which each of them would write."""
    x, found = Random(torch.float32, DEVICE)(4, 3, 5), []
    for context in (torch.enable_grad(), tritongrad.use()):
        mean = torch.zeros(1, device=DEVICE).expand(3)
        with context as session:
            try:
                y = F.batch_norm(x, mean, torch.ones(3, device=DEVICE), training=True)
            except RuntimeError as refusal:  # on a GPU
                found.append(str(refusal))
            else:
                found.append((y, mean))
        assert session is None or not session.ran
    theirs, ours = found
    if isinstance(theirs, str):
        assert ours.endswith(theirs)
    else:
        assert_same(ours, theirs)


def test_running_statistics_under_a_transform_are_torchs() -> None:
    x, stats = Random(torch.float64, DEVICE)(4, 3, 5), []
    for context in (tritongrad.use(), torch.enable_grad()):
        mean, var = torch.zeros(2, 3, device=DEVICE, dtype=torch.float64)

        def loss(x: Tensor, mean: Tensor = mean, var: Tensor = var) -> Tensor:
            return F.batch_norm(x, mean, var, training=True).pow(3).sum()

        with context:
            stats.append((torch.func.grad(loss)(x.detach()), mean, var))
    assert_same(*stats)


@pytest.mark.parametrize("name", ["batch_norm", "group_norm"])
def test_channels_last_is_kept(name: str) -> None:
    x = Random(torch.float64, DEVICE)(2, 4, 3, 5).contiguous(memory_format=torch.channels_last)
    call = {
        "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
        "group_norm": lambda x: F.group_norm(x, 2),
    }[name]
    both(call, x)
    with tritongrad.use():
        assert call(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1)])
def test_one_value_for_each_channel_is_refused(shape: tuple[int, ...]) -> None:
    x = Random(torch.float32, DEVICE)(*shape)
    with tritongrad.use(), pytest.raises(ValueError, match="Expected more than 1 value"):
        F.batch_norm(x, None, None, training=True)


def test_reverse_over_forward_is_that_of_the_formula() -> None:
    """torch's own is wrong; ours agrees with the composition of elementary functions."""
    x, tangent, w, b = (
        Random(torch.float64, DEVICE)(*shape) for shape in ((3, 4), (3, 4), (4,), (4,))
    )

    def composed(x: Tensor, shape: Any, w: Tensor, b: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w + b

    def slopes(norm: Callable[..., Tensor]) -> Any:
        y, slope = torch.func.jvp(lambda x: norm(x, (4,), w, b), (x,), (tangent.detach(),))
        return torch.autograd.grad((y - slope).square().sum(), (x, w, b))

    expected = slopes(composed)
    with tritongrad.use() as session:
        assert_same(slopes(F.layer_norm), expected)
    assert session.ran["layer_norm"]
