"""Dropout of elements, of channels, and the alpha dropout of both.

All are ``x * m * s``, perhaps with a number added, for a mask ``m`` that is a function of a seed
(see ``kernels/philox.py``). What is linear in x is its own derivative in every direction and order,
so that one op, ``dropout_backward``, computes them all, of the seed that the call has drawn.

torch's mask of the same seed is another, so comparisons evaluate ``reference``, which has ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..admission import admit, launchable, settle, transforming
from ..dispatch import apply, bypass
from ..dtypes import FLOATING
from ..launchers import philox
from ..launchers.dropout import dropout as launch
from ..launchers.dropout import in_memory
from ..layout import Strides, batch_first, row_major
from ..op import BackwardParams, Bind, Needs, Op, Tensors, Unsupported, register
from ..reroute import UNCHANGED
from ..sampling import Make, Sample

F = torch.nn.functional

ALPHA = 1.7580993408473766
"""SELU's scale times its alpha: minus this is what its saturated units are (Klambauer et al.)."""


class Params(NamedTuple):
    """What a call is beside its tensor and its seed, which is None where nothing is kept.

    Attributes:
        numbering: strides by which elements are numbered; those of one number share their fate.
        limit: see ``launchers.philox.limit``.
        constants: the factor of what is kept, then what is added to what is kept and what is not.
    """

    numbering: Strides
    limit: int
    constants: tuple[float, ...]


# ---------------------------------------------------------------------- reading torch's signatures


@lru_cache(maxsize=1024)
def _numbers(p: float, alpha: bool) -> tuple[int, tuple[float, ...]]:
    """``limit`` and ``constants``."""
    if p == 1:
        return 0, (0.0,)
    if not alpha:
        return philox.limit(p), (1 / (1 - p),)
    scale = 1 / math.sqrt((ALPHA * ALPHA * p + 1) * (1 - p))
    return philox.limit(p), (scale, ALPHA * scale * p, ALPHA * scale * (p - 1))


def _read(
    input: Tensor,
    p: Any,
    training: Any,
    inplace: Any = False,
    *,
    alpha: bool = False,
    channels: Mapping[int, int] | None = None,
) -> tuple[Tensors, Params]:
    """A call. ``channels``: rank -> how many dimensions, from the first on, number what is dropped
    together. None: all, whatever the rank."""
    admit(input)
    if input.dtype not in FLOATING:
        raise Unsupported(f"dtype {str(input.dtype).removeprefix('torch.')}")
    if type(p) not in (float, int) or not 0 <= p <= 1:
        raise Unsupported(f"p={p!r}")
    if type(training) is not bool or type(inplace) is not bool:
        raise Unsupported("training and inplace are not bools")
    if inplace:
        raise Unsupported("in-place")
    shape = input.shape
    if channels is not None and len(shape) not in channels:
        raise Unsupported("a rank that torch refuses or warns of")
    if p == 0 or not training or not shape.numel():
        raise Unsupported(UNCHANGED)
    if channels is not None:
        count = channels[len(shape)]
        index = row_major(shape[:count]) + (0,) * (len(shape) - count)
    else:
        # What a transform has wrapped shows a sample's strides, not those that it has in memory.
        index = row_major(shape) if transforming() else in_memory(shape, input.stride())
    params = Params(index, *_numbers(p, alpha))
    # A seed is none of the arguments: `recall` sees that, and reads each call.
    return (input, None if p == 1 else philox.draw_seed(input.device)), params


CHANNELS = dict.fromkeys(range(2, 65), 2)
"""(N, C, ...), of any rank; without a batch (C, ...), where torch lets it be left out."""
CHANNELS_1D, CHANNELS_2D, CHANNELS_3D = {2: 1, 3: 2}, {4: 2}, {4: 1, 5: 2}


def _functional(training: bool = True, **kind: Any) -> Bind:
    """The signature that torch.nn.functional's have in common."""

    def bind(
        input: Tensor, p: float = 0.5, training: bool = training, inplace: bool = False
    ) -> tuple[Tensors, Params]:
        return _read(input, p, training, inplace, **kind)

    return bind


def _native(**kind: Any) -> Bind:
    """That of torch's own."""

    def bind(input: Tensor, p: float, train: bool) -> tuple[Tensors, Params]:
        return _read(input, p, train, **kind)

    return bind


# ------------------------------------------------------------------------------- torch mathematics


def _mask(params: Params, like: Tensor, seed: Tensor | None) -> Tensor:
    """Which elements of a tensor like this are kept."""
    if seed is None:
        return torch.zeros(like.shape, dtype=torch.bool, device=like.device)
    with bypass():
        index: Tensor = torch.zeros((), dtype=torch.int64, device=like.device)
        for size, step in zip(like.shape, params.numbering, strict=True):
            index = index.unsqueeze(-1) + step * torch.arange(size, device=like.device)
        return philox.keep(seed, index, params.limit)


def _reference(params: Params, x: Tensor, seed: Tensor | None) -> tuple[Tensor]:
    factor, *added = params.constants
    mask = _mask(params, x, seed)
    y = x * (mask.to(x.dtype) * factor)
    if added:
        # Of two Python numbers, where would make float32.
        kept, dropped = [x.new_full((), number) for number in added]
        y = y + torch.where(mask, kept, dropped)
    return (y,)


# ------------------------------------------------------------------------------------------- rules


def _linear(params: Params) -> Params:
    """Without what is added."""
    return params._replace(constants=params.constants[:1])


def _derivative(params: Params, g: Tensor | None, seed: Tensor | None) -> Tensor:
    """What becomes of a gradient, or of a tangent."""
    assert g is not None
    g = settle(g)
    if not launchable((g, seed)):  # what only torch can see (tracers)
        return _reference(_linear(params), g, seed)[0]
    return apply(backward, BackwardParams(params, (True,), ()), (g, None, seed, None))


def _backward_rule(
    bp: BackwardParams, needs: Needs, specs: tuple, grads: Tensors, saved: Tensors
) -> Tensors:
    return _derivative(bp.params, grads[0], saved[2]), None, None, None


def _batched(info: Any, params: Params, x: Tensor, dim: Any, seed: Any, seed_dim: Any) -> Any:
    """A batch is a dimension along which elements have equal numbers; their seeds may differ."""
    rank = len(params.numbering)
    x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
    if seed is not None:
        seed = batch_first(seed, seed_dim, rank)
    return params._replace(numbering=(0, *params.numbering)), x, seed


def _backward_vmap(info: Any, bp: BackwardParams, tensors: Tensors, dims: tuple) -> Any:
    g, _, seed, _ = tensors
    assert g is not None
    params, g, seed = _batched(info, bp.params, g, dims[0], seed, dims[2])
    return apply(backward, bp._replace(params=params), (g, None, seed, None)), 0


KERNELS = ("dropout_dense", "dropout_strided")

backward = Op(
    name="dropout_backward",
    bind=None,
    forward=lambda bp, g, x, seed, y: launch(g, seed, *_linear(bp.params)),
    saves=lambda bp, needs: (2,),
    specs=lambda bp: (),
    rule=_backward_rule,
    jvp=lambda bp, tensors, outputs, tangents: _derivative(bp.params, tangents[0], tensors[2]),
    vmap=_backward_vmap,
    kernels=KERNELS,
    formula="dg = g * m * s",
    dtypes=FLOATING,
)


# ----------------------------------------------------------------------------------- made into ops


def _make(
    name: str,
    bind: Bind,
    function: Callable[..., Tensor],
    variants: dict[Callable[..., Any], Bind],
    samples: Callable[[Make], Iterator[Sample]],
    opinfo: tuple[str, ...],
    formula: str,
) -> None:
    def vmap(info: Any, params: Params, tensors: Tensors, dims: tuple) -> Any:
        x, seed = tensors
        assert x is not None
        params, x, seed = _batched(info, params, x, dims[0], seed, dims[1])
        return apply(op, params, (x, seed)), 0

    op = Op(
        name=name,
        bind=bind,
        forward=lambda params, x, seed: launch(x, seed, *params),
        replaces=(function,),
        variants=variants,
        random=True,
        saves=lambda params, needs: (1,),
        specs=lambda params: (),
        rule=_rule,
        backward=backward,
        reference=_reference,
        jvp=lambda params, tensors, outputs, tangents: _derivative(params, tangents[0], tensors[1]),
        vmap=vmap,
        opinfo=opinfo,
        kernels=KERNELS,
        formula=formula,
        dtypes=FLOATING,
        cost=_cost,
        samples=samples,
        differs="Draws other numbers than torch does for the same seed.",
        sources="torch aten/src/ATen/native/Dropout.cpp; Philox4x32: Salmon et al., SC 2011",
    )
    register(op)


def _rule(params: Params, needs: Needs, specs: tuple, grads: Tensors, saved: Tensors) -> Tensors:
    return _derivative(params, grads[0], saved[1]), None


def _cost(params: Params, x: Tensor, seed: Tensor | None) -> tuple[int, int]:
    return 2 * x.numel() * x.element_size(), x.numel()


def _element_samples(make: Make, **options: Any) -> Iterator[Sample]:
    # The first needs no random numbers: a compiler, which torch's function is left to, has others.
    yield Sample((make(3, 4), 1.0), options, "nothing kept")
    yield Sample((make(4, 5), 0.3), options, "dense")
    yield Sample((make(5, 4).t(), 0.5), options, "transposed")
    yield Sample((make(4, 9)[:, ::2], 0.5), options, "every other column")
    yield Sample((make(3, 1).expand(-1, 4), 0.25), options, "expanded")
    yield Sample((make(), 0.5), options, "0-dim")
    yield Sample((make(3, 1029), 0.4), options, "several programs")


def _channel_samples(make: Make, **options: Any) -> Iterator[Sample]:
    yield Sample((make(2, 3, 2, 1), 1.0), options, "nothing kept")
    yield Sample((make(2, 3, 1, 3), 0.5), options, "channels")
    yield Sample((make(3, 1, 2, 4).movedim(-1, 1), 0.4), options, "channels last")
    yield Sample((make(3, 5, 7, 31), 0.4), options, "several programs")


# ------------------------------------------------------------------------------------------- TABLE

_make(
    "dropout", _functional(), F.dropout, {torch.dropout: _native()},
    _element_samples, ("nn.functional.dropout",),
    formula="dx = g * m / (1 - p)",
)  # fmt: skip
_make(
    "dropout2d", _functional(channels=CHANNELS_2D), F.dropout2d,
    {
        F.dropout1d: _functional(channels=CHANNELS_1D),
        F.dropout3d: _functional(channels=CHANNELS_3D),
        torch.feature_dropout: _native(channels=CHANNELS),
    },
    _channel_samples, ("nn.functional.dropout2d", "nn.functional.dropout3d"),
    formula="dx = g * m / (1 - p), m of channels",
)  # fmt: skip
_make(
    "alpha_dropout", _functional(False, alpha=True), F.alpha_dropout,
    {torch.alpha_dropout: _native(alpha=True)},
    partial(_element_samples, training=True), ("nn.functional.alpha_dropout",),
    formula="dx = g * m * s",
)  # fmt: skip
_make(
    "feature_alpha_dropout",
    _functional(False, alpha=True, channels=CHANNELS), F.feature_alpha_dropout,
    {torch.feature_alpha_dropout: _native(alpha=True, channels=CHANNELS)},
    partial(_channel_samples, training=True), ("nn.functional.feature_alpha_dropout.with_train",),
    formula="dx = g * m * s, m of channels",
)  # fmt: skip
