"""From a torch call to an Op: read, checked, counted, and run on it or on torch."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from . import library, runtime
from .admission import functionalizing, transforming
from .extension import EXTENSIONS
from .op import OVERLOADS, TARGETS, Bind, Op, OtherOverload, Tensors, Unsupported
from .policy import SLOWER, Policy
from .program import Recalled, Recorder, state, versions
from .runtime import local
from .sampling import Sample
from .sampling import tensors as tensors_of

Function = Callable[..., Any]

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_is_tracing = torch._C._is_tracing
_is_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled
_any_autocast = torch._C._is_any_autocast_enabled
_out_of_sight = torch._C.DisableTorchFunction
_all_disabled = torch._C._is_torch_function_all_disabled
_function_state = torch._C._get_torch_function_state  # type: ignore[attr-defined]
_set_function_state = torch._C._set_torch_function_state  # type: ignore[attr-defined]
_ENABLED: Any = torch._C._TorchFunctionState.ENABLED  # type: ignore[attr-defined]


def entry(op: Op, bind: Bind, func: Function) -> Function:
    """The function that runs ``func``'s calls, read by ``bind``, on ``op`` where it can."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_compiling():
            return library.call(op, func, args, kwargs)
        if _function_modes() and not local.bypass:
            # Called directly, not by a mode: what happens inside is not the user's torch code.
            with bypass():
                return dispatch(op, bind, func, args, kwargs, local.session)
        return dispatch(op, bind, func, args, kwargs, local.session)

    return call


def dispatch(
    op: Op,
    bind: Bind,
    func: Function,
    args: tuple,
    kwargs: dict[str, Any],
    session: runtime.Session | None,
    policy: Policy | None = None,
) -> Any:
    """Run ``func(*args, **kwargs)`` on ``op`` if it can and ``policy`` has it so, else on torch.
    Our modes are out of the way already."""
    recognise = getattr(bind, "recognise", None)
    # Guards do not tell of a tracer where torch hides its key, as in what ``linearize`` traces.
    if recognise is not None and op.look is None and not (_dispatch_modes() or _is_tracing()):
        # A call like an earlier one: nothing that is asked below can have another answer.
        tensors, params, asks = recognise(args, kwargs)
        if tensors is not None and (policy is None or policy.allows(op, tensors)):
            if session is not None:
                session._count_run(op.name)
            call = op.forward
            if call is None:
                result = compose(op, params, tensors)
            else:
                if op.differentiable and (asks or forward_ad._current_level >= 0):
                    call = op.recorded
                result = call(params, *tensors)
                if type(result) is tuple and len(result) > op.outputs:
                    result = result[0] if op.outputs == 1 else result[: op.outputs]
            return result if op.returns is None else op.returns(result)
    try:
        if _dispatch_modes() or _is_tracing():
            # Tracers and fake tensors must see ATen operators, not our launches.
            raise Unsupported("a tracer or dispatch mode is active")
        if functionalizing():
            raise Unsupported("functionalize is active")
        if op.autocast and _any_autocast():
            # What falls back is torch's to cast.
            cast_args, cast_kwargs = autocast(op, args, kwargs)
            tensors, params = bind(*cast_args, **cast_kwargs)
        else:
            tensors, params = bind(*args, **kwargs)
        if op.look is not None:
            op.look(params, *tensors)
        if policy is not None and not policy.allows(op, tensors):
            raise Unsupported(SLOWER)
    except OtherOverload:
        return other_overload(op, bind, func, args, kwargs, session, policy)
    except Unsupported as reason:
        return fall_back(op, bind, func, args, kwargs, str(reason), session)
    except TypeError:
        return other_overload(op, bind, func, args, kwargs, session, policy)
    if session is not None:
        session._count_run(op.name)
    result = apply(op, params, tensors)
    return result if op.returns is None else op.returns(result)


def other_overload(
    op: Op,
    bind: Bind,
    func: Function,
    args: tuple,
    kwargs: dict[str, Any],
    session: runtime.Session | None,
    policy: Policy | None = None,
) -> Any:
    """Run a call that ``bind`` cannot read as the next overload of ``func``, else on torch."""
    following = OVERLOADS.get((func, bind))
    while following is not None and session is not None and not session.takes(following[0].name):
        following = OVERLOADS.get((func, following[1]))
    if following is None:
        return fall_back(op, bind, func, args, kwargs, str(OtherOverload()), session)
    return dispatch(*following, func, args, kwargs, session, policy)


NO_FLOATS = "result is not floating-point"
"""Reason of a call that no differentiable kernel could have taken."""


def has_float(value: Any) -> bool:
    """Whether a result is floating-point or complex, or has a part that is."""
    if isinstance(value, Tensor):
        return value.is_floating_point() or value.is_complex()
    return isinstance(value, (tuple, list)) and any(map(has_float, value))


def fall_back(
    op: Op,
    bind: Bind,
    func: Function,
    args: tuple,
    kwargs: dict[str, Any],
    reason: str,
    session: runtime.Session | None,
) -> Any:
    """Let torch run a call that ``op`` does not take. What torch refuses keeps torch's exception
    type; the message is preceded by what came for each argument. A result of integers is reported
    as that, whatever else, a device for one, speaks against our kernels."""
    try:
        refuse_mixed(args, kwargs)
        result = func(*args, **kwargs)
        if not has_float(result):
            reason = NO_FLOATS
        return result
    except REFUSALS as error:
        if type(error).__module__ != "builtins":
            raise  # torch.OutOfMemoryError and its like are not about the arguments
        message = f"{op.name}({describe(bind, args, kwargs)}): {error}"
        raise type(error)(message) from error
    finally:
        if session is not None:
            session._count_fall_back(torch_name(func), reason)


# What torch raises for arguments that it does not take.
REFUSALS = (
    RuntimeError, TypeError, ValueError, IndexError, AttributeError, OverflowError, AssertionError,
)  # fmt: skip


def refuse_mixed(args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise RuntimeError for a meta tensor beside one with memory. torch's own products on the CPU
    would read memory for it that is not there, and return numbers."""
    sized = [t for t in tensors_of(Sample(args, kwargs)) if t.dim()]
    if len({t.device.type == "meta" for t in sized}) > 1:
        raise RuntimeError("expected all tensors to be on the same device, one is on meta")


def describe(bind: Bind, args: tuple, kwargs: dict[str, Any]) -> str:
    """The arguments of a call by name: dtype, shape and device of tensors, values of the rest."""

    def show(value: Any) -> str:
        if isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            return f"{dtype}{list(value.shape)} on {value.device}"
        if isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value):
            return f"[{', '.join(map(show, value))}]"
        text = repr(value)
        return text if len(text) <= 60 else text[:57] + "..."

    pairs = [*zip(positional(bind, len(args)), args, strict=True), *kwargs.items()]
    return ", ".join(f"{name}={show(value)}" for name, value in pairs)


def positional(bind: Bind, count: int) -> list[str]:
    """Names of the first ``count`` positional arguments of ``bind``: ``matrices[1]`` for one of a
    variable number, ``argument 4`` for one too many."""
    parameters = inspect.signature(bind).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    further = count - len(names)
    for p in parameters:
        if p.kind is p.VAR_POSITIONAL:
            names += [f"{p.name}[{i}]" for i in range(further)]
    return [*names, *[f"argument {i + 1}" for i in range(len(names), count)]][:count]


@cache
def torch_name(func: Function) -> str:
    """Public name of a torch callable, or of an extension, for reports."""
    plain = getattr(func, "__name__", "")
    if EXTENSIONS.get(plain) is func:
        return f"{func.__module__}.{plain}"
    for module in (torch, torch.nn.functional):
        # resolve_name knows some functions by an alias (torch.mm as torch.spmm).
        if getattr(module, plain, None) is func:
            return f"{module.__name__}.{plain}"
    with contextlib.suppress(Exception):
        if name := torch.overrides.resolve_name(func):
            return name
    return getattr(func, "__name__", repr(func))


_AUTOCAST_ORDER = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def autocast(op: Op, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Cast the arguments as torch's autocast does for this op on their device."""
    tensors = tensors_of(Sample(args, kwargs))
    device = next((t.device.type for t in tensors), "cpu")
    policy = op.autocast.get(device, "keep")
    if policy == "keep" or not torch.is_autocast_enabled(device):
        return args, kwargs
    # float64 is never lowered, and only tensors on the autocasting device are touched.
    eligible = [
        t
        for t in tensors
        if t.is_floating_point() and t.device.type == device and t.dtype != torch.float64
    ]
    if not eligible:
        return args, kwargs
    if policy == "lower":
        target = torch.get_autocast_dtype(device)
    elif policy == "float32":
        target = torch.float32
    else:
        target = max((t.dtype for t in eligible), key=_AUTOCAST_ORDER.index)
        if {torch.float16, torch.bfloat16} <= {t.dtype for t in eligible}:
            target = torch.float32
    chosen = {id(t) for t in eligible}

    def cast(value: Any) -> Any:
        if type(value) in (list, tuple):
            return type(value)(map(cast, value))
        return value.to(target) if id(value) in chosen else value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


def apply(op: Op, params: Any, tensors: Tensors, everything: bool = False) -> Any:
    """Run a bound call: directly when nothing asks for a derivative, else through the Function.

    Returns the public outputs: a tensor, or a tuple of them; on request ``everything``, also what
    the op keeps for its backward.
    """
    recorder = local.recorder
    if recorder is not None and not local.bypass:
        # Called by a definition itself, and not by what that calls.
        with bypass():
            result = apply(op, params, tensors, everything)
            run = partial(_applied, op, params, everything)
            recorder.note(run, op, tensors, {}, result)
        return result
    call = op.forward
    if call is None:
        return compose(op, params, tensors)
    if transforming():
        return shown(op, op.function.apply(params, *tensors), everything)
    if op.differentiable:
        if forward_ad._current_level >= 0:
            call = op.recorded
        elif _grad_enabled():
            for t in tensors:
                if t is not None and t.requires_grad:
                    call = op.recorded
                    break
    if _function_modes() and forward_ad._current_level < 0:
        # A mode would be shown each of a launcher's looks at a tensor. Not where a derivative may
        # be evaluated in the call.
        with _out_of_sight():
            result = call(params, *tensors)
    else:
        result = call(params, *tensors)
    return shown(op, result, everything)


def _applied(op: Op, params: Any, everything: bool, *tensors: Tensor | None) -> Any:
    return apply(op, params, tensors, everything)


def shown(op: Op, result: Any, everything: bool) -> Any:
    """Of what a call gave, the public outputs, or ``everything``."""
    if type(result) is tuple and len(result) > op.outputs and not everything:
        return result[0] if op.outputs == 1 else result[: op.outputs]
    return result


def compose(op: Op, params: Any, tensors: Tensors) -> Any:
    """Run a composite: its definition, each operation of it on the op that replaces it."""
    if type(params) is not Recalled:
        return define(op, params, tensors, rules())
    now = state()
    if now in params.programs:
        program = params.programs[now]
        return define(op, params.params, tensors, rules()) if program is None else program(tensors)
    recorder = Recorder(tensors)
    found = define(op, params.params, tensors, recording(recorder))
    # In a region of autocast the parts were called in one where it is off.
    params.programs[now] = None if _any_autocast() else recorder.program(found)
    return found


def define(op: Op, params: Any, tensors: Tensors, mode: rules) -> Any:
    """Evaluate the definition of a composite."""
    assert op.reference is not None
    with contextlib.ExitStack() as stack:
        stack.enter_context(mode)
        if op.autocast and _any_autocast():
            # As in torch, what has been cast as the whole is not cast again in its parts.
            for device in op.autocast:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
        found = op.reference(params, *tensors)
    return found[0] if op.outputs == 1 else found


class rules(TorchFunctionMode):
    """Evaluate derivative rules: torch calls inside run on our ops, whatever mode is open."""

    def __enter__(self) -> rules:
        self.previous = local.bypass, local.recorder
        local.bypass, local.recorder = 0, None
        self.state = _function_state()
        if _all_disabled():
            _set_function_state(_ENABLED)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        _set_function_state(self.state)
        local.bypass, local.recorder = self.previous

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if local.bypass:
            return func(*args, **kwargs)
        # Neither is for the modes around this one, which are the user's.
        local.bypass = 1
        try:
            target = TARGETS.get(func)
            if target is not None:
                return dispatch(*target, func, args, kwargs, None)
            return func(*args, **kwargs)
        finally:
            local.bypass = 0


class recording(rules):
    """``rules``, which lets a recorder know of each call."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __enter__(self) -> recording:
        super().__enter__()
        local.recorder = self.recorder
        return self

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if local.bypass:
            return func(*args, **kwargs)  # in what the definition called, not called by it
        with bypass():
            before = versions(args)
        result = super().__torch_function__(func, types, args, kwargs)
        target = TARGETS.get(func)
        run = func if target is None else _dispatching(*target, func)
        with bypass():
            self.recorder.failed |= versions(args) != before
            self.recorder.note(run, func, args, kwargs, result)
        return result


def _dispatching(op: Op, bind: Bind, func: Function) -> Function:
    def run(*args: Any, **kwargs: Any) -> Any:
        return dispatch(op, bind, func, args, kwargs, None)

    return run


@contextlib.contextmanager
def bypass() -> Iterator[None]:
    """Keep our modes out of torch calls made by the library itself."""
    previous, local.bypass = local.bypass, 1
    try:
        yield
    finally:
        local.bypass = previous
