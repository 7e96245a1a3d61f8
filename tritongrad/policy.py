"""Which calls run on Triton under ``use(policy="fastest")``: those for which it was measured.

A table for each GPU says how many times as fast as torch each op is, by dtype and size. It is made
from the results of ``python -m compare bench`` by ``python -m compare report --table``.
"""

from __future__ import annotations

import bisect
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .op import Op, Tensors

DIRECTORY = Path(__file__).parent / "tables"

POLICIES = ("all", "fastest")

SLOWER = "not known to be as fast as torch at this size and dtype (policy)"
"""The reason of calls that the policy leaves to torch."""


def slug(name: str) -> str:
    """A GPU's name as that of a file: ``NVIDIA H200`` -> ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@dataclass(frozen=True)
class Policy:
    """What was measured on one GPU.

    Attributes:
        ratios: op -> dtype -> (elements of the largest tensor, torch's time in ours), by elements.
    """

    gpu: str
    ratios: dict[str, dict[str, list[tuple[int, float]]]]

    def allows(self, op: Op, tensors: Tensors) -> bool:
        """Whether a call of ``op`` is at least as fast on Triton, as far as that was measured.

        Between two sizes that were measured it must be at both, and beyond the last at that one.
        """
        largest = max((t for t in tensors if t is not None), key=torch.Tensor.numel, default=None)
        if largest is None:
            return False
        dtype = str(largest.dtype).removeprefix("torch.")
        known = self.ratios.get(op.name, {}).get(dtype, [])
        place = bisect.bisect_left(known, (largest.numel(), -1.0))
        if place < len(known) and known[place][0] == largest.numel():
            return known[place][1] >= 1.0
        beside = known[max(place - 1, 0) : place + 1]
        return bool(beside) and all(ratio >= 1.0 for _, ratio in beside)


def load(gpu: str) -> Policy | None:
    """The policy of a GPU; None if none was measured.

    Raises:
        ValueError: the table is not what ``compare report --table`` writes.
    """
    path = DIRECTORY / f"{slug(gpu)}.json"
    if not path.exists():
        return None
    table: Any = json.loads(path.read_text())
    try:
        ratios = {
            op: {
                dtype: sorted((int(n), float(r)) for n, r in sizes) for dtype, sizes in own.items()
            }
            for op, own in table["ops"].items()
        }
    except (KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"{path} is no table of measurements") from problem
    return Policy(table["gpu"], ratios)


def choose(name: str) -> tuple[Policy | None, str]:
    """The policy of this name on the current GPU, None for all calls; and what a session says.

    Raises:
        ValueError: there is no policy of this name.
    """
    if name not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(map(repr, POLICIES))}, got {name!r}")
    if name == "all":
        return None, ""
    if not torch.cuda.is_available():
        return None, 'policy "fastest": there is no GPU, so every op is used'
    gpu = torch.cuda.get_device_name()
    found = load(gpu)
    if found is None:
        return None, f'policy "fastest": nothing was measured on {gpu}, so every op is used'
    return found, f'policy "fastest": by what was measured on {gpu}'
