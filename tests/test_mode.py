"""use(), enable(), disable() and the namespace (HAZARDS 23): who takes a call, and what is said."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import DEVICE, assert_same
from torch import Tensor
from torch.overrides import TorchFunctionMode

import tritongrad
import tritongrad as tg
from tritongrad.namespace import public
from tritongrad.op import OPS, TARGETS, register
from tritongrad.reroute import HARMLESS, NO_FLOATS
from tritongrad.sampling import Random


def leaf(*shape: int) -> Tensor:
    return Random(torch.float64, DEVICE)(*shape)


def arithmetic_on_torch(session: tritongrad.Session) -> dict[tuple[str, str], int]:
    """What torch ran that a kernel might have."""
    return {k: n for k, n in session.fell_back.items() if k[1] not in HARMLESS}


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "function": lambda x, y: torch.mul(x, y),
    "method": lambda x, y: x.mul(y),
    "operator": lambda x, y: x * y,
    "alias": lambda x, y: torch.multiply(x, y),
    "number on the right": lambda x, y: x * 2,
    "number on the left": lambda x, y: 2 * x,
    "0-dim tensor": lambda x, y: x * y.sum(),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_way_to_write_a_call_is_taken(form: str) -> None:
    x, y = leaf(3, 4), leaf(3, 4)
    expected = FORMS[form](x, y)
    with tritongrad.use() as session:
        actual = FORMS[form](x, y)
    assert session.ran["mul"] == 1
    torch.testing.assert_close(actual, expected)


REFLECTED: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda x: 3 + x,
    "sub": lambda x: 3 - x,
    "div": lambda x: 3 / x,
    "pow": lambda x: 3**x,
}


@pytest.mark.parametrize("name", REFLECTED)
def test_reflected_operators(name: str) -> None:
    x = leaf(3)
    with tritongrad.use() as session:
        actual = REFLECTED[name](x)
        (slope,) = torch.autograd.grad(actual.sum(), x)
    assert session.ran[name] == 1
    torch.testing.assert_close(actual, REFLECTED[name](x))
    torch.testing.assert_close(slope, torch.autograd.grad(REFLECTED[name](x).sum(), x)[0])


LEFT_TO_TORCH: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "in-place": (lambda x: x.detach().mul_(2), "in-place"),
    "in-place operator": (lambda x: x.detach().__imul__(2), "in-place"),
    "out=": (lambda x: torch.mul(x.detach(), 2, out=torch.empty_like(x)), "another overload"),
    "complex": (lambda x: torch.exp(torch.complex(x, x)), "complex"),
    "integer": (lambda x: torch.arange(3, device=DEVICE) * 2, NO_FLOATS),
    "no op": (lambda x: torch.erfinv(x / 4), "no kernel"),
    "sparse": (lambda x: torch.neg(x.detach().to_sparse()), "sparse"),
    "meta": (lambda x: torch.exp(x.to("meta")), "meta"),
    "a bound that is NaN": (lambda x: F.hardtanh(x, float("nan"), 1.0), "NaN"),
}


@pytest.mark.parametrize("case", LEFT_TO_TORCH)
def test_what_torch_runs_is_right_and_reported(case: str) -> None:
    function, reason = LEFT_TO_TORCH[case]
    x = leaf(3)
    expected = function(x)
    with tritongrad.use() as session:
        actual = function(x)
    assert any(reason in why for _, why in session.fell_back), session.fell_back
    if case != "meta":
        assert isinstance(actual, Tensor)
        assert isinstance(expected, Tensor)
        torch.testing.assert_close(actual.to_dense(), expected.to_dense(), equal_nan=True)


def test_integers_are_no_arithmetic_on_whatever_device() -> None:
    """As torch.func counts on the CPU of what is on a GPU, by functions that are ops."""
    for device in ("cpu", "meta"):
        with tritongrad.use() as session:
            torch.ones(2, dtype=torch.int64, device=device).cumsum(0).neg()
        assert session.fell_back["torch.Tensor.cumsum", NO_FLOATS] == 1
        assert not session.ran
        assert not arithmetic_on_torch(session)


class Tagged(Tensor):
    """A tensor subclass, as a user would have."""


def test_subclasses_stay_with_torch() -> None:
    x = leaf(3).detach().as_subclass(Tagged)
    with tritongrad.use() as session:
        y = torch.exp(x)
    assert type(y) is Tagged
    assert not session.ran
    assert ("torch.exp", "tensor subclass Tagged") in session.fell_back


def test_only_and_exclude() -> None:
    x = leaf(3)
    with tritongrad.use(only="exp") as session:
        torch.exp(x), torch.sin(x)
    assert session.ran == {"exp": 1}
    assert session.fell_back["torch.sin", "left out by use()"] == 1
    with tritongrad.use(exclude=["exp"]) as session:
        torch.exp(x), torch.sin(x)
    assert session.ran == {"sin": 1}
    with tritongrad.use(only=["exp", "sin"], exclude="sin") as session:
        torch.exp(x), torch.sin(x)
    assert session.ran == {"exp": 1}


@pytest.mark.parametrize("argument", ["only", "exclude"])
def test_an_unknown_name_is_an_error_that_names_near_ones(argument: str) -> None:
    with pytest.raises(ValueError, match=rf"{argument}: expected names of ops .*'tahn'.* tanh"):
        tritongrad.use(**{argument: ["tahn"]})


def test_the_innermost_session_decides() -> None:
    x = leaf(3)
    with tritongrad.use() as outer, tritongrad.use(exclude="exp") as inner:
        torch.exp(x), torch.sin(x)
    for session in (outer, inner):
        assert session.ran == {"sin": 1}
        assert ("torch.exp", "left out by use()") in session.fell_back


def test_as_a_decorator_also_when_it_calls_itself() -> None:
    seen = []

    @tritongrad.use()
    def tower(x: Tensor, height: int) -> Tensor:
        seen.append(tritongrad.runtime.local.session)
        return tower(torch.exp(-x), height - 1) if height else x

    y = tower(leaf(3), 2)
    assert type(y.grad_fn).__name__ == "TritonExpBackward"
    assert len({id(session) for session in seen}) == 3
    assert tritongrad.runtime.local.session is None


def test_an_exception_inside_ends_it() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"), tritongrad.use():
        torch.add(leaf(3), leaf(4))
    assert type(torch.exp(leaf(3)).grad_fn).__name__ == "ExpBackward0"
    x = leaf(3)
    with tritongrad.use() as session:
        torch.exp(x)
    assert session.ran == {"exp": 1}


def test_other_threads_are_not_affected() -> None:
    names = []
    x = leaf(3)
    with tritongrad.use():
        thread = threading.Thread(target=lambda: names.append(torch.exp(x).grad_fn.name()))
        thread.start()
        thread.join()
    assert names == ["ExpBackward0"]


def test_enable_and_disable() -> None:
    x = leaf(3)
    session = tritongrad.enable(exclude="sin")
    try:
        torch.exp(x), torch.sin(x)
        with pytest.raises(RuntimeError, match="enabled in this thread already"):
            tritongrad.enable()
        with tritongrad.use(), pytest.raises(RuntimeError, match="opened after enable"):
            tritongrad.disable()
    finally:
        assert tritongrad.disable() is session
    assert session.ran == {"exp": 1}
    with pytest.raises(RuntimeError, match="not enabled"):
        tritongrad.disable()
    assert torch.exp(x).grad_fn.name() == "ExpBackward0"


def test_launches_of_backward_count_also_after_the_session() -> None:
    x = leaf(3)
    with tritongrad.use() as session:
        y = torch.tanh(x).exp()
    assert session.launches == 2
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    first = session.launches
    assert first > 2
    slope.sum().backward()
    assert session.launches > first
    assert session.ran == {"tanh": 1, "exp": 1}, "rules are not the user's calls"


def test_backward_inside_counts_nothing_as_the_users() -> None:
    x = leaf(3)
    with tritongrad.use() as session:
        y = (torch.abs(x) ** 3).sum()
        y.backward()
    assert session.ran == {"abs": 1, "pow": 1, "sum": 1}
    assert not arithmetic_on_torch(session)


def test_our_names_inside_use_are_counted_once() -> None:
    x = leaf(3)
    with tritongrad.use() as session:
        tritongrad.exp(x)
    assert session.ran == {"exp": 1}
    assert not session.fell_back
    assert session.launches == 1


class Doubling(TorchFunctionMode):
    """A mode of the user's, which doubles what exp returns."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result + result if func is torch.exp else result


@pytest.mark.parametrize("order", ["inside", "outside"])
def test_beside_a_mode_of_the_users(order: str) -> None:
    x = leaf(3)
    if order == "inside":
        with tritongrad.use() as session, Doubling():
            y = torch.exp(x)
    else:
        with Doubling(), tritongrad.use() as session:
            y = torch.exp(x)
    assert session.ran["exp"] == 1
    # Outside, our mode answers the call before it reaches theirs.
    factor = 2 if order == "inside" else 1
    torch.testing.assert_close(y, factor * x.exp())


def test_beside_a_device_context() -> None:
    x = leaf(3)
    with torch.device("meta"), tritongrad.use() as session:
        assert torch.exp(x).device == x.device
        assert torch.ones(2).device.type == "meta"
    assert session.ran == {"exp": 1}


def test_training_a_network_is_the_same_and_falls_back_on_nothing() -> None:
    def train() -> tuple[list[float], tritongrad.Session | None]:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)]
        model = torch.nn.Sequential(*layers).double().to(DEVICE)
        x, y = leaf(16, 4).detach(), leaf(16, 1).detach()
        losses = []
        for _ in range(3):
            loss = ((model(x) - y) ** 2).mean()
            losses.append(loss.item())
            for parameter, slope in zip(
                model.parameters(), torch.autograd.grad(loss, [*model.parameters()]), strict=True
            ):
                with torch.no_grad():
                    parameter.copy_(parameter - 0.1 * slope)
        return losses, tritongrad.runtime.local.session

    native, _ = train()
    with tritongrad.use() as session:
        ours, _ = train()
    assert ours == pytest.approx(native, rel=1e-12)
    assert session.ran["linear"] == 6
    # The parameters begin on the CPU.
    elsewhere = ("in-place", "cpu tensor")
    rest = {k for k in arithmetic_on_torch(session) if "init" not in k[0]}
    assert not {k for k in rest if k[1] not in elsewhere}


def test_the_namespace_has_all_of_torchs() -> None:
    missing = [name for name in dir(torch) if not hasattr(tg, name)]
    assert not missing
    assert {*dir(torch)} <= {*dir(tg)}
    for module, theirs in ((tg.nn.functional, F), (tg.linalg, torch.linalg), (tg.nn, torch.nn)):
        assert not [name for name in dir(theirs) if not hasattr(module, name)]
    # Names that our own modules could have hidden.
    assert tg.mode is torch.mode
    assert tg.ops.aten.mul is torch.ops.aten.mul
    assert tg.Tensor is Tensor


def test_documentation_says_what_differs_and_where_a_formula_is_from() -> None:
    telling = {name for name, op in OPS.items() if op.differs}
    assert telling >= {"celu", "cross_entropy", "dropout", "embedding", "layer_norm"}
    for module in (torch, F):
        for name, func in vars(module).items():
            op, _ = TARGETS.get(func, (None, None)) if callable(func) else (None, None)
            if op is not None:
                text = public(func).__doc__
                assert text.count(op.differs) >= 1, name
                assert ("Not torch's on purpose" in text) == (op.name in telling)
                assert not op.differentiable or f"({op.sources})" in text


def test_the_namespace_has_our_functions_where_we_have_them() -> None:
    for func in TARGETS:
        name = getattr(func, "__name__", "")
        if getattr(torch, name, None) is func:
            assert getattr(tg, name) is not func
            assert getattr(tg, name).__name__ == name
            assert ("Derivative" in getattr(tg, name).__doc__) == TARGETS[func][0].differentiable
    y = tg.nn.functional.relu(leaf(3))
    assert y.grad_fn.name() == "TritonReluBackward"
    assert tg.linalg.vector_norm(leaf(3)).grad_fn.name() == "TritonVectorNormBackward"
    assert tg.special.expit(leaf(3)).grad_fn.name() == "TritonSigmoidBackward"


def test_a_name_torch_lacks_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_thing"):
        tg.no_such_thing  # noqa: B018


def test_registering_a_name_or_a_callable_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="registered already"):
        register(OPS["exp"])


def test_weight_of_l1_loss() -> None:
    """torch does not hand it to a mode, which would lose it without a word."""
    x, y, weight = leaf(3, 4), leaf(3, 4), leaf(3, 4)
    for reduction in ("none", "sum", "mean"):

        def loss(weight: Tensor | None, reduction: str = reduction) -> Tensor:
            return F.l1_loss(x, y, reduction=reduction, weight=weight)

        for given in (weight, None):
            expected = loss(given)
            with tritongrad.use():
                once = loss(given)
                with tritongrad.use("mul"):
                    twice = loss(given)
            for actual in (once, twice):
                torch.testing.assert_close(actual, expected)
        with tritongrad.use():
            (slope,) = torch.autograd.grad(loss(weight).sum(), weight)
        torch.testing.assert_close(slope, torch.autograd.grad(loss(weight).sum(), weight)[0])


def test_what_torch_writes_in_python_is_rerouted_inside() -> None:
    """multi_head_attention_forward offers itself to modes, and none of the calls it is made of."""
    attention = torch.nn.MultiheadAttention(8, 2, dtype=torch.float64, device=DEVICE)
    x = torch.randn(3, 2, 8, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def run() -> Tensor:
        y, weights = attention(x, x, x)
        return torch.autograd.grad(y.square().sum() + weights.sum(), x)[0]

    with tritongrad.use() as session:
        ours = run()
    assert_same(ours, run())
    assert {"linear", "softmax"} <= session.ran.keys()
    assert "torch.nn.functional.multi_head_attention_forward" not in dict(session.fell_back)


def test_a_subclass_still_sees_what_torch_writes_in_python() -> None:
    seen = []

    class Marked(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    x = torch.randn(3, 2, 8, device=DEVICE).as_subclass(Marked)
    with tritongrad.use():
        torch.nn.MultiheadAttention(8, 2, device=DEVICE)(x, x, x)
    assert F.multi_head_attention_forward in seen


def test_what_a_user_put_in_torchs_module_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from inside a function that torch writes in Python, and after it was called before."""
    seen = []
    original = F.softmax
    x = torch.randn(3, 2, 8, device=DEVICE)
    attention = torch.nn.MultiheadAttention(8, 2, device=DEVICE)

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(args)
        return original(*args, **kwargs)

    with tritongrad.use():
        attention(x, x, x)
        monkeypatch.setattr(F, "softmax", recorded)
        attention(x, x, x)
    assert seen
