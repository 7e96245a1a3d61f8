"""Random numbers: seeds from torch's generator, and in torch mathematics what kernels make of them.

A seed is a tensor of one int64 that torch draws on the device, for each call anew. So the default
generator advances and is what ``torch.manual_seed`` set and what a checkpoint brought back; nothing
is known to the host that a CUDA graph could keep; and inside ``torch.vmap`` torch decides whether
all samples have one seed, each its own (a tensor that is batched), or drawing is an error. It costs
a kernel of 8 bytes; reading the generator's state would not be right while a graph is captured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import philox as k

LANES, ROUNDS = k.LANES.value, k.ROUNDS.value
WORD = 2**32 - 1


def draw_seed(device: torch.device) -> Tensor:
    """A seed for one call, from the default generator of ``device``."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def limit(p: float) -> int:
    """The largest of the numbers of 32 bits that mean kept where ``p < 1`` is dropped: what is kept
    is off from 1 - p by at most 2**-33."""
    return max(round((1 - p) * 2**32), 1) - 1 - 2**31


def words(seed: Tensor, counter: Tensor) -> tuple[Tensor, ...]:
    """``kernels.philox.words``, each word an int64 from 0 to 2**32 - 1."""
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    c0, c1 = counter & WORD, (counter >> 32) & WORD
    c2 = c3 = torch.zeros_like(counter)
    for _ in range(ROUNDS):
        # The product wraps around in the sign alone, which the shift brings along.
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = ((b >> 32) & WORD) ^ c1 ^ k0, b & WORD
        c2, c3 = ((a >> 32) & WORD) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def keep(seed: Tensor, index: Tensor, limit: int) -> Tensor:
    """``kernels.philox.keep``, for tracers and comparisons."""
    lane = index % LANES
    found = words(seed, torch.div(index, 4 * LANES, rounding_mode="floor") * LANES + lane)
    number = torch.div(index, LANES, rounding_mode="floor") % 4
    word = torch.where(
        number < 2,
        torch.where(number == 0, found[0], found[1]),
        torch.where(number == 2, found[2], found[3]),
    )
    return torch.where(word > WORD // 2, word - 2**32, word) <= limit
