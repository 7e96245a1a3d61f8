"""``torch.nn`` with modules that run on our ops, and our functions in ``functional``.

Each module is a subclass of torch's, with its parameters, ``state_dict`` and signature: only
``forward`` differs, which runs inside ``use()``. So does what it contains, whoever wrote that.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..reroute import use
from . import functional as functional


@functools.cache
def _ours(theirs: Any) -> Any:
    """The subclass of one of torch's module classes whose ``forward`` runs on our ops."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with use():
            return theirs.forward(self, *args, **kwargs)

    functools.update_wrapper(forward, theirs.forward)
    name = theirs.__name__
    members = {"forward": forward, "__module__": __name__, "__doc__": theirs.__doc__}
    if getattr(theirs, "cls_to_become", None) is not None:
        # What a lazy module is from its first call on.
        members["cls_to_become"] = _ours(theirs.cls_to_become)
    return type(name, (theirs,), members)


def __getattr__(name: str) -> Any:
    value = getattr(torch.nn, name)
    if not isinstance(value, type) or not issubclass(value, torch.nn.Module):
        return value
    # A container that is not called (Module, ModuleList) has no forward of its own. A deprecated
    # class warns when a subclass is made.
    if value.forward is torch.nn.Module.forward or hasattr(value, "__deprecated__"):
        return value
    return _ours(getattr(torch.nn, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.nn)})
