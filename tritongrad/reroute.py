"""Rerouting unmodified torch code: ``use()``, ``enable()``, ``disable()``."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import ContextDecorator
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import library
from .dispatch import NO_FLOATS, dispatch, has_float, other_overload, torch_name
from .op import OPS, OVERLOADS, TARGETS, Op, select
from .policy import Policy, choose
from .runtime import Session, local

MOVES = "moves data, no arithmetic"
CREATES = "creates a tensor"

OPERATOR = "an operator of torch.ops, as compiled code calls them"

UNCHANGED = "its result is its input"

HARMLESS = frozenset((MOVES, CREATES, NO_FLOATS, UNCHANGED))
"""Reasons of calls that no differentiable kernel could have taken."""

_MOVING = frozenset(  # a paragraph reads better than a hundred quoted words
    """
    T H mT mH alias as_strided atleast_1d atleast_2d atleast_3d bfloat16 block_diag
    broadcast_tensors broadcast_to cat chunk clone column_stack concat concatenate contiguous copy_
    cpu cuda data detach detach_ diag diag_embed diagonal double dsplit dstack expand expand_as
    fill_ flatten flip fliplr flipud float gather grad half hsplit hstack imag index_select
    masked_select meshgrid moveaxis movedim narrow pad permute pixel_shuffle pixel_unshuffle
    positive ravel real repeat repeat_interleave requires_grad_ reshape reshape_as roll rot90
    row_stack select split split_with_sizes squeeze stack swapaxes swapdims t take take_along_dim
    tensor_split tile to transpose tril triu type type_as unbind unflatten unfold unsafe_chunk
    unsafe_split unsqueeze view view_as vsplit vstack zero_ __getitem__ __get__ __set__ __deepcopy__
    __reduce_ex__ __array__ __iter__ __pos__ __reversed__ _make_dual _unpack_dual pin_memory
    retain_grad share_memory_ resolve_conj resolve_neg squeeze_ swapaxes_ swapdims_ t_ transpose_
    unsqueeze_
    """.split()  # noqa: SIM905
)


def _has_tensor(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    return isinstance(value, (tuple, list)) and any(map(_has_tensor, value))


def why_not(func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> str:
    """Reason why a call of ``func``, which is in no op's record, ran on torch."""
    namespace, name = _operator(func)
    if name in _MOVING or name.startswith("new_") or name.endswith("_like"):
        return CREATES if name.endswith("_like") or name.startswith("new_") else MOVES
    if kwargs.get("out") is not None:
        return "out="
    if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
        return "in-place"
    if name.startswith("__i") and name.removeprefix("__i") in _INPLACE_OPERATORS:
        return "in-place"
    if not has_float(result):
        return NO_FLOATS
    if not any(map(_has_tensor, args)) and not any(map(_has_tensor, kwargs.values())):
        return CREATES
    return OPERATOR if namespace else "no kernel"


def _operator(func: Any) -> tuple[str, str]:
    """Namespace and name of an operator of torch.ops; no namespace of any other function."""
    if isinstance(func, torch._ops.OpOverload):
        func = func.overloadpacket
    if isinstance(func, torch._ops.OpOverloadPacket):
        namespace, _, name = func._qualified_op_name.partition("::")
        return namespace, name
    return "", func.__name__


_INPLACE_OPERATORS = frozenset(
    f"{name}__"
    for name in (
        "add", "sub", "mul", "truediv", "div", "pow", "matmul", "floordiv", "mod", "and", "or",
        "xor", "lshift", "rshift",
    )
)  # fmt: skip


class _Rerouting(TorchFunctionMode):
    """Sends torch calls that are in TARGETS to their ops, the rest to torch, and counts both."""

    def __init__(
        self, session: Session, names: frozenset[str] | None, policy: Policy | None = None
    ) -> None:
        super().__init__()
        self.session = session
        self.names = names
        self.policy = policy

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            name = _name_of_op(func)
            if name is None or (self.names is not None and name not in self.names):
                return func(*args, **kwargs)
            return library.call(OPS[name], func, args, kwargs)
        if func is _l1_loss and "weight" not in kwargs:
            kwargs = {**kwargs, "weight": _weight_of_caller()}
        if local.bypass:
            return func(*args, **kwargs)
        plain = _PLAIN.issuperset(types)
        if plain and func in _BACKWARD:
            # Straight to the engine, with this mode still on: a checkpointed region computed again
            # during backward must meet the same ops as the first time.
            if func is Tensor.backward:
                func, args, kwargs = torch.autograd.backward, _arguments(*args, **kwargs), {}
            with self:
                return _past_override(func)(*args, **kwargs)
        target = TARGETS.get(func)
        if target is None and plain and _made_of_others(func):
            with self:
                return _past_override(func)(*args, **kwargs)
        # An outer session must not take what this one leaves to torch.
        local.bypass = 1
        try:
            if target is None:
                result = func(*args, **kwargs)
                if _operator(func)[0] == library.NAMESPACE:
                    return result  # which counts itself
                reason = why_not(func, args, kwargs, result)
                self.session._count_fall_back(torch_name(func), reason)
                return result
            op, bind = target
            if takes(self.names, op):
                return dispatch(op, bind, func, args, kwargs, self.session, self.policy)
            if (func, bind) in OVERLOADS:
                return other_overload(op, bind, func, args, kwargs, self.session, self.policy)
            self.session._count_fall_back(torch_name(func), "left out by use()")
            return func(*args, **kwargs)
        finally:
            local.bypass = 0


_l1_loss = torch.nn.functional.l1_loss


def _weight_of_caller() -> Tensor | None:
    """``weight`` of the l1_loss call that is being offered, which torch does not pass on."""
    frame = sys._getframe(2).f_back
    if frame is None or frame.f_code is not _l1_loss.__code__:
        return None
    weight: Tensor | None = frame.f_locals["weight"]
    return weight


def _name_of_op(func: Any) -> str | None:
    target = TARGETS.get(func)
    return None if target is None else target[0].name


# Looked up while it is traced: Dynamo would look for functions that torch has wrapped (operators,
# such as Tensor.__pow__) in vain, and then find that its guard on that fails.
_name_of_op._dynamo_marked_constant = True  # type: ignore[attr-defined]


def takes(names: frozenset[str] | None, op: Op) -> bool:
    """Whether a selection of op names (None: all) includes ``op``."""
    return names is None or op.name in names


_PLAIN = frozenset((Tensor, torch.nn.Parameter))
"""Types of tensors that have no say in a call themselves."""

_BACKWARD = frozenset((Tensor.backward, torch.autograd.backward, torch.autograd.grad))


def _arguments(
    self: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> tuple:
    """Tensor.backward's arguments as torch.autograd.backward takes them."""
    return self, gradient, retain_graph, create_graph, None, inputs


_OFFERS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
"""What a Python function of torch's asks to know whether a mode shall take the call."""


def _past_override(func: Any) -> Callable[..., Any]:
    """A Python function of torch's, torch.autograd.grad for one, as it goes on when no mode takes
    the call.

    It first offers itself to the mode that is on; this is how to run it with the mode on. Made anew
    each time: what is put in torch's modules in place of their own shall be called.
    """
    names = {**func.__globals__, **dict.fromkeys(_OFFERS, lambda *_: False)}
    copy = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


@cache
def _made_of_others(func: Any) -> bool:
    """Whether it is written in Python in ``torch.nn.functional``: what it calls may be ours."""
    if type(func) is not FunctionType or func.__module__ != torch.nn.functional.__name__:
        return False
    return any(name in func.__code__.co_names for name in _OFFERS)


def _selection(only: Any, exclude: Any) -> frozenset[str] | None:
    left_out = select("exclude", exclude)
    if only is None and not left_out:
        return None
    return (frozenset(OPS) if only is None else select("only", only)) - left_out


# The session of a `use()` inside compiled code, which counts nothing.
_UNCOUNTED = Session()


class use(ContextDecorator):
    """Run torch code on Triton kernels: ``with tritongrad.use(): ...`` or ``@tritongrad.use()``.

    Inside, calls of torch functions, methods and operators that tritongrad has an op for run on it,
    forward and backward; all others run on torch. Sessions nest; the innermost decides. It holds
    for the current thread.

    Args:
        only: names of the ops to use, one or several; None for all.
        exclude: names of ops to leave to torch.
        policy: "all", or "fastest" for those calls alone that were measured to be at least as fast
            as torch's on this GPU, in their dtype and around their size. On a GPU that nobody has
            measured it is "all", and the session says so. Under ``torch.compile`` it is "all".

    As a context manager it yields a session: ``.ran`` (Counter of op names), ``.fell_back``
    (Counter of (torch name, reason)), ``.launches`` (Triton kernels launched, those of the backward
    passes included), and a readable ``str()``.

    Raises:
        ValueError: a name in ``only`` or ``exclude`` that is no op, or no such policy.

    Under ``torch.utils.checkpoint`` call backward inside as well, or put ``use()`` inside the
    checkpointed function: what is computed again must be what was computed.
    """

    def __init__(
        self,
        only: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] = (),
        *,
        policy: str = "all",
    ) -> None:
        self._names = _selection(only, exclude)
        self._policy, self._told = choose(policy)
        # One `use()` object decorating a function is entered again by recursion, and by threads.
        self._open: dict[int, list[tuple[_Rerouting, Session | None]]] = {}
        self._traced: list[_Rerouting] = []

    def __enter__(self) -> Session:
        if torch.compiler.is_compiling():
            # A compiler traces this: it sees the mode; there is nothing to count.
            mode = _Rerouting(_UNCOUNTED, self._names)
            mode.__enter__()
            self._traced.append(mode)
            return _UNCOUNTED
        session = Session(local.session, self._names, self._told)
        mode = _Rerouting(session, self._names, self._policy)
        mode.__enter__()
        self._open.setdefault(threading.get_ident(), []).append((mode, local.session))
        local.session = session
        return session

    def __exit__(self, *exception: Any) -> None:
        if torch.compiler.is_compiling():
            self._traced.pop().__exit__(None, None, None)
            return
        mode, local.session = self._open[threading.get_ident()].pop()
        mode.__exit__(*exception)


_enabled = threading.local()


def enable(
    only: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    *,
    policy: str = "all",
) -> Session:
    """Reroute this thread's torch calls until ``disable()``. Returns the session.

    Takes the arguments of ``use``. Other threads are not affected: call it in each.

    Raises:
        RuntimeError: it is enabled in this thread already.
        ValueError: a name in ``only`` or ``exclude`` that is no op, or no such policy.
    """
    if getattr(_enabled, "context", None) is not None:
        raise RuntimeError("tritongrad is enabled in this thread already; call disable() first")
    context = use(only, exclude, policy=policy)
    session = context.__enter__()
    _enabled.context, _enabled.session = context, session
    return session


def disable() -> Session:
    """End what ``enable()`` began in this thread. Returns its session.

    Raises:
        RuntimeError: it is not enabled in this thread, or a ``use()`` opened since is still open.
    """
    context = getattr(_enabled, "context", None)
    if context is None:
        raise RuntimeError("tritongrad is not enabled in this thread; call enable() first")
    session: Session = _enabled.session
    if local.session is not session:
        raise RuntimeError("disable() inside a use() that was opened after enable()")
    context.__exit__(None, None, None)
    _enabled.context = _enabled.session = None
    return session
