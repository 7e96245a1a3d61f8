"""``normalize``: rows over their norms, each way in one kernel where they are rows of order 2 that
a program can hold, else in a reduction and a pointwise kernel.

The rule is what torch's composition has: where the norm is below ``eps`` the quotient is linear.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..admission import admit, settle, transforming
from ..dispatch import apply, rules
from ..dtypes import COMPUTE_DTYPE, FLOATING, is_number
from ..kernels import normalize as k
from ..kernels.norm_second import add_two
from ..launchers import rowwise
from ..launchers.reduction import Reduction, plan_for, run, run_many
from ..layout import batched
from ..op import OPS, BackwardParams, Needs, Op, Spec, Tensors, Unsupported, register
from ..sampling import Make, Sample
from .reduction import Params, count_of, exact_pointwise, read, total_of
from .vector_norm import jvp as norm_jvp
from .vector_norm import kind_of as norm_of
from .vector_norm import rule as norm_rule

F = torch.nn.functional

PRODUCTS = Reduction(k.products, add_two, (0.0, 0.0))


class Normal(NamedTuple):
    """What a call is beside its tensor.

    Attributes:
        dims: the dimensions of a row, not negative; none of a number.
        p: order of the norm.
        eps: the least that is divided by.
        result: dtype of the result.
        specs: of the tensor, and
        plan: the launch for it, if it is one; neither under a transform.
    """

    dims: tuple[int, ...]
    p: float
    eps: float
    result: torch.dtype
    specs: tuple[Spec] | None = None
    plan: rowwise.Plan | None = None


def _bind(
    input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Tensor | None = None
) -> tuple[Tensors, Normal]:
    if out is not None:
        raise Unsupported("out=")
    admit(input)
    if input.dtype not in FLOATING:
        raise Unsupported("integer input")
    if any(isinstance(v, bool) or not is_number(v) for v in (p, eps)):
        raise Unsupported(f"p={p!r}, eps={eps!r}")
    if dim is None or dim in ((), []):
        raise Unsupported(f"dim={dim!r}")
    # The norm's own reading of them, so that what it refuses is refused before anything runs.
    dims = read(input, dim, True, None, norm_of, float(p)).dims
    # As torch rounds it: in float16 nothing is left of the usual one.
    least = torch.tensor(eps, dtype=input.dtype).item()
    params = Normal(dims, float(p), least, input.dtype)
    if transforming():
        return (input,), params
    spec = Spec(input.shape, input.dtype)
    return (input,), params._replace(specs=(spec,), plan=_rows(k.normalize_row, params, input))


def _rows(function: Any, params: Normal, *operands: Tensor) -> rowwise.Plan | None:
    """How to compute a function of whole rows, if a program can hold them."""
    if params.p != 2:
        return None
    shapes, strides = tuple([t.shape for t in operands]), tuple([t.stride() for t in operands])
    device = operands[0].get_device()
    return rowwise.plan(
        function, shapes, strides, params.dims, params.result, device, 1, (params.eps,), True
    )


def _forward(params: Normal, x: Tensor) -> Tensor:
    launch = params.plan or _rows(k.normalize_row, params, x)
    if launch is not None:
        (y,) = rowwise.run(launch, (x,), (params.result,))
        assert y is not None
        return y
    compute = COMPUTE_DTYPE[params.result]
    kind, before, after = norm_of(params.p, count_of(x.shape, params.dims))
    found = plan_for((x,), kind, params.dims, True, params.result, before, after)
    norm = run(found, (x,), compute)
    return exact_pointwise(k.normalize, (x, norm), params.result, params.result, (params.eps,))


def _backward(bp: BackwardParams, g: Tensor, x: Tensor) -> Tensor:
    params: Normal = bp.params
    (spec,) = bp.specs
    assert spec is not None
    if params.p != 2:
        with rules():
            return _slope(params, spec, g, x)
    launch = _rows(k.normalize_bwd_row, params, g, x)
    if launch is not None:
        (dx,) = rowwise.run(launch, (g, x), (spec.dtype,))
        assert dx is not None
        return dx
    compute = COMPUTE_DTYPE[params.result]
    found = plan_for((g, x), PRODUCTS, params.dims, True, params.result)
    square, dot = run_many(found, (g, x), (compute, compute))
    operands = (g, x, square, dot)
    return exact_pointwise(k.normalize_bwd, operands, params.result, spec.dtype, (params.eps,))


# ------------------------------------------------------------------------------- torch mathematics


def _norm(params: Normal) -> Params:
    return Params(params.dims, True, COMPUTE_DTYPE[params.result], params.p)


def _wide(params: Normal, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``x``, its norm and what it is divided by, not rounded to half precision on the way."""
    wide = x.to(COMPUTE_DTYPE[x.dtype])
    norm = torch.linalg.vector_norm(wide, params.p, params.dims, True)
    return wide, norm, torch.where(norm < params.eps, params.eps, norm)


def _slope(params: Normal, spec: Spec, g: Tensor, x: Tensor) -> Tensor:
    wide, norm, least = _wide(params, x)
    dx = g / least
    total = total_of(g * (wide / least), params, True) / least
    dnorm = torch.where(norm < params.eps, 0.0, -total)
    own = norm_rule(_norm(params), Spec(wide.shape, wide.dtype), dnorm, wide, norm)
    return (dx if own is None else dx + own).to(spec.dtype)


def _rule(params: Normal, needs: Needs, specs: tuple, grads: Tensors, saved: Tensors) -> Tensors:
    (g,), (x, _) = grads, saved
    assert g is not None
    assert x is not None
    return (_slope(params, specs[0], g, x),)


def _jvp(params: Normal, tensors: Tensors, outputs: Tensors, tangents: Tensors) -> Tensor:
    (x,), (tangent,) = tensors, tangents
    assert x is not None
    assert tangent is not None
    wide, norm, least = _wide(params, x)
    tangent = settle(tangent).to(wide.dtype)
    own = norm_jvp(OPS["vector_norm"], _norm(params), wide, norm, tangent)
    own = torch.where(norm < params.eps, 0.0, own)
    return ((tangent - wide / least * own) / least).to(params.result)


def _shifted(params: Normal) -> Normal:
    """For a tensor with one more dimension, in front."""
    return params._replace(dims=tuple([d + 1 for d in params.dims]), specs=None, plan=None)


def _vmap(info: Any, params: Normal, tensors: Tensors, dims: tuple) -> tuple[Any, int]:
    return apply(NORMALIZE, _shifted(params), batched(tensors, dims)), 0


def _vmap_backward(info: Any, bp: BackwardParams, tensors: Tensors, dims: tuple) -> tuple[Any, int]:
    (spec,) = bp.specs
    assert spec is not None
    spec = spec._replace(shape=torch.Size((info.batch_size, *spec.shape)))
    bp = bp._replace(params=_shifted(bp.params), specs=(spec,))
    return apply(BACKWARD, bp, batched(tensors, dims, info.batch_size)), 0


def _samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 5),), {}, "rows")
    yield Sample((make(2, 3, 4),), {"dim": (0, -1), "p": 3.0}, "several dims")
    yield Sample((make(4, 9)[:, ::2].t(),), {"dim": 0}, "strided")
    yield Sample((make(2, 0, 3),), {"dim": 2}, "empty")
    yield Sample((make(2, 1031),), {"p": 1.0}, "past one block")
    yield Sample((make(2, 1031),), {"eps": 50.0}, "all below eps")
    yield Sample((make(2, 16_385),), {}, "longer than a program holds")


def _cost(params: Normal, x: Tensor) -> tuple[int, int]:
    return 2 * x.numel() * x.element_size(), 3 * x.numel()


KERNELS = ("rowwise", "reduce", "pointwise_dense", "pointwise_strided")

BACKWARD = Op(
    name="normalize_backward",
    bind=None,
    forward=lambda bp, g, x, _: _backward(bp, g, x),
    reference=lambda bp, g, x, _: (_slope(bp.params, bp.specs[0], g, x),),
    vmap=_vmap_backward,
    kernels=KERNELS,
    dtypes=FLOATING,
    formula="autograd through the rule of normalize",
)
NORMALIZE = register(Op(
    name="normalize",
    bind=_bind,
    forward=_forward,
    replaces=(F.normalize,),
    specs=operator.attrgetter("specs"),
    saves=lambda params, needs: (0,),
    rule=_rule,
    backward=BACKWARD,
    jvp=_jvp,
    vmap=_vmap,
    autocast={"cuda": "float32"},
    opinfo=("nn.functional.normalize",),
    kernels=KERNELS,
    formula="dx = (g - y * sum(g * y)) / max(|x|, eps), y = x / |x|; g / eps where |x| < eps",
    dtypes=FLOATING,
    samples=_samples,
    sources="torch's own definition",
    cost=_cost,
))  # fmt: skip
