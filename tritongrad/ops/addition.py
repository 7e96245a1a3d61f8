"""Products added to a tensor: ``beta * input + alpha * product``, where a ``beta`` of 0 means that
``input`` counts for nothing, not even its NaN.

``addmm``, ``baddbmm`` and ``addbmm``, which sums over its batch too, are one product of matrices
each, with what is added in its epilogue; ``addmv`` is ``addmm`` of views, which of one column is a
reduction; ``addr`` is pointwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..dtypes import Number
from ..kernels import arithmetic
from ..op import Tensors, Unsupported, register
from ..sampling import Make, Sample
from .arithmetic import scaled
from .composite import POINTWISE, composite
from .contraction import GEMM, REDUCTION, product
from .factors import Params, admit_alike, check_factors, check_fits, read_sum
from .matmul import LOWER, bmm_form, mm_form, summed_form
from .rows import row
from .signatures import bind_addr


class Factors(NamedTuple):
    """What the parts of a sum are multiplied with."""

    beta: Number
    alpha: Number


def _bind_addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Number = 1, alpha: Number = 1
) -> tuple[Tensors, Params]:
    return (mat1, mat2, input), read_sum(mm_form, input, mat1, mat2, beta, alpha)


def _bind_baddbmm(
    input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: Number = 1, alpha: Number = 1
) -> tuple[Tensors, Params]:
    return (batch1, batch2, input), read_sum(bmm_form, input, batch1, batch2, beta, alpha)


def _bind_addmv(
    input: Tensor, mat: Tensor, vec: Tensor, *, beta: Number = 1, alpha: Number = 1
) -> tuple[Tensors, Factors]:
    admit_alike(mat, vec, input)
    check_factors(beta, alpha)
    if mat.dim() != 2 or vec.dim() != 1 or mat.shape[1] != vec.shape[0]:
        raise Unsupported("not a matrix and a vector that fit")
    check_fits(input.shape, mat.shape[:1])
    if not mat.shape[0] and input.shape != mat.shape[:1]:
        raise Unsupported("no rows, for which torch does not expand the input")
    return (input, mat, vec), Factors(beta, alpha)


def _addmv(factors: Factors, input: Tensor, mat: Tensor, vec: Tensor) -> Tensor:
    column = torch.addmm(input.unsqueeze(-1), mat, vec.unsqueeze(-1), **factors._asdict())
    return column.squeeze(-1)


def _bind_addbmm(
    input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: Number = 1, alpha: Number = 1
) -> tuple[Tensors, Params]:
    return (batch1, batch2, input), read_sum(summed_form, input, batch1, batch2, beta, alpha)


# ----------------------------------------------------------------------------------------- samples


def _addmm_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 4), make(3, 5), make(5, 4)), {}, "small")
    yield Sample((make(3, 4), make(3, 5), make(5, 4)), {"beta": 0.6, "alpha": -2}, "factors")
    yield Sample((make(4), make(3, 5), make(5, 4)), {}, "a row added")
    yield Sample((make(3, 1), make(3, 5), make(5, 4)), {}, "a column added")
    yield Sample((make(), make(3, 5), make(5, 4)), {}, "a number added")
    yield Sample((make(3, 4), make(3, 5), make(5, 4)), {"beta": 0}, "nothing added")
    yield Sample((make(18, 35), make(18, 67), make(67, 35)), {}, "past one tile")
    yield Sample((make(4, 3).t(), make(5, 3).t(), make(5, 8)[:, ::2]), {}, "strided")
    yield Sample((make(3, 4), make(3, 0), make(0, 4)), {"beta": 0.5}, "nothing to sum")
    yield Sample((make(0, 4), make(0, 5), make(5, 4)), {}, "no rows")


def _baddbmm_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(2, 2, 4), make(2, 2, 3), make(2, 3, 4)), {}, "small")
    yield Sample(
        (make(2, 2, 4), make(2, 2, 3), make(2, 3, 4)), {"beta": 0.6, "alpha": 2}, "factors"
    )
    yield Sample((make(2, 1), make(3, 2, 3), make(3, 3, 4)), {}, "broadcast")
    yield Sample((make(2, 1, 4), make(2, 2, 3), make(2, 3, 4)), {}, "rows added")
    yield Sample((make(2, 2, 4), make(2, 2, 3), make(2, 3, 4)), {"beta": 0}, "nothing added")
    yield Sample((make(2, 18, 19), make(2, 18, 5), make(2, 5, 19)), {}, "past one tile")
    yield Sample((make(2, 4, 2).mT, make(2, 3, 2).mT, make(2, 4, 3).mT), {}, "transposed")
    yield Sample((make(2, 2, 4), make(2, 2, 0), make(2, 0, 4)), {}, "nothing to sum")


def _addmv_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3), make(3, 5), make(5)), {}, "small")
    yield Sample((make(3), make(3, 5), make(5)), {"beta": 0.6, "alpha": -2}, "factors")
    yield Sample((make(3), make(3, 5), make(5)), {"beta": 0}, "nothing added")
    yield Sample((make(37), make(37, 67), make(67)), {}, "past one tile")
    yield Sample((make(6)[::2], make(5, 3).t(), make(5, 2)[:, 0]), {}, "strided")
    yield Sample((make(3), make(3, 0), make(0)), {}, "nothing to sum")


def _addbmm_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(2, 4), make(2, 2, 3), make(2, 3, 4)), {}, "small")
    yield Sample((make(2, 4), make(2, 2, 3), make(2, 3, 4)), {"beta": 0.6, "alpha": 2}, "factors")
    yield Sample((make(4), make(2, 2, 3), make(2, 3, 4)), {"beta": 0}, "nothing added")
    yield Sample((make(18, 19), make(2, 18, 35), make(2, 35, 19)), {}, "past one tile")
    yield Sample((make(4, 2).t(), make(2, 3, 2).mT, make(2, 4, 3).mT), {}, "transposed")
    yield Sample((make(2, 4), make(0, 2, 3), make(0, 3, 4)), {}, "nothing to sum")


def _addr_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 4), make(3), make(4)), {}, "small")
    yield Sample((make(3, 4), make(3), make(4)), {"beta": 0.6, "alpha": -2}, "factors")
    yield Sample((make(4), make(3), make(4)), {}, "a row added")
    yield Sample((make(3, 4), make(3), make(4)), {"beta": 0}, "nothing added")
    yield Sample((make(33, 35), make(33), make(35)), {}, "past one block")
    yield Sample((make(4, 3).t(), make(6)[::2], make(4, 2)[:, 1]), {}, "strided")
    yield Sample((make(0, 4), make(0), make(4)), {}, "empty")


# ------------------------------------------------------------------------------------------- TABLE

T = Tensor
ADDITION = GEMM + REDUCTION + POINTWISE

register(product(
    "addmm", torch.addmm, T.addmm,
    bind=_bind_addmm, kernels=ADDITION, backward_kernels=ADDITION,
    formula="dx = beta * g; da = alpha * g @ b.T; db = alpha * a.T @ g",
    samples=_addmm_samples, autocast=LOWER, opinfo=("addmm",),
))  # fmt: skip
register(product(
    "baddbmm", torch.baddbmm, T.baddbmm,
    bind=_bind_baddbmm, kernels=ADDITION, backward_kernels=ADDITION,
    formula="dx = beta * g; da = alpha * g @ b.mT; db = alpha * a.mT @ g",
    samples=_baddbmm_samples, autocast=LOWER, opinfo=("baddbmm",),
))  # fmt: skip
composite(
    "addmv", torch.addmv, T.addmv,
    bind=_bind_addmv, value=_addmv,
    kernels=REDUCTION + POINTWISE,
    formula="dx = beta * g; da = alpha * outer(g, v); dv = alpha * a.T @ g",
    samples=_addmv_samples, autocast={"cpu": "keep", "cuda": "lower"},
)  # fmt: skip
register(product(
    "addbmm", torch.addbmm, T.addbmm,
    bind=_bind_addbmm, kernels=ADDITION, backward_kernels=ADDITION,
    formula="dx = beta * g; da = alpha * g @ b.mT; db = alpha * a.mT @ g",
    samples=_addbmm_samples, autocast=LOWER, opinfo=("addbmm",),
))  # fmt: skip
row(
    arithmetic, "addr", torch.addr, T.addr,
    bind=bind_addr,
    inputs=("x", "y", "z"),
    consts=("beta", "alpha"),
    rules={
        "x": lambda g, beta: scaled(g, beta),
        "y": lambda g, z, alpha: g * z * alpha,
        "z": lambda g, y, alpha: g * y * alpha,
    },
    samples=_addr_samples,
    autocast={"cuda": "lower"},
)  # fmt: skip
