"""Which tensors our kernels take."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from . import runtime
from .op import Tensors, Unsupported

_dispatch_modes = torch._C._len_torch_dispatch_stack
_keys = torch._C._dispatch_keys
_unwrapped = torch._C._functorch.get_unwrapped
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_tracing = torch._C._is_tracing


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


def functionalizing() -> bool:
    """Whether ``torch.func.functionalize``, which refuses every autograd.Function, is one of the
    transforms around a call."""
    if not transforming():
        return False
    levels = torch._C._functorch.get_interpreter_stack() or ()
    kind = torch._C._functorch.TransformType.Functionalize
    return any(level.key() == kind for level in levels)


def memory(tensor: Tensor) -> Tensor:
    """What is under the wrappers that transforms put around a tensor."""
    while _is_wrapped(tensor):
        tensor = _unwrapped(tensor)
    return tensor


def admit(tensor: Tensor) -> None:
    """Raise Unsupported, with the reason, for a tensor that our kernels cannot take."""
    if type(tensor) in PLAIN_TYPES and _keys(tensor).raw_repr() in PLAIN_KEY_SETS:
        return
    if not isinstance(tensor, Tensor):
        raise Unsupported(f"a {type(tensor).__name__} in a tensor's place")
    if _is_wrapped(tensor) and not transforming():
        raise Unsupported("tensor of a transform that has ended")
    tensor = memory(tensor)
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


def launchable(tensors: Tensors) -> bool:
    """Whether our kernels may compute with ``tensors``: not under a tracer, which must see ATen
    operators, nor with anything but memory under its wrappers (zeros of forward mode)."""
    if _dispatch_modes() or _is_tracing() or functionalizing():
        return False
    return all(tensor is None or is_plain(memory(tensor)) for tensor in tensors)


def settle(tensor: Tensor) -> Tensor:
    """A gradient as memory that a kernel can read, if torch handed it over unevaluated."""
    if _is_wrapped(tensor):
        return tensor
    if tensor._is_zerotensor():
        return tensor.clone()
    return tensor.resolve_neg()
