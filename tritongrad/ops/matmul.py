"""Products of matrices and vectors.

Two forms cover every rank. Where both operands are matrices, or batches of them, the call is

    out[..., m, n] = sum_k a[..., m, k] b[..., k, n]          ``Matrices``, the gemm kernel

and where one is a vector it is a sum of elementwise products, limited by memory alone,

    out[...] = sum_k x[..., k] y[..., k]                      ``Sum``, the reduction kernel

Both are linear in each operand, so every derivative of a product is again such a product: the rules
below call the ops themselves, and orders and transforms need nothing further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import FLOATING
from ..function import admit, apply, settle
from ..launchers.matmul import matrix_product
from ..launchers.reduction import reduce_product
from ..layout import broadcast_shape, broadcasts
from ..op import Bind, Needs, Op, Spec, Tensors, Unsupported, register
from ..sampling import Make, Sample


class Matrices(NamedTuple):
    """A product of matrices. ``*_transposed``: the operand's columns are what lies dense in memory;
    its gradient is then laid out likewise, as torch's is."""

    a_transposed: bool
    b_transposed: bool


class Sum(NamedTuple):
    """A product of two operands that broadcast, summed over ``dims``, which count from the end."""

    dims: tuple[int, ...]


Params = Matrices | Sum

_MATRICES = tuple(Matrices(a, b) for a in (False, True) for b in (False, True))
_INNER = Sum((-1,))

# ---------------------------------------------------------------------- reading torch's signatures


def _admit_pair(a: Tensor, b: Tensor) -> None:
    """Raise Unsupported unless these multiply: two tensors of one floating dtype on one device."""
    admit(a)
    admit(b)
    if a.dtype not in FLOATING:
        raise Unsupported(f"dtype {str(a.dtype).removeprefix('torch.')}")
    if a.dtype is not b.dtype:
        raise Unsupported("operands of different dtypes")
    if a.device != b.device:
        raise Unsupported("tensors on different devices")


def _is_transposed(matrix: Tensor) -> bool:
    row, column = matrix.stride()[-2:]
    return row == 1 != column


def _matrices(a: Tensor, b: Tensor) -> tuple[Tensors, Matrices]:
    if a.shape[-1] != b.shape[-2]:
        raise Unsupported("inner sizes differ")
    return (a, b), _MATRICES[2 * _is_transposed(a) + _is_transposed(b)]


def _bind_dot(input: Tensor, tensor: Tensor) -> tuple[Tensors, Params]:
    _admit_pair(input, tensor)
    if not input.dim() == tensor.dim() == 1 or input.shape != tensor.shape:
        raise Unsupported("not two vectors of one size")
    return (input, tensor), _INNER


def _bind_mv(input: Tensor, vec: Tensor) -> tuple[Tensors, Params]:
    _admit_pair(input, vec)
    if input.dim() != 2 or vec.dim() != 1 or input.shape[1] != vec.shape[0]:
        raise Unsupported("not a matrix and a vector that fit")
    return (input, vec), _INNER


def _bind_mm(input: Tensor, mat2: Tensor) -> tuple[Tensors, Params]:
    _admit_pair(input, mat2)
    if not input.dim() == mat2.dim() == 2:
        raise Unsupported("not two matrices")
    return _matrices(input, mat2)


def _bind_bmm(input: Tensor, mat2: Tensor) -> tuple[Tensors, Params]:
    _admit_pair(input, mat2)
    if not input.dim() == mat2.dim() == 3 or input.shape[0] != mat2.shape[0]:
        raise Unsupported("not two batches of one size")
    return _matrices(input, mat2)


def _bind_matmul(input: Tensor, other: Tensor) -> tuple[Tensors, Params]:
    _admit_pair(input, other)
    if input.dim() == 0 or other.dim() == 0:
        raise Unsupported("0-dim operand")
    if input.dim() == 1 != other.dim():
        # A row times a matrix is the transposed matrix times a column.
        input, other = other.mT, input
    if other.dim() == 1:
        if input.shape[-1] != other.shape[0]:
            raise Unsupported("inner sizes differ")
        return (input, other), _INNER
    if not broadcasts(input.shape[:-2] or (1,), other.shape[:-2] or (1,)):
        raise Unsupported("batches do not broadcast")
    return _matrices(input, other)


def _bind_rmatmul(self: Tensor, other: Tensor) -> tuple[Tensors, Params]:
    return _bind_matmul(other, self)


def _bind_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensors, Params]:
    _admit_pair(input, weight)
    if weight.dim() != 2:
        raise Unsupported("weight is not a matrix")
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise Unsupported("inner sizes differ")
    if bias is not None:
        _admit_pair(weight, bias)
        if bias.shape != weight.shape[:1]:
            raise Unsupported("bias is not a vector of one number for each row of weight")
    return (input, weight, bias), _MATRICES[_is_transposed(weight)]


# ------------------------------------------------------------------------------------------- rules


def _forward(params: Params, a: Tensor, b: Tensor) -> Tensor:
    if isinstance(params, Matrices):
        return matrix_product(a, b)
    rank = max(a.dim(), b.dim())
    return reduce_product(a, b, tuple([rank + d for d in params.dims]), a.dtype)


# Each operand is the other's slope.
_KEPT = {
    (False, False): (),
    (False, True): (0,),
    (True, False): (1,),
    (True, True): (0, 1),
}


def _saves(params: Params, needs: Needs) -> tuple[int, ...]:
    return _KEPT[needs[0], needs[1]]


def _times(a: Tensor, b: Tensor, transposed: bool) -> Tensor:
    """``a @ b``, on request with its columns dense in memory."""
    return torch.matmul(b.mT, a.mT).mT if transposed else torch.matmul(a, b)


def _rows(tensor: Tensor) -> Tensor:
    """All dimensions but the last as one, also where there are none."""
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.unsqueeze(0)


def _sum_to(gradient: Tensor, shape: torch.Size) -> Tensor:
    """A gradient summed over what its operand was broadcast along."""
    if gradient.shape == shape:
        return gradient
    missing = gradient.dim() - len(shape)
    inner = [d for d, n in enumerate(shape, missing) if n == 1 != gradient.shape[d]]
    return gradient.sum([*range(missing), *inner], keepdim=True).reshape(shape)


def _matrices_rule(
    params: Matrices, needs: Needs, shapes: list[torch.Size], g: Tensor, a: Any, b: Any
) -> Tensors:
    da = db = None
    if needs[0]:
        da = _sum_to(_times(g, b.mT, params.a_transposed), shapes[0])
    if needs[1]:
        if shapes[1][:-2].numel() == 1:
            # One matrix for the whole batch: one product over all rows, not a sum of products.
            db = _times(_rows(a).mT, _rows(g), params.b_transposed).reshape(shapes[1])
        else:
            db = _sum_to(_times(a.mT, g, params.b_transposed), shapes[1])
    return da, db


def _with_dims(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """``tensor`` with dimensions of size 1 put in, whose places in the result ``dims`` are."""
    for d in sorted(dims, reverse=True):
        tensor = tensor.unsqueeze(d)
    return tensor


def _product_to(shape: torch.Size, x: Tensor, y: Tensor) -> Tensor:
    """``x * y`` summed to ``shape``."""
    full, rank = broadcast_shape((x, y)), len(shape)
    dims = tuple([-i for i in range(1, len(full) + 1) if i > rank or shape[-i] == 1 != full[-i]])
    if not dims:
        return torch.mul(x, y)
    return _with_dims(apply(MATMUL, Sum(dims), (x, y)), tuple([d for d in dims if -d <= rank]))


def _rule(
    params: Params, needs: Needs, specs: tuple[Spec | None, ...], grads: Tensors, saved: Tensors
) -> Tensors:
    g, a, b = grads[0], saved[0], saved[1]
    assert g is not None
    g = settle(g)
    shapes = [spec.shape for spec in specs if spec is not None]
    if isinstance(params, Matrices):
        return _matrices_rule(params, needs, shapes, g, a, b)
    g = _with_dims(g, params.dims)
    return tuple(
        _product_to(shape, g, other) if other is not None and need else None
        for need, shape, other in zip(needs, shapes, (b, a), strict=True)
    )


def _jvp(params: Params, tensors: Tensors, outputs: Tensors, tangents: Tensors) -> Tensor:
    (a, b), (da, db) = tensors, tangents
    if da is None:
        assert db is not None
        return apply(MATMUL, params, (a, settle(db)))
    tangent = apply(MATMUL, params, (settle(da), b))
    return tangent if db is None else tangent + apply(MATMUL, params, (a, settle(db)))


def _batch_first(tensor: Tensor, dim: int | None, rank: int) -> Tensor:
    """The dimension of vmap in front of ``rank`` others, so that operands of lower rank broadcast
    against it."""
    if dim is None:
        return tensor
    tensor = tensor.movedim(dim, 0)
    padding = rank + 1 - tensor.dim()
    return tensor.reshape(tensor.shape[0], *[1] * padding, *tensor.shape[1:]) if padding else tensor


def _vmap(info: Any, params: Params, tensors: Tensors, dims: tuple) -> tuple[Tensor, int]:
    # A batch of products is a product with one more dimension of batch.
    pairs = [(t, d) for t, d in zip(tensors, dims, strict=True) if t is not None]
    rank = max(t.dim() - (d is not None) for t, d in pairs)
    return apply(MATMUL, params, tuple([_batch_first(t, d, rank) for t, d in pairs])), 0


def _cost(params: Params, a: Tensor, b: Tensor) -> tuple[int, int]:
    depth = a.shape[-1]
    if isinstance(params, Matrices):
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]).numel()
        results = batch * a.shape[-2] * b.shape[-1]
    else:
        results = broadcast_shape((a, b)).numel() // max(depth, 1)
    return (a.numel() + b.numel() + results) * a.element_size(), 2 * results * depth


# ------------------------------------------------------------------------------------------ linear


def _linear_forward(params: Matrices, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dim() == 1:
        # In place: a view made inside a Function could not be modified in place by the user.
        return matrix_product(x.unsqueeze(0), weight.mT, bias).squeeze_(0)
    return matrix_product(x, weight.mT, bias)


def _linear_rule(
    params: Matrices, needs: Needs, specs: tuple[Spec | None, ...], grads: Tensors, saved: Tensors
) -> Tensors:
    g, x, weight = grads[0], saved[0], saved[1]
    assert g is not None
    g = settle(g)
    dx = dweight = dbias = None
    if needs[0]:
        assert weight is not None
        dx = torch.matmul(g, weight)
    if needs[1]:
        assert x is not None
        dweight = _times(_rows(g).mT, _rows(x), params.b_transposed)
    if needs[2]:
        dbias = _rows(g).sum(0)
    return dx, dweight, dbias


def _linear_jvp(params: Matrices, tensors: Tensors, outputs: Tensors, tangents: Tensors) -> Tensor:
    x, weight, _ = tensors
    dx, dweight, dbias = [t if t is None else settle(t) for t in tangents]
    # The bias' tangent is the bias of whichever product there is.
    if dx is not None:
        tangent = apply(LINEAR, params, (dx, weight, dbias))
        return tangent if dweight is None else tangent + apply(LINEAR, params, (x, dweight, None))
    if dweight is not None:
        return apply(LINEAR, params, (x, dweight, dbias))
    (out,) = outputs
    assert out is not None
    assert dbias is not None
    return dbias.expand(out.shape)


def _linear_vmap(info: Any, params: Matrices, tensors: Tensors, dims: tuple) -> tuple[Tensor, int]:
    x, weight, bias = tensors
    x_dim, weight_dim, bias_dim = dims
    assert x is not None
    assert weight is not None
    x = _batch_first(x, x_dim, x.dim() - (x_dim is not None))
    if weight_dim is None and bias_dim is None:
        return apply(LINEAR, params, (x, weight, bias)), 0
    if x_dim is None:
        x = x.unsqueeze(0)
    if weight_dim is None:
        out = apply(LINEAR, params, (x, weight, None))
    else:
        weight = weight.movedim(weight_dim, 0)
        rows = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)
        out = torch.matmul(rows, weight.mT)
        out = out.reshape(info.batch_size, *x.shape[1:-1], weight.shape[1])
    if bias is not None:
        out = out + _batch_first(bias, bias_dim, x.dim() - 1)
    return out, 0


def _linear_cost(
    params: Matrices, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[int, int]:
    columns, depth = weight.shape
    results = x.numel() // max(depth, 1) * columns
    elements = x.numel() + weight.numel() + results + (0 if bias is None else columns)
    return elements * x.element_size(), 2 * results * depth


# ----------------------------------------------------------------------------------------- samples


def _dot_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(5), make(5)), {}, "small")
    yield Sample((make(1031), make(1031)), {}, "past one block")
    yield Sample((make(12)[::3], make(4, 2)[:, 1]), {}, "strided")
    yield Sample((make(1).expand(4), make(4)), {}, "expanded")
    yield Sample((make(0), make(0)), {}, "empty")


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
    yield Sample((make(1, 5).expand(3, 5), make(5, 1).expand(5, 4)), {}, "expanded")
    yield Sample((make(1, 6), make(6, 1)), {}, "one row, one column")
    yield Sample((make(3, 0), make(0, 4)), {}, "nothing to sum")
    yield Sample((make(0, 5), make(5, 4)), {}, "no rows")


def _bmm_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(2, 3, 5), make(2, 5, 4)), {}, "small")
    yield Sample((make(2, 18, 5), make(2, 5, 19)), {}, "past one tile")
    yield Sample((make(2, 5, 3).mT, make(2, 4, 5).mT), {}, "transposed")
    yield Sample((make(3, 2, 5).transpose(0, 1), make(5, 2, 4).transpose(0, 1)), {}, "batch inside")
    yield Sample((make(1, 3, 5).expand(2, 3, 5), make(2, 5, 4)), {}, "expanded")
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


def _linear_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 5), make(4, 5)), {}, "without bias")
    yield Sample((make(3, 5), make(4, 5), make(4)), {}, "small")
    yield Sample((make(2, 3, 5), make(4, 5), make(4)), {}, "batch")
    yield Sample((make(5), make(4, 5), make(4)), {}, "vector")
    yield Sample((make(5), make(4, 5)), {"bias": None}, "vector without bias")
    yield Sample((make(18, 67), make(35, 67), make(35)), {}, "past one tile in each dimension")
    yield Sample((make(3, 2, 5).transpose(0, 1), make(5, 4).t(), make(8)[::2]), {}, "strided")
    yield Sample((make(3, 0), make(4, 0), make(4)), {}, "nothing to sum")
    yield Sample((make(0, 5), make(4, 5), make(4)), {}, "no rows")


# ------------------------------------------------------------------------------------------- TABLE

T = Tensor
_GEMM = ("gemm",)
_REDUCTION = ("reduce",)
_LOWER = {"cpu": "lower", "cuda": "lower"}


def _product(
    name: str,
    *targets: Callable[..., Any],
    bind: Bind,
    kernels: tuple[str, ...],
    formula: str,
    samples: Callable[[Make], Iterator[Sample]],
    autocast: Mapping[str, str],
    variants: Mapping[Callable[..., Any], Bind] | None = None,
    opinfo: tuple[str, ...] | None = None,
) -> Op:
    """Make and register the op of one product."""
    return register(
        Op(
            name=name,
            bind=bind,
            forward=_forward,
            replaces=targets,
            variants=variants or {},
            saves=_saves,
            rule=_rule,
            jvp=_jvp,
            vmap=_vmap,
            autocast=autocast,
            opinfo=opinfo or (name,),
            kernels=kernels,
            formula=formula,
            dtypes=FLOATING,
            cost=_cost,
            samples=samples,
            sources="torch derivatives.yaml",
        )
    )


_product(
    "dot", torch.dot, T.dot,
    bind=_bind_dot, kernels=_REDUCTION, formula="dx = g * y; dy = g * x",
    samples=_dot_samples, autocast={"cuda": "promote"},
)  # fmt: skip
_product(
    "mv", torch.mv, T.mv,
    bind=_bind_mv, kernels=_REDUCTION, formula="da = outer(g, x); dx = a.T @ g",
    samples=_mv_samples, autocast={"cuda": "lower"},
)  # fmt: skip
_product(
    "mm", torch.mm, T.mm,
    bind=_bind_mm, kernels=_GEMM, formula="da = g @ b.T; db = a.T @ g",
    samples=_mm_samples, autocast=_LOWER,
)  # fmt: skip
_product(
    "bmm", torch.bmm, T.bmm,
    bind=_bind_bmm, kernels=_GEMM, formula="da = g @ b.mT; db = a.mT @ g",
    samples=_bmm_samples, autocast=_LOWER,
)  # fmt: skip
MATMUL = _product(
    "matmul", torch.matmul, T.matmul, T.__matmul__,
    bind=_bind_matmul, kernels=_GEMM + _REDUCTION,
    formula="da = g @ b.mT; db = a.mT @ g, each summed over the batch it was broadcast along",
    samples=_matmul_samples, autocast=_LOWER,
    variants={T.__rmatmul__: _bind_rmatmul}, opinfo=("matmul", "__rmatmul__"),
)  # fmt: skip
LINEAR = register(
    Op(
        name="linear",
        bind=_bind_linear,
        forward=_linear_forward,
        replaces=(torch.nn.functional.linear,),
        saves=_saves,
        rule=_linear_rule,
        jvp=_linear_jvp,
        vmap=_linear_vmap,
        autocast=_LOWER,
        schema="(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor",
        opinfo=("nn.functional.linear",),
        kernels=_GEMM,
        formula="dx = g @ w; dw = g.T @ x; db = sum of g over rows",
        dtypes=FLOATING,
        cost=_linear_cost,
        samples=_linear_samples,
        sources="torch derivatives.yaml",
    )
)
