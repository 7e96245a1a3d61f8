"""Reading torch's signatures of pointwise ops: operands, numbers in their place, promotion."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..admission import PLAIN_KEY_SETS, PLAIN_TYPES, admit
from ..dtypes import FLOATING, INTEGRAL, Number, is_number
from ..layout import broadcasts
from ..op import Bind, Tensors, Unsupported
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
UNIFORM = {dtype: Params((), (), dtype, ()) for dtype in FLOATING}
UNIFORM_SUM = {dtype: Params((), (1,), dtype, ()) for dtype in FLOATING}


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


def read_operands(
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
    result = promoted(*values)
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
            return (input,), UNIFORM[result]
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
                        return (input, other), UNIFORM[dtype]
            elif type(other) in (float, int) and is_number(other):
                admit(input)
                return (input, None), Params((None, other), (), dtype)
    tensors, scalars, result = read_operands(("input", "other"), (input, other), to_float)
    return tensors, Params(scalars, (), result)


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


def read_ternary(names: tuple[str, str, str], *values: Any) -> tuple[Tensors, Params]:
    tensors, scalars, result = read_operands(names, values, False)
    shape = None if tensors[0] is None else tensors[0].shape
    if all(t is not None and t.shape == shape and t.dtype is result for t in tensors):
        return tensors, UNIFORM[result]
    return tensors, Params(scalars, (), result)
