"""From an Op to calls of it: eager, under autograd, forward mode, torch.func.

One ``autograd.Function`` an op serves ``torch.func``; eager calls take a short way into it.

Derivatives. ``Function.backward`` calls the op's backward op, an Op like any other, so that a
second derivative meets a second Function. What has no kernel of its own is evaluated from the rule
under ``rules()``, where torch mathematics means our ops, whoever called and on whichever thread.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from . import library, runtime
from .op import (
    OVERLOADS,
    TARGETS,
    BackwardParams,
    Bind,
    Needs,
    Op,
    OtherOverload,
    Spec,
    Tensors,
    Unsupported,
)
from .runtime import local
from .sampling import Sample
from .sampling import tensors as tensors_of

Function = Callable[..., Any]

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_keys = torch._C._dispatch_keys
_unwrapped = torch._C._functorch.get_unwrapped
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_unwrap_if_dead = torch._C._functorch.unwrap_if_dead
_is_tracing = torch._C._is_tracing
_is_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled
_any_autocast = torch._C._is_any_autocast_enabled


def key_set(tensor: Tensor) -> int:
    """The dispatch key set of ``tensor`` as a number."""
    return _keys(tensor).raw_repr()


PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))


@cache
def _plain_key_sets() -> frozenset[int]:
    """Dispatch key sets of tensors that are nothing but strided memory a kernel can read.

    One comparison rules out layouts (sparse, nested, quantised), lazy negation and conjugation,
    zero tensors without storage, fake, meta and wrapped tensors.
    """
    sets = set()
    for device in runtime.DEVICE_TYPES:
        if device == "cuda" and not torch.cuda.is_available():
            continue
        sets.add(key_set(torch.empty(0, device=device)))
        with torch.inference_mode():
            sets.add(key_set(torch.empty(0, device=device)))
    return frozenset(sets)


PLAIN_KEY_SETS = _plain_key_sets()


def is_plain(tensor: Tensor) -> bool:
    """Whether a kernel may read ``tensor`` through its pointer and strides."""
    return type(tensor) in PLAIN_TYPES and key_set(tensor) in PLAIN_KEY_SETS


transforming = torch._C._are_functorch_transforms_active
"""Whether a call is made inside a transform of torch.func."""


def admit(tensor: Tensor) -> None:
    """Raise Unsupported, with the reason, for a tensor that our kernels cannot take."""
    if type(tensor) in PLAIN_TYPES and _keys(tensor).raw_repr() in PLAIN_KEY_SETS:
        return
    if not isinstance(tensor, Tensor):
        raise Unsupported(f"a {type(tensor).__name__} in a tensor's place")
    if _is_wrapped(tensor) and not transforming():
        raise Unsupported("tensor of a transform that has ended")
    while _is_wrapped(tensor):
        tensor = _unwrapped(tensor)
    if is_plain(tensor):
        return
    if type(tensor) not in PLAIN_TYPES:
        raise Unsupported(f"tensor subclass {type(tensor).__name__}")
    if tensor.is_quantized or tensor.is_nested or tensor.layout != torch.strided:
        raise Unsupported("sparse, nested or quantized tensor")
    if tensor.is_complex():
        raise Unsupported("complex dtype")
    if tensor.device.type not in runtime.DEVICE_TYPES:
        raise Unsupported(f"{tensor.device.type} tensor")
    raise Unsupported("lazily evaluated tensor")


def admit_pair(a: Tensor, b: Tensor) -> None:
    """``admit`` both."""
    if type(a) in PLAIN_TYPES and type(b) in PLAIN_TYPES:
        keys = _keys(a).raw_repr()
        if keys in PLAIN_KEY_SETS and _keys(b).raw_repr() == keys:
            return
    admit(a)
    admit(b)


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
) -> Any:
    """Run ``func(*args, **kwargs)`` on ``op`` if it can, else on torch. Our modes are out of the
    way already."""
    try:
        if _dispatch_modes() or _is_tracing():
            # Tracers and fake tensors must see ATen operators, not our launches.
            raise Unsupported("a tracer or dispatch mode is active")
        if op.autocast and _any_autocast():
            args, kwargs = autocast(op, args, kwargs)
        tensors, params = bind(*args, **kwargs)
    except OtherOverload:
        return other_overload(op, bind, func, args, kwargs, session)
    except Unsupported as reason:
        return fall_back(op, bind, func, args, kwargs, str(reason), session)
    except TypeError:
        return other_overload(op, bind, func, args, kwargs, session)
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
) -> Any:
    """Run a call that ``bind`` cannot read as the next overload of ``func``, else on torch."""
    following = OVERLOADS.get((func, bind))
    while following is not None and session is not None and not session.takes(following[0].name):
        following = OVERLOADS.get((func, following[1]))
    if following is None:
        return fall_back(op, bind, func, args, kwargs, str(OtherOverload()), session)
    return dispatch(*following, func, args, kwargs, session)


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
    type; the message is preceded by what came for each argument."""
    if session is not None:
        session._count_fall_back(torch_name(func), reason)
    try:
        refuse_mixed(args, kwargs)
        return func(*args, **kwargs)
    except REFUSALS as error:
        if type(error).__module__ != "builtins":
            raise  # torch.OutOfMemoryError and its like are not about the arguments
        message = f"{op.name}({describe(bind, args, kwargs)}): {error}"
        raise type(error)(message) from error


# What torch raises for arguments that it does not take.
REFUSALS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, OverflowError)


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

    names = list(inspect.signature(bind).parameters)
    pairs = [
        (names[i] if i < len(names) else f"argument {i + 1}", value) for i, value in enumerate(args)
    ]
    pairs += list(kwargs.items())
    return ", ".join(f"{name}={show(value)}" for name, value in pairs)


@cache
def torch_name(func: Function) -> str:
    """Public name of a torch callable, for reports."""
    plain = getattr(func, "__name__", "")
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
    call = op.forward
    if call is None:
        return compose(op, params, tensors)
    if transforming():
        result = op.function.apply(params, *tensors)
    else:
        if op.differentiable:
            if forward_ad._current_level >= 0:
                call = op.recorded
            elif _grad_enabled():
                for t in tensors:
                    if t is not None and t.requires_grad:
                        call = op.recorded
                        break
        result = call(params, *tensors)
    if type(result) is tuple and len(result) > op.outputs and not everything:
        return result[0] if op.outputs == 1 else result[: op.outputs]
    return result


def compose(op: Op, params: Any, tensors: Tensors) -> Any:
    """Run a composite: its definition, each operation of it on the op that replaces it."""
    assert op.reference is not None
    with contextlib.ExitStack() as stack:
        stack.enter_context(rules())
        if op.autocast and _any_autocast():
            # As in torch, what has been cast as the whole is not cast again in its parts.
            for device in op.autocast:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
        found = op.reference(params, *tensors)
    return found[0] if op.outputs == 1 else found


_ALL = tuple(range(64))  # indices of an op's tensors, which are never so many


def make_function(op: Op) -> tuple[type[torch.autograd.Function], Function]:
    """The autograd.Function of ``op``, and how to enter it outside of transforms.

    Its arguments are ``params``, then the tensors. The entry is ``apply`` of a subclass whose
    ``forward`` records, which spares a call, taken below the Python layer of ``Function.apply``,
    which binds the signature by ``inspect`` each time (12 us against 3).
    """

    # Constants of the op, looked up once: recording is on the hot path.
    assert op.forward is not None
    saves, known_specs, public, differentiable = op.saves, op.specs, op.outputs, op.differentiable
    compute = op.forward

    def record(ctx: Any, params: Any, tensors: Tensors, output: Any) -> None:
        outputs = output if type(output) is tuple else (output,)
        if not differentiable:
            ctx.mark_non_differentiable(*outputs)
            return
        specs: Any = None if known_specs is None else known_specs(params)
        if specs is None:
            # Plain pairs here, Specs in backward: it is the forward call that users wait for.
            specs = [None if t is None else (t.shape, t.dtype) for t in tensors]
        ctx.call = params, specs, local.session
        # An output that the loss does not depend on sends None, not a tensor of zeros, whose
        # product with an infinite slope would be NaN (the `out` of a backward op has no use of
        # its own).
        ctx.set_materialize_grads(False)
        kept = saves and saves(params, ctx.needs_input_grad[1:])
        if kept is None or kept == _ALL[: len(tensors)]:
            ctx.save_for_backward(*tensors)
        elif kept:
            everything = tensors + outputs
            ctx.save_for_backward(*[everything[i] for i in kept])
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(*tensors, *outputs)
        if output is outputs:
            # An index beside a value has no derivative either.
            integers = [out for out in outputs[:public] if not out.is_floating_point()]
            if integers or len(outputs) > public:
                ctx.mark_non_differentiable(*integers, *outputs[public:])

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        record(ctx, inputs[0], inputs[1:], output)

    def forward(ctx: Any, params: Any, *tensors: Tensor | None) -> Any:
        output = compute(params, *tensors)
        record(ctx, params, tensors, output)
        return output

    def backward(ctx: Any, *grads: Tensor | None) -> Tensors:
        needs = ctx.needs_input_grad[1:]
        # Everything in its place, None for what was not saved. What a transform wrapped that has
        # ended meanwhile is unwrapped, as torch's own operators do by themselves.
        params, specs, session = ctx.call
        kept = range(len(needs)) if saves is None else saves(params, needs)
        saved: list[Tensor | None] = [None] * (len(needs) + len(grads))
        # A graph that holds nothing can be walked again after it was freed, as torch's own can.
        for i, t in zip(kept, ctx.saved_tensors if kept else (), strict=True):
            saved[i] = t if t is None else _unwrap_if_dead(t)
        grads = tuple([g if g is None else _unwrap_if_dead(g) for g in grads[:public]])
        if all(g is None for g in grads):
            return (None,) * (1 + len(needs))
        if specs == ():
            like = next(g for g in grads if g is not None)
            specs = (Spec(like.shape, like.dtype),) * len(needs)
        else:
            specs = tuple([None if s is None else Spec(*s) for s in specs])
        previous = local.session, local.bypass
        local.session, local.bypass = session, 1
        try:
            result = vjp(op, params, needs, specs, grads, tuple(saved))
        finally:
            local.session, local.bypass = previous
        return (None, *result)

    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        if not differentiable:
            return None
        params, _, session = ctx.call
        # What was saved still carries the tangents of this very level.
        saved = [
            t if t is None else forward_ad.unpack_dual(t, level=0).primal for t in ctx.saved_tensors
        ]
        count = len(tangents)
        tensors, outputs = tuple(saved[:count]), tuple(saved[count:])
        # Forward mode is off while torch calls this. A second level of it, as in
        # jacfwd(jacfwd(f)), would silently lose its tangents here.
        with (
            runtime.attribute_to(session),
            rules(),
            forward_ad._set_fwd_grad_enabled(True),
        ):
            result = pushforward(op, params, tensors, outputs, tangents)
        extra = len(outputs) - op.outputs
        if extra:
            return (*(result if type(result) is tuple else (result,)), *[None] * extra)
        return result

    def vmap(info: Any, in_dims: tuple, params: Any, *tensors: Tensor | None) -> Any:
        with rules():
            if op.vmap is not None:
                return op.vmap(info, params, tensors, in_dims[1:])
            return vmap_reference(op, info, params, tensors, in_dims[1:])

    name = "Triton" + "".join(part.capitalize() for part in op.name.split("_"))
    members: dict[str, Any] = {
        "op": op,
        "forward": staticmethod(compute),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "jvp": staticmethod(jvp),
        "vmap": staticmethod(vmap),
        "__doc__": f"{op.name}: {op.formula}",
        "__module__": __name__,
    }
    function = type(name, (torch.autograd.Function,), members)
    unset = torch.autograd.function._SingleLevelFunction.setup_context
    members = {
        "op": op,
        "forward": staticmethod(forward),
        "setup_context": staticmethod(unset),
        "__module__": __name__,
    }
    eager = type(name, (function,), members)
    return function, super(torch.autograd.Function, eager).apply  # type: ignore[misc]


def vjp(
    op: Op,
    params: Any,
    needs: Needs,
    specs: tuple[Spec | None, ...],
    grads: Tensors,
    saved: Tensors,
    own_level: int = 0,
) -> Tensors:
    """Gradients of the op's tensors, given those of its public outputs.

    ``own_level`` is 1 where a ``jvp`` calls it, for the forward-mode level it evaluates.
    """
    if op.rule is None:
        return differentiate(op, params, needs, grads, saved[: len(needs)])
    if op.backward is not None:
        grads = tuple([g if g is None or is_plain(g) else settle(g) for g in grads])
        if _kernel_sees_everything((*grads, *saved), own_level):
            found = apply(op.backward, BackwardParams(params, needs, specs), (*grads, *saved))
            results = iter(found if type(found) is tuple else (found,))
            return tuple([next(results) if need else None for need in needs])
    with rules():
        return op.rule(params, needs, specs, grads, saved)


def settle(tensor: Tensor) -> Tensor:
    """A gradient as memory that a kernel can read, if torch handed it over unevaluated."""
    if _is_wrapped(tensor):
        return tensor
    if tensor._is_zerotensor():
        return tensor.clone()
    return tensor.resolve_neg()


def _kernel_sees_everything(tensors: Tensors, own_level: int) -> bool:
    """Whether a backward kernel may stand for the rule here: not for tensors that carry a
    forward-mode tangent, because the rule's operations propagate it."""
    if forward_ad._current_level >= 0 and _carries_tangents(tensors, own_level):
        return False
    return launchable(tensors)


def launchable(tensors: Tensors) -> bool:
    """Whether our kernels may compute with ``tensors``: not under a tracer, which must see ATen
    operators, nor with anything but memory under its wrappers (zeros of forward mode)."""
    if _dispatch_modes() or _is_tracing():
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        while _is_wrapped(tensor):
            tensor = _unwrapped(tensor)
        if not is_plain(tensor):
            return False
    return True


def _carries_tangents(tensors: Tensors, own_level: int) -> bool:
    """Whether forward mode may be differentiating through ``tensors``.

    Exact for dual numbers. Under torch.func the tangents of outer levels are out of reach, so
    every forward-mode level but the one being evaluated (``own_level`` of them) counts.
    """
    if not transforming():
        return any(
            t is not None and forward_ad.unpack_dual(t, level=0).tangent is not None
            for t in tensors
        )
    stack = torch._C._functorch.get_interpreter_stack() or ()
    levels = sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)
    # No level of torch.func's own: the dual numbers are the user's, below the transforms.
    return levels == 0 or levels > own_level


def differentiate(op: Op, params: Any, needs: Needs, grads: Tensors, tensors: Tensors) -> Tensors:
    """Gradients of an op that is defined by its reference: reverse mode through it."""
    if op.reference is None:
        raise NotImplementedError(
            f"tritongrad: op {op.name!r} has no derivative (differentiated beyond its "
            f"maximum order, {op.max_order})"
        )
    reference = op.reference
    # A constant gets nothing: zeros, in the op that it came from, could meet an infinite slope.
    wanted = [i for i, need in enumerate(needs) if need and i not in op.constants]
    received = [i for i, g in enumerate(grads) if g is not None]
    cotangents: tuple[Any, ...] = tuple(grads[i] for i in received)

    def outputs(*primals: Tensor) -> tuple[Tensor, ...]:
        full: list[Any] = list(tensors)
        for i, primal in zip(wanted, primals, strict=True):
            full[i] = primal
        found: Any = reference(params, *full)
        return tuple(found[i] for i in received)

    primals: list[Any] = [tensors[i] for i in wanted]
    found: Sequence[Tensor | None]
    if transforming():
        with rules():
            pull = torch.func.vjp(outputs, *primals)[1]
            found = pull(cotangents)
    else:
        # Not where nothing is attached: values out of a transform that has ended left their graph
        # behind, and what is computed from them must not claim one.
        attached = any(t.requires_grad for t in (*primals, *cotangents))
        create_graph = torch.is_grad_enabled() and attached
        with torch.enable_grad(), rules():
            # Aliases: one saved tensor may have been computed from another, and only the
            # partial derivative is wanted.
            primals = [
                t.view_as(t) if create_graph and t.requires_grad else t.detach().requires_grad_()
                for t in primals
            ]
            values = outputs(*primals)
            linked = [(v, c) for v, c in zip(values, cotangents, strict=True) if v.requires_grad]
            # Zeros where the rule does not depend on what it was given (a kink's slope): so torch
            # answers, instead of calling its input unused.
            found = torch.autograd.grad(
                [v for v, _ in linked],
                primals,
                [c for _, c in linked],
                create_graph=create_graph,
                allow_unused=True,
                materialize_grads=len(received) == len(grads),
            )
    results = dict(zip(wanted, found, strict=True))
    return tuple(results.get(i) for i in range(len(needs)))


def pushforward(op: Op, params: Any, tensors: Tensors, outputs: Tensors, tangents: Tensors) -> Any:
    """Tangents of the op's public outputs."""
    if not op.differentiable:
        return None
    if op.jvp is None:
        raise NotImplementedError(f"tritongrad: op {op.name!r} has no forward-mode derivative")
    return op.jvp(params, tensors, outputs[: op.outputs], tangents)


def vmap_reference(op: Op, info: Any, params: Any, tensors: Tensors, dims: tuple) -> Any:
    """Batch an op that has no rule of its own: a backward op through its definition, another one
    sample by sample, because only its kernels make what its backward needs."""
    if op.rule is not None or op.reference is None:
        return _vmap_by_samples(op, info, params, tensors, dims)
    present = [i for i, t in enumerate(tensors) if t is not None]

    def body(*values: Tensor) -> Any:
        full: list[Tensor | None] = [None] * len(tensors)
        for i, value in zip(present, values, strict=True):
            full[i] = value
        assert op.reference is not None
        return op.reference(params, *full)

    batched = torch.vmap(body, tuple(dims[i] for i in present), 0, randomness=info.randomness)
    values: list[Any] = [tensors[i] for i in present]
    found = batched(*values)
    return found, (0,) * len(found)


def _vmap_by_samples(op: Op, info: Any, params: Any, tensors: Tensors, dims: tuple) -> Any:
    results = []
    for i in range(info.batch_size):
        sample = tuple(
            t if t is None or d is None else t.select(d, i)
            for t, d in zip(tensors, dims, strict=True)
        )
        found = apply(op, params, sample, everything=True)
        results.append(found if type(found) is tuple else (found,))
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return (stacked, (0,) * len(stacked)) if len(stacked) > 1 else (stacked[0], 0)


class rules(TorchFunctionMode):
    """Evaluate derivative rules: torch calls inside run on our ops, whatever mode is open."""

    def __enter__(self) -> rules:
        self.previous, local.bypass = local.bypass, 0
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        local.bypass = self.previous

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


@contextlib.contextmanager
def bypass() -> Iterator[None]:
    """Keep our modes out of torch calls made by the library itself."""
    previous, local.bypass = local.bypass, 1
    try:
        yield
    finally:
        local.bypass = previous
