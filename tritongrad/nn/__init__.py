"""``torch.nn`` with our functions in place of those we have in ``functional``."""

from __future__ import annotations

from typing import Any

import torch

from . import functional as functional


def __getattr__(name: str) -> Any:
    return getattr(torch.nn, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.nn)})
