"""From a row of the loss table to an op: each by itself, summed or averaged, forward and backward
in one kernel each, with every derivative and vmap.

A loss is a pointwise function; with ``reduction="none"`` it runs on the pointwise kernel, otherwise
as the map of the reduction kernel. The gradient is pointwise, too: that of the sum or average is
read by all elements.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..admission import settle
from ..dispatch import apply
from ..dtypes import COMPUTE_DTYPE, FLOATING, Number
from ..function import vjp
from ..kernels import loss as k
from ..kernels import reduction as combine
from ..launchers.pointwise import Launch, prepare
from ..launchers.pointwise import run as run_elementwise
from ..launchers.reduction import MEAN, SUM, Plan, Reduction, plan_for, run, run_many
from ..layout import batch_first, broadcast_shape, broadcast_sizes
from ..op import BackwardParams, Bind, Needs, Op, Spec, Tensors, register
from ..sampling import Make, Sample
from ..symbolic import formula
from .row_gradients import (
    Call,
    batch_all,
    gradients,
    gradients_by_sample,
    logical_rank,
    reduce_to,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Form:
    """A loss formula; an op has several where an argument chooses one (``log_target``).

    Compared by identity, so that it is cheap to look up by: make each once.

    Attributes:
        inputs: names of the op's inputs.
        function, backward: device functions of ``kernels.loss``. Tensors that may be absent stand
            last among the parameters of ``function``, so that numbers can take their places.
        rules: input -> its gradient, a function of ``g``, inputs and numbers. A weight ``w`` is a
            factor of the loss that the others' rules do not see: they receive ``g * w``.
        numbers: names of the numbers.
        pushes: input -> what forward mode makes of its tangent ``g``, a function as its rule, where
            torch's differs from that.
        and_weight: the device function whose second result is the weight, of a loss whose mean
            divides by the sum of those.
    """

    inputs: tuple[str, ...]
    function: Any
    backward: Any
    rules: Mapping[str, Callable[..., Tensor]]
    numbers: tuple[str, ...] = ()
    pushes: Mapping[str, Callable[..., Tensor]] = dataclasses.field(default_factory=dict)
    and_weight: Any = None

    @cached_property
    def wants(self) -> dict[str, tuple[str, ...]]:
        """What each input's rule takes."""
        return {n: tuple(inspect.signature(rule).parameters) for n, rule in self.rules.items()}

    @cached_property
    def columns(self) -> tuple[int, ...]:
        """Place of each input's gradient among what the backward device functions return."""
        return tuple([list(self.rules).index(n) if n in self.rules else -1 for n in self.inputs])

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Which of the inputs the device function takes."""
        names = self.function.arg_names
        return tuple([self.inputs.index(n) for n in names if n in self.inputs])

    @cached_property
    def total(self) -> Reduction:
        return SUM.but(map=self.function)

    @cached_property
    def mean(self) -> Reduction:
        return MEAN.but(map=self.function)

    @cached_property
    def weighted_mean(self) -> Reduction:
        return Reduction(self.and_weight, combine.add_and_count, (0.0, 0.0), k.average)


class Params(NamedTuple):
    """What a call of a loss is beside its tensors.

    Attributes:
        form: its formula.
        scalars: for each input, the number in the place of an absent one, or None.
        numbers: the formula's.
        dims: the reduced dimensions, all but those in front that vmap added; None: each loss by
            itself.
        divisor: what their sum is divided by; None: nothing.
        by_weight: whether it is divided by the sum of the weights.
        result: dtype of the result.
        warning: what torch says of each such call.
        specs: of the tensors, and
        launch: of a call that is remembered; neither of another.
    """

    form: Form
    scalars: tuple[Number | None, ...]
    numbers: tuple[Number, ...]
    dims: tuple[int, ...] | None
    divisor: int | None
    by_weight: bool
    result: torch.dtype
    warning: str = ""
    specs: tuple[Spec | None, ...] | None = None
    launch: Launch | Plan | None = None

    @property
    def reduction(self) -> Reduction:
        """The reduction that it is, of one by itself none."""
        if self.by_weight:
            return self.form.weighted_mean
        return self.form.total if self.divisor is None else self.form.mean

    @property
    def finish(self) -> tuple[Number, ...]:
        """The numbers that the reduction finishes with."""
        return () if self.divisor is None or self.by_weight else (self.divisor,)


FLOAT32 = {"cuda": "float32", "cpu": "float32"}
"""Losses are computed in float32 under autocast."""


def loss(
    name: str,
    *targets: Callable[..., Any],
    bind: Bind,
    form: Form,
    samples: Callable[[Make], Iterator[Sample]],
    text: str | None = None,
    autocast: Mapping[str, str] = FLOAT32,
    look: Callable[..., None] | None = None,
) -> Op:
    """Make and register the op of one loss.

    Args:
        targets: torch callables with ``bind``'s signature.
        form: the formula that reports show; ``bind`` decides which one a call has.
        text: its derivative for a reader; None: what its rules show.
        look: as ``Op`` has it.
    """
    inputs = form.inputs
    arity = len(inputs)

    def rule(params: Params, needs: Needs, specs: tuple, grads: Tensors, saved: Tensors) -> Tensors:
        values = _named(params, saved)
        weight, (g, *_) = values.get("w", 1.0), grads
        assert g is not None
        if params.by_weight:
            g = g / _summed(weight, params)
        elif params.divisor is not None:
            # Of no elements each gets nothing, and no number is divided by 0 on the way.
            g = g / max(params.divisor, 1)
        g = _spread(g, params, specs)
        weighted = g * weight if isinstance(weight, Tensor) else g
        found: list[Tensor | None] = [None] * arity
        for i, n in enumerate(inputs):
            if needs[i] and n in params.form.rules:
                part = _evaluated(params.form.rules[n], values, g if n == "w" else weighted)
                if n == "w" and params.by_weight:
                    total = _summed(_evaluated(params.form.rules[n], values, weight), params)
                    part = part - g * _spread(total / _summed(weight, params), params, specs)
                found[i] = reduce_to(part, specs[i])
        return tuple(found)

    def tangent_of(params: Params, tensors: Tensors, outputs: Tensors, tangents: Tensors) -> Tensor:
        compute = COMPUTE_DTYPE[params.result]
        full = broadcast_shape([t for t in tensors if t is not None])
        each = params._replace(dims=None, divisor=None, by_weight=False, launch=None)
        total: Tensor | None = None
        part: Tensor | None
        for i, (n, tangent) in enumerate(zip(inputs, tangents, strict=True)):
            if tangent is None or n not in params.form.rules:
                continue
            spread = settle(tangent).to(params.result).expand(full)
            if n in params.form.pushes:
                values = _named(params, [t if t is None else t.to(compute) for t in tensors])
                part = _evaluated(params.form.pushes[n], values, spread)
            else:
                # The Jacobian of what is summed is diagonal: the rule is its own transpose.
                needs = tuple(j == i for j in range(arity))
                specs = tuple(Spec(full, compute) if need else None for need in needs)
                part = vjp(op, each, needs, specs, (spread,), (*tensors, None), own_level=1)[i]
            assert part is not None
            total = part if total is None else total + part
        assert total is not None
        total = _summed(total, params)
        if params.by_weight:
            weight, tangent, (out,) = tensors[-1], tangents[-1], outputs
            assert weight is not None
            if tangent is not None and out is not None:
                total = total - out * _summed(settle(tangent), params)
            total = total / _summed(weight, params)
        elif params.divisor is not None:
            total = total / params.divisor
        return total.to(params.result)

    def vmap(info: Any, params: Params, tensors: Tensors, dims: tuple) -> tuple[Any, Any]:
        rank = logical_rank(tensors, dims)
        batched = batch_all(tensors, dims, rank)
        if params.by_weight:
            # Their sum is over dimensions that each must have.
            batched = tuple(
                t if t is None or d is not None else batch_first(t.unsqueeze(0), 0, rank)
                for t, d in zip(batched, dims, strict=True)
            )
        found = apply(op, _shifted(params), batched, everything=True)
        return found, (0,) * len(found) if type(found) is tuple else 0

    op = Op(
        name=name,
        bind=bind,
        forward=evaluate,
        prepare=_prepared,
        replaces=targets,
        specs=operator.attrgetter("specs"),
        saves=lambda params, needs: _saves(params.form, params.by_weight, params.scalars, needs),
        rule=rule,
        backward=_backward_op(name, inputs, rule),
        jvp=tangent_of,
        vmap=vmap,
        autocast=autocast,
        look=look,
        opinfo=(f"nn.functional.{name}",),
        kernels=("reduce", "pointwise_dense", "pointwise_strided"),
        formula=text or "; ".join(f"d{n} = {formula(rule)}" for n, rule in form.rules.items()),
        dtypes=FLOATING,
        samples=samples,
        sources="torch derivatives.yaml",
        cost=_cost,
    )
    return register(op)


def evaluate(params: Params, *tensors: Tensor | None) -> Any:
    """Forward of every loss."""
    result = params.result
    operands = tuple([tensors[i] for i in params.form.order])
    launch = params.launch or _launch(params, operands)
    if isinstance(launch, Launch):
        return run_elementwise(launch, operands)
    present = tuple([t for t in operands if t is not None])
    if params.by_weight:
        compute = COMPUTE_DTYPE[result]
        return run_many(launch, present, (result, compute, compute))
    return run(launch, present, result)


def _launch(params: Params, operands: Tensors) -> Launch | Plan:
    form, numbers, result = params.form, params.numbers, params.result
    scalars = tuple([params.scalars[i] for i in form.order])
    if params.dims is None:
        return prepare(form.function, 0, operands, scalars, numbers, result, result)
    present = tuple([t for t in operands if t is not None])
    numbers = (*[s for s in scalars if s is not None], *numbers)
    return plan_for(present, params.reduction, params.dims, False, result, numbers, params.finish)


def _prepared(params: Params, *tensors: Tensor | None) -> Params:
    return params._replace(
        specs=tuple([None if t is None else Spec(t.shape, t.dtype) for t in tensors]),
        launch=_launch(params, tuple([tensors[i] for i in params.form.order])),
    )


def _backward_op(name: str, inputs: tuple[str, ...], rule: Any) -> Op:
    """The op that computes all gradients of a loss in one kernel, from ``(g, *inputs, out)`` and,
    of a mean by weights, what the device function calls ``scale`` and ``mean``."""
    arity = len(inputs)
    slots = ("g", *inputs, "scale", "mean")

    @cache
    def order(function: Any) -> tuple[int, ...]:
        return tuple([slots.index(n) for n in function.arg_names if n in slots])

    def forward(bp: BackwardParams, g: Tensor, *saved: Tensor | None) -> Any:
        params, needs, specs = bp
        form = params.form
        rows = [t if t is None else _spread(t, params, specs) for t in (g, *saved[arity + 1 :])]
        tensors = (rows[0], *saved[:arity], *rows[1:], None, None)
        scale = None if params.by_weight else 1.0 / max(params.divisor or 1, 1)
        numbers = (None, *params.scalars, scale, None)
        places = order(form.backward)
        call = Call(
            form.backward,
            0,
            tuple([tensors[i] for i in places]),
            tuple([numbers[i] for i in places]),
            params.numbers,
            # Not rounded to half precision: what the loss has in float32 would not fit.
            COMPUTE_DTYPE[params.result],
        )
        full = broadcast_sizes([s.shape for s in specs if s is not None])
        return gradients(call, form.columns, needs, specs, full)

    def reference(bp: BackwardParams, g: Tensor, *saved: Tensor | None) -> Tensors:
        found = rule(bp.params, bp.needs, bp.specs, (g,), saved)
        return tuple(t for t in found if t is not None)

    def vmap(info: Any, bp: BackwardParams, tensors: Tensors, dims: tuple) -> Any:
        rank = max(len(s.shape) for s in bp.specs if s is not None)
        batched = batch_all(tensors, dims, rank)
        if bp.params.dims is not None:
            # What is as the result is has no reduced dimensions.
            batched = tuple(
                b if 0 < i <= arity or t is None else _in_front(t, d)
                for i, (b, t, d) in enumerate(zip(batched, tensors, dims, strict=True))
            )
        bp = bp._replace(params=_shifted(bp.params))
        return gradients_by_sample(op, info.batch_size, bp, rank, batched)

    op = Op(
        name=f"{name}_backward",
        bind=None,
        forward=forward,
        outputs=arity,
        reference=reference,
        vmap=vmap,
        kernels=("pointwise_dense", "pointwise_strided"),
        dtypes=FLOATING,
        formula=f"autograd through the rule of {name}",
    )
    return op


@cache
def _saves(
    form: Form, by_weight: bool, scalars: tuple[Number | None, ...], needs: Needs
) -> tuple[int, ...]:
    """Places among ``(*inputs, out, scale, mean)`` of what the gradients that are needed depend
    on."""
    needed = [n for n, need in zip(form.inputs, needs, strict=True) if need]
    wanted = {name for n in needed for name in form.wants[n]}
    if by_weight or needed != ["w"]:
        wanted.add("w")
    present = [n if s is None else "" for n, s in zip(form.inputs, scalars, strict=True)]
    if by_weight:
        wanted |= {"scale", "mean"} if "w" in needed else {"scale"}
        present += ["out", "scale", "mean"]
    return tuple([i for i, n in enumerate(present) if n in wanted])


def _named(params: Params, tensors: Sequence[Tensor | None]) -> dict[str, Any]:
    """What a rule may take, by name."""
    form = params.form
    values: dict[str, Any] = dict(zip(form.numbers, params.numbers, strict=True))
    for n, number, tensor in zip(form.inputs, params.scalars, tensors, strict=False):
        values[n] = tensor if number is None else number
    return values


def _evaluated(rule: Callable[..., Tensor], values: Mapping[str, Any], g: Tensor) -> Tensor:
    """``rule`` of what it takes among ``values`` and of ``g``."""
    everything = {**values, "g": g}
    return rule(**{n: everything[n] for n in inspect.signature(rule).parameters})


def _summed(tensor: Tensor, params: Params) -> Tensor:
    """The sum over the reduced dimensions, of which a 0-dim tensor has none."""
    tensor = tensor.to(COMPUTE_DTYPE[params.result])
    return torch.sum(tensor, params.dims) if params.dims else tensor


def _spread(value: Tensor, params: Params, specs: tuple[Spec | None, ...]) -> Tensor:
    """What is as the result is, expanded to the shape of what is summed."""
    if params.dims is None:
        return value
    if value.dim():
        value = value.reshape(*value.shape, *[1] * len(params.dims))
    return value.expand(broadcast_sizes([s.shape for s in specs if s is not None]))


def _shifted(params: Params) -> Params:
    """``params`` for tensors with one more dimension, in front."""
    dims = params.dims and tuple([d + 1 for d in params.dims])
    return params._replace(dims=dims, specs=None, launch=None)


def _in_front(tensor: Tensor, dim: int | None) -> Tensor:
    return tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)


def _cost(params: Params, *tensors: Tensor | None) -> tuple[int, int]:
    present = [t for t in tensors if t is not None]
    n = broadcast_shape(present).numel()
    moved = sum(t.numel() * t.element_size() for t in present)
    return moved + (n if params.dims is None else 1) * params.result.itemsize, n
