"""``linear``: a product with a transposed weight, and a bias added before the result is rounded."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..admission import admit, admit_pair, settle, transforming
from ..dtypes import FLOATING
from ..launchers import matmul
from ..layout import Strides
from ..op import BackwardParams, Needs, Op, Spec, Tensors, Unsupported, register
from ..sampling import Make, Sample
from .contraction import (
    GEMM,
    REDUCTION,
    RULES,
    Arithmetic,
    backward_op,
    batch_first,
    rows,
    saves,
    times,
)
from .factors import check_alike, is_transposed
from .matmul import LOWER

linear = torch.nn.functional.linear


class Params(NamedTuple):
    """What a call is beside its tensors.

    Attributes:
        weight_transposed: as in ``contraction.Matrices``.
        specs, plan: as there.
    """

    weight_transposed: bool
    specs: tuple[Spec | None, ...] | None = None
    plan: matmul.Plan | None = None


def _bind_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensors, Params]:
    admit_pair(input, weight)
    shapes: tuple[torch.Size, ...] = input.shape, weight.shape
    dtypes: tuple[torch.dtype, ...] = input.dtype, weight.dtype
    devices: tuple[int, ...] = input.get_device(), weight.get_device()
    if bias is not None:
        admit(bias)
        shapes, dtypes = (*shapes, bias.shape), (*dtypes, bias.dtype)
        devices = (*devices, bias.get_device())
    if transforming():
        return (input, weight, bias), _params(shapes, dtypes, devices, weight.stride())
    strides: tuple[Strides, ...] = input.stride(), weight.stride()
    if bias is not None:
        strides = (*strides, bias.stride())
    return (input, weight, bias), _params_and_plan(
        shapes, dtypes, devices, strides, matmul.float32_precision()
    )


def _params(
    shapes: tuple[torch.Size, ...],
    dtypes: tuple[torch.dtype, ...],
    devices: tuple[int, ...],
    weight_strides: Strides,
) -> Params:
    x, weight, *bias = shapes
    for dtype, device in zip(dtypes[1:], devices[1:], strict=True):
        check_alike(dtypes[0], dtype, devices[0], device)
    if len(weight) != 2:
        raise Unsupported("weight is not a matrix")
    if not x or x[-1] != weight[1]:
        raise Unsupported("inner sizes differ")
    if bias and bias[0] != weight[:1]:
        raise Unsupported("bias is not a vector of one number for each row of weight")
    return Params(is_transposed(weight_strides))


@lru_cache(maxsize=4096)
def _params_and_plan(
    shapes: tuple[torch.Size, ...],
    dtypes: tuple[torch.dtype, ...],
    devices: tuple[int, ...],
    strides: tuple[Strides, ...],
    precision: str,
) -> Params:
    (x, weight, *bias), (x_strides, weight_strides, *bias_strides) = shapes, strides
    params, dtype = _params(shapes, dtypes, devices, weight_strides), dtypes[0]
    specs = tuple([Spec(s, dtype) for s in shapes])
    # A vector is a matrix of one row, but for the shape of the result.
    table = (x, x_strides) if len(x) > 1 else (torch.Size((1, *x)), (0, *x_strides))
    added = matmul.Addend(bias[0], bias_strides[0]) if bias else None
    weight_t = weight[::-1], weight_strides[::-1]
    launch = matmul.plan(*table, *weight_t, dtype, precision, 1, added)
    launch = launch._replace(
        shape=torch.Size((*x[:-1], weight[0])), strides=launch.strides[-len(x) :]
    )
    return params._replace(specs=(*specs, None)[:3], plan=launch)


def _forward(params: Params, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if params.plan is not None:
        return matmul.run(params.plan, x, weight, bias)
    if x.dim() == 1:
        # In place: a view made inside a Function could not be modified in place by the user.
        return matmul.matrix_product(x.unsqueeze(0), weight.mT, bias).squeeze_(0)
    return matmul.matrix_product(x, weight.mT, bias)


def _gradients(use: Arithmetic, bp: BackwardParams, g: Tensor, factors: Tensors) -> Tensors:
    x, weight = factors
    dx = dweight = dbias = None
    if bp.needs[0]:
        assert weight is not None
        dx = use.matmul(g, weight) if g.dim() > 1 else use.matmul(rows(g), weight).squeeze(0)
    if bp.needs[1]:
        assert x is not None
        dweight = times(use, rows(g).mT, rows(x), bp.params.weight_transposed)
    if bp.needs[2]:
        dbias = use.sum_to(rows(g), g.shape[-1:])
    return dx, dweight, dbias


def _rule(
    params: Params, needs: Needs, specs: tuple[Spec | None, ...], grads: Tensors, saved: Tensors
) -> Tensors:
    (g,) = grads
    assert g is not None
    return _gradients(RULES, BackwardParams(params, needs, specs), settle(g), saved[:2])


def _tangent(params: Params, factors: Tensors, tangents: Tensors) -> Tensor:
    """The tangent of the result, but for the shape where it is the bias' alone."""
    (x, weight), (dx, dweight, dbias) = factors, tangents
    # The bias' tangent is the bias of whichever product there is.
    if dx is not None:
        assert weight is not None
        tangent = linear(dx, weight, dbias)
        if dweight is None:
            return tangent
        assert x is not None
        return tangent + linear(x, dweight)
    if dweight is not None:
        assert x is not None
        return linear(x, dweight, dbias)
    assert dbias is not None
    return dbias


def _jvp(params: Params, tensors: Tensors, outputs: Tensors, tangents: Tensors) -> Tensor:
    (out,) = outputs
    assert out is not None
    present = tuple([t if t is None else settle(t) for t in tangents])
    return _tangent(params, tensors[:2], present).expand(out.shape)


def _vmap(info: Any, params: Params, tensors: Tensors, dims: tuple) -> tuple[Tensor, int]:
    x, weight, bias = tensors
    x_dim, weight_dim, bias_dim = dims
    assert x is not None
    assert weight is not None
    x = batch_first(x, x_dim, x.dim() - (x_dim is not None))
    if weight_dim is None and bias_dim is None:
        return linear(x, weight, bias), 0
    if x_dim is None:
        x = x.unsqueeze(0)
    if weight_dim is None:
        out = linear(x, weight)
    else:
        weight = weight.movedim(weight_dim, 0)
        table = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)
        out = torch.matmul(table, weight.mT)
        out = out.reshape(info.batch_size, *x.shape[1:-1], weight.shape[1])
    if bias is not None:
        out = out + batch_first(bias, bias_dim, x.dim() - 1)
    return out, 0


def _cost(params: Params, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[int, int]:
    columns, depth = weight.shape
    results = x.numel() // max(depth, 1) * columns
    elements = x.numel() + weight.numel() + results + (0 if bias is None else columns)
    return elements * x.element_size(), 2 * results * depth


def _samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 5), make(4, 5)), {}, "without bias")
    yield Sample((make(3, 5), make(4, 5), make(4)), {}, "small")
    yield Sample((make(2, 3, 5), make(4, 5), make(4)), {}, "batch")
    yield Sample((make(5), make(4, 5), make(4)), {}, "vector")
    yield Sample((make(5), make(4, 5)), {"bias": None}, "vector without bias")
    yield Sample((make(18, 67), make(35, 67), make(35)), {}, "past one tile in each dimension")
    yield Sample((make(3, 2, 5).transpose(0, 1), make(5, 4).t(), make(8)[::2]), {}, "strided")
    yield Sample((make(3, 0), make(4, 0), make(4)), {}, "nothing to sum")
    yield Sample((make(0, 5), make(4, 5), make(4)), {}, "no rows")


register(
    Op(
        name="linear",
        bind=_bind_linear,
        ambient=matmul.float32_precision,
        forward=_forward,
        replaces=(linear,),
        saves=saves,
        specs=operator.attrgetter("specs"),
        rule=_rule,
        backward=backward_op("linear", GEMM + REDUCTION, _gradients, _tangent, _rule),
        jvp=_jvp,
        vmap=_vmap,
        autocast=LOWER,
        schema="(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor",
        opinfo=("nn.functional.linear",),
        kernels=GEMM,
        formula="dx = g @ w; dw = g.T @ x; db = sum of g over rows",
        dtypes=FLOATING,
        cost=_cost,
        samples=_samples,
        sources="torch derivatives.yaml",
    )
)
