"""``torch.nn.functional`` with our functions in place of those we have, and some that it lacks."""

from __future__ import annotations

from typing import Any

import torch

from .. import ops as ops
from ..extension import EXTENSIONS
from ..namespace import overlay

_lookup = overlay(torch.nn.functional, EXTENSIONS)


def __getattr__(name: str) -> Any:
    return _lookup(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.nn.functional), *EXTENSIONS})
