"""Folding and scanning a tile along its columns, by any function of tuples of values.

    fold:  ((a0 . a1) . a2) . ...            scan:  a0, a0 . a1, (a0 . a1) . a2, ...

`tl.reduce` and `tl.associative_scan` take no function out of a constexpr, and the interpreter calls
it for one element at a time, at a millisecond each: so the compiler and the interpreter each have
what suits them.
"""

import triton
import triton.language as tl

if triton.knobs.runtime.interpret:
    import numpy as np
    from triton.runtime.interpreter import TensorHandle

    def fold(values, COMBINE):
        """Halves of the tile are combined until one column is left."""
        while (n := values[0].shape[1]) > 1:
            left = tuple(_columns(v, slice(0, n // 2)) for v in values)
            right = tuple(_columns(v, slice(n // 2, n)) for v in values)
            values = COMBINE(*left, *right)
        return tuple(_columns(v, 0) for v in values)

    def scan(values, COMBINE, REVERSE):
        """Each column is combined with those 1, 2, 4, ... before it."""
        towards = -1 if REVERSE else 1
        values = tuple(_columns(v, slice(None, None, towards)) for v in values)
        step = 1
        while step < values[0].shape[1]:
            earlier = tuple(_block(np.roll(v.handle.data, step, 1), v.dtype.scalar) for v in values)
            values = tuple(_after(step, *pair) for pair in zip(values, COMBINE(*earlier, *values)))
            step *= 2
        return tuple(_columns(v, slice(None, None, towards)) for v in values)

    def _columns(block, which):
        return _block(block.handle.data[:, which], block.dtype.scalar)

    def _after(step, old, new):
        """The first columns of `old`, the others of `new`."""
        data = [old.handle.data[:, :step], new.handle.data[:, step:]]
        return _block(np.concatenate(data, 1), old.dtype.scalar)

    def _block(data, dtype):
        return tl.tensor(TensorHandle(data, dtype), tl.block_type(dtype, list(data.shape)))
else:

    @tl.core.builtin
    def fold(values, combine, _semantic=None, _generator=None):
        """One column for each tile of `values`."""
        function = tl.core._unwrap_if_constexpr(combine)
        return tl.reduce(values, 1, function, _semantic=_semantic, _generator=_generator)

    @tl.core.builtin
    def scan(values, combine, reverse, _semantic=None, _generator=None):
        """Tiles like `values`, in which each column has taken in those before it."""
        function = tl.core._unwrap_if_constexpr(combine)
        return tl.associative_scan(
            values, 1, function, reverse, _semantic=_semantic, _generator=_generator
        )
