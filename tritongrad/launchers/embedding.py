"""Launching embeddings: a table is ``(entries, columns)``, or one for each batch in front of that.

Beside the tables, indices have their batch in front too. Which rows are of one entry, torch's
stable sort finds, on the device: nothing waits for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dtypes import COMPUTE_DTYPE, TRITON_DTYPE
from ..kernels import embedding as k
from ..layout import collapse, next_power_of_two
from ..runtime import launch

NO_PADDING = -1


def _blocks(columns: int, rows: int, itemsize: int) -> dict[str, int]:
    """A tile: of the columns as many as a program takes, and rows to fill it. Of a narrow table,
    fewer than four warps: a thread of those has one element, and the compiler too few registers."""
    tile = k.TILE * 4 // max(itemsize, 4)
    width = min(next_power_of_two(max(columns, 1)), k.MOST_COLUMNS)
    height = min(tile // width, k.MOST_ROWS, next_power_of_two(max(rows, 1)))
    warps = min(max(height * width // 256, 1), 4)
    return {"BLOCK_ROWS": height, "BLOCK_COLUMNS": width, "num_warps": warps}


def _tables(w: Tensor) -> tuple[int, int, int, tuple[int, ...]]:
    """How many tables, their entries and columns, and strides with that from one to the next."""
    if w.dim() == 2:
        return 1, *w.shape, (0, *w.stride())
    return *w.shape, w.stride()


def _rows_of(g: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides by which the kernels find a row of g by its number: innermost first, the
    strides with a column's in front."""
    leading = g.shape[:-1]
    sizes, (strides,) = collapse(leading, [g.stride()[:-1]], range(len(leading) - 1, -1, -1))
    return tuple(sizes), (g.stride(-1), *strides)


def lookup(w: Tensor, index: Tensor, padding: int = NO_PADDING) -> Tensor:
    """The rows that ``index`` names; those of ``padding`` are 0."""
    tables, entries, columns, strides = _tables(w)
    y = w.new_empty(*index.shape, columns)
    n = index.numel()
    if y.numel():
        blocks = _blocks(columns, n, w.element_size())
        grid = -(-n // blocks["BLOCK_ROWS"]) * -(-columns // blocks["BLOCK_COLUMNS"])
        args = (
            y, w, index.contiguous(), n, columns, entries, n // tables, strides, padding,
        )  # fmt: skip
        launch(k.embedding_fwd, (grid,), args, w, **blocks)
    return y


def gradient(
    g: Tensor,
    index: Tensor,
    table: torch.Size,
    padding: int,
    by_frequency: bool,
    source: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Of a table, or tables, of a shape: the sum of what each entry's rows have gone into.

    Args:
        g: gradients, those of each index in its place, unless there is a source.
        padding: the entry whose gradient is 0.
        by_frequency: whether to divide by how often an entry occurs.
        source: for each index the number of the row of ``g``.
        scale: for each index a factor.
    """
    columns = table[-1]
    entries, tables = table[-2], table[0] if len(table) > 2 else 1
    n, rows = index.numel(), tables * entries
    if not n or not columns or not rows:
        return g.new_zeros(table)
    keys = index.reshape(-1)
    if tables > 1:
        keys = index.reshape(tables, -1)
        known = (keys >= 0) & (keys < entries)
        first = torch.arange(0, rows, entries, device=index.device).unsqueeze(-1)
        keys = torch.where(known, keys + first, -1).view(-1)
    keys, position = torch.sort(keys, stable=True)
    by_entry = rows <= n
    if by_entry:
        each = torch.arange(rows + 1, dtype=keys.dtype, device=keys.device)
        bounds = torch.searchsorted(keys, each)
    else:
        bounds = torch.searchsorted(keys, keys, right=True)
    dw = g.new_empty(table) if by_entry else g.new_zeros(table)
    compute = COMPUTE_DTYPE[g.dtype]
    tile = _blocks(columns, n, compute.itemsize)
    blocks: dict[str, Any] = tile | {"CHUNK": k.CHUNK, "COMPUTE": TRITON_DTYPE[compute]}
    tiles = -(-columns // blocks["BLOCK_COLUMNS"])
    walk = _rows_of(g)
    partial = None
    if n >= 4 * k.CHUNK:
        chunks = n // k.CHUNK
        partial = g.new_empty(chunks, columns, dtype=compute)
        shared = (partial, g, keys, position, source, scale, *walk, columns)
        launch(k.embedding_chunk, (chunks * tiles,), shared, g, **blocks)
    args = (
        dw, g, keys, position, bounds, partial, source, scale, *walk,
        columns, entries, tables, padding,
    )  # fmt: skip
    kind = {"BY_ENTRY": by_entry, "BY_FREQUENCY": by_frequency}
    launch(k.embedding_bwd, (min(rows, n) * tiles,), args, g, **kind, **blocks)
    return dw


# ------------------------------------------------------------------------------------------- bags


def _bounds(index: Tensor, offsets: Tensor | None, tables: int) -> Tensor | None:
    """Where each bag begins among all indices."""
    if offsets is None or tables == 1:
        return None if offsets is None else offsets.reshape(-1).contiguous()
    first = torch.arange(0, index.numel(), index.shape[-1], device=index.device)
    return (offsets + first.unsqueeze(-1)).view(-1)


def bag_of(index: Tensor, offsets: Tensor | None, tables: int) -> Tensor:
    """For each index the number of its bag."""
    each = torch.arange(index.numel(), device=index.device)
    bounds = _bounds(index, offsets, tables)
    if bounds is None:
        return torch.div(each, index.shape[-1], rounding_mode="floor")
    # Of bags that begin at one place, all but the last are empty. What is before the first, where
    # a GPU was not waited for to refuse that, is in it: bag -1 would be an address of no gradient.
    return (torch.searchsorted(bounds.long(), each, right=True) - 1).clamp_(min=0)


def bags(
    w: Tensor,
    index: Tensor,
    offsets: Tensor | None,
    scale: Tensor | None,
    mean: bool,
    padding: int,
) -> tuple[Tensor, Tensor | None]:
    """Sums, or means, of bags of rows; for means, how many rows each has, without padding.

    Args:
        index: ``(bags, length)``, or ``(indices,)`` with the ``offsets`` at which bags begin.
        scale: a factor for each index.
    """
    tables, entries, columns, strides = _tables(w)
    shape = index.shape[:-1] if offsets is None else offsets.shape
    count, n = shape.numel(), index.numel()
    y = w.new_empty(*shape, columns)
    size = index.new_empty(shape, dtype=torch.int64) if mean else None
    if count and columns:
        compute = COMPUTE_DTYPE[w.dtype]
        blocks = _blocks(columns, -(-n // count), compute.itemsize)
        args = (
            y, size, w, index.contiguous(), _bounds(index, offsets, tables),
            None if scale is None else scale.contiguous(),
            n, count, columns, entries, count // tables, strides, index.shape[-1], padding,
        )  # fmt: skip
        grid = (count * -(-columns // blocks["BLOCK_COLUMNS"]),)
        launch(
            k.embedding_bag_fwd, grid, args, w,
            MEAN=mean, COMPUTE=TRITON_DTYPE[compute], **blocks,
        )  # fmt: skip
    elif size is not None:
        size.zero_()
    return y, size


def scale_gradient(w: Tensor, g: Tensor, index: Tensor, source: Tensor, padding: int) -> Tensor:
    """Of the factor of each index: the product of its row with its bag's gradient."""
    tables, entries, columns, strides = _tables(w)
    ds = g.new_empty(index.shape)
    n = index.numel()
    if n:
        compute = COMPUTE_DTYPE[w.dtype]
        blocks = _blocks(min(columns, 256), n, compute.itemsize)
        args = (
            ds, g, w, index.contiguous(), source, n, columns, entries, n // tables,
            strides, *_rows_of(g), padding,
        )  # fmt: skip
        grid = (-(-n // blocks["BLOCK_ROWS"]),)
        launch(k.embedding_bag_scale_bwd, grid, args, w, COMPUTE=TRITON_DTYPE[compute], **blocks)
    return ds
