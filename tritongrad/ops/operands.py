"""Reading torch's signatures of pointwise ops: operands, numbers in their place, promotion."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..admission import PLAIN_KEY_SETS, PLAIN_TYPES, admit, admit_pair
from ..dtypes import FLOATING, INTEGRAL, Number, is_number
from ..layout import broadcast_shape, broadcast_sizes, broadcasts
from ..op import Bind, OtherOverload, Tensors, Unsupported
from ..runtime import DEVICE_TYPES

key_set = torch._C._dispatch_keys
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


class Params(NamedTuple):
    """What a pointwise call is beside its tensors.

    Attributes:
        scalars: for each input, the Python number that stands in its place, or None; empty when
            there is none.
        consts: the op's parameters, ``alpha`` for instance.
        result: dtype that torch's promotion gives.
        specs: () if all inputs are tensors of the result's shape and dtype, else None.
        form: which of the op's device functions, of those that ``row`` was given.
    """

    scalars: tuple[Number | None, ...]
    consts: tuple[Number, ...]
    result: torch.dtype
    specs: tuple[()] | None = None
    form: str = ""


# The parameters of most calls, made once.
_UNIFORM = {dtype: Params((), (), dtype, ()) for dtype in FLOATING}
_UNIFORM_SUM = {dtype: Params((), (1,), dtype, ()) for dtype in FLOATING}


def _promoted(*values: Any) -> torch.dtype:
    """dtype of the result of a floating operation on ``values``, by torch's promotion."""
    if len(values) == 1:
        result = values[0].dtype
    elif len(values) == 2:
        result = torch.result_type(*values)
    else:
        # Tensors with dimensions decide before those without, and those before numbers.
        first, *rest = sorted(values, key=_rank)
        result = first.dtype
        for value in rest:
            so_far = torch.empty((1,) if _rank(first) == 0 else (), dtype=result)
            result = torch.result_type(so_far, value)
    if result in FLOATING:
        return result
    if result.is_complex:
        raise Unsupported("complex dtype")
    if result not in INTEGRAL:
        raise Unsupported(f"dtype {str(result).removeprefix('torch.')}")
    return result


def _rank(value: Any) -> int:
    if not isinstance(value, Tensor):
        return 2
    return 0 if value.dim() else 1


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
        elif is_number(value):
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


def unary_bind(to_float: bool, bools: bool = True) -> Bind:
    """The signature of one tensor, which integers and, if ``bools``, bools are converted for."""

    def bind(input: Tensor) -> tuple[Tensors, Params]:
        admit(input)
        result = input.dtype
        if result in FLOATING:
            return (input,), _UNIFORM[result]
        _promoted(input)
        if result is torch.bool and not bools:
            raise Unsupported("bool tensor")
        if not to_float:
            raise Unsupported("integer result")
        return (input,), Params((), (), torch.get_default_dtype())

    return bind


_unary_float, _unary_same = unary_bind(True), unary_bind(False)


def unary(
    input: Tensor,
    *consts: Number,
    to_float: bool = False,
    inplace: bool = False,
    form: str = "",
) -> tuple[Tensors, Params]:
    """A call of one tensor and the op's numbers."""
    if inplace:
        raise Unsupported("in-place")
    for value in consts:
        if not is_number(value):
            raise Unsupported(f"a {type(value).__name__} in a number's place")
    tensors, params = (_unary_float if to_float else _unary_same)(input)
    return tensors, params._replace(consts=consts, form=form)


def _binary(input: Any, other: Any, to_float: bool = False) -> tuple[Tensors, Params]:
    if type(input) in PLAIN_TYPES:
        dtype = input.dtype
        if dtype in FLOATING:
            # Nothing to promote or broadcast, in the two cases that most calls are.
            if type(other) in PLAIN_TYPES:
                if dtype is other.dtype and input.shape == other.shape:
                    keys = key_set(input).raw_repr()
                    if (
                        keys in PLAIN_KEY_SETS
                        and keys == key_set(other).raw_repr()
                        and input.get_device() == other.get_device()
                    ):
                        return (input, other), _UNIFORM[dtype]
            elif type(other) in (float, int) and is_number(other):
                admit(input)
                return (input, None), Params((None, other), (), dtype)
    tensors, scalars, result = _operands(("input", "other"), (input, other), to_float)
    return tensors, Params(scalars, (), result)


def binary_bind(to_float: bool = False, numbers: str = "right") -> Bind:
    """``(input, other)``; ``numbers`` says which of them may be a number: "none", "right", "any".
    Beside a tensor that is, of numbers alone torch makes none of these functions."""

    def bind(input: Tensor | Number, other: Tensor | Number) -> tuple[Tensors, Params]:
        if numbers != "any" and not isinstance(input, Tensor):
            raise Unsupported(f"input is a {type(input).__name__}")
        if numbers == "none" and not isinstance(other, Tensor):
            raise Unsupported(f"other is a {type(other).__name__}")
        return _binary(input, other, to_float)

    return bind


bind_two = binary_bind()
bind_tensors = binary_bind(numbers="none")


def bind_pair(input: Tensor, other: Any = None) -> tuple[Tensors, Params]:
    """Of a torch callable that is a reduction too, with a dimension in the place of ``other``."""
    if not isinstance(other, Tensor):
        raise OtherOverload
    return bind_two(input, other)


def reflected(bind: Bind) -> Bind:
    """``bind`` for the method of the right operand: ``2 - x`` calls ``x.__rsub__(2)``."""

    def bind_reflected(self: Tensor, other: Tensor | Number) -> tuple[Tensors, Params]:
        return bind(other, self)

    return bind_reflected


def bind_scaled(
    input: Tensor | Number, other: Tensor | Number, *, alpha: Number = 1
) -> tuple[Tensors, Params]:
    tensors, params = _binary(input, other)
    if alpha == 1 and params.specs is not None and type(alpha) in (int, float):
        return tensors, _UNIFORM_SUM[params.result]
    if type(alpha) not in (int, float) or not is_number(alpha):
        raise Unsupported(f"alpha is a {type(alpha).__name__}")
    return tensors, params._replace(consts=(alpha,))


def bind_scaled_left(
    input: Tensor, other: Tensor | Number, *, alpha: Number = 1
) -> tuple[Tensors, Params]:
    if not isinstance(input, Tensor):
        raise Unsupported(f"input is a {type(input).__name__}")
    return bind_scaled(input, other, alpha=alpha)


def bind_radd(
    input: Tensor, other: Tensor | Number, *, alpha: Number = 1
) -> tuple[Tensors, Params]:
    return bind_scaled(other, input, alpha=alpha)


def _refuse_bool(*operands: Any) -> None:
    for value in operands:
        if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype is torch.bool):
            raise Unsupported("subtraction with a bool")


def bind_sub(input: Tensor, other: Tensor | Number, *, alpha: Number = 1) -> tuple[Tensors, Params]:
    tensors, params = bind_scaled_left(input, other, alpha=alpha)
    if params.specs is None:
        _refuse_bool(input, other)
    return tensors, params


def bind_rsub(
    input: Tensor, other: Tensor | Number, *, alpha: Number = 1
) -> tuple[Tensors, Params]:
    _refuse_bool(input, other)
    return bind_scaled(other, input, alpha=alpha)


def bind_div(
    input: Tensor, other: Tensor | Number, *, rounding_mode: str | None = None
) -> tuple[Tensors, Params]:
    if not isinstance(input, Tensor):
        raise Unsupported(f"input is a {type(input).__name__}")
    if rounding_mode is None:
        return _binary(input, other, True)
    if rounding_mode not in ("floor", "trunc"):
        raise Unsupported(f"rounding_mode is {rounding_mode!r}")
    tensors, params = _binary(input, other)
    return tensors, params._replace(form=f"_{rounding_mode}")


def bind_addr(
    input: Tensor, vec1: Tensor, vec2: Tensor, *, beta: Number = 1, alpha: Number = 1
) -> tuple[Tensors, Params]:
    if not all(isinstance(t, Tensor) for t in (input, vec1, vec2)):
        raise Unsupported("not three tensors")
    for name, value in (("beta", beta), ("alpha", alpha)):
        if type(value) not in (int, float) or not is_number(value):
            raise Unsupported(f"{name} is a {type(value).__name__}")
    if vec1.dim() != 1 or vec2.dim() != 1:
        raise Unsupported("not two vectors")
    shape = torch.Size((*vec1.shape, *vec2.shape))
    if not broadcasts(input.shape, shape) or broadcast_sizes([input.shape, shape]) != shape:
        raise Unsupported("input does not expand to the product")
    values = input, vec1.unsqueeze(1), vec2
    tensors, scalars, result = _operands(("input", "vec1", "vec2"), values, False)
    if any(t is None for t in tensors):
        raise Unsupported("tensors on different devices")
    return tensors, Params(scalars, (beta, alpha), result)


def bind_rmul(self: Tensor, other: Tensor | Number) -> tuple[Tensors, Params]:
    return _binary(other, self, False)


def bind_rdiv(self: Tensor, other: Tensor | Number) -> tuple[Tensors, Params]:
    if not isinstance(self, Tensor):
        raise Unsupported(f"self is a {type(self).__name__}")
    return _binary(other, self, True)


def bind_pow(input: Tensor | Number, exponent: Tensor | Number) -> tuple[Tensors, Params]:
    if isinstance(exponent, Tensor) and exponent.dtype is torch.bool:
        raise Unsupported("bool exponent, of which torch has no slope")
    return _binary(input, exponent, False)


def _ternary(names: tuple[str, str, str], *values: Any) -> tuple[Tensors, Params]:
    tensors, scalars, result = _operands(names, values, False)
    shape = None if tensors[0] is None else tensors[0].shape
    if all(t is not None and t.shape == shape and t.dtype is result for t in tensors):
        return tensors, _UNIFORM[result]
    return tensors, Params(scalars, (), result)


def bind_addc(
    input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: Number = 1
) -> tuple[Tensors, Params]:
    for operand in (input, tensor1, tensor2):
        if not isinstance(operand, Tensor):
            raise Unsupported(f"a {type(operand).__name__} in a tensor's place")
    if not is_number(value):
        raise Unsupported(f"value is a {type(value).__name__}")
    tensors, params = _ternary(("input", "tensor1", "tensor2"), input, tensor1, tensor2)
    return tensors, params._replace(consts=(value,))


def bind_lerp(input: Tensor, end: Tensor, weight: Tensor | Number) -> tuple[Tensors, Params]:
    given = [v for v in (input, end, weight) if isinstance(v, Tensor)]
    if len(given) + is_number(weight) < 3:
        raise Unsupported("operands are not tensors")
    if len({t.dtype for t in given}) > 1:
        raise Unsupported("different dtypes")
    return _ternary(("input", "end", "weight"), input, end, weight)


def bind_clamp(
    input: Tensor, min: Tensor | Number | None = None, max: Tensor | Number | None = None
) -> tuple[Tensors, Params]:
    if not isinstance(input, Tensor):
        raise Unsupported(f"input is a {type(input).__name__}")
    bounds = [b for b in (min, max) if b is not None]
    if not bounds:
        raise Unsupported("no bound")
    if len(bounds) == 2 and isinstance(min, Tensor) != isinstance(max, Tensor):
        raise Unsupported("a tensor and a number as bounds")
    # An absent bound is one that nothing passes; it has no part in the promotion.
    low = -math.inf if min is None else min
    high = math.inf if max is None else max
    tensors, params = _ternary(("input", "min", "max"), input, low, high)
    params = params._replace(form="" if len(bounds) == 2 else "_open")
    if input.dtype not in FLOATING and _promoted(input, *bounds) not in FLOATING:
        raise Unsupported("integer result")
    return tensors, params


def bind_masked_fill(input: Tensor, mask: Tensor, value: Tensor | Number) -> tuple[Tensors, Params]:
    if not isinstance(input, Tensor) or not isinstance(mask, Tensor):
        raise Unsupported("operands are not tensors")
    if mask.dtype is not torch.bool:
        raise Unsupported("mask is not a bool tensor")
    if input.dtype not in FLOATING:
        raise Unsupported("integer result")
    if isinstance(value, Tensor):
        if value.dim() or value.dtype is not input.dtype:
            raise Unsupported("value is not a 0-dim tensor of the input's dtype")
    elif is_number(value) and torch.finfo(input.dtype).max < abs(value) < math.inf:
        raise Unsupported("value beyond the input's dtype")
    tensors, params = _ternary(("input", "mask", "value"), input, mask, value)
    # torch's result is contiguous whatever the layout of its operands.
    full = input.expand(broadcast_shape((input, mask))).contiguous()
    return (full, *tensors[1:]), params


def bind_float_power(input: Tensor | Number, exponent: Tensor | Number) -> tuple[Tensors, Params]:
    tensors, params = _binary(input, exponent, True)
    specs = params.specs if params.result is torch.float64 else None
    return tensors, params._replace(result=torch.float64, specs=specs)


def bind_where(
    condition: Tensor, input: Tensor | Number, other: Tensor | Number
) -> tuple[Tensors, Params]:
    if not isinstance(condition, Tensor) or condition.dtype is not torch.bool:
        raise Unsupported("condition is not a bool tensor")
    # mypy does not narrow by `type(...) in`, and isinstance() would let subclasses pass.
    x: Any = input
    y: Any = other
    if type(x) in PLAIN_TYPES and type(y) in PLAIN_TYPES:
        # Nothing to promote or broadcast, as in most calls.
        dtype, shape = x.dtype, x.shape
        if (
            dtype is y.dtype
            and dtype in FLOATING
            and shape == y.shape
            and shape == condition.shape
            and x.get_device() == y.get_device() == condition.get_device()
        ):
            admit_pair(x, y)
            admit(condition)
            return (condition, x, y), _UNIFORM[dtype]
    admit(condition)
    names = ("condition", "input", "other")
    values = (condition, input, other)
    branches = [v for v in (input, other) if isinstance(v, Tensor)]
    if not branches:
        raise Unsupported("no tensor among the branches")
    for name, value in zip(names[1:], values[1:], strict=True):
        if isinstance(value, Tensor):
            admit_or_scalar(value)
        elif not is_number(value):
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


def bind_where_method(
    self: Tensor, condition: Tensor, other: Tensor | Number
) -> tuple[Tensors, Params]:
    return bind_where(condition, self, other)


def bind_round(input: Tensor, *, decimals: int = 0) -> tuple[Tensors, Params]:
    if type(decimals) is not int or abs(decimals) > 308:
        raise Unsupported(f"decimals is {decimals!r}")
    if decimals == 0:
        return _unary_same(input)
    power = 10.0 ** abs(decimals)
    return unary(input, *((power, 1.0) if decimals > 0 else (1.0, power)), form="_decimals")


def bind_nan_to_num(
    input: Tensor,
    nan: float | None = None,
    posinf: float | None = None,
    neginf: float | None = None,
) -> tuple[Tensors, Params]:
    _, params = _unary_same(input)
    info = torch.finfo(params.result)
    given = zip((nan, posinf, neginf), (0.0, info.max, info.min), strict=True)
    return unary(input, *[default if value is None else value for value, default in given])


def bind_gelu(input: Tensor, *, approximate: str = "none") -> tuple[Tensors, Params]:
    if approximate not in ("none", "tanh"):
        raise Unsupported(f"approximate is {approximate!r}")
    return unary(input, form="_tanh" if approximate == "tanh" else "")


def bind_hardtanh(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> tuple[Tensors, Params]:
    found = unary(input, min_val, max_val, inplace=inplace)
    if min_val > max_val:
        raise Unsupported("min_val is above max_val")
    return found


def bind_softshrink(input: Tensor, lambd: float = 0.5) -> tuple[Tensors, Params]:
    found = unary(input, lambd)
    if lambd < 0:
        raise Unsupported("lambd is negative")
    return found


def bind_celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> tuple[Tensors, Params]:
    found = unary(input, alpha, inplace=inplace)
    if alpha == 0:
        raise Unsupported("alpha is zero")
    return found[0], found[1]._replace(consts=(alpha, 1.0, 1.0 / alpha))


def bind_prelu(input: Tensor, weight: Tensor) -> tuple[Tensors, Params]:
    if not isinstance(input, Tensor) or not isinstance(weight, Tensor):
        raise Unsupported("operands are not tensors")
    if input.dtype is not weight.dtype:
        raise Unsupported("different dtypes")
    if weight.dim() > 1:
        raise Unsupported("weight has several dimensions")
    admit(weight)
    if weight.numel() == 1:
        weight = weight.reshape(())
    elif input.dim() > 1 and weight.numel() == input.shape[1]:
        # A weight for each channel, which is the second dimension.
        weight = weight.reshape(-1, *[1] * (input.dim() - 2))
    else:
        raise Unsupported("as many weights as channels, or one")
    return _binary(input, weight)


def bind_relu_function(input: Tensor, inplace: bool = False) -> tuple[Tensors, Params]:
    if inplace:
        raise Unsupported("in-place")
    return _unary_same(input)
