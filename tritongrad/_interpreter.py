"""What Triton's interpreter does wrong (bfloat16), and what it does a thousand times over.

bfloat16 it holds as the upper half of a float32's bits. It (triton 3.7.1) converts float32 to it by
cutting bits off where hardware rounds to nearest, loses subnormals on the way back, and converts
every other type as if those bits were an integer. Results would be off by an ulp here and right on
a GPU, so that no test of accuracy could mean anything; hence the one conversion that the
interpreter calls is replaced.

While a kernel runs, functions of ``triton.language`` are replaced by its own. It looks for them
among all members of five namespaces, and does so again for each call of a device function within
the kernel. What it finds is always the same, so it is found once, when the first kernel is
launched, and stays in place: to put a class back makes Python forget what it knows of it. Types of
blocks are made once, too, as are signatures of kernels, types of numbers and pointers, and numpy's
types. What an operation costs is in _operations.py. Together: four fifths of the time.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from . import _operations


def _widened(bits: Any) -> Any:
    """float32 of a bfloat16's bits: exact."""
    return (numpy.asarray(bits).astype(numpy.uint32) << 16).view(numpy.float32)


def _rounded(values: Any) -> Any:
    """Bits of the nearest bfloat16, ties to even. Through float32, as torch and the compiler do."""
    single = numpy.asarray(values).astype(numpy.float32)
    bits = single.view(numpy.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # The carry must not run through the exponent of a NaN.
    return numpy.where(numpy.isnan(single), 0x7FC0, nearest).astype(numpy.uint16)


def correct_bfloat16() -> None:
    """Make the interpreter convert from and to bfloat16 as hardware does."""
    convert = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            return cast_impl(self, TensorHandle(_widened(src.data), tl.float32), dst_type)
        if target == tl.bfloat16 and source != tl.bfloat16:
            return TensorHandle(_rounded(src.data), tl.bfloat16)
        return convert(self, src, dst_type)

    InterpreterBuilder.cast_impl = cast_impl


def _with_semantic(builtin: Any) -> Any:
    """A function of the language as kernels call it: all that it lacks is what it computes with."""
    function = getattr(builtin, "__wrapped__", builtin)
    semantic = interpreter.interpreter_semantic

    def call(*args: Any, _semantic: Any = None, **named: Any) -> Any:
        return function(*args, _semantic=semantic, **named)

    return call


class _Replacements:
    """``_patch_lang`` of the interpreter, done once, and the scope that a launch ends."""

    def __init__(self, operators: Callable[[], dict[str, Any]]) -> None:
        self._find = interpreter._patch_lang
        self._operators = operators
        self._done = False

    def __call__(self, fn: Any) -> _Replacements:
        if not self._done:
            self._done = True
            sees_all = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
            # Some it replaces twice, and the last is to stay.
            last = {(change[0], change[1]): change[2] for change in self._find(sees_all)._changes}
            for (owner, name), old in last.items():
                if tl.core.is_builtin(old):
                    setattr(owner, name, _with_semantic(old))
            for name, operator in self._operators().items():
                setattr(tl.tensor, name, operator)
        return self

    def restore(self) -> None:
        """Nothing: where kernels are interpreted, all are, and the next one is soon to come."""


def _remember_types() -> None:
    """Make types of blocks and what a tensor knows of its type once: an operation makes several of
    both, and they are never changed. ``sizes`` of a type are its shape as a tuple of Python's."""
    make_type, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    types: dict[Any, dict[str, Any]] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        space = getattr(element_ty, "address_space", None)
        sizes = [s.value if type(s) is tl.constexpr else s for s in shape]
        key = (type(element_ty), element_ty.name, space, *sizes)
        known = types.get(key)
        if known is None:
            make_type(self, element_ty, shape)
            known = types[key] = vars(self) | {"_of_tensors": {}, "sizes": tuple(sizes)}
        vars(self).update(known)

    one = tl.constexpr(1)

    def tensor(self: Any, handle: Any, type: Any) -> None:
        known = getattr(type, "_of_tensors", None)
        if known is None:
            self.shape, self.numel, self.type, self.dtype = (), one, type, type.scalar
        elif known:
            vars(self).update(known)
        else:
            make_tensor(self, handle, type)
            known.update(vars(self))
            del known["handle"]
        self.handle = handle

    tl.block_type.__init__, tl.tensor.__init__ = block_type, tensor


def _remember_numpy_types() -> None:
    """The interpreter makes a table of them for each look into it."""
    look = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def numpy_type(ty: Any) -> Any:
        element = ty.element_ty if isinstance(ty, tl.block_type) else ty
        if isinstance(element, tl.pointer_type):
            return look(element)
        found = known.get(element.name)
        if found is None:
            found = known[element.name] = look(element)
        return found

    interpreter._get_np_dtype = numpy_type


def _remember_types_of_arguments() -> None:
    """Of numbers that fit 32 bits, and of tensors by their dtype."""
    convert = interpreter._implicit_cvt
    pointers: dict[torch.dtype, Any] = {}

    def argument(arg: Any) -> Any:
        kind = type(arg)
        if kind is int and -(2**31) <= arg < 2**31:
            handle = TensorHandle(numpy.array([arg], dtype=numpy.int32), tl.int32)
            return tl.tensor(handle, tl.int32)
        if kind is tuple:
            return tuple([argument(a) for a in arg])
        if kind is not torch.Tensor:
            return convert(arg)
        ty = pointers.get(arg.dtype)
        if ty is None:
            ty = pointers[arg.dtype] = convert(arg).type
        handle = TensorHandle(numpy.array([arg.data_ptr()], dtype=numpy.uint64), ty)
        return tl.tensor(handle, ty)

    interpreter._implicit_cvt = argument


class _Inspect:
    """Python's ``inspect`` for the interpreter, which remembers what kernels take."""

    def __init__(self) -> None:
        self.getfullargspec = functools.cache(inspect.getfullargspec)

    def getcallargs(self, function: Any, *args: Any, **named: Any) -> dict[str, Any]:
        names = self.getfullargspec(function).args
        found = dict(zip(names, args, strict=False)) | named
        if len(args) + len(named) == len(found) == len(names):
            return found
        return inspect.getcallargs(function, *args, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(inspect, name)


def _remember_constants() -> None:
    """Which arguments of a kernel are constants, of which it reads the annotations at a launch."""
    make = interpreter.GridExecutor.__init__
    constants: dict[Any, list[str]] = {}

    def init(self: Any, fn: Any, arg_names: Any, grid: Any, pre_run_hooks: Any = ()) -> None:
        if fn in constants:
            self.fn, self.arg_names, self.grid = fn, arg_names, grid
            self.pre_run_hooks, self.constexprs = pre_run_hooks, constants[fn]
        else:
            make(self, fn, arg_names, grid, pre_run_hooks)
            constants[fn] = self.constexprs

    interpreter.GridExecutor.__init__ = init


def _leave_host_memory_alone() -> None:
    """Tensors of the CPU are where the interpreter reads and writes them; it makes others of the
    same memory, and copies that to itself."""
    executor = interpreter.GridExecutor
    to_host, to_device = executor._init_args_hst, executor._restore_args_dev

    def foreign(value: Any) -> bool:
        if type(value) is tuple:
            return any(map(foreign, value))
        return hasattr(value, "data_ptr") and not (type(value) is torch.Tensor and value.is_cpu)

    def init(self: Any, args: Any, named: Any) -> Any:
        if foreign((*args, *named.values())):
            return to_host(self, args, named)
        return args, named

    def restore(self: Any, args: Any, host: Any, named: Any, named_host: Any) -> None:
        if host is not args:
            to_device(self, args, host, named, named_host)

    executor._init_args_hst, executor._restore_args_dev = init, restore


def quicken() -> None:
    """Leave out what the interpreter repeats or does for nothing, where it is made as known."""
    _remember_types()
    _remember_numpy_types()
    _remember_types_of_arguments()
    _remember_constants()
    _leave_host_memory_alone()
    if known := triton.__version__.startswith("3.7."):
        _operations.quicken()
    interpreter.inspect = _Inspect()
    # It compares the size of what it has just made with that of its type.
    TensorHandle.__post_init__ = lambda self: None
    if hasattr(interpreter, "_LangPatchScope") and hasattr(interpreter, "_MISSING"):
        interpreter._patch_lang = _Replacements(_operations.operators if known else dict)
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        # Then it computes of each sum and product of integers whether it overflows, and looks at
        # none of the answers.
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
