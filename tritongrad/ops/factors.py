"""Reading the operands of a product: which form it has, whether they go together, its launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..admission import admit, transforming
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
        summed: over the last dimension of the batch, which both operands have.
        specs: of the operands, and
        plan: the launch for them; neither under a transform, where the kernel will meet others.
    """

    a_transposed: bool
    b_transposed: bool
    alpha: Number = 1
    beta: Number = 1
    summed: bool = False
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
    admit_alike(a, b)
    params = form(a.shape, a.stride(), b.shape, b.stride())
    if transforming():
        return params
    shapes, strides, dtype = (a.shape, b.shape), (a.stride(), b.stride()), a.dtype
    specs = Spec(a.shape, dtype), Spec(b.shape, dtype)
    if isinstance(params, Matrices):
        product = matmul.plan(
            a.shape, a.stride(), b.shape, b.stride(), dtype, matmul.float32_precision(),
            device=a.get_device(),
        )  # fmt: skip
        return params._replace(specs=specs, plan=product)
    rank = max(a.dim(), b.dim())
    dims = tuple([rank + d for d in params.dims])
    device = a.get_device()
    total = reduction.plan(reduction.PRODUCT, shapes, strides, dims, False, dtype, device)
    return params._replace(specs=specs, plan=total)


def read_sum(
    form: Form, added: Tensor, a: Tensor, b: Tensor, beta: Number, alpha: Number
) -> Params:
    """``read`` of ``alpha`` times a product of matrices with ``beta`` times a tensor added."""
    check_factors(beta, alpha)
    admit_alike(a, b, added)
    params = form(a.shape, a.stride(), b.shape, b.stride())
    assert isinstance(params, Matrices)
    shape = product_shape(a.shape, b.shape)
    check_fits(added.shape, shape[1:] if params.summed else shape)
    params = params._replace(alpha=alpha, beta=beta)
    if transforming():
        return params
    # What is not read has no strides either.
    read = matmul.Addend(added.shape, added.stride(), beta) if beta else None
    product = matmul.plan(
        a.shape, a.stride(), b.shape, b.stride(), a.dtype, matmul.float32_precision(), alpha, read,
        summed=params.summed, device=a.get_device(),
    )  # fmt: skip
    return params._replace(
        specs=tuple([Spec(t.shape, t.dtype) for t in (a, b, added)]), plan=product
    )


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


def admit_alike(*tensors: Tensor, promoting: bool = False) -> None:
    """Raise Unsupported unless ``tensors`` are memory of one floating dtype on one device;
    ``promoting``: of any floating dtypes."""
    for t in tensors:
        admit(t)
    first = tensors[0]
    for t in tensors:
        if t.dtype not in FLOATING:
            raise Unsupported(f"dtype {str(t.dtype).removeprefix('torch.')}")
        if t.dtype is not first.dtype and not promoting:
            raise Unsupported("operands of different dtypes")
        if t.get_device() != first.get_device():
            raise Unsupported("tensors on different devices")
