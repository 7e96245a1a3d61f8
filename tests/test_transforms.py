"""torch.func and forward mode (HAZARDS 7, 21): every transform, nested, equals native torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scenarios import SUMMED, small
from support import DEVICE, assert_same, floats, random_like
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    vjp,
    vmap,
)

import tritongrad
from tritongrad.op import OPS, Unsupported
from tritongrad.ops import operands
from tritongrad.sampling import Random

DIFFERENTIABLE = [name for name, op in OPS.items() if op.differentiable]

COMPOSITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "products": lambda v: (v.tanh() * v**3).sum() / (1 + torch.dot(v, v)),
    "norms": lambda v: torch.linalg.vector_norm(v) * v.exp().mean() - v.amax(),
    "matrices": lambda v: (torch.outer(v.sin(), v) @ v).sigmoid().sum(),
    "broadcasting": lambda v: (v[:, None] * v.cos() - v.sqrt()).sum(0).square().sum(),
    "choice": lambda v: (
        torch.where(v > 1, v * v, v.log()).sum() + torch.maximum(v, 2 * v - 1).sum()
    ),
}


# torch's own norm writes into a tensor that its third derivative needs, and raises.
NATIVE = COMPOSITIONS | {"norms": lambda v: v.square().sum().sqrt() * v.exp().mean() - v.amax()}


def point() -> Tensor:
    return Random(torch.float64, DEVICE)(3, low=0.4, high=1.6, requires_grad=False)


def rerouted(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with its torch calls on our ops, the transforms around it left to torch."""

    def run(*args: Any) -> Any:
        with tritongrad.use() as session:
            result = function(*args)
        assert session.ran
        return result

    return run


@pytest.mark.parametrize("name", COMPOSITIONS)
@pytest.mark.parametrize(
    "nest",
    list(itertools.product([jacfwd, jacrev], repeat=3)),
    ids=lambda n: "-".join(f.__name__ for f in n),
)
def test_third_derivatives_by_every_nest(name: str, nest: tuple[Callable[..., Any], ...]) -> None:
    """Two levels of forward mode lose the inner tangent in a plain autograd.Function."""
    native, ours = NATIVE[name], rerouted(COMPOSITIONS[name])
    for transform in nest:
        native, ours = transform(native), transform(ours)
    assert_same(ours(point()), native(point()), name, tolerance=SUMMED)


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_hessian_and_its_product_with_a_vector(name: str) -> None:
    function, x = COMPOSITIONS[name], point()
    v = torch.ones_like(x)
    assert_same(hessian(rerouted(function))(x), hessian(function)(x), name, tolerance=SUMMED)
    for product in (
        lambda f: jvp(grad(f), (x,), (v,))[1],
        lambda f: vjp(grad(f), x)[1](v)[0],
        lambda f: grad(lambda x: jvp(f, (x,), (v,))[1])(x),
    ):
        assert_same(product(rerouted(function)), product(function), name, tolerance=SUMMED)


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_transforms_applied_under_use(name: str) -> None:
    """The mode outside the transform, not inside."""
    function, x = COMPOSITIONS[name], point()
    expected = vmap(grad(function))(torch.stack([x, x + 0.5]))
    with tritongrad.use() as session:
        actual = vmap(grad(function))(torch.stack([x, x + 0.5]))
    assert session.launches
    assert_same(actual, expected, name, tolerance=SUMMED)


def without_indices(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with its floating-point results alone, as torch.func.vjp demands."""

    def run(*args: Any) -> Any:
        result = function(*args)
        return result if isinstance(result, Tensor) else tuple(floats(result))

    return run


def test_a_dual_number_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 0-dim tensor of the CPU beside tensors of a GPU is read as one: not where it may have a
    tangent, which would be lost."""
    monkeypatch.setattr(operands, "admit_or_scalar", lambda value: None)
    monkeypatch.setattr(operands.runtime, "DEVICE_TYPES", frozenset(("meta",)))
    there, number = torch.ones(3, device="meta"), torch.tensor(2.0)
    (_, left_out), params = operands.read_operands(("input", "other"), (there, number))
    assert left_out is None
    assert params.scalars == (None, 2.0)
    with forward_ad.dual_level(), pytest.raises(Unsupported, match="different devices"):
        operands.read_operands(
            ("input", "other"), (there, forward_ad.make_dual(number, torch.ones(())))
        )


def test_weights_of_a_loss_at_an_outer_level() -> None:
    """Of which the loss is no op of ours: it would take them for constants."""
    x, target, weight = (Random(torch.float64, DEVICE)(3, low=0.2, high=0.8) for _ in range(3))
    x, target, weight = x.detach(), target.detach(), weight.detach()

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        by_weight = F.binary_cross_entropy_with_logits(x, target, weight)
        return by_weight + F.binary_cross_entropy_with_logits(x, target, pos_weight=weight)

    def slope(weight: Tensor) -> Tensor:
        return grad(loss)(x, weight).square().sum()

    def found() -> list[Tensor]:
        forward = jvp(partial(loss, x), (weight,), (weight,))[1]
        return [grad(slope)(weight), forward, jvp(slope, (weight,), (weight,))[1]]

    expected = found()
    with tritongrad.use():
        assert_same(found(), expected, "weights", tolerance=SUMMED)


# A random op draws the same numbers for all samples; torch refuses it unless told how.
same = partial(vmap, randomness="same")

LOSES_WEIGHT = {"l1_loss"}
"""Functions of torch's that hand no ``weight`` to a mode, such as linearize's tracer."""


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.mechanism
def test_vjp_jvp_and_linearize(name: str) -> None:
    for call in small(name, most=3):
        # Clones: linearize writes into what it traces, and an expanded tensor cannot be written.
        inputs = [t.detach().clone(memory_format=torch.contiguous_format) for t in call.inputs]
        tangents = tuple(random_like(inputs, 5))
        results = []
        for function in map(without_indices, (call.triton, call.torch)):
            value, pull = vjp(function, *inputs)
            cotangents = random_like(floats(value), 6)
            cotangent = cotangents[0] if isinstance(value, Tensor) else tuple(cotangents)
            results.append(
                (
                    value,
                    pull(cotangent),
                    jvp(function, tuple(inputs), tangents),
                    linearize(function, *inputs)[1](*tangents)
                    # It draws when it is called, and not when it is made.
                    if len(results) == 1 and name not in LOSES_WEIGHT and not OPS[name].random
                    else jvp(function, tuple(inputs), tangents)[1],
                )
            )
        assert_same(results[0], results[1], str(call), tolerance=SUMMED)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.mechanism
def test_each_input_alone(name: str) -> None:
    """Twice differentiated: a gradient may be the upstream one as it is. Of no samples there are
    none."""
    if name == "chain_matmul":
        pytest.skip("torch's own has no batching rule, and the rest of multi_dot is tested by it")
    for call in small(name, most=1):
        inputs = [t.detach() for t in call.inputs]
        for i, x in enumerate(inputs):

            def loss(f: Callable[..., Any], x: Tensor, i: int = i, inputs: Any = inputs) -> Tensor:
                values = floats(f(*inputs[:i], x, *inputs[i + 1 :]))
                return torch.stack([t.square().sum() for t in values]).sum()

            def curvature(f: Callable[..., Any], x: Tensor, loss: Any = loss) -> Tensor:
                return grad(partial(loss, f))(x).square().sum()

            for value in (loss, curvature):
                slopes = [grad(partial(value, f))(x) for f in (call.triton, call.torch)]
                assert_same(slopes[0], slopes[1], f"{call}, input {i}", tolerance=SUMMED)
            of_none = same(grad(partial(loss, call.triton)))(torch.stack([x])[:0])
            assert of_none.shape == (0, *x.shape), f"{call}, input {i}"


@pytest.mark.parametrize("name", list(OPS))
def test_vmap_over_every_choice_of_dimensions(name: str) -> None:
    if name == "chain_matmul":
        pytest.skip("torch's own has no batching rule, and the rest of multi_dot is tested by it")
    for call in small(name, most=3):
        inputs = [t.detach() for t in call.inputs]
        choices = {0, None, -1}
        for dims in itertools.product(choices, repeat=len(inputs)):
            if all(d is None for d in dims):
                continue
            batched = [
                t if d is None else torch.stack([t, t * 0.5 + 0.1, t * 0.9], d)
                for t, d in zip(inputs, dims, strict=True)
            ]
            expected = same(call.torch, dims)(*batched)
            actual = same(call.triton, dims)(*batched)
            assert_same(actual, expected, f"{call}, in_dims={dims}", tolerance=SUMMED)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.mechanism
def test_gradients_per_sample(name: str) -> None:
    """Each sample has its own gradient, also of an input that all samples share."""
    for call in small(name, most=2):
        inputs = [t.detach() for t in call.inputs]
        everything = tuple(range(len(inputs)))

        def loss(function: Callable[..., Any]) -> Callable[..., Tensor]:
            return lambda *v: sum((t * t).sum() for t in floats(function(*v)))

        for dims in {(0,) * len(inputs), (0, *[None] * (len(inputs) - 1))}:
            batched = [
                t if d is None else torch.stack([t, t * 0.5 + 0.1])
                for t, d in zip(inputs, dims, strict=True)
            ]
            expected = same(grad(loss(call.torch), everything), dims)(*batched)
            actual = same(grad(loss(call.triton), everything), dims)(*batched)
            assert_same(actual, expected, f"{call}, in_dims={dims}", tolerance=SUMMED)
            nested = same(same(grad(loss(call.triton), everything), dims), dims)
            twice = [
                t if d is None else torch.stack([t, t * 0.9])
                for t, d in zip(batched, dims, strict=True)
            ]
            # Outer samples one by one: torch's own rules of some losses raise for an input without
            # either dimension.
            one_by_one = [
                same(grad(loss(call.torch), everything), dims)(
                    *[t if d is None else t[i] for t, d in zip(twice, dims, strict=True)]
                )
                for i in range(2)
            ]
            expected = tuple(map(torch.stack, zip(*one_by_one, strict=True)))
            assert_same(nested(*twice), expected, f"{call}, nested", tolerance=SUMMED)


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_dual_numbers_forward_over_reverse_and_reverse_over_forward(name: str) -> None:
    function, v = COMPOSITIONS[name], torch.ones(3, dtype=torch.float64, device=DEVICE)

    def forward_over_reverse(f: Callable[[Tensor], Tensor]) -> Tensor:
        x = point().requires_grad_()
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, v)
            (slope,) = torch.autograd.grad(f(dual), dual, create_graph=True)
            return forward_ad.unpack_dual(slope).tangent

    def reverse_over_forward(f: Callable[[Tensor], Tensor]) -> Tensor:
        x = point().requires_grad_()
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent
            return torch.autograd.grad(tangent, x)[0]

    for product in (forward_over_reverse, reverse_over_forward):
        assert_same(product(rerouted(function)), product(function), name, tolerance=SUMMED)


def test_transforms_over_dual_numbers() -> None:
    """torch.func inside a forward-mode level of the user's."""
    function, x = COMPOSITIONS["products"], point()
    v = torch.ones_like(x)

    def mixed(f: Callable[[Tensor], Tensor]) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(grad(f)(forward_ad.make_dual(x, v))).tangent

    assert_same(mixed(rerouted(function)), mixed(function), "mixed", tolerance=SUMMED)


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_functionalize_is_given_torchs_operators(name: str) -> None:
    """It refuses an autograd.Function, wherever it is among other transforms, and in a backward."""
    function, closed = COMPOSITIONS[name], point().requires_grad_()
    x = closed.detach()
    y = rerouted(function)(closed)
    for transform in (
        functionalize,
        lambda f: functionalize(grad(f)),
        lambda f: grad(functionalize(f)),
    ):
        expected = transform(function)(x)
        with tritongrad.use():
            found = transform(function)(x)
        assert_same(found, expected, name, tolerance=SUMMED)
    (found,) = functionalize(lambda g: torch.autograd.grad(y, closed, g))(torch.ones_like(y))
    assert_same(found, grad(function)(x), name, tolerance=SUMMED)


def test_a_network_as_a_function_of_its_parameters() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    model = model.double().to(DEVICE)
    x = Random(torch.float64, DEVICE)(5, 3, requires_grad=False)
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x,)).square().sum()

    per_sample = vmap(grad(loss), (None, 0))
    expected = per_sample(parameters, x)
    with tritongrad.use():
        actual = per_sample(parameters, x)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_same(actual[name], value, name, tolerance=SUMMED)


def test_batched_gradients_of_the_legacy_kind_are_right_or_an_error() -> None:
    """torch shows its own batching to no autograd.Function; a wrong number is not an option."""
    x = point().requires_grad_()
    directions = torch.eye(3, dtype=torch.float64, device=DEVICE)
    expected = torch.autograd.grad(F.relu(x.tanh()), x, directions, is_grads_batched=True)
    y = tritongrad.nn.functional.relu(tritongrad.tanh(x))
    try:
        actual = torch.autograd.grad(y, x, directions, is_grads_batched=True)
    except RuntimeError:
        return
    assert_same(actual, expected, "batched")
