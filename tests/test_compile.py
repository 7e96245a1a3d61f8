"""torch.compile and torch.export (HAZARDS 22): what eager gives, or an error.

The backend is aot_eager: Inductor needs a device that it can compile for.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import DEVICE
from torch import Tensor
from torch.autograd import forward_ad

import tritongrad
from tritongrad.op import OPS, Op
from tritongrad.reroute import HARMLESS, OPERATOR
from tritongrad.sampling import Random, Sample, clone, tensors


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# The mean of nothing is NaN, and is meant to be.
assert_same = partial(torch.testing.assert_close, equal_nan=True)


LOOKS_AT_VALUES = {"gaussian_nll_loss"}
"""Whose torch function decides by its tensors' values, so that torch itself cannot compile it."""

COMPILED = [name for name in OPS if name not in LOOKS_AT_VALUES]


def first_sample(op: Op) -> Sample:
    assert op.samples is not None
    return next(iter(op.samples(Random(torch.float64, DEVICE))))


def filled(value: Any, values: Iterator[Tensor]) -> Any:
    """``value`` with the tensors in it replaced, also those in lists."""
    if isinstance(value, Tensor):
        return next(values)
    return (
        type(value)([filled(v, values) for v in value]) if type(value) in (list, tuple) else value
    )


def one_of_each(names: list[str]) -> tuple[Callable[..., list[Tensor]], list[Tensor]]:
    """A function that uses every op of ``names`` once, and the leaves it takes."""
    samples = [first_sample(OPS[name]) for name in names]
    leaves = [t for sample in samples for t in tensors(sample)]

    def function(*given: Tensor) -> list[Tensor]:
        values = iter(given)
        results = []
        for name, sample in zip(names, samples, strict=True):
            args = filled(sample.args, values)
            kwargs = {keyword: filled(value, values) for keyword, value in sample.kwargs.items()}
            result = OPS[name].replaces[0](*args, **kwargs)
            results += [result] if isinstance(result, Tensor) else list(result)
        return results

    return function, leaves


def gradients(results: list[Tensor], leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    wanted = [t for t in leaves if t.requires_grad]
    total = sum(r.sum() for r in results if r.requires_grad)
    assert isinstance(total, Tensor)
    return torch.autograd.grad(total, wanted, allow_unused=True)


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(function, backend="aot_eager", fullgraph=True, **options)


@pytest.mark.parametrize("where", ["plain", "use() around", "use() inside"])
def test_every_op_compiles(where: str) -> None:
    function, originals = one_of_each(COMPILED)
    expected = function(*originals)
    native = gradients(expected, originals)
    assert any(g is not None for g in native)
    # Its own: running statistics are updated in place.
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in originals]
    if where == "plain":
        actual = compiled(function)(*leaves)
    elif where == "use() around":
        with tritongrad.use():
            actual = compiled(function)(*leaves)
    else:

        def rerouted(*given: Tensor) -> Tensor:
            with tritongrad.use():
                return function(*given)

        actual = compiled(rerouted)(*leaves)
    assert_same(actual, expected)
    assert_same(gradients(actual, leaves), native)


@pytest.mark.parametrize("name", LOOKS_AT_VALUES)
def test_torch_cannot_compile_what_looks_at_values(name: str) -> None:
    function, leaves = one_of_each([name])
    with pytest.raises(torch._dynamo.exc.UserError, match="data-dependent"):
        compiled(function)(*leaves)


def test_every_op_compiles_when_called_by_our_name() -> None:
    """``tritongrad.NAME`` in compiled code, the record itself being called."""
    samples = {name: first_sample(OPS[name]) for name in COMPILED}

    def function(calls: dict[str, Sample]) -> list[Tensor]:
        return [OPS[name](*s.args, **s.kwargs) for name, s in calls.items()]

    for ours, native in zip(compiled(function)(samples), function(samples), strict=True):
        assert_same(ours, native)


def affine(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (F.linear(x, w, b).tanh() * 2).sum()


def affine_inputs() -> tuple[Tensor, Tensor, Tensor]:
    make = Random(torch.float64, DEVICE)
    return make(5, 4), make(3, 4), make(3)


def nodes_of(function: Callable[..., Any], *args: Any) -> list[str]:
    """Names of what Dynamo saw ``function`` call."""
    seen: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    torch.compile(function, backend=backend, fullgraph=True)(*args)
    return seen


def test_an_op_with_a_schema_stays_ours() -> None:
    inputs = affine_inputs()
    with tritongrad.use():
        assert any("tritongrad.linear" in name for name in nodes_of(affine, *inputs))
    torch._dynamo.reset()
    assert not any("tritongrad" in name for name in nodes_of(affine, *inputs))


SPELLINGS: list[Callable[[Tensor], Tensor]] = [
    lambda x: torch.softmax(x, 1),
    lambda x: x.softmax(-1, torch.float64),
    lambda x: torch.special.softmax(x, dim=0, dtype=torch.float64),
    lambda x: F.softmax(x, dim=1),
    lambda x: F.softmax(x, -2, 3, torch.float64),
    torch.nn.Softmax(1),
    lambda x: torch.log_softmax(x, dim=1),
    lambda x: x.log_softmax(0),
    lambda x: torch.special.log_softmax(x, 1),
    lambda x: F.log_softmax(x, 1, dtype=torch.float64),
    lambda x: F.layer_norm(x, x.shape[1:]),
    lambda x: torch.layer_norm(x, x.shape[1:], None, None, 1e-3, False),
    lambda x: torch.rms_norm(x, x.shape[1:], eps=1e-3),
]


@pytest.mark.parametrize("function", SPELLINGS, ids=range(len(SPELLINGS)))
def test_an_op_stays_ours_by_any_of_its_names(function: Callable[[Tensor], Tensor]) -> None:
    x = Random(torch.float32, DEVICE)(5, 7)
    expected = function(x)
    (slope,) = torch.autograd.grad(expected.sin().sum(), x)
    with tritongrad.use():
        (node,) = (name for name in nodes_of(function, x) if "getitem" not in name)
        torch._dynamo.reset()
        result = compiled(function)(x)
    assert node.startswith("tritongrad.")
    assert_same(result, expected)
    (ours,) = torch.autograd.grad(result.sin().sum(), x)
    assert_same(ours, slope)


def test_softmax_of_no_dim_compiles_as_torchs() -> None:
    with tritongrad.use(), pytest.warns(UserWarning, match="Implicit dimension"):
        assert not any("tritongrad" in n for n in nodes_of(F.softmax, affine_inputs()[0]))


def test_kernels_run_in_the_compiled_program() -> None:
    inputs = affine_inputs()
    launches: list[str] = []
    with (
        tritongrad.use(),
        tritongrad.runtime.observe(lambda kernel, *_: launches.append(str(kernel))),
    ):
        value = compiled(affine)(*inputs)
        forward = len(launches)
        value.backward()
    assert forward > 0
    assert len(launches) > forward


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_session_counts_what_compiled_code_ran(backend: str) -> None:
    """Library ops as calls on Triton, torch's operators as what they are."""
    x, w, b = affine_inputs()
    run = torch.compile(lambda x: F.softmax(F.linear(x, w, b), -1).exp(), backend=backend)
    with tritongrad.use() as session:
        run(x).sum().backward()
    by_name = {"exp", "sum"} if backend == "eager" else {"sum"}
    assert session.ran == dict.fromkeys(["linear", "softmax", *by_name], 1)
    reasons = {reason for _, reason in session.fell_back} - HARMLESS
    assert reasons == (set() if backend == "eager" else {OPERATOR})


def test_a_session_counts_what_a_library_op_leaves_to_torch() -> None:
    x = torch.ones(2, dtype=torch.complex64, device=DEVICE)
    with tritongrad.use() as session:
        torch.ops.tritongrad.linear(x, x)
    assert not session.ran
    assert {name for name, _ in session.fell_back} == {"torch.nn.functional.linear"}


def test_operators_compile_as_they_are_written() -> None:
    """Those that torch wraps in Python, of which Dynamo knows no equal in a dictionary."""

    def function(x: Tensor) -> Tensor:
        return x**2 + 2**x + (2 - x) + 2 / x + x.T**x

    x = affine_inputs()[0][:4].detach() + 3
    with tritongrad.use():
        assert_same(compiled(function)(x), function(x))


def test_left_out_by_use_is_torchs() -> None:
    with tritongrad.use(exclude="linear"):
        assert not any("tritongrad" in name for name in nodes_of(affine, *affine_inputs()))


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.schema], ids=lambda op: op.name)
def test_library_ops_pass_opcheck(op: Op) -> None:
    assert op.samples is not None
    for sample in list(op.samples(Random(torch.float32, DEVICE)))[:4]:
        fresh = clone(sample)
        torch.library.opcheck(getattr(torch.ops.tritongrad, op.name), fresh.args, fresh.kwargs)


def test_dynamic_shapes_do_not_recompile() -> None:
    make = Random(torch.float64, DEVICE)
    w, b = make(3, 4), make(3)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    with tritongrad.use():
        run = torch.compile(affine, backend=counter, fullgraph=True, dynamic=True)
        for rows in (5, 6, 9, 17):
            x = make(rows, 4)
            assert_same(run(x, w, b), affine(x, w, b))
    assert counter.frame_count == 1


def test_jvp_inside_compiled_code_is_right() -> None:
    x, w, b = (t.detach() for t in affine_inputs())
    tangent = torch.ones_like(x)

    def derivative(x: Tensor) -> Tensor:
        return torch.func.jvp(lambda v: affine(v, w, b), (x,), (tangent,))[1]

    expected = derivative(x)
    assert expected != 0
    with tritongrad.use():
        assert_same(compiled(derivative)(x), expected)


def test_second_derivative_inside_compiled_code_is_right() -> None:
    x, w, b = (t.detach() for t in affine_inputs())

    def curvature(x: Tensor) -> Tensor:
        slope = torch.func.grad(lambda v: affine(v, w, b))
        return torch.func.grad(lambda v: slope(v).square().sum())(x)

    with tritongrad.use():
        assert_same(compiled(curvature)(x), curvature(x))


def test_jvp_of_a_compiled_function_raises() -> None:
    x, w, b = (t.detach() for t in affine_inputs())
    with tritongrad.use():
        run = compiled(affine)
        run(x, w, b)
        with pytest.raises(Exception, match=r"(?i)functorch|jvp"):
            torch.func.jvp(lambda v: run(v, w, b), (x,), (torch.ones_like(x),))


def test_dual_numbers_through_a_compiled_function_raise() -> None:
    """The program was compiled for plain tensors and has our library op in it."""
    x, w, b = (t.detach() for t in affine_inputs())
    with tritongrad.use():
        run = compiled(affine)
        run(x, w, b)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                run(dual, w, b)


def test_second_derivative_of_a_compiled_function_raises() -> None:
    x, w, b = affine_inputs()
    with tritongrad.use():
        value = compiled(affine)(x, w, b)
        with pytest.raises(RuntimeError, match=r"double backward|create_graph"):
            torch.autograd.grad(torch.autograd.grad(value, x, create_graph=True)[0].sum(), w)


def test_library_op_refuses_forward_mode() -> None:
    """What an exported program would call: a zero tangent would be a silently wrong number."""
    x, w, b = (t.detach() for t in affine_inputs())
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda v: torch.ops.tritongrad.linear(v, w, b), (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        torch.ops.tritongrad.linear(forward_ad.make_dual(x, x), w, b)


def test_library_op_refuses_a_second_derivative() -> None:
    x, w, b = affine_inputs()
    value = torch.ops.tritongrad.linear(x, w, b).pow(2).sum()
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(value, x, create_graph=True)


def test_library_op_is_differentiable_once() -> None:
    inputs = affine_inputs()
    ours = torch.autograd.grad(torch.ops.tritongrad.linear(*inputs).sin().sum(), inputs)
    native = torch.autograd.grad(F.linear(*inputs).sin().sum(), inputs)
    assert_same(ours, native)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    model = torch.nn.Linear(4, 3).double().to(DEVICE)
    x = Random(torch.float64, DEVICE)(5, 4, requires_grad=False)
    with tritongrad.use():
        program = torch.export.export(model, (x,), strict=strict)
    assert any("tritongrad.linear" in str(node.target) for node in program.graph.nodes)
    assert_same(program.module()(x), model(x))


def test_autocast_inside_compiled_code_is_torchs() -> None:
    """A library op cannot follow autocast; torch's own operator does."""
    x, w, b = (t.detach().float() for t in affine_inputs())

    def product(x: Tensor) -> Tensor:
        return F.linear(x, w, b)

    with tritongrad.use(), torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        actual, expected = compiled(product)(x), product(x)
    assert actual.dtype is expected.dtype is torch.bfloat16


def test_importing_tritongrad_compiles_nothing() -> None:
    """Dynamo is slow to import; a user who compiles nothing must not wait for it."""
    check = "import tritongrad, sys; sys.exit('torch._dynamo.convert_frame' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
