"""What is particular to attention: head dimensions and lengths, dropout, memory, modules, code.

The generic suites compare it with torch in every order, on samples that are small; sizes, and what
torch's has not, are here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scenarios import SUMMED
from support import DEVICE, assert_same, random_like
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils.checkpoint import checkpoint

import tritongrad
from tritongrad import runtime
from tritongrad.compare import static
from tritongrad.compare.parity import STAND_INS
from tritongrad.compare.specialisations import Specialisation, describe
from tritongrad.compare.terminal import make_console
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


SIZES = [
    # head dimension, queries, keys
    (16, 64, 17), (40, 1, 127), (64, 17, 1), (80, 17, 33), (128, 33, 17), (256, 3, 17),
    (1, 129, 33),
]  # fmt: skip


@pytest.mark.parametrize(("size", "queries", "keys"), SIZES)
def test_sizes(size: int, queries: int, keys: int) -> None:
    """Head dimensions that are no powers of two, lengths of one and one past a block, unequal."""
    inputs = make(1, queries, size), make(1, keys, size), make(1, keys, size)
    for causal in (False, True)[: 2 if queries * keys < 600 else 1]:
        ours, theirs = (orders(partial(f, is_causal=causal), inputs) for f in (sdpa, native))
        assert_same(ours, theirs, f"{causal=}", tolerance=SUMMED)


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


def test_samples_of_torch() -> None:
    """All of OpInfo's; those with dropout run, and what they mean is tested below."""
    (info,) = [i for i in op_db if i.name == "nn.functional.scaled_dot_product_attention"]
    for sample in info.sample_inputs(DEVICE, torch.float64):
        with tritongrad.use() as session:
            ours = F.scaled_dot_product_attention(sample.input, *sample.args, **sample.kwargs)
        assert session.ran["scaled_dot_product_attention"], session
        expected = native(sample.input, *sample.args, **sample.kwargs)
        assert ours.shape == expected.shape
        if not sample.kwargs.get("dropout_p"):
            assert_same(ours, expected, str(sample))


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


# ------------------------------------------------------------------------------------- machine code


SPILLS: dict[tuple[str, int], int] = {("attention_jvp_bwd_kv", 128): 368}
"""(kernel, head dimension) -> bytes a thread that it spills on sm_90 in bfloat16."""


@pytest.mark.parametrize("size", [64, 128])
def test_machine_code(size: int) -> None:
    """Tensor cores in every product and no spill on sm_90, but for what is recorded."""
    q = torch.zeros(4, 16, 2048, size, dtype=torch.bfloat16)
    lse = torch.zeros(4, 16, 2048)
    options, x, needs = launcher.Options(up=0), launcher.Inputs(q, q, q), (True, True, True)
    tangents = launcher.Tangents(q, q, q, None, None, None)
    wanted: list[Specialisation] = []

    def record(kernel: Any, grid: Any, args: Any, meta: Any) -> None:
        wanted.append(Specialisation(describe(kernel, args, meta)))

    with runtime.stub(), runtime.observe(record):
        launcher.forward(options, x)
        launcher.jvp(options, x, tangents, q, lse)
        launcher.backward(options, x, (*needs, False, False, False), q, None, q, lse)
        launcher.second(options, x, (*needs, False, False, False), q, None, q, lse, tangents, q, lse)
    names = {s.kernel: s for s in wanted}
    assert len(names) == 7
    for row in static.compile_for(list(names.values()), ["sm_90"], 1, make_console()):
        assert row.code is not None, row.faults
        assert row.code.spill_bytes == SPILLS.get((row.kernel, size), 0), row
        assert "HGMMA" in row.code.tensor_core or row.kernel == "attention_rows", row
