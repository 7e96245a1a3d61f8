"""Reading torch's signatures of pointwise ops: operands, numbers in their place, promotion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import runtime
from ..admission import admit
from ..dtypes import FLOATING, INTEGRAL, Number, is_number
from ..launchers.pointwise import Launch
from ..layout import broadcasts
from ..op import Bind, Spec, Tensors, Unsupported

key_set = torch._C._dispatch_keys
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


class Params(NamedTuple):
    """What a pointwise call is beside its tensors.

    Attributes:
        scalars: for each input, the Python number that stands in its place, or None; empty when
            there is none.
        consts: the op's parameters, ``alpha`` for instance.
        result: dtype that torch's promotion gives.
        specs: () if all inputs are tensors of the result's shape and dtype; of others, and
        launch: of a call that is remembered.
        form: which of the op's device functions, of those that ``row`` was given.
        halves: the dimension, from the end, along which the first tensor is split into two inputs,
            in a call where there is no second one.
    """

    scalars: tuple[Number | None, ...]
    consts: tuple[Number, ...]
    result: torch.dtype
    specs: tuple[Spec | None, ...] | None = None
    form: str = ""
    halves: int | None = None
    launch: Launch | None = None


def promoted(*values: Any) -> torch.dtype:
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


def uniform(result: torch.dtype) -> Params:
    """Of tensors that all have the shape and dtype of the result."""
    return Params((), (), result, ())


def read_operands(
    names: tuple[str, ...], values: tuple[Any, ...], to_float: bool = False
) -> tuple[Tensors, Params]:
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
    if device is not None and device.type not in runtime.DEVICE_TYPES:
        raise Unsupported(f"{device.type} tensor")
    for i, t in enumerate(operands):
        if t is None or t.device == device:
            continue
        number = t.dim() == 0 and t.device.type == "cpu"
        if number and not t.requires_grad and forward_ad._current_level < 0:
            operands[i], scalars[i] = None, t.item()
        else:
            raise Unsupported("tensors on different devices")
    present = [t for t in operands if t is not None]
    if not present:
        raise Unsupported("no tensor among the operands")
    if not broadcasts(*[t.shape for t in present]):
        raise Unsupported("shapes do not broadcast")
    result = promoted(*values)
    if result not in FLOATING:
        if not to_float:
            raise Unsupported("integer result")
        result = torch.get_default_dtype()
    return tuple(operands), params_of(operands, scalars, result)


def params_of(
    operands: Sequence[Tensor | None],
    scalars: Sequence[Number | None],
    result: torch.dtype,
    conditions: int = 0,
) -> Params:
    """Params of operands that have been checked, of which the first are so many conditions."""
    shapes = {None if t is None else t.shape for t in operands}
    if len(shapes) == 1 and all(t is not None and t.dtype is result for t in operands[conditions:]):
        return uniform(result)
    return Params(tuple(scalars), (), result)


def admit_or_scalar(value: Tensor) -> None:
    """``admit``, but for the 0-dim CPU tensors that torch takes beside tensors of a GPU."""
    foreign = value.device.type == "cpu" and "cpu" not in runtime.DEVICE_TYPES
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
            return (input,), uniform(result)
        promoted(input)
        if result is torch.bool and not bools:
            raise Unsupported("bool tensor")
        if not to_float:
            raise Unsupported("integer result")
        return (input,), Params((), (), torch.get_default_dtype())

    return bind


_unary_float, unary_same = unary_bind(True), unary_bind(False)


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
    tensors, params = (_unary_float if to_float else unary_same)(input)
    return tensors, params._replace(consts=consts, form=form)


def read_binary(input: Any, other: Any, to_float: bool = False) -> tuple[Tensors, Params]:
    """A call of two operands."""
    return read_operands(("input", "other"), (input, other), to_float)


def binary_bind(to_float: bool = False, numbers: str = "right") -> Bind:
    """``(input, other)``; ``numbers`` says which of them may be a number: "none", "right", "any".
    Beside a tensor that is, of numbers alone torch makes none of these functions."""

    def bind(input: Tensor | Number, other: Tensor | Number) -> tuple[Tensors, Params]:
        if numbers != "any" and not isinstance(input, Tensor):
            raise Unsupported(f"input is a {type(input).__name__}")
        if numbers == "none" and not isinstance(other, Tensor):
            raise Unsupported(f"other is a {type(other).__name__}")
        return read_binary(input, other, to_float)

    return bind


bind_two = binary_bind()
bind_tensors = binary_bind(numbers="none")


def reflected(bind: Bind) -> Bind:
    """``bind`` for the method of the right operand: ``2 - x`` calls ``x.__rsub__(2)``."""

    def bind_reflected(self: Tensor, other: Tensor | Number) -> tuple[Tensors, Params]:
        return bind(other, self)

    return bind_reflected
