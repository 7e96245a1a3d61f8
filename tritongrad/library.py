"""Ops under ``torch.compile`` and ``torch.export``.

Pointwise ops, reductions and plain products are handed back to torch: Inductor writes the fused
Triton kernel itself. An op with a ``schema`` becomes a ``torch.library`` op around our kernels,
with a second one for its backward. Transforms do not see into such an op, so torch's own operator
stands in for it under one; where a forward-mode derivative reaches it all the same (a program that
was exported), it raises instead of returning a zero tangent.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import runtime
from .op import OPS, Op, Spec, Unsupported

NAMESPACE = "tritongrad"
_FLOATING = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_DISCRETE = (torch.int32, torch.int64, torch.bool)
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def call(op: Op, func: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a compiler that is tracing shall see of ``func(*args, **kwargs)``. Traced itself."""
    if op.schema is None or not _eligible(args, kwargs):
        return func(*args, **kwargs)
    written, named = args, kwargs
    if not _has_its_signature(op.name, func):
        if op.spelling is None or func is not op.spelling[0]:
            return func(*args, **kwargs)
        spelled = op.spelling[1](*args, **kwargs)
        if spelled is None:
            return func(*args, **kwargs)
        written, named = spelled, {}
    if op.compiles is not None and not op.compiles(*written, **named):
        return func(*args, **kwargs)
    result = getattr(torch.ops.tritongrad, op.name)(*written, **named)
    return result if op.returns is None else op.returns(result)


def _has_its_signature(name: str, func: Callable[..., Any]) -> bool:
    # Of the op's name: torch 2.11 makes no constant of a record.
    return func in OPS[name].replaces


# Looked up while it is traced, as names of ops are (reroute.py).
_has_its_signature._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _transforming() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


# A constant of the trace: Dynamo guards on the transforms around it by itself. This is the mark
# that torch.compiler.assume_constant_result leaves, which would import all of Dynamo to do so.
_transforming._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _eligible(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a library op may stand for the call: types it takes, no transform around it."""
    if _transforming():
        return False
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    dtypes = {t.dtype for t in tensors if t.dtype not in _DISCRETE}
    return (
        len(dtypes) <= 1
        and dtypes <= _FLOATING
        and all(
            t.device.type in runtime.DEVICE_TYPES and not torch.is_autocast_enabled(t.device.type)
            for t in tensors
        )
    )


def define(op: Op) -> None:
    """Define the library op of ``op``, which has a schema, and that of its backward."""
    from .dispatch import NO_FLOATS, has_float, torch_name
    from .function import vjp

    assert op.schema is not None
    assert op.bind is not None
    assert op.forward is not None
    name, backward_name = op.name, f"{op.name}_backward"
    arguments = torch._C.parse_schema(f"{NAMESPACE}::{name}{op.schema}").arguments
    keywords = [a.name for a in arguments if a.kwarg_only]

    def written(function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` of arguments in a row, those by keyword last."""
        if not keywords:
            return function
        count = len(arguments) - len(keywords)
        return lambda *args: function(
            *args[:count], **dict(zip(keywords, args[count:], strict=False))
        )

    names = {a.name for a in arguments}
    readings = [r for r in (op.bind, *op.overloads) if names <= {*inspect.signature(r).parameters}]
    bind, compute, native = written(readings[0]), op.forward, written(op.replaces[0])
    # In a row all of them, so that trailing ones with their default are left out by the dispatcher.
    schema = op.schema.replace("*, ", "")
    # Without defaults, and as written: of a parsed SymInt[] it cannot be told that it is not int[].
    plain = re.sub(r"=[^,)]*", "", schema[1 : schema.index(")")])
    _library.define(name + schema)
    _library.define(
        f"{backward_name}(Tensor[] grads, {plain}, Tensor[] outputs, bool[] needs) -> Tensor[]"
    )
    defaults = tuple(a.default_value for a in arguments)
    is_tensor = [str(a.type) in ("Tensor", "Optional[Tensor]") for a in arguments]
    forward_op = getattr(torch.ops.tritongrad, name).default
    backward_op = getattr(torch.ops.tritongrad, backward_name).default

    def complete(args: tuple) -> tuple:
        # The dispatcher leaves out trailing arguments that have their default.
        return (*args, *defaults[len(args) :])

    def forward(*args: Any) -> Any:
        session = runtime.local.session
        try:
            tensors, params = bind(*args)
        except Unsupported as reason:
            if op.returns is not None:
                raise  # torch's function has other results
            result = native(*args)
            if session is not None:
                why = str(reason) if has_float(result) else NO_FLOATS
                session._count_fall_back(torch_name(op.replaces[0]), why)
            return result
        if session is not None:
            session._count_run(name)
        result = compute(params, *tensors)
        if type(result) is tuple:
            result = result[: op.outputs]
            return result[0] if op.outputs == 1 else result
        return result

    def backward(grads: list[Tensor], *args_outputs_needs: Any) -> list[Tensor]:
        *args, outputs, needs = args_outputs_needs
        tensors, params = bind(*args)
        # Some signatures have not all of the tensors that there may be.
        needs = (*needs, *[False] * (len(tensors) - len(needs)))
        specs = tuple(None if t is None else Spec(t.shape, t.dtype) for t in tensors)
        found = vjp(op, params, needs, specs, tuple(grads), (*tensors, *outputs))
        # Contiguous, as the fake kernel promises the compiler.
        return [g.contiguous() for g in found if g is not None]

    def fake_backward(grads: list[Tensor], *args_outputs_needs: Any) -> list[Tensor]:
        *args, _, needs = args_outputs_needs
        inputs = [a for a, tensor in zip(args, is_tensor, strict=True) if tensor]
        return [t.new_empty(t.shape) for t, need in zip(inputs, needs, strict=True) if need]

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keys: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                outputs = forward_op.redispatch(keys & torch._C._after_autograd_keyset, *args)
            results = outputs if type(outputs) is tuple else (outputs,)
            inputs = [a if tensor else None for a, tensor in zip(args, is_tensor, strict=True)]
            ctx.save_for_backward(*inputs, *results)
            ctx.rest = [None if tensor else a for a, tensor in zip(args, is_tensor, strict=True)]
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            saved, count = ctx.saved_tensors, len(is_tensor)
            args = [saved[i] if tensor else ctx.rest[i] for i, tensor in enumerate(is_tensor)]
            wanted = ctx.needs_input_grad[1:]
            needs = [w for w, tensor in zip(wanted, is_tensor, strict=True) if tensor]
            found = iter(backward_op(list(grads), *args, list(saved[count:]), needs))
            return (None, *[next(found) if want else None for want in wanted])

    def autograd(keys: Any, *args: Any) -> Any:
        args = complete(args)
        tensors = [a for a in args if isinstance(a, Tensor)]
        if forward_ad._current_level >= 0 and any(
            forward_ad.unpack_dual(t, level=0).tangent is not None for t in tensors
        ):
            raise NotImplementedError(
                f"tritongrad::{name} is the compiled form of {name} and has no forward-mode "
                "derivative; differentiate the function before compiling or exporting it"
            )
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return Differentiable.apply(keys, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return forward_op.redispatch(keys & torch._C._after_autograd_keyset, *args)

    def backward_autograd(keys: Any, *args: Any) -> list[Tensor]:
        # Without this, what autograd records of it would be a detached gradient.
        flat = [*args[0], *(a for a in args[1:] if isinstance(a, Tensor))]
        if torch.is_grad_enabled() and any(t.requires_grad for t in flat):
            raise NotImplementedError(
                f"tritongrad::{name} is the compiled form of {name} and has no second derivative; "
                "call the function without torch.compile"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return backward_op.redispatch(keys & torch._C._after_autograd_keyset, *args)

    _library.impl(name, forward, "CompositeExplicitAutograd")
    _library.impl(backward_name, backward, "CompositeExplicitAutograd")
    _library.impl(name, autograd, "Autograd", with_keyset=True)
    _library.impl(backward_name, backward_autograd, "Autograd", with_keyset=True)
    # torch's own operator on fake tensors knows shape, dtype, strides and errors.
    fake = native if op.fake is None else written(op.fake)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    torch.library.register_fake(f"{NAMESPACE}::{backward_name}", fake_backward, lib=_library)
