"""Launching the losses of classes: which rows, through which strides, in which tiles."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import TRITON_DTYPE, Number, encode
from ..kernels import classification as k
from ..kernels import loss as finish
from ..kernels import reduction as combine
from ..layout import (
    INT32_MAX,
    Strides,
    collapse,
    dense_strides,
    fastest_first,
    next_power_of_two,
    reach,
)
from ..runtime import launch_prepared
from .configurations import (
    BLOCK,
    COLUMNS,
    MOST_BLOCK,
    ROWS,
    Configuration,
    choose,
    planned,
    problem_of,
)
from .reduction import MEAN, SUM, Reduction, plan_for, reduce, run_many

AVERAGE = Reduction(None, combine.add_and_count, (0.0, 0.0), finish.average)
"""The sum of losses over the sum of their weights, and 1 over that sum."""
WEIGHT_SLOPE = SUM.but(map=k.weight_slope)
WEIGHT_SLOPE_SMOOTHED = SUM.but(map=k.weight_slope_smoothed)


class Smoothing(NamedTuple):
    """What a target's y becomes: ``keep * y + spread``."""

    keep: float
    spread: float


class Call(NamedTuple):
    """What a launch is told beside its tensors.

    Attributes:
        dim: the dimension of the logits along which classes lie, not negative.
        labelled: whether targets are labels, not probabilities.
        ignored: the label that does not count.
        smoothing: None: none.
        z: factor of the squared logarithm of each row's sum of exponentials.
        compute: dtype to compute in.
        classes: number of them, of which the logits may be a piece,
        first: that begins here.
    """

    dim: int
    labelled: bool
    ignored: int
    smoothing: Smoothing | None
    z: float
    compute: torch.dtype
    classes: int
    first: int = 0

    @property
    def summed(self) -> bool:
        """Whether all classes of a row are wanted, and not the one of its label alone."""
        return self.smoothing is not None or not self.labelled

    @property
    def sloped(self) -> bool:
        """Whether a row's slope is more than the weight of its label."""
        return self.summed or self.z != 0.0

    @property
    def numbers(self) -> tuple[Any, Any]:
        if self.smoothing is None:
            return None, None
        keep, spread = self.smoothing
        return encode(keep, self.compute), encode(spread, self.compute)


class Walk(NamedTuple):
    """How the rows of logits are numbered.

    Attributes:
        kept: of what there is one of for each row: its shape, in torch's order.
        rows, columns: of the logits.
        geometry: the kernels' ``kept_shape``, ``kept_strides`` and ``strides``.
        wide: whether offsets need 64 bits.
        across: whether neighbours in memory are rows, not classes.
    """

    kept: torch.Size
    rows: int
    columns: int
    geometry: tuple[Any, ...]
    wide: bool
    across: bool


@lru_cache(maxsize=4096)
def walk(shape: torch.Size, dim: int, operands: tuple[Strides | None, ...]) -> Walk:
    """Number the rows of logits of ``shape``.

    Args:
        operands: strides, in the dimensions of the logits, of the kernel's operands in the order of
            ``kept_strides``, the logits first, but for the contiguous ones there is one of for each
            row; None for one that is absent.
    """
    others = [d for d in range(len(shape)) if d != dim]
    sizes = [shape[d] for d in others]
    kept = torch.Size(sizes)
    own = dense_strides(sizes, range(len(sizes) - 1, -1, -1))
    zeros = (0,) * len(sizes)
    walks = [zeros if s is None else tuple([s[d] for d in others]) for s in operands]
    walks.insert(3, own)
    order = fastest_first(sizes, walks)
    merged_shape, merged = collapse(sizes, walks, order)
    classes = [0 if s is None else s[dim] for s in operands]
    # Of x, y, w, dx and dy: the others have one element a row.
    along = (*classes[:3], *classes[5:])
    full = [[*a, b] for a, b in zip(merged, [*classes[:3], 0, *classes[3:]], strict=True)]
    furthest = max([reach([*merged_shape, shape[dim]], s) for s in full])
    across = bool(merged[0][0]) and abs(merged[0][0]) < abs(classes[0])
    rows = math.prod(sizes)
    geometry = tuple(merged_shape), tuple(map(tuple, merged)), along
    wide = max(furthest, rows, shape[dim]) > INT32_MAX - MOST_BLOCK
    return Walk(kept, rows, shape[dim], geometry, wide, across)


def by_row(tensor: Tensor, dim: int) -> Strides:
    """Strides, in the dimensions of the logits, of what has none along the classes."""
    strides = tensor.stride()
    return (*strides[:dim], 0, *strides[dim:])


def by_class(weight: Tensor | None, dim: int, rank: int) -> Strides | None:
    """Strides, in the dimensions of the logits, of weights of classes, before which there may be
    dimensions in front."""
    if weight is None:
        return None
    *front, own = weight.stride()
    return (*front, *[0] * (dim - len(front)), own, *[0] * (rank - dim - 1))


def _target(target: Tensor, call: Call) -> Strides:
    return by_row(target, call.dim) if call.labelled else target.stride()


def _tile(walk: Walk, compute: torch.dtype, whole: bool = False) -> tuple[int, int, bool]:
    """Rows and columns of a tile, and whether it has all columns, which it is to have if it can
    where ``whole``."""
    # A float64 fills two registers, and its exponential takes twice as many to compute.
    wide_by = (compute.itemsize // 4) ** 2
    tile, longest = k.TILE // wide_by, k.LONGEST // wide_by
    columns = next_power_of_two(max(walk.columns, 1))
    rows = next_power_of_two(max(walk.rows, 1))
    least = min(k.SIDE_BY_SIDE, rows) if walk.across else 1
    one = whole and least * columns <= longest
    block_columns = columns if one else min(columns, tile // least)
    return min(rows, max(tile // block_columns, least)), block_columns, one


@planned
def _launch(
    kernel: str,
    walk: Walk,
    call: Call,
    itemsize: int,
    device: int,
    tuned: bool,
    continues: bool | None = None,
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Grid and constexprs.

    Args:
        itemsize: bytes of a logit.
        tuned: whether it may be launched as was measured: not if it reads what it writes.
        continues: whether earlier pieces of the rows were seen; None: rows are not walked, tiles
            share them.
    """
    compute, walked = call.compute, continues is not None
    rows, columns, one_tile = _tile(walk, compute, walked)
    elements = rows * columns * compute.itemsize // 4
    default = Configuration(rows, columns, min(max(next_power_of_two(elements // 512), 4), 16))
    constants: dict[str, Any] = {} if kernel == "nll_loss_bwd" else {"INDEX": call.labelled}
    if walked:
        constants |= {"ONE_TILE": one_tile, "CONTINUES": continues}
    constants |= {"COMPUTE": TRITON_DTYPE[compute], "WIDE": walk.wide}

    def build(c: Configuration) -> tuple[tuple[int], dict[str, Any]]:
        tiles = 1 if walked else -(-walk.columns // c.columns)
        block = {"BLOCK_ROWS": c.rows, "BLOCK_COLUMNS": c.columns, "num_warps": c.warps}
        return (-(-walk.rows // c.rows) * tiles,), {**constants, **block}

    if not tuned:
        return build(default)
    kinds = "labels" if call.labelled else "probabilities", "across" if walk.across else None
    problem = problem_of(kernel, kinds, (walk.rows, walk.columns), 1, itemsize)
    parts = BLOCK if not walked else ROWS if one_tile else COLUMNS
    return choose(device, problem, default, parts, build)


class Rows(NamedTuple):
    """What forward finds of each row.

    Attributes:
        loss, share: None where the row is not complete. ``share`` is the weight of its label, kept
            for a mean.
        top, total: the largest logit, and the sum of exponentials relative to it.
        slope: None where it is the weight of the label.
        state: what goes on to the next piece with top and total.
    """

    loss: Tensor | None
    share: Tensor | None
    top: Tensor
    total: Tensor
    slope: Tensor | None
    state: tuple[Tensor, Tensor] | None = None


def rows(
    call: Call,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
    shares: bool,
    earlier: Rows | None = None,
    complete: bool = True,
) -> Rows:
    """The loss of each row, in ``dtype``.

    Args:
        shares: whether the weight of each label is wanted, too.
        earlier: what earlier pieces of the rows gave, which is overwritten.
        complete: whether this is the last piece.
    """
    dim, compute = call.dim, call.compute
    found = walk(
        x.shape,
        dim,
        (x.stride(), _target(target, call), by_class(weight, dim, x.dim())),
    )

    def empty(dtype: torch.dtype = compute) -> Tensor:
        return x.new_empty(found.kept, dtype=dtype)

    state = None
    if earlier is not None:
        top, total, state = earlier.top, earlier.total, earlier.state
    else:
        top, total = empty(), empty()
        if not complete:
            state = empty(), empty()
    loss = empty(dtype) if complete else None
    share = empty() if complete and shares else None
    slope = empty() if complete and call.sloped else None
    if found.rows:
        # Not tuned where the rows' state is read, and written over.
        grid, meta = _launch(
            "cross_entropy_fwd", found, call, x.itemsize, x.get_device(), state is None,
            earlier is not None,
        )  # fmt: skip
        z = None if call.z == 0.0 else encode(call.z, compute)
        args = (
            loss, share, slope, top, total, state, x, target, weight, *found.geometry,
            found.rows, found.columns, call.first, call.classes, call.ignored, *call.numbers, z,
        )  # fmt: skip
        launch_prepared(k.cross_entropy_fwd, grid, args, x, meta)
    return Rows(loss, share, top, total, slope, state)


def gradients(
    call: Call,
    g: Tensor,
    scale: Tensor | None,
    factor: Number | None,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    found: Rows,
    dx: Tensor | None,
    dy: Tensor | None,
) -> None:
    """Write the gradients of logits and of probabilities into ``dx``, which may be ``x``, and
    ``dy``.

    Args:
        g: of each row's loss, expanded to one for each row.
        scale: what it is multiplied by, likewise, or
        factor: the number that it is.
    """
    dim, compute = call.dim, call.compute
    way = walk(
        x.shape,
        dim,
        (
            x.stride(), _target(target, call), by_class(weight, dim, x.dim()), by_row(g, dim),
            None if scale is None else by_row(scale, dim),
            None if dx is None else dx.stride(), None if dy is None else dy.stride(),
        ),
    )  # fmt: skip
    if not way.rows:
        return
    apart = dx is None or dx.data_ptr() != x.data_ptr()  # or the logits are written over
    grid, meta = _launch("cross_entropy_bwd", way, call, x.itemsize, x.get_device(), apart)
    factor = None if factor is None else encode(factor, compute)
    args = (
        dx, dy, g, scale, x, target, weight, found.top, found.total, found.slope, *way.geometry,
        way.rows, way.columns, call.first, call.classes, call.ignored, *call.numbers, factor,
    )  # fmt: skip
    launch_prepared(k.cross_entropy_bwd, grid, args, x, meta)


def weight_gradient(
    call: Call,
    g: Tensor,
    factor: Number,
    x: Tensor,
    target: Tensor,
    found: Rows,
    batch: int,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of the weights of classes, where targets are probabilities: a sum over all
    rows, but for ``batch`` dimensions in front. Args: as ``gradients`` has them."""
    dim = call.dim
    g, top, total = (t.unsqueeze(dim) for t in (g, found.top, found.total))
    dims = tuple([d for d in range(batch, x.dim()) if d != dim])
    kind = WEIGHT_SLOPE
    numbers: tuple[Number, ...] = (factor,)
    if call.smoothing is not None:
        kind, numbers = WEIGHT_SLOPE_SMOOTHED, (factor, *call.smoothing)
    operands = g, x, target, top, total
    return reduce(kind, operands, dims, False, call.compute, dtype, numbers)


def likelihoods(
    call: Call, x: Tensor, target: Tensor, weight: Tensor | None, dtype: torch.dtype, shares: bool
) -> tuple[Tensor, Tensor | None]:
    """The negative log-likelihood of each row in ``dtype``, and the weight of its label."""
    found = walk(
        x.shape,
        call.dim,
        (x.stride(), by_row(target, call.dim), by_class(weight, call.dim, x.dim())),
    )
    loss = x.new_empty(found.kept, dtype=dtype)
    share = x.new_empty(found.kept, dtype=call.compute) if shares else None
    if found.rows:
        block = min(k.ROWS, next_power_of_two(found.rows))
        meta = {"COMPUTE": TRITON_DTYPE[call.compute], "WIDE": found.wide, "BLOCK_ROWS": block}
        args = (
            loss, share, x, target, weight, *found.geometry, found.rows, call.classes, call.ignored,
        )  # fmt: skip
        launch_prepared(k.nll_loss_fwd, (-(-found.rows // block),), args, x, meta)
    return loss, share


def likelihood_gradient(
    call: Call,
    g: Tensor,
    scale: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    dx: Tensor,
) -> None:
    """Write the gradient of the log-likelihoods into ``dx``. Args: as ``gradients`` has them."""
    dim = call.dim
    way = walk(
        dx.shape,
        dim,
        (
            dx.stride(), by_row(target, dim), by_class(weight, dim, dx.dim()), by_row(g, dim),
            None if scale is None else by_row(scale, dim), dx.stride(), None,
        ),
    )  # fmt: skip
    if not way.rows or not way.columns:
        return
    grid, meta = _launch("nll_loss_bwd", way, call, dx.itemsize, dx.get_device(), True)
    args = (
        dx, g, scale, target, weight, *way.geometry, way.rows, way.columns, call.ignored,
    )  # fmt: skip
    launch_prepared(k.nll_loss_bwd, grid, args, dx, meta)


def total(loss: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    """The sum of the rows' losses, but for ``batch`` dimensions in front."""
    return reduce(SUM, (loss,), _summed(loss, batch), False, loss.dtype, dtype)


def mean(loss: Tensor, batch: int, count: int, dtype: torch.dtype) -> Tensor:
    return reduce(MEAN, (loss,), _summed(loss, batch), False, loss.dtype, dtype, (), (count,))


def average(loss: Tensor, share: Tensor, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The sum of the rows' losses over that of their shares, and 1 over the latter."""
    operands = loss, share
    launch = plan_for(operands, AVERAGE, _summed(loss, batch), False, loss.dtype)
    found, scale, _ = run_many(launch, operands, (dtype, loss.dtype, None))
    assert found is not None
    assert scale is not None
    return found, scale


def _summed(loss: Tensor, batch: int) -> tuple[int, ...]:
    return tuple(range(batch, loss.dim()))
