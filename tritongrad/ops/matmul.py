"""Products of matrices and vectors: ``dot``, ``mv``, ``mm``, ``bmm`` and ``matmul``.

Every call becomes one of the two forms of ``contraction``, which has their calculus.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..admission import admit
from ..layout import Strides, broadcasts
from ..op import Tensors, Unsupported, register
from ..sampling import Make, Sample
from .contraction import GEMM, REDUCTION, VECTOR_BACKWARD, product
from .factors import INNER, Matrices, Params, is_transposed, read

# ---------------------------------------------------------------------- reading torch's signatures


def _dot(a: torch.Size, a_strides: Strides, b: torch.Size, b_strides: Strides) -> Params:
    if len(a) != 1 or a != b:
        raise Unsupported("not two vectors of one size")
    return INNER


def _vecdot(a: torch.Size, a_strides: Strides, b: torch.Size, b_strides: Strides) -> Params:
    return INNER


def _mv(a: torch.Size, a_strides: Strides, b: torch.Size, b_strides: Strides) -> Params:
    if len(a) != 2 or len(b) != 1 or a[1] != b[0]:
        raise Unsupported("not a matrix and a vector that fit")
    return INNER


def _matrices(a: torch.Size, a_strides: Strides, b: torch.Size, b_strides: Strides) -> Params:
    if a[-1] != b[-2]:
        raise Unsupported("inner sizes differ")
    return Matrices(is_transposed(a_strides), is_transposed(b_strides))


def mm_form(a: torch.Size, a_strides: Strides, b: torch.Size, b_strides: Strides) -> Params:
    if not len(a) == len(b) == 2:
        raise Unsupported("not two matrices")
    return _matrices(a, a_strides, b, b_strides)


def bmm_form(a: torch.Size, a_strides: Strides, b: torch.Size, b_strides: Strides) -> Params:
    if not len(a) == len(b) == 3 or a[0] != b[0]:
        raise Unsupported("not two batches of one size")
    return _matrices(a, a_strides, b, b_strides)


def summed_form(a: torch.Size, a_strides: Strides, b: torch.Size, b_strides: Strides) -> Params:
    params = bmm_form(a, a_strides, b, b_strides)
    assert isinstance(params, Matrices)
    return params._replace(summed=True)


def _matmul(a: torch.Size, a_strides: Strides, b: torch.Size, b_strides: Strides) -> Params:
    if not a or not b:
        raise Unsupported("0-dim operand")
    if len(b) == 1:
        if a[-1] != b[0]:
            raise Unsupported("inner sizes differ")
        return INNER
    if not broadcasts(a[:-2] or (1,), b[:-2] or (1,)):
        raise Unsupported("batches do not broadcast")
    return _matrices(a, a_strides, b, b_strides)


def _bind_dot(input: Tensor, tensor: Tensor) -> tuple[Tensors, Params]:
    return (input, tensor), read(_dot, input, tensor)


def _bind_vecdot(x: Tensor, y: Tensor, *, dim: int = -1) -> tuple[Tensors, Params]:
    admit(x)
    admit(y)
    rank = max(x.dim(), y.dim())
    if type(dim) is not int or not -rank <= dim < rank:
        raise Unsupported("dim is no dimension of the product")
    if x.dim() == y.dim() == 1:
        return (x, y), read(_dot, x, y)
    dim = dim % rank - rank
    if not broadcasts(x.shape, y.shape):
        raise Unsupported("shapes do not broadcast")
    if min(x.dim(), y.dim()) < -dim or x.shape[dim] != y.shape[dim]:
        x, y = torch.broadcast_tensors(x, y)
    if dim != -1:
        x, y = x.movedim(dim, -1), y.movedim(dim, -1)
    return (x, y), read(_vecdot, x, y)


def _bind_mv(input: Tensor, vec: Tensor) -> tuple[Tensors, Params]:
    return (input, vec), read(_mv, input, vec)


def _bind_mm(input: Tensor, mat2: Tensor) -> tuple[Tensors, Params]:
    return (input, mat2), read(mm_form, input, mat2)


def _bind_bmm(input: Tensor, mat2: Tensor) -> tuple[Tensors, Params]:
    return (input, mat2), read(bmm_form, input, mat2)


def _bind_matmul(input: Tensor, other: Tensor) -> tuple[Tensors, Params]:
    if isinstance(input, Tensor) and isinstance(other, Tensor) and input.dim() == 1 < other.dim():
        # A row times a matrix is the transposed matrix times a column.
        input, other = other.mT, input
    return (input, other), read(_matmul, input, other)


def _bind_rmatmul(self: Tensor, other: Tensor) -> tuple[Tensors, Params]:
    return _bind_matmul(other, self)


# ----------------------------------------------------------------------------------------- samples


def _dot_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(5), make(5)), {}, "small")
    yield Sample((make(1031), make(1031)), {}, "past one block")
    yield Sample((make(12)[::3], make(4, 2)[:, 1]), {}, "strided")
    yield Sample((make(1).expand(4), make(4)), {}, "expanded")
    yield Sample((make(0), make(0)), {}, "empty")


def _vecdot_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 5), make(3, 5)), {}, "small")
    yield Sample((make(4, 3), make(4, 3)), {"dim": 0}, "columns")
    yield Sample((make(2, 3, 5), make(3, 1)), {}, "broadcast")
    yield Sample((make(5), make(5)), {}, "vectors")
    yield Sample((make(2, 1031), make(1031)), {}, "past one block")
    yield Sample((make(5, 3).t(), make(3, 10)[:, ::2]), {}, "strided")
    yield Sample((make(3, 0), make(3, 0)), {}, "nothing to sum")
    yield Sample((make(0, 4), make(4)), {}, "no rows")


def _mv_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 5), make(5)), {}, "small")
    yield Sample((make(37, 130), make(130)), {}, "past one tile")
    yield Sample((make(5, 3).t(), make(5)), {}, "transposed")
    yield Sample((make(4, 10)[:, ::2], make(5, 2)[:, 0]), {}, "strided")
    yield Sample((make(3, 0), make(0)), {}, "no columns")
    yield Sample((make(0, 4), make(4)), {}, "no rows")


def _mm_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 5), make(5, 4)), {}, "small")
    yield Sample((make(18, 67), make(67, 35)), {}, "past one tile in each dimension")
    yield Sample((make(32, 64), make(64, 32)), {}, "whole tiles")
    yield Sample((make(5, 3).t(), make(4, 5).t()), {}, "transposed")
    yield Sample((make(6, 5)[::2], make(5, 8)[:, 1::2]), {}, "strided")
    yield Sample((make(1, 5).expand(3, -1), make(5, 1).expand(-1, 4)), {}, "expanded")
    yield Sample((make(1, 6), make(6, 1)), {}, "one row, one column")
    yield Sample((make(3, 0), make(0, 4)), {}, "nothing to sum")
    yield Sample((make(0, 5), make(5, 4)), {}, "no rows")


def _bmm_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(2, 2, 3), make(2, 3, 2)), {}, "small")
    yield Sample((make(2, 18, 5), make(2, 5, 19)), {}, "past one tile")
    yield Sample((make(2, 5, 3).mT, make(2, 4, 5).mT), {}, "transposed")
    yield Sample((make(3, 2, 5).transpose(0, 1), make(5, 2, 4).transpose(0, 1)), {}, "batch inside")
    yield Sample((make(1, 3, 5).expand(2, -1, -1), make(2, 5, 4)), {}, "expanded")
    yield Sample((make(2, 3, 0), make(2, 0, 4)), {}, "nothing to sum")
    yield Sample((make(0, 3, 5), make(0, 5, 4)), {}, "no batch")


def _matmul_samples(make: Make) -> Iterator[Sample]:
    operands = {1: (5,), 2: (3, 5), 3: (2, 3, 5), 4: (2, 1, 3, 5)}
    others = {1: (5,), 2: (5, 4), 3: (2, 5, 4), 4: (1, 2, 5, 4)}
    for a, left in operands.items():
        for b, right in others.items():
            yield Sample((make(*left), make(*right)), {}, f"ranks {a} and {b}")
    yield Sample((make(2, 18, 67), make(67, 19)), {}, "past one tile in each dimension")
    yield Sample((make(3, 2, 5).transpose(0, 1), make(5, 4)), {}, "rows that do not fold")
    yield Sample((make(2, 3, 4, 5), make(2, 3, 6, 5).mT), {}, "query times transposed key")
    yield Sample((make(2, 3, 0), make(0, 4)), {}, "nothing to sum")
    yield Sample((make(2, 0, 5), make(2, 5, 4)), {}, "no rows")


# ------------------------------------------------------------------------------------------- TABLE

T = Tensor
LOWER = {"cpu": "lower", "cuda": "lower"}

register(product(
    "dot", torch.dot, T.dot,
    bind=_bind_dot, kernels=REDUCTION, backward_kernels=VECTOR_BACKWARD[:2],
    formula="dx = g * y; dy = g * x",
    samples=_dot_samples, autocast={"cuda": "promote"}, opinfo=("dot",),
))  # fmt: skip
register(product(
    "vdot", torch.vdot, T.vdot,
    bind=_bind_dot, kernels=REDUCTION, backward_kernels=VECTOR_BACKWARD[:2],
    formula="dx = g * y; dy = g * x",
    samples=_dot_samples, autocast={"cuda": "promote"}, opinfo=("vdot",),
))  # fmt: skip
register(product(
    "vecdot", torch.linalg.vecdot,
    bind=_bind_vecdot, kernels=REDUCTION, backward_kernels=VECTOR_BACKWARD,
    formula="dx = g * y; dy = g * x, each summed to its shape",
    samples=_vecdot_samples, autocast=LOWER, opinfo=("linalg.vecdot",),
))  # fmt: skip
register(product(
    "mv", torch.mv, T.mv,
    bind=_bind_mv, kernels=REDUCTION, backward_kernels=VECTOR_BACKWARD,
    formula="da = outer(g, x); dx = a.T @ g",
    samples=_mv_samples, autocast={"cuda": "lower"}, opinfo=("mv",),
))  # fmt: skip
register(product(
    "mm", torch.mm, T.mm,
    bind=_bind_mm, kernels=GEMM + REDUCTION, backward_kernels=GEMM + REDUCTION,
    formula="da = g @ b.T; db = a.T @ g",
    samples=_mm_samples, autocast=LOWER, opinfo=("mm",),
))  # fmt: skip
register(product(
    "bmm", torch.bmm, T.bmm,
    bind=_bind_bmm, kernels=GEMM + REDUCTION, backward_kernels=GEMM + REDUCTION,
    formula="da = g @ b.mT; db = a.mT @ g",
    samples=_bmm_samples, autocast=LOWER, opinfo=("bmm",),
))  # fmt: skip
register(product(
    "matmul", torch.matmul, torch.linalg.matmul, T.matmul, T.__matmul__,
    bind=_bind_matmul, variants={T.__rmatmul__: _bind_rmatmul},
    kernels=GEMM + REDUCTION, backward_kernels=GEMM + VECTOR_BACKWARD,
    formula="da = g @ b.mT; db = a.mT @ g, each summed over the batch it was broadcast along",
    samples=_matmul_samples, autocast=LOWER, opinfo=("matmul", "__rmatmul__"),
))  # fmt: skip
