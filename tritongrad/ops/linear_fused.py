"""Linear layers with what follows them in the product's epilogue: an activation, or a residual.

The activation's argument z = x @ w.T + b is kept for backward where the slope is a function of it
(gelu, silu) and a gradient will be taken; that of relu and tanh is one of the result. Backward is
one pointwise kernel for dz and then the products of a linear layer. It is no prologue of those: dz
is an operand of two products and of the sum that is the bias' gradient, and each tile of each of
them would compute the slope again, from twice the memory.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..admission import settle
from ..dispatch import apply, rules
from ..dtypes import FLOATING
from ..extension import extension
from ..kernels import activation as k
from ..kernels import elementary
from ..launchers import matmul
from ..launchers.pointwise import elementwise
from ..layout import batch_first
from ..op import BackwardParams, Needs, Op, Spec, Tensors, Unsupported, register
from ..sampling import Make, Sample
from . import linear as plain
from .activation import gelu_slope, silu_slope
from .contraction import GEMM, KERNELS, REDUCTION, RULES, Arithmetic, backward_op
from .factors import admit_alike, check_fits
from .matmul import LOWER

F = torch.nn.functional


class Activation(NamedTuple):
    """What follows a linear layer.

    Attributes:
        value: in torch mathematics.
        forward, backward: device functions.
        slope: of the gradient and ``z``, the gradient of ``z``; of the result in the place of ``z``
            where ``by_result``.
    """

    value: Callable[[Tensor], Tensor]
    forward: Any
    backward: Any
    slope: Callable[[Tensor, Tensor], Tensor]
    by_result: bool = False


ACTIVATIONS = {
    "gelu": Activation(F.gelu, k.gelu, k.gelu_bwd, gelu_slope),
    "gelu_tanh": Activation(
        lambda z: F.gelu(z, approximate="tanh"), k.gelu_tanh, k.gelu_tanh_bwd,
        lambda g, z: gelu_slope(g, z, "_tanh"),
    ),
    "relu": Activation(
        torch.relu, k.relu, k.relu_bwd, lambda g, out: torch.where(out <= 0, out, g), True
    ),
    "silu": Activation(F.silu, k.silu, k.silu_bwd, silu_slope),
    "tanh": Activation(
        torch.tanh, elementary.tanh, elementary.tanh_bwd, lambda g, out: g * (1 - out * out), True
    ),
}  # fmt: skip


@extension
def linear_act(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "gelu"
) -> Tensor:
    """``activation(linear(input, weight, bias))`` in one kernel.

    Args:
        activation: "gelu", "gelu_tanh" (its approximation), "relu", "silu" or "tanh".

    Raises:
        ValueError: another ``activation``. Else what ``torch.nn.functional.linear`` raises.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"linear_act: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    return ACTIVATIONS[activation].value(F.linear(input, weight, bias))


@extension
def linear_add(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """``linear(input, weight, bias) + residual`` in one kernel, rounded once.

    Args:
        residual: of a shape that expands to the result's; added in the dtype of the product, under
            autocast too (where ``torch.addmm`` does so).

    Raises:
        TypeError: ``residual`` is not floating-point. Else what ``torch.nn.functional.linear``, and
            an addition of shapes that do not broadcast, raise.
    """
    product = F.linear(input, weight, bias)
    if not residual.is_floating_point():
        raise TypeError("linear_add: residual must be a floating-point tensor")
    return product + residual.to(product.dtype)


# -------------------------------------------------------------------------------------- activations


class Params(NamedTuple):
    """What a call is beside its tensors.

    Attributes:
        weight_transposed: as in ``contraction.Matrices``.
        act: what follows.
        keep: whether ``z`` is a second result.
        specs, plan: as there.
    """

    weight_transposed: bool
    act: Activation
    keep: bool
    specs: tuple[Spec | None, ...] | None = None
    plan: matmul.Plan | None = None


def _bind_act(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "gelu"
) -> tuple[Tensors, Params]:
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise Unsupported(f"activation is {activation!r}")
    act = ACTIVATIONS[activation]
    tensors, found = plain.bind_linear(input, weight, bias)
    differentiated = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in tensors
    )
    keep = differentiated and not act.by_result
    plan = None if found.plan is None else plain.plan_linear(input, weight, bias, act.forward)
    return tensors, Params(found.weight_transposed, act, keep, found.specs, plan)


def _forward(params: Params, x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    plan = params.plan or plain.plan_linear(x, weight, bias, params.act.forward)
    if params.keep:
        return matmul.run_keeping(plan, x, weight, bias)
    return matmul.run(plan, x, weight, bias)


def _saves(params: Params, needs: Needs) -> tuple[int, ...]:
    kept = {1} if needs[0] else set()
    kept |= {0} if needs[1] else set()
    if params.keep or params.act.by_result:
        return (*sorted(kept), 4 if params.keep else 3)
    return (0, 1, 2)  # z is computed again


def _argument(params: Params, saved: Tensors) -> Tensor:
    """What the slope is a function of, from (x, weight, bias, out, z)."""
    x, weight, bias, out, *z = saved
    found = out if params.act.by_result else z[0] if z else None
    if found is None:
        assert x is not None
        assert weight is not None
        found = F.linear(x, weight, bias)
    return found


def _rule(
    params: Params, needs: Needs, specs: tuple[Spec | None, ...], grads: Tensors, saved: Tensors
) -> Tensors:
    (g, *rest), dz = grads, None
    if g is not None:
        dz = params.act.slope(settle(g), _argument(params, saved))
    for other in rest:
        if other is not None:
            dz = settle(other) if dz is None else dz + settle(other)
    assert dz is not None
    return plain.gradients(RULES, BackwardParams(params, needs, specs), dz, saved[:2])


def _jvp(params: Params, tensors: Tensors, outputs: Tensors, tangents: Tensors) -> Any:
    out = outputs[0]
    assert out is not None
    present = tuple([t if t is None else settle(t) for t in tangents])
    dz = plain.tangent_of(params, tensors[:2], present).expand(out.shape)  # type: ignore[arg-type]
    tangent = params.act.slope(dz, _argument(params, (*tensors, *outputs)))
    return (tangent, dz) if params.keep else tangent


def _vmap(info: Any, params: Params, tensors: Tensors, dims: tuple) -> tuple[Any, Any]:
    x, weight, bias = tensors
    if dims[1:] == (None, None):
        assert x is not None
        x = batch_first(x, dims[0], x.dim() - 1)
        found = apply(ACT, params._replace(specs=None, plan=None), (x, weight, bias))
    else:
        z, _ = plain.vmap(info, plain.Params(params.weight_transposed), tensors, dims)
        out = params.act.value(z)
        found = (out, z) if params.keep else out
    return found, (0, 0) if params.keep else 0


def _act_backward() -> Op:
    """The op of (*gradients of the results, x, weight, bias, *results)."""

    def forward(bp: BackwardParams, *tensors: Tensor | None) -> Any:
        params = bp.params
        count = 1 + params.keep
        grads, saved = tensors[:count], tensors[count:]
        g, x, weight, bias, out, *z = (grads[0], *saved)
        if g is None or any(t is not None for t in grads[1:]):
            with rules():
                found = _rule(params, bp.needs, bp.specs, grads, saved)
        else:
            at = out if params.act.by_result else z[0] if z else None
            if at is None:
                assert x is not None
                assert weight is not None
                at = matmul.run(plain.plan_linear(x, weight, bias), x, weight, bias)
            (dz,) = elementwise(params.act.backward, 0, (g, at), (), (), g.dtype, (g.dtype,))
            assert dz is not None
            found = plain.gradients(KERNELS, bp, dz, (x, weight))
        kept = tuple([t for t in found if t is not None])
        return kept[0] if len(kept) == 1 else kept

    def reference(bp: BackwardParams, *tensors: Tensor | None) -> Tensors:
        count = 1 + bp.params.keep
        found = _rule(bp.params, bp.needs, bp.specs, tensors[:count], tensors[count:])
        return tuple([t for t in found if t is not None])

    return Op(
        name="linear_act_backward",
        bind=None,
        forward=forward,
        outputs=3,
        reference=reference,
        kernels=("pointwise_dense", "pointwise_strided", *GEMM, *REDUCTION),
        dtypes=FLOATING,
        formula="autograd through the rule of linear_act",
    )


def _act_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 5), make(4, 5), make(4)), {}, "small")
    yield Sample((make(2, 2, 3), make(4, 3)), {"activation": "silu"}, "batch, without bias")
    yield Sample((make(3), make(2, 3), make(2)), {"activation": "tanh"}, "vector")
    yield Sample((make(3, 2, 3).mT, make(2, 2).t(), make(4)[::2], "relu"), {}, "strided")
    yield Sample((make(1, 2), make(2, 2), make(2)), {"activation": "gelu_tanh"}, "approximate")
    yield Sample((make(18, 67), make(35, 67), make(35)), {}, "past one tile in each dimension")
    yield Sample((make(0, 5), make(4, 5), make(4)), {}, "no rows")


def _first(found: Any) -> Any:
    return found[0] if type(found) is tuple else found


ACT = register(
    Op(
        name="linear_act",
        bind=_bind_act,
        ambient=lambda: (matmul.float32_precision(), torch.is_grad_enabled()),
        forward=_forward,
        replaces=(linear_act,),
        outputs=2,
        returns=_first,
        saves=_saves,
        specs=operator.attrgetter("specs"),
        rule=_rule,
        backward=_act_backward(),
        jvp=_jvp,
        vmap=_vmap,
        autocast=LOWER,
        schema=(
            '(Tensor input, Tensor weight, Tensor? bias=None, str activation="gelu") -> Tensor'
        ),
        kernels=GEMM,
        formula="dz = g * slope; dx = dz @ w; dw = dz.T @ x; db = sum of dz over rows",
        dtypes=FLOATING,
        cost=lambda params, *tensors: plain.cost(params, *tensors),
        samples=_act_samples,
        sources="torch derivatives.yaml of linear and of the activation",
    )
)

# --------------------------------------------------------------------------------------- a residual


def _bind_add(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor
) -> tuple[Tensors, plain.Params]:
    tensors, found = plain.bind_linear(input, weight, bias)
    admit_alike(input, residual)
    check_fits(residual.shape, torch.Size((*input.shape[:-1], weight.shape[0])))
    if found.plan is not None and found.specs is not None:
        specs = (*found.specs, Spec(residual.shape, residual.dtype))
        found = found._replace(specs=specs, plan=plain.plan_linear(input, weight, residual))
    return (*tensors, residual), found


def _add_forward(
    params: plain.Params, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor
) -> Tensor:
    plan = params.plan or plain.plan_linear(x, weight, residual)
    return matmul.run(plan, x, weight, residual, bias)


def _add_gradients(use: Arithmetic, bp: BackwardParams, g: Tensor, factors: Tensors) -> Tensors:
    found = plain.gradients(use, bp, g, factors)
    spec = bp.specs[3] if bp.needs[3:] == (True,) else None
    return *found, None if spec is None else use.sum_to(g, spec.shape)


def _add_tangent(params: Any, factors: Tensors, tangents: Tensors) -> Tensor:
    *inner, residual = tangents
    if all(t is None for t in inner):
        assert residual is not None
        return residual
    tangent = plain.tangent_of(params, factors, tuple(inner))
    return tangent if residual is None else tangent + residual


def _add_rule(
    params: plain.Params,
    needs: Needs,
    specs: tuple[Spec | None, ...],
    grads: Tensors,
    saved: Tensors,
) -> Tensors:
    (g,) = grads
    assert g is not None
    return _add_gradients(RULES, BackwardParams(params, needs, specs), settle(g), saved[:2])


def _add_jvp(params: plain.Params, tensors: Tensors, outputs: Tensors, tangents: Tensors) -> Tensor:
    (out,) = outputs
    assert out is not None
    present = tuple([t if t is None else settle(t) for t in tangents])
    return _add_tangent(params, tensors[:2], present).expand(out.shape)


def _add_vmap(info: Any, params: plain.Params, tensors: Tensors, dims: tuple) -> tuple[Tensor, int]:
    x, weight, bias, residual = tensors
    assert x is not None
    assert residual is not None
    rank = x.dim() - (dims[0] is not None)
    if dims[0] is not None and dims[1:3] == (None, None):
        x, residual = batch_first(x, dims[0], rank), batch_first(residual, dims[3], rank)
        return apply(ADD, params._replace(specs=None, plan=None), (x, weight, bias, residual)), 0
    residual = batch_first(residual, dims[3], rank)
    if dims[:3] == (None, None, None):
        assert weight is not None
        return F.linear(x, weight, bias) + residual, 0
    out, _ = plain.vmap(info, plain.Params(params.weight_transposed), tensors[:3], dims[:3])
    return out + residual, 0


def _add_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 5), make(4, 5), make(4), make(3, 4)), {}, "small")
    yield Sample((make(2, 2, 3), make(4, 3), None, make(2, 1, 4)), {}, "broadcast, without bias")
    yield Sample((make(3), make(2, 3), make(2), make(2)), {}, "vector")
    yield Sample((make(3, 2).t(), make(4, 3), make(8)[::2], make(4, 2).t()), {}, "strided")
    yield Sample((make(18, 67), make(35, 67), make(35), make(18, 35)), {}, "past one tile")
    yield Sample((make(0, 5), make(4, 5), make(4), make(0, 4)), {}, "no rows")


ADD = register(
    Op(
        name="linear_add",
        bind=_bind_add,
        ambient=matmul.float32_precision,
        forward=_add_forward,
        replaces=(linear_add,),
        saves=plain.saves,
        specs=operator.attrgetter("specs"),
        rule=_add_rule,
        backward=backward_op(
            "linear_add", GEMM + REDUCTION, _add_gradients, _add_tangent, _add_rule, 4
        ),
        jvp=_add_jvp,
        vmap=_add_vmap,
        autocast=LOWER,
        schema="(Tensor input, Tensor weight, Tensor? bias, Tensor residual) -> Tensor",
        kernels=GEMM,
        formula="dx = g @ w; dw = g.T @ x; db = sum of g over rows; dresidual = g",
        dtypes=FLOATING,
        cost=lambda params, *tensors: plain.cost(params, *tensors[:3]),
        samples=_add_samples,
        sources="torch derivatives.yaml",
    )
)
