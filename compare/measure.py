"""How an op's numbers are compared with torch's: which ones, and how far apart they may be.

A function is evaluated twice, on our kernels and on torch: its value, its gradient along a random
cotangent, the derivatives of that gradient with respect to inputs and cotangent, and its
forward-mode derivative along a random tangent. Each is compared element by element.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tritongrad import runtime, use
from tritongrad.reroute import HARMLESS
from tritongrad.runtime import Session
from tritongrad.sampling import Sample, tensors

from .terminal import dtype_name


class Tolerance(NamedTuple):
    """How far a number may be from torch's: ``absolute + relative * |torch's|``."""

    relative: float
    absolute: float


# torch.testing's relative tolerances, but tighter absolute ones (1e-5 there), because a small
# gradient that is wrong must be seen, and tighter in float64 (1e-7 there), because so must be a
# constant or an accumulator that is only a float32.
TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-12, 1e-12),
    torch.float32: Tolerance(1.3e-6, 1e-6),
    torch.float16: Tolerance(1e-3, 1e-5),
    torch.bfloat16: Tolerance(1.6e-2, 1e-5),
}

SLACK = 4.0
"""How much further from the exact result than torch's a sum of cancelling terms may be."""

DEVICE = torch.device("cpu" if runtime.INTERPRETED else "cuda")
"""Where our kernels run on this machine."""

QUANTITIES = {"forward": 0, "gradient": 1, "second": 2, "jvp": 1}
"""What is compared, in the order in which it is computed -> its order of differentiation."""


def error(found: Tensor, expected: Tensor) -> float:
    """Largest distance of an element from torch's, as a multiple of the dtype's tolerance.

    NaN equals NaN and an infinity itself. Other shapes or dtypes, or a NaN of one side alone, are
    infinitely far; so are integers and booleans that differ.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return math.inf
    if expected.dtype not in TOLERANCES:
        return 0.0 if torch.equal(found, expected) else math.inf
    return _excess(found, expected, expected.dtype)


def _excess(found: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """``error`` of equal shapes by the tolerance of ``dtype``."""
    if found.shape != expected.shape:
        return math.inf
    if not expected.numel():
        return 0.0
    relative, absolute = TOLERANCES[dtype]
    ours, theirs = found.detach().double(), expected.detach().double()
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    distance = (ours - theirs).abs() / (absolute + relative * theirs.abs())
    # What is left of NaN and infinity on one side only: NaN - 1, inf / inf.
    return distance.nan_to_num(nan=math.inf).masked_fill(same, 0.0).max().item()


def leaves(sample: Sample) -> list[Tensor]:
    """The tensors of ``sample`` in order, as leaves: same memory, same strides."""
    return [t.detach().requires_grad_(t.requires_grad) for t in tensors(sample)]


def calling(function: Callable[..., Any], sample: Sample) -> Callable[..., list[Tensor]]:
    """``function`` called as ``sample`` says, as a function of the sample's tensors."""

    def call(*new: Tensor) -> list[Tensor]:
        replacements = iter(new)

        def replace(value: Any) -> Any:
            if isinstance(value, Tensor):
                return next(replacements)
            if type(value) in (list, tuple):
                return type(value)(map(replace, value))
            return value

        args = [replace(value) for value in sample.args]
        kwargs = {name: replace(value) for name, value in sample.kwargs.items()}
        return tensors(Sample((function(*args, **kwargs),)))

    return call


class Derivation:
    """A function at one point: its value and its derivatives, each computed when asked for.

    Cotangents and tangents are drawn from fixed seeds, so that two derivations of functions with
    the same shapes use the same. ``dtype`` is what they are rounded to at least, so that they are
    the same in a computation in float64 too.
    """

    def __init__(
        self,
        function: Callable[..., list[Tensor]],
        inputs: Sequence[Tensor],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.function = function
        self.dtype = dtype
        self.inputs = list(inputs)
        self.wanted = [t for t in inputs if t.requires_grad]
        self._outputs: list[Tensor] = []
        self._cotangents: list[Tensor] = []
        self._gradients: list[Tensor] = []

    def forward(self) -> list[Tensor]:
        """Every output."""
        found = self.function(*self.inputs)
        self._outputs = [out for out in found if out.requires_grad]
        return found

    def gradient(self) -> list[Tensor] | None:
        """The gradient of every input that asks for one; None if there is none to ask for."""
        if not self._outputs:
            return None
        # With the cotangents as variables, a gradient that is constant in the inputs has a
        # second derivative all the same.
        self._cotangents = [t.requires_grad_() for t in self._directions(self._outputs, seed=1)]
        self._gradients = _grad(self._outputs, self.wanted, self._cotangents, create_graph=True)
        return self._gradients

    def second(self) -> list[Tensor] | None:
        """The gradient of ``gradient()`` with respect to inputs and cotangents."""
        if not self._gradients:
            return None
        variables = [*self.wanted, *self._cotangents]
        # torch refuses to differentiate a gradient that is constant (the sign's, which is zero).
        linked = [g for g in self._gradients if g.requires_grad]
        if not linked:
            return [torch.zeros_like(v) for v in variables]
        return _grad(linked, variables, self._directions(linked, seed=2))

    def jvp(self) -> list[Tensor] | None:
        """The forward-mode derivative of every output that has a gradient."""
        if not self._outputs:
            return None
        tangents = iter(self._directions(self.wanted, seed=3))
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(_separate(t), next(tangents)) if t.requires_grad else t
                for t in self.inputs
            ]
            pairs = [forward_ad.unpack_dual(out) for out in self.function(*duals)]
        return [
            # Not the tangent's own dtype: torch's norm(x, dtype=float64) has a float32 one.
            torch.zeros_like(primal) if tangent is None else tangent.to(primal.dtype)
            for primal, tangent in pairs
            if primal.is_floating_point()
        ]

    def _directions(self, like: Sequence[Tensor], seed: int) -> list[Tensor]:
        """Random tensors with the shapes, dtypes and devices of ``like``."""
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(t.shape, dtype=torch.float64, generator=generator) for t in like]
        return [
            d.to(self.dtype or t.dtype).to(t.device, t.dtype)
            for d, t in zip(drawn, like, strict=True)
        ]


def _separate(tensor: Tensor) -> Tensor:
    """The values of ``tensor``, each in memory of its own: forward mode takes no other."""
    tensor = tensor.detach()
    expanded = any(stride == 0 for stride in tensor.stride())
    return tensor.contiguous() if expanded else tensor


def _grad(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    create_graph: bool = False,
) -> list[Tensor]:
    found = torch.autograd.grad(
        outputs,
        inputs,
        cotangents,
        create_graph=create_graph,
        retain_graph=True,
        materialize_grads=True,  # None means zero, and which of the two comes is not compared
    )
    return list(found)


def arithmetic_on_torch(session: Session) -> Counter[str]:
    """What a session left to torch although it computes: ``name: reason``."""
    found: Counter[str] = Counter()
    for (name, reason), count in session.fell_back.items():
        if reason not in HARMLESS:
            found[f"{name}: {reason}"] += count
    return found


@dataclass
class Errors:
    """How one call, or many, compared with torch.

    Attributes:
        forward, gradient, second, jvp: largest error as a multiple of the tolerance; None where
            torch has no such derivative either (comparisons).
        forward_kernels, backward_kernels: Triton kernels launched for value and first gradient.
        fell_back: what torch computed in our place, and why.
        problems: in words, everything that is wrong.
    """

    forward: float | None = None
    gradient: float | None = None
    second: float | None = None
    jvp: float | None = None
    forward_kernels: int = 0
    backward_kernels: int = 0
    fell_back: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems and not self.fell_back

    def note(self, quantity: str, found: float) -> None:
        """Enter an error of ``quantity``; one beyond the tolerance becomes a problem."""
        before = getattr(self, quantity)
        setattr(self, quantity, found if before is None else max(before, found))
        if not found <= 1.0:
            self.problems.append(f"{quantity} is {found:.3g} tolerances from torch's")

    def merge(self, other: Errors, about: str = "") -> None:
        """Take in ``other``: the larger errors, the sum of everything else."""
        for quantity in QUANTITIES:
            pair = (getattr(self, quantity), getattr(other, quantity))
            setattr(self, quantity, max((e for e in pair if e is not None), default=None))
        self.forward_kernels += other.forward_kernels
        self.backward_kernels += other.backward_kernels
        self.fell_back += other.fell_back
        self.problems += [f"{about}: {problem}" if about else problem for problem in other.problems]


class Rerouted:
    """A torch function with ``use()`` around each call, and what the sessions saw."""

    def __init__(self, function: Callable[..., list[Tensor]]) -> None:
        self.function = function
        self.sessions: list[Session] = []

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        with use() as session:
            self.sessions.append(session)
            return self.function(*tensors)

    @property
    def launches(self) -> int:
        """Kernels launched so far, in backward passes too."""
        return sum(session.launches for session in self.sessions)

    @property
    def fell_back(self) -> Counter[str]:
        return sum(map(arithmetic_on_torch, self.sessions), Counter())


def compare(
    function: Callable[..., list[Tensor]],
    inputs: Sequence[Tensor],
    clones: Sequence[Tensor],
    exact: Derivation | None = None,
    max_order: int | None = None,
    native: Callable[..., list[Tensor]] | None = None,
) -> Errors:
    """Compare every quantity of ``function``, torch code, on our kernels with torch's own.

    Args:
        inputs, clones: leaves of equal values, for our kernels and for torch.
        exact: the same on torch in float64. Where terms cancel, the last bits are chance in both:
            a result that is further from torch's than the tolerance passes if it is at most
            SLACK times as far from this as torch's is.
        max_order: order beyond which our op has no derivative, and must say so.
        native: what torch runs instead, where ``function`` itself lacks a derivative there.
    """
    rerouted = Rerouted(function)
    ours, theirs = Derivation(rerouted, inputs), Derivation(native or function, clones)
    errors = Errors()
    for quantity, order in QUANTITIES.items():
        expected = _native(getattr(theirs, quantity))
        truth = _native(getattr(exact, quantity)) if exact is not None else None
        before = rerouted.launches
        try:
            found = getattr(ours, quantity)()
        except Exception as problem:
            announced = isinstance(problem, NotImplementedError) and order > (max_order or order)
            if expected is not None and not announced:
                errors.problems.append(f"{quantity}: {type(problem).__name__}: {problem}")
            continue
        launched = rerouted.launches - before
        if quantity == "forward":
            errors.forward_kernels = launched
        elif quantity == "gradient":
            errors.backward_kernels = launched
        if expected is None:
            continue
        if found is None or len(found) != len(expected):
            errors.problems.append(f"{quantity}: not as many results as torch's")
            continue
        pairs = list(zip(found, expected, strict=True))
        for a, b in pairs:
            if (a.dtype, a.shape) != (b.dtype, b.shape):
                errors.problems.append(f"{quantity}: {_form(a)}, torch has {_form(b)}")
        distances = [error(a, b) for a, b in pairs]
        if truth is not None:
            distances = [
                _relative_to_torch(a, b, t) if 1.0 < distance < math.inf else distance
                for distance, (a, b), t in zip(distances, pairs, truth, strict=True)
            ]
        errors.note(quantity, max(distances, default=0.0))
    errors.fell_back = rerouted.fell_back
    return errors


def _relative_to_torch(found: Tensor, expected: Tensor, truth: Tensor) -> float:
    ours, theirs = (_excess(t, truth, expected.dtype) for t in (found, expected))
    return ours / max(SLACK * theirs, 1.0)


def _form(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"


def _native(compute: Callable[[], list[Tensor] | None]) -> list[Tensor] | None:
    """What torch computes, None where it has no such derivative."""
    try:
        return compute()
    except NotImplementedError:
        return None
