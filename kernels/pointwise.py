"""Pointwise operations.

out[i] = f(x[i], y[i], ...; parameters), and backward dx_k[i] = g[i] * (df/dx_k)[i].

Each operation is a device function over blocks of values, `NAME`, and its `NAME_bwd`; they are in
arithmetic.py, selection.py, elementary.py, activation.py and gated.py. Their parameters are `x, y`
for inputs (`c` for a condition), `out` the result, `g` its gradient, and then the operation's
numbers. Each returns a tuple, one value for each output; `NAME_bwd` has one for each differentiable
input. Where second order is a hot path there is a `NAME_bwd_bwd` too, the gradient of `NAME_bwd`:
it takes the gradients `vx, vy` of dx and dy first, then what `NAME_bwd` takes, and returns one
value for each tensor among that, in this order: dg, and dx, dy or dout.

Two kernels carry them all: `pointwise_dense` where every operand is laid out in the same dense
order, and `pointwise_strided` for the rest (broadcast, transposed, sliced). An operand is a
pointer, or None with its value in `scalars`, or None in both when nothing stored depends on it.

A function whose last parameter is `HALF` need not be more exact than half precision where its
operands and results are that: see math.py.
"""

import triton
import triton.language as tl

# 1024 elements over 4 warps are 8 a thread: one 16-byte access in half precision, two in float32.
DENSE_BLOCK = 1024
# The strided kernel's tile: rows of the collapsed outer dimensions by columns of the inner one. By
# bytes, so that float64, whose functions need the registers, has half as many elements a thread.
STRIDED_TILE_BYTES = 4096


@triton.jit
def scalar(value, DTYPE: tl.constexpr):
    """A number given by the host. Triton passes Python floats in float32, so the launcher sends
    the bits of a float64 as an integer."""
    if DTYPE == tl.float64:
        return tl.full((), value, tl.int64).to(tl.float64, bitcast=True)
    else:
        return tl.full((), value, DTYPE)


@triton.jit
def numbers(values, DTYPE: tl.constexpr):
    out = ()
    for i in tl.static_range(len(values)):
        out = out + (scalar(values[i], DTYPE),)
    return out


@triton.jit
def operand(block, RAW: tl.constexpr, RESULT: tl.constexpr, COMPUTE: tl.constexpr):
    """A loaded block in the type to compute in; torch first promotes it to the result's type."""
    # With an `else`, because Triton also compiles what follows an `if` that has returned.
    if RAW:
        return block
    else:
        return block.to(RESULT).to(COMPUTE)


@triton.constexpr_function
def may_be_half(F, RESULT):
    return "HALF" in F.arg_names and RESULT in (tl.float16, tl.bfloat16)


@triton.jit
def evaluate(F: tl.constexpr, values, RESULT: tl.constexpr):
    if may_be_half(F, RESULT):
        return F(*values, HALF=True)
    else:
        return F(*values)


@triton.jit
def dense_tile(
    offsets, mask, outs, ins, scalars, consts,
    F: tl.constexpr, RAW: tl.constexpr, RESULT: tl.constexpr, COMPUTE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    values = ()
    for i in tl.static_range(len(ins)):
        if ins[i] is not None:
            if MASKED:
                block = tl.load(ins[i] + offsets, mask=mask)
            else:
                block = tl.load(ins[i] + offsets)
            values = values + (operand(block, (RAW >> i) & 1, RESULT, COMPUTE),)
        elif scalars[i] is not None:
            values = values + (tl.broadcast_to(scalar(scalars[i], COMPUTE), offsets.shape),)
        else:
            values = values + (tl.zeros(offsets.shape, COMPUTE),)
    results = evaluate(F, values + numbers(consts, COMPUTE), RESULT)
    for i in tl.static_range(len(outs)):
        if outs[i] is not None:
            result = tl.broadcast_to(results[i], offsets.shape).to(outs[i].dtype.element_ty)
            if MASKED:
                tl.store(outs[i] + offsets, result, mask=mask)
            else:
                tl.store(outs[i] + offsets, result)


@triton.jit
def pointwise_dense(
    outs, ins, scalars, consts, n,
    F: tl.constexpr, RAW: tl.constexpr, RESULT: tl.constexpr, COMPUTE: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0)
    if WIDE:
        start = start.to(tl.int64)
    start = start * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    # A mask whose bound is not a multiple of 16 would cost all the vector accesses, so only the
    # last program has one.
    if start + BLOCK <= n:
        dense_tile(offsets, None, outs, ins, scalars, consts, F, RAW, RESULT, COMPUTE, False)
    else:
        dense_tile(offsets, offsets < n, outs, ins, scalars, consts, F, RAW, RESULT, COMPUTE, True)


@triton.jit
def pointwise_strided(
    outs, ins, scalars, consts, shape, out_strides, in_strides, rows, columns,
    F: tl.constexpr, RAW: tl.constexpr, RESULT: tl.constexpr, COMPUTE: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """`shape` holds the outer dimensions, innermost first; each operand's strides hold the column
    stride and then those of `shape`."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    column_tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    row = (program // column_tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (program % column_tiles) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]

    index = ()
    rest = row
    for d in tl.static_range(len(shape)):
        index = index + (rest % shape[d],)
        rest = rest // shape[d]

    values = ()
    for i in tl.static_range(len(ins)):
        if ins[i] is not None:
            offset = (column * in_strides[i][0])[None, :]
            for d in tl.static_range(len(shape)):
                offset = offset + (index[d] * in_strides[i][d + 1])[:, None]
            offset = tl.broadcast_to(offset, (BLOCK_ROWS, BLOCK_COLUMNS))
            block = tl.load(ins[i] + offset, mask=mask)
            values = values + (operand(block, (RAW >> i) & 1, RESULT, COMPUTE),)
        elif scalars[i] is not None:
            values = values + (tl.broadcast_to(scalar(scalars[i], COMPUTE), mask.shape),)
        else:
            values = values + (tl.zeros(mask.shape, COMPUTE),)
    results = evaluate(F, values + numbers(consts, COMPUTE), RESULT)
    for i in tl.static_range(len(outs)):
        if outs[i] is not None:
            offset = (column * out_strides[i][0])[None, :]
            for d in tl.static_range(len(shape)):
                offset = offset + (index[d] * out_strides[i][d + 1])[:, None]
            offset = tl.broadcast_to(offset, (BLOCK_ROWS, BLOCK_COLUMNS))
            result = tl.broadcast_to(results[i], (BLOCK_ROWS, BLOCK_COLUMNS))
            tl.store(outs[i] + offset, result.to(outs[i].dtype.element_ty), mask=mask)
