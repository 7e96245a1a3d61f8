"""Functions that are a softmax of something: ``softmin`` and ``gumbel_softmax``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import is_number
from ..op import OPS, Tensors, Unsupported
from ..sampling import Make, Sample
from .composite import POINTWISE, composite
from .softmax import KERNELS

F = torch.nn.functional


def _read_softmax(input: Tensor, dim: Any, dtype: torch.dtype | None) -> None:
    """Refuse what softmax does not take, before anything runs."""
    softmax = OPS["softmax"].bind
    assert softmax is not None
    softmax(input, dim, dtype)


# -------------------------------------------------------------------------------------- softmin


class _Softmin(NamedTuple):
    dim: int
    dtype: torch.dtype | None


def _bind_softmin(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> tuple[Tensors, _Softmin]:
    _read_softmax(input, dim, dtype)
    if input.dtype is torch.bool or type(_stacklevel) is not int:
        raise Unsupported("a bool, which has no negative, or a _stacklevel of another type")
    assert dim is not None
    return (input,), _Softmin(dim, dtype)


def _softmin(params: _Softmin, x: Tensor) -> Tensor:
    return torch.softmax(-x, params.dim, params.dtype)


def _softmin_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 5), 1), {}, "rows")
    yield Sample((make(2, 3, 4), -2), {}, "inner dim")
    yield Sample((make(7, 6).t(), 1), {}, "transposed")
    yield Sample((make(2, 0), 1), {}, "rows of nothing")


# ------------------------------------------------------------------------------- gumbel_softmax


class _Gumbel(NamedTuple):
    tau: float
    hard: bool
    dim: int


def _bind_gumbel(
    logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
) -> tuple[Tensors, _Gumbel]:
    _read_softmax(logits, dim, None)
    if not is_number(tau) or type(hard) is not bool or eps != 1e-10:
        raise Unsupported(f"tau={tau!r}, hard={hard!r}, eps={eps!r}")
    # As torch draws it, so that manual_seed gives torch's own numbers.
    fresh = torch.empty_like(logits, memory_format=torch.legacy_contiguous_format)
    return (logits, -fresh.detach().exponential_().log()), _Gumbel(tau, hard, dim)


def _gumbel(params: _Gumbel, logits: Tensor, noise: Tensor) -> Tensor:
    soft = torch.softmax((logits + noise) / params.tau, params.dim)
    if not params.hard or not soft.numel():
        return soft
    # Straight through: the numbers of the one, the derivative of the other.
    index = soft.argmax(params.dim, keepdim=True)
    dim = params.dim % max(soft.dim(), 1)
    places = torch.arange(soft.shape[dim] if soft.dim() else 1, device=soft.device)
    places = places.view(-1, *[1] * (soft.dim() - dim - 1)) if soft.dim() else places.view(())
    return (index == places).to(soft.dtype) - soft.detach() + soft


def _gumbel_samples(make: Make) -> Iterator[Sample]:
    # A compiler, which torch's function is left to, has other numbers: here they have no part.
    yield Sample((make(3, 5),), {"tau": float("inf")}, "no matter which numbers")
    yield Sample((make(3, 5),), {"tau": 0.7}, "soft")
    # Not a hard one: its derivative is, on purpose, not that of its numbers.
    yield Sample((make(4, 3).t(),), {"dim": 0}, "transposed")


composite(
    "softmin", F.softmin,
    bind=_bind_softmin, value=_softmin, kernels=KERNELS,
    formula="dx = out * (sum(g * out) - g)", samples=_softmin_samples,
    opinfo=("nn.functional.softmin", "nn.functional.softmin.with_dtype"),
)  # fmt: skip
composite(
    "gumbel_softmax", F.gumbel_softmax,
    bind=_bind_gumbel, value=_gumbel, kernels=KERNELS + POINTWISE,
    formula="that of softmax((logits + noise) / tau)", samples=_gumbel_samples,
    opinfo=(), random=True,
)  # fmt: skip
