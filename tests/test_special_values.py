"""Kinks, ties, NaN, infinities and the ends of the number range (HAZARDS 6 and 14).

Values, gradients, second derivatives and forward-mode derivatives are native torch's there, NaN
where torch has NaN.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from math import inf, nan
from typing import Any

import pytest
import torch
from scenarios import small
from support import (
    DEVICE,
    DIFFERENTIABLE,
    Call,
    Derivatives,
    assert_same,
    derivatives,
    flatten,
    random_like,
)
from torch import Tensor
from torch.autograd import forward_ad as fwAD

from tritongrad.dispatch import positional
from tritongrad.op import OPS
from tritongrad.runtime import INTERPRETED
from tritongrad.sampling import Sample, tensors

TINY, LEAST, HUGE = 2.2250738585072014e-308, 5e-324, 1.7e308
"""The smallest normal and subnormal numbers, and one near the largest."""

POINTS = (0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 3.0, -2.0, inf, -inf, nan, TINY / 4, -LEAST, HUGE, -HUGE)
"""Where pointwise functions have kinks, poles, overflow and underflow."""

# Gradients of these are sums: of the largest floats they overflow or do not by their order, and
# torch's products with vectors make NaN of the zeros that a lacking tangent is.
POINTWISE = [
    n
    for n in DIFFERENTIABLE
    if OPS[n].kernels[0] == "pointwise_dense" and n not in ("addr", "kron", "outer")
]


def assert_agrees(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    what: str,
    *,
    second: bool = True,
    left_out: Sequence[str] = (),
    overflows: bool = False,
) -> None:
    """Value and derivatives of ``ours`` are those of ``theirs``, special values included, those
    apart that are named in ``left_out``.

    Args:
        overflows: of numbers whose products do. Compiled, a product and its sum with another number
            are one operation that rounds once: exact where torch, which rounds the product too, has
            inf - inf.
    """
    mine, torchs = (
        present(derivatives(f, inputs, torch.float64, second=second), inputs)
        for f in (ours, theirs)
    )
    for order, actual, expected in zip(Derivatives._fields, mine, torchs, strict=True):
        if order in left_out:
            continue
        if overflows and not INTERPRETED:
            actual = [
                torch.where(e.isnan() & ~a.isnan(), e, a)
                if isinstance(a, Tensor) and isinstance(e, Tensor)
                else a
                for a, e in zip(flatten(actual), flatten(expected), strict=True)
            ]
        assert_same(actual, expected, f"{what}, {order}")


def present(found: Derivatives, inputs: Sequence[Tensor]) -> Derivatives:
    """``found`` with zeros where there is no derivative: here a derivative that is zero everywhere
    may be a tensor of zeros where it is None in torch."""
    second = [*found.second, *[None] * (len(inputs) - len(found.second))][: len(inputs)]
    zeros = [torch.zeros_like(x) if d is None else d for x, d in zip(inputs, second, strict=True)]
    return found._replace(second=zeros, attached=[])


def with_inputs(call: Call, values: Sequence[Tensor]) -> Call:
    """``call`` of other inputs."""
    args, kwargs = call.arguments([v.requires_grad_() for v in values])
    return Call(call.op, Sample(args, kwargs, call.sample.note), call.func)


# --------------------------------------------------------------------------------------- pointwise


MOST = 5
"""Calls of an op at each pattern: an even selection, of those that have more."""


def distinct(name: str) -> list[Call]:
    """The op's small samples that differ in more than their tensors' sizes and strides, and than in
    how these are walked: at special values that does not matter."""
    found: dict[str, Call] = {}
    for call in small(name, most=100):
        if all(t.numel() for t in call.inputs):
            found.setdefault(options(call), call)
    return list(found.values())[:: -(-len(found) // MOST)]


WALKS = frozenset(("dim", "keepdim", "dtype", "normalized_shape"))


def options(call: Call) -> str:
    """The arguments of a call but for values of tensors and ``WALKS``."""
    args, kwargs, _ = call.sample
    assert call.op.bind is not None
    names = [*positional(call.op.bind, len(args)), *kwargs]
    pairs = zip(names, (*args, *kwargs.values()), strict=True)
    return repr([(n, without_values(v)) for n, v in pairs if n not in WALKS])


def without_values(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [without_values(v) for v in value]
    return "tensor" if isinstance(value, Tensor) else value


AT_NAN = "torch's first derivative hands the gradient on, its second and its tangent are 0"
BY_PLACE = (
    "torch's vector code has NaN where its scalar code hands the gradient on (test_nan_alone)"
)

LEFT_OUT = {
    "fmod": ((TINY / 4, -LEAST, HUGE, -HUGE), "torch's vector code has NaN for a large quotient"),
    "remainder": ((TINY / 4, -LEAST, HUGE, -HUGE), "as fmod"),
    "gelu": ((HUGE, -HUGE), "torch's second derivative squares x: inf * 0 where ours is 0"),
    "swiglu": (
        (HUGE, -HUGE, inf, -inf),
        "torch's second derivative is a sum: inf - inf where ours is inf (test_gated has the rest)",
    ),
    "mish": ((HUGE, -HUGE), "torch's second derivative is a product that overflows, times a 0"),
    "silu": ((HUGE, -HUGE), "torch's second derivative is a product that overflows, times a 0"),
    **dict.fromkeys(
        ("glu", "geglu", "reglu"),
        ((HUGE, -HUGE), "products of three overflow, or do not, by the order of multiplication"),
    ),
    **dict.fromkeys(("elu", "selu", "celu", "hardswish"), ((nan,), BY_PLACE)),
    "hardtanh": ((nan,), AT_NAN),
    "relu6": ((nan,), AT_NAN),
    "hardshrink": ((nan,), AT_NAN),
    "softshrink": ((nan,), AT_NAN),
    "prelu": ((0.0, -0.0), "torch's first derivative has x > 0, its second and its tangent x >= 0"),
}
"""Op -> points at which it is not compared with torch, and why."""


def special_points(call: Call) -> list[float]:
    left_out, _ = LEFT_OUT.get(call.op.name, ((), ""))
    if call.sample.kwargs or len(call.inputs) > 2:
        # A product and a sum: whether a factor times HUGE overflows before it is added to an
        # infinity depends on whether the machine fuses the two, which torch leaves open.
        left_out = (*left_out, HUGE, -HUGE)
    # By their text: 0.0 and -0.0 are equal, and NaN is not.
    texts = set(map(str, left_out))
    points = [p for p in POINTS if str(p) not in texts]
    # An even number of them, because what is packed in one tensor is halved.
    return points + points[: len(points) % 2]


def special_calls(name: str) -> Iterator[Call]:
    """Calls on every pair of special points, or on every point with the sample's own numbers."""
    for call in distinct(name):
        chosen = special_points(call)
        points = torch.tensor(chosen, dtype=torch.float64, device=DEVICE)
        first, *others = call.inputs
        if any(t.shape != first.shape for t in others):
            repeated = points[torch.arange(first.numel(), device=DEVICE) % len(points)]
            for values in itertools.product(chosen, repeat=len(others)):
                filled = [torch.full_like(t, v) for t, v in zip(others, values, strict=True)]
                yield with_inputs(call, [repeated.view(first.shape), *filled])
            continue
        grid = torch.cartesian_prod(*[points] * len(call.inputs))
        columns = grid.reshape(len(grid), -1).unbind(1)
        if len(tensors(call.sample)) == len(call.inputs):
            yield with_inputs(call, [c.clone() for c in columns])
            continue
        # A condition keeps its own shape, so the points fill the sample's shape again and again.
        for chunk in zip(*[c.split(first.numel()) for c in columns], strict=True):
            if chunk[0].numel() == first.numel():
                yield with_inputs(call, [c.reshape(first.shape).clone() for c in chunk])


@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise(name: str) -> None:
    for call in special_calls(name):
        assert_agrees(call.triton, call.torch, call.inputs, str(call))


@pytest.mark.parametrize("name", [n for n, (_, why) in LEFT_OUT.items() if why == BY_PLACE])
def test_nan_alone(name: str) -> None:
    """Of one number torch uses its scalar code."""
    for call in distinct(name):
        alone = with_inputs(call, [torch.tensor([nan], dtype=torch.float64, device=DEVICE)])
        assert_agrees(alone.triton, alone.torch, alone.inputs, str(alone))


@pytest.mark.parametrize("name", POINTWISE)
def test_tangent_of_one_operand(name: str) -> None:
    """Forward mode where only one of the operands has a tangent."""
    for call in special_calls(name):
        for i in range(len(call.inputs) if len(call.inputs) > 1 else 0):
            mine, torchs = (tangent(f, call.inputs, i) for f in (call.triton, call.torch))
            assert_same(mine, torchs, f"{call}, tangent of operand {i}")


def tangent(function: Callable[..., Tensor], inputs: Sequence[Tensor], moving: int) -> Tensor:
    """Forward-mode derivative of ``function`` by the input at position ``moving``."""
    values = [x.detach() for x in inputs]
    with fwAD.dual_level():
        values[moving] = fwAD.make_dual(values[moving], random_like(inputs)[moving])
        return fwAD.unpack_dual(function(*values)).tangent


TWO_TERMS = dict.fromkeys(
    ("softsign", "tanhshrink"),
    "torch composes it of two terms: inf - inf where ours is inf, and where it cancels less exact",
)


TIMES_NO_TANGENT = {"glu": "torch multiplies the gradient by the tangent 0 of an input without one"}
"""Op -> why gradients that are not finite and carry a tangent are not compared."""


@pytest.mark.parametrize("name", POINTWISE)
@pytest.mark.parametrize("upstream", [inf, nan])
def test_upstream_gradient(name: str, upstream: float) -> None:
    """Gradients of what is not finite, by the kernel, and by the rule, which computes those that
    carry a tangent."""
    if name in TWO_TERMS and upstream == inf:
        pytest.skip(TWO_TERMS[name])
    for call in special_calls(name):
        for dual in (False, True)[: 1 if name in TIMES_NO_TANGENT else 2]:
            mine, torchs = (
                pullback(f, call.inputs, upstream, dual) for f in (call.triton, call.torch)
            )
            assert_same(mine, torchs, f"{call}, gradient of {upstream}, dual {dual}")


def pullback(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: float, dual: bool
) -> list[Tensor | None]:
    """Gradients for one upstream gradient everywhere, on request with tangents of their own."""
    with fwAD.dual_level():
        value = function(*inputs)
        g = torch.full_like(value, upstream)
        if dual:
            g = fwAD.make_dual(g, random_like([g])[0])
        # Differentiable ones: of some functions torch has others besides, without a tangent.
        found = torch.autograd.grad(value, inputs, g, create_graph=True)
        return [part for gradient in found for part in fwAD.unpack_dual(gradient)]


# -------------------------------------------------------------------- reductions and contractions

STRUCTURED = [n for n in DIFFERENTIABLE if n not in POINTWISE]

# Large enough to overflow when squared or multiplied. Sums of larger ones overflow or do not
# according to the order of summation.
LARGE = 1e200

CHAINS = {"chain_matmul", "multi_dot"}

PATTERNS: dict[str, tuple[float, ...]] = {
    "all zero": (0.0,),
    "both zeros": (0.0, -0.0),
    "all equal": (1.5,),
    "ties": (2.0, 1.0, -2.0),
    "one nan": (1.0, -2.0, 0.5, nan, 0.0, 3.0, 1.5),
    "all nan": (nan,),
    "one infinite": (1.0, 0.5, -2.0, inf, 3.0, 0.25, 1.5),
    "infinite and zero": (0.0, inf, 1.0, -0.0, -2.0),
    "both infinite": (1.0, inf, 0.5, -2.0, 3.0, -inf, 0.25),
    "all -infinite": (-inf,),
    "nan and infinite": (inf, 1.0, 2.0, nan, 0.5, 3.0, -inf),
    "zeros among others": (0.0, 1.0, 0.0, -2.0, 3.0),
    "subnormal": (TINY / 4, -TINY / 8, TINY / 2),
    "large": (LARGE, 1.0, LARGE / 2),
}


SECOND, LATER, DERIVED = ("second",), ("second", "tangents"), ("gradient", "second", "tangents")
ALWAYS = ("value", *DERIVED)

_DIVIDED = (
    "torch divides by x, so that inf / inf, nan / nan and products that overflow or vanish reach "
    "other elements, and has 0 past a zero; ours multiplies the others (test_scan has the numbers)"
)
_TERMS = "products of all factors but two overflow, vanish or meet 0 by the order of multiplication"
_PAST_ZERO = "torch's derivative of a running product is 0 past a zero, also of inf and nan"
_HIDDEN = (
    "what a key that is hidden from a query holds has no part, as in torch's fused kernels; its "
    "formula adds -inf to it"
)
_ATTENDED = "tangents that overflow as summed cancel where torch subtracts their mean first"
_WELFORD = "torch's mean is inf - inf if an element follows the infinity, else inf; ours is inf"

NOT_COMPARED: dict[tuple[str, str], tuple[tuple[str, ...], str]] = {
    ("prod", "one nan"): (SECOND, _PAST_ZERO),
    ("prod", "infinite and zero"): (SECOND, _PAST_ZERO),
    ("prod", "one infinite"): (SECOND, _TERMS),
    ("prod", "both infinite"): (SECOND, _TERMS),
    ("prod", "nan and infinite"): (SECOND, _TERMS),
    ("prod", "subnormal"): (SECOND, _TERMS),
    ("prod", "large"): (SECOND, _TERMS),
    ("cumprod", "one nan"): (LATER, _DIVIDED),
    ("cumprod", "all nan"): (("tangents",), _DIVIDED),
    ("cumprod", "subnormal"): (LATER, _DIVIDED),
    ("cumprod", "all -infinite"): (("gradient", "tangents"), _DIVIDED),
    ("cumprod", "one infinite"): (DERIVED, _DIVIDED),
    ("cumprod", "both infinite"): (DERIVED, _DIVIDED),
    ("cumprod", "nan and infinite"): (DERIVED, _DIVIDED),
    ("cumprod", "infinite and zero"): (DERIVED, _DIVIDED),
    ("cumprod", "large"): (DERIVED, _DIVIDED),
    ("var_mean", "one infinite"): (("value",), _WELFORD),
    ("std_mean", "one infinite"): (("value",), _WELFORD),
    **{
        ("binary_cross_entropy", pattern): (
            SECOND,
            "torch's slope of logit at -0.0 is -inf in its vector code, inf in the rest",
        )
        for pattern in ("both zeros", "infinite and zero")
    },
    ("cross_entropy", "large"): (
        SECOND,
        "of probabilities of 1e200 terms of that size cancel",
    ),
    **{
        (name, "large"): (
            DERIVED,
            "the deviation overflows: slopes are 0, as in torch's kernels; by the definition NaN",
        )
        for name in ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
    },
    **{
        (name, "one infinite"): (
            DERIVED,
            "of an infinite weight: infinities of both signs meet by the order of the terms",
        )
        for name in ("layer_norm", "add_layer_norm")
    },
    ("group_norm", "all equal"): (
        SECOND,
        "torch's differ from their mean by rounding, which the eps ** -1.5 of the slopes magnifies",
    ),
    ("instance_norm", "infinite and zero"): (
        DERIVED,
        "of an infinite weight: the definition has inf - inf",
    ),
    ("group_norm", "one infinite"): (
        ALWAYS,
        "of an infinite weight, with the mean times which torch shifts: inf - inf",
    ),
    **{
        (name, "large"): (DERIVED, "the variance overflows: slopes are 0; by the definition NaN")
        for name in ("instance_norm", "batch_norm")
    },
    ("group_norm", "large"): (ALWAYS, "the variance overflows: 0, as the definition; torch: NaN"),
    **{
        (name, pattern): (ALWAYS, _HIDDEN)
        for name in ("scaled_dot_product_attention", "attention")
        for pattern in ("one nan", "one infinite", "both infinite", "nan and infinite")
    },
    **{("attention", pattern): (DERIVED, _HIDDEN) for pattern in ("all nan", "all -infinite")},
    ("scaled_dot_product_attention", "large"): (LATER, _ATTENDED),
    ("attention", "infinite and zero"): (ALWAYS, _HIDDEN),
    ("attention", "large"): (DERIVED, _ATTENDED),
    ("kl_div", "large"): (
        SECOND,
        "of a log target; infinities of both signs, torch adds terms before it multiplies by exp",
    ),
}
"""(op, pattern) -> what of it is not compared with torch, and why."""

DOMAIN = {"binary_cross_entropy": (0.0, 1.0, 0.5), "gaussian_nll_loss": (0.0, inf, nan)}
"""Of ops that look at values and refuse some: the least and largest they take, and what for NaN."""


@pytest.mark.parametrize("name", STRUCTURED)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_structured(name: str, pattern: str) -> None:
    """Rows of ties, zeros, NaN and infinities."""
    numbers = torch.tensor(PATTERNS[pattern], dtype=torch.float64, device=DEVICE)
    if pattern == "large" and name in CHAINS:
        pytest.skip("a product of three is a sum of overflows, infinite unless fused to the sum")
    left_out, _ = NOT_COMPARED.get((name, pattern), ((), ""))
    if not INTERPRETED and name in ("rms_norm", "add_rms_norm") and "infinite" in pattern:
        pytest.skip("torch's fused kernel on a GPU has NaN where its definition has 0")
    for call in distinct(name):
        low, high, instead = DOMAIN.get(name, (-inf, inf, nan))
        numbers = numbers.clamp(low, high).nan_to_num(instead, inf, -inf)
        inputs = [
            numbers[torch.arange(t.numel(), device=DEVICE) % len(numbers)].view(t.shape)
            for t in call.inputs
        ]
        changed = with_inputs(call, inputs)
        # The terms of the second derivative of a norm of order 1/2 overflow at subnormal numbers,
        # and which of them meet as infinities of either sign is the order of multiplication.
        second = not (pattern == "subnormal" and "0.5" in options(call))
        what = f"{call}, {pattern}"
        assert_agrees(
            changed.triton, changed.torch, changed.inputs, what,
            second=second, left_out=left_out, overflows=pattern == "large",
        )  # fmt: skip


ROWS = {
    "prod": [
        [1.0, nan, 0.0], [0.0, inf, 1.0], [0.0, inf, 0.0], [nan, 0.0, 0.0], [0.0, 0.0, inf, 1.0],
        [0.0, nan], [inf], [0.0], [1.0, inf, 2.0], [2.0, 0.0, -3.0],
    ],
    "logsumexp": [[1e30, 1e30, 1.0], [-inf, 1.0], [inf, 1.0], [nan, 1.0]],
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str, dtype: torch.dtype) -> None:
    """Rows whose other elements decide what the derivative by one of them is."""
    op = OPS[name]
    for row in ROWS[name]:
        x = torch.tensor(row, dtype=dtype, device=DEVICE, requires_grad=True)
        mine, torchs = (
            derivatives(lambda x, f=f: f(x, 0), [x], dtype, second=False)
            for f in (op.entry, op.replaces[0])
        )
        assert_same(mine.gradient, torchs.gradient, f"{name} of {row}, gradient")
        assert_same(mine.tangents, torchs.tangents, f"{name} of {row}, tangents")


ANGLES = [
    ([LARGE, 1.0, LARGE], [LARGE, 1.0, LARGE]),
    ([LARGE, 1.0, LARGE], [1.0, 2.0, 3.0]),
    ([LARGE, -LARGE], [LARGE, LARGE]),
    ([inf, 1.0, LARGE], [1.0, 2.0, 3.0]),
    ([inf, 1.0, LARGE], [LARGE, 2.0, 3.0]),
    ([nan, LARGE], [LARGE, 1.0]),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("one", "other"), ANGLES)
def test_angles(one: list[float], other: list[float], dtype: torch.dtype) -> None:
    """Of vectors whose squares overflow, and of infinite ones."""
    scale = 1.0 if dtype is torch.float64 else 1e-175
    x, y = (
        torch.tensor([v * scale if abs(v) == LARGE else v for v in row], dtype=dtype, device=DEVICE)
        for row in (one, other)
    )
    cosine = torch.nn.functional.cosine_similarity
    ours = OPS["cosine_similarity"].entry
    inputs = [t.requires_grad_() for t in (x, y)]
    mine, torchs = (
        present(derivatives(lambda x, y, f=f: f(x, y, 0), inputs, dtype), inputs)
        for f in (ours, cosine)
    )
    for order, actual, expected in zip(Derivatives._fields, mine, torchs, strict=True):
        assert_same(actual, expected, order)
