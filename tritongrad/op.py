"""Op, the one record that an operation is, and OPS, the table of all of them.

Everything that tritongrad does walks this table: rerouting, parity, gradient checks, hazards,
benchmarks, the README's contract table. Adding an op adds a record and edits no list.

How a record holds the shapes of op there are (``params`` is what is not a tensor):

=====================  =========================================================================
op                     record
=====================  =========================================================================
exp, softmax           saves its output: ``saves`` answers with an index past the inputs
mul, where             saves for each gradient only what that gradient needs
layer_norm             ``forward`` returns (y, mean, rstd), ``outputs=1``: what follows the public
                       outputs is for ``backward`` alone and has no derivative; ``rule`` computes
                       them again from x, so its own derivative is the whole one
cross_entropy          an integer input is a tensor that never needs a gradient
dropout                ``bind`` draws a seed, a tensor that none of the arguments is, so that each
                       call is read anew, every order sees the same mask, and what ``torch.vmap``
                       does with a batched one is the op's rule for ``randomness``
fused linear loss      ``forward`` returns (loss, dx, dw), the gradients past ``outputs``;
                       ``backward`` scales them
attention              ``backward`` is an Op that has a ``backward`` of its own, and ``jvp`` calls
                       a third Op: four kernel sets, no further mechanism
outer, einsum          composites: ``reference`` without ``forward``; views and calls of other ops,
                       whose derivatives, batching and promotion are theirs
=====================  =========================================================================
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .sampling import Make, Sample

Tensors = tuple[Tensor | None, ...]
Needs = tuple[bool, ...]


class Unsupported(Exception):
    """Raised by ``Op.bind`` for a call that torch must run; the message is the reason."""


class OtherOverload(Unsupported):
    """Raised by ``Op.bind`` for a call of another overload of a torch callable, ``torch.max(x, y)``
    for one: the next ``bind`` of the callable is asked, of this op or of one that shares it."""

    def __init__(self) -> None:
        super().__init__("arguments of another overload")


class Spec(NamedTuple):
    """Shape and dtype of an input: what its gradient must look like."""

    shape: torch.Size
    dtype: torch.dtype


class BackwardParams(NamedTuple):
    """What a backward op knows beside its tensors, which are (*output gradients, *saved)."""

    params: Any
    needs: Needs
    specs: tuple[Spec | None, ...]


Bind = Callable[..., tuple[Tensors, Any]]
Rule = Callable[[Any, Needs, tuple[Spec | None, ...], Tensors, Tensors], Tensors]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Op:
    """One operation: its torch names, its kernels, its derivatives.

    Attributes:
        name: its name here and in reports; torch's own name of the function where there is one.
        bind: torch's signature. Returns ``(tensors, params)``, the canonical call, or raises
            ``Unsupported`` with the reason. ``None`` for an op without a public name.
        forward: ``(params, *tensors) -> Tensor | tuple``: allocates and launches. Never called
            with a tensor that a transform has wrapped. Writes nothing but its results. None for a
            composite: ``reference`` is evaluated instead, each of its operations on Triton and
            recorded by itself, so that none of the fields about derivatives is needed.
        replaces: the torch callables whose calls it takes: function, methods, operators, aliases.
            The first is the reference that parity is measured against.
        variants: further torch callables, each with a ``bind`` of its own, because their
            signature differs (reflected operators, ``Tensor.where``, ``torch.norm``).
        overloads: further signatures of all in ``replaces``, tried in this order where ``bind``
            does not fit.
        ambient: what ``bind`` and the rest depend on beside the arguments (a precision that torch
            was told), compared before an earlier reading is used again; a new object each time
            where none may be (random numbers). None: nothing, but for the default dtype, which
            integers are converted to.
        look: ``(params, *tensors)``, at each call, read anew or not: looks at values, raises
            Unsupported or warns.
        prepare: ``(params, *tensors) -> params`` of a call that is remembered, with what need be
            computed but once for all like it: its launch.
        random: whether it draws random numbers, in ``bind``. torch's of the same seed are others:
            parity is measured against its ``reference``, evaluated of its own numbers.
        shares: those that it shares with other ops, which take other overloads of them.
        outputs: number of public outputs, of which those that are not floating-point have no
            derivative; whatever ``forward`` returns beyond them is kept for ``backward`` only.
        returns: what torch makes of several public outputs (``torch.return_types.max``), from a
            tuple of them. None: the tuple.
        saves: ``(params, needs) -> indices`` into ``(*tensors, *outputs)``: what backward needs.
            None: the tensors.
        constant_outputs: ``(params, needs) -> indices`` of the public outputs that do not depend on
            what a gradient is needed of. None: all do.
        specs: ``params -> Specs of the tensors``, where ``params`` know them; ``()`` if every
            tensor has the shape and dtype of the output, None if they do not know.
        rule: the derivative in torch mathematics: ``(params, needs, specs, grads, saved) ->
            gradients``, one per tensor, ``None`` where ``needs`` is false. ``saved`` has the
            length of inputs and outputs together, ``None`` at what was not saved.
        backward: the op whose kernel computes ``rule`` in one go, or ``None``: ``rule`` itself is
            evaluated, each of its operations on Triton.
        reference: ``(params, *tensors) -> tuple`` of outputs, the op's definition in torch
            mathematics. A backward op has one (its parent's rule), a composite is one; derivatives
            of every order and direction come from it.
        jvp: ``(params, tensors, outputs, tangents) -> tangents of the public outputs``.
        vmap: ``(info, params, tensors, dims) -> (outputs, out_dims)``.
        autocast: device type -> policy ("lower", "float32", "promote"), as torch's lists have it;
            "keep" for a composite that is in none of them, and whose parts are, but not torch's.
        schema: torch.library schema of the public function, arguments in the order in which
            ``bind`` returns its tensors, ``"(Tensor input, Tensor? bias=None) -> Tensor"``. With
            one, ``torch.compile`` sees a library op around our kernels; without, torch's op, which
            Inductor can fuse.
        fake: of the arguments of the schema, tensors like the outputs, without values. None:
            torch's own function, of tensors that have no memory.
        compiles: of an op with a schema, whether its library op may stand for a call, given the
            call's arguments while it is traced; None: always.
        spelling: of an op with a schema, one of its variants that the library op stands for, too,
            and what makes the schema's arguments of its own; None of it: the call is torch's.
        opinfo: names of torch's OpInfo entries that cover it, ``name.variant`` for a variant.
        kernels: names of the Triton kernels that forward launches.
        formula: the derivative for a reader, one line.
        dtypes: dtypes of the result that it computes; others fall back.
        differentiable: whether it has a derivative; comparisons have none.
        constants: of an op defined by its reference, the tensors that it is constant in.
        max_order: derivative order up to which it goes, ``None`` for any.
        cost: ``(params, *tensors) -> (bytes, operations)``, the least that a forward call moves
            and computes; benchmarks compare with it.
        samples: calls for parity, tests and static compilation, beside OpInfo's (see sampling.py).
        bench: ``(make, size) -> Sample`` to measure, where one of ``samples`` with its sizes scaled
            would not be what users call (see ``Size`` in compare/workloads.py).
        sources: where the derivative formula is from.
        differs: where its numbers are not torch's on purpose, and what torch's are; in sentences.
    """

    name: str
    bind: Bind | None
    forward: Callable[..., Any] | None = None
    replaces: tuple[Callable[..., Any], ...] = ()
    variants: Mapping[Callable[..., Any], Bind] = dataclasses.field(default_factory=dict)
    overloads: tuple[Bind, ...] = ()
    ambient: Callable[[], Any] | None = None
    look: Callable[..., None] | None = None
    prepare: Callable[..., Any] | None = None
    random: bool = False
    shares: tuple[Callable[..., Any], ...] = ()
    outputs: int = 1
    returns: Callable[[tuple[Any, ...]], Any] | None = None
    saves: Callable[[Any, Needs], Sequence[int]] | None = None
    constant_outputs: Callable[[Any, Needs], Sequence[int]] | None = None
    specs: Callable[[Any], tuple[Spec | None, ...] | None] | None = None
    rule: Rule | None = None
    backward: Op | None = None
    reference: Callable[..., Tensors] | None = None
    jvp: Callable[[Any, Tensors, Tensors, Tensors], Any] | None = None
    vmap: Callable[..., tuple[Any, Any]] | None = None
    autocast: Mapping[str, str] = dataclasses.field(default_factory=dict)
    schema: str | None = None
    compiles: Callable[..., bool] | None = None
    spelling: tuple[Callable[..., Any], Callable[..., tuple | None]] | None = None
    fake: Callable[..., Any] | None = None
    opinfo: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    formula: str = ""
    dtypes: frozenset[torch.dtype] = frozenset()
    differentiable: bool = True
    max_order: int | None = None
    constants: tuple[int, ...] = ()
    cost: Callable[..., tuple[int, int]] | None = None
    samples: Callable[[Make], Iterable[Sample]] | None = None
    bench: Callable[[Make, Any], Sample] | None = None
    sources: str = ""
    differs: str = ""

    def __post_init__(self) -> None:
        if self.forward is None and self.reference is None:
            raise ValueError(f"op {self.name!r} has neither a forward nor a reference")
        if self.differentiable and self.rule is None and self.reference is None:
            raise ValueError(
                f"op {self.name!r} has neither a derivative rule nor a reference; an op that has "
                "no derivative says so with differentiable=False"
            )
        self._remember_calls()

    def _remember_calls(self) -> None:
        from .program import Recalled
        from .recall import remembering

        prepare = self.prepare
        if self.composite and not self.random:
            prepare = Recalled

        @cache  # one that serves several callables stays one
        def wrapped(bind: Bind) -> Bind:
            return remembering(bind, self.ambient, prepare)

        if self.bind is not None:
            object.__setattr__(self, "bind", wrapped(self.bind))
        variants = {target: wrapped(bind) for target, bind in self.variants.items()}
        object.__setattr__(self, "variants", variants)
        object.__setattr__(self, "overloads", tuple(map(wrapped, self.overloads)))

    @cached_property
    def _functions(self) -> tuple[type[torch.autograd.Function], Callable[..., Any]]:
        from .function import make_function

        return make_function(self)

    @cached_property
    def function(self) -> type[torch.autograd.Function]:
        """Its autograd.Function."""
        return self._functions[0]

    @cached_property
    def recorded(self) -> Callable[..., Any]:
        """``(params, *tensors) -> outputs``, recorded for backward; not for use in transforms."""
        return self._functions[1]

    @property
    def composite(self) -> bool:
        """Whether it is made of other ops, by its reference."""
        return self.forward is None

    @property
    def rule_text(self) -> str:
        """Its derivative in one line of mathematics."""
        return self.formula

    @property
    def backward_kernels(self) -> tuple[str, ...]:
        """Names of the Triton kernels that its backward op launches; empty without one."""
        return self.backward.kernels if self.backward is not None else ()

    @cached_property
    def entry(self) -> Callable[..., Any]:
        """It as a function with torch's signature."""
        from .dispatch import entry

        if self.bind is None:
            raise TypeError(f"tritongrad: op {self.name!r} is internal, it has no torch signature")
        return entry(self, self.bind, self.replaces[0])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it with torch's signature."""
        return self.entry(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<tritongrad op {self.name}>"


OPS: dict[str, Op] = {}
"""Every op that has torch names, by its name."""

TARGETS: dict[Callable[..., Any], tuple[Op, Bind]] = {}
"""torch callable -> the op that takes its calls, and how its arguments are read."""

OVERLOADS: dict[tuple[Callable[..., Any], Bind], tuple[Op, Bind]] = {}
"""torch callable and the reading of one of its overloads -> the op and reading to try next."""


def register(op: Op) -> Op:
    """Enter ``op`` into OPS and TARGETS. Returns it.

    Raises:
        ValueError: its name or one of its torch callables is taken.
    """
    if op.name in OPS:
        raise ValueError(f"an op named {op.name!r} is registered already")
    binds = dict.fromkeys(op.replaces, op.bind) | dict(op.variants)
    for target in binds:
        if target in TARGETS and target not in op.shares:
            raise ValueError(f"{target} is taken by op {TARGETS[target][0].name!r}")
    OPS[op.name] = op
    further = [(target, bind) for target in op.replaces for bind in op.overloads]
    for target, bind in (*binds.items(), *further):
        if bind is None:
            continue
        _, last = TARGETS.setdefault(target, (op, bind))
        while (target, last) in OVERLOADS:
            _, last = OVERLOADS[target, last]
        if last is not bind:
            OVERLOADS[target, last] = op, bind
    # Made now: what compiled code calls must not be made while it is being traced.
    _ = op.entry
    if op.schema is not None:
        from .library import define

        define(op)
    return op


def select(argument: str, names: str | Iterable[str]) -> frozenset[str]:
    """Check op names given by a user.

    Raises:
        ValueError: a name that is no op, with the nearest ones.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if name not in OPS:
            near = difflib.get_close_matches(str(name), OPS, 3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(
                f"{argument}: expected names of ops (see `tritongrad ops`), got {name!r}{hint}"
            )
    return frozenset(names)
