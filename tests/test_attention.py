"""What is particular to attention: head dimensions and lengths, dropout, memory, modules.

The generic suites compare it with torch in every order, on samples that are small; sizes, and what
torch's has not, are here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from scenarios import SUMMED
from support import DEVICE, assert_same, random_like
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import tritongrad
from tritongrad import runtime
from tritongrad.compare.parity import STAND_INS
from tritongrad.extension import EXTENSIONS
from tritongrad.launchers import attention as launcher
from tritongrad.ops.attention_calculus import keep
from tritongrad.ops.attention_formulas import value
from tritongrad.sampling import Random

sdpa = tritongrad.nn.functional.scaled_dot_product_attention
native = STAND_INS[F.scaled_dot_product_attention]
definition = EXTENSIONS["attention"]

make = Random(torch.float64, DEVICE)


def orders(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[Any]:
    """A call, its gradient, the gradient of that, and tangents, forward over reverse included."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    first = torch.autograd.grad((out * out).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum((g * g).sum() for g in first), leaves)
    primals, along = tuple(t.detach() for t in inputs), tuple(random_like(inputs, 1))

    def slope(*values: Tensor) -> Any:
        return torch.func.grad(lambda v: function(*v).square().sum())(values)

    return [out, *first, *second, torch.func.jvp(slope, primals, along)]


class Case(NamedTuple):
    """A row of the table of finite differences."""

    kind: str
    size: int
    length: int
    keys: int
    extra: str
    heads: tuple[int, int]
    layout: str


KINDS = ("plain", "causal", "bool mask", "bias", "window", "packed")
HEAD_DIMS = (16, 40, 64, 80, 128, 256)
LENGTHS = (1, 17, 64, 127, 129)
OTHERS = (("none", "softcap", "ALiBi", "sinks"), ((1, 1), (2, 1)), ("dense", "between", "expanded"))
FACTORS = KINDS, HEAD_DIMS, LENGTHS, LENGTHS, *OTHERS


def covering(lengths: Callable[[int, int], tuple[int, int]]) -> list[Case]:
    """Cases in which any two values of different factors meet: kinds and head dimensions all with
    all, lengths by those two's numbers, of the rest what is most new in each."""
    met: set[Any] = set()
    cases = []
    # In this order the first of what is most new is enough.
    for a, b in itertools.product((0, 1, 2, 3, 5, 4), range(len(HEAD_DIMS))):
        row = KINDS[a], HEAD_DIMS[b], *lengths(a, b)
        found = [Case(*row, *rest) for rest in itertools.product(*OTHERS)]  # type: ignore[misc]
        cases.append(max(found, key=lambda case: len(pairs_of(case) - met)))
        met |= pairs_of(cases[-1])
    return cases


def pairs_of(case: Case) -> set[Any]:
    return set(itertools.combinations(enumerate(case), 2))


# All lengths with all: the second of two that are no multiple of one another modulo five.
EVERY_LENGTH = covering(lambda a, b: (LENGTHS[(a + b) % 5], LENGTHS[(2 * a + b) % 5]))
# As long as one another, one of each kind and of each head dimension.
SQUARES = [
    Case(kind, size, n, n, "none", (1, 1), "dense")
    for kind, size, n in zip(
        KINDS, (256, 128, 80, 40, 64, 16), (17, 129, 127, 129, 127, 64), strict=True
    )
]
# Of every run: long ones with short ones, at a seventh of what both cost, and blocks on a diagonal.
FEW_LENGTHS = (1, 64), (129, 1), (1, 127), (127, 1), (1, 129), (64, 17)
CASES = covering(lambda a, b: FEW_LENGTHS[(a + b) % 6]) + [
    case for case in SQUARES if case.kind in ("causal", "window", "packed")
]


def test_any_two_values_meet() -> None:
    """In every run all but lengths, of which there each meets each other value on one side."""
    pairs = {
        ((i, a), (j, b))
        for i, j in itertools.combinations(range(len(FACTORS)), 2)
        for a, b in itertools.product(FACTORS[i], FACTORS[j])
    }
    assert set().union(*map(pairs_of, EVERY_LENGTH)) == pairs
    assert [{case[at] for case in SQUARES} for at in (0, 1)] == [set(f) for f in FACTORS[:2]]

    lengths = {2, 3}
    others = {(a, b) for a, b in pairs if not lengths & {a[0], b[0]}}
    assert set().union(*map(pairs_of, CASES)) >= others
    for at in {*range(len(FACTORS))} - lengths:
        for level in FACTORS[at]:
            here = [case for case in CASES if case[at] == level]
            assert {n for case in here for n in (case.length, case.keys)} == {*LENGTHS}


def call_of(case: Case) -> tuple[Callable[..., Any], list[Tensor], dict[str, Any]]:
    """A function of what the case differentiates by, those, and its options."""
    (heads, shared), length, keys = case.heads, case.length, case.keys
    made = [make(h, n, case.size) for h, n in ((heads, length), (shared, keys), (shared, keys))]
    if case.layout == "between":
        # Heads as a projection leaves them, (length, heads, size).
        made = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in made]
    options: dict[str, Any] = {"enable_gqa": heads != shared, "is_causal": case.kind == "causal"}
    names = {"ALiBi": "alibi_slopes", "sinks": "sinks"}
    further = {names[case.extra]: make(heads)} if case.extra in names else {}
    hidden = torch.rand(length, keys, device=DEVICE) < 0.3
    hidden[length // 2] = True
    if case.kind == "bool mask":
        options["attn_mask"] = ~hidden
    elif case.kind == "bias":
        further["attn_mask"] = make(length, keys).masked_fill(hidden, -torch.inf)
    elif case.kind == "window":
        options["window"] = (9, 2)
    elif case.kind == "packed":
        for name, n in (("cu_seqlens_q", length), ("cu_seqlens_k", keys)):
            options[name] = torch.tensor([0, n // 3, n], dtype=torch.int32, device=DEVICE)
    if case.extra == "softcap":
        options["softcap"] = 1.5

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(further, values[3:], strict=True))
        out, lse = sdpa(*values[:3], **named, **options, return_lse=True)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    inputs = [t.detach() for t in (*made, *further.values())]
    return function, inputs, options | dict(zip(further, inputs[3:], strict=True))


STEP = 1e-5


def central(
    function: Callable[..., Sequence[Tensor]], at: Sequence[Tensor], along: Sequence[Tensor]
) -> list[Tensor]:
    """The derivative of ``function`` in one direction, by values on both sides."""
    after, before = (
        function(*[x + step * d for x, d in zip(at, along, strict=True)]) for step in (STEP, -STEP)
    )
    return [(a - b).detach() / (2 * STEP) for a, b in zip(after, before, strict=True)]


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def assert_near(actual: Any, expected: Any, what: str) -> None:
    """A difference has an error of the third derivative times the square of the step, and one of
    the value's rounding over the step: 1e-9 of what is around."""
    for a, e in zip(actual, expected, strict=True):
        error, size = (a - e).abs().amax(), max(1.0, e.abs().amax().item())
        assert error <= 1e-7 * size, f"{what}: {error:.2g} of {size:.2g}"


@pytest.mark.parametrize(
    "case",
    dict.fromkeys(CASES + SQUARES + EVERY_LENGTH),
    ids=lambda c: "-".join(map(str, c)).replace(" ", ""),
)
def test_derivatives_are_finite_differences(case: Case, pytestconfig: pytest.Config) -> None:
    """In float64: value, gradient, forward mode, and each over the other and itself."""
    if case not in CASES and not pytestconfig.getoption("every_op"):
        pytest.skip("long queries and keys: with --every-op")
    assert launched_by(lambda: check_differences(case)) >= FORWARD | TANGENT | GRADIENT | SECOND


def check_differences(case: Case) -> None:
    function, x, options = call_of(case)
    out, lse = function(*x)
    assert_same(out, definition(*x[:3], **options)[0], "value")

    g, along_g = random_like((out, lse), 1), random_like((out, lse), 2)
    if case.layout == "expanded":
        g[0], along_g[0] = (t[:, :1, :1].expand(out.shape) for t in (g[0], along_g[0]))
    along, other = random_like(x, 3), random_like(x, 4)

    def reverse(*values: Tensor) -> tuple[Tensor, ...]:
        found, pull = torch.func.vjp(function, *values[: len(x)])
        return *found, *pull(tuple(values[len(x) :]))

    def forward(*values: Tensor) -> Any:
        return torch.func.jvp(function, values, tuple(other))[1]

    both = *x, *g
    directions = *along, *along_g
    differences = central(reverse, both, directions)
    first, tangents = torch.func.jvp(reverse, both, directions)
    assert_near(tangents, differences, "forward mode, of the value and over reverse mode")
    expected = inner(differences[:2], g)
    assert_near([inner(first[2:], along)], [expected], "reverse mode")

    leaves = [t.detach().clone(memory_format=torch.preserve_format) for t in both]
    leaves = [t.requires_grad_() for t in leaves]
    values, cotangents = leaves[: len(x)], leaves[len(x) :]
    gradient = torch.autograd.grad(function(*values), values, cotangents, create_graph=True)
    expected = inner(differences[2:], other)
    second = torch.autograd.grad(inner(gradient, other), leaves)
    assert_near([inner(second, directions)], [expected], "reverse over reverse mode")
    mixed = torch.autograd.grad(inner(forward(*values), cotangents), leaves)
    assert_near([inner(mixed, directions)], [expected], "reverse over forward mode")


def launched_by(run: Callable[[], Any]) -> set[str]:
    """Names of the kernels that are launched meanwhile."""
    names: set[str] = set()
    with runtime.observe(lambda kernel, *_: names.add(kernel.fn.__name__)):
        run()
    return names


FORWARD, TANGENT = {"attention_fwd"}, {"attention_jvp"}
GRADIENT = {"attention_rows", "attention_bwd_q", "attention_bwd_kv"}
SECOND = {"attention_rows", "attention_jvp_bwd_q", "attention_jvp_bwd_kv"}


def dual(loss: Callable[[Tensor], Tensor], q: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(q, q))).tangent


TRANSFORMS: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "dual numbers": (dual, FORWARD | TANGENT),
    "jvp": (lambda f, q: torch.func.jvp(f, (q,), (q,))[1], FORWARD | TANGENT),
    "vmap": (lambda f, q: torch.vmap(f)(torch.stack([q, q])), FORWARD),
    "vmap(grad)": (
        lambda f, q: torch.vmap(torch.func.grad(f))(torch.stack([q, q])), FORWARD | GRADIENT,
    ),
    "hessian": (
        lambda f, q: torch.func.hessian(f)(q), FORWARD | TANGENT | GRADIENT | SECOND,
    ),
    "jacrev(grad)": (
        lambda f, q: torch.func.jacrev(torch.func.grad(f))(q),
        FORWARD | TANGENT | GRADIENT | SECOND,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_reach_the_kernels(name: str) -> None:
    """And nothing else that is ours computes products of matrices in their place."""
    transform, kernels = TRANSFORMS[name]
    q, found = make(1, 2, 2).detach(), []

    def run() -> None:
        found.append(transform(lambda q: sdpa(q, q, q).square().sum(), q))

    names = launched_by(run)
    assert {n for n in names if n.startswith(("attention", "gemm"))} == kernels
    assert_same(found[0], transform(lambda q: native(q, q, q).square().sum(), q), tolerance=SUMMED)


def test_rows_of_hidden_keys() -> None:
    """0, as torch's, and so are their slopes; for a mask of -inf as for one of bools."""
    inputs = make(2, 3, 4), make(2, 5, 4), make(2, 5, 4)
    hidden = torch.ones(3, 5, dtype=torch.bool, device=DEVICE)
    hidden[1] = False
    added = torch.zeros(3, 5, dtype=torch.float64, device=DEVICE).masked_fill(~hidden, -torch.inf)
    for mask in (hidden, added):
        ours, theirs = (orders(lambda *v, f=f, m=mask: f(*v, m), inputs) for f in (sdpa, native))
        assert_same(ours, theirs, str(mask), tolerance=SUMMED)
        assert not ours[0][:, 1].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_as_accurate_as_torchs_fused_kernels(dtype: torch.dtype) -> None:
    """Of value and gradients, beside what torch takes by itself for four dimensions: the largest
    error against float64 exceeds torch's by no more than two roundings of the largest element."""
    inputs = [make(1, 2, n, 16, low=-4.0, high=4.0).to(dtype) for n in (17, 19, 19)]
    upstream = random_like(inputs[:1], 1)[0].to(dtype)

    def run(function: Callable[..., Tensor], dtype: torch.dtype = dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        out = function(*leaves, is_causal=True)
        found = [out, *torch.autograd.grad(out, leaves, upstream.to(dtype))]
        return [t.detach().double() for t in found]

    cases = zip(
        run(sdpa), run(F.scaled_dot_product_attention), run(native, torch.float64), strict=True
    )
    for ours, theirs, exact in cases:
        error, torchs = ((t - exact).abs().amax().item() for t in (ours, theirs))
        assert error <= torchs + torch.finfo(dtype).eps * exact.abs().amax().item()


# ----------------------------------------------------------------------------- what torch's has not


def test_extras_of_torchs_name() -> None:
    """Keyword arguments that torch's lacks, on the function of its name."""
    q, k, v = make(2, 3, 4), make(2, 5, 4), make(2, 5, 4)
    out, lse = sdpa(q, k, v, window=(1, 1), sinks=make(2), softcap=3.0, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == (2, 3)
    with tritongrad.use() as session:
        expected = definition(q, k, v, window=(2, 0))[0]
    assert session.ran["attention"]
    assert_same(sdpa(q, k, v, window=(2, 0)), expected)
    with pytest.raises(ValueError, match="window"):
        definition(q, k, v, window=(-1, 0))


def test_packed_sequences_are_those_one_by_one() -> None:
    lengths, keys = (3, 0, 18), (4, 2, 17)
    q, k, v = make(2, 21, 4), make(2, 23, 4), make(2, 23, 4)
    places = [
        torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32, device=DEVICE)
        for n in (lengths, keys)
    ]
    packed = sdpa(q, k, v, is_causal=True, cu_seqlens_q=places[0], cu_seqlens_k=places[1])
    parts = zip(q.split(lengths, 1), k.split(keys, 1), v.split(keys, 1), strict=True)
    assert_same(packed, torch.cat([native(*part, is_causal=True) for part in parts], 1))


# ------------------------------------------------------------------------------------------ dropout


def test_dropout_is_one_mask_everywhere() -> None:
    """In the value, all derivatives and both directions: those of the formula with that mask."""
    q, k, v = inputs = make(2, 17, 4), make(2, 19, 4), make(2, 19, 4)
    options = launcher.Options(dropout=0.4)
    torch.manual_seed(3)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=DEVICE)
    mask = keep(options, launcher.Inputs(q, k, v, seed=seed))
    assert mask is not None

    def ours(*values: Tensor) -> Tensor:
        torch.manual_seed(3)
        return sdpa(*values, dropout_p=0.4)

    def theirs(*values: Tensor) -> Tensor:
        return value(options, launcher.Inputs(*values), mask)[0]

    assert_same(orders(ours, inputs), orders(theirs, inputs), tolerance=SUMMED)


def test_dropout_draws_as_often_as_it_says() -> None:
    q = make(4, 128, 1)
    seed = torch.randint(2**40, (1,), device=DEVICE)
    x = launcher.Inputs(q, q, q, seed=seed)
    mask = keep(launcher.Options(dropout=0.3), x)
    assert mask is not None
    assert set(mask.unique().tolist()) == {0.0, 1 / 0.7}
    share, deviation = (mask == 0).double().mean().item(), (0.21 / mask.numel()) ** 0.5
    assert abs(share - 0.3) < 5 * deviation
    # Neither rows, columns nor matrices repeat one another.
    assert len(mask.flatten(0, 1).unique(dim=0)) == 4 * 128
    assert len(mask.mT.flatten(0, 1).unique(dim=0)) == 4 * 128
    assert not keep(launcher.Options(dropout=1.0), x).any()  # type: ignore[union-attr]


def test_dropout_is_reproducible_and_computed_again() -> None:
    q = make(1, 5, 4)
    torch.manual_seed(1)
    first, second = (sdpa(q, q, q, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(sdpa(q, q, q, dropout_p=0.5), first)
    assert not torch.equal(first, second)

    def loss(q: Tensor) -> Tensor:
        return sdpa(q, q, q, dropout_p=0.5).square().sum()

    found = []
    for run in (loss, lambda q: checkpoint(loss, q, use_reentrant=False)):
        torch.manual_seed(2)
        found += torch.autograd.grad(run(q), q)
    assert torch.equal(*found)


# ------------------------------------------------------------------------------------------- memory


def test_memory_is_linear_in_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every allocation of all four kernel sets, counted; kernels are not run."""

    def allocated(length: int) -> int:
        counted = 0

        class Count(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                nonlocal counted
                out = func(*args, **(kwargs or {}))
                if isinstance(out, Tensor) and "empty" in str(func):
                    counted += out.untyped_storage().nbytes()
                return out

        q = torch.zeros(1, length, 16, device=DEVICE)
        x, rows = launcher.Inputs(q, q, q), torch.zeros(1, length, device=DEVICE)
        options, needs = launcher.Options(), (True, True, True, False, False, False)
        tangents = launcher.Tangents(q, q, q, None, None, None)
        with Count(), runtime.stub():
            launcher.forward(options, x)
            launcher.jvp(options, x, tangents, q, rows)
            launcher.backward(options, x, needs, q, rows, q, rows)
            launcher.second(options, x, needs, q, rows, q, rows, tangents, q, rows)
        return counted

    small, large = allocated(1024), allocated(4096)
    assert small > 1024 * 16 * 4 * 8
    assert large == 4 * small


# ------------------------------------------------------------------------------------ compiled code


def test_compiled_code_keeps_the_kernels() -> None:
    """One program for all lengths; heads in front by transposition, shared, with a mask."""

    def loss(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True).sin().sum()

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    expected, found, programs = [], [], set()

    def steps() -> None:
        with tritongrad.use():
            for values in inputs:
                value = run(*values)
                found.append([value, *torch.autograd.grad(value, values)])
                programs.add(counter.frame_count)

    inputs = []
    for length in (5, 6, 17):
        between = make(2, length, 4, 3).transpose(1, 2).detach().requires_grad_()
        keys = make(2, 2, length + 1, 3), make(2, 2, length + 1, 3)
        inputs.append((between, *keys, make(length, length + 1)))
        value = loss(*inputs[-1])
        expected.append([value, *torch.autograd.grad(value, inputs[-1])])
    assert launched_by(steps) == FORWARD | GRADIENT | {"attention_bwd_mask"}
    assert_same(found, expected, tolerance=SUMMED)
    assert len(programs) == 1


EXTRAS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "window, cap, sinks": ({"window": (1, 2), "softcap": 1.5}, ("sinks",)),
    "ALiBi, packed": (
        {"is_causal": True, "cu_seqlens_q": (0, 2, 4), "cu_seqlens_k": (0, 3, 5)},
        ("alibi_slopes",),
    ),
}  # fmt: skip
"""What torch's has not: options, and names of numbers of heads."""


@pytest.mark.parametrize("extras", EXTRAS)
def test_compiled_extras_keep_the_kernels(extras: str) -> None:
    """By our name, with both results, and by torch's."""
    options, numbers = EXTRAS[extras]
    options = {
        name: torch.tensor(v, dtype=torch.int32, device=DEVICE) if name.startswith("cu_") else v
        for name, v in options.items()
    }
    inputs = make(2, 4, 2), make(2, 5, 2), make(2, 5, 2), *[make(2) for _ in numbers]

    def run(function: Callable[..., Any]) -> list[Tensor]:
        found = function(*inputs)
        out, lse = found if type(found) is tuple else (found, found)
        loss = (out.square().sum() + lse.sin().sum()) if type(found) is tuple else out.sin().sum()
        return [out, lse, *torch.autograd.grad(loss, inputs)]

    def of(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *t: function(*t[:3], **options, **dict(zip(numbers, t[3:], strict=True)))

    for ours in (tritongrad.nn.functional.attention, sdpa):
        torch._dynamo.reset()
        compiled, found = torch.compile(of(ours), backend="aot_eager", fullgraph=True), []
        names = launched_by(lambda: found.append(run(compiled)))  # noqa: B023
        assert names >= FORWARD | GRADIENT
        both = ours is not sdpa
        expected = run(of(definition) if both else lambda *t: of(definition)(*t)[0])
        assert_same(found[0], expected, tolerance=SUMMED)


def test_compiled_extras_that_are_not_ours() -> None:
    """The definition runs by our name; by torch's, which has none of it, an error says so."""
    q = make(1, 3, 2)
    for function in (tritongrad.nn.functional.attention, sdpa):
        torch._dynamo.reset()
        run = torch.compile(
            lambda q: function(q, q, q, window=(1, None)),  # noqa: B023
            backend="aot_eager", fullgraph=True,
        )  # fmt: skip
        if function is sdpa:
            with pytest.raises(Exception, match=r"call tritongrad\.nn\.functional\.attention"):
                run(q)
        else:
            assert_same(run(q), definition(q, q, q, window=(1, None)))


@pytest.mark.parametrize("options", [{"dropout_p": 0.5}, {"size": 257}])
def test_compiled_code_is_torchs(options: dict[str, Any]) -> None:
    """Where the library op would draw another mask in backward, or has no kernel."""
    q = make(1, 2, options.pop("size", 2))
    torch._dynamo.reset()
    with tritongrad.use():
        run = torch.compile(
            lambda q: F.scaled_dot_product_attention(q, q, q, **options),
            backend="aot_eager", fullgraph=True,
        )  # fmt: skip
        assert not launched_by(lambda: torch.autograd.grad(run(q), q, q.detach()))


# ------------------------------------------------------------------------------------------ modules


@pytest.mark.parametrize("masked", [False, True])
def test_multihead_attention(masked: bool) -> None:
    """torch's module with its parameters, on our kernels."""
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(8, 2, dtype=torch.float64, device=DEVICE, batch_first=True)
    ours = tritongrad.nn.MultiheadAttention(
        8, 2, dtype=torch.float64, device=DEVICE, batch_first=True
    )
    ours.load_state_dict(theirs.state_dict())
    x = make(2, 5, 8)
    mask = torch.ones(5, 5, dtype=torch.bool, device=DEVICE).triu(1) if masked else None
    found = []
    for module in (ours, theirs):
        out, _ = module(x, x, x, attn_mask=mask, need_weights=False)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])])
    assert_same(*found, tolerance=SUMMED)
