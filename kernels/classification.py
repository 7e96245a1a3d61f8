"""Losses of classes: cross entropy of logits, and negative log-likelihood.

With logits x[r, j] of row r and class j, log p[r, j] = x[r, j] - lse[r], lse = log sum exp x, and
q[r, j] = w[j] y[r, j], the weight of a class times how much of it is wanted (1 for the label of the
row and 0 otherwise; or a probability; smoothed: (1 - s) y + s / classes):

    l[r] = -<q, log p> + z lse^2 = a lse - <q, x> + z lse^2           with a[r] = sum of q
    dx = g (p (a + 2 z lse) - q)       dy = -g (1 - s) w log p       dw = -sum over r of g y log p

What is kept of a row is its largest logit `top`, `total` = sum exp(x - top), and the `slope`
a + 2 z lse: from them the gradient is elementwise, in one more reading of the logits. Nothing of
the size of the logits is kept, and <q, x> is summed relative to a logit, so that no digit is lost
to a common offset.

A row may come in several pieces, one launch each: they share `state`, what is known of the row so
far. A label outside of the classes is never an address: its loss and gradient are NaN.
"""

import triton
import triton.language as tl

from . import math as m
from .math import libdevice
from .pointwise import scalar
from .reduction import locate

INF = tl.constexpr(float("inf"))

# Elements of a tile that is walked along a row: 16 a thread, of up to four accumulators.
TILE = 4096
# Of a row that is one tile: 32 a thread of 512.
LONGEST = 16384
# Rows of a tile whose contiguous axis is that of the rows: a full transaction each.
SIDE_BY_SIDE = 32
# Of one program where there is one element a row.
ROWS = 512


@triton.jit
def numbered(rows, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The numbers of a program's rows, and whether there are such rows."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    row = program * BLOCK + tl.arange(0, BLOCK)
    return row, row < rows


@triton.jit
def label_of(ptr, live, ignored, classes):
    """Labels, whether they count, and whether those that do are classes."""
    label = tl.load(ptr, mask=live, other=0)
    counted = live & (label != ignored)
    return label, counted, counted & (label >= 0) & (label < classes)


@triton.jit
def weight_of(ptr, label, known, stride, COMPUTE: tl.constexpr):
    """Weights of labels, 0 where there is none."""
    if ptr is None:
        return tl.where(known, 1, 0).to(COMPUTE)
    else:
        return tl.load(ptr + label * stride, mask=known, other=0).to(COMPUTE)


@triton.jit
def wanted(
    target, weight, label, counted, column, mask, strides, keep, spread,
    INDEX: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """A tile of y and of w; `column` counts from the first class of all."""
    if INDEX:
        y = tl.where(label[:, None] == column[None, :], 1, 0).to(COMPUTE)
    else:
        y = tl.load(target[:, None] + (column * strides[1])[None, :], mask=mask, other=0)
        y = y.to(COMPUTE)
    if keep is not None:
        y = y * scalar(keep, COMPUTE) + scalar(spread, COMPUTE)
    if INDEX:
        y = tl.where(counted[:, None], y, 0)
    if weight is None:
        w = tl.full(y.shape, 1, COMPUTE)
    else:
        w = tl.load(weight[:, None] + (column * strides[2])[None, :], mask=mask, other=0)
        w = w.to(COMPUTE)
    return y, w


@triton.jit
def finite(top):
    """What to count from: not -inf, from which -inf has no distance."""
    return tl.where(top == -INF, 0, top)


@triton.jit
def cross_entropy_fwd(
    loss_ptr, share_ptr, slope_ptr, top_ptr, total_ptr, state, x_ptr, target_ptr, weight_ptr,
    kept_shape, kept_strides, strides, rows, columns, first, classes, ignored, keep, spread, z,
    INDEX: tl.constexpr, ONE_TILE: tl.constexpr, CONTINUES: tl.constexpr, COMPUTE: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """`columns` logits of each row, of the classes from `first` on. Strides of the rows, innermost
    first, and of the classes are those of x, y, w and of what there is one of for each row.

    `state`: sums for (<q, x - top>, a), where they are carried from piece to piece, with top and
    total. Without a loss_ptr there is a piece to come. `share_ptr`: w of the label, for a mean.
    """
    row, live = numbered(rows, WIDE, BLOCK_ROWS)
    at = locate(row, kept_shape, kept_strides[3])
    x_row = x_ptr + locate(row, kept_shape, kept_strides[0])
    target_row = target_ptr + locate(row, kept_shape, kept_strides[1])
    weight_row = None
    if weight_ptr is not None:
        weight_row = weight_ptr + locate(row, kept_shape, kept_strides[2])
    lane = tl.arange(0, BLOCK_COLUMNS).to(row.dtype)
    # Whether all classes of a row are wanted, and not the one of its label alone.
    SUMMED: tl.constexpr = not INDEX or keep is not None
    label, counted, known = None, live, live
    if INDEX:
        label, counted, known = label_of(target_row, live, ignored, classes)

    if ONE_TILE:
        mask = live[:, None] & (lane < columns)[None, :]
        x = tl.load(x_row[:, None] + (lane * strides[0])[None, :], mask=mask, other=-INF)
        x = x.to(COMPUTE)
        top = tl.max(x, 1)
        away = x - finite(top)[:, None]
        total = tl.sum(libdevice.exp(away), 1)
        pull = tl.zeros((BLOCK_ROWS,), COMPUTE)
        mass = pull
        if SUMMED:
            y, w = wanted(
                target_row, weight_row, label, counted, first + lane, mask, strides, keep, spread,
                INDEX, COMPUTE,
            )  # fmt: skip
            q = tl.where(mask, y * w, 0)
            mass = tl.sum(q, 1)
            pull = tl.sum(tl.where(mask, q * away, 0), 1)
    else:
        # Each lane of the tile has a top and a total of its own, so that threads meet but once.
        origin = tl.load(x_row, mask=live, other=0).to(COMPUTE)
        origin = tl.where(tl.abs(origin) < INF, origin, 0)
        tops = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), -INF, COMPUTE)
        totals = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), COMPUTE)
        pulls = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), COMPUTE)
        masses = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), COMPUTE)
        for start in range(0, columns, BLOCK_COLUMNS):
            column = (start + lane).to(row.dtype)
            mask = live[:, None] & (column < columns)[None, :]
            x = tl.load(x_row[:, None] + (column * strides[0])[None, :], mask=mask, other=-INF)
            x = x.to(COMPUTE)
            # One exponential, because that of the larger is 1. Equal ones may be infinities.
            gap = libdevice.exp(tl.where(x == tops, 0, -tl.abs(x - tops)).to(COMPUTE))
            totals = tl.where(x > tops, totals * gap + 1, totals + gap)
            tops = tl.where(x > tops, x, tops)
            if SUMMED:
                y, w = wanted(
                    target_row, weight_row, label, counted, first + column, mask, strides, keep,
                    spread, INDEX, COMPUTE,
                )  # fmt: skip
                q = tl.where(mask, y * w, 0)
                masses += q
                pulls += tl.where(mask, q * (x - origin[:, None]), 0)
        top = tl.max(tops, 1)
        total = tl.sum(totals * libdevice.exp(tops - finite(top)[:, None]), 1)
        mass = tl.sum(masses, 1)
        pull = tl.sum(pulls, 1) + tl.where(mass == 0, 0, mass * (origin - finite(top)))

    if INDEX and not SUMMED:
        place = label - first
        here = known & (place >= 0) & (place < columns)
        mass = weight_of(weight_row, label, here, strides[2], COMPUTE)
        x = tl.load(x_row + place * strides[0], mask=here, other=0).to(COMPUTE)
        pull = tl.where(here, mass * (x - finite(top)), 0)

    if CONTINUES:
        earlier = tl.load(top_ptr + at, mask=live, other=-INF)
        highest = tl.where(m.is_nan(earlier) | (earlier > top), earlier, top)
        base = finite(highest)
        before = tl.load(total_ptr + at, mask=live, other=0)
        total = before * libdevice.exp(earlier - base) + total * libdevice.exp(top - base)
        before = tl.load(state[1] + at, mask=live, other=0)
        pull += tl.where(mass == 0, 0, mass * (finite(top) - base))
        pull += tl.where(before == 0, 0, before * (finite(earlier) - base))
        pull += tl.load(state[0] + at, mask=live, other=0)
        mass += before
        top = highest

    if loss_ptr is None:
        tl.store(state[0] + at, pull, mask=live)
        tl.store(state[1] + at, mass, mask=live)
    else:
        # A row of nothing but -inf, or with an infinity in it, is NaN, as torch's is.
        total = tl.where(tl.abs(top) == INF, float("nan"), total)
        logarithm = libdevice.log(total)
        loss = mass * logarithm - pull
        if z is not None:
            lse = top + logarithm
            loss += scalar(z, COMPUTE) * lse * lse
            mass += 2 * scalar(z, COMPUTE) * lse
        if INDEX:
            loss = tl.where(known, loss, tl.where(counted, float("nan"), 0))
            mass = tl.where(counted, mass, 0)
        tl.store(loss_ptr + at, loss.to(loss_ptr.dtype.element_ty), mask=live)
        if slope_ptr is not None:
            tl.store(slope_ptr + at, mass, mask=live)
        if share_ptr is not None:
            share = weight_of(weight_row, label, known, strides[2], COMPUTE)
            tl.store(share_ptr + at, tl.where(counted & ~known, float("nan"), share), mask=live)
    tl.store(top_ptr + at, top, mask=live)
    tl.store(total_ptr + at, total, mask=live)


@triton.jit
def upstream(g_ptr, scale_ptr, factor, row, live, kept_shape, kept_strides, COMPUTE: tl.constexpr):
    """The gradient of each row's loss, from that of their sum or mean."""
    g = tl.load(g_ptr + locate(row, kept_shape, kept_strides[4]), mask=live, other=0).to(COMPUTE)
    if factor is not None:
        g = g * scalar(factor, COMPUTE)
    if scale_ptr is not None:
        g = g * tl.load(scale_ptr + locate(row, kept_shape, kept_strides[5]), mask=live, other=0)
    return g


@triton.jit
def tiled(rows, columns, WIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Rows and columns of a program's tile, neighbours along a row first."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    row = (program // tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (program % tiles) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    return row, column, row < rows


@triton.jit
def cross_entropy_bwd(
    dx_ptr, dy_ptr, g_ptr, scale_ptr, x_ptr, target_ptr, weight_ptr, top_ptr, total_ptr, slope_ptr,
    kept_shape, kept_strides, strides, rows, columns, first, classes, ignored, keep, spread, factor,
    INDEX: tl.constexpr, COMPUTE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program reads and writes one tile, so that dx may lie where x does. Strides: as the
    forward's, and then those of g, of its factor `scale`, of dx and of dy; those of the classes
    follow those of x, y and w. The factor is a number where every row's is the same."""
    row, column, live = tiled(rows, columns, WIDE, BLOCK_ROWS, BLOCK_COLUMNS)
    at = locate(row, kept_shape, kept_strides[3])
    mask = live[:, None] & (column < columns)[None, :]
    target_row = target_ptr + locate(row, kept_shape, kept_strides[1])
    weight_row = None
    if weight_ptr is not None:
        weight_row = weight_ptr + locate(row, kept_shape, kept_strides[2])
    label, counted, known = None, live, live
    g = upstream(g_ptr, scale_ptr, factor, row, live, kept_shape, kept_strides, COMPUTE)
    if INDEX:
        label, counted, known = label_of(target_row, live, ignored, classes)
        # Also where the mean of nothing has a factor that is not finite.
        g = tl.where(known, g, tl.where(counted, float("nan"), 0))
    x_at = x_ptr + locate(row, kept_shape, kept_strides[0])[:, None]
    x = tl.load(x_at + (column * strides[0])[None, :], mask=mask, other=0).to(COMPUTE)
    away = x - tl.load(top_ptr + at, mask=live, other=0)[:, None]
    total = tl.load(total_ptr + at, mask=live, other=1)
    y, w = wanted(
        target_row, weight_row, label, counted, first + column, mask, strides, keep, spread,
        INDEX, COMPUTE,
    )  # fmt: skip
    if dx_ptr is not None:
        if slope_ptr is None:
            slope = weight_of(weight_row, label, known, strides[2], COMPUTE)
        else:
            slope = tl.load(slope_ptr + at, mask=live, other=0)
        p = libdevice.exp(away) * m.inverse(total)[:, None]
        dx = g[:, None] * (p * slope[:, None] - y * w)
        dx_at = dx_ptr + locate(row, kept_shape, kept_strides[6])[:, None]
        tl.store(dx_at + (column * strides[3])[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if dy_ptr is not None:
        dy = -g[:, None] * w * (away - libdevice.log(total)[:, None])
        if keep is not None:
            dy = dy * scalar(keep, COMPUTE)
        dy_at = dy_ptr + locate(row, kept_shape, kept_strides[7])[:, None]
        tl.store(dy_at + (column * strides[4])[None, :], dy.to(dy_ptr.dtype.element_ty), mask=mask)


@triton.jit
def nll_loss_fwd(
    loss_ptr, share_ptr, x_ptr, target_ptr, weight_ptr,
    kept_shape, kept_strides, strides, rows, classes, ignored,
    COMPUTE: tl.constexpr, WIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """l[r] = -w x[r, label]: one element of each row is read."""
    row, live = numbered(rows, WIDE, BLOCK_ROWS)
    at = locate(row, kept_shape, kept_strides[3])
    target_row = target_ptr + locate(row, kept_shape, kept_strides[1])
    weight_row = None
    if weight_ptr is not None:
        weight_row = weight_ptr + locate(row, kept_shape, kept_strides[2])
    label, counted, known = label_of(target_row, live, ignored, classes)
    share = weight_of(weight_row, label, known, strides[2], COMPUTE)
    x_row = x_ptr + locate(row, kept_shape, kept_strides[0])
    x = tl.load(x_row + label * strides[0], mask=known, other=0).to(COMPUTE)
    unknown = counted & ~known
    loss = tl.where(unknown, float("nan"), -share * x)
    tl.store(loss_ptr + at, loss.to(loss_ptr.dtype.element_ty), mask=live)
    if share_ptr is not None:
        tl.store(share_ptr + at, tl.where(unknown, float("nan"), share), mask=live)


@triton.jit
def nll_loss_bwd(
    dx_ptr, g_ptr, scale_ptr, target_ptr, weight_ptr,
    kept_shape, kept_strides, strides, rows, columns, ignored,
    COMPUTE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx[r, j] = -g w at the label and 0 elsewhere."""
    row, column, live = tiled(rows, columns, WIDE, BLOCK_ROWS, BLOCK_COLUMNS)
    target_row = target_ptr + locate(row, kept_shape, kept_strides[1])
    weight_row = None
    if weight_ptr is not None:
        weight_row = weight_ptr + locate(row, kept_shape, kept_strides[2])
    label, counted, known = label_of(target_row, live, ignored, columns)
    g = upstream(g_ptr, scale_ptr, None, row, live, kept_shape, kept_strides, COMPUTE)
    slope = -g * weight_of(weight_row, label, known, strides[2], COMPUTE)
    off = tl.where(counted & ~known, float("nan"), 0).to(COMPUTE)
    hit = (label[:, None] == column[None, :]) & known[:, None]
    dx = tl.where(hit, slope[:, None], off[:, None])
    dx_at = dx_ptr + locate(row, kept_shape, kept_strides[6])[:, None]
    mask = live[:, None] & (column < columns)[None, :]
    tl.store(dx_at + (column * strides[3])[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


# MAP of the sum over all rows that the gradient of a class weight is.


@triton.jit
def weight_slope(g, x, y, top, total, factor):
    return (-g * factor * y * (x - top - libdevice.log(total)),)


@triton.jit
def weight_slope_smoothed(g, x, y, top, total, factor, keep, spread):
    return weight_slope(g, x, y * keep + spread, top, total, factor)
