"""``linear``: a product with a transposed weight, and a bias added before the result is rounded."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..admission import settle, transforming
from ..dtypes import FLOATING
from ..launchers import matmul
from ..layout import batch_first
from ..op import BackwardParams, Needs, Op, Spec, Tensors, Unsupported, register
from ..sampling import Make, Sample
from .composite import POINTWISE
from .contraction import (
    GEMM,
    REDUCTION,
    RULES,
    Arithmetic,
    backward_op,
    rows,
    saves,
    times,
)
from .factors import admit_alike, is_transposed
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


def bind_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensors, Params]:
    tensors = input, weight, bias
    admit_alike(input, weight, *([] if bias is None else [bias]))
    if weight.dim() != 2:
        raise Unsupported("weight is not a matrix")
    if not input.dim() or input.shape[-1] != weight.shape[1]:
        raise Unsupported("inner sizes differ")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise Unsupported("bias is not a vector of one number for each row of weight")
    params = Params(is_transposed(weight.stride()))
    if not transforming():
        specs = tuple(
            [None if t is None else Spec(t.shape, t.dtype) for t in (input, weight, bias)]
        )
        params = params._replace(
            specs=specs, plan=plan_linear(input, weight, bias, device=input.get_device())
        )
    return tensors, params


def plan_linear(
    x: Tensor,
    weight: Tensor,
    added: Tensor | None,
    epilogue: Any = None,
    device: int | None = None,
) -> matmul.Plan:
    """The launch for ``epilogue(x @ weight.T + added)``; ``device`` as ``matmul.plan`` has it."""
    # A vector is a matrix of one row, but for the shape of the result.
    table = (x.shape, x.stride()) if x.dim() > 1 else (torch.Size((1, *x.shape)), (0, *x.stride()))
    addend = None if added is None else matmul.Addend(added.shape, added.stride())
    weight_t = weight.shape[::-1], weight.stride()[::-1]
    precision = matmul.float32_precision()
    launch = matmul.plan(*table, *weight_t, x.dtype, precision, 1, addend, epilogue, False, device)
    shape = torch.Size((*x.shape[:-1], weight.shape[0]))
    return launch._replace(shape=shape, strides=launch.strides[-x.dim() :])


def _forward(params: Params, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if params.plan is not None:
        return matmul.run(params.plan, x, weight, bias)
    if x.dim() == 1:
        # In place: a view made inside a Function could not be modified in place by the user.
        return matmul.matrix_product(x.unsqueeze(0), weight.mT, bias).squeeze_(0)
    return matmul.matrix_product(x, weight.mT, bias)


def gradients(use: Arithmetic, bp: BackwardParams, g: Tensor, factors: Tensors) -> Tensors:
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
    return gradients(RULES, BackwardParams(params, needs, specs), settle(g), saved[:2])


def tangent_of(params: Params, factors: Tensors, tangents: Tensors) -> Tensor:
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
    return tangent_of(params, tensors[:2], present).expand(out.shape)


def vmap(info: Any, params: Params, tensors: Tensors, dims: tuple) -> tuple[Tensor, int]:
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


def cost(params: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[int, int]:
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
        bind=bind_linear,
        ambient=matmul.float32_precision,
        forward=_forward,
        replaces=(linear,),
        saves=saves,
        specs=operator.attrgetter("specs"),
        rule=_rule,
        backward=backward_op("linear", GEMM + REDUCTION, gradients, tangent_of, _rule),
        jvp=_jvp,
        vmap=vmap,
        autocast=LOWER,
        schema="(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor",
        opinfo=("nn.functional.linear",),
        kernels=GEMM + REDUCTION + POINTWISE,
        formula="dx = g @ w; dw = g.T @ x; db = sum of g over rows",
        dtypes=FLOATING,
        cost=cost,
        samples=_samples,
        sources="torch derivatives.yaml",
    )
)
