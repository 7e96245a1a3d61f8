"""Launching attention: strides, blocks and grids for the value, the tangent and both gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import COMPUTE_DTYPE, encode
from ..kernels import attention as k
from ..kernels import attention_backward as kb
from ..kernels import attention_second as ks
from ..layout import (
    INT32_MAX,
    collapse,
    dense_strides,
    fastest_first,
    next_power_of_two,
    strides_as,
)
from ..runtime import launch_prepared
from .configurations import compute_capability
from .reduction import sum_to

MOST_HEAD_DIM = 256


class Options(NamedTuple):
    """What a call is beside its tensors.

    Attributes:
        scale: factor of the products, None for 1 / sqrt(head dimension).
        softcap: of the scores, None for none.
        down, up: how many keys before and after the one at its own place a query sees; None: all.
        dropout: probability.
        precision: "tf32" for products of float32 that may be rounded to it.
    """

    scale: float | None = None
    softcap: float | None = None
    down: int | None = None
    up: int | None = None
    dropout: float = 0.0
    precision: str = "ieee"


class Inputs(NamedTuple):
    """The tensors of a call: (..., heads, length, size) each of the first three, whose leading
    dimensions are equal but that keys and values may have fewer heads.

    Attributes:
        mask: broadcasts to (..., heads, queries, keys); bool, or added.
        sinks: (heads,) or with a batch in front, a logit each.
        slopes: the same, what each step between query and key takes from the score.
        cu_q, cu_k: where packed sequences begin, and the last ends.
        seed: one int64, with dropout.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    sinks: Tensor | None = None
    slopes: Tensor | None = None
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None
    seed: Tensor | None = None


DERIVED = 6
"""So many of the inputs have derivatives, the first ones."""


class Blocks(NamedTuple):
    """Queries and keys that a program holds and walks by, and its resources."""

    m: int
    n: int
    warps: int
    stages: int


_Rows = tuple[tuple[int, int, int, int], ...]

# Kernel set -> size class of the head -> blocks, for half precision. A program of queries keeps its
# accumulators (m by head dimension) and one block of pairs for each quantity that the formula has
# in registers, and `stages` copies of what it walks along in shared memory.
_HALF: dict[str, _Rows] = {
    # kernel set: m, n, warps, stages for heads up to 64, 128 and 256
    "forward": ((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
    "jvp": ((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 1)),
    "backward_q": ((128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2)),
    "backward_kv": ((64, 128, 8, 2), (32, 128, 8, 2), (32, 64, 8, 1)),
    "second_q": ((64, 64, 4, 2), (128, 32, 8, 1), (64, 16, 4, 1)),
    "second_kv": ((32, 64, 4, 2), (32, 128, 8, 1), (16, 64, 4, 1)),
    "mask": ((64, 64, 8, 1), (64, 64, 8, 1), (32, 32, 4, 1)),
}
# The fastest of those measured on an H200, causal or not, of 4096 queries and keys in bfloat16. A
# group of four warps multiplies 64 rows at a time there (wgmma), so that eight warps need 128: with
# fewer they took two to four times as long. What is loaded two steps ahead (three stages) hides
# behind the products wherever 227 KiB of shared memory have room for it. Up to 128, nothing spills
# in the first three sets; where that costs time, the next best.
_HOPPER: dict[str, _Rows] = {
    "forward": ((128, 64, 8, 3), (64, 64, 4, 3), (128, 32, 8, 3)),
    "jvp": ((64, 64, 4, 3), (128, 32, 8, 3), (128, 32, 8, 1)),
    "backward_q": ((64, 64, 4, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
    "backward_kv": ((64, 64, 4, 3), (32, 128, 8, 3), (32, 128, 8, 2)),
    "second_q": ((64, 64, 4, 2), (64, 32, 4, 2), (128, 16, 8, 1)),
    "second_kv": ((32, 64, 4, 3), (32, 128, 8, 2), (16, 64, 4, 2)),
    "mask": ((128, 32, 8, 1), (128, 32, 8, 1), (32, 32, 4, 1)),
}
# What else holds, and the blocks it calls for instead.
_CASES: dict[str, dict[str, _Rows]] = {
    # Scores are products and nothing else, which leaves registers for more pairs at a time.
    "plain": {
        "backward_kv": ((64, 64, 4, 3), (64, 128, 8, 2), (32, 128, 8, 2)),
        "second_kv": ((64, 64, 4, 2), (32, 128, 8, 2), (16, 64, 4, 2)),
    },
    # Pairs are dropped: random numbers take registers.
    "random": {
        "forward": ((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 3)),
        "jvp": ((128, 32, 8, 3), (128, 32, 8, 3), (128, 32, 8, 1)),
        "backward_q": ((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
        "backward_kv": ((64, 128, 8, 3), (32, 128, 8, 3), (32, 128, 8, 2)),
        "second_q": ((64, 32, 4, 2), (64, 32, 4, 2), (128, 16, 8, 1)),
    },
    # Heads end within a block: so do the masks of what is loaded.
    "ends": {"jvp": ((128, 32, 8, 3), (128, 32, 8, 3), (128, 32, 8, 1))},
}
# No tensor core multiplies float32 exactly, and registers hold half or a quarter as many: blocks of
# 16 by 16, or 32 by 32 where nothing spills, and twice the warps where four spill more, counted on
# sm_90. Above 64, kernels load again in each step what they would hold (`again` in
# kernels/attention.py). What spills all the same is in tests/test_attention_code.py.
_SQUARE, _FEW, _MANY = (32, 32, 4, 1), (16, 16, 4, 1), (16, 16, 8, 1)
_FLOAT64: dict[str, _Rows] = {
    **dict.fromkeys(_HALF, (_FEW, _FEW, _MANY)),
    **dict.fromkeys(("second_q", "second_kv", "mask"), (_FEW, _MANY, _MANY)),
}
_FLOAT32: dict[str, _Rows] = {
    "forward": (_SQUARE, _MANY, _MANY),
    "backward_kv": (_SQUARE, _FEW, _MANY),
    **dict.fromkeys(("backward_q", "mask"), (_SQUARE, _MANY, _MANY)),
    **dict.fromkeys(("jvp", "second_kv"), (_FEW, _MANY, _MANY)),
    "second_q": (_MANY, _MANY, _MANY),
}


def has_wgmma() -> bool:
    """Whether the GPU has Hopper's tensor cores; without one, what is compiled is for that."""
    return torch.version.hip is None and compute_capability()[0] in (0, 9)


# AMD's have 64 KiB of shared memory for a program: two copies ahead are too many there.
MOST_STAGES = 2 if torch.version.hip else 4

# Programs that keep a GPU busy: with fewer, smaller blocks.
FILL = 128


def blocks(
    kind: str,
    dtype: torch.dtype,
    size: int,
    lengths: tuple[int, int],
    many: int,
    case: str | None = None,
) -> Blocks:
    """Blocks for heads of ``size``, ``lengths`` of queries and keys, and ``many`` heads in all, in
    one of ``_CASES``."""
    rows = {torch.float64: _FLOAT64, torch.float32: _FLOAT32}.get(dtype, _HALF)[kind]
    hopper = dtype.itemsize == 2 and has_wgmma()
    if hopper:
        rows = _CASES.get(case or "", {}).get(kind, _HOPPER[kind])
    found = Blocks(*rows[(size > 64) + (size > 128)])
    own, other = (found.n, found.m) if kind.endswith("kv") else (found.m, found.n)
    own_length, other_length = reversed(lengths) if kind.endswith("kv") else lengths
    while own > 16 and (many * -(-own_length // own) < FILL or own >= 2 * own_length):
        own //= 2
    # What is walked along in at least two steps, so that the second is loaded during the first.
    other = min(other, max(next_power_of_two(max(other_length, 1)) // 2, 16))
    m, n = (other, own) if kind.endswith("kv") else (own, other)
    whole = own >= 128 if hopper else (m, n) == (found.m, found.n) or m * n >= 64 * 64
    return Blocks(m, n, found.warps if whole else 4, min(found.stages, MOST_STAGES))


class Problem:
    """A call as its kernels see it: where its operands lie, and what else they are told."""

    def __init__(
        self,
        options: Options,
        inputs: Inputs,
        matrices: Sequence[Tensor | None],
        masks: Sequence[Tensor | None] = (),
        numbers: Sequence[Tensor | None] = (),
    ) -> None:
        """``matrices`` are further operands of the rank of q, ``masks`` such that broadcast, and
        ``numbers`` such with one for each head."""
        q, keys, v = inputs[:3]
        *batch, self.heads, self.length, size = q.shape
        self.key_heads, self.keys, value_size = keys.shape[-3], keys.shape[-2], v.shape[-1]
        self.count, self.dtype = math.prod(batch), q.dtype
        self.inputs, self.options = inputs, options
        self.pairs: tuple[int, ...] = (*batch, self.heads, self.length, self.keys)
        strides = {id(t): t.stride() for t in (q, keys, v, *matrices) if t is not None}
        for t in (inputs.mask, *masks):
            if t is not None:
                strides[id(t)] = strides_as(t.shape, t.stride(), self.pairs)
        for t in (inputs.sinks, inputs.slopes, *numbers):
            if t is not None:
                each = (*batch, self.heads, 1, 1)
                strides[id(t)] = strides_as((*t.shape, 1, 1), (*t.stride(), 0, 0), each)
        outer = range(len(batch) - 1, -1, -1)
        self.batch, walks = collapse(batch, [s[:-3] for s in strides.values()], outer)
        self.places: dict[int, tuple[Any, ...]] = {
            key: (tuple(walk), *own[-3:])
            for (key, own), walk in zip(strides.items(), walks, strict=True)
        }
        longest = max(self.length, self.keys) + 256
        reach = max(longest * max(s[-2], s[-1]) for s in strides.values())
        self.wide = 2 * reach > INT32_MAX
        self.blocks_d = max(next_power_of_two(size), 16), max(next_power_of_two(value_size), 16)
        self.ends_d = tuple(
            [
                None if n == block else n
                for n, block in zip((size, value_size), self.blocks_d, strict=True)
            ]
        )
        compute = COMPUTE_DTYPE[q.dtype]
        scale = size**-0.5 if options.scale is None else options.scale
        self.about = (
            tuple(self.batch), self.heads, self.heads // max(self.key_heads, 1),
            self.length, self.keys, *self.ends_d, encode(scale, compute),
            None if options.softcap is None else encode(options.softcap, compute),
            options.down, options.up, encode(options.dropout, compute),
        )  # fmt: skip
        # Then the largest product is the largest score, and may be looked for in its place.
        plain = inputs.mask is None and inputs.slopes is None and options.softcap is None
        self.unscaled = q.dtype.itemsize == 2 and plain and scale > 0
        tf32 = q.dtype is torch.float32 and options.precision == "tf32"
        self.precision = "tf32" if tf32 else "ieee"

    def place(self, t: Tensor | None) -> Any:
        """An operand as kernels take it."""
        return None if t is None else (t, *self.places[id(t)])

    def run(self, kind: str, kernel: Any, before: tuple[Any, ...], **further: Any) -> None:
        """Launch a kernel that walks along the other side: of keys, if its kind says so."""
        inputs, by_key = self.inputs, kind.endswith("kv")
        size = max(self.blocks_d)
        # Walking along several heads, or between two bounds, takes registers, too.
        bounds = self.options.down, self.options.up, inputs.cu_q
        case = None
        if inputs.seed is not None:
            case = "random"
        elif self.ends_d != (None, None):
            case = "ends"
        elif self.unscaled and self.heads == self.key_heads and bounds.count(None) >= 2:
            case = "plain"
        lengths, many = (self.length, self.keys), self.count * self.heads
        found = blocks(kind, self.dtype, size, lengths, many, case)
        if kind == "backward_kv" and case == "random" and self.options.softcap is not None:
            found = found._replace(m=min(found.m, 32))
        segments = _segments(inputs, by_key, self.keys if by_key else self.length)
        numbers = map(self.place, (inputs.slopes, inputs.sinks))
        extras = (self.place(inputs.mask), *numbers, inputs.seed, segments)
        grid = further.pop("grid", None)
        if grid is not None:
            programs = grid(found)
        elif by_key:
            programs = self.count * self.key_heads * -(-self.keys // found.n)
        else:
            programs = self.count * self.heads * -(-self.length // found.m)
        if programs == 0:
            return
        meta = {
            **further,
            "PRECISION": self.precision,
            "FAST": self.dtype.itemsize == 2,
            "UNSCALED": self.unscaled,
            "WIDE": self.wide,
            "BLOCK_M": found.m,
            "BLOCK_N": found.n,
            "BLOCK_D": self.blocks_d[0],
            "BLOCK_DV": self.blocks_d[1],
            "num_warps": found.warps,
            "num_stages": found.stages,
        }
        args = (*before[:-1], extras, self.about, *before[-1])
        launch_prepared(kernel, (programs,), args, inputs.q, meta)


def _segments(inputs: Inputs, by_key: bool, length: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Of each query (or key) of packed sequences: where its own begins and ends among the others,
    and how much later it is there. What no sequence holds sees nothing."""
    if inputs.cu_q is None:
        return None
    assert inputs.cu_k is not None
    own, others = (inputs.cu_k, inputs.cu_q) if by_key else (inputs.cu_q, inputs.cu_k)
    last = own.numel() - 1
    place = torch.arange(length, device=own.device, dtype=own.dtype)
    number = torch.searchsorted(own, place, right=True) - 1
    held = (number >= 0) & (number < last)
    number = number.clamp(0, max(last - 1, 0))
    starts, ends = others[number], others[(number + 1).clamp(max=last)]
    shifts = starts - own[number]
    ends = torch.where(held, ends, starts)
    # Whatever they hold, nothing is read out of bounds.
    most = inputs.q.shape[-2] if by_key else inputs.k.shape[-2]
    starts, ends = starts.clamp(0, most), ends.clamp(0, most)
    return starts.int(), ends.int(), shifts.int()


def _like(t: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Dense memory for rows of ``size``, one after the other in the order in which those of ``t``
    lie: what was transposed to put heads in front is written as it was."""
    shape = (*t.shape[:-1], size)
    last = len(shape) - 1
    order = [last, *[d for d in fastest_first(t.shape, [t.stride()]) if d != last]]
    return t.new_empty_strided(shape, dense_strides(shape, order), dtype=dtype)


def _ranked(t: Tensor | None) -> Tensor | None:
    """A single matrix as one head."""
    return t.unsqueeze(0) if t is not None and t.dim() == 2 else t


def _settled(inputs: Inputs, *others: Tensor | None) -> tuple[Inputs, list[Any]]:
    """Everything with a dimension of heads."""
    q, keys, v, *rest = inputs
    if q.dim() > 2:
        return inputs, list(others)
    return Inputs(*[t.unsqueeze(0) for t in (q, keys, v)], *rest), list(map(_ranked, others))


def _rows_like(q: Tensor) -> Tensor:
    """Memory for a number of each query."""
    return q.new_empty(q.shape[:-1], dtype=COMPUTE_DTYPE[q.dtype])


def allocate(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the result or its tangent, and for a number of each query."""
    return _like(q, v.shape[-1], q.dtype), _rows_like(q)


def forward(options: Options, given: Inputs) -> tuple[Tensor, Tensor]:
    """The result, and lse of each query."""
    out, lse = allocate(given.q, given.v)
    inputs, (o,) = _settled(given, out)
    problem = Problem(options, inputs, (o,))
    operands = map(problem.place, inputs[:3])
    problem.run("forward", k.attention_fwd, (problem.place(o), lse, *operands, ()))
    return out, lse


class Tangents(NamedTuple):
    """Tangents of the inputs that have derivatives, None where they are 0."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    mask: Tensor | None
    sinks: Tensor | None
    slopes: Tensor | None


def jvp(
    options: Options, given: Inputs, tangents: Tangents, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Tangents of the result and of lse."""
    tangent, mu = allocate(given.q, given.v)
    inputs, others = _settled(given, *tangents[:3], out, tangent)
    problem = Problem(options, inputs, others, (tangents.mask,), tangents[4:])
    *t, o, found = map(problem.place, others)
    t += map(problem.place, tangents[3:])
    operands = map(problem.place, inputs[:3])
    before = (found, mu, *operands, tuple(t), o, lse.contiguous(), ())
    problem.run("jvp", k.attention_jvp, before)
    return tangent, mu


Gradients = list[Tensor | None]


def backward(
    options: Options,
    given: Inputs,
    needs: Sequence[bool],
    g: Tensor | None,
    h: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> Gradients:
    """Gradients of the inputs that need them, for those of the result and of lse."""
    return _gradients(options, given, needs, g, h, out, lse, None, None, None)


def second(
    options: Options,
    given: Inputs,
    needs: Sequence[bool],
    g: Tensor | None,
    h: Tensor | None,
    out: Tensor,
    lse: Tensor,
    tangents: Tangents,
    tangent: Tensor,
    mu: Tensor,
) -> Gradients:
    """Gradients of <g, tangent> + <h, mu>, what ``jvp`` returns, along its primal inputs."""
    return _gradients(options, given, needs, g, h, out, lse, tangents, tangent, mu)


def _gradients(
    options: Options,
    given: Inputs,
    needs: Sequence[bool],
    g: Tensor | None,
    h: Tensor | None,
    out: Tensor,
    lse: Tensor,
    tangents: Tangents | None,
    tangent: Tensor | None,
    mu: Tensor | None,
) -> Gradients:
    gradients = [
        _like(x, x.shape[-1], x.dtype) if need else None
        for x, need in zip(given[:3], needs, strict=False)
    ]
    mask = given.mask
    dmask = mask.new_empty(mask.shape) if needs[3] and mask is not None else None
    numbers = [_rows_like(given.q) if need else None for need in needs[4:6]]
    if 0 in given.q.shape[:-1]:
        for t in (*gradients, dmask, *numbers):
            if t is not None:
                t.zero_()
    else:
        if g is None:
            g = out.new_zeros(()).expand(out.shape)
        along = tangents or Tangents(*[None] * DERIVED)
        inputs, others = _settled(given, *gradients, *along[:3], g, out, tangent)
        masks = (along.mask, dmask)
        problem = Problem(options, inputs, others, masks, along[4:])
        _launch(problem, others, masks, along[4:], numbers, h, lse, mu)
    dq, dk, dv = gradients
    for at, (t, of) in enumerate(zip(numbers, (given.sinks, given.slopes), strict=True)):
        if t is not None:
            assert of is not None
            numbers[at] = sum_to(t, torch.Size((*of.shape, 1)), of.dtype).squeeze(-1)
    return [dq, dk, dv, dmask, *numbers]


def _launch(
    problem: Problem,
    matrices: Sequence[Tensor | None],
    masks: tuple[Tensor | None, Tensor | None],
    along: Sequence[Tensor | None],
    numbers: Sequence[Tensor | None],
    h: Tensor | None,
    lse: Tensor,
    mu: Tensor | None,
) -> None:
    """Launch the passes that gradients with memory need. ``along`` are tangents of sinks and
    slopes, ``numbers`` each query's part in their gradients."""
    place = problem.place
    dq, dk, dv, *t, g, out, tangent = map(place, matrices)
    tmask, dmask = map(place, masks)
    tsinks, tslopes = map(place, along)
    dsinks, dslopes = numbers
    q = problem.inputs.q
    lse = lse.contiguous()
    mu = mu if mu is None else mu.contiguous()
    shift, delta = _rows_like(q), _rows_like(q)
    omega = None if tangent is None else _rows_like(q)
    block = 16 if problem.blocks_d[1] > 64 else 32
    args = (
        shift, delta, omega, dsinks, g, h if h is None else h.contiguous(), out, tangent, lse, mu,
        place(problem.inputs.sinks), tsinks,
        tuple(problem.batch), problem.heads, problem.length, problem.ends_d[1],
    )  # fmt: skip
    meta = {
        "FAST": problem.dtype.itemsize == 2,
        "WIDE": problem.wide,
        "BLOCK_M": block,
        "BLOCK_DV": problem.blocks_d[1],
    }
    programs = problem.count * problem.heads * -(-problem.length // block)
    launch_prepared(kb.attention_rows, (programs,), args, delta, meta)

    operands = (g, *map(place, problem.inputs[:3]))
    rows, tangents = (shift, delta, mu, omega), (*t, tmask, tsinks, tslopes)
    if tangent is None:
        order, by_query, by_key = "backward", kb.attention_bwd_q, kb.attention_bwd_kv
        middle = (*operands, rows)
    else:
        order, by_query, by_key = "second", ks.attention_jvp_bwd_q, ks.attention_jvp_bwd_kv
        middle = (*operands, tangents, rows)
    if dq is not None or dslopes is not None:
        problem.run(f"{order}_q", by_query, (dq, dslopes, *middle, ()))
    # Two accumulators of 256 columns are more than registers hold: twice the scores cost less.
    apart = max(problem.blocks_d) > 128
    for of_k, of_v in ((dk, None), (None, dv)) if apart else ((dk, dv),):
        if of_k is not None or of_v is not None:
            shared = problem.heads != problem.key_heads
            problem.run(f"{order}_kv", by_key, (of_k, of_v, *middle, ()), SHARED=shared)
    if masks[1] is not None:
        _mask_gradient(problem, masks[1], (dmask, *operands, tangents, rows))


def _mask_gradient(problem: Problem, dmask: Tensor, before: tuple[Any, ...]) -> None:
    walk = problem.places[id(dmask)][0]
    # By shape, not by what the memory is: the gradient is dense, and of stride 0 where shared.
    pairs = list(problem.pairs)
    own = [1] * (len(pairs) - dmask.dim()) + list(dmask.shape)
    shared = [a == 1 != b for a, b in zip(own[-3:], pairs[-3:], strict=True)]
    batch = list(zip(walk, problem.batch, strict=True))
    batch_shared = tuple([step == 0 and n != 1 for step, n in batch])
    shared_by = math.prod([n for step, n in batch if step == 0])
    own_batch = problem.count // max(shared_by, 1)
    if shared[0]:
        shared_by *= problem.heads
    own_heads, own_rows, own_columns = own[-3:]
    problem.run(
        "mask", kb.attention_bwd_mask, (*before, (own_heads, own_rows, own_columns, shared_by)),
        SHARED_BATCH=batch_shared, SHARED_HEADS=shared[0], SHARED_L=shared[1], SHARED_S=shared[2],
        grid=lambda b: own_batch * own_heads * -(-own_rows // b.m) * -(-own_columns // b.n),
    )  # fmt: skip


def keep(probability: float, seed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The factors that dropout has in the kernels, of pairs of ``shape``."""
    found = torch.empty(shape, dtype=dtype, device=seed.device)
    (rows, columns), block = shape[-2:], 32
    many = math.prod(shape[:-2]) * -(-rows // block) * -(-columns // block)
    if many:
        args = (found, seed, rows, columns, encode(probability, dtype))
        launch_prepared(k.attention_keep, (many,), args, seed, {"BLOCK_M": block, "BLOCK_N": block})
    return found
