"""torch's namespaces with our functions in place of those we have."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from .dispatch import entry
from .extension import EXTENSIONS
from .op import TARGETS


def public(func: Callable[..., Any]) -> Callable[..., Any]:
    """The function that runs ``func``, torch's or an extension, on the op that replaces it."""
    op, bind = TARGETS[func]
    function: Any = entry(op, bind, func)
    function.__name__ = function.__qualname__ = func.__name__
    function.__module__ = "tritongrad"
    function.__signature__ = inspect.signature(bind)
    order = "any" if op.max_order is None else str(op.max_order)
    parts = [f"Derivative: {op.formula}, to {order} order ({op.sources})."] * op.differentiable
    parts += [f"Not torch's on purpose: {op.differs}"] * bool(op.differs)
    contract = "\n".join(parts)
    documentation = inspect.getdoc(func) or ""
    if EXTENSIONS.get(func.__name__) is func:
        function.__doc__ = (
            f"{documentation}\n\n{contract}\n"
            "dtypes: float64, float32, float16, bfloat16 on Triton; other calls run on torch."
        )
    else:
        function.__doc__ = (
            f"``{func.__name__}`` on Triton kernels; arguments, result and errors as torch's.\n\n"
            f"{contract}\n"
            "dtypes: float64, float32, float16, bfloat16; other calls run on torch.\n\n"
            f"torch's documentation:\n\n{documentation}"
        )
    return function


def overlay(
    module: ModuleType, extensions: Mapping[str, Callable[..., Any]] | None = None
) -> Callable[[str], Any]:
    """A module ``__getattr__``: names of ``module``, ours where an op replaces them, and those of
    functions that it lacks."""
    further = {} if extensions is None else extensions

    @functools.cache
    def ours(name: str) -> Callable[..., Any] | None:
        try:
            func = further[name] if name in further else getattr(module, name)
            return public(func) if func in TARGETS else None
        except TypeError:  # not hashable, so no function
            return None

    def lookup(name: str) -> Any:
        # Not cached for names that are torch's: some of them change (torch.backends settings).
        value = further[name] if name in further else getattr(module, name)
        return ours(name) or value

    return lookup
