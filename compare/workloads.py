"""What ``compare bench`` runs an op on: its samples, at the sizes that users have.

No op is listed. The sizes of a sample are roles: a row's length, how many rows, a sequence's
length, a batch. A tensor's dimension keeps its role wherever its size appears (the classes of the
logits are the classes of the weight), and each role is given a size. Which roles there are follows
from the sample's rank and from whether torch computes it by matrix products. An op that this does
not serve has ``Op.bench``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tritongrad.op import Op
from tritongrad.sampling import Random, Sample, clone, tensors


class Size(NamedTuple):
    """A size to measure at, for each shape of op there is.

    Attributes:
        name: in results, the elements of the largest tensor.
        elements: of the largest tensor, where memory is the limit.
        columns: length of a row.
        side: of a square matrix, where arithmetic is the limit.
        length: of a sequence, where it is attention.
    """

    name: str
    elements: int
    columns: int
    side: int
    length: int


SIZES: dict[str, Size] = {
    size.name: size
    for size in (
        Size("2^7", 2**7, 2**7, 2**6, 2**7),
        Size("2^12", 2**12, 2**9, 2**8, 2**9),
        Size("2^16", 2**16, 2**10, 2**9, 2**10),
        Size("2^20", 2**20, 2**11, 2**10, 2**11),
        Size("2^24", 2**24, 2**12, 2**11, 2**12),
        Size("2^26", 2**26, 2**13, 2**12, 2**13),
        Size("2^28", 2**28, 2**15, 2**13, 2**14),
        Size("2^30", 2**30, 2**18, 2**14, 2**15),
    )
}
"""From where a launch is all to gigabytes; rows from a small hidden size to a vocabulary."""

ROWS: dict[str, Size] = {
    size.name: size
    for size in (
        Size(f"2^26 x {columns}", 2**26, columns, 0, 0)
        for columns in (512, 1024, 2048, 4096, 16384, 32768, 65536, 131072)
    )
}
"""For functions of rows: other lengths of a row, with as many elements."""

QUICK = ("2^20", "2^26")
"""Sizes of the quick suite: one that fits into the cache, one that does not."""

HEAD, HEADS, TOKENS = 128, 16, 2**14
"""Of attention: the dimension of a head, heads, and tokens in all sequences of a batch together."""


class Unscalable(Exception):
    """No sample of the op can be brought to a size; the message says why not."""


@dataclass(frozen=True)
class Recipe:
    """A sample of an op, and how it is brought to sizes.

    Attributes:
        index: which of ``op.samples``.
        kind: "pointwise", "rows", "matrix" (by products of matrices), "heads" (such of rank 4).
        roles: size in the sample -> its place, counted from the end, in the largest tensor.
        rank: of the largest tensor.
        lead: product of its dimensions before the last two.
        numbers: whether sizes among the arguments (``normalized_shape``) change with the tensors'.
    """

    index: int
    kind: str
    roles: dict[int, int]
    rank: int
    lead: int
    numbers: bool


class Scaling:
    """Makes the tensors of a sample: as ``Random`` does, until it is given ``sizes``.

    From then on they lie on ``device``, in the sizes that ``sizes`` answers for a sample's own, and
    are normal random numbers where the op is defined everywhere.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> None:
        self.dtype = dtype
        self.device = torch.device(device)
        self.seed = seed
        self.sizes: Callable[[int, int], int] | None = None
        self._small = Random(dtype)
        self._generator: torch.Generator | None = None

    def __call__(
        self,
        *shape: int,
        low: float = -2.0,
        high: float = 2.0,
        dtype: torch.dtype | None = None,
        requires_grad: bool = True,
    ) -> Tensor:
        if self.sizes is None:
            return self._small(*shape, low=low, high=high, dtype=dtype, requires_grad=requires_grad)
        rank = len(shape)
        sizes = [self.sizes(n, place - rank) for place, n in enumerate(shape)]
        kind = dtype or self.dtype
        if self.device.type == "meta":
            empty = torch.empty(sizes, dtype=kind, device="meta")
            return empty.requires_grad_(requires_grad and empty.is_floating_point())
        if self._generator is None:
            self._generator = torch.Generator(self.device).manual_seed(self.seed)
        about: dict[str, Any] = {"device": self.device, "generator": self._generator}
        if kind is torch.bool:
            return torch.rand(sizes, **about) > 0.5
        if not kind.is_floating_point:
            # A class or an index: as many as there are, if the sample's range was a size of it.
            bound = math.ceil(high)
            most = self.sizes(bound, -1) if bound > 1 else bound
            return torch.randint(int(low), max(most, int(low) + 1), sizes, dtype=kind, **about)
        if (low, high) == (-2.0, 2.0):
            values = torch.randn(sizes, dtype=kind, **about)
        else:
            values = torch.rand(sizes, dtype=kind, **about).mul_(high - low).add_(low)
        return values.requires_grad_(requires_grad)


def largest(values: Iterable[Any]) -> int:
    """Elements of the largest tensor."""
    return max((t.numel() for t in values if isinstance(t, Tensor)), default=0)


def recipe(op: Op) -> Recipe:
    """The sample of ``op`` to bench, and how it is brought to sizes.

    Raises:
        Unscalable: torch refuses each of its samples at other sizes, or there is none.
    """
    if op.bench is not None:
        return Recipe(0, "own", {}, 0, 1, False)
    if op.samples is None:
        raise Unscalable("it has no samples")
    found: list[Recipe] = []
    reasons = []
    for index, sample in enumerate(op.samples(Random(torch.float32))):
        given = tensors(sample)
        if not given or not all(t.is_contiguous() and t.numel() for t in given):
            continue
        if "dtype" in sample.kwargs or max(t.dim() for t in given) == 0:
            continue
        if op.random and torch.equal(
            *(op.replaces[0](*sample.args, **sample.kwargs) for _ in "ab")
        ):
            continue  # all or nothing is dropped
        for numbers in (False, True):
            candidate = _recipe_of(op, sample, index, numbers)
            try:
                scaled = at(op, candidate, SIZES["2^16"], torch.float32, "meta")
                if largest(tensors(scaled)) <= largest(given):
                    raise Unscalable("its sizes are its own")
            except Exception as problem:
                reasons.append(f"{sample.note}: {type(problem).__name__}: {problem}")
            else:
                found.append(candidate)
                break
        # Not a product with a vector where there is one of matrices, nor sizes that stay one.
        flat = min(t.dim() for t in given) < 2 and "gemm" in op.kernels
        thin = 1 in _reference(given).shape
        if found and found[-1].index == index and found[-1].rank >= 2 and not (flat or thin):
            return found[-1]
    if not found:
        raise Unscalable(reasons[0] if reasons else "none of its samples is dense and not empty")
    return found[0]


def _reference(given: Sequence[Tensor]) -> Tensor:
    """The tensor whose dimensions are the roles."""
    return max(given, key=lambda t: (t.dim(), t.numel()))


def _recipe_of(op: Op, sample: Sample, index: int, numbers: bool) -> Recipe:
    given = tensors(sample)
    reference = _reference(given)
    rank = reference.dim()
    # Where a tensor has the same size twice, its place decides, wherever it is met.
    twice = {n for t in given for n in t.shape if list(t.shape).count(n) > 1}
    roles = {n: place for place, n in enumerate(reference.shape, -rank) if n not in twice}
    given_anew = clone(sample)
    with sdpa_kernel(SDPBackend.MATH):  # torch does not count what its CPU kernel does
        products = counted(lambda: op.replaces[0](*given_anew.args, **given_anew.kwargs))
    if products:
        kind = "heads" if rank >= 4 else "matrix"
    elif all(kernel.startswith("pointwise") for kernel in op.kernels):
        kind = "pointwise"
    else:
        kind = "rows"
    return Recipe(index, kind, roles, rank, math.prod(reference.shape[:-2]), numbers)


def counted(call: Callable[[], Any]) -> int:
    """Operations in the matrix products of ``call``, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def at(
    op: Op, recipe: Recipe, size: Size, dtype: torch.dtype, device: Any, seed: int = 0
) -> Sample:
    """The sample at a size.

    Raises:
        Unscalable: it would not fit, however it is cut.
    """
    if op.bench is not None:
        make = Scaling(dtype, device, seed)
        make.sizes = lambda n, place: n
        return op.bench(make, size)
    for plan in _plans(recipe, size):
        if torch.device(device).type == "meta" or _fits(op, recipe, size, dtype, plan):
            sample = _made(op, recipe, plan, Scaling(dtype, device, seed))
            if torch.device(device).type == "meta":
                results = op.replaces[0](*sample.args, **sample.kwargs)
                if not _within(size, recipe, (*tensors(sample), *tensors(Sample((results,))))):
                    continue
            return sample
    raise Unscalable(f"its results are far larger than {size.elements} elements")


def _fits(
    op: Op, recipe: Recipe, size: Size, dtype: torch.dtype, plan: Callable[[int, int], int]
) -> bool:
    """Whether arguments and results stay near the size, without computing them."""
    sample = _made(op, recipe, plan, Scaling(dtype, "meta"))
    results = op.replaces[0](*sample.args, **sample.kwargs)
    return _within(size, recipe, (*tensors(sample), *tensors(Sample((results,)))))


def _within(size: Size, recipe: Recipe, values: Sequence[Tensor]) -> bool:
    return recipe.kind in ("matrix", "heads") or largest(values) <= 2 * size.elements


def _made(op: Op, recipe: Recipe, plan: Callable[[int, int], int], make: Scaling) -> Sample:
    assert op.samples is not None
    samples = op.samples(make)
    if not isinstance(samples, Iterator):  # they are made already
        make.sizes = plan
        samples = iter(op.samples(make))
    for _ in range(recipe.index):
        next(samples)
    make.sizes = plan
    sample = next(samples)

    def resized(value: Any) -> Any:
        if (
            type(value) in (tuple, list, torch.Size)
            and value
            and all(type(v) is int for v in value)
        ):
            return tuple([plan(v, place - len(value)) for place, v in enumerate(value)])
        return value

    if not recipe.numbers:
        return sample
    kwargs = {name: resized(value) for name, value in sample.kwargs.items()}
    return Sample(tuple(map(resized, sample.args)), kwargs, sample.note)


def _plans(recipe: Recipe, size: Size) -> Iterator[Callable[[int, int], int]]:
    """Sizes for a sample's: the wanted ones; then, for results that combine all elements with all
    (an outer product), their square root, and that of it."""
    for root in (1, 2, 4):
        elements = max(round(size.elements ** (1 / root)), 2)
        by_place = _by_place(recipe, size, elements)

        def plan(n: int, place: int, by_place: dict[int, int] = by_place) -> int:
            return n if n <= 1 else by_place.get(recipe.roles.get(n, place), n)

        yield plan


def _by_place(recipe: Recipe, size: Size, elements: int) -> dict[int, int]:
    """Place, counted from the end -> size there."""
    if recipe.kind == "heads":
        batch = max(TOKENS // size.length, 1)
        return {-1: HEAD, -2: size.length, -3: HEADS, -4: batch}
    if recipe.kind == "matrix":
        return {-1: size.side, -2: size.side}
    if recipe.rank == 1:
        return {-1: elements}
    columns = min(size.columns, elements)
    return {-1: columns, -2: max(elements // (columns * recipe.lead), 1)}
