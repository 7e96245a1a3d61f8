"""Functions of ours that torch has no name for, written in torch mathematics.

An op takes the place of a torch callable, which parity is measured against, which runs what the op
does not take, and which a compiler sees. Where torch has none, one declared here is that callable:
modes and tensor subclasses see its calls as they see those of torch's own functions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function

from .sampling import Sample, tensors

EXTENSIONS: dict[str, Callable[..., Any]] = {}
"""Those of ``tritongrad.nn.functional``, by name."""


def extension(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare a function of ``tritongrad.nn.functional``, the body of which is its definition.

    Raises:
        ValueError: its name is taken, here or in ``torch.nn.functional``.
    """
    name = function.__name__
    if name in EXTENSIONS or hasattr(torch.nn.functional, name):
        raise ValueError(f"torch.nn.functional or an extension has a {name!r} already")
    return _declared(function)


def extended(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare what ``tritongrad.nn.functional`` has in place of torch's function of the same name:
    with torch's parameters, and further ones by keyword alone, which torch's own does not take.

    Raises:
        ValueError: ``torch.nn.functional`` has no such function, or one of other parameters.
    """
    name = function.__name__
    own = list(inspect.signature(function).parameters.values())
    native = getattr(torch.nn.functional, name, None)
    theirs = [] if native is None else list(inspect.signature(native).parameters)
    further = own[len(theirs) :]
    if not theirs or [p.name for p in own[: len(theirs)]] != theirs:
        raise ValueError(f"torch.nn.functional has no {name!r} of these parameters")
    if any(p.kind is not p.KEYWORD_ONLY for p in further):
        raise ValueError(f"what torch's {name!r} does not take must be given by keyword")
    return _declared(function)


def _declared(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            given = tensors(Sample(args, kwargs))
            if has_torch_function(given):
                return handle_torch_function(call, given, *args, **kwargs)
        return function(*args, **kwargs)

    call.__module__ = "tritongrad.nn.functional"
    EXTENSIONS[function.__name__] = call
    return call
