"""Calls like an earlier one: their arguments are recognised in one check, not read again.

Most calls of a program repeat: tensors of the dtypes, sizes, strides and devices that they had the
last time, and the same numbers beside them. torch's own guards (those of ``torch.compile``) compare
all of that in 0.2 us for all tensors together, where ``bind`` takes ten times as long. They compare
dispatch keys too, under the thread's own state, so that neither a tensor that is not plain memory
nor a call under a transform, a tracer, a dispatch mode or autocast passes for what was remembered
outside.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .admission import PLAIN_TYPES, is_plain, transforming
from .dtypes import FLOATING
from .op import Bind, Tensors

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # not part of torch's public interface: without it, every call is read
    TensorGuards = None  # type: ignore[assignment, misc]

MOST = 1024
"""Calls remembered for each signature of an op."""

# Two values of these types that are equal mean the same.
_VALUES = frozenset((int, bool, str, type(None), torch.dtype))

Ambient = Callable[[], Any]
Pick = Callable[[list[Any]], Tensors]
Recognised = tuple[Any, Any, Any]

_UNREADABLE: Recognised = (None, None, None)
_grad_enabled = torch.is_grad_enabled
_any_autocast = torch._C._is_any_autocast_enabled


class Known(NamedTuple):
    """What a call was read as.

    Attributes:
        same: whether tensors are like those of the call.
        pick: the tensors that it was bound to, of its own.
        state, before: the ambient state, and what it was.
        asks: whether a derivative is to be recorded, as far as torch's grad mode is concerned.
        plain: whether autocast was off. Then it is for whatever is recognised, for it changes the
            dispatch keys of tensors that it casts.
    """

    same: Callable[..., bool]
    pick: Pick
    params: Any
    state: Ambient | None
    before: Any
    asks: bool
    plain: bool


def _described(value: Any, tensors: list[Any], key: list[Any]) -> bool:
    """Whether an argument that is neither a tensor nor one of ``_VALUES`` can be compared with an
    earlier one; if so, what it is goes to ``key``, and the tensors in it to ``tensors``."""
    kind = type(value)
    if kind is float:
        key.append(kind)
        key.append(value or str(value))  # 0.0 == -0.0
        return True
    if kind is not tuple and kind is not list and kind is not torch.Size:
        return False
    key.append(kind)
    key.append(len(value))
    for part in value:
        own = type(part)
        if own in PLAIN_TYPES:
            key.append(own)
            tensors.append(part)
        elif own in _VALUES:
            key.append(own)  # True is not 1
            key.append(part)
        elif not _described(part, tensors, key):
            return False
    return True


def _own(value: Any) -> Any:
    """``value`` with lists of its own: what was read of a list may be kept, and the caller change
    his."""
    kind = type(value)
    return kind(map(_own, value)) if kind is list or kind is tuple else value


_remembered: list[dict[Any, Known]] = []


def forget() -> None:
    """Read each call anew from here on: what their launches depend on has changed."""
    for calls in _remembered:
        calls.clear()


def remembering(
    bind: Bind, ambient: Ambient | None, prepare: Callable[..., Any] | None = None
) -> Bind:
    """``bind``, which remembers what calls were read as: the last of each choice of shapes,
    strides, dtypes and other arguments.

    Args:
        ambient: what ``bind`` depends on beside its arguments. On tensors' values it must not,
            unless it puts others in their place.
        prepare: ``(params, *tensors) -> params`` that are remembered in the place of those.
    """
    if TensorGuards is None:
        return bind
    known: dict[Any, Known] = {}  # of signature and forms
    latest: dict[Any, Known] = {}  # of signature
    _remembered.extend((known, latest))

    def recognise(args: tuple, kwargs: dict[str, Any], plain: bool = True) -> Recognised:
        """The tensors and parameters that the call is bound to, and whether it asks for a
        derivative; or None, the call's signature and its tensors, as far as there is one.

        Args:
            plain: only what was remembered outside of autocast. Then this alone says that neither
                a transform nor autocast has a part in the call. Of a tracer it does not.
        """
        tensors: list[Any] = []
        key: list[Any] = [len(args), _grad_enabled()]
        for value in args if not kwargs else (*args, *kwargs, *kwargs.values()):
            kind = type(value)
            if kind in PLAIN_TYPES:
                key.append(kind)
                tensors.append(value)
            elif kind in _VALUES:
                key.append(kind)
                key.append(value)
            elif not _described(value, tensors, key):
                return _UNREADABLE
        signature = tuple(key)
        found = latest.get(signature)
        if found is None:
            return None, signature, tensors
        if not found.same(*tensors):
            # The latest forms are the likeliest, and sooner compared than looked up.
            found = known.get((signature, _forms(tensors)))
            if found is None or not found.same(*tensors):
                return None, signature, tensors
            latest[signature] = found
        if plain > found.plain or (found.state is not None and found.state() != found.before):
            return None, signature, tensors
        tensors.append(None)
        return found.pick(tensors), found.params, found.asks

    @functools.wraps(bind)
    def recall(*args: Any, **kwargs: Any) -> tuple[Tensors, Any]:
        recognised, signature, tensors = recognise(args, kwargs, False)
        if recognised is not None:
            return recognised, signature
        args, kwargs = _own(args), {name: _own(value) for name, value in kwargs.items()}
        bound, params = bind(*args, **kwargs)
        if not tensors or transforming():  # by the tensors alone is the thread's state known
            return bound, params
        forms, order = _forms(tensors), _order(tensors, bound)
        if forms is None or order is None:
            return bound, params
        if len(known) >= MOST:
            known.clear()
            latest.clear()
        if prepare is not None:
            params = prepare(params, *bound)
        state = ambient if all(t.dtype in FLOATING for t in tensors) else _state_of(ambient)
        guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        asks = _grad_enabled() and any(t is not None and t.requires_grad for t in bound)
        found = Known(
            guards.check, order, params, state, state and state(), asks, not _any_autocast()
        )
        known[signature, forms] = latest[signature] = found
        return bound, params

    recall.recognise = recognise  # type: ignore[attr-defined]
    return recall


def _forms(tensors: list[Any]) -> Any:
    """What calls of one signature differ in: cheaper to look up than to read the call again."""
    try:
        return tuple([(t.shape, t.stride(), t.dtype, t.requires_grad) for t in tensors])
    except RuntimeError:  # a nested tensor has no shape, a sparse one no strides
        return None


def _order(tensors: list[Any], bound: Tensors) -> Pick | None:
    """How to put the tensors of a call, with a None after them, in the order that it was bound to,
    those that it was bound to a reshaped view of as such. None if one was replaced otherwise, left
    out, or stands in two places: of which of the two, the next call's could not be told."""
    count = len(tensors)
    places: list[int] = []
    sources: list[int] = []
    views: list[tuple[int, torch.Size]] = []
    for t in bound:
        if t is None:
            places.append(count)
            continue
        itself = [i for i, own in enumerate(tensors) if own is t]
        found = itself or [i for i, own in enumerate(tensors) if _is_reshaped(t, own)]
        if len(found) != 1:
            return None
        sources += found
        places += itself or [count + 1 + len(views)]
        if not itself:
            views.append((found[0], t.shape))
    if sorted(sources) != list(range(count)):
        return None
    if len(places) == 1:
        (place,) = places
        pick: Pick = lambda tensors: (tensors[place],)  # noqa: E731
    else:
        pick = operator.itemgetter(*places)
    return _viewing(views, pick) if views else pick


def _viewing(views: list[tuple[int, torch.Size]], pick: Pick) -> Pick:
    def reshape_and_pick(tensors: list[Any]) -> Tensors:
        tensors += [tensors[i].view(shape) for i, shape in views]
        return pick(tensors)

    return reshape_and_pick


def _is_reshaped(view: Tensor, tensor: Tensor) -> bool:
    """Whether ``view`` is what ``tensor.view`` of its shape is, of which gradients flow back as
    far."""
    if not is_plain(view) or not is_plain(tensor) or forward_ad._current_level >= 0:
        return False
    if view.requires_grad != tensor.requires_grad:
        return False
    if view.dtype is not tensor.dtype or view.data_ptr() != tensor.data_ptr():
        return False
    try:
        own = tensor.view(view.shape)
    except RuntimeError:
        return False
    steps = zip(view.shape, view.stride(), own.stride(), strict=True)
    return all(a == b for n, a, b in steps if n > 1)


def _state_of(ambient: Ambient | None) -> Ambient:
    """``ambient`` with the dtype that integers are converted to."""
    if ambient is None:
        return torch.get_default_dtype
    return lambda: (ambient(), torch.get_default_dtype())
