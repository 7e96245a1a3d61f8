"""Rows of a table: y[n] = W[i[n]], and sums of them in bags, y[b] = sum_{n in b} s[n] W[i[n]].

dW[v] = sum_{n: i[n] = v} s[n] g[b[n]] and ds[n] = <W[i[n]], g[b[n]]>, where b[n] is the row of g
that row n went into: n itself, or its bag.

Sorted by i, the n of one v lie side by side. One program adds them, in that order, so that there
are no atomics and the same call has the same bits. What of them fills a whole chunk is added before
by a program of its own, or one v that most n have would be the work of one program.

An index out of range is read nowhere, and its row is NaN.
"""

import triton
import triton.language as tl

from .reduction import locate

# Elements of a tile, 16 bytes a thread or more of 128, and at most so many rows of them.
TILE = 4096
MOST_ROWS = 16
MOST_COLUMNS = 1024
# Sorted rows of a chunk. Its sum is written and read again: a sixteenth of the gradient's traffic.
CHUNK = 64


@triton.jit
def entry(index_ptr, at, mask, entries, padding):
    """The index, whether it is one, and whether its row counts."""
    i = tl.load(index_ptr + at, mask=mask, other=0).to(tl.int64)
    valid = (i >= 0) & (i < entries)
    tl.device_assert(valid, "index out of range in self")
    return i, valid, mask & valid & (i != padding)


@triton.jit
def poisoned(y, valid):
    return tl.where(valid, y, tl.full(y.shape, float("nan"), tl.float32).to(y.dtype))


@triton.jit
def embedding_fwd(
    y_ptr, w_ptr, index_ptr, n, columns, entries, in_batch, w_strides, padding,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """`in_batch` rows have one table, and the next ones the next; rows of `padding` are 0."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    row = (program // tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (program % tiles).to(tl.int32) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    i, valid, counts = entry(index_ptr, row, row < n, entries, padding)
    at = (row // in_batch) * w_strides[0] + i * w_strides[1]
    inside = (column < columns)[None, :]
    x = tl.load(
        w_ptr + at[:, None] + (column.to(tl.int64) * w_strides[2])[None, :],
        mask=counts[:, None] & inside, other=0,
    )  # fmt: skip
    x = poisoned(x, valid[:, None])
    tl.store(y_ptr + row[:, None] * columns + column[None, :], x, mask=(row < n)[:, None] & inside)


@triton.jit
def added(
    total, begin, end, g_ptr, position_ptr, source_ptr, scale_ptr, shape, strides, column, inside,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """`total` and the rows of g that the sorted rows from `begin` to `end` have gone into."""
    for start in range(begin, end, BLOCK_ROWS):
        at = start + tl.arange(0, BLOCK_ROWS)
        mask = at < end
        n = tl.load(position_ptr + at, mask=mask, other=0)
        row = n if source_ptr is None else tl.load(source_ptr + n, mask=mask, other=0)
        offset = (
            locate(row, shape, strides[1:])[:, None] + (column.to(tl.int64) * strides[0])[None, :]
        )
        x = tl.load(g_ptr + offset, mask=mask[:, None] & inside[None, :], other=0)
        x = x.to(total.dtype)
        if scale_ptr is not None:
            x = x * tl.load(scale_ptr + n, mask=mask, other=0).to(total.dtype)[:, None]
        total += x
    return total


@triton.jit
def embedding_chunk(
    partial_ptr, g_ptr, key_ptr, position_ptr, source_ptr, scale_ptr, shape, strides, columns,
    CHUNK: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sum of each chunk whose rows are all of one entry."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    chunk = program // tiles
    column = (program % tiles).to(tl.int32) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = column < columns
    first = chunk * CHUNK
    if tl.load(key_ptr + first) == tl.load(key_ptr + first + CHUNK - 1):
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), COMPUTE)
        total = added(
            total, first, first + CHUNK, g_ptr, position_ptr, source_ptr, scale_ptr,
            shape, strides, column, inside, BLOCK_ROWS,
        )  # fmt: skip
        tl.store(partial_ptr + chunk * columns + column, tl.sum(total, 0), mask=inside)


@triton.jit
def embedding_bwd(
    dw_ptr, g_ptr, key_ptr, position_ptr, bound_ptr, partial_ptr, source_ptr, scale_ptr,
    shape, strides, columns, entries, tables, padding,
    BY_ENTRY: tl.constexpr, BY_FREQUENCY: tl.constexpr, CHUNK: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """BY_ENTRY: a program for each entry, whose rows are between two of the bounds. Else one for
    each row, which does nothing unless it is the first of its entry's; the bound is their end."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    unit = program // tiles
    column = (program % tiles).to(tl.int32) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = column < columns
    if BY_ENTRY:
        key = unit
        begin = tl.load(bound_ptr + unit)
        end = tl.load(bound_ptr + unit + 1)
        live = unit < tables * entries
    else:
        key = tl.load(key_ptr + unit).to(tl.int64)
        begin = unit
        end = tl.load(bound_ptr + unit)
        before = tl.load(key_ptr + unit - 1, mask=unit > 0, other=-1)
        live = (before != key) & (key >= 0) & (key < tables * entries)
    if live:
        count = end - begin
        if key % entries == padding:
            end = begin
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), COMPUTE)
        if partial_ptr is None:
            total = added(
                total, begin, end, g_ptr, position_ptr, source_ptr, scale_ptr,
                shape, strides, column, inside, BLOCK_ROWS,
            )  # fmt: skip
        else:
            # Up to the first whole chunk, the chunks, and after the last one.
            first = tl.cdiv(begin, CHUNK)
            last = tl.maximum(end // CHUNK, first)
            total = added(
                total, begin, tl.minimum(first * CHUNK, end), g_ptr, position_ptr, source_ptr,
                scale_ptr, shape, strides, column, inside, BLOCK_ROWS,
            )  # fmt: skip
            for start in range(first, last, BLOCK_ROWS):
                chunk = start + tl.arange(0, BLOCK_ROWS)
                offset = chunk[:, None] * columns + column[None, :]
                mask = (chunk < last)[:, None] & inside[None, :]
                total += tl.load(partial_ptr + offset, mask=mask, other=0)
            total = added(
                total, last * CHUNK, end, g_ptr, position_ptr, source_ptr, scale_ptr,
                shape, strides, column, inside, BLOCK_ROWS,
            )  # fmt: skip
        result = tl.sum(total, 0)
        if BY_FREQUENCY:
            result = result / tl.maximum(count, 1).to(COMPUTE)
        tl.store(dw_ptr + key * columns + column, result.to(dw_ptr.dtype.element_ty), mask=inside)


@triton.jit
def embedding_bag_fwd(
    y_ptr, size_ptr, w_ptr, index_ptr, bound_ptr, scale_ptr, n, bags, columns, entries, in_batch,
    w_strides, length, padding,
    MEAN: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Bags of `length` rows each, or that begin at the bounds; `n` rows and `bags` in all, of which
    `in_batch` have one table."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    bag = program // tiles
    column = (program % tiles).to(tl.int32) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = column < columns
    if bound_ptr is None:
        begin = bag * length
        end = begin + length
    else:
        begin = tl.load(bound_ptr + bag).to(tl.int64)
        end = tl.load(bound_ptr + bag + 1, mask=bag + 1 < bags, other=n).to(tl.int64)
        # The first has what is before it, which torch's CPU refuses: the gradient is so, too.
        first = bag // in_batch * length
        begin = tl.where(bag % in_batch == 0, first, tl.minimum(tl.maximum(begin, 0), n))
        end = tl.minimum(tl.maximum(end, 0), n)
    table = w_ptr + (bag // in_batch) * w_strides[0] + (column.to(tl.int64) * w_strides[2])[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), COMPUTE)
    sizes = tl.zeros((BLOCK_ROWS,), tl.int64)
    for start in range(begin, end, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        i, valid, counts = entry(index_ptr, row, row < end, entries, padding)
        x = tl.load(
            table + (i * w_strides[1])[:, None], mask=counts[:, None] & inside[None, :], other=0
        )
        x = poisoned(x.to(COMPUTE), valid[:, None])
        if scale_ptr is not None:
            # Not of padding, nor past the end: its product would be NaN, if the weight is not
            # finite.
            scale = tl.load(scale_ptr + row, mask=counts, other=0).to(COMPUTE)
            x = x * tl.where(valid, scale, 1)[:, None]
        total += x
        sizes += counts.to(tl.int64)
    size = tl.sum(sizes, 0)
    result = tl.sum(total, 0)
    if MEAN:
        result = result / tl.maximum(size, 1).to(COMPUTE)
        if program % tiles == 0:
            tl.store(size_ptr + bag, size)
    tl.store(y_ptr + bag * columns + column, result.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def embedding_bag_scale_bwd(
    ds_ptr, g_ptr, w_ptr, index_ptr, source_ptr, n, columns, entries, in_batch,
    w_strides, shape, strides, padding,
    COMPUTE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """`in_batch` of the `n` rows have one table."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    i, valid, counts = entry(index_ptr, row, row < n, entries, padding)
    w_at = ((row // in_batch) * w_strides[0] + i * w_strides[1])[:, None]
    bag = tl.load(source_ptr + row, mask=row < n, other=0)
    g_at = locate(bag, shape, strides[1:])[:, None]
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), COMPUTE)
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        mask = counts[:, None] & (column < columns)[None, :]
        w = tl.load(
            w_ptr + w_at + (column.to(tl.int64) * w_strides[2])[None, :], mask=mask, other=0
        )
        g = tl.load(g_ptr + g_at + (column.to(tl.int64) * strides[0])[None, :], mask=mask, other=0)
        total += w.to(COMPUTE) * g.to(COMPUTE)
    result = poisoned(tl.sum(total, 1), valid)
    tl.store(ds_ptr + row, result.to(ds_ptr.dtype.element_ty), mask=row < n)
