"""Functions of ours that torch has no name for, written in torch mathematics.

An op takes the place of a torch callable, which parity is measured against, which runs what the op
does not take, and which a compiler sees. Where torch has none, one declared here is that callable:
modes and tensor subclasses see its calls as they see those of torch's own functions.
"""

from __future__ import annotations

import functools
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

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            given = tensors(Sample(args, kwargs))
            if has_torch_function(given):
                return handle_torch_function(call, given, *args, **kwargs)
        return function(*args, **kwargs)

    call.__module__ = "tritongrad.nn.functional"
    EXTENSIONS[name] = call
    return call
