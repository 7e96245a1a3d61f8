"""From a row of the pointwise table to an op: launching, saving, every derivative, vmap."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..admission import settle
from ..dispatch import apply
from ..dtypes import COMPUTE_DTYPE, FLOATING, Number
from ..function import vjp
from ..launchers.pointwise import elementwise, prepare, run
from ..layout import broadcast_shape
from ..op import Bind, Needs, Op, Spec, Tensors, register
from ..sampling import Make, Sample
from ..symbolic import Symbol, formula
from .operands import Params
from .row_gradients import KERNELS, Row, backward_op, batch_all, halved, logical_rank, reduce_to

_G: Any = Symbol("g")
"""A gradient, to see whether a rule hands it on as it is."""


def spelled(*names: str) -> tuple[Callable[..., Any], ...]:
    """The torch callables of these names: functions, those of torch.special and torch.nn.functional
    too, and methods. For rows whose spellings all have one signature."""
    rooms = (torch, torch.special, torch.nn.functional, Tensor)
    found = [getattr(room, name) for name in names for room in rooms if hasattr(room, name)]
    return tuple(dict.fromkeys(found))


def row(
    functions: ModuleType,
    name: str,
    *targets: Callable[..., Any],
    bind: Bind | None,
    rules: Mapping[str, Callable[..., Tensor]],
    inputs: tuple[str, ...] = ("x",),
    consts: tuple[str, ...] = (),
    jvp: Callable[..., Tensor] | None = None,
    for_number: Callable[[Number], tuple[Any, Any]] | None = None,
    device: str | None = None,
    forms: tuple[str, ...] = ("",),
    variants: Mapping[Callable[..., Any], Bind] | None = None,
    shares: tuple[Callable[..., Any], ...] = (),
    boolean: bool = False,
    low: float = -2.0,
    high: float = 2.0,
    samples: Callable[[Make], Iterator[Sample]] | None = None,
    opinfo: tuple[str, ...] | None = None,
    autocast: Mapping[str, str] | None = None,
    schema: str | None = None,
    sources: str = "torch derivatives.yaml",
    differs: str = "",
) -> Op:
    """Make and register the op of one row.

    Args:
        functions: the kernel file with its device functions, ``name``, ``name_bwd`` and, where the
            gradient has a gradient of its own in one kernel, ``name_bwd_bwd``; without the second,
            or the third, the rules are evaluated instead.
        device: the device functions' name where it is not the op's.
        forms: the op's device functions are ``name + form`` and ``name + form + "_bwd"``, where
            ``bind`` says which; the rules may ask for ``form`` too. A form without a ``_bwd``,
            where another has one, is constant.
        targets: torch callables with ``bind``'s signature.
        bind: None for an op that only rules of others call; it is not registered.
        rules: input -> its gradient, a function of ``g`` and any of the inputs, ``out``, consts,
            ``form``.
        inputs: names of the inputs; ``c`` is a condition, which has no gradient.
        jvp: the tangent of the result, for an op where torch does not just add what the rules make
            of each input's: a function of ``dx``, ``dy`` (None for an input without one), and of
            any of the inputs, ``out``, consts.
        for_number: number in the last input's place -> the device functions to run with it instead,
            forward and backward.
        variants: torch callables with signatures of their own.
        shares: those of which other ops take other overloads.
        boolean: a comparison: bool result, no derivative.
        low, high: range of sample values where the op is smooth.
        schema: as ``Op`` has it; without one a compiler sees torch's own.
    """
    device = device or name
    forward_functions = {form: getattr(functions, device + form) for form in forms}
    backward_functions, second_functions = (
        {
            form: getattr(functions, f"{device}{form}{suffix}")
            for form in forms
            if hasattr(functions, f"{device}{form}{suffix}")
        }
        for suffix in ("_bwd", "_bwd_bwd")
    )
    raw = sum(1 << i for i, n in enumerate(inputs) if n == "c")
    arity = len(inputs)
    slots = {"out": arity} | {n: i for i, n in enumerate(inputs)}
    wants = {n: tuple(inspect.signature(rule).parameters) for n, rule in rules.items()}

    def chosen(params: Params) -> tuple[Any, torch.dtype]:
        """The device function of a call, and the dtype of its result."""
        function, scalars = forward_functions[params.form], params.scalars
        if for_number is not None and scalars and scalars[-1] is not None:
            function, _ = for_number(scalars[-1])
        return function, torch.bool if boolean else params.result

    def forward(params: Params, *tensors: Any) -> Tensor:
        if params.halves is not None:
            tensors = halved(tensors, 0, params)
        if params.launch is not None:
            return run(params.launch, tensors)
        function, dtype = chosen(params)
        (out,) = elementwise(
            function, raw, tensors, params.scalars, params.consts, params.result, (dtype,)
        )
        assert out is not None
        return out

    def prepared(params: Params, *tensors: Any) -> Params:
        function, dtype = chosen(params)
        operands, specs = halved(tensors, 0, params), params.specs
        if specs is None:
            specs = tuple([None if t is None else Spec(t.shape, t.dtype) for t in tensors])
        launch = prepare(
            function, raw, operands, params.scalars, params.consts, params.result, dtype
        )
        return params._replace(specs=specs, launch=launch)

    kept: dict[tuple[Needs, tuple[bool, ...]], tuple[int, ...]] = {}

    def saves(params: Params, needs: Needs) -> tuple[int, ...]:
        if params.halves is not None:
            return (0,)
        numbers = tuple([v is not None for v in params.scalars]) if params.scalars else ()
        try:
            return kept[needs, numbers]
        except KeyError:
            wanted = {n for i, n in enumerate(inputs) if needs[i] for n in wants[n]}
            wanted -= {n for n, number in zip(inputs, numbers, strict=False) if number}
            kept[needs, numbers] = tuple(sorted(slots[n] for n in wanted if n in slots))
            return kept[needs, numbers]

    def named(params: Params, saved: Tensors) -> dict[str, Any]:
        saved = halved(saved, 0, params)
        values: dict[str, Any] = {"out": saved[arity], "form": params.form}
        for i, n in enumerate(inputs):
            number = params.scalars[i] if params.scalars else None
            tensor = saved[i]
            if tensor is not None and n != "c" and tensor.dtype is not params.result:
                tensor = tensor.to(params.result)
            values[n] = tensor if number is None else number
        # Not strict: a form may have fewer of them.
        return values | dict(zip(consts, params.consts, strict=False))

    def rule(params: Params, needs: Needs, specs: tuple, grads: Tensors, saved: Tensors) -> Tensors:
        values = named(params, saved) | {"g": grads[0]}
        if params.halves is not None:
            parts = [rules[n](**{w: values[w] for w in wants[n]}) for n in inputs]
            return torch.cat(parts, params.halves), None
        return tuple(
            reduce_to(rules[n](**{w: values[w] for w in wants[n]}), specs[i]) if need else None
            for i, (n, need) in enumerate(zip(inputs, needs, strict=True))
        )

    @cache
    def unchanged(form: str, values: tuple[Number, ...]) -> tuple[bool, ...]:
        given: dict[str, Any] = {"g": _G, "form": form, **dict(zip(consts, values, strict=False))}
        # Checkpoints differentiate where torch functions do not look at their arguments' types.
        with torch._C._EnableTorchFunction():
            return tuple(
                [
                    n in rules and given.keys() >= set(wants[n])
                    and rules[n](**{w: given[w] for w in wants[n]}) is _G
                    for n in inputs
                ]
            )  # fmt: skip

    def sum_of_parts(
        params: Params, tensors: Tensors, out: Tensor, tangents: Tensors, dtype: torch.dtype
    ) -> Tensor:
        # The Jacobian is diagonal, so each input's rule is its own transpose.
        total: Tensor | None = None
        for i, tangent in enumerate(tangents):
            if tangent is None:
                continue
            needs = tuple(j == i for j in range(arity))
            specs = tuple(Spec(out.shape, dtype) if need else None for need in needs)
            kept, everything = saves(params, needs), (*tensors, out)
            saved = tuple(t if j in kept else None for j, t in enumerate(everything))
            part = vjp(op, params, needs, specs, (tangent,), saved, own_level=1)[i]
            assert part is not None
            total = part if total is None else total + part
        assert total is not None
        return total

    def tangent_of(params: Params, tensors: Tensors, outputs: Tensors, tangents: Tensors) -> Tensor:
        (out,) = outputs
        assert out is not None
        tensors, tangents = halved(tensors, 0, params), halved(tangents, 0, params)
        params = params._replace(halves=None)
        # Parts that cancel must not have been rounded to half precision before.
        several = sum(t is not None for t in tangents) > 1
        dtype = COMPUTE_DTYPE[out.dtype] if several else out.dtype
        spread = [t if t is None else settle(t).to(out.dtype).expand(out.shape) for t in tangents]
        if jvp is None:
            total = sum_of_parts(params, tensors, out, tuple(spread), dtype)
        else:
            values = named(params, (*tensors, out))
            for n, t in zip(inputs, spread, strict=True):
                values[f"d{n}"] = t if t is None else t.to(dtype)
            total = jvp(**{n: values[n] for n in inspect.signature(jvp).parameters})
        return total if total.dtype is out.dtype else total.to(out.dtype)

    def vmap(info: Any, params: Params, tensors: Tensors, dims: tuple) -> tuple[Tensor, int]:
        # A batched pointwise op is the op with one more dimension.
        rank = logical_rank(tensors, dims)
        # An input that all samples share is smaller than the others now.
        params = params._replace(specs=() if arity == 1 else None, launch=None)
        return apply(op, params, batch_all(tensors, dims, rank)), 0

    op = Op(
        name=name,
        bind=bind,
        forward=forward,
        prepare=prepared,
        replaces=targets,
        variants=variants or {},
        shares=shares,
        saves=saves,
        specs=operator.attrgetter("specs"),
        rule=rule if rules else None,
        backward=backward_op(
            Row(
                name,
                backward_functions,
                second_functions,
                inputs,
                for_number,
                rule,
                tuple(rules),
                unchanged,
            )
        )
        if backward_functions
        else None,
        jvp=tangent_of if rules else None,
        vmap=vmap,
        autocast=autocast or {},
        schema=schema,
        opinfo=opinfo if opinfo is not None else (name,),
        kernels=KERNELS,
        formula="; ".join(f"d{n} = {formula(rules[n])}" for n in inputs if n in rules),
        dtypes=FLOATING,
        differentiable=bool(rules),
        samples=samples or standard_samples(arity, low, high),
        sources=sources,
        differs=differs,
        cost=partial(_cost, torch.bool if boolean else None),
    )
    return op if bind is None else register(op)


def _cost(out: torch.dtype | None, params: Params, *tensors: Tensor | None) -> tuple[int, int]:
    """Of a result of this dtype, or of the one it is computed for."""
    present = [t for t in tensors if t is not None]
    n = broadcast_shape(present).numel() // (1 if params.halves is None else 2)
    moved = sum(t.numel() * t.element_size() for t in present)
    return moved + n * (out or params.result).itemsize, n


def standard_samples(arity: int, low: float, high: float) -> Callable[[Make], Iterator[Sample]]:
    """Calls that cross block boundaries, broadcast, and take strided operands."""

    def samples(make: Make) -> Iterator[Sample]:
        def some(*shape: int) -> Tensor:
            return make(*shape, low=low, high=high)

        if arity == 3:
            yield Sample((some(3, 5), some(3, 5), some(3, 5)), {}, "small")
            yield Sample((some(1031), some(1031), some(1031)), {}, "past one block")
            yield Sample((some(2, 1, 3), some(4, 1), some(3)), {}, "broadcast")
            yield Sample((some(2, 0), some(2, 1), some()), {}, "empty")
            return
        if arity == 1:
            yield Sample((some(3, 5),), {}, "small")
            yield Sample((some(),), {}, "0-dim")
            yield Sample((some(1031),), {}, "past one block")
            yield Sample((some(7, 6).t(),), {}, "transposed")
            yield Sample((some(4, 9)[:, ::2],), {}, "every other column")
            yield Sample((some(2, 0, 3),), {}, "empty")
            return
        yield Sample((some(3, 5), some(3, 5)), {}, "small")
        yield Sample((some(), some()), {}, "0-dim")
        yield Sample((some(1031), some(1031)), {}, "past one block")
        yield Sample((some(4, 1, 3), some(5, 1)), {}, "broadcast")
        yield Sample((some(6, 7).t(), some(7, 6)), {}, "transposed")
        yield Sample((some(3, 4), some()), {}, "0-dim operand")
        yield Sample((some(2, 0), some(2, 1)), {}, "empty")

    return samples


def number_samples(low: float, high: float) -> Callable[[Make], Iterator[Sample]]:
    """Binary calls, one of them with a number for its second operand."""

    def samples(make: Make) -> Iterator[Sample]:
        yield from standard_samples(2, low, high)(make)
        yield Sample((make(3, 5, low=low, high=high), 1.5), {}, "number")

    return samples
