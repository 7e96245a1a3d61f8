"""Every op against native torch on all of torch's own samples (OpInfo), while it runs on Triton.

torch's test suite keeps, for each of its operators, sample inputs and inputs that must be refused.
An op names the entries that cover it, and all their samples are run here: values, gradients, second
gradients and forward-mode derivatives, in every dtype, and every spelling of the call.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from support import (
    DEVICE,
    Call,
    Derivatives,
    assert_as_accurate,
    assert_derivatives_same,
    assert_same,
    derivatives,
    terms,
)
from torch import Tensor
from torch.testing._internal import common_utils
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo import core
from torch.testing._internal.opinfo.core import OpInfo

import tritongrad
from tritongrad.compare.parity import STAND_INS
from tritongrad.op import OPS, TARGETS, Op
from tritongrad.ops.embedding_bag import ANOTHERS_FREQUENCY
from tritongrad.reroute import HARMLESS, MOVES, UNCHANGED
from tritongrad.runtime import Session
from tritongrad.sampling import Sample

F = torch.nn.functional

# With each sample they look for a test of unittest's, in the source of every caller.
common_utils.extract_test_fn = core.extract_test_fn = lambda: None

# torch's, of a rank that it will understand in another way.
pytestmark = pytest.mark.filterwarnings("ignore:dropout2d. Received a 3D input:UserWarning")

EXPECTED_FALLBACKS = {
    "matrix norm": "torch.norm and torch.linalg.norm are vector norms too, and only those are ours",
    "a rank that torch refuses or warns of": "the warning is torch's",
    "sparse gradient": "torch's is a sparse tensor",
    "mode='max', scale_grad_by_freq=False": "of embedding_bag, left to torch",
    ANOTHERS_FREQUENCY: "torch's CPU has wrong gradients, which are not silently to become others",
    "max_norm, in place": "the table is torch's to renormalise, before it is ours to read",
    "nothing to normalise": "an empty batch, of which torch has statistics of its own",
    "no degrees of freedom, of which torch warns": (
        "the warning is torch's, as are the slopes, which depend on how dim was spelled"
    ),
}
"""Reason with which a sample may run on torch -> why that is right."""

NO_TANGENT = {("nn.functional.glu", dtype) for dtype in (torch.float16, torch.bfloat16)}
"""Of which torch has no tangent on the CPU."""

WRONG_IN_TORCH = {
    "scale_grad_by_freq": "its derivative of the gradient lacks the division by the frequency",
}
"""Option with which torch's second derivative is not that of its first -> what is wrong."""

INFOS: dict[str, OpInfo] = {
    ".".join(filter(None, (info.name, info.variant_test_name))): info for info in op_db
}
ENTRIES = [(op.name, entry) for op in OPS.values() for entry in op.opinfo]


UNCOVERED = {
    "addmm.decomposed": "addmm's samples without factors, again",
    "bmm.triton_optimized": "bmm's, for a kernel of torch's own",
    "nn.functional.batch_norm.without_cudnn": "batch_norm's, for another backend of torch's",
    "nn.functional.linear_cross_entropy.chunked": "options of torch's own kernels",
    "nn.functional.linear_cross_entropy.chunked_none": "options of torch's own kernels",
    "nn.functional.silu.complex": "complex",
    "norm.nuc": "matrix norms alone",
}
"""Entry of a torch function that is an op's, but that the op does not name -> why."""


def test_every_entry_is_named() -> None:
    """All that torch has of the functions whose calls the ops take."""
    ours = {
        entry
        for entry, info in INFOS.items()
        if not TARGETS.keys().isdisjoint((info.op, info.method_variant, info.operator_variant))
    }
    assert ours - {entry for _, entry in ENTRIES} == UNCOVERED.keys() & INFOS.keys()


MOST = 48
"""Samples of an entry that run in float64, a random choice of those that have more, half as many in
float32 and a quarter in each half precision, which repeat them; all with --every-op."""

FEWER = {"nn.functional.scaled_dot_product_attention": 7}
"""Of entries whose samples take seconds each in the interpreter, sixteen matrices in all orders."""


@pytest.fixture(autouse=True)
def all_samples(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    if pytestconfig.getoption("every_op"):
        monkeypatch.setitem(globals(), "MOST", sys.maxsize)


def samples(entry: str, dtype: torch.dtype, requires_grad: bool) -> list[Sample]:
    """The entry's samples as calls of torch's function."""
    found = list(INFOS[entry].sample_inputs(DEVICE, dtype, requires_grad=requires_grad))
    most = MOST * dtype.itemsize // torch.float64.itemsize
    if sys.maxsize != MOST:
        most = FEWER.get(entry, most)
    if len(found) > most:
        found = random.Random(0).sample(found, most)
    return [Sample((s.input, *s.args), s.kwargs, s.name) for s in found]


def function_of(info: OpInfo) -> Callable[..., Any]:
    """The entry's torch function, not one around it that seeds itself first: all calls here draw
    the same numbers, and are compared with those."""
    if "wrapper_set_seed" in getattr(getattr(info.op, "__code__", None), "co_names", ()):
        function: Callable[..., Any] = getattr(F, info.name.removeprefix("nn.functional."))
        return function
    return info.op


def has_tangent(info: OpInfo) -> bool:
    """Whether torch has one, or what stands in for it here."""
    return info.supports_forward_ad or function_of(info) in STAND_INS


def check_session(op: Op, session: Session) -> bool:
    """Whether the op ran. Fails for any call that torch ran without a reason listed above."""
    reasons = {r for _, r in session.fell_back if r not in HARMLESS}
    unexpected = reasons - EXPECTED_FALLBACKS.keys()
    assert not unexpected, f"on torch: {dict(session.fell_back)}"
    unchanged = any(reason == UNCHANGED for _, reason in session.fell_back)
    assert session.ran[op.name] or reasons or unchanged, f"{op.name} did not run: {session}"
    return bool(session.ran[op.name])


def rerouted(call: Call, sessions: list[Session]) -> Callable[..., Any]:
    """The call inside ``use()``; what each session saw is appended to ``sessions``."""

    def function(*inputs: Tensor) -> Any:
        with tritongrad.use() as session:
            result = call.original(*inputs)
        sessions.append(session)
        return result

    return function


def both(op: Op, entry: str, dtype: torch.dtype) -> Iterator[tuple[Call, Derivatives, Derivatives]]:
    """For each sample that runs on Triton: the call, what we compute, what torch computes."""
    info = INFOS[entry]
    orders = {
        # Backward of a backward in half precision has no float64 reference of its own: the rounded
        # gradient in between is an input of it.
        "second": info.supports_gradgrad and dtype in (torch.float64, torch.float32),
        "forward": has_tangent(info) and (entry, dtype) not in NO_TANGENT,
    }
    on_triton = 0
    for sample in samples(entry, dtype, info.supports_autograd):
        call = Call(op, sample, function_of(info), may_draw=True)
        sessions: list[Session] = []
        wrong = any(sample.kwargs.get(option) for option in WRONG_IN_TORCH)
        asked = orders | ({"second": False} if wrong else {})
        ours = derivatives(rerouted(call, sessions), call.inputs, dtype, **asked)
        ran = [check_session(op, session) for session in sessions]
        if all(ran):
            on_triton += 1
            yield call, ours, derivatives(call.torch, call.inputs, dtype, **asked)
    assert on_triton, "every sample ran on torch"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("name", "entry"), ENTRIES)
def test_derivatives_equal_torchs(name: str, entry: str, dtype: torch.dtype) -> None:
    info = INFOS[entry]
    for call, ours, theirs in both(OPS[name], entry, dtype):
        if name in CANCELLING and dtype is torch.float32:
            ours, theirs = (relative(found, largest_of(call)) for found in (ours, theirs))

        def exact(call: Call = call) -> Derivatives:
            wide = call.double()
            second, forward = info.supports_gradgrad, has_tangent(info)
            return derivatives(wide.torch, wide.inputs, dtype, second=second, forward=forward)

        assert_derivatives_same(
            ours, theirs, repr(call), exact=None if dtype is torch.float64 else exact
        )


CANCELLING = {
    "scaled_dot_product_attention": "of e - delta, delta is the product of a result and its "
    "gradient, as in torch's own fused kernels, which test_attention.py compares with; the formula "
    "that is compared with here sums p e, so that the rounding of one cancels the other's",
}
"""Ops whose kernels sum other terms than torch's formula -> which. Errors are relative to those,
products of two inputs in first derivatives and of three in the second."""


def relative(found: Derivatives, largest: float) -> Derivatives:
    """Derivatives in units of such products."""

    def scaled(values: list[Tensor | None], unit: float) -> list[Tensor | None]:
        return [t if t is None else t / unit for t in values]

    return found._replace(
        gradient=scaled(found.gradient, largest**2),
        second=scaled(found.second, largest**3),
        tangents=scaled(found.tangents, largest**2),
    )


def largest_of(call: Call) -> float:
    return max(t.abs().max().item() for t in call.inputs)


ROUNDED_BETWEEN = {
    "linear_cross_entropy": "the gradient of the logits is rounded, as torch's is, before products "
    "in which its elements cancel: it is the tensor's largest element that errors are relative to",
}
"""Ops that are several of torch's -> what is rounded between those."""


def all_cancels(call: Call) -> bool:
    """Whether the slopes are what is left of terms a million times as large: of batch_norm over two
    numbers, which are 1 and -1 once they are normalised, whatever they were."""
    return call.op.name == "batch_norm" and call.inputs[0].shape == (2, 1)


# torch's, of a gradient that it has no batching rule for.
@pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize(("name", "entry"), ENTRIES)
def test_half_precision_is_as_accurate(name: str, entry: str, dtype: torch.dtype) -> None:
    """HAZARDS 15."""
    for call, ours, theirs in both(OPS[name], entry, dtype):
        wide = call.double()
        forward = has_tangent(INFOS[entry])
        exact = derivatives(wide.torch, wide.inputs, dtype, second=False, forward=forward)
        check = partial(assert_as_accurate, what=repr(call))
        value = None
        if name in CANCELLING:
            # Directions are normally distributed, the largest of a tensor about 3.
            value = [torch.tensor(largest_of(call))]
            gradient = tangents = [3 * value[0] ** 2] * len(call.inputs)
        else:
            gradient, tangents = terms(wide.torch, wide.inputs, dtype)
        check(ours.value, theirs.value, exact.value, scale=value)
        if name in ROUNDED_BETWEEN:
            gradient = [t.amax().expand_as(t) if t.numel() else t for t in gradient]
        if all_cancels(call):
            continue
        check(ours.gradient, theirs.gradient, exact.gradient, scale=gradient)
        if (entry, dtype) not in NO_TANGENT:
            check(ours.tangents, theirs.tangents, exact.tangents, scale=tangents)


def spellings(info: OpInfo) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every way to write the call: method, operator, aliases and their methods."""
    for name in ("method_variant", "operator_variant"):
        if function := getattr(info, name):
            yield name, function
    for alias in info.aliases:
        yield f"alias {alias.name}", alias.op
        if alias.method_variant:
            yield f"method alias {alias.name}", alias.method_variant


@pytest.mark.filterwarnings("ignore:.*degrees of freedom is <= 0:UserWarning")
@pytest.mark.parametrize(("name", "entry"), ENTRIES)
def test_every_spelling_runs_on_triton(name: str, entry: str) -> None:
    op, info = OPS[name], INFOS[entry]
    for spelling, function in spellings(info):
        for sample in samples(entry, torch.float32, False):
            args, kwargs, _ = sample
            try:
                expected = function(*args, **kwargs)
            except TypeError:
                continue  # a method has not every overload of its function
            with tritongrad.use() as session:
                result = function(*args, **kwargs)
            check_session(op, session)
            call = Call(op, sample, function)
            what = f"{spelling} of {Call(op, sample, info.op)!r}"
            assert_same(result, expected, what, exact=call.double().torch)


@pytest.mark.parametrize(
    ("name", "entry"), [e for e in ENTRIES if INFOS[e[1]].inplace_variant is not None]
)
def test_in_place_stays_with_torch(name: str, entry: str) -> None:
    """The result is written where torch's would be, and the session says why torch ran it."""
    info = INFOS[entry]
    variants = [info.inplace_variant, *(a.inplace_variant for a in info.aliases)]
    for function in filter(None, variants):
        # float64, which float_power's result would not fit otherwise.
        for sample in info.sample_inputs(DEVICE, torch.float64):
            if sample.broadcasts_input:
                continue
            target, expected = sample.input.clone(), sample.input.clone()
            function(expected, *sample.args, **sample.kwargs)
            with tritongrad.use() as session:
                result = function(target, *sample.args, **sample.kwargs)
            assert result is target
            # A random entry saves the generator's state.
            assert {reason for _, reason in session.fell_back} - {MOVES} == {"in-place"}
            assert not session.ran
            assert torch.equal(target, expected)


def refuses(call: Callable[[], Any]) -> bool:
    """Whether torch does; it takes some calls that OpInfo lists, and a reflected operator without a
    tensor hands on to the other operand."""
    try:
        call()
    except Exception:
        return True
    return False


@pytest.mark.parametrize(
    ("name", "entry"), [e for e in ENTRIES if INFOS[e[1]].error_inputs_func is not None]
)
def test_refuses_what_torch_refuses(name: str, entry: str) -> None:
    """HAZARDS 28: torch's exception, and torch's message after what came for each argument."""
    info = INFOS[entry]
    # Another overload of the torch function may be another op.
    takers = [op.name for op in OPS.values() if info.op in (*op.replaces, *op.variants)] + [name]
    for refused in info.error_inputs(DEVICE.type):
        sample = refused.sample_input
        call = partial(info.op, sample.input, *sample.args, **sample.kwargs)
        if not refuses(call):
            continue
        with (
            tritongrad.use() as session,
            pytest.raises(refused.error_type, match=refused.error_regex or None) as caught,
        ):
            call()
        assert not session.ran[name]
        # Arguments that fit no overload are refused by torch's parser, before any mode is asked.
        if session.fell_back:
            assert str(caught.value).partition("(")[0] in takers, caught.value
