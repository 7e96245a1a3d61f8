"""What other Triton libraries get wrong, one row each: the same program on our ops and on torch.

Each was an error, or a wrong number in silence, in a released library. A row is a function of
nothing; what it returns must be torch's, and none of its arithmetic may have run on torch. Rows of
cross_entropy are in test_classification.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import DEVICE, assert_same
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tritongrad
from tritongrad.reroute import HARMLESS

ROWS: dict[str, Callable[[], Any]] = {}


def row(about: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Enter a function in the table."""

    def enter(function: Callable[[], Any]) -> Callable[[], Any]:
        ROWS[about] = function
        return function

    return enter


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device=DEVICE).requires_grad_()


def classes(count: int, *shape: int) -> Tensor:
    return torch.randint(count, shape, device=DEVICE)


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [loss, *torch.autograd.grad(loss, inputs)]


NORMS: dict[str, Callable[..., Tensor]] = {
    "layer_norm": lambda x, w: F.layer_norm(x, x.shape[-1:], w, w * 0.5),
    "rms_norm": lambda x, w: F.rms_norm(x, x.shape[-1:], w),
}


def _norm_rows() -> None:
    for name, norm in NORMS.items():

        @row(f"{name}(h) + h: the residual's gradient is not written over")
        def _(norm: Callable[..., Tensor] = norm) -> Any:
            x, w = leaf(5, 7), leaf(7)
            h = x * 2
            return gradients((norm(h, w) + h).square().sum(), x, w)

        @row(f"{name} of 3001 rows: the last tile")
        def _(norm: Callable[..., Tensor] = norm) -> Any:
            x, w = leaf(3001, 3), leaf(3)
            return gradients(norm(x, w).square().sum(), x, w)

        @row(f"{name} of 65537 columns")
        def _(norm: Callable[..., Tensor] = norm) -> Any:
            x, w = leaf(2, 65537), leaf(65537)
            return gradients(norm(x, w).pow(3).sum(), x, w)

        @row(f"{name} of (4, 0)")
        def _(norm: Callable[..., Tensor] = norm) -> Any:
            x, w = leaf(4, 0), leaf(0)
            return gradients(norm(x, w).sum(), x, w)

        @row(f"{name}: the weight's gradient alone")
        def _(norm: Callable[..., Tensor] = norm) -> Any:
            x, w = leaf(5, 7), leaf(7)
            return gradients(norm(x.detach(), w).square().sum(), w)


_norm_rows()


@row("softmax of 65537 columns, from an expanded gradient")
def _() -> Any:
    x = leaf(2, 65537)
    return gradients(x.softmax(-1).square().sum(), x)


@row("(4, 1) times (1, 16): broadcast, not read past the end")
def _() -> Any:
    x, y = leaf(4, 1), leaf(1, 16)
    return gradients((F.silu(x) * y).square().sum(), x, y)


@row("linear: gradients of input, weight and bias, each alone")
def _() -> Any:
    x, w, b = leaf(3, 5), leaf(4, 5), leaf(4)
    found = []
    for i in range(3):
        inputs = [t if i == j else t.detach() for j, t in enumerate((x, w, b))]
        found += gradients(F.linear(*inputs).square().sum(), inputs[i])
    return found


@row("gradient penalty through norm, attention and loss")
def _() -> Any:
    x, w, target = leaf(2, 6, 8), leaf(8), classes(8, 2, 6)
    h = F.layer_norm(x, (8,), w)
    h = F.scaled_dot_product_attention(h, h, h, is_causal=True)
    loss = F.cross_entropy(F.silu(h).flatten(0, 1), target.flatten())
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    return gradients(loss + g.square().sum(), x, w)


@pytest.mark.parametrize("about", ROWS)
def test_as_on_torch(about: str) -> None:
    torch.manual_seed(1)
    expected = ROWS[about]()
    torch.manual_seed(1)
    with tritongrad.use() as session:
        found = ROWS[about]()
    assert_same(found, expected, about)
    assert {what: n for what, n in session.fell_back.items() if what[1] not in HARMLESS} == {}


def half_lowered() -> Tensor:
    with torch.autocast(DEVICE.type, torch.bfloat16):
        return F.linear_cross_entropy(leaf(3, 2).float(), leaf(4, 2), classes(4, 3))


REFUSED: dict[str, Callable[[], Any]] = {
    "a norm's weight too short": lambda: F.layer_norm(leaf(2, 3), (3,), leaf(2)),
    "an index past the embedding": lambda: F.embedding(
        torch.tensor([4], device=DEVICE), leaf(4, 3)
    ),
    "heads of other widths": lambda: F.scaled_dot_product_attention(
        leaf(1, 2, 3, 4), leaf(1, 2, 3, 5), leaf(1, 2, 3, 5)
    ),
    "softshrink by more than its dtype has": lambda: F.softshrink(leaf(3).half(), 1e5),
    "float64 logits of what autocast lowers": half_lowered,
}


@pytest.mark.parametrize("about", REFUSED)
def test_refused_as_by_torch(about: str) -> None:
    with pytest.raises(Exception) as theirs:  # noqa: PT011  (whatever torch raises)
        REFUSED[about]()
    with tritongrad.use(), pytest.raises(theirs.type):
        REFUSED[about]()


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_dropout_under_checkpoint(reentrant: bool) -> None:
    """The mask of the recomputation is that of the first pass: the gradient is mask / (1 - p)."""
    x = leaf(4, 50)
    with tritongrad.use() as session:
        y = checkpoint(partial(F.dropout, p=0.4), x, use_reentrant=reentrant)
        (y * y).sum().backward()
    assert session.ran["dropout"] >= 2
    kept = y != 0
    assert 0.3 < kept.double().mean() < 0.9
    assert_same(x.grad, torch.where(kept, 2 * y / (1 - 0.4), 0.0))
