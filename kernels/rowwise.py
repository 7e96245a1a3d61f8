"""Functions of whole rows, held in registers: softmax, normalisation, and their derivatives.

outs[k, r] = ROW(x[k, :], y[k, :], ...)[r], where k numbers the elements of the dimensions that are
kept and r those along a row. ROW sees all of a row at once, so every operand is read once and every
result written once; a result may also be one number a row.
"""

import triton
import triton.language as tl

from .pointwise import numbers
from .reduction import locate

# Elements of a tile of short rows: several rows a program, or most of its threads would idle.
TILE = 4096
# Bytes of all operands of one program: 32 float32 a thread of 512, a quarter of its registers.
LIMIT = 65536
# Of 64 threads each on AMD, where a program has 1024 at most.
MOST_WARPS = 16
# Rows of a tile that are contiguous where the elements of a row are not: a full transaction each.
SIDE_BY_SIDE = 32


@triton.jit
def rowwise(
    outs, ins, constants, kept_shape, row_shape, kept_strides, row_strides, rows, columns,
    ROW: tl.constexpr, RESULT: tl.constexpr, COMPUTE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Shapes and strides are innermost first; the strides have one tuple for each of `outs` and
    then one for each of `ins`. Operands are converted to RESULT first, as torch promotes them, and
    are 0 past the end of a row."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    row = program * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS).to(program.dtype)
    row_mask = row < rows
    mask = row_mask[:, None] & (column < columns)[None, :]
    values = ()
    for i in tl.static_range(len(ins)):
        at_row = locate(row, kept_shape, kept_strides[len(outs) + i])[:, None]
        at_column = locate(column, row_shape, row_strides[len(outs) + i])[None, :]
        block = tl.load(ins[i] + (at_row + at_column), mask=mask, other=0)
        values = values + (block.to(RESULT).to(COMPUTE),)
    results = ROW(*values, mask, *numbers(constants, COMPUTE))
    for i in tl.static_range(len(outs)):
        if outs[i] is not None:
            result = results[i].to(outs[i].dtype.element_ty)
            at_row = locate(row, kept_shape, kept_strides[i])
            if len(result.shape) == 1:
                tl.store(outs[i] + at_row, result, mask=row_mask)
            else:
                at_column = locate(column, row_shape, row_strides[i])[None, :]
                tl.store(outs[i] + (at_row[:, None] + at_column), result, mask=mask)
