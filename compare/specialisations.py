"""Which specialisations of our kernels are used: every op's samples, launches recorded and stubbed.

Triton compiles a kernel once for each combination of dtypes, constants and divisibilities of its
arguments. The samples are those of the tests, in sizes a GPU sees; nothing is computed.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tritongrad import runtime
from tritongrad.op import Op, Unsupported
from tritongrad.sampling import Sample, tensors

from .disassembly import Json

MAX_ELEMENTS = 2**24  # of one collected tensor: beyond it nothing else is specialised


@dataclass
class Specialisation:
    """One kernel with the types, constants and divisibilities Triton compiles it for."""

    description: Json
    ops: set[str] = field(default_factory=set)
    vectorisable: bool = False  # see welcomes_vectors

    @property
    def dtypes(self) -> list[str]:
        """Element types of its pointers."""
        leaves = _leaves(self.description["args"])
        return sorted({leaf["pointer"][0] for leaf in leaves if "pointer" in leaf})

    @property
    def kernel(self) -> str:
        return self.description["kernel"][1]

    @property
    def constexprs(self) -> dict[str, str]:
        return {name: _plain(value) for name, value in self.description["meta"].items()}


def encode(value: Any) -> Json:
    """An argument as JSON, reduced to what Triton specialises on.

    Arguments that Triton would not tell apart become equal, so that equal descriptions are one
    compilation. ``disassembly.decode`` is the inverse.
    """
    import triton.language as tl  # not above: tritongrad must be imported before triton

    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        within_2gb = value.untyped_storage().nbytes() < 2**31
        return {"pointer": [dtype, value.data_ptr() % 16 == 0, within_2gb]}
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        if value == 1:
            return 1
        # The least value of the same width and divisibility: i32, i64, and u64 beyond.
        floor = 16 if -(2**31) <= value < 2**31 else 2**32 if value < 2**63 else 2**63
        return floor if value % 16 == 0 else floor + 1
    if isinstance(value, float):
        return 0.5
    if isinstance(value, tl.dtype):
        return {"dtype": value.name}
    if hasattr(value, "fn"):
        return {"jit": [value.fn.__module__, value.fn.__qualname__]}
    raise TypeError(f"cannot describe a kernel argument of type {type(value).__name__}")


def encode_constexpr(value: Any) -> Json:
    """A constexpr as JSON: unlike a run-time argument, its value counts."""
    if isinstance(value, tuple):
        return {"tuple": [encode_constexpr(item) for item in value]}
    return value if isinstance(value, (int, float, str)) else encode(value)


def describe(kernel: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> Json:
    """A launch as JSON: equal descriptions are one specialisation."""
    return {
        "kernel": encode(kernel)["jit"],
        "args": [encode(value) for value in args],
        "meta": {name: encode_constexpr(value) for name, value in meta.items()},
    }


def make_job(description: Json, target: str, listing: bool | None = True) -> Json:
    """What ``disassembly.compile_job`` needs to compile a described launch, and whether to list its
    instructions; None: Triton's front end alone is to read it."""
    modules = {description["kernel"][0]}
    modules |= {value["jit"][0] for value in _leaves(description["meta"]) if "jit" in value}
    return description | {"packages": _packages(modules), "target": target, "listing": listing}


def _leaves(value: Json) -> Iterator[dict[str, Json]]:
    """Every ``{kind: content}`` inside an encoded value."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item)


def _packages(modules: set[str]) -> dict[str, list[str]]:
    """Where a worker finds these modules: package name -> search path."""
    packages: dict[str, list[str]] = {}
    for module in sorted(modules):
        parents = module.split(".")[:-1]
        if not parents:
            file = sys.modules[module].__file__
            assert file is not None
            packages.setdefault("", []).append(str(Path(file).parent))
        for depth in range(1, len(parents) + 1):
            name = ".".join(parents[:depth])
            packages[name] = list(sys.modules[name].__path__)
    return packages


def _plain(value: Json) -> str:
    """An encoded constexpr for a human."""
    if not isinstance(value, dict):
        return str(value)
    (kind, content), *_ = value.items()
    if kind == "tuple":
        return "(" + ", ".join(map(_plain, content)) + ")"
    return content[1] if kind == "jit" else str(content)


@dataclass(frozen=True)
class Resized:
    """Makes the tensors of a sample, all zero, its sizes changed to those a GPU sees.

    Every size is mapped by its value and its place from the end alone, so that operands keep
    broadcasting; a size of 1 stays, and so does a tensor that would become too large.

    Attributes:
        rows, columns: factor of the last dimension but one, and of the last.
        odd: sizes one past a multiple of 128 instead of multiples.
        shifted: tensors begin one element into their storage.
    """

    dtype: torch.dtype
    device: str
    rows: int
    columns: int
    odd: bool = False
    shifted: bool = False

    @property
    def resizes(self) -> bool:
        """Whether sizes differ from the sample's own."""
        return self.columns > 1

    def _size(self, size: int, factor: int) -> int:
        if size <= 1 or factor == 1:
            return size
        return math.ceil(size * (factor if size < 512 else 1) / 128) * 128 + self.odd

    def __call__(
        self,
        *shape: int,
        low: float = 0.0,
        high: float = 1.0,
        dtype: torch.dtype | None = None,
        requires_grad: bool = True,
    ) -> Tensor:
        factors = (1,) * (len(shape) - 2) + (self.rows, self.columns)[-len(shape) :]
        sizes = [self._size(n, f) for n, f in zip(shape, factors, strict=bool(shape))]
        if math.prod(sizes) > MAX_ELEMENTS:
            sizes = list(shape)
        count = math.prod(sizes)
        dtype = dtype or self.dtype
        # Zero is an index, a class, a condition and a probability as good as any.
        flat = torch.zeros(count + self.shifted, dtype=dtype, device=self.device)
        tensor = flat[self.shifted :].view(sizes)
        return tensor.requires_grad_(requires_grad and tensor.is_floating_point())


def sizes(dtype: torch.dtype) -> Iterator[Resized]:
    """The factories whose samples are collected, beginning with the samples' own sizes."""
    device = "cpu" if runtime.INTERPRETED else "cuda"
    yield Resized(dtype, device, 1, 1)
    # Both dimensions alike, as matrix products need; then rows of one block and of several.
    for rows, columns in ((64, 64), (1024, 1024), (1, 1024), (1, 8192)):
        yield Resized(dtype, device, rows, columns)
    for columns in (1024, 8192):
        yield Resized(dtype, device, 1, columns, odd=True)
    yield Resized(dtype, device, 64, 64, odd=True)
    yield Resized(dtype, device, 64, 64, shifted=True)


def own_sizes(dtype: torch.dtype) -> Iterator[Resized]:
    """The first of ``sizes`` alone."""
    yield next(sizes(dtype))


def exercise(op: Op, sample: Sample, apart: bool = False) -> None:
    """Call ``op`` in every way that launches kernels: without and with gradients, twice
    differentiated, and in forward mode; ``apart``, also with the gradient of each input alone."""
    with torch.no_grad():
        op(*sample.args, **sample.kwargs)
    inputs = [t for t in tensors(sample) if t.requires_grad]
    outputs = _differentiable(op(*sample.args, **sample.kwargs))
    if not inputs or not outputs:
        return
    cotangents = [torch.empty_like(out, requires_grad=True) for out in outputs]
    grads = torch.autograd.grad(outputs, inputs, cotangents, create_graph=True, allow_unused=True)
    # An op that ends at some order says so by NotImplementedError.
    with contextlib.suppress(NotImplementedError):
        again = _differentiable(grads)
        if again:
            cotangents = [torch.empty_like(g) for g in again]
            torch.autograd.grad(again, [*inputs], cotangents, allow_unused=True)
    with contextlib.suppress(NotImplementedError), forward_ad.dual_level():

        def dual(value: Any) -> Any:
            if isinstance(value, Tensor) and value.requires_grad:
                primal = value.detach()
                # torch lays the tangent out as the primal, and cannot where elements overlap.
                if torch._debug_has_internal_overlap(primal) == 1:
                    primal = primal.clone()
                return forward_ad.make_dual(primal, torch.empty_like(primal))
            if type(value) in (list, tuple):
                return type(value)(map(dual, value))
            return value

        op(*map(dual, sample.args), **{name: dual(v) for name, v in sample.kwargs.items()})
    for only in inputs if apart and len(inputs) > 1 else ():
        exercise(op, _with_gradient_of(only, sample))


def _with_gradient_of(only: Tensor, sample: Sample) -> Sample:
    """``sample``, of which no other tensor requires a gradient."""

    def constant(value: Any) -> Any:
        if isinstance(value, Tensor) and value is not only:
            return value.detach()
        return type(value)(map(constant, value)) if type(value) in (list, tuple) else value

    kwargs = {name: constant(value) for name, value in sample.kwargs.items()}
    return Sample(constant(sample.args), kwargs, sample.note)


def _differentiable(outputs: Any) -> list[Tensor]:
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    return [out for out in outputs if out is not None and out.requires_grad]


def taken(op: Op, sample: Sample) -> bool:
    """Whether the op has kernels for a call: what torch runs instead would be computed."""
    for bind in (op.bind, *op.overloads):
        with contextlib.suppress(Unsupported, TypeError):
            if bind is not None:
                bind(*sample.args, **sample.kwargs)
                return True
    return False


def modest(op: Op, sample: Sample) -> bool:
    """Whether no result exceeds MAX_ELEMENTS, as the products of all pairs of elements would."""

    def without_memory(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().to("meta")
        return type(value)(map(without_memory, value)) if type(value) in (list, tuple) else value

    args = without_memory(sample.args)
    kwargs = {name: without_memory(value) for name, value in sample.kwargs.items()}
    try:
        found = op.replaces[0](*args, **kwargs)
    except Exception:  # what is wrong with the call is for the call itself to say
        return True
    results = found if isinstance(found, (list, tuple)) else (found,)
    return all(t.numel() <= MAX_ELEMENTS for t in results if isinstance(t, Tensor))


def welcomes_vectors(args: Any) -> bool:
    """Whether a launch gives its kernel every reason for 16-byte accesses."""
    operands = list(_tensors(args))
    largest = max(operands, key=Tensor.numel, default=None)
    return (
        largest is not None
        and largest.numel() >= 1024
        and largest.shape[-1] % 128 == 0
        and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in operands)
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)


class Collection:
    """The specialisations that samples of ops launch."""

    def __init__(self) -> None:
        self._found: dict[str, Specialisation] = {}
        self.problems: list[str] = []

    @property
    def specialisations(self) -> list[Specialisation]:
        """Without repetition, by kernel; those that should vectorise before the others."""
        order = sorted(self._found.values(), key=lambda s: not s.vectorisable)
        return sorted(order, key=lambda s: s.kernel)

    def add(
        self,
        op: Op,
        dtypes: Iterable[torch.dtype],
        factories: Callable[[torch.dtype], Iterable[Resized]] = sizes,
    ) -> None:
        """Run the samples of ``op`` in every size."""
        known = len(self.problems)
        for make in (make for dtype in dtypes for make in factories(dtype)):
            with runtime.stub(), self.recording(op):
                for sample in op.samples(make) if op.samples is not None else ():
                    if make.resizes and not (taken(op, sample) and modest(op, sample)):
                        continue
                    try:
                        exercise(op, sample, apart=not make.resizes)
                    except Exception as error:
                        # Resized, a call may contradict its arguments that are plain numbers.
                        if not make.resizes:
                            about = f"{op.name}, sample {sample.note!r}, {make.dtype}"
                            self.problems.append(f"{about}: {type(error).__name__}: {error}")
        if len(self.problems) == known and not any(op.name in s.ops for s in self._found.values()):
            self.problems.append(f"{op.name}: its samples launch no kernel")

    def recording(self, op: Op) -> contextlib.AbstractContextManager[None]:
        """Enter what is launched inside as what ``op`` launches."""
        return runtime.observe(partial(self._record, op.name))

    def _record(self, op: str, kernel: Any, grid: Any, args: Any, meta: dict[str, Any]) -> None:
        description = describe(kernel, args, meta)
        key = json.dumps(description, sort_keys=True)
        found = self._found.setdefault(key, Specialisation(description))
        found.ops.add(op)
        found.vectorisable |= welcomes_vectors(args)


def cover(
    specialisations: Iterable[Specialisation], tiles: bool = True, functions: bool = True
) -> Iterator[Specialisation]:
    """Those that show something new: a kernel's functions, or its tile, with these dtypes.

    The rest repeat one of them with other divisibilities, ranks or absent operands: many times as
    many, from the same source lines. Without ``tiles``, each kernel with each of its functions
    once, and with each tile only if it has no functions. Without ``functions`` either, each kernel
    with each of the flags that decide which of its lines are compiled, and with these dtypes.
    """
    seen: set[str] = set()
    for specialisation in specialisations:
        meta = specialisation.description["meta"]
        called = [leaf["jit"] for leaf in _leaves(meta) if "jit" in leaf]
        tile = {name: value for name, value in meta.items() if not isinstance(value, dict)}
        tile["vectorisable"] = specialisation.vectorisable
        about: tuple[Any, ...] = (specialisation.kernel, specialisation.dtypes)
        if tiles:
            keys = {json.dumps([*about, called]), json.dumps([*about, tile])}
        elif functions:
            keys = {json.dumps([specialisation.kernel, called or tile])}
        else:
            flags = {name: v for name, v in meta.items() if v is None or isinstance(v, bool)}
            keys = {json.dumps([*about, flags])}
        if keys - seen:
            seen |= keys
            yield specialisation


def differing(specialisations: Iterable[Specialisation]) -> Iterator[Specialisation]:
    """Those in which Triton's front end sees something new: each kernel's functions and flags with
    each choice of absent operands, its flags with each choice of dtypes, and in each argument each
    kind of number (one that is 1 is a constant)."""
    seen: set[str] = set()
    for specialisation in specialisations:
        kernel, args = specialisation.kernel, specialisation.description["args"]
        meta = specialisation.description["meta"]
        types = {name: v for name, v in meta.items() if v is None or isinstance(v, (bool, dict))}
        plain = {name: sorted(v) if isinstance(v, dict) else v for name, v in types.items()}
        keys = {
            json.dumps([kernel, types, [_operands(value, False) for value in args]]),
            json.dumps([kernel, plain, [_operands(value, True) for value in args]]),
        }
        for i, value in enumerate(args):
            keys.add(json.dumps([kernel, i, sorted(map(repr, _numbers(value)))]))
        if keys - seen:
            seen |= keys
            yield specialisation


def _operands(value: Json, dtypes: bool) -> Json:
    """An encoded argument without its numbers: which operands are absent, or of what dtypes."""
    if isinstance(value, dict):
        (kind, content), *_ = value.items()
        if kind != "tuple":
            return content[0] if dtypes else kind
        operands = [_operands(item, dtypes) for item in content]
        return [operand for operand in operands if operand != 0]
    return value if value is None else 0


def _numbers(value: Json) -> set[float]:
    """The numbers in an encoded argument: those that Triton compiles alike are one."""
    if isinstance(value, dict):
        return {number for item in value.get("tuple", []) for number in _numbers(item)}
    return {value} if isinstance(value, (int, float)) else set()
