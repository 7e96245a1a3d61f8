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
from ..dtypes import COMPUTE_DTYPE, FLOATING, TRITON_DTYPE, Number, encode_all
from ..function import vjp
from ..kernels import pointwise as k
from ..launchers.pointwise import NARROW, elementwise
from ..launchers.reduction import sum_to
from ..layout import batch_first, broadcast_shape
from ..op import BackwardParams, Bind, Needs, Op, Spec, Tensors, register
from ..runtime import launch_prepared
from ..sampling import Make, Sample
from ..symbolic import formula
from .operands import Params

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def reduce_to(value: Tensor, spec: Spec) -> Tensor:
    """A gradient summed over what its input was broadcast along, in its input's dtype."""
    if value.shape != spec.shape:
        missing = value.dim() - len(spec.shape)
        dims = list(range(missing))
        dims += [
            d for d, size in enumerate(spec.shape, missing) if size == 1 and value.shape[d] != 1
        ]
        if dims:
            value = torch.sum(value, dims, keepdim=True)
        value = value.expand(*value.shape[:missing], *spec.shape).reshape(spec.shape)
    return value if value.dtype is spec.dtype else value.to(spec.dtype)


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
    sources: str = "torch derivatives.yaml",
) -> Op:
    """Make and register the op of one row.

    Args:
        functions: the kernel file with its device functions, ``name`` and ``name_bwd``; without the
            latter the rules are evaluated instead.
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
    """
    device = device or name
    forward_functions = {form: getattr(functions, device + form) for form in forms}
    backward_functions = {
        form: getattr(functions, f"{device}{form}_bwd")
        for form in forms
        if hasattr(functions, f"{device}{form}_bwd")
    }
    raw = sum(1 << i for i, n in enumerate(inputs) if n == "c")
    arity = len(inputs)
    slots = {"out": arity} | {n: i for i, n in enumerate(inputs)}
    wants = {n: tuple(inspect.signature(rule).parameters) for n, rule in rules.items()}

    # What the dense kernel is compiled for when all operands are alike, by form and dtype.
    metas = {
        (form, dtype): {
            "F": function,
            "RAW": raw,
            "RESULT": TRITON_DTYPE[dtype],
            "COMPUTE": TRITON_DTYPE[COMPUTE_DTYPE[dtype]],
            "WIDE": False,
            "BLOCK": k.DENSE_BLOCK,
        }
        for form, function in forward_functions.items()
        for dtype in FLOATING
    }

    def forward(params: Params, *tensors: Any) -> Tensor:
        if params.specs is not None:
            # The common case, without elementwise()'s search for one: about 2 us less.
            first = tensors[-1]  # not a condition
            for t in tensors:
                if not t.is_contiguous():
                    break
            else:
                n = first.numel()
                if 0 < n <= NARROW:
                    result = (
                        torch.empty_like(first, dtype=torch.bool)
                        if boolean
                        else torch.empty_like(first)
                    )
                    numbers = params.consts
                    if numbers:
                        numbers = encode_all(numbers, COMPUTE_DTYPE[params.result])
                    launch_prepared(
                        k.pointwise_dense,
                        (-(-n // k.DENSE_BLOCK),),
                        ((result,), tensors, (), numbers, n),
                        result,
                        metas[params.form, params.result],
                    )
                    return result
        function, scalars = forward_functions[params.form], params.scalars
        if for_number is not None and scalars and scalars[-1] is not None:
            function, _ = for_number(scalars[-1])
        dtype = torch.bool if boolean else params.result
        (out,) = elementwise(
            function, raw, tensors, scalars, params.consts, params.result, (dtype,)
        )
        assert out is not None
        return out

    kept: dict[tuple[Needs, tuple[bool, ...]], tuple[int, ...]] = {}

    def saves(params: Params, needs: Needs) -> tuple[int, ...]:
        numbers = tuple([v is not None for v in params.scalars]) if params.scalars else ()
        try:
            return kept[needs, numbers]
        except KeyError:
            wanted = {n for i, n in enumerate(inputs) if needs[i] for n in wants[n]}
            wanted -= {n for n, number in zip(inputs, numbers, strict=False) if number}
            kept[needs, numbers] = tuple(sorted(slots[n] for n in wanted if n in slots))
            return kept[needs, numbers]

    def named(params: Params, saved: Tensors) -> dict[str, Any]:
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
        return tuple(
            reduce_to(rules[n](**{w: values[w] for w in wants[n]}), specs[i]) if need else None
            for i, (n, need) in enumerate(zip(inputs, needs, strict=True))
        )

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
            part = vjp(op, params, needs, specs, (tangent,), (*tensors, out), own_level=1)[i]
            assert part is not None
            total = part if total is None else total + part
        assert total is not None
        return total

    def tangent_of(params: Params, tensors: Tensors, outputs: Tensors, tangents: Tensors) -> Tensor:
        (out,) = outputs
        assert out is not None
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
        params = params._replace(specs=() if arity == 1 else None)
        return apply(op, params, batch_all(tensors, dims, rank)), 0

    op = Op(
        name=name,
        bind=bind,
        forward=forward,
        replaces=targets,
        variants=variants or {},
        shares=shares,
        saves=saves,
        specs=operator.attrgetter("specs"),
        rule=rule if rules else None,
        backward=_backward_op(name, backward_functions, inputs, for_number, rule, wants)
        if backward_functions
        else None,
        jvp=tangent_of if rules else None,
        vmap=vmap,
        autocast=autocast or {},
        opinfo=opinfo if opinfo is not None else (name,),
        kernels=("pointwise_dense", "pointwise_strided"),
        formula="; ".join(f"d{n} = {formula(rules[n])}" for n in inputs if n in rules),
        dtypes=FLOATING,
        differentiable=bool(rules),
        samples=samples or standard_samples(arity, low, high),
        sources=sources,
        cost=_cost,
    )
    return op if bind is None else register(op)


def _backward_op(
    name: str,
    functions: Mapping[str, Any],
    inputs: tuple[str, ...],
    for_number: Callable[[Number], tuple[Any, Any]] | None,
    rule: Any,
    wants: Mapping[str, tuple[str, ...]],
) -> Op:
    """The op that computes all of a row's gradients in one kernel, from ``(g, *inputs, out)``."""
    slots = {"g": 0, "out": len(inputs) + 1} | {n: i + 1 for i, n in enumerate(inputs)}

    @cache
    def arguments(function: Any) -> tuple[tuple[int, ...], int]:
        """Which tensors a device function takes, and which of those are conditions."""
        names = function.arg_names
        raw = sum(1 << i for i, n in enumerate(names) if n == "c")
        return tuple(slots[n] for n in names if n in slots), raw

    # Where each input's gradient stands in what the device function returns.
    columns = tuple([list(wants).index(n) if n in wants else -1 for n in inputs])

    def forward(bp: BackwardParams, g: Tensor, *saved: Tensor | None) -> Any:
        params, needs, specs = bp
        tensors = (g, *saved)
        device_function = functions.get(params.form)
        if device_function is None:
            found = [s for s, need in zip(specs, needs, strict=True) if need and s is not None]
            constant = tuple([g.new_zeros(s.shape, dtype=s.dtype) for s in found])
            return constant[0] if len(constant) == 1 else constant
        if for_number is not None and params.scalars and params.scalars[-1] is not None:
            _, device_function = for_number(params.scalars[-1])
        order, raw = arguments(device_function)
        operands = tuple([tensors[i] for i in order])
        full = broadcast_shape([t for t in tensors if t is not None])
        numbers = (None, *(params.scalars or (None,) * len(inputs)), None)
        scalars = tuple([numbers[i] for i in order])
        launch = partial(
            elementwise, device_function, raw, operands, scalars, params.consts, params.result
        )
        return gradients(launch, columns, needs, specs, full, params.result)

    def reference(bp: BackwardParams, g: Tensor, *saved: Tensor | None) -> Tensors:
        found = rule(bp.params, bp.needs, bp.specs, (g,), saved)
        return tuple(t for t in found if t is not None)

    def vmap(info: Any, bp: BackwardParams, tensors: Tensors, dims: tuple) -> Any:
        return _vmap_backward(op, info, bp, tensors, dims)

    op = Op(
        name=f"{name}_backward",
        bind=None,
        forward=forward,
        outputs=len(inputs),
        reference=reference,
        vmap=vmap,
        kernels=("pointwise_dense", "pointwise_strided"),
        dtypes=FLOATING,
        formula=f"autograd through the rule of {name}",
    )
    return op


def gradients(
    launch: Callable[[tuple[torch.dtype | None, ...]], list[Tensor | None]],
    columns: tuple[int, ...],
    needs: Needs,
    specs: tuple[Spec | None, ...],
    full: torch.Size,
    result: torch.dtype,
) -> Any:
    """Gradients of the inputs that need one, from one launch over the shape ``full``.

    Args:
        launch: of the dtypes of its outputs, None for what is not wanted, those outputs.
        columns: place of each input's gradient among them.
        result: dtype of the op's result.
    """
    dtypes: list[torch.dtype | None] = [None] * (max(columns) + 1)
    wanted = []
    for i, need, spec in zip(columns, needs, specs, strict=True):
        if need and spec is not None:
            # What is summed afterwards is not rounded before.
            dtypes[i] = spec.dtype if spec.shape == full else COMPUTE_DTYPE[result]
            wanted.append((i, spec))
    outs = launch(tuple(dtypes))
    found = []
    for i, spec in wanted:
        gradient = outs[i]
        assert gradient is not None
        if gradient.shape != spec.shape:
            gradient = sum_to(gradient, spec.shape, spec.dtype)
        found.append(gradient)
    return found[0] if len(found) == 1 else tuple(found)


def logical_rank(tensors: Tensors, dims: tuple) -> int:
    return max(
        t.dim() - (d is not None) for t, d in zip(tensors, dims, strict=True) if t is not None
    )


def batch_all(tensors: Tensors, dims: tuple, rank: int) -> Tensors:
    return tuple(
        None if t is None else batch_first(t, d, rank) for t, d in zip(tensors, dims, strict=True)
    )


def _vmap_backward(
    op: Op, info: Any, bp: BackwardParams, tensors: Tensors, dims: tuple
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Each sample has gradients of its own, also for an input that all samples share."""
    rank = logical_rank(tensors, dims)
    return gradients_by_sample(op, info.batch_size, bp, rank, batch_all(tensors, dims, rank))


def gradients_by_sample(
    op: Op, size: int, bp: BackwardParams, rank: int, tensors: Tensors
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """``_vmap_backward`` of tensors that have the batch dimension in front, before ``rank`` logical
    ones."""
    specs = tuple(
        spec and Spec(torch.Size((size, *[1] * (rank - len(spec.shape)), *spec.shape)), spec.dtype)
        for spec in bp.specs
    )
    found = apply(op, bp._replace(specs=specs), tensors)
    found = found if type(found) is tuple else (found,)
    shapes = [spec.shape for spec, need in zip(bp.specs, bp.needs, strict=True) if need and spec]
    results = tuple(
        gradient.reshape(size, *shape) for gradient, shape in zip(found, shapes, strict=True)
    )
    return results, (0,) * len(results)


def _cost(params: Params, *tensors: Tensor | None) -> tuple[int, int]:
    present = [t for t in tensors if t is not None]
    n = broadcast_shape(present).numel()
    moved = sum(t.numel() * t.element_size() for t in present) + n * params.result.itemsize
    return moved, n


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
