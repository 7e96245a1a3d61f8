"""bfloat16 in Triton's interpreter, which holds it as the upper half of a float32's bits.

The interpreter (triton 3.7.1) converts float32 to it by cutting bits off where hardware rounds to
nearest, loses subnormals on the way back, and converts every other type as if those bits were an
integer. Results would be off by an ulp here and right on a GPU, so that no test of accuracy could
mean anything; hence the one conversion that the interpreter calls is replaced.
"""

from __future__ import annotations

from typing import Any

import numpy
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _widened(bits: Any) -> Any:
    """float32 of a bfloat16's bits: exact."""
    return (numpy.asarray(bits).astype(numpy.uint32) << 16).view(numpy.float32)


def _rounded(values: Any) -> Any:
    """Bits of the nearest bfloat16, ties to even. Through float32, as torch and the compiler do."""
    single = numpy.asarray(values).astype(numpy.float32)
    bits = single.view(numpy.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # The carry must not run through the exponent of a NaN.
    return numpy.where(numpy.isnan(single), 0x7FC0, nearest).astype(numpy.uint16)


def correct_bfloat16() -> None:
    """Make the interpreter convert from and to bfloat16 as hardware does."""
    convert = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            return cast_impl(self, TensorHandle(_widened(src.data), tl.float32), dst_type)
        if target == tl.bfloat16 and source != tl.bfloat16:
            return TensorHandle(_rounded(src.data), tl.bfloat16)
        return convert(self, src, dst_type)

    InterpreterBuilder.cast_impl = cast_impl
