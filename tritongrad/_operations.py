"""Operations on blocks in Triton's interpreter, without what it does to come to the same result.

To add two blocks of one type and shape it asks forty questions about types, and broadcasts both to
the shape that they have. So the answers about pairs of types are kept, and what is a block of the
right type and shape already is left alone. What is computed, by which function of NumPy and on
which layout of memory, is as before: results are the same to the bit. Of Triton 3.7: another
version may ask other questions, and is left as it is.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def quicken() -> None:
    """Replace the operations; what is not plain is left to the ones that were there."""
    _types()
    _promotion()
    _broadcasting()
    _tuples()
    _arrays()


def operators() -> dict[str, Any]:
    """Methods of blocks, which take those of equal types and leave the rest to Triton's own."""
    found = {"__getitem__": _indexed(tl.tensor.__getitem__)}
    for name, function in ARITHMETIC.items():
        found[f"__{name}__"] = _arithmetic(function, getattr(tl.tensor, f"__{name}__"))
        found[f"__r{name}__"] = _reflected(function, getattr(tl.tensor, f"__r{name}__"))
    for name, operation in BITWISE.items():
        found[f"__{name}__"] = _bitwise(operation, getattr(tl.tensor, f"__{name}__"))
    for name, function in COMPARISONS.items():
        found[f"__{name}__"] = _comparison(function, getattr(tl.tensor, f"__{name}__"))
    return found


ARITHMETIC = {"add": numpy.add, "sub": numpy.subtract, "mul": numpy.multiply}
BITWISE = {"and": numpy.bitwise_and, "or": numpy.bitwise_or, "xor": numpy.bitwise_xor}
COMPARISONS = {
    "lt": numpy.less,
    "le": numpy.less_equal,
    "gt": numpy.greater,
    "ge": numpy.greater_equal,
    "eq": numpy.equal,
    "ne": numpy.not_equal,
}
NUMBERS = {"fp64": (float, int), "fp32": (float, int), "int64": (int,), "int32": (int,)}
"""Names of types of blocks -> types of the numbers that are converted to them."""


def _constant(block: Any, value: Any) -> Any:
    """The number as a tensor of the block's type, or None where that takes more thought."""
    kind = block.dtype
    if type(value) not in NUMBERS.get(kind.name, ()) or (
        type(value) is int and not -(2**31) <= value < 2**31
    ):
        return None
    # Zero has no sign.
    data = numpy.array([value or 0], interpreter._get_np_dtype(kind))
    return tl.tensor(TensorHandle(data, kind), kind)


def _arithmetic(function: Any, slow: Any) -> Any:
    def operate(self: Any, other: Any) -> Any:
        kind = self.dtype
        right = other if type(other) is tl.tensor else _constant(self, other)
        if right is None or type(kind) is not tl.dtype or right.dtype.name != kind.name:
            return slow(self, other)
        left, right = (self, right) if self.type is right.type else _alike(self, right)
        data = function(left.handle.data, right.handle.data)
        return tl.tensor(TensorHandle(data, left.handle.dtype.scalar), left.type)

    return operate


def _bitwise(function: Any, slow: Any) -> Any:
    quick = _arithmetic(function, slow)
    return lambda self, other: (quick if self.dtype.is_int() else slow)(self, other)


def _reflected(function: Any, slow: Any) -> Any:
    def operate(self: Any, other: Any) -> Any:
        number = _constant(self, other)
        if number is None:
            return slow(self, other)
        left, right = _alike(number, self)
        data = function(left.handle.data, right.handle.data)
        return tl.tensor(TensorHandle(data, left.handle.dtype.scalar), left.type)

    return operate


def _comparison(function: Any, slow: Any) -> Any:
    def operate(self: Any, other: Any) -> Any:
        kind = self.dtype
        if (
            type(other) is not tl.tensor
            or type(kind) is not tl.dtype
            or kind.name != other.dtype.name
        ):
            return slow(self, other)
        left, right = (self, other) if self.type is other.type else _alike(self, other)
        truth = TensorHandle(
            function(left.handle.data, right.handle.data), left.handle.dtype.scalar
        )
        kind = left.type
        return tl.tensor(truth, block_type(tl.int1, kind.sizes) if kind.is_block() else tl.int1)

    return operate


def _indexed(slow: Any) -> Any:
    """`x[:, None]` and the like."""
    everything = slice(None)

    def index(self: Any, slices: Any) -> Any:
        if type(slices) is not tuple or not self.type.is_block():
            return slow(self, slices)
        sizes = [*self.type.sizes]
        for dim, part in enumerate(slices):
            if part is None and dim <= len(sizes):
                sizes.insert(dim, 1)
            elif part != everything:
                return slow(self, slices)
        handle = TensorHandle(self.handle.data.reshape(sizes), self.handle.dtype.scalar)
        return tl.tensor(handle, block_type(self.dtype, tuple(sizes)))

    return index


_block_types: dict[Any, Any] = {}


def block_type(element: Any, sizes: tuple[int, ...]) -> Any:
    """One object for each type."""
    key = (element.name, getattr(element, "address_space", None), sizes)
    found = _block_types.get(key)
    if found is None:
        found = _block_types[key] = tl.block_type(element, [*sizes])
    return found


def _types() -> None:
    """What a type is, by its name in a set, not in a list that is made for the question."""
    integers = frozenset(tl.dtype.SINT_TYPES + tl.dtype.UINT_TYPES)
    floating = frozenset(tl.dtype.FP_TYPES)
    equal = tl.dtype.__eq__
    unwrap = tl.core._unwrap_if_constexpr
    plain = frozenset((tl.tensor, int, float, bool, str, type(None), tl.dtype, tl.block_type))

    tl.block_type.with_element_ty = lambda self, element: block_type(element, self.sizes)
    tl.dtype.is_int = lambda self: self.name in integers
    tl.dtype.is_floating = lambda self: self.name in floating
    tl.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    tl.core._unwrap_if_constexpr = lambda value: value if type(value) in plain else unwrap(value)


def _promotion() -> None:
    """Operands of an operation, in the type that it is computed in and of one shape."""
    semantic = interpreter.interpreter_semantic
    check, promote = semantic.binary_op_type_checking_impl, semantic.computation_type_impl
    promoted: dict[Any, Any] = {}

    def computation_type(a: Any, a_scalar: bool, b: Any, b_scalar: bool, division: bool) -> Any:
        key = (a.name, a_scalar, b.name, b_scalar, division)
        found = promoted.get(key)
        if found is None:
            found = promoted[key] = promote(a, a_scalar, b, b_scalar, division)
        return found

    def operands(
        lhs: Any,
        rhs: Any,
        allow_lhs_ptr: bool = False,
        allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True,
        div_or_mod: bool = False,
    ) -> Any:
        if type(lhs) is type(rhs) is tl.tensor:
            left, right = lhs.dtype, rhs.dtype
            if type(left) is tl.dtype:
                # Of equal types only those of 8 and 16 bits may become another one.
                if left.name == right.name and (not div_or_mod or left.primitive_bitwidth >= 32):
                    return _alike(lhs, rhs)
            elif allow_lhs_ptr and right.is_int():
                return _alike(lhs, rhs)
        return check(lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    semantic.computation_type_impl = computation_type
    semantic.binary_op_type_checking_impl = operands


_shapes: dict[Any, tuple[int, ...]] = {}


def _shape_of_both(lhs: Any, rhs: Any) -> tuple[int, ...] | None:
    """What two shapes broadcast to, if they do."""
    found = _shapes.get((lhs, rhs))
    if found is None:
        with contextlib.suppress(ValueError):
            found = _shapes[lhs, rhs] = numpy.broadcast_shapes(lhs, rhs)
    return found


def _alike(lhs: Any, rhs: Any) -> Any:
    """Operands in the shape that they have in common, by their types alone: NumPy broadcasts what
    they hold when it computes with both."""
    left, right = lhs.type, rhs.type
    if left.is_block() and right.is_block():
        a, b = left.sizes, right.sizes
        if a == b:
            return lhs, rhs
        shape = _shape_of_both(a, b)
        if shape is None:
            return _broadcast(lhs, rhs)
        return (
            lhs if a == shape else _retyped(lhs, shape),
            rhs if b == shape else _retyped(rhs, shape),
        )
    # A number spread over a block has a layout of its own, which decides that of the result unless
    # the other operand has the same, and so the order in which results are summed.
    if left.is_block() and lhs.handle.data.flags.c_contiguous:
        return lhs, _retyped(rhs, left.sizes)
    if right.is_block() and rhs.handle.data.flags.c_contiguous:
        return _retyped(lhs, right.sizes), rhs
    return _broadcast(lhs, rhs)


def _retyped(block: Any, shape: tuple[int, ...]) -> Any:
    return tl.tensor(block.handle, block_type(block.dtype, shape))


def _splat(value: Any, like: Any) -> Any:
    kind = block_type(value.dtype, like.sizes)
    return tl.tensor(interpreter.interpreter_builder.create_splat(kind, value.handle), kind)


def _spread(block: Any, shape: tuple[int, ...]) -> Any:
    if block.type.sizes == shape:
        return block
    handle = TensorHandle(numpy.broadcast_to(block.handle.data, shape), block.dtype)
    return tl.tensor(handle, block_type(block.dtype, shape))


def _broadcast(lhs: Any, rhs: Any) -> Any:
    left, right = lhs.type, rhs.type
    if not left.is_block():
        return (_splat(lhs, right), rhs) if right.is_block() else (lhs, rhs)
    if not right.is_block():
        return lhs, _splat(rhs, left)
    if left.sizes == right.sizes:
        return lhs, rhs
    shape = _shape_of_both(left.sizes, right.sizes)
    if shape is None:
        return _refuse(lhs, rhs)
    return _spread(lhs, shape), _spread(rhs, shape)


_refuse = interpreter.interpreter_semantic.broadcast_impl_value


def _broadcasting() -> None:
    interpreter.interpreter_semantic.broadcast_impl_value = _broadcast


def _tuples() -> None:
    """Tuples, whose type is seldom asked for."""
    make = tl.tuple.__init__

    def init(self: Any, args: Any, type: Any = None) -> None:
        self.values = list(args)
        if type is not None:
            make(self, args, type)

    def kind(self: Any) -> Any:
        found = vars(self).get("_type")
        if found is None:
            found = self._type = tl.core._type_for_tuple_values(self.values)
        return found

    tl.tuple.__init__ = init
    tl.tuple.type = property(kind, lambda self, value: setattr(self, "_type", value))


def _arrays() -> None:
    """Of NumPy's functions those that are not themselves written in Python."""
    builder = InterpreterBuilder
    numpy_type = interpreter._get_np_dtype
    everywhere: dict[tuple[int, ...], Any] = {}

    def binary(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        output, kind = op(lhs.data, rhs.data), lhs.dtype.scalar
        size = output.itemsize
        if size > 1 and type(kind) is tl.dtype and size * 8 > kind.primitive_bitwidth:
            output = output.astype(numpy_type(kind))
        return TensorHandle(output, kind)

    def splat(self: Any, kind: Any, arg: Any) -> Any:
        data = numpy.empty(kind.sizes, numpy_type(arg.dtype))
        data[...] = arg.data
        return TensorHandle(data, arg.dtype.scalar)

    def expand_dims(self: Any, arg: Any, axis: int) -> Any:
        shape = arg.data.shape
        at = axis if axis >= 0 else axis + len(shape) + 1
        return TensorHandle(arg.data.reshape(*shape[:at], 1, *shape[at:]), arg.dtype.scalar)

    def load(self: Any, ptr: Any, cache: Any, eviction: Any, volatile: Any) -> Any:
        mask = everywhere.get(ptr.data.shape)
        if mask is None:
            mask = everywhere[ptr.data.shape] = numpy.ones(ptr.data.shape, bool)
        handle = TensorHandle(mask, tl.int1)
        return self.create_masked_load(ptr, handle, None, cache, eviction, volatile)

    def masked_load(
        self: Any, ptr: Any, mask: Any, other: Any, cache: Any, eviction: Any, volatile: Any
    ) -> Any:
        kind = ptr.get_element_ty()
        numpys = numpy_type(kind)
        beyond = numpy.zeros(ptr.data.shape, numpys) if other is None else other.data
        data = interpreter._interpreter.load(ptr.data, mask.data, beyond, numpys)
        return TensorHandle(data, kind)

    def handle(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
        self.data, self.dtype = data, dtype
        self.attr = {} if attr is None else attr

    def element(self: Any) -> Any:
        kind = self.dtype
        while type(kind) is not tl.dtype and hasattr(kind, "element_ty"):
            kind = kind.element_ty
        return kind

    TensorHandle.__init__, TensorHandle.get_element_ty = handle, element
    builder.binary_op, builder.create_splat = binary, splat
    builder.create_expand_dims = expand_dims
    builder.create_load, builder.create_masked_load = load, masked_load
