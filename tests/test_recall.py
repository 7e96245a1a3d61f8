"""Calls recognised as an earlier one: read once, and never taken for another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import ALL, DEVICE, assert_same, calls, flatten
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tritongrad
from tritongrad import recall, sampling
from tritongrad.compare.parity import seeded
from tritongrad.op import OPS
from tritongrad.program import Recalled
from tritongrad.recall import remembering
from tritongrad.sampling import Sample


class Reader:
    """A ``bind`` that counts how often it reads; ``swap``: its tensors come in reverse order."""

    def __init__(self, ambient: Callable[[], Any] | None = None, swap: bool = False) -> None:
        self.reads = 0
        self.swap = swap
        self.recall = remembering(self.bind, ambient)

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        self.reads += 1
        found = sampling.tensors(Sample(args, kwargs))
        numbers = [a for a in (*args, *kwargs.values()) if not isinstance(a, Tensor)]
        return (*(found[::-1] if self.swap else found), None), (self.reads, numbers)

    def knows(self, *args: Any, **kwargs: Any) -> bool:
        """Whether this call is recognised."""
        before = self.reads
        self.recall(*args, **kwargs)
        return self.reads == before


X = torch.arange(6.0, device=DEVICE).view(2, 3)
Y = X + 1


@pytest.mark.parametrize("swap", [False, True])
def test_recognised(swap: bool) -> None:
    """Other tensors of the same kind: they are the ones that come back, in the op's order."""
    reader = Reader(swap=swap)
    first = reader.recall(X, Y, 2, dim=(0, 1))
    a, b = X.clone(), Y.clone()
    (*tensors, last), params = reader.recall(a, b, 2, dim=(0, 1))
    assert reader.reads == 1
    assert params is first[1]
    assert [id(t) for t in tensors] == [id(t) for t in ((b, a) if swap else (a, b))]
    assert last is None


def test_several_forms_remembered() -> None:
    forms = (Y, Y[:1], Y[0], Y.half(), Y.t().contiguous().t(), Y.clone().requires_grad_())
    reader = Reader()
    for _ in range(2):
        for second in forms:
            reader.recall(X, second)
    assert reader.reads == len(forms)


OTHERS: dict[str, tuple[tuple, dict[str, Any]]] = {
    "dtype": ((X.double(), Y), {}),
    "dtype of the second": ((X, Y.double()), {}),
    "shape": ((X[:1], Y), {}),
    "shape of the second": ((X, Y[:1]), {}),
    "strides": ((X, Y.t().contiguous().t()), {}),
    "lazily negated": ((X, torch._neg_view(Y)), {}),
    "zero tensor": ((X, torch._efficientzerotensor((2, 3), device=DEVICE)), {}),
    "meta": ((X, Y.to("meta")), {}),
    "complex": ((X, Y.cfloat()), {}),
    "sparse": ((X, Y.to_sparse()), {}),
    "parameter": ((X, torch.nn.Parameter(Y)), {}),
    "subclass": ((X, Y.as_subclass(type("Own", (Tensor,), {}))), {}),
    "same one twice": ((X, X), {}),
    "number for a tensor": ((X, 2), {}),
    "another tensor": ((X, Y, Y.clone()), {}),
    "one tensor": ((X,), {}),
    "keyword": ((X,), {"other": Y}),
    "a number more": ((X, Y, 1), {}),
    "a keyword more": ((X, Y), {"alpha": 1}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_taken_for_no_other_tensors(case: str) -> None:
    args, kwargs = OTHERS[case]
    reader = Reader()
    reader.recall(X, Y)
    assert not reader.knows(*args, **kwargs)


def test_one_tensor_in_two_places_is_not_two() -> None:
    """Nor the other way round, as OTHERS has it."""
    reader = Reader()
    reader.recall(X, X)
    (a, b, _), _ = reader.recall(X, Y)
    assert a is X
    assert b is Y


@pytest.mark.parametrize(
    ("before", "after"),
    [(1, True), (1, 1.0), (0, False), ("a", "b"), ((1,), (2,)), (torch.float32, torch.float64),
     (None, 0), (0.5, 0.25), (0.0, -0.0), ((True,), (1,)), ([1], (1,)), ([1, [2]], [1, [3]]),
     ((0.0,), (-0.0,)), ([Y], [Y[:1]]), ((Y, 1), (Y.double(), 1))],
)  # fmt: skip
def test_taken_for_no_other_value(before: Any, after: Any) -> None:
    for arguments in (lambda v: ((X, v), {}), lambda v: ((X,), {"v": v})):
        reader = Reader()
        for value in (before, after):
            args, kwargs = arguments(value)
            assert not reader.knows(*args, **kwargs)
            assert reader.knows(*args, **kwargs)


def test_what_cannot_be_compared_is_always_read() -> None:
    reader = Reader()
    for value in ({1: 2}, slice(2), [1, {}]):
        assert not reader.knows(X, value)
        assert not reader.knows(X, value)


def test_lists_are_read_for_what_is_in_them() -> None:
    """The same list with something else in it is another; and what was made of it stays."""
    kept: list[Any] = []
    reader = Reader()
    reader.recall = remembering(lambda x, dims: kept.append(dims) or reader.bind(x, dims), None)
    dims = [0, 1]
    assert not reader.knows(X, dims)
    dims[0] = 2
    assert kept == [[0, 1]]
    assert not reader.knows(X, dims)
    assert reader.knows(X, [2, 1])


def reshaping(x: Tensor, y: Tensor) -> Any:
    return (y.unsqueeze(-1), x, None), None


def test_reshaped_views_are_made_anew() -> None:
    """Of the tensors of this call, on its graph."""
    recall = remembering(reshaping, None)
    recall(X, Y.clone().requires_grad_())
    x, y = X.clone(), Y.clone().requires_grad_()
    (view, found, none), _ = recall(x, y)
    assert none is None
    assert found is x
    assert view.shape == (2, 3, 1)
    view.sum().backward()
    assert y.grad is not None


@pytest.mark.parametrize(
    "other",
    [
        lambda x, y: (y.t(), x),  # moves elements
        lambda x, y: (y.clone(), x),
        lambda x, y: (y.detach(), x),
        lambda x, y: (y[:1], x),
        lambda x, y: (y.unsqueeze(0), y),
        lambda x, y: (x.view(3, 2), x.view(6)),
        lambda x, y: (x,),
    ],
)
def test_other_views_are_not_remembered(other: Callable[..., Any]) -> None:
    reads = []

    def bind(x: Tensor, y: Tensor) -> Any:
        reads.append(x)
        return other(x, y), None

    recall = remembering(bind, None)
    y = Y.clone().requires_grad_()
    recall(X, y)
    recall(X, y)
    assert len(reads) == 2


def test_views_of_one_memory_are_told_apart_or_read_again() -> None:
    recall = remembering(reshaping, None)
    for _ in range(2):
        (view, found, _), _ = recall(X, X.view(3, 2))
        assert view.shape == (3, 2, 1)
        assert found is X


def test_not_a_number_is_never_recognised_as_another() -> None:
    reader = Reader()
    assert not reader.knows(X, float("nan"))
    assert not reader.knows(X, float("nan"))


class Watching(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "context",
    [torch.inference_mode, Watching, lambda: torch.autocast(DEVICE.type, torch.bfloat16)],
    ids=["inference_mode", "dispatch mode", "autocast"],
)
def test_taken_for_no_other_state(context: Callable[[], Any]) -> None:
    reader = Reader()
    reader.recall(X, Y)
    with context():
        assert not reader.knows(X, Y)


def test_not_recognised_under_transforms() -> None:
    """Nor is what is read there remembered: it has no launch of its own."""
    reader = Reader()

    def function(x: Tensor) -> Tensor:
        assert not reader.knows(x, Y)
        assert not reader.knows(X, Y)
        return x.sum()

    torch.func.grad(function)(X)
    torch.vmap(function)(torch.stack([X, X]))
    torch.func.jvp(function, (X,), (X,))
    assert not reader.knows(X, Y)
    assert reader.knows(X, Y)


def test_says_whether_to_record() -> None:
    """As torch does: where a tensor asks for it and grad mode is on, whatever came before."""
    wanted, constant = X.clone().requires_grad_(), X.clone()
    reader = Reader()
    recognise = reader.recall.recognise  # type: ignore[attr-defined]

    def asks(*tensors: Tensor) -> bool:
        reader.recall(*tensors)
        bound, _, found = recognise(tensors, {})
        assert bound is not None
        return found

    for _ in range(2):
        assert asks(wanted, constant)
        assert asks(constant, wanted)
        assert not asks(constant, X)
        with torch.no_grad():
            assert not asks(wanted, constant)
            assert not tritongrad.mm(wanted, constant.mT).requires_grad
        assert tritongrad.mm(wanted, constant.mT).requires_grad


def test_autocast_has_its_say() -> None:
    """What was read under autocast is not for a call that has not been cast."""
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        half = X.to(dtype)
        for _ in range(2):
            with torch.autocast(DEVICE.type, dtype):
                assert tritongrad.mm(X, Y.mT).dtype is dtype
                assert tritongrad.mm(half, half.mT).dtype is dtype
                assert tritongrad.mm(X.bfloat16(), X.half().mT).dtype is dtype
            assert tritongrad.mm(X, Y.mT).dtype is torch.float32
            assert tritongrad.mm(half, half.mT).dtype is dtype


def test_ambient_state() -> None:
    state = [1]
    reader = Reader(lambda: state[0])
    reader.recall(X)
    assert reader.knows(X)
    state[0] = 2
    assert not reader.knows(X)
    never = Reader(object)
    assert not never.knows(X)
    assert not never.knows(X)


def test_default_dtype() -> None:
    """What integers are converted to; floating-point tensors do not ask."""
    integers = torch.arange(3, device=DEVICE)
    try:
        assert tritongrad.exp(integers).dtype is torch.float32
        torch.set_default_dtype(torch.float64)
        assert tritongrad.exp(integers).dtype is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert tritongrad.exp(integers).dtype is torch.float32


def test_precision_of_products() -> None:
    """A product's launch depends on what torch was told about float32."""
    params = []
    for precision in ("highest", "high", "highest"):
        torch.set_float32_matmul_precision(precision)
        params.append(OPS["mm"].bind(X, X.t())[1].plan.meta["PRECISION"])
    assert params == ["ieee", "tf32", "ieee"]


def test_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "MOST", 3)
    reader = Reader()
    for n in range(10):
        assert not reader.knows(X, n)
    assert reader.knows(X, 9)
    assert not reader.knows(X, 0)


def test_without_torchs_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not part of torch's public interface: without them every call is read."""
    monkeypatch.setattr(recall, "TensorGuards", None)
    reader = Reader()
    assert not reader.knows(X, Y)
    assert not reader.knows(X, Y)


def test_threads() -> None:
    """Many threads, few shapes, little memory: everyone gets his own tensors back."""
    reader = Reader()
    wrong: list[Any] = []

    def work(seed: int) -> None:
        for i in range(300):
            x = torch.full((1 + (i * seed) % 5, 2), float(seed), device=DEVICE)
            (found, _), (_, numbers) = reader.recall(x, i % 3)
            if found is not x or numbers != [i % 3]:
                wrong.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("name", ALL)
def test_recalled_as_read(name: str) -> None:
    """Of every op's samples: what is recalled is what reading them again gives."""
    op = OPS[name]
    for call in calls(op):
        args, kwargs, _ = call.sample
        bind, read = seeded(op, op.bind), seeded(op, op.bind.__wrapped__)
        bind(*args, **kwargs)
        tensors, params = bind(*args, **kwargs)
        expected, fresh = read(*args, **kwargs)
        if isinstance(params, Recalled):
            params = params.params
        elif op.prepare is not None and params != fresh:
            fresh = op.prepare(fresh, *expected)
        assert params == fresh, str(call)
        assert len(tensors) == len(expected)
        for found, given in zip(tensors, expected, strict=True):
            assert found is given or torch.equal(found, given), str(call)
    assert flatten(args)


def test_tracer_sees_calls_that_are_remembered() -> None:
    """``linearize`` traces plain tensors: a launch would be outside of what it traced."""
    x = torch.linspace(0.1, 0.6, 6, dtype=torch.float64, device=DEVICE)
    for _ in range(2):
        with tritongrad.use():
            value, tangent = torch.func.linearize(lambda x: x * 2.5 * x, x)
            found = tangent(torch.ones_like(x))
        assert_same((value, found), (2.5 * x * x, 5 * x))
