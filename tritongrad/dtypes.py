"""dtypes our kernels compute, what they accumulate in, and how numbers reach a kernel."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl

FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
INTEGRAL = frozenset(
    (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
)  # fmt: skip

TRITON_DTYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

COMPUTE_DTYPE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
"""Result dtype -> the dtype it is computed and accumulated in (torch's opmath type)."""

Number = int | float


def is_number(value: Any) -> bool:
    """Whether torch takes ``value`` for a real number: an int has 64 bits."""
    return isinstance(value, float) or (isinstance(value, int) and -(2**63) <= value < 2**64)


def encode(value: Number, compute: torch.dtype) -> Number:
    """A number as a kernel argument: Triton hands floats over in float32, so a float64 goes as
    the integer that has its bits (``kernels.pointwise.scalar`` takes them apart)."""
    if compute is torch.float64:
        return struct.unpack("<q", struct.pack("<d", value))[0]
    return float(value)


def encode_all(values: tuple[Number, ...], compute: torch.dtype) -> tuple[Number, ...]:
    """``encode`` each."""
    # To a cache, -0.0 is 0.0.
    return _encode_all.__wrapped__(values, compute) if 0 in values else _encode_all(values, compute)


@lru_cache(maxsize=4096)
def _encode_all(values: tuple[Number, ...], compute: torch.dtype) -> tuple[Number, ...]:
    return tuple([encode(v, compute) for v in values])
