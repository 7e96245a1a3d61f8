"""Launching a kernel again as it was launched before, past Triton's own preparations.

At each launch Triton binds the arguments to names, makes text of the options, and finds the
compiled kernel by that. All of it follows from what kinds of arguments there are, which Triton's
own function for it says in one call (dtypes, alignment, divisibility, ones), and from the
constants. So compiled kernels are remembered by these.

What is not known well enough to be sure of is launched in the ordinary way: hooks that want to see
or change compilations, kernels under an autotuner, parts of Triton that are not there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

MOST = 4096
"""Launches remembered."""

# Values of one of these types that are equal are the same constant.
_VALUES = frozenset((int, bool, str, type(None)))

CONVENTION = ((3, 6), (3, 7))
"""Versions of Triton whose compiled kernels are run by ``run(*grid, stream, function, metadata,
...)``; those of others, by ``compiled[grid](...)``."""


class Known(NamedTuple):
    """A compiled kernel, and how to launch it.

    Attributes:
        constants: what follows the launch's arguments.
        kept: what the key has the identity of, which must not become that of something else.
    """

    compiled: Any
    run: Callable[..., None]
    function: Any
    metadata: Any
    constants: tuple[Any, ...]
    kept: tuple[Any, ...]


class Triton(NamedTuple):
    """The parts of Triton that this needs, some of which are not public.

    Attributes:
        specialise: a backend, an argument and three flags -> what it is compiled for.
        runtime, compilation: switches, some of which change what is compiled.
        direct: whether compiled kernels have the CONVENTION.
    """

    specialise: Callable[..., Any]
    jit_function: Any
    compiled_kernel: Any
    runtime: Any
    compilation: dict[str, Any]
    make_backend: Callable[[Any], Any]
    driver: Any
    direct: bool


@cache
def triton() -> Triton | None:
    """Triton's parts; None where one is not there."""
    try:
        import triton
        from triton import knobs
        from triton._C.libtriton import native_specialize_impl
        from triton.compiler import CompiledKernel, make_backend
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction
    except ImportError:
        return None
    names = ("debug", "add_stages_inspection_hook", "launch_enter_hook", "launch_exit_hook")
    if not all(hasattr(knobs.runtime, name) for name in names):
        return None
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    return Triton(
        native_specialize_impl,
        JITFunction,
        CompiledKernel,
        knobs.runtime,
        vars(knobs.compilation),
        make_backend,
        driver,
        version in CONVENTION,
    )


@cache
def backend(device: int) -> Any:
    """Triton's compiler for the current device, whose index is ``device``."""
    parts = triton()
    assert parts is not None
    return parts.make_backend(parts.driver.active.get_current_target())


_known: dict[Any, Known] = {}


def key_of(
    parts: Triton, kernel: Any, args: tuple[Any, ...], meta: dict[str, Any], device: int
) -> tuple[Any, ...]:
    """What decides which compiled kernel a launch needs. Equal keys: the same one.

    Raises:
        TypeError: an argument is of a type that Triton does not know.
    """
    key: list[Any] = [
        id(kernel), device, parts.runtime.debug, parts.compilation.get("instrumentation_mode"),
        parts.specialise(backend(device), args, False, True, True),
    ]  # fmt: skip
    for name, value in meta.items():
        kind = type(value)
        key.append(name)
        if kind in _VALUES:
            key.append(kind)  # True is not 1
            key.append(value)
        else:
            key.append(id(value))
    return tuple(key)


def run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    """``kernel[grid](*args, **meta)``: ``args`` are the kernel's first parameters."""
    parts = triton()
    if (
        parts is None
        or type(kernel) is not parts.jit_function
        or kernel.pre_run_hooks
        or parts.runtime.add_stages_inspection_hook is not None
    ):
        kernel[grid](*args, **meta)
        return
    device = parts.driver.active.get_current_device()
    try:
        key = key_of(parts, kernel, args, meta, device)
    except TypeError:
        kernel[grid](*args, **meta)  # which says what is wrong with the argument
        return
    known = _known.get(key)
    if known is None:
        _remember(parts, key, kernel, kernel[grid](*args, **meta), len(args), meta)
        return
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    if parts.direct and not (
        _hooked(parts.runtime.launch_enter_hook) or _hooked(parts.runtime.launch_exit_hook)
    ):
        stream = parts.driver.active.get_current_stream(device)
        known.run(
            x, y, z, stream, known.function, known.metadata, None, None, None, *args,
            *known.constants,
        )  # fmt: skip
    else:
        known.compiled[x, y, z](*args, *known.constants)


def _hooked(hook: Any) -> bool:
    """Whether somebody, a profiler, wants to see launches."""
    return hook is not None and bool(getattr(hook, "calls", True))


def _remember(
    parts: Triton, key: Any, kernel: Any, compiled: Any, count: int, meta: dict[str, Any]
) -> None:
    """Remember what a launch of ``count`` arguments was compiled to."""
    rest = kernel.params[count:]
    # It is none where a hook took the compilation over.
    if type(compiled) is not parts.compiled_kernel or not all(p.is_constexpr for p in rest):
        return
    constants = tuple([meta.get(p.name, p.default) for p in rest])
    if len(_known) >= MOST:
        _known.clear()
    _known[key] = Known(
        compiled,
        compiled.run,
        compiled.function,
        compiled.packed_metadata,
        constants,
        (kernel, *meta.values()),
    )
