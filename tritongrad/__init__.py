"""PyTorch code on hand-written Triton kernels, forward and backward, every derivative included.

``with tritongrad.use(): ...`` around unmodified torch code, ``tritongrad.tanh(x)`` for one call, or
``import tritongrad as torch`` for torch's whole namespace with our functions where we have them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

# In a checkout the kernels lie beside this package, and setuptools maps them into it when it is
# installed; without an install, from the root of the checkout, this does.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

from . import runtime  # isort: skip  (settles the interpreter before triton is imported)
import torch

from . import linalg, nn, ops, special, tuning
from .graph import graph
from .namespace import overlay
from .op import OPS
from .reroute import disable, enable, use
from .runtime import Session
from .tuning import tune

__version__ = "0.1.0"

__all__ = [
    "OPS",
    "Session",
    "disable",
    "enable",
    "graph",
    "linalg",
    "nn",
    "ops",
    "runtime",
    "special",
    "tune",
    "tuning",
    "use",
]

_lookup = overlay(torch)


def __getattr__(name: str) -> Any:
    return _lookup(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch)})
