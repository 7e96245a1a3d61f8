"""Einsum and its kin: what the generic suites, whose calls are right, do not ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scenarios import copies
from support import DEVICE, assert_same
from torch import Tensor

import tritongrad
from tritongrad import runtime
from tritongrad.ops.tensor_product import cheapest


def make(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(DEVICE)


def outcome(run: Callable[[], Any]) -> Any:
    """What ``run`` returns or raises."""
    try:
        return run()
    except Exception as error:
        return error


def check(function: Callable[..., Any], *args: Any, runs: bool = True, **kwargs: Any) -> None:
    """Value and strides, or the type of exception, as torch's."""
    with tritongrad.use() as session:
        found = outcome(lambda: function(*args, **kwargs))
    expected = outcome(lambda: function(*args, **kwargs))
    if isinstance(expected, Exception):
        assert type(found) is type(expected), f"{found!r}, torch raises {expected!r}"
        assert not session.ran
        return
    assert bool(session.ran) == runs, session
    assert_same(found, expected, str(args[0]))
    assert found.stride() == expected.stride()


EQUATIONS = {
    "ij,jk": [(2, 3), (1, 5)],
    "i j , j k -> k i": [(2, 3), (3, 4)],
    "ij...,jk": [(2, 3, 4), (3, 5)],
    "ij->i...": [(2, 3)],
    "...,...": [(2, 3), ()],
    "": [()],
    "i,j,k": [(2,), (2,), (2,)],
    "Za,aZ": [(2, 3), (3, 2)],
    "ba": [(2, 3)],
    "Ba,aC": [(2, 3), (3, 5)],
    "a,b,c,d->dcba": [(2,), (3,), (4,), (5,)],
    "ab,bc,cd,de->ae": [(2, 3), (3, 4), (4, 5), (5, 2)],
    "...a,...a->...": [(2, 1, 3), (4, 3)],
    "...ab,...bc->ac": [(2, 3, 4), (2, 4, 5)],
    "iij,jk->ik": [(3, 3, 2), (2, 4)],
    "iiij->ij": [(3, 3, 3, 2)],
    "i,->i": [(3,), ()],
    "ij,k->": [(2, 3), (4,)],
    "bij,bjk->bik": [(1, 2, 3), (5, 3, 4)],
    "bij,bjk->ik": [(1, 2, 3), (5, 3, 4)],
    "hbd,hd->bh": [(2, 3, 4), (2, 4)],
    "aab,b->a": [(2, 2, 3), (3,)],
    "i,j->": [(0,), (3,)],
    "ij,jk->ik": [(0, 3), (3, 0)],
    "bij,bjk->bki": [(5, 2, 3), (5, 3, 4)],
    "bij,jk->kbi": [(5, 2, 3), (3, 4)],
    "bij,jk->bki": [(5, 2, 3), (3, 4)],
    "ij,bjk->bik": [(2, 3), (5, 3, 4)],
    "abj,jcd->cadb": [(2, 3, 4), (4, 5, 6)],
}


@pytest.mark.parametrize("equation", EQUATIONS)
def test_equations(equation: str) -> None:
    check(torch.einsum, equation, *[make(*shape) for shape in EQUATIONS[equation]])


REFUSED = {
    "i,i->ij": [(2,), (2,)],
    "ii->i": [(3, 1)],
    "i.j": [(2, 3)],
    "ij,jk->ikk": [(2, 3), (3, 4)],
    "ij,jk": [(2, 3)],
    "ij": [(2, 3), (3, 4)],
    "...i...": [(2, 3)],
    "ij->ij->i": [(2, 3)],
    "i": [(2, 3)],
    "ijk": [(2, 3)],
    "ij,,k": [(2, 3), (), (3,)],
    "ij,jk->i1": [(2, 3), (3, 4)],
    "ij,ij": [(2, 3), (4, 3)],
}


@pytest.mark.parametrize("equation", REFUSED)
def test_refused_equations(equation: str) -> None:
    check(torch.einsum, equation, *[make(*shape) for shape in REFUSED[equation]])


def test_forms_of_a_call() -> None:
    a, b = make(2, 3), make(3, 4)
    check(torch.einsum, "ij,jk", [a, b])
    check(torch.einsum, a, [0, 1], b, [1, 51])
    check(torch.einsum, a, [0, ...], b.sum(1), [...], [..., 0])
    check(torch.einsum, a, [0, 52], b, [1])
    check(torch.einsum, "ij,jk", a, b.float())
    check(torch.einsum, "ij,jk", a.long(), b.long(), runs=False)
    check(torch.einsum)
    for ours in (
        tritongrad.einsum("ij,jk", [a, b]),
        tritongrad.einsum(a, [0, 1], b, [1, 2]),
        tritongrad.einsum(a, [0, 1], b, [1, 2], [0, 2]),
    ):
        assert_same(ours, a @ b)


def test_a_planned_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that opt_einsum plans is the order of contraction."""
    asked: list[Any] = []

    def contract_path(text: str, *shapes: Any, **options: Any) -> Any:
        asked.append((text, shapes, options))
        return [(1, 2), (0, 1)], None

    planner = SimpleNamespace(
        enabled=True,
        strategy="auto",
        is_available=lambda: True,
        get_opt_einsum=lambda: SimpleNamespace(contract_path=contract_path),
    )
    monkeypatch.setattr(torch.backends, "opt_einsum", planner)
    operands = make(2, 3), make(3, 4), make(4, 5)
    seen: list[Any] = []
    with runtime.observe(lambda kernel, grid, args, meta: seen.append(args[0].shape)):
        found = tritongrad.einsum("ij,jk,kl", *operands)
    assert [tuple(shape) for shape in seen] == [(5, 3), (2, 5)]
    assert asked[0][:2] == ("ij,jk,kl", ((2, 3), (3, 4), (4, 5)))
    assert_same(found, operands[0] @ operands[1] @ operands[2])


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("ji,jk->ik", [(3, 2), (3, 4)]),
        ("bhid,bhjd->bhij", [(2, 3, 4, 5), (2, 3, 6, 5)]),
        ("bihd,bjhd->bhij", [(2, 4, 3, 5), (2, 6, 3, 5)]),
        ("ji,j->i", [(3, 2), (3,)]),
        ("abc,bcd->ad", [(2, 3, 4), (3, 4, 5)]),
    ],
)
def test_operands_are_read_in_place(equation: str, shapes: Sequence[Any]) -> None:
    operands = [make(*shape) for shape in shapes]
    assert copies(operands[0].clone)
    assert not copies(lambda: tritongrad.einsum(equation, *operands))


def test_chains_are_multiplied_in_the_cheapest_order() -> None:
    # The example of Introduction to Algorithms.
    assert cheapest((30, 35, 15, 5, 10, 20, 25)) == ((0, (1, 2)), ((3, 4), 5))
    assert cheapest((2, 1000, 3)) == (0, 1)


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        (torch.tensordot, (make(2, 3, 4), make(4, 3, 2)), {"dims": torch.tensor([[1, 2], [1, 0]])}),
        (torch.tensordot, (make(2, 3), make(3, 2)), {"dims": torch.tensor(1)}),
        (torch.tensordot, (make(2, 3), make(3, 2)), {"dims": -1}),
        (torch.tensordot, (make(2, 3), make(3, 2)), {"dims": 3}),
        (torch.tensordot, (make(2, 3), make(3, 2)), {"dims": ([1], [0], [1])}),
        (torch.tensordot, (make(2, 3), make(3, 2)), {"dims": ([1, 1], [0, 1])}),
        (torch.tensordot, (make(2, 3), make(3, 2)), {"dims": ([1], [0, 1])}),
        (torch.tensordot, (make(2, 3), make(3, 2)), {"dims": ([2], [0])}),
        (torch.tensordot, (make(2, 3), make(3, 2)), {"dims": (1, 0)}),
        (torch.tensordot, (make(2, 3), make(4, 2)), {"dims": 1}),
        (torch.tensordot, (make(2, 3), make(3, 2)), {"dims": ([-1], [0])}),
        (torch.linalg.vecdot, (make(2, 3, 4), make(3, 4)), {"dim": 1}),
        (torch.linalg.vecdot, (make(3), make(2, 3)), {"dim": 0}),
        (torch.linalg.vecdot, (make(2, 3, 4), make(3, 1)), {}),
        (torch.linalg.vecdot, (make(3), make(1)), {}),
        (torch.linalg.vecdot, (make(2, 3), make(3, 2)), {"dim": 0}),
        (torch.linalg.vecdot, (make(2, 3), make(2, 3)), {"dim": 2}),
        (torch.inner, (make(2, 0), make(3, 0)), {}),
        (torch.inner, (make(2, 3), make(2, 1)), {}),
        (torch.outer, (make(3), make(2, 2)), {}),
        (torch.outer, (make(3).float(), make(2)), {}),
        (torch.vdot, (make(3), make(4)), {}),
        (torch.linalg.multi_dot, ([make(3)],), {}),
        (torch.linalg.multi_dot, ([make(3), make(4, 2)],), {}),
        (torch.linalg.multi_dot, ([make(3), make(3, 2)],), {}),
        (torch.linalg.multi_dot, ((make(3, 2), make(2, 3, 4)),), {}),
    ],
)  # fmt: skip
def test_calls(function: Callable[..., Any], args: Any, kwargs: Any) -> None:
    check(function, *args, **kwargs)


def test_one_matrix_is_no_chain() -> None:
    check(torch.chain_matmul, make(2, 3), runs=False)
    check(torch.kron, make(2).long(), make(2).long(), runs=False)


@pytest.mark.parametrize("equation", ["ij,jk->ik", "i,j->ij", "i,i->", "ij,j->i", "ij->i"])
def test_einsum_under_autocast(equation: str) -> None:
    """It follows the ops that it is made of, also where operands differ in dtype."""
    terms = equation.split("->")[0].split(",")
    operands = [make(*[3] * len(term)).float() for term in terms]
    for last in (torch.float32, torch.bfloat16):
        mixed = [*operands[:-1], operands[-1].to(last)]
        with torch.autocast(DEVICE.type, torch.bfloat16):
            expected = torch.einsum(equation, *mixed)
            with tritongrad.use() as session:
                found = torch.einsum(equation, *mixed)
        assert session.ran["einsum"]
        assert found.dtype is expected.dtype
        torch.testing.assert_close(found, expected)
