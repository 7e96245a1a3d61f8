"""torch's signatures of single pointwise ops, each read by what operands.py has for all."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..admission import admit
from ..dtypes import FLOATING, Number, is_number
from ..layout import broadcast_shape, broadcast_sizes, broadcasts
from ..op import OtherOverload, Tensors, Unsupported
from .operands import (
    Params,
    admit_or_scalar,
    bind_two,
    params_of,
    promoted,
    read_binary,
    read_operands,
    unary,
    unary_same,
)


def bind_pair(input: Tensor, other: Any = None) -> tuple[Tensors, Params]:
    """Of a torch callable that is a reduction too, with a dimension in the place of ``other``."""
    if not isinstance(other, Tensor):
        raise OtherOverload
    return bind_two(input, other)


def bind_scaled(
    input: Tensor | Number, other: Tensor | Number, *, alpha: Number = 1
) -> tuple[Tensors, Params]:
    tensors, params = read_binary(input, other)
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
        return read_binary(input, other, True)
    if rounding_mode not in ("floor", "trunc"):
        raise Unsupported(f"rounding_mode is {rounding_mode!r}")
    tensors, params = read_binary(input, other)
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
    tensors, params = read_operands(("input", "vec1", "vec2"), values)
    if any(t is None for t in tensors):
        raise Unsupported("tensors on different devices")
    return tensors, params._replace(consts=(beta, alpha))


def bind_rmul(self: Tensor, other: Tensor | Number) -> tuple[Tensors, Params]:
    return read_binary(other, self, False)


def bind_rdiv(self: Tensor, other: Tensor | Number) -> tuple[Tensors, Params]:
    if not isinstance(self, Tensor):
        raise Unsupported(f"self is a {type(self).__name__}")
    return read_binary(other, self, True)


def bind_pow(input: Tensor | Number, exponent: Tensor | Number) -> tuple[Tensors, Params]:
    if isinstance(exponent, Tensor) and exponent.dtype is torch.bool:
        raise Unsupported("bool exponent, of which torch has no slope")
    return read_binary(input, exponent, False)


def bind_addc(
    input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: Number = 1
) -> tuple[Tensors, Params]:
    for operand in (input, tensor1, tensor2):
        if not isinstance(operand, Tensor):
            raise Unsupported(f"a {type(operand).__name__} in a tensor's place")
    if not is_number(value):
        raise Unsupported(f"value is a {type(value).__name__}")
    tensors, params = read_operands(("input", "tensor1", "tensor2"), (input, tensor1, tensor2))
    return tensors, params._replace(consts=(value,))


def bind_lerp(input: Tensor, end: Tensor, weight: Tensor | Number) -> tuple[Tensors, Params]:
    given = [v for v in (input, end, weight) if isinstance(v, Tensor)]
    if len(given) + is_number(weight) < 3:
        raise Unsupported("operands are not tensors")
    if len({t.dtype for t in given}) > 1:
        raise Unsupported("different dtypes")
    return read_operands(("input", "end", "weight"), (input, end, weight))


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
    tensors, params = read_operands(("input", "min", "max"), (input, low, high))
    params = params._replace(form="" if len(bounds) == 2 else "_open")
    if input.dtype not in FLOATING and promoted(input, *bounds) not in FLOATING:
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
    tensors, params = read_operands(("input", "mask", "value"), (input, mask, value))
    # torch's result is contiguous whatever the layout of its operands.
    shape = broadcast_shape((input, mask))
    if input.shape != shape or not input.is_contiguous():
        tensors = (input.expand(shape).contiguous(), *tensors[1:])
    return tensors, params


def bind_float_power(input: Tensor | Number, exponent: Tensor | Number) -> tuple[Tensors, Params]:
    tensors, params = read_binary(input, exponent, True)
    specs = params.specs if params.result is torch.float64 else None
    return tensors, params._replace(result=torch.float64, specs=specs)


def bind_where(
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
        elif not is_number(value):
            raise Unsupported(f"{name} is a {type(value).__name__}")
    if any(t.device != condition.device for t in branches):
        raise Unsupported("tensors on different devices")
    if not broadcasts(condition.shape, *[t.shape for t in branches]):
        raise Unsupported("shapes do not broadcast")
    result = promoted(input, other)
    if result not in FLOATING:
        raise Unsupported("integer result")
    tensors = (condition, *[v if isinstance(v, Tensor) else None for v in (input, other)])
    scalars = (None, *[None if isinstance(v, Tensor) else v for v in (input, other)])
    return tensors, params_of(tensors, scalars, result, conditions=1)


def bind_where_method(
    self: Tensor, condition: Tensor, other: Tensor | Number
) -> tuple[Tensors, Params]:
    return bind_where(condition, self, other)


def bind_round(input: Tensor, *, decimals: int = 0) -> tuple[Tensors, Params]:
    if type(decimals) is not int or abs(decimals) > 308:
        raise Unsupported(f"decimals is {decimals!r}")
    if decimals == 0:
        return unary_same(input)
    power = 10.0 ** abs(decimals)
    return unary(input, *((power, 1.0) if decimals > 0 else (1.0, power)), form="_decimals")


def bind_nan_to_num(
    input: Tensor,
    nan: float | None = None,
    posinf: float | None = None,
    neginf: float | None = None,
) -> tuple[Tensors, Params]:
    _, params = unary_same(input)
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
    if not min_val <= max_val:
        raise Unsupported("min_val is above max_val, or one of them is NaN")
    return found


def bind_softshrink(input: Tensor, lambd: float = 0.5) -> tuple[Tensors, Params]:
    found = unary(input, lambd)
    if not 0 <= lambd <= torch.finfo(found[1].result).max:
        raise Unsupported("lambd is negative, or no finite number of the dtype")
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
    return read_binary(input, weight)


def bind_relu_function(input: Tensor, inplace: bool = False) -> tuple[Tensors, Params]:
    if inplace:
        raise Unsupported("in-place")
    return unary_same(input)
