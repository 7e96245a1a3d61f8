"""What the suites share: the device, tolerances, samples as functions, comparison with torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad as fwAD

import tritongrad
from tritongrad.compare.parity import STAND_INS, fixed, seeded
from tritongrad.dispatch import torch_name
from tritongrad.op import OPS, Op
from tritongrad.ops import criterion
from tritongrad.runtime import INTERPRETED
from tritongrad.sampling import Random, Sample, tensors

F = torch.nn.functional

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
"""Where our kernels run on this machine."""

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Tolerance(NamedTuple):
    """``|actual - expected| <= atol + rtol * |expected|``."""

    rtol: float
    atol: float


TOLERANCE = {
    torch.float64: Tolerance(1e-12, 1e-12),
    torch.float32: Tolerance(1.3e-6, 1e-6),
    torch.float16: Tolerance(1e-3, 1e-5),
    torch.bfloat16: Tolerance(1.6e-2, 1e-5),
}
"""How far a result may be from native torch's, by its dtype.

float32 and the halves have torch.testing's relative tolerances; its absolute ones (1e-5, and 1e-7
for float64) are tightened, because a wrong small gradient must be seen. What is not listed
(integers, bool) must be equal.
"""


def flatten(value: Any) -> list[Any]:
    """The leaves of nested tuples and lists."""
    if isinstance(value, (tuple, list)):
        return [leaf for part in value for leaf in flatten(part)]
    return [value]


def errors(actual: Tensor, expected: Tensor, tolerance: Tolerance) -> Tensor:
    """Each element's error in multiples of what is tolerated; infinite where one of the two is
    special (NaN, infinite) and the other is not the same."""
    a, e = actual.detach().double(), expected.detach().double()
    same = (a == e) | (a.isnan() & e.isnan())
    allowed = tolerance.atol + tolerance.rtol * e.abs()
    ratio = torch.where(same, 0.0, (a - e).abs() / allowed)
    return torch.where(ratio.isnan() | (~same & ~e.isfinite()), torch.inf, ratio)


def assert_same(
    actual: Any,
    expected: Any,
    what: str = "",
    *,
    exact: Callable[[], Any] | None = None,
    tolerance: Tolerance | None = None,
) -> None:
    """Fail unless ``actual`` is what native torch gave: structure, shape, dtype, device, values.

    Args:
        what: what is compared, for the message.
        exact: computes the same in float64. Where terms cancel, the last bits are chance in both;
            a result outside the table then passes if its distance from this is at most four times
            what torch's is, or the table.
        tolerance: instead of the table's; the caller gives the reason in a comment.
    """
    ours, theirs = flatten(actual), flatten(expected)
    assert len(ours) == len(theirs), f"{what}: {len(ours)} results, torch gives {len(theirs)}"
    for i, (a, e) in enumerate(zip(ours, theirs, strict=True)):
        where = f"{what}[{i}]" if len(ours) > 1 else what
        if e is None and isinstance(a, Tensor):
            # A gradient of zeros may stand for none: the derivative is the same.
            assert not a.any(), f"{where}: {a}, torch gives none"
            continue
        if not isinstance(e, Tensor):
            assert (type(a), a) == (type(e), e), f"{where}: {a!r}, torch gives {e!r}"
            continue
        assert isinstance(a, Tensor), f"{where}: {a!r}, torch gives a tensor"
        for attribute in ("shape", "dtype", "device"):
            mine, torchs = getattr(a, attribute), getattr(e, attribute)
            assert mine == torchs, f"{where}: {attribute} {mine}, torch gives {torchs}"
        allowed = tolerance or TOLERANCE.get(e.dtype, Tolerance(0.0, 0.0))
        error = errors(a, e, allowed)
        over = worst = error.max().item() if error.numel() else 0.0
        if over > 1 and exact is not None:
            truth = flatten(exact())[i]
            torchs = errors(e, truth, allowed).max().clamp(min=1.0)
            over = (errors(a, truth, allowed) / (4 * torchs)).max().item()
        if over > 1:
            at = error.flatten().argmax()
            raise AssertionError(
                f"{where}: an error of {worst:.3g} times the tolerance, in "
                f"{(error > 1).sum()} of {e.numel()} elements, for one "
                f"{a.flatten()[at].item()!r} where torch gives {e.flatten()[at].item()!r}"
            )


def assert_as_accurate(
    actual: Any,
    native: Any,
    exact: Any,
    what: str = "",
    *,
    scale: Sequence[Tensor] | None = None,
) -> None:
    """The rule for float16 and bfloat16: each element's error against the float64 result is no
    larger than native torch's plus one rounding, since torch's may be lucky.

    Args:
        scale: given for derivatives, which may be formulas of the rounded result, and sums of
            terms that cancel: magnitude of those terms. Then it is two roundings of that size, and
            torch's error is the largest, relative to that size, that it makes in the tensor.
    """
    results = zip(flatten(actual), flatten(native), flatten(exact), strict=True)
    for i, (a, n, e) in enumerate(results):
        if not isinstance(n, Tensor) or n.dtype not in (torch.float16, torch.bfloat16):
            assert_same(a, n, f"{what}[{i}]")  # with dtype=, a half type's result may be wide
            continue
        assert (a.dtype, a.shape) == (n.dtype, n.shape), f"{what}: {a.dtype}{list(a.shape)}"
        info = torch.finfo(n.dtype)
        ours, theirs, truth = (t.detach().double() for t in (a, n, e))

        def rounding(size: Tensor, info: torch.finfo = info) -> Tensor:
            # Half the spacing of numbers; that of subnormals is the same everywhere.
            return info.eps / 2 * (1 + info.eps) * size + info.smallest_normal * info.eps / 2

        fine = (ours == theirs) | (ours == truth.to(n.dtype)) | (ours.isnan() & theirs.isnan())
        allowed = (theirs - truth).abs().nan_to_num(0.0, 0.0)
        if scale is None:
            allowed = allowed + rounding(truth.abs())
        elif allowed.numel():
            unit = rounding(torch.fmax(truth.abs(), scale[i]).nan_to_num())
            allowed = ((allowed / unit).max() + 2) * unit
            # The rounded result has overflowed: what formulas make of it is of no use in either.
            fine |= ~ours.isfinite() & ~theirs.isfinite()
        fine |= (ours - truth).abs() <= allowed
        assert fine.all(), (
            f"{what}[{i}]: further from the float64 result than native torch and the roundings\n"
            f"ours {ours[~fine]}\ntorch {theirs[~fine]}\nfloat64 {truth[~fine]}"
        )


class Call:
    """A sample as a function of the inputs that it is differentiated by.

    Attributes:
        op: the op that takes the call.
        sample: the arguments.
        func: the torch callable, by default the op's first; if it is random, each call of it made
            here draws the same numbers.
        native: what runs on torch, ``func`` or its equal.
        inputs: leaves that require a gradient, with the values and strides of the sample's.
    """

    def __init__(
        self,
        op: Op,
        sample: Sample,
        func: Callable[..., Any] | None = None,
        *,
        may_draw: bool = False,
    ) -> None:
        """``may_draw``: of an op that is not random, this call may draw numbers all the same."""
        self.op = op
        self.func = func or op.replaces[0]
        self.native = STAND_INS.get(self.func, self.func)
        self._may_draw = may_draw
        seed = fixed if may_draw else partial(seeded, op)
        self._func, self._native = seed(self.func), seed(self.native)
        self.sample = sample
        # A dictionary, because a tensor may be two arguments of one call.
        originals = {id(t): t for t in tensors(sample) if t.requires_grad}
        self._originals = list(originals)
        self.inputs = [t.detach().requires_grad_() for t in originals.values()]

    def __repr__(self) -> str:
        def show(value: Any) -> str:
            if isinstance(value, Tensor):
                return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
            return repr(value)

        parts = [*map(show, self.sample.args)]
        parts += [f"{name}={show(value)}" for name, value in self.sample.kwargs.items()]
        note = f" ({self.sample.note})" if self.sample.note else ""
        return f"{torch_name(self.func)}({', '.join(parts)}){note}"

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[tuple, dict[str, Any]]:
        """Positional and keyword arguments of the call with other ``inputs``."""
        new = dict(zip(self._originals, inputs, strict=True))

        def swap(value: Any) -> Any:
            if isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value):
                return type(value)(swap(v) for v in value)
            return new.get(id(value), value)

        args, kwargs, _ = self.sample
        return tuple(map(swap, args)), {name: swap(value) for name, value in kwargs.items()}

    def torch(self, *inputs: Tensor) -> Any:
        """The call on native torch."""
        args, kwargs = self.arguments(inputs)
        return self._native(*args, **kwargs)

    def original(self, *inputs: Tensor) -> Any:
        """The call of ``func`` itself: on native torch, unless ``use()`` is open around it."""
        args, kwargs = self.arguments(inputs)
        return self._func(*args, **kwargs)

    def triton(self, *inputs: Tensor) -> Any:
        """The same call of torch's function, rerouted; fails if it did not run on the op."""
        args, kwargs = self.arguments(inputs)
        with tritongrad.use() as session:
            result = self._func(*args, **kwargs)
        assert session.ran[self.op.name], f"on torch: {dict(session.fell_back)}"
        return result

    def double(self) -> Call:
        """The same call in float64: the truth that lower precision is measured against."""

        def widen(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.detach().double().requires_grad_(value.requires_grad)
            if isinstance(value, torch.dtype) and value.is_floating_point:
                return torch.float64
            if isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value):
                return type(value)(map(widen, value))
            return value

        args, kwargs, note = self.sample
        wide = Sample(tuple(map(widen, args)), {n: widen(v) for n, v in kwargs.items()}, note)
        return Call(self.op, wide, self.func, may_draw=self._may_draw)


class Derivatives(NamedTuple):
    """What a function and its derivatives are at one point, in directions that a seed decides.

    ``second`` is the derivative of the gradient by inputs and upstream gradients; ``attached`` says
    which gradients can be differentiated further.
    """

    value: Any
    gradient: list[Tensor | None]
    attached: list[bool]
    second: list[Tensor | None]
    tangents: list[Tensor | None]


def derivatives(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    second: bool = True,
    forward: bool = True,
) -> Derivatives:
    """Evaluate ``function`` with its derivatives.

    Args:
        dtype: what upstream gradients, directions and tangents are rounded to, so that they are the
            same in a float64 evaluation of a call in less.
        second: whether to take the derivative of the gradient.
        forward: whether to take forward-mode derivatives.
    """
    value = function(*inputs)
    outputs = [t for t in floats(value) if t.requires_grad]
    if not outputs:
        return Derivatives(value, [], [], [], [])
    upstream = [g.requires_grad_(second) for g in random_like(outputs, 1, dtype)]
    gradient = torch.autograd.grad(
        outputs, inputs, upstream, create_graph=second, allow_unused=True
    )
    attached = [g is not None and g.requires_grad for g in gradient]
    linked = [g for g in gradient if g is not None and g.requires_grad]
    found: Sequence[Tensor | None] = ()
    if linked:
        directions = random_like(linked, 2, dtype)
        found = torch.autograd.grad(linked, [*inputs, *upstream], directions, allow_unused=True)
    tangents: list[Tensor | None] = []
    if forward:
        with fwAD.dual_level():
            duals = [
                fwAD.make_dual(t.detach(), d)
                for t, d in zip(inputs, random_like(inputs, 3, dtype), strict=True)
            ]
            tangents = [fwAD.unpack_dual(t).tangent for t in floats(function(*duals))]
    return Derivatives(value, list(gradient), attached, list(found), tangents)


class Terms(NamedTuple):
    """Magnitudes of the terms that first derivatives are sums of, as root of the sum of squares."""

    gradient: list[Tensor]
    tangents: list[Tensor]


def terms(function: Callable[..., Any], inputs: Sequence[Tensor], dtype: torch.dtype) -> Terms:
    """How large roundings of what ``derivatives`` sums up are: it is a product of each output's
    upstream gradient, or each input's tangent, with the Jacobian."""

    def outputs(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(floats(function(*inputs)))

    values = outputs(*inputs)
    if not values or not inputs:
        return Terms([], [])
    upstream, directions = random_like(values, 1, dtype), random_like(inputs, 3, dtype)
    primals = [t.detach() for t in inputs]
    jacobians = torch.func.jacrev(outputs, argnums=tuple(range(len(inputs))))(*primals)
    gradient = [torch.zeros_like(t) for t in primals]
    tangents = [torch.zeros_like(v) for v in values]
    for i, (row, g) in enumerate(zip(jacobians, upstream, strict=True)):
        for j, (block, d) in enumerate(zip(row, directions, strict=True)):
            matrix = block.reshape(g.numel(), d.numel()).square()
            gradient[j] += (g.flatten().square() @ matrix).view(d.shape)
            tangents[i] += (matrix @ d.flatten().square()).view(g.shape)
    return Terms([t.sqrt() for t in gradient], [t.detach().sqrt() for t in tangents])


def assert_derivatives_same(
    actual: Derivatives, expected: Derivatives, what: str, exact: Callable[[], Any] | None = None
) -> None:
    """Fail unless ``actual`` is what native torch gave. One way only: where torch's derivative is
    constant and has none of its own, ours may have zeros."""
    ours, theirs = actual.attached, expected.attached
    assert all(a or not e for a, e in zip(ours, theirs, strict=False)), f"{what}: {ours}, {theirs}"
    longest = max(len(actual.second), len(expected.second))

    def padded(found: Derivatives) -> Derivatives:
        missing = longest - len(found.second)
        return found._replace(attached=[], second=[*found.second, *[None] * missing])

    assert_same(padded(actual), padded(expected), what, exact=exact and (lambda: padded(exact())))


def calls(op: Op, dtype: torch.dtype = torch.float64) -> list[Call]:
    """The op's own samples in ``dtype``."""
    assert op.samples is not None, f"op {op.name!r} has no samples"
    found = [Call(op, sample) for sample in op.samples(Random(dtype, DEVICE))]
    if INTERPRETED or op.name not in NOT_OF_NUMBERS:
        return found
    return [call for call in found if all(t.dim() for t in call.inputs)]


NOT_OF_NUMBERS = {"max_dim", "min_dim"}
"""Ops whose gradient, of a 0-dim tensor, torch cannot compute on a GPU in deterministic mode."""


def names(ops: Iterable[Op]) -> list[str]:
    """Names of ops, for ``pytest.mark.parametrize``."""
    return [op.name for op in ops]


ALL = names(OPS.values())
"""Names of all ops."""

DIFFERENTIABLE = names(op for op in OPS.values() if op.differentiable)
"""Names of the ops that have derivatives."""


def _mechanism(op: Op) -> Any:
    """What serves an op. A pointwise one, and a loss that is one, shares it with those that differ
    from it in their device functions alone: as many operands and numbers, as many saved. Those of
    one backward op share it, too."""
    if op.backward is not None and any(
        other.backward is op.backward and other is not op for other in OPS.values()
    ):
        return op.backward
    pointwise = all(kernel.startswith("pointwise") for kernel in op.kernels)
    if not op.kernels or not (pointwise or op.forward is criterion.evaluate):
        return op.name
    assert op.bind is not None
    args, kwargs, _ = calls(op)[0].sample
    bound, params = op.bind(*args, **kwargs)
    needs = tuple([t is not None and t.requires_grad for t in bound])
    saved = op.differentiable and op.saves and tuple(op.saves(params, needs))
    numbers = len(getattr(params, "consts", ()))
    halves = getattr(params, "halves", None) is not None
    second = op.backward is not None and op.backward.backward is not None
    shared = op.kernels, len(bound), numbers, saved, op.differentiable, op.composite
    return *shared, halves, second


def representatives() -> set[str]:
    """Names of ops, the first of each mechanism."""
    return {op.name for op in {_mechanism(op): op for op in reversed(OPS.values())}.values()}


def moved(value: Any, device: torch.device) -> Any:
    """``value`` with its tensors, in whatever it nests them, on ``device``, if they have memory."""
    if isinstance(value, Tensor):
        if value.is_meta:
            return value
        return value.detach().to(device).requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {name: moved(part, device) for name, part in value.items()}
    return type(value)(moved(v, device) for v in value) if type(value) in (list, tuple) else value


def on_the_cpu(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What ``function`` gives for the arguments on the CPU, moved to where kernels run: for what
    torch's kernels for a GPU compute otherwise, or do not survive."""
    cpu = torch.device("cpu")
    return moved(function(*moved(args, cpu), **moved(kwargs, cpu)), DEVICE)


FLOAT32_CONSTANTS = {"hardsigmoid", "hardswish"}
"""Ops whose kernels of torch's for a GPU take 1 / 6 in float32 in float64 too; on the CPU not."""

READ_BY_INDEX: dict[str, type[Exception]] = {
    "cross_entropy": IndexError,
    "nll_loss": IndexError,
    "linear_cross_entropy": IndexError,
    "embedding": IndexError,
    "embedding_bag": RuntimeError,
}
"""Ops of labels, indices and offsets -> torch's error on the CPU for one out of range. A GPU looks
at none before it reads there: it stops, and the process with it."""


def stops_a_gpu(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether the call, of torch's function for this op, must not be made: kernels are compiled,
    and torch's CPU says that an index is out of range."""
    if INTERPRETED or name not in READ_BY_INDEX:
        return False
    try:
        on_the_cpu(function, *args, **kwargs)
    except READ_BY_INDEX[name]:
        return True
    except Exception:
        return False  # which a GPU refuses, too
    return False


def floats(value: Any) -> list[Tensor]:
    """The differentiable outputs among the results of a call."""
    return [t for t in flatten(value) if isinstance(t, Tensor) and t.is_floating_point()]


def random_like(
    values: Sequence[Tensor], seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Dense, normally distributed tensors like ``values``, rounded to ``dtype`` on the way."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(v.shape, dtype=torch.float64, generator=generator).to(dtype).to(v)
        for v in values
    ]
