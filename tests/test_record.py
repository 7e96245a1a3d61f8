"""The record holds the shapes of op that are to come, without a second mechanism.

These ops are not registered, and their forward passes are torch's: what is tested is what the
record makes of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import DEVICE
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap

from tritongrad import runtime
from tritongrad.dispatch import apply
from tritongrad.op import OPS, BackwardParams, Op, register
from tritongrad.sampling import Random

EPS = 1e-5


def test_fresh_memory_is_not_a_number_by_luck() -> None:
    assert torch.empty(3).isnan().all()


def leaf(*shape: int) -> Tensor:
    return Random(torch.float64, DEVICE)(*shape)


def through(op: Op, params: Any = None) -> Callable[..., Tensor]:
    return lambda *tensors: apply(op, params, tensors)


# ------------------------------------------------------- several outputs, saved statistics (a norm)


def standardised(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()


def _standardise_forward(params: None, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.mean(-1, keepdim=True)
    rstd = ((x - mean).square().mean(-1, keepdim=True) + EPS).rsqrt()
    return (x - mean) * rstd, mean, rstd


def _standardise_rule(
    params: None, needs: Any, specs: Any, grads: Any, saved: Any
) -> tuple[Tensor | None, ...]:
    # From x alone: mean and rstd are its functions, so that the derivative of this is whole.
    (g,), x = grads, saved[0]
    centred = x - x.mean(-1, keepdim=True)
    rstd = 1 / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    y = centred * rstd
    return (rstd * (g - g.mean(-1, keepdim=True) - y * (g * y).mean(-1, keepdim=True)),)


def _standardise_jvp(params: None, tensors: Any, outputs: Any, tangents: Any) -> Tensor:
    # The Jacobian is symmetric.
    found = _standardise_rule(None, None, None, tangents, tensors)[0]
    assert found is not None
    return found


def _standardise_backward_forward(
    bp: BackwardParams, g: Tensor, x: Tensor, y: Tensor | None, mean: Tensor, rstd: Tensor
) -> Tensor:
    y = (x - mean) * rstd
    return rstd * (g - g.mean(-1, keepdim=True) - y * (g * y).mean(-1, keepdim=True))


STANDARDISE = Op(
    name="standardise",
    bind=None,
    forward=_standardise_forward,
    saves=lambda params, needs: (0, 2, 3),
    rule=_standardise_rule,
    reference=lambda params, x: (standardised(x),),
    jvp=_standardise_jvp,
    backward=Op(
        name="standardise_backward",
        bind=None,
        forward=_standardise_backward_forward,
        reference=lambda bp, g, x, *statistics: _standardise_rule(None, None, None, (g,), (x,)),
    ),
)


def test_saved_statistics_are_no_outputs() -> None:
    x = leaf(2, 3)
    y = through(STANDARDISE)(x)
    assert isinstance(y, Tensor)
    torch.testing.assert_close(y, standardised(x))
    assert torch.autograd.gradcheck(through(STANDARDISE), (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(through(STANDARDISE), (x,), check_fwd_over_rev=True)


@pytest.mark.parametrize("outer", [jacfwd, jacrev])
@pytest.mark.parametrize("inner", [jacfwd, jacrev])
def test_saved_statistics_under_transforms(outer: Any, inner: Any) -> None:
    x = leaf(4).detach()
    ours = outer(inner(lambda v: through(STANDARDISE)(v).sin().sum()))(x)
    torch.testing.assert_close(ours, outer(inner(lambda v: standardised(v).sin().sum()))(x))
    batch = leaf(3, 4).detach()
    per_sample = vmap(grad(lambda v: through(STANDARDISE)(v).sin().sum()))(batch)
    torch.testing.assert_close(per_sample, vmap(grad(lambda v: standardised(v).sin().sum()))(batch))


# ------------------------------------------------------------- an integer input (a loss of classes)


def picked(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[:, None]).square().sum()


PICK = Op(
    name="pick",
    bind=None,
    forward=lambda params, x, index: picked(x, index),
    rule=lambda params, needs, specs, grads, saved: (
        torch.zeros_like(saved[0]).scatter(
            1, saved[1][:, None], 2 * grads[0] * saved[0].gather(1, saved[1][:, None])
        ),
        None,
    ),
)


def test_an_integer_input_has_no_gradient() -> None:
    x, index = leaf(3, 4), torch.tensor([0, 2, 1], device=DEVICE)
    assert torch.autograd.gradcheck(lambda x: through(PICK)(x, index), (x,))
    assert torch.autograd.gradgradcheck(lambda x: through(PICK)(x, index), (x,))


# ------------------------------------------------------------------------- a random op (a dropout)


def _mask(seed: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(like.shape, generator=generator) > 0.5).to(like)


MASKED = Op(
    name="masked",
    bind=None,
    forward=lambda seed, x: x * _mask(seed, x),
    saves=lambda seed, needs: (),
    rule=lambda seed, needs, specs, grads, saved: (grads[0] * _mask(seed, grads[0]),),
)


def test_a_random_op_sees_one_mask_and_stores_none() -> None:
    x = leaf(50)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = through(MASKED, 7)(x)
    assert not saved
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(slope != 0, y != 0)
    assert 0 < slope.sum() < 50


# ------------------------------------------------- a gradient made in forward (a fused linear loss)


FUSED = Op(
    name="fused",
    bind=None,
    forward=lambda params, x: (x.square().sum(), 2 * x),
    saves=lambda params, needs: (2,),
    rule=lambda params, needs, specs, grads, saved: (grads[0] * saved[2],),
    max_order=1,
)


def test_a_gradient_made_in_forward() -> None:
    x = leaf(4)
    loss = through(FUSED)(x)
    for scale in (1.0, 3.0):
        (slope,) = torch.autograd.grad(scale * loss, x, retain_graph=True)
        torch.testing.assert_close(slope, scale * 2 * x)


# --------------------------------------------------------------------------------- a composite


def test_a_composite_is_the_ops_that_it_is_made_of() -> None:
    """Each part is recorded, launched and differentiated as itself, whoever calls, and what it does
    not compute with is torch's."""
    op = Op(name="outer", bind=None, reference=lambda p, x, y: (x[:, None] * y * p,))
    assert op.composite
    x, y = leaf(3), leaf(2)
    seen: list[Any] = []
    with runtime.observe(lambda kernel, *_: seen.append(kernel)):
        out = through(op, 2.0)(x, y)
    assert len(seen) == 2
    assert out.grad_fn.name() == "TritonMulBackward"
    expected = 2.0 * x[:, None] * y
    torch.testing.assert_close(out, expected)
    assert torch.autograd.gradcheck(through(op, 2.0), (x, y), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(through(op, 2.0), (x, y), check_fwd_over_rev=True)
    ours, native = (
        vmap(jacrev(jacfwd(f)), (0, None))(torch.stack([x, x + 1]).detach(), y.detach())
        for f in (lambda x, y: through(op, x.sum())(x, y), lambda x, y: x.sum() * x[:, None] * y)
    )
    torch.testing.assert_close(ours, native)


@pytest.mark.parametrize("policy", ["lower", "float32", None])
def test_a_composite_under_autocast(policy: str | None) -> None:
    """Cast as a whole where torch's list has it, and its parts then are not; else by its parts."""
    tensors = leaf(2, 3).float().detach(), leaf(3, 2).float().detach()
    seen: list[torch.dtype] = []

    def reference(params: None, a: Tensor, b: Tensor) -> tuple[Tensor]:
        out = torch.mm(a, b)
        seen.extend((a.dtype, out.dtype))
        return (out,)

    op = Op(
        name="product",
        bind=lambda a, b: ((*a, b), None),
        reference=reference,
        replaces=(torch.linalg.multi_dot,),
        autocast={} if policy is None else {DEVICE.type: policy},
    )
    with torch.autocast(DEVICE.type, torch.bfloat16):
        op([tensors[0]], tensors[1])
    within, result = seen
    assert within is (torch.bfloat16 if policy == "lower" else torch.float32)
    assert result is (torch.float32 if policy == "float32" else torch.bfloat16)


# ------------------------------------------------------------------------------- what is refused


def test_a_direction_without_a_rule_is_an_error_that_names_the_op() -> None:
    op = Op(
        name="once",
        bind=None,
        forward=lambda params, x: x.square(),
        rule=lambda params, needs, specs, grads, saved: (2 * grads[0] * saved[0],),
    )
    x = leaf(3)
    with pytest.raises(NotImplementedError, match="'once' has no forward-mode derivative"):
        torch.func.jvp(through(op), (x.detach(),), (x.detach(),))
    torch.testing.assert_close(vmap(through(op))(x.detach()), x.detach() ** 2)


def test_an_op_computes_or_is_composed() -> None:
    with pytest.raises(ValueError, match="'mute' has neither a forward nor a reference"):
        Op(name="mute", bind=None, differentiable=False)


def test_an_op_without_a_derivative_must_say_so() -> None:
    with pytest.raises(ValueError, match="'mute' has neither a derivative rule nor a reference"):
        Op(name="mute", bind=None, forward=lambda params, x: x)
    Op(name="mute", bind=None, forward=lambda params, x: x, differentiable=False)


def test_taken_names_and_callables_are_refused() -> None:
    with pytest.raises(ValueError, match="'exp' is registered already"):
        register(OPS["exp"])
    twin = Op(
        name="twin",
        bind=OPS["exp"].bind,
        forward=OPS["exp"].forward,
        replaces=(torch.exp,),
        differentiable=False,
    )
    with pytest.raises(ValueError, match="taken by op 'exp'"):
        register(twin)
    assert "twin" not in OPS
