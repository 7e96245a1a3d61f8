"""``torch.nn.functional`` with our functions in place of those we have."""

from __future__ import annotations

from typing import Any

import torch

from .. import ops as ops
from ..namespace import overlay

_lookup = overlay(torch.nn.functional)


def __getattr__(name: str) -> Any:
    return _lookup(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.nn.functional)})
