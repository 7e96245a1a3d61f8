"""Products of tensors that other ops add up to: ``outer``, ``kron``, ``inner``, ``tensordot``, and
chains of matrices.

Composites: views, a product of ours, views. A reshape copies only where no strides describe it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..op import Tensors, Unsupported
from ..sampling import Make, Sample
from .composite import POINTWISE, composite
from .contraction import GEMM, REDUCTION
from .factors import admit_alike
from .operands import bind_tensors


def _refuse_out(out: Any) -> None:
    if out is not None:
        raise Unsupported("out=")


# ------------------------------------------------------------------------ elementwise of two views


def _bind_outer(input: Tensor, vec2: Tensor) -> tuple[Tensors, None]:
    if not isinstance(input, Tensor) or not isinstance(vec2, Tensor):
        raise Unsupported("not two tensors")
    if input.dim() != 1 or vec2.dim() != 1:
        raise Unsupported("not two vectors")
    column = input.unsqueeze(1)
    bind_tensors(column, vec2)
    return (column, vec2), None


def _bind_kron(input: Tensor, other: Tensor) -> tuple[Tensors, torch.Size]:
    if not isinstance(input, Tensor) or not isinstance(other, Tensor):
        raise Unsupported("not two tensors")
    rank = max(input.dim(), other.dim())
    left = (1,) * (rank - input.dim()) + tuple(input.shape)
    right = (1,) * (rank - other.dim()) + tuple(other.shape)
    # Each dimension as a pair: that of the left and that of the right.
    x = input.reshape([n for size in left for n in (size, 1)])
    y = other.reshape([n for size in right for n in (1, size)])
    bind_tensors(x, y)
    return (x, y), torch.Size([m * n for m, n in zip(left, right, strict=True)])


# ----------------------------------------------------------------- contractions over several dims


class Contracted(NamedTuple):
    """Which dimensions of two tensors are summed over, pairwise; none negative."""

    left: tuple[int, ...]
    right: tuple[int, ...]


def _bind_inner(input: Tensor, other: Tensor) -> tuple[Tensors, None]:
    admit_alike(input, other)
    if input.dim() and other.dim() and input.shape[-1] != other.shape[-1]:
        raise Unsupported("inner sizes differ")
    return (input, other), None


def _inner(params: None, x: Tensor, y: Tensor) -> Tensor:
    if x.dim() and y.dim():
        return _tensordot(Contracted((x.dim() - 1,), (y.dim() - 1,)), x, y)
    return x * y


def _bind_tensordot(
    a: Tensor, b: Tensor, dims: Any = 2, out: Tensor | None = None
) -> tuple[Tensors, Contracted]:
    _refuse_out(out)
    admit_alike(a, b)
    if isinstance(dims, Tensor):
        dims = dims.tolist() if dims.numel() > 1 else dims.item()
    if type(dims) is int:
        if not 0 <= dims <= min(a.dim(), b.dim()):
            raise Unsupported("more dims than an operand has")
        dims = range(a.dim() - dims, a.dim()), range(dims)
    if not isinstance(dims, (tuple, list)) or len(dims) != 2:
        raise Unsupported("dims is neither a number nor a pair of lists")
    if not all(isinstance(d, (tuple, list, range)) for d in dims):
        raise Unsupported("dims is not a pair of lists")
    found = Contracted(_dims(dims[0], a.dim()), _dims(dims[1], b.dim()))
    if len(found.left) != len(found.right):
        raise Unsupported("not as many dims of one operand as of the other")
    for i, j in zip(*found, strict=True):
        if a.shape[i] != b.shape[j] and 1 not in (a.shape[i], b.shape[j]):
            raise Unsupported("contracted sizes differ")
    return (a, b), found


def _dims(dims: Sequence[Any], rank: int) -> tuple[int, ...]:
    if not all(type(d) is int and -rank <= d < rank for d in dims):
        raise Unsupported("dim out of range")
    found = tuple([d % rank for d in dims])
    if len(set(found)) < len(found):
        raise Unsupported("a dim twice")
    return found


def _tensordot(dims: Contracted, x: Tensor, y: Tensor) -> Tensor:
    for i, j in zip(*dims, strict=True):
        # Where one is broadcast, the other is summed before.
        if x.shape[i] == 1 != y.shape[j]:
            y = y.sum(j, keepdim=True)
        elif y.shape[j] == 1 != x.shape[i]:
            x = x.sum(i, keepdim=True)
    rows = [d for d in range(x.dim()) if d not in dims.left]
    columns = [d for d in range(y.dim()) if d not in dims.right]
    depth = math.prod([x.shape[d] for d in dims.left])
    shape = [x.shape[d] for d in rows], [y.shape[d] for d in columns]
    x, y = _permuted(x, (*rows, *dims.left)), _permuted(y, (*dims.right, *columns))
    if not rows and not columns:
        return torch.dot(_reshaped(x, [depth]), _reshaped(y, [depth]))
    x = _reshaped(x, [math.prod(shape[0]), depth])
    y = _reshaped(y, [depth, math.prod(shape[1])])
    return _reshaped(torch.mm(x, y), shape[0] + shape[1])


def _permuted(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x if dims == tuple(range(x.dim())) else x.permute(dims)


def _reshaped(x: Tensor, shape: list[int]) -> Tensor:
    return x if list(x.shape) == shape else x.reshape(shape)


# --------------------------------------------------------------------------------------- in chains


Tree = int | tuple["Tree", "Tree"]
"""In which order a chain is multiplied: a number of a matrix, or two products."""


class Chain(NamedTuple):
    """The order of a chain, and the shape of its product, which is no matrix where an end of the
    chain is a vector."""

    order: Tree
    shape: torch.Size


@cache
def cheapest(sizes: tuple[int, ...]) -> Tree:
    """The order that takes the fewest multiplications; matrix i is ``sizes[i]`` by ``sizes[i+1]``.

    Cormen, Leiserson, Rivest, Stein, Introduction to Algorithms, "Matrix-chain multiplication".
    """

    @cache
    def best(first: int, last: int) -> tuple[int, Tree]:
        if first == last:
            return 0, first
        found = []
        for k in range(first, last):
            (before, left), (after, right) = best(first, k), best(k + 1, last)
            here = sizes[first] * sizes[k + 1] * sizes[last + 1]
            found.append((before + after + here, (left, right)))
        return min(found, key=lambda pair: pair[0])

    return best(0, len(sizes) - 2)[1]


def _chain(matrices: Sequence[Tensor], shape: torch.Size) -> Chain:
    for left, right in itertools.pairwise(matrices):
        if left.shape[1] != right.shape[0]:
            raise Unsupported("inner sizes differ")
    order = cheapest((*[m.shape[0] for m in matrices], matrices[-1].shape[1]))
    return Chain(order, shape)


def _admit_chain(tensors: Sequence[Tensor]) -> None:
    if len(tensors) < 2:
        raise Unsupported("fewer than two matrices")
    admit_alike(*tensors)


def _bind_chain_matmul(*matrices: Tensor, out: Tensor | None = None) -> tuple[Tensors, Chain]:
    _refuse_out(out)
    _admit_chain(matrices)
    if any(m.dim() != 2 for m in matrices):
        raise Unsupported("not matrices")
    return matrices, _chain(matrices, torch.Size((matrices[0].shape[0], matrices[-1].shape[1])))


def _bind_multi_dot(tensors: Sequence[Tensor]) -> tuple[Tensors, Chain]:
    if not isinstance(tensors, (tuple, list)):
        raise Unsupported("not a list of tensors")
    _admit_chain(tensors)
    first, *inner, last = tensors
    if not {first.dim(), last.dim()} <= {1, 2} or any(m.dim() != 2 for m in inner):
        raise Unsupported("not matrices, nor vectors at the ends")
    shape = torch.Size((*first.shape[:-1], *last.shape[1:]))
    first = first.unsqueeze(0) if first.dim() == 1 else first
    last = last.unsqueeze(1) if last.dim() == 1 else last
    matrices = (first, *inner, last)
    return matrices, _chain(matrices, shape)


def _multiply_chain(params: Chain, *matrices: Tensor) -> Tensor:
    def product(tree: Tree) -> Tensor:
        if isinstance(tree, int):
            return matrices[tree]
        return torch.mm(product(tree[0]), product(tree[1]))

    return product(params.order).reshape(params.shape)


# ----------------------------------------------------------------------------------------- samples


def _outer_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3), make(4)), {}, "small")
    yield Sample((make(40), make(33)), {}, "past one block")
    yield Sample((make(6)[::2], make(4, 2)[:, 1]), {}, "strided")
    yield Sample((make(0), make(4)), {}, "empty")


def _kron_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(2, 3), make(3, 2)), {}, "small")
    yield Sample((make(3), make(2, 1, 2)), {}, "other ranks")
    yield Sample((make(5, 7), make(6, 6)), {}, "past one block")
    yield Sample((make(3, 4)[:, ::2], make(2, 4)[:, ::2]), {}, "strided")
    yield Sample((make(), make(2, 3)), {}, "0-dim")
    yield Sample((make(2, 0), make(3, 2)), {}, "empty")


def _inner_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(5), make(5)), {}, "vectors")
    yield Sample((make(3, 5), make(5)), {}, "matrix and vector")
    yield Sample((make(2, 3, 5), make(4, 5)), {}, "higher rank")
    yield Sample((make(18, 67), make(35, 67)), {}, "past one tile")
    yield Sample((make(5, 3).t(), make(5, 4).t()), {}, "transposed")
    yield Sample((make(), make(2, 3)), {}, "0-dim")
    yield Sample((make(3, 0), make(4, 0)), {}, "nothing to sum")


def _tensordot_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 4), make(4, 5)), {"dims": 1}, "one dim")
    yield Sample((make(2, 3, 4), make(3, 4, 2)), {}, "two dims")
    yield Sample((make(3, 2), make(4)), {"dims": 0}, "no dim")
    yield Sample((make(2, 3, 4), make(4, 5, 2)), {"dims": ([0, -1], [2, 0])}, "pairs")
    yield Sample((make(3, 4), make(3, 4)), {}, "all")
    yield Sample((make(3, 4), make(1, 5)), {"dims": ([1], [0])}, "broadcast")
    yield Sample((make(18, 67), make(67, 35)), {"dims": 1}, "past one tile")
    yield Sample((make(3, 0), make(0, 4)), {"dims": 1}, "nothing to sum")


def _chain_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 4), make(4, 2)), {}, "two")
    yield Sample((make(4, 3), make(3, 5), make(5, 2)), {}, "three")
    yield Sample((make(2, 5), make(3, 5).t(), make(3, 4), make(4, 2)), {}, "four, one transposed")
    yield Sample((make(3, 0), make(0, 4), make(4, 2)), {}, "nothing to sum")


def _multi_dot_samples(make: Make) -> Iterator[Sample]:
    for args, _, note in _chain_samples(make):
        yield Sample((list(args),), {}, note)
    yield Sample(([make(3), make(3, 5), make(5)],), {}, "vectors at the ends")
    yield Sample(([make(4), make(4)],), {}, "two vectors")
    yield Sample(([make(18, 67), make(67, 35), make(35, 3)],), {}, "past one tile")


# ------------------------------------------------------------------------------------------- TABLE

T = Tensor

composite(
    "outer", torch.outer, torch.ger, T.outer, T.ger,
    bind=_bind_outer, value=lambda params, column, row: column * row,
    kernels=POINTWISE, formula="dx = g @ y; dy = g.T @ x", samples=_outer_samples,
)  # fmt: skip
composite(
    "kron", torch.kron, T.kron,
    bind=_bind_kron, value=lambda shape, x, y: (x * y).reshape(shape),
    kernels=POINTWISE, formula="a product of views: dx = sum of g * y over blocks; dy likewise",
    samples=_kron_samples,
)  # fmt: skip
composite(
    "inner", torch.inner, T.inner,
    bind=_bind_inner, value=_inner,
    kernels=GEMM + REDUCTION, formula="dx = g @ y; dy = g.T @ x", samples=_inner_samples,
    autocast={"cuda": "promote"},  # torch's is tensordot
)  # fmt: skip
composite(
    "tensordot", torch.tensordot,
    bind=_bind_tensordot, value=_tensordot,
    kernels=GEMM + REDUCTION, formula="dx = g @ y.T; dy = x.T @ g, of x and y seen as matrices",
    samples=_tensordot_samples, autocast={"cuda": "promote"},
)  # fmt: skip
composite(
    "chain_matmul", torch.chain_matmul,
    bind=_bind_chain_matmul, value=_multiply_chain,
    kernels=GEMM + REDUCTION, formula="those of each product in the cheapest order",
    samples=_chain_samples, autocast={"cuda": "lower"}, opinfo=(),
)  # fmt: skip
composite(
    "multi_dot", torch.linalg.multi_dot,
    bind=_bind_multi_dot, value=_multiply_chain,
    kernels=GEMM + REDUCTION, formula="those of each product in the cheapest order",
    samples=_multi_dot_samples, autocast={"cuda": "lower"}, opinfo=("linalg.multi_dot",),
)  # fmt: skip
