"""Reading the operands of a product: which form it has, whether they go together, its launch."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..admission import admit, admit_pair, transforming
from ..dtypes import FLOATING, Number, is_number
from ..launchers import matmul, reduction
from ..layout import Strides
from ..op import Spec, Unsupported


class Matrices(NamedTuple):
    """A product of matrices.

    Attributes:
        a_transposed, b_transposed: the operand's columns are what lies dense in memory; its
            gradient is then laid out likewise, as torch's is.
        alpha, beta: factors of the product, and of what is added to it where there is something.
        specs: of the operands, and
        plan: the launch for them; neither under a transform, where the kernel will meet others.
    """

    a_transposed: bool
    b_transposed: bool
    alpha: Number = 1
    beta: Number = 1
    specs: tuple[Spec, ...] | None = None
    plan: matmul.Plan | None = None


class Sum(NamedTuple):
    """A product of two operands that broadcast, summed.

    Attributes:
        dims: summed over, counting from the end.
        specs, plan: as ``Matrices`` has them.
    """

    dims: tuple[int, ...]
    specs: tuple[Spec, ...] | None = None
    plan: reduction.Plan | None = None


Params = Matrices | Sum

Form = Callable[[torch.Size, Strides, torch.Size, Strides], Params]
"""Which product operands of these shapes and strides have; raises Unsupported where none."""

INNER = Sum((-1,))


def is_transposed(strides: Strides) -> bool:
    """Whether the columns are what lies dense in memory."""
    return strides[-2] == 1 != strides[-1]


def read(form: Form, a: Tensor, b: Tensor) -> Params:
    """Params of the product of two tensors, checked.

    Raises:
        Unsupported: they do not multiply, or are not memory of one floating dtype on one device.
    """
    admit_pair(a, b)
    if transforming():
        check_alike(a.dtype, b.dtype, a.get_device(), b.get_device())
        return form(a.shape, a.stride(), b.shape, b.stride())
    return _params_and_plan(
        form, a.shape, a.stride(), a.dtype, a.get_device(),
        b.shape, b.stride(), b.dtype, b.get_device(), matmul.float32_precision(),
    )  # fmt: skip


def read_sum(
    form: Form, added: Tensor, a: Tensor, b: Tensor, beta: Number, alpha: Number
) -> Params:
    """``read`` of ``alpha`` times a product of matrices with ``beta`` times a tensor added."""
    admit_pair(a, b)
    admit(added)
    check_factors(beta, alpha)
    a_device = a.get_device()
    check_alike(a.dtype, b.dtype, a_device, b.get_device())
    check_alike(a.dtype, added.dtype, a_device, added.get_device())
    if transforming():
        params = form(a.shape, a.stride(), b.shape, b.stride())
        assert isinstance(params, Matrices)
        check_fits(added.shape, product_shape(a.shape, b.shape))
        return params._replace(alpha=alpha, beta=beta)
    return _sum_and_plan(
        form, a.shape, a.stride(), b.shape, b.stride(), a.dtype,
        matmul.Addend(added.shape, added.stride(), beta), alpha, matmul.float32_precision(),
    )  # fmt: skip


def check_factors(beta: Number, alpha: Number) -> None:
    """Raise Unsupported for factors that are no numbers, or that torch's libraries treat each in
    its own way."""
    for name, value in (("beta", beta), ("alpha", alpha)):
        if type(value) not in (int, float) or not is_number(value):
            raise Unsupported(f"{name} is a {type(value).__name__}")
    if alpha == 0:
        raise Unsupported("alpha is 0, with which some BLAS reads no operand and another does")


def product_shape(a: torch.Size, b: torch.Size) -> torch.Size:
    """Shape of the product of two matrices, or batches of them."""
    return torch.Size((*torch.broadcast_shapes(a[:-2], b[:-2]), a[-2], b[-1]))


def check_fits(own: torch.Size, shape: torch.Size) -> None:
    """Raise Unsupported unless a tensor of shape ``own`` expands to ``shape``."""
    if len(own) > len(shape) or any(
        n not in (1, full) for n, full in zip(reversed(own), reversed(shape), strict=False)
    ):
        raise Unsupported("input does not expand to the product")


@lru_cache(maxsize=4096)
def _sum_and_plan(
    form: Form,
    a_shape: torch.Size,
    a_strides: Strides,
    b_shape: torch.Size,
    b_strides: Strides,
    dtype: torch.dtype,
    added: matmul.Addend,
    alpha: Number,
    precision: str,
) -> Params:
    params = form(a_shape, a_strides, b_shape, b_strides)
    assert isinstance(params, Matrices)
    check_fits(added.shape, product_shape(a_shape, b_shape))
    # What is not read has no strides either.
    read = added if added.beta else None
    product = matmul.plan(
        a_shape, a_strides, b_shape, b_strides, dtype, precision, alpha, read
    )  # fmt: skip
    specs = Spec(a_shape, dtype), Spec(b_shape, dtype), Spec(added.shape, dtype)
    return params._replace(alpha=alpha, beta=added.beta, specs=specs, plan=product)


def check_alike(a: torch.dtype, b: torch.dtype, a_device: int, b_device: int) -> None:
    """Raise Unsupported unless these are one floating dtype and one device of a type."""
    if a not in FLOATING:
        raise Unsupported(f"dtype {str(a).removeprefix('torch.')}")
    if a is not b:
        raise Unsupported("operands of different dtypes")
    if a_device != b_device:
        raise Unsupported("tensors on different devices")


@lru_cache(maxsize=4096)
def _params_and_plan(
    form: Form,
    a_shape: torch.Size,
    a_strides: Strides,
    dtype: torch.dtype,
    device: int,
    b_shape: torch.Size,
    b_strides: Strides,
    b_dtype: torch.dtype,
    b_device: int,
    precision: str,
) -> Params:
    check_alike(dtype, b_dtype, device, b_device)
    params = form(a_shape, a_strides, b_shape, b_strides)
    specs = Spec(a_shape, dtype), Spec(b_shape, dtype)
    if isinstance(params, Matrices):
        product = matmul.plan(a_shape, a_strides, b_shape, b_strides, dtype, precision)
        return params._replace(specs=specs, plan=product)
    rank = max(len(a_shape), len(b_shape))
    dims = tuple([rank + d for d in params.dims])
    shapes, strides = (a_shape, b_shape), (a_strides, b_strides)
    total = reduction.plan(reduction.PRODUCT, shapes, strides, dims, False, dtype, device)
    return params._replace(specs=specs, plan=total)
