"""What Triton's interpreter does wrong (bfloat16), and what it does a thousand times over.

bfloat16 it holds as the upper half of a float32's bits. It (triton 3.7.1) converts float32 to it by
cutting bits off where hardware rounds to nearest, loses subnormals on the way back, and converts
every other type as if those bits were an integer. Results would be off by an ulp here and right on
a GPU, so that no test of accuracy could mean anything; hence the one conversion that the
interpreter calls is replaced.

While a kernel runs, functions of ``triton.language`` are replaced by its own. It looks for them
among all members of five namespaces, and does so again for each call of a device function within
the kernel, which is more than half of the time of a small kernel. What it finds is always the same,
so it is found once, and put in place once a launch. Types of blocks are made once, too. Together: a
quarter of the time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


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


Change = tuple[Any, str, Any, Any]
"""What is replaced: owner, name, what was there, and what takes its place."""


class _Replacements:
    """``_patch_lang`` of the interpreter, which remembers what it found.

    It is the scope, too, that a launch restores at its end. Device functions within the launch find
    theirs in place, or add what is for a module that the kernel itself does not see.
    """

    def __init__(self) -> None:
        self._find = interpreter._patch_lang
        self._missing = interpreter._MISSING
        self._known: dict[tuple[Any, ...], list[Change]] = {}
        self._modules: dict[Any, tuple[Any, ...]] = {}
        self._active: dict[tuple[Any, ...], list[Change]] = {}

    def __call__(self, fn: Any) -> _Replacements:
        modules = self._modules.get(fn)
        if modules is None:
            seen = [m for m in (tl, tl.core) if any(v is m for v in fn.__globals__.values())]
            modules = self._modules[fn] = tuple(seen)
        if modules not in self._active:
            if modules not in self._known:
                self._known[modules] = self._discover(fn)
            self._put(modules, self._known[modules])
        return self

    def _put(self, modules: tuple[Any, ...], changes: list[Change]) -> None:
        self._active[modules] = changes
        for owner, name, _, new in changes:
            setattr(owner, name, new)

    def _discover(self, fn: Any) -> list[Change]:
        """Seen from a clean state, to which a launch in progress is put back meanwhile."""
        others = dict(self._active)
        self.restore()
        found = self._find(fn)
        changes = [(owner, name, old, getattr(owner, name)) for owner, name, old in found._changes]
        found.restore()
        for modules, put in others.items():
            self._put(modules, put)
        return changes

    def restore(self) -> None:
        """End of a launch."""
        for changes in reversed(self._active.values()):
            for owner, name, old, _ in reversed(changes):
                if old is not self._missing:
                    setattr(owner, name, old)
                elif name in vars(owner):
                    delattr(owner, name)
        self._active.clear()


def _remember_types() -> None:
    """Make types of blocks and what a tensor knows of its type once: an operation makes several of
    both, and they are never changed."""
    make_type, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    types: dict[Any, dict[str, Any]] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        space = getattr(element_ty, "address_space", None)
        sizes = [s.value if type(s) is tl.constexpr else s for s in shape]
        key = (type(element_ty), element_ty.name, space, *sizes)
        known = types.get(key)
        if known is None:
            make_type(self, element_ty, shape)
            known = types[key] = vars(self) | {"_of_tensors": {}}
        vars(self).update(known)

    def tensor(self: Any, handle: Any, type: Any) -> None:
        known = getattr(type, "_of_tensors", None)
        if not known:
            make_tensor(self, handle, type)
            if known is not None:
                known.update(vars(self))
                del known["handle"]
            return
        vars(self).update(known)
        self.handle = handle

    tl.block_type.__init__, tl.tensor.__init__ = block_type, tensor


def quicken() -> None:
    """Leave out what the interpreter repeats or does for nothing, where it is made as known."""
    _remember_types()
    if hasattr(interpreter, "_LangPatchScope") and hasattr(interpreter, "_MISSING"):
        interpreter._patch_lang = _Replacements()
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        # Then it computes of each sum and product of integers whether it overflows, and looks at
        # none of the answers.
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
