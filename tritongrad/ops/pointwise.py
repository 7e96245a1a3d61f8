"""Pointwise operations: one row of TABLE each.

A row names the device function (``kernels.pointwise.NAME`` and ``NAME_bwd``) and, for each input
that has one, the derivative as a line of torch mathematics. In both, ``x, y`` are the inputs
(``c`` a condition), ``out`` the result, ``g`` its gradient, further names the op's parameters; the
names decide what is saved for backward. The rules are torch's (derivatives.yaml), so that values
at kinks and ties are too; broadcasting and promotion are undone here, once for all.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import COMPUTE_DTYPE, FLOATING, INTEGRAL, TRITON_DTYPE, Number, encode
from ..function import PLAIN_KEY_SETS, PLAIN_TYPES, admit, apply, key_set, settle, vjp
from ..kernels import pointwise as k
from ..launchers.pointwise import NARROW, elementwise
from ..launchers.reduction import sum_to
from ..layout import broadcast_shape, broadcasts
from ..op import BackwardParams, Bind, Needs, Op, Spec, Tensors, Unsupported, register
from ..runtime import DEVICE_TYPES, launch_prepared
from ..sampling import Make, Sample
from ..symbolic import formula

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


class Params(NamedTuple):
    """What a pointwise call is beside its tensors.

    Attributes:
        scalars: for each input, the Python number that stands in its place, or None; empty when
            there is none.
        consts: the op's parameters, ``alpha`` for instance.
        result: dtype that torch's promotion gives.
        uniform: all inputs are tensors of the result's shape and dtype.
    """

    scalars: tuple[Number | None, ...]
    consts: tuple[Number, ...]
    result: torch.dtype
    uniform: bool = False


# ---------------------------------------------------------------------- reading torch's signatures


# The parameters of most calls, made once.
_UNIFORM = {dtype: Params((), (), dtype, True) for dtype in FLOATING}
_UNIFORM_SUM = {dtype: Params((), (1,), dtype, True) for dtype in FLOATING}


def _promoted(*values: Any) -> torch.dtype:
    """dtype of the result of a floating operation on ``values``, by torch's promotion."""
    if len(values) == 1:
        result = values[0].dtype
    else:
        result = torch.result_type(*values)
    if result in FLOATING:
        return result
    if result.is_complex:
        raise Unsupported("complex dtype")
    if result not in INTEGRAL:
        raise Unsupported(f"dtype {str(result).removeprefix('torch.')}")
    return result


def _operands(
    names: tuple[str, ...], values: tuple[Any, ...], to_float: bool
) -> tuple[Tensors, tuple[Number | None, ...], torch.dtype]:
    """Check and sort the operands of a call: tensors, Python numbers, dtype of the result."""
    operands: list[Tensor | None] = []
    scalars: list[Number | None] = []
    device: torch.device | None = None
    for name, value in zip(names, values, strict=True):
        if isinstance(value, Tensor):
            admit_or_scalar(value)
            operands.append(value)
            scalars.append(None)
            if value.dim() > 0 or device is None:
                device = value.device
        elif isinstance(value, (bool, int, float)):
            operands.append(None)
            scalars.append(value)
        else:
            raise Unsupported(f"{name} is a {type(value).__name__}")
    if device is not None and device.type not in DEVICE_TYPES:
        raise Unsupported(f"{device.type} tensor")
    for i, t in enumerate(operands):
        if t is None or t.device == device:
            continue
        if t.dim() == 0 and t.device.type == "cpu" and not t.requires_grad:
            operands[i], scalars[i] = None, t.item()
        else:
            raise Unsupported("tensors on different devices")
    present = [t for t in operands if t is not None]
    if not present:
        raise Unsupported("no tensor among the operands")
    if not broadcasts(*[t.shape for t in present]):
        raise Unsupported("shapes do not broadcast")
    result = _promoted(*values)
    if result not in FLOATING:
        if not to_float:
            raise Unsupported("integer result")
        result = torch.get_default_dtype()
    return tuple(operands), tuple(scalars), result


def admit_or_scalar(value: Tensor) -> None:
    """``admit``, but for the 0-dim CPU tensors that torch takes beside tensors of a GPU."""
    foreign = value.device.type == "cpu" and "cpu" not in DEVICE_TYPES
    if not (foreign and value.dim() == 0 and type(value) is Tensor and not _is_wrapped(value)):
        admit(value)
    elif value.is_complex():
        raise Unsupported("complex dtype")


def unary_bind(to_float: bool) -> Bind:
    def bind(input: Tensor) -> tuple[Tensors, Params]:
        admit(input)
        result = input.dtype
        if result in FLOATING:
            return (input,), _UNIFORM[result]
        _promoted(input)
        if not to_float:
            raise Unsupported("integer result")
        return (input,), Params((), (), torch.get_default_dtype())

    return bind


def _binary(input: Any, other: Any, to_float: bool = False) -> tuple[Tensors, Params]:
    if type(input) in PLAIN_TYPES:
        dtype = input.dtype
        if dtype in FLOATING:
            # Nothing to promote or broadcast, in the two cases that most calls are.
            if type(other) in PLAIN_TYPES:
                if dtype is other.dtype and input.shape == other.shape:
                    keys = key_set(input)
                    if keys == key_set(other) and keys in PLAIN_KEY_SETS:
                        if input.device == other.device:
                            return (input, other), _UNIFORM[dtype]
            elif type(other) in (float, int):
                admit(input)
                return (input, None), Params((None, other), (), dtype)
    tensors, scalars, result = _operands(("input", "other"), (input, other), to_float)
    return tensors, Params(scalars, (), result)


def _bind_two(input: Tensor, other: Tensor | Number) -> tuple[Tensors, Params]:
    if not isinstance(input, Tensor):
        raise Unsupported(f"input is a {type(input).__name__}")
    return _binary(input, other)


def reflected(bind: Bind) -> Bind:
    """``bind`` for the method of the right operand: ``2 - x`` calls ``x.__rsub__(2)``."""

    def bind_reflected(self: Tensor, other: Tensor | Number) -> tuple[Tensors, Params]:
        return bind(other, self)

    return bind_reflected


def _bind_scaled(
    input: Tensor, other: Tensor | Number, *, alpha: Number = 1
) -> tuple[Tensors, Params]:
    tensors, params = _binary(input, other)
    if alpha == 1 and params.uniform and type(alpha) in (int, float):
        return tensors, _UNIFORM_SUM[params.result]
    if type(alpha) not in (int, float):
        raise Unsupported(f"alpha is a {type(alpha).__name__}")
    return tensors, params._replace(consts=(alpha,))


def _bind_scaled_left(
    input: Tensor, other: Tensor | Number, *, alpha: Number = 1
) -> tuple[Tensors, Params]:
    if not isinstance(input, Tensor):
        raise Unsupported(f"input is a {type(input).__name__}")
    return _bind_scaled(input, other, alpha=alpha)


def _bind_rsub(
    input: Tensor, other: Tensor | Number, *, alpha: Number = 1
) -> tuple[Tensors, Params]:
    return _bind_scaled(other, input, alpha=alpha)


def _bind_div(
    input: Tensor, other: Tensor | Number, *, rounding_mode: str | None = None
) -> tuple[Tensors, Params]:
    if rounding_mode is not None:
        raise Unsupported("rounding_mode")
    if not isinstance(input, Tensor):
        raise Unsupported(f"input is a {type(input).__name__}")
    return _binary(input, other, True)


def _bind_mul_reflected(self: Tensor, other: Tensor | Number) -> tuple[Tensors, Params]:
    return _binary(other, self, False)


def _bind_rdiv(self: Tensor, other: Tensor | Number) -> tuple[Tensors, Params]:
    return _binary(other, self, True)


def _bind_pow(input: Tensor | Number, exponent: Tensor | Number) -> tuple[Tensors, Params]:
    return _binary(input, exponent, False)


def _bind_where(
    condition: Tensor, input: Tensor | Number, other: Tensor | Number
) -> tuple[Tensors, Params]:
    if not isinstance(condition, Tensor) or condition.dtype is not torch.bool:
        raise Unsupported("condition is not a bool tensor")
    admit(condition)
    names = ("condition", "input", "other")
    values = (condition, input, other)
    branches = [v for v in (input, other) if isinstance(v, Tensor)]
    if not branches:
        raise Unsupported("no tensor among the branches")
    for name, value in zip(names[1:], values[1:], strict=True):
        if isinstance(value, Tensor):
            admit_or_scalar(value)
        elif not isinstance(value, (bool, int, float)):
            raise Unsupported(f"{name} is a {type(value).__name__}")
    if any(t.device != condition.device for t in branches):
        raise Unsupported("tensors on different devices")
    if not broadcasts(condition.shape, *[t.shape for t in branches]):
        raise Unsupported("shapes do not broadcast")
    result = _promoted(input, other)
    if result not in FLOATING:
        raise Unsupported("integer result")
    tensors = (condition, *[v if isinstance(v, Tensor) else None for v in (input, other)])
    scalars = (None, *[None if isinstance(v, Tensor) else v for v in (input, other)])
    return tensors, Params(scalars, (), result)


def _bind_where_method(
    self: Tensor, condition: Tensor, other: Tensor | Number
) -> tuple[Tensors, Params]:
    return _bind_where(condition, self, other)


def _bind_relu_function(input: Tensor, inplace: bool = False) -> tuple[Tensors, Params]:
    if inplace:
        raise Unsupported("in-place")
    return unary_bind(False)(input)


# -------------------------------------------------------------------------------- rows become ops


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


def _names(function: Any) -> tuple[str, ...]:
    return tuple(function.arg_names)


def pointwise(
    name: str,
    *targets: Callable[..., Any],
    bind: Bind,
    rules: Mapping[str, Callable[..., Tensor]],
    inputs: tuple[str, ...] = ("x",),
    consts: tuple[str, ...] = (),
    variants: Mapping[Callable[..., Any], Bind] | None = None,
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
        targets: torch callables with ``bind``'s signature.
        rules: input -> its gradient, a function of ``g`` and any of the inputs, ``out``, consts.
        inputs: names of the inputs; ``c`` is a condition, which has no gradient.
        variants: torch callables with signatures of their own.
        boolean: a comparison: bool result, no derivative.
        low, high: range of sample values where the op is smooth.
    """
    forward_function = getattr(k, name)
    backward_function = getattr(k, f"{name}_bwd", None)
    raw = sum(1 << i for i, n in enumerate(inputs) if n == "c")
    arity = len(inputs)
    slots = {"out": arity} | {n: i for i, n in enumerate(inputs)}
    wants = {n: tuple(inspect.signature(rule).parameters) for n, rule in rules.items()}

    # What the dense kernel is compiled for when all operands are alike, by dtype.
    metas = {
        dtype: {
            "F": forward_function,
            "RAW": raw,
            "RESULT": TRITON_DTYPE[dtype],
            "COMPUTE": TRITON_DTYPE[COMPUTE_DTYPE[dtype]],
            "WIDE": False,
            "BLOCK": k.DENSE_BLOCK,
        }
        for dtype in FLOATING
    }

    def forward(params: Params, *tensors: Any) -> Tensor:
        if params.uniform:
            # The common case, without elementwise()'s search for one: about 2 us less.
            first = tensors[0]
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
                        compute = COMPUTE_DTYPE[params.result]
                        numbers = tuple([encode(v, compute) for v in numbers])
                    launch_prepared(
                        k.pointwise_dense,
                        (-(-n // k.DENSE_BLOCK),),
                        ((result,), tensors, (), numbers, n),
                        first.device,
                        metas[params.result],
                    )
                    return result
        function, scalars = forward_function, params.scalars
        if name == "pow" and scalars and scalars[1] == 2:
            function = k.square
        dtype = torch.bool if boolean else params.result
        (out,) = elementwise(
            function, raw, tensors, scalars, params.consts, params.result, (dtype,)
        )
        assert out is not None
        return out

    kept: dict[Needs, tuple[int, ...]] = {}

    def saves(params: Params, needs: Needs) -> tuple[int, ...]:
        if needs not in kept:
            wanted = {n for i, n in enumerate(inputs) if needs[i] for n in wants[n]}
            kept[needs] = tuple(sorted(slots[n] for n in wanted if n in slots))
        return kept[needs]

    def rule(params: Params, needs: Needs, specs: tuple, grads: Tensors, saved: Tensors) -> Tensors:
        values: dict[str, Any] = {"g": grads[0], "out": saved[arity]}
        for i, n in enumerate(inputs):
            number = params.scalars[i] if params.scalars else None
            values[n] = saved[i] if number is None else number
        values |= dict(zip(consts, params.consts, strict=True))
        return tuple(
            reduce_to(rules[n](**{w: values[w] for w in wants[n]}), specs[i]) if need else None
            for i, (n, need) in enumerate(zip(inputs, needs, strict=True))
        )

    def jvp(params: Params, tensors: Tensors, outputs: Tensors, tangents: Tensors) -> Tensor:
        # The Jacobian is diagonal, so each input's rule is its own transpose.
        (out,) = outputs
        assert out is not None
        total: Tensor | None = None
        # Parts that cancel must not have been rounded to half precision before.
        several = sum(t is not None for t in tangents) > 1
        like = Spec(out.shape, COMPUTE_DTYPE[out.dtype] if several else out.dtype)
        for i, tangent in enumerate(tangents):
            if tangent is None:
                continue
            tangent = settle(tangent).to(out.dtype).expand(out.shape)
            needs = tuple(j == i for j in range(arity))
            specs = tuple(like if need else None for need in needs)
            part = vjp(op, params, needs, specs, (tangent,), (*tensors, out), own_level=1)[i]
            assert part is not None
            total = part if total is None else total + part
        assert total is not None
        return total if total.dtype is out.dtype else total.to(out.dtype)

    def vmap(info: Any, params: Params, tensors: Tensors, dims: tuple) -> tuple[Tensor, int]:
        # A batched pointwise op is the op with one more dimension.
        rank = _logical_rank(tensors, dims)
        # An input that all samples share is smaller than the others now.
        params = params._replace(uniform=arity == 1)
        return apply(op, params, _batch_all(tensors, dims, rank)), 0

    op = Op(
        name=name,
        bind=bind,
        forward=forward,
        replaces=targets,
        variants=variants or {},
        saves=saves,
        uniform=operator.attrgetter("uniform"),
        rule=rule if rules else None,
        backward=_backward_op(name, backward_function, inputs, consts, rule, wants)
        if backward_function is not None
        else None,
        jvp=jvp if rules else None,
        vmap=vmap,
        autocast=autocast or {},
        opinfo=opinfo if opinfo is not None else (name,),
        kernels=("pointwise_dense", "pointwise_strided"),
        formula="; ".join(f"d{n} = {formula(rules[n])}" for n in inputs if n in rules),
        dtypes=FLOATING,
        differentiable=bool(rules),
        samples=samples or _standard_samples(arity, low, high),
        sources=sources,
        cost=_cost,
    )
    return register(op)


def _backward_op(
    name: str,
    function: Any,
    inputs: tuple[str, ...],
    consts: tuple[str, ...],
    rule: Any,
    wants: Mapping[str, tuple[str, ...]],
) -> Op:
    """The op that computes all of a row's gradients in one kernel, from ``(g, *inputs, out)``."""
    names = _names(function)
    slots = {"g": 0, "out": len(inputs) + 1} | {n: i + 1 for i, n in enumerate(inputs)}
    order = tuple(slots[n] for n in names if n in slots)
    raw = sum(1 << i for i, n in enumerate(names) if n == "c")
    # Where each input's gradient stands in what the device function returns.
    column = {n: i for i, n in enumerate(wants)}

    def forward(bp: BackwardParams, *tensors: Tensor | None) -> Any:
        params, needs, specs = bp
        operands = tuple([tensors[i] for i in order])
        full = broadcast_shape([t for t in tensors if t is not None])
        compute = COMPUTE_DTYPE[params.result]
        dtypes: list[torch.dtype | None] = [None] * len(column)
        for n, need, spec in zip(inputs, needs, specs, strict=True):
            if need:
                dtypes[column[n]] = spec.dtype if spec.shape == full else compute
        numbers = (None, *(params.scalars or (None,) * len(inputs)), None)
        scalars = tuple([numbers[i] for i in order])
        device_function = function
        if name == "pow" and params.scalars and params.scalars[1] == 2:
            device_function, operands, scalars = k.square_bwd, operands[:2], scalars[:2]
        outs = elementwise(
            device_function, raw, operands, scalars, params.consts, params.result, tuple(dtypes)
        )
        gradients = []
        for n, need, spec in zip(inputs, needs, specs, strict=True):
            if need:
                gradient = outs[column[n]]
                assert gradient is not None
                if gradient.shape != spec.shape:
                    gradient = sum_to(gradient, spec.shape, spec.dtype)
                gradients.append(gradient)
        return gradients[0] if len(gradients) == 1 else tuple(gradients)

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


def _batch_first(tensor: Tensor, dim: int | None, rank: int) -> Tensor:
    """Batch dimension in front, then the logical dimensions right-aligned in ``rank``."""
    if dim is None:
        return tensor
    moved = tensor.movedim(dim, 0)
    padding = rank - (moved.dim() - 1)
    return moved.reshape(moved.shape[0], *[1] * padding, *moved.shape[1:])


def _logical_rank(tensors: Tensors, dims: tuple) -> int:
    return max(
        t.dim() - (d is not None) for t, d in zip(tensors, dims, strict=True) if t is not None
    )


def _batch_all(tensors: Tensors, dims: tuple, rank: int) -> Tensors:
    return tuple(
        None if t is None else _batch_first(t, d, rank) for t, d in zip(tensors, dims, strict=True)
    )


def _vmap_backward(
    op: Op, info: Any, bp: BackwardParams, tensors: Tensors, dims: tuple
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Each sample has gradients of its own, also for an input that all samples share."""
    rank = _logical_rank(tensors, dims)
    size = info.batch_size
    specs = tuple(
        spec and Spec(torch.Size((size, *[1] * (rank - len(spec.shape)), *spec.shape)), spec.dtype)
        for spec in bp.specs
    )
    found = apply(op, bp._replace(specs=specs), _batch_all(tensors, dims, rank))
    found = found if type(found) is tuple else (found,)
    shapes = [spec.shape for spec, need in zip(bp.specs, bp.needs, strict=True) if need]
    results = tuple(
        gradient.reshape(size, *shape) for gradient, shape in zip(found, shapes, strict=True)
    )
    return results, (0,) * len(results)


def _cost(params: Params, *tensors: Tensor | None) -> tuple[int, int]:
    present = [t for t in tensors if t is not None]
    n = broadcast_shape(present).numel()
    moved = sum(t.numel() * t.element_size() for t in present) + n * params.result.itemsize
    return moved, n


def _standard_samples(arity: int, low: float, high: float) -> Callable[[Make], Iterator[Sample]]:
    """Calls that cross block boundaries, broadcast, and take strided operands."""

    def samples(make: Make) -> Iterator[Sample]:
        def some(*shape: int) -> Tensor:
            return make(*shape, low=low, high=high)

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


# ------------------------------------------------------------------------------------------- TABLE

T = Tensor
F = torch.nn.functional


def scaled(g: Any, alpha: Any) -> Any:
    """``alpha * g``, without a kernel for the usual factor 1."""
    return g if isinstance(alpha, (int, float)) and alpha == 1 else g * alpha


def _where_samples(make: Make) -> Iterator[Sample]:
    def c(*shape: int) -> Tensor:
        return make(*shape, dtype=torch.bool, requires_grad=False)

    yield Sample((c(3, 5), make(3, 5), make(3, 5)), {}, "small")
    yield Sample((c(1031), make(1031), make(1031)), {}, "past one block")
    yield Sample((c(4, 1), make(5), make(2, 1, 1)), {}, "broadcast")
    yield Sample((c(3, 4), make(3, 4), 0.5), {}, "number")
    yield Sample((c(0, 4), make(0, 4), make(4)), {}, "empty")


def _add_samples(make: Make) -> Iterator[Sample]:
    yield from _standard_samples(2, -2.0, 2.0)(make)
    yield Sample((make(3, 5), make(5)), {"alpha": 2.5}, "alpha")
    yield Sample((make(3, 5), 2), {}, "number")


def _number_samples(low: float, high: float) -> Callable[[Make], Iterator[Sample]]:
    def samples(make: Make) -> Iterator[Sample]:
        yield from _standard_samples(2, low, high)(make)
        yield Sample((make(3, 5, low=low, high=high), 1.5), {}, "number")

    return samples


def _pow_samples(make: Make) -> Iterator[Sample]:
    yield from _number_samples(0.2, 2.0)(make)
    yield Sample((make(3, 5), 2), {}, "square")
    yield Sample((make(3, 5), 3), {}, "cube")
    yield Sample((1.5, make(3, 5)), {}, "number to a tensor's power")


def power_slope(g: Tensor, x: Any, y: Any) -> Tensor:
    """d/dx of x ** y, which is 0 for y = 0 whatever x is."""
    if isinstance(y, (int, float)):
        return torch.zeros_like(g) if y == 0 else g * (y * x ** (y - 1))
    return torch.where(y == 0, 0.0, g * (y * x ** (y - 1)))


def exponent_slope(g: Tensor, x: Any, y: Tensor, out: Tensor) -> Tensor:
    """d/dy of x ** y, which is 0 for x = 0 and y >= 0, where log(x) is not."""
    if isinstance(x, (int, float)):
        # log through torch, not math: a negative base has slope NaN, not an error.
        slope = g * (out * torch.log(torch.full((), x, dtype=out.dtype, device=out.device)))
        return torch.where(y >= 0, 0.0, slope) if x == 0 else slope
    slope = g * (out * torch.log(x))
    return torch.where(x == 0, torch.where(y >= 0, 0.0, slope), slope)


_two = {"bind": _bind_two, "inputs": ("x", "y")}

pointwise(
    "add", torch.add, T.add, T.__add__,
    bind=_bind_scaled_left,
    variants={T.__radd__: _bind_rsub},
    inputs=("x", "y"),
    consts=("alpha",),
    rules={"x": lambda g: g, "y": lambda g, alpha: scaled(g, alpha)},
    samples=_add_samples,
    opinfo=("add", "__radd__"),
)  # fmt: skip
pointwise(
    "sub", torch.sub, torch.subtract, T.sub, T.subtract, T.__sub__,
    bind=_bind_scaled_left,
    variants={T.__rsub__: _bind_rsub, torch.rsub: _bind_rsub},
    inputs=("x", "y"),
    consts=("alpha",),
    rules={"x": lambda g: g, "y": lambda g, alpha: g * -alpha},
    samples=_add_samples,
    opinfo=("sub", "rsub", "__rsub__"),
)  # fmt: skip
pointwise(
    "mul", torch.mul, torch.multiply, T.mul, T.multiply, T.__mul__,
    **_two,
    variants={T.__rmul__: _bind_mul_reflected},
    rules={"x": lambda g, y: g * y, "y": lambda g, x: g * x},
    samples=_number_samples(-2.0, 2.0),
    opinfo=("mul", "__rmul__"),
)  # fmt: skip
pointwise(
    "div", torch.div, torch.divide, torch.true_divide, T.div, T.divide, T.true_divide,
    T.__div__, T.__truediv__,
    bind=_bind_div,
    variants={T.__rdiv__: _bind_rdiv, T.__rtruediv__: _bind_rdiv},
    inputs=("x", "y"),
    rules={"x": lambda g, y: g / y, "y": lambda g, x, y: -g * ((x / y) / y)},
    samples=_number_samples(0.5, 2.0),
    opinfo=("div.no_rounding_mode", "true_divide", "__rdiv__"),
)  # fmt: skip
pointwise(
    "pow", torch.pow, T.pow, T.__pow__,
    bind=_bind_pow,
    variants={T.__rpow__: reflected(_bind_pow)},
    inputs=("x", "y"),
    rules={
        "x": lambda g, x, y: power_slope(g, x, y),
        "y": lambda g, x, y, out: exponent_slope(g, x, y, out),
    },
    samples=_pow_samples,
    opinfo=("pow", "__rpow__"),
    autocast={"cuda": "float32"},
)  # fmt: skip
pointwise(
    "neg", torch.neg, torch.negative, T.neg, T.negative, T.__neg__,
    bind=unary_bind(False), rules={"x": lambda g: -g},
)  # fmt: skip
pointwise(
    "exp", torch.exp, T.exp,
    bind=unary_bind(True), rules={"x": lambda g, out: g * out}, autocast={"cuda": "float32"},
)  # fmt: skip
pointwise(
    "log", torch.log, T.log,
    bind=unary_bind(True), rules={"x": lambda g, x: g / x}, low=0.3, autocast={"cuda": "float32"},
)  # fmt: skip
pointwise(
    "sqrt", torch.sqrt, T.sqrt,
    bind=unary_bind(True), rules={"x": lambda g, out: g / (2 * out)}, low=0.3,
)  # fmt: skip
pointwise(
    "abs", torch.abs, torch.absolute, T.abs, T.absolute, T.__abs__,
    bind=unary_bind(False), rules={"x": lambda g, x: g * torch.sign(x)},
)  # fmt: skip
pointwise(
    "sign", torch.sign, torch.sgn, T.sign, T.sgn,
    bind=unary_bind(False), rules={"x": lambda g: torch.zeros_like(g)}, opinfo=("sign", "sgn"),
)  # fmt: skip
pointwise(
    "sin", torch.sin, T.sin,
    bind=unary_bind(True), rules={"x": lambda g, x: g * torch.cos(x)},
)  # fmt: skip
pointwise(
    "cos", torch.cos, T.cos,
    bind=unary_bind(True), rules={"x": lambda g, x: -g * torch.sin(x)},
)  # fmt: skip
pointwise(
    "tanh", torch.tanh, T.tanh, F.tanh,
    bind=unary_bind(True), rules={"x": lambda g, out: g * (1 - out * out)},
)  # fmt: skip
pointwise(
    "sigmoid", torch.sigmoid, torch.special.expit, T.sigmoid, F.sigmoid,
    bind=unary_bind(True), rules={"x": lambda g, out: g * (1 - out) * out},
)  # fmt: skip
pointwise(
    "relu", torch.relu, T.relu,
    bind=unary_bind(False),
    variants={F.relu: _bind_relu_function},
    # `out` is the 0 of the kernel where it is chosen; named so that, as torch's, the second derivative
    # is zeros and not nothing.
    rules={"x": lambda g, out: torch.where(out <= 0, out, g)},
    opinfo=("nn.functional.relu",),
)  # fmt: skip
pointwise(
    "maximum", torch.maximum, T.maximum,
    **_two,
    rules={
        "x": lambda g, x, y: torch.where(x == y, g / 2, torch.where(x < y, 0.0, g)),
        "y": lambda g, x, y: torch.where(x == y, g / 2, torch.where(x > y, 0.0, g)),
    },
)  # fmt: skip
pointwise(
    "minimum", torch.minimum, T.minimum,
    **_two,
    rules={
        "x": lambda g, x, y: torch.where(x == y, g / 2, torch.where(x > y, 0.0, g)),
        "y": lambda g, x, y: torch.where(x == y, g / 2, torch.where(x < y, 0.0, g)),
    },
)  # fmt: skip
pointwise(
    "where", torch.where,
    bind=_bind_where,
    variants={T.where: _bind_where_method},
    inputs=("c", "x", "y"),
    rules={"x": lambda g, c: torch.where(c, g, 0.0), "y": lambda g, c: torch.where(c, 0.0, g)},
    samples=_where_samples,
)  # fmt: skip

# Comparisons: no derivative, but the rules above and the control flow of user code need them.
for _name, _symbol in (
    ("eq", "__eq__"), ("ne", "__ne__"), ("lt", "__lt__"),
    ("le", "__le__"), ("gt", "__gt__"), ("ge", "__ge__"),
):  # fmt: skip
    pointwise(
        _name, getattr(torch, _name), getattr(T, _name), getattr(T, _symbol),
        **_two, rules={}, boolean=True, samples=_number_samples(-2.0, 2.0),
    )  # fmt: skip
