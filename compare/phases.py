"""What is timed of an op: its value, its gradient, both, the gradient's gradient, forward mode.

A phase makes calls that answer what they computed, so that what is timed and what is checked are
the same thing. Cotangents are drawn from a fixed seed: implementations whose results have the same
shapes are given the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tritongrad.sampling import Sample, tensors

from .measure import SLACK, calling
from .timing import Call

Function = Callable[..., Any]

LIMITS: dict[torch.dtype, float] = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
"""How far a result may be from torch's, in the 2-norm and relative to it, by the dtype that is
computed in. Element by element, by the table of tolerances and against float64, `python -m compare`
compares; this is at the size that is timed."""

OUTLIER = 10.0
"""How many times that one element may be off, relative to the largest."""


class Nothing(Exception):
    """The function has no such derivative; the message says why."""


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_(value.requires_grad)


class Points:
    """A function at several samples of one shape, used in turns.

    Args:
        rounded: dtype that directions are rounded to before they are used in a computation in
            float64, so that they are those of the computation in this dtype.
    """

    def __init__(
        self,
        function: Function,
        samples: Sequence[Sample],
        rounded: torch.dtype | None = None,
        seed: int = 1,
    ) -> None:
        self.rounded = rounded
        self.function = calling(function, samples[0])
        self.inputs = [[_leaf(t) for t in tensors(sample)] for sample in samples]
        self.wanted = [[t for t in inputs if t.requires_grad] for inputs in self.inputs]
        self.seed = seed

    def forward(self) -> Call:
        """The value, recorded for backward if the inputs ask for it, as in training."""
        return lambda n: self.function(*self._of(self.inputs, n))

    def backward(self) -> Call:
        """The gradients of a value that was computed before."""
        graphs = [self._outputs(inputs) for inputs in self.inputs]

        def call(n: int) -> list[Tensor]:
            outputs, cotangents = self._of(graphs, n)
            return _grad(outputs, self._of(self.wanted, n), cotangents, retain_graph=True)

        return call

    def both(self) -> Call:
        """Value and gradients, as a step of training has them."""
        cotangents = [self._outputs(inputs)[1] for inputs in self.inputs]

        def call(n: int) -> list[Tensor]:
            found = _differentiable(self.function(*self._of(self.inputs, n)))
            return _grad(found, self._of(self.wanted, n), self._of(cotangents, n))

        return call

    def second(self) -> Call:
        """The gradient of the gradients, with respect to inputs and cotangents, of gradients that
        were computed before."""
        graphs = []
        for inputs, wanted in zip(self.inputs, self.wanted, strict=True):
            outputs, cotangents = self._outputs(inputs)
            variables = [*wanted, *(c.requires_grad_() for c in cotangents)]
            grads = _differentiable(_grad(outputs, wanted, cotangents, create_graph=True))
            if not grads:
                raise Nothing("its gradient is constant")
            graphs.append((grads, variables, self._directions(grads)))

        def call(n: int) -> list[Tensor]:
            grads, variables, directions = self._of(graphs, n)
            return _grad(grads, variables, directions, retain_graph=True)

        return call

    def jvp(self) -> Call:
        """Value and forward-mode derivative."""
        if not self.wanted[0]:
            raise Nothing("no input is differentiable")
        tangents = [self._directions(wanted) for wanted in self.wanted]

        def call(n: int) -> list[Tensor]:
            given = iter(self._of(tangents, n))
            with forward_ad.dual_level():
                duals = [
                    forward_ad.make_dual(t.detach(), next(given)) if t.requires_grad else t
                    for t in self._of(self.inputs, n)
                ]
                pairs = [forward_ad.unpack_dual(out) for out in self.function(*duals)]
            found = [tangent for _, tangent in pairs if tangent is not None]
            return [*(primal for primal, _ in pairs), *found]

        return call

    def prepare(self, phase: str) -> Call:
        """The call of a phase of ``PHASES``.

        Raises:
            Nothing: there is no such derivative.
        """
        return getattr(self, phase)()

    @staticmethod
    def _of(values: Sequence[Any], n: int) -> Any:
        return values[n % len(values)]

    def _outputs(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        outputs = _differentiable(self.function(*inputs))
        if not outputs:
            raise Nothing("no result is differentiable")
        return outputs, self._directions(outputs)

    def _directions(self, like: Sequence[Tensor]) -> list[Tensor]:
        generator = torch.Generator(like[0].device).manual_seed(self.seed)
        drawn = [torch.randn(t.shape, device=t.device, generator=generator) for t in like]
        return [d.to(self.rounded or t.dtype).to(t.dtype) for d, t in zip(drawn, like, strict=True)]


PHASES = ("forward", "backward", "both", "second", "jvp")


def _differentiable(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [out for out in outputs if out.requires_grad]


def _grad(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    create_graph: bool = False,
    retain_graph: bool = False,
) -> list[Tensor]:
    found = torch.autograd.grad(
        outputs,
        inputs,
        cotangents,
        create_graph=create_graph,
        retain_graph=retain_graph or create_graph,
        allow_unused=True,
    )
    return [g for g in found if g is not None]


CHUNK = 2**24  # elements compared at a time: in float64 they take eight bytes each


def difference(found: Sequence[Tensor], expected: Sequence[Tensor], limit: float) -> str | None:
    """In words, how results differ from torch's by more than ``limit`` allows; else None."""
    if len(found) != len(expected):
        return f"{len(found)} results, torch has {len(expected)}"
    for place, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours.shape != theirs.shape:
            problem: str | None = f"shape {list(ours.shape)}, torch has {list(theirs.shape)}"
        elif theirs.is_floating_point():
            problem = _apart(distance(ours, theirs), limit)
        else:
            problem = None if torch.equal(ours, theirs.to(ours.dtype)) else "other integers"
        if problem is not None:
            return f"result {place}: {problem}"
    return None


def _apart(gap: tuple[float, float], limit: float) -> str | None:
    whole, one = gap
    if not whole <= limit:
        return f"{whole:.2g} from torch's, relative to its norm; the limit is {limit:g}"
    if not one <= OUTLIER * limit:
        return f"one element is {one:.2g} of the largest from torch's"
    return None


def distance(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """How far results of equal shapes are apart: in the 2-norm and relative to it, and the worst
    element relative to the largest. Infinite where one has NaN or an infinity that the other lacks.
    """
    errors = squares = worst = largest = 0.0
    chunks = (t.detach().reshape(-1).split(CHUNK) for t in (found, expected))
    for a, b in zip(*chunks, strict=True):
        if not a.numel():
            continue
        a, b = a.double(), b.double()
        special = ~(a.isfinite() & b.isfinite())
        if (special & (a != b) & ~(a.isnan() & b.isnan())).any():
            return math.inf, math.inf
        b = b.masked_fill(special, 0.0)
        gap = (a.masked_fill(special, 0.0) - b).abs()
        errors += gap.square().sum().item()
        squares += b.square().sum().item()
        worst = max(worst, gap.max().item())
        largest = max(largest, b.abs().max().item())
    if errors == 0.0:
        return 0.0, 0.0
    return (math.sqrt(errors / squares), worst / largest) if squares else (math.inf, math.inf)


def check(
    ours: Callable[[], Sequence[Tensor]],
    expected: Sequence[Tensor],
    exact: Callable[[], Sequence[Tensor]],
    limit: float,
) -> str | None:
    """In words, what is wrong with the results of ``ours``; None if nothing is.

    Where they are further from torch's than the limit, terms may have cancelled, and the last bits
    are chance in both: they pass if they are at most SLACK times as far from ``exact``, the same in
    float64, as torch's are.
    """
    found = ours()
    problem = difference(found, expected, limit)
    if problem is None or len(found) != len(expected):
        return problem
    triples = list(zip(found, expected, exact(), strict=True))
    if any(a.shape != b.shape or not a.is_floating_point() for a, b, _ in triples):
        return problem
    for a, b, truth in triples:
        if _apart(distance(a, b), limit) is None:
            continue
        own, theirs = distance(a, truth), distance(b, truth)
        if not all(x <= SLACK * y for x, y in zip(own, theirs, strict=True)):
            return problem
    return None
