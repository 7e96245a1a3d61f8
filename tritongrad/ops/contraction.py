"""Products of two operands: the calculus that matrix and vector products share.

Two forms cover every rank. Where both operands are matrices, or batches of them, a product is

    out[..., m, n] = alpha sum_k a[..., m, k] b[..., k, n]    ``Matrices``, the gemm kernel,
                                                              and those of a batch summed

and where one is a vector it is a sum of elementwise products, limited by memory alone,

    out[...] = sum_k x[..., k] y[..., k]                      ``Sum``, the reduction kernel

A product P(a, b) is linear in each operand, and everything follows. Its tangent is P(da, b) +
P(a, db). Its gradients, G(g; a, b), make <g, P(a, b)> a form in g, a and b that is linear in each
of the three, so that what is linear in cotangents u of da and v of db differentiates to the tangent
P(u, b) + P(a, v) by g, and to the gradients G(g; u, v) by a and b: the second derivative is the
first one again, and so is the third. What is added to a product of matrices, beta times, enters
each of these linearly.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..admission import launchable, settle
from ..dispatch import apply
from ..dtypes import FLOATING, Number
from ..kernels import arithmetic
from ..launchers import matmul, reduction
from ..launchers.pointwise import elementwise
from ..layout import batch_first, broadcast_shape
from ..op import BackwardParams, Bind, Needs, Op, Spec, Tensors
from ..sampling import Make, Sample
from .factors import Matrices, Params, Sum

# -------------------------------------------------------------------- what formulas are made of


class Arithmetic(NamedTuple):
    """What the formulas below are evaluated with: kernels launched directly, or torch mathematics.

    Attributes:
        matmul: product of matrices, times a number, on request summed over the last dimension of
            the batch.
        contract: ``(x * y).sum(dims)``, dims counting from the end; none for ``x * y``.
        sum_to: a tensor summed to the shape that it was broadcast from.
        scale: a tensor times a number.
    """

    matmul: Callable[..., Tensor]
    contract: Callable[[Tensor, Tensor, tuple[int, ...]], Tensor]
    sum_to: Callable[[Tensor, torch.Size], Tensor]
    scale: Callable[[Tensor, Number], Tensor]


def _launch_contraction(x: Tensor, y: Tensor, dims: tuple[int, ...]) -> Tensor:
    if not dims:
        (out,) = elementwise(arithmetic.mul, 0, (x, y), (), (), x.dtype, (x.dtype,))
        assert out is not None
        return out
    rank = max(x.dim(), y.dim())
    return reduction.reduce_product(x, y, tuple([rank + d for d in dims]), x.dtype)


def _launch_sum_to(tensor: Tensor, shape: torch.Size) -> Tensor:
    return reduction.sum_to(tensor, shape, tensor.dtype)


def _launch_scale(tensor: Tensor, factor: Number) -> Tensor:
    dtype = tensor.dtype
    (out,) = elementwise(arithmetic.mul, 0, (tensor, None), (None, factor), (), dtype, (dtype,))
    assert out is not None
    return out


def _matmul_rule(a: Tensor, b: Tensor, alpha: Number = 1, summed: bool = False) -> Tensor:
    if alpha == 1 and not summed:
        return torch.matmul(a, b)
    if launchable((a, b)):
        return apply(CONTRACTION, Matrices(False, False, alpha, summed=summed), (a, b))
    if summed:  # one product, of the matrices side by side
        a, b = a.transpose(-3, -2).flatten(-2), b.flatten(-3, -2)
    product = torch.matmul(a, b)
    return product if alpha == 1 else product * alpha


def _contraction_rule(x: Tensor, y: Tensor, dims: tuple[int, ...]) -> Tensor:
    if dims and launchable((x, y)):
        return apply(CONTRACTION, Sum(dims), (x, y))
    product = torch.mul(x, y)
    return product.sum(dims) if dims else product


def _sum_to_rule(tensor: Tensor, shape: torch.Size) -> Tensor:
    missing = tensor.dim() - len(shape)
    inner = [d for d, n in enumerate(shape, missing) if n == 1 != tensor.shape[d]]
    dims = [*range(missing), *inner]
    return tensor.sum(dims, keepdim=True).reshape(shape) if dims else tensor


def _launch_matmul(a: Tensor, b: Tensor, alpha: Number = 1, summed: bool = False) -> Tensor:
    return matmul.matrix_product(a, b, alpha=alpha, summed=summed)


KERNELS = Arithmetic(_launch_matmul, _launch_contraction, _launch_sum_to, _launch_scale)
RULES = Arithmetic(_matmul_rule, _contraction_rule, _sum_to_rule, torch.mul)


def times(use: Arithmetic, a: Tensor, b: Tensor, transposed: bool, alpha: Number = 1) -> Tensor:
    """``alpha * a @ b``, on request with its columns dense in memory."""
    return use.matmul(b.mT, a.mT, alpha).mT if transposed else use.matmul(a, b, alpha)


def rows(tensor: Tensor) -> Tensor:
    """All dimensions but the last as one, also where there are none."""
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.unsqueeze(0)


# ------------------------------------------------------------------------------------ the formulas


def _product(use: Arithmetic, params: Params, a: Tensor, b: Tensor) -> Tensor:
    if isinstance(params, Matrices):
        return use.matmul(a, b, params.alpha, params.summed)
    return use.contract(a, b, params.dims)


def _tangent(params: Params, factors: tuple[Any, ...], tangents: tuple[Any, ...]) -> Tensor:
    """P(da, b) + P(a, db) + beta dc for what is added, of which at least one term is there; but for
    the shape where it is the last alone."""
    (a, b), (da, db, *added) = factors, tangents
    if added and added[0] is not None:
        assert isinstance(params, Matrices)
        dc = added[0] if params.beta == 1 else added[0] * params.beta
        return dc if da is None and db is None else dc + _tangent(params, factors, (da, db))
    if da is None:
        return _product(RULES, params, a, db)
    tangent = _product(RULES, params, da, b)
    return tangent if db is None else tangent + _product(RULES, params, a, db)


def _gradients(
    use: Arithmetic, params: Params, needs: Needs, specs: tuple[Any, ...], g: Tensor, a: Any, b: Any
) -> tuple[Tensor | None, ...]:
    """G(g; a, b): the gradients of <g, P(a, b)>, of which da needs only b and db only a; and that
    of what is added."""
    da = db = dc = None
    if isinstance(params, Sum):
        g = _with_dims(g, params.dims)
        if needs[0]:
            da = _contract_to(use, specs[0].shape, g, b)
        if needs[1]:
            db = _contract_to(use, specs[1].shape, g, a)
        return da, db, dc
    alpha = params.alpha
    if needs[2:] == (True,):
        dc = use.sum_to(g, specs[2].shape)
        dc = dc if params.beta == 1 else use.scale(dc, params.beta)
    if params.summed:
        g = g.unsqueeze(-3)  # one for all of the products
    if needs[0]:
        da = use.sum_to(times(use, g, b.mT, params.a_transposed, alpha), specs[0].shape)
    if needs[1]:
        shape = specs[1].shape
        if math.prod(shape[:-2]) == 1:
            # One matrix for the whole batch: one product over all rows, not a sum of products.
            db = times(use, rows(a).mT, rows(g), params.b_transposed, alpha).reshape(shape)
        else:
            db = use.sum_to(times(use, a.mT, g, params.b_transposed, alpha), shape)
    return da, db, dc


def _with_dims(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """``tensor`` with dimensions of size 1 put in, whose places in the result ``dims`` are."""
    for d in sorted(dims, reverse=True):
        tensor = tensor.unsqueeze(d)
    return tensor


def _contract_to(use: Arithmetic, shape: torch.Size, x: Tensor, y: Tensor) -> Tensor:
    """``x * y`` summed to ``shape``."""
    full, rank = broadcast_shape((x, y)), len(shape)
    dims = tuple([-i for i in range(1, len(full) + 1) if i > rank or shape[-i] == 1 != full[-i]])
    return _with_dims(use.contract(x, y, dims), tuple([d for d in dims if -d <= rank]))


# ----------------------------------------------------------------------------------- made into ops


def _forward(params: Params, a: Tensor, b: Tensor, added: Tensor | None = None) -> Tensor:
    if isinstance(params, Matrices):
        if params.beta == 0:
            added = None  # and the NaN in it
        if params.plan is not None:
            return matmul.run(params.plan, a, b, added)
        return matmul.matrix_product(
            a, b, added, alpha=params.alpha, beta=params.beta, summed=params.summed
        )
    if params.plan is None:
        return _product(KERNELS, params, a, b)
    return reduction.run(params.plan, (a, b), a.dtype)


# Each operand is the other's slope.
_KEPT = {
    (False, False): (),
    (False, True): (0,),
    (True, False): (1,),
    (True, True): (0, 1),
}


def saves(params: Any, needs: Needs) -> tuple[int, ...]:
    """Which of the two factors the gradients need."""
    return _KEPT[needs[0], needs[1]]


def _rule(
    params: Params, needs: Needs, specs: tuple[Spec | None, ...], grads: Tensors, saved: Tensors
) -> Tensors:
    (g,), (a, b) = grads, saved[:2]
    assert g is not None
    return _gradients(RULES, params, needs, specs, settle(g), a, b)[: len(needs)]


def _jvp(params: Params, tensors: Tensors, outputs: Tensors, tangents: Tensors) -> Tensor:
    (out,) = outputs
    assert out is not None
    present = tuple([t if t is None else settle(t) for t in tangents])
    return _tangent(params, tensors[:2], present).expand(out.shape)


def _vmap(info: Any, params: Params, tensors: Tensors, dims: tuple) -> tuple[Tensor, int]:
    # A batch of products is a product with one more dimension of batch.
    ranks = [t.dim() - (d is not None) for t, d in zip(tensors, dims, strict=True) if t is not None]
    rank = max(ranks[:2])
    below = int(isinstance(params, Matrices) and params.summed)
    if len(ranks) == 3:
        rank = max(rank, ranks[2] + below)
    moved = [
        t if t is None else batch_first(t, d, rank if i < 2 else rank - below)
        for i, (t, d) in enumerate(zip(tensors, dims, strict=True))
    ]
    if len(dims) == 3 and dims[:2] == (None, None):
        # One product for all, whatever is added to it.
        assert isinstance(params, Matrices)
        a, b, added = moved
        assert added is not None
        added = torch.zeros_like(added) if params.beta == 0 else added * params.beta
        return added + apply(CONTRACTION, params, (a, b)), 0
    return apply(CONTRACTION, params, tuple([t for t in moved if t is not None])), 0


def backward_op(
    name: str,
    kernels: tuple[str, ...],
    gradients: Callable[[Arithmetic, BackwardParams, Tensor, Tensors], Tensors],
    tangent: Callable[[Any, Tensors, Tensors], Tensor],
    rule: Any,
    inputs: int = 3,
) -> Op:
    """The op that computes a product's gradients, from (g, *inputs, out).

    Args:
        gradients: ``(arithmetic, params with needs and specs, g, factors) -> gradients``, one for
            each input.
        tangent: ``(params, factors, tangents) -> tangent`` in torch mathematics.
        rule: the product's own, its definition for vmap.
        inputs: how many there are at most.
    """

    def forward(bp: BackwardParams, g: Tensor, *saved: Tensor | None) -> Any:
        found = gradients(KERNELS, bp, g, saved[:2])
        kept = tuple([t for t in found if t is not None])
        return kept[0] if len(kept) == 1 else kept

    def reference(bp: BackwardParams, g: Tensor, *saved: Tensor | None) -> Tensors:
        found = rule(bp.params, bp.needs, bp.specs, (g,), saved)
        return tuple([t for t in found if t is not None])

    def backward_rule(
        bp: BackwardParams, needs: Needs, specs: tuple, grads: Tensors, saved: Tensors
    ) -> Tensors:
        received = iter(grads)
        cotangents: list[Tensor | None] = []
        for need in bp.needs:
            cotangent = next(received) if need else None
            cotangents.append(cotangent if cotangent is None else settle(cotangent))
        g, u, v = saved[0], cotangents[0], cotangents[1]
        assert g is not None
        dg = None
        if needs[0]:
            dg = tangent(bp.params, saved[1:3], tuple(cotangents)).expand(g.shape)
        # a's comes from v, and b's from u.
        wanted = (needs[1] and v is not None, needs[2] and u is not None, False)
        found = gradients(RULES, bp._replace(needs=wanted), g, (u, v))
        return (dg, *found[:2], *[None] * (len(needs) - 3))

    return Op(
        name=f"{name}_backward",
        bind=None,
        forward=forward,
        outputs=inputs,
        rule=backward_rule,
        reference=reference,
        kernels=kernels,
        dtypes=FLOATING,
        formula="<g, P(a, b)> is linear in each of g, a, b: its second derivative is its first",
    )


def product(
    name: str,
    *targets: Callable[..., Any],
    bind: Bind | None,
    kernels: tuple[str, ...],
    backward_kernels: tuple[str, ...],
    formula: str,
    samples: Callable[[Make], Iterator[Sample]] | None = None,
    autocast: Mapping[str, str] | None = None,
    variants: Mapping[Callable[..., Any], Bind] | None = None,
    opinfo: tuple[str, ...] = (),
) -> Op:
    """The op of one product of two tensors, or of such a product with a third added."""
    return Op(
        name=name,
        bind=bind,
        ambient=matmul.float32_precision,
        forward=_forward,
        replaces=targets,
        variants=variants or {},
        saves=saves,
        specs=operator.attrgetter("specs"),
        rule=_rule,
        backward=backward_op(
            name,
            backward_kernels,
            lambda use, bp, g, factors: _gradients(use, bp.params, bp.needs, bp.specs, g, *factors),
            _tangent,
            _rule,
        ),
        jvp=_jvp,
        vmap=_vmap,
        autocast=autocast or {},
        opinfo=opinfo,
        kernels=kernels,
        formula=formula,
        dtypes=FLOATING,
        cost=_cost,
        samples=samples,
        sources="torch derivatives.yaml",
    )


def _cost(params: Params, a: Tensor, b: Tensor, added: Tensor | None = None) -> tuple[int, int]:
    depth = a.shape[-1]
    if isinstance(params, Matrices):
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]).numel()
        results = batch * a.shape[-2] * b.shape[-1]
        if params.summed:
            depth, results = depth * a.shape[-3], results // max(a.shape[-3], 1)
    else:
        results = broadcast_shape((a, b)).numel() // max(depth, 1)
    elements = a.numel() + b.numel() + results + (0 if added is None else added.numel())
    return elements * a.element_size(), 2 * results * depth


GEMM = ("gemm",)
REDUCTION = ("reduce",)
VECTOR_BACKWARD = ("pointwise_dense", "pointwise_strided", *REDUCTION)

CONTRACTION = product(
    "contraction",
    bind=None,
    kernels=GEMM + VECTOR_BACKWARD,
    backward_kernels=GEMM + VECTOR_BACKWARD,
    formula="any product of either form: what the others become under vmap",
)
