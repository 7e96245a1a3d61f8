"""The document's examples, run as they are printed, under ``use()`` and on torch alone.

``automatic-differentiation.md`` beside this file is the whole document, unchanged; an example is a
fenced block of it. Like a reader who types them in one after the other, an example starts from
what the blocks above it have left (``x`` and its gradient), the first one from ``x =
torch.arange(4.0)``. What the document names without showing is here: ``f``.

The one thing that cannot be run as printed: ``assert x.grad == 4 * x`` compares vectors, and torch
refuses to take a vector of four truths for one. An assertion counts as true where all its elements
are; nothing else is rewritten.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritongrad import runtime, use

from .measure import DEVICE, Errors, arithmetic_on_torch, compare, error

DOCUMENT = Path(__file__).with_name("automatic-differentiation.md")

FOOTNOTE = (
    "Examples run as the document prints them, but for `assert x.grad == 4 * x` and its like: "
    "torch takes no vector for a truth value, so an assertion holds where every element does."
)

SEEDS = 24
"""Draws of ``a`` in the last example: enough that each branch of ``f`` is taken many times."""


def f(a: Tensor) -> Tensor:
    """The document's ``f``: a loop and a branch that depend on the data.

    From Dive into Deep Learning, 2.5.4, whose questions the document answers.
    """
    b = a * 2
    while b.norm() < 1000:
        b = b * 2
    if b.sum() > 0:
        c = b
    else:
        c = 100 * b
    return c


def blocks(text: str) -> list[str]:
    """The fenced blocks of a Markdown text, in order."""
    return re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Example:
    """One example and what it is about.

    Attributes:
        block: which fenced block of the document.
        source, result: names of the variable that is differentiated by, and of the result.
        edit: ``(old, new)``, for the variant that the document has in a comment.
        verify: what the document says of the outcome, beside its own assertions: from the
            variables, the problems found.
    """

    name: str
    block: int
    result: str
    source: str = "x"
    edit: tuple[str, str] | None = None
    verify: Callable[[dict[str, Any]], Iterator[str]] = lambda variables: iter(())

    def code(self) -> str:
        """Its lines."""
        code = blocks(DOCUMENT.read_text())[self.block]
        if self.edit is not None:
            old, new = self.edit
            if old not in code:
                raise ValueError(f"example {self.name!r}: the document has no line {old!r}")
            code = code.replace(old, new)
        return code


def _differs(what: str, found: Tensor, expected: Tensor) -> Iterator[str]:
    distance = error(found, expected)
    if not distance <= 1.0:
        yield f"{what}: {distance:.3g} tolerances off"


def _verify_dot(variables: dict[str, Any]) -> Iterator[str]:
    x = variables["x"]
    yield from _differs("x.grad is not 4 x", x.grad, 4 * x.detach())


def _verify_square(variables: dict[str, Any]) -> Iterator[str]:
    x = variables["x"]
    yield from _differs("x.grad is not 2 x", x.grad, 2 * x.detach())


def _verify_detach(variables: dict[str, Any]) -> Iterator[str]:
    x, u = variables["x"], variables["u"]
    yield from _differs("x.grad is not u", x.grad, u)
    if u.requires_grad:
        yield "u is part of the graph"
    if torch.equal(x.grad, 3 * x.detach() ** 2):
        yield "x.grad is 3 x^2: u was not treated as a constant"


def _verify_function(variables: dict[str, Any]) -> Iterator[str]:
    a, d = variables["a"], variables["d"]
    yield from _differs("a.grad is not d / a", a.grad, (d / a).detach())


EXAMPLES = {
    example.name: example
    for example in (
        Example("dot", 0, "y", verify=_verify_dot),
        Example("non-scalar", 1, "y", verify=_verify_square),
        Example(
            "non-scalar-ones",
            1,
            "y",
            edit=(
                "# y.backward(torch.ones(len(x))) equivalent to the below\ny.sum().backward()",
                "y.backward(torch.ones(len(x)))",
            ),
            verify=_verify_square,
        ),
        Example("detach", 2, "z", verify=_verify_detach),
        Example("function", 3, "d", source="a", verify=_verify_function),
    )
}
"""The examples by name, in the document's order."""


class _Elementwise(ast.NodeTransformer):
    """``assert test`` -> ``assert _holds(lambda: test)``."""

    def visit_Assert(self, node: ast.Assert) -> ast.Assert:
        nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        test = ast.Call(ast.Name("_holds", ast.Load()), [ast.Lambda(nothing, node.test)], [])
        return ast.copy_location(ast.Assert(test, node.msg), node)


class Notebook:
    """Variables that blocks of code are run on, one after the other.

    Attributes:
        forward, backward: Triton kernels launched by blocks, outside and inside autograd's passes;
            what the assertions compute is not counted.
    """

    def __init__(self) -> None:
        self.variables: dict[str, Any] = {
            "torch": torch,
            "x": torch.arange(4.0, device=DEVICE),
            "f": f,
            "_holds": self._holds,
        }
        self.forward = self.backward = 0
        self._asserting = False

    def run(self, code: str) -> None:
        """Execute ``code`` as it stands, assertions elementwise, new tensors where kernels run."""
        tree = ast.fix_missing_locations(_Elementwise().visit(ast.parse(code)))
        with runtime.observe(self._count), torch.device(DEVICE):
            exec(compile(tree, DOCUMENT.name, "exec"), self.variables)

    def _holds(self, test: Callable[[], Any]) -> bool:
        self._asserting = True
        try:
            return bool(torch.as_tensor(test()).all())
        finally:
            self._asserting = False

    def _count(self, *launch: Any) -> None:
        if self._asserting:
            return
        if torch._C._current_graph_task_id() == -1:
            self.forward += 1
        else:
            self.backward += 1


def as_function(example: Example) -> Callable[..., list[Tensor]]:
    """An example's result as a function of its source: its assignments, in order.

    Of the block, ``source`` itself is given and statements without a result (``backward()``, the
    assertions) are left out.
    """
    tree = ast.parse(example.code())
    tree.body = [
        statement
        for statement in tree.body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) != example.source
    ]
    code = compile(tree, DOCUMENT.name, "exec")

    def function(value: Tensor) -> list[Tensor]:
        variables: dict[str, Any] = {"torch": torch, "f": f, example.source: value}
        exec(code, variables)
        return [variables[example.result]]

    return function


def check(example: Example) -> Errors:
    """Run an example on our kernels and compare it with torch.

    The last one draws its input, so it is run with many seeds.
    """
    if example.source == "x":
        total, source = _run(example, seed=0)
        total.merge(_derivatives(example, source))
        return total
    total = Errors()
    branches: dict[bool, Tensor] = {}
    for seed in range(SEEDS):
        errors, source = _run(example, seed)
        total.merge(errors, f"seed {seed}")
        # b is a times a power of two, so the sign of a decides which branch of f is taken.
        branches.setdefault(bool(source > 0), source)
    for source in branches.values():
        total.merge(_derivatives(example, source), f"a = {source.item():.3g}")
    if len(branches) < 2:
        total.problems.append(f"all of {SEEDS} seeds took the same branch of f")
    return total


def _run(example: Example, seed: int) -> tuple[Errors, Tensor]:
    """Run an example as printed, with ``use()`` and without. Returns what it was differentiated
    by, too."""
    ours, native = Notebook(), Notebook()
    above = blocks(DOCUMENT.read_text())[: example.block]
    for code in above:
        native.run(code)
    torch.manual_seed(seed)
    native.run(example.code())
    source = native.variables[example.source]
    with use() as session:
        try:
            for code in above:
                ours.run(code)
            session.fell_back.clear()
            ours.forward = ours.backward = 0
            torch.manual_seed(seed)
            ours.run(example.code())
        except Exception as problem:
            about = f"{type(problem).__name__}: {problem}".removesuffix(": ")
            found = arithmetic_on_torch(session)
            return Errors(problems=[about], fell_back=found), source.detach()

    errors = Errors(
        forward_kernels=ours.forward,
        backward_kernels=ours.backward,
        fell_back=arithmetic_on_torch(session),
        problems=list(example.verify(ours.variables)),
    )
    errors.note("forward", error(ours.variables[example.result], native.variables[example.result]))
    errors.note("gradient", error(ours.variables[example.source].grad, source.grad))
    for part, kernels in (("forward", ours.forward), ("backward", ours.backward)):
        if not kernels:
            errors.problems.append(f"{part} launches no Triton kernel")
    return errors, source.detach()


def _derivatives(example: Example, source: Tensor) -> Errors:
    """Compare what an example does not ask for: second order and forward mode at ``source``."""
    inputs = [source.clone().requires_grad_() for _ in range(2)]
    errors = compare(as_function(example), inputs[:1], inputs[1:])
    errors.forward_kernels = errors.backward_kernels = 0
    return errors
