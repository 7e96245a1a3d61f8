"""``einsum``: read once for each equation, then contracted pair by pair.

A label that both operands have is a batch if it is needed later, and otherwise summed over by one
product of matrices, or of a matrix and a vector, read through the strides of the permuted operands.
"""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..op import Tensors, Unsupported
from ..sampling import Make, Sample
from .composite import POINTWISE, composite
from .contraction import GEMM, REDUCTION
from .factors import admit_alike

Label = str | int
"""A letter, or the place of a dimension of the ellipsis, from the end: -1 is its last."""

Labels = tuple[Label, ...]

LETTERS = string.ascii_uppercase + string.ascii_lowercase
"""What the numbers of torch's sublist format stand for."""


class Equation(NamedTuple):
    """What is computed of operands whose dimensions are labelled.

    Attributes:
        operands, output: labels of each dimension.
        path: which two of the operands left are contracted next; their product comes last.
    """

    operands: tuple[Labels, ...]
    output: Labels
    path: tuple[tuple[int, int], ...] = ()


# ------------------------------------------------------------------------------------------ reading


def _terms(text: str) -> list[tuple[str, ...]]:
    """The letters of each term, ``...`` being one."""
    found = []
    for term in text.split(","):
        before, dots, after = term.partition("...")
        if not all(c in LETTERS for c in before + after):
            raise Unsupported("not an equation")
        found.append((*before, *([dots] if dots else ()), *after))
    return found


@lru_cache(maxsize=4096)
def parse(text: str, ranks: tuple[int, ...]) -> Equation:
    """Labels of all dimensions, for operands of these ranks.

    Raises:
        Unsupported: it is no equation, or none for such operands.
    """
    inputs, arrow, rest = text.replace(" ", "").partition("->")
    terms = _terms(inputs)
    if len(terms) != len(ranks):
        raise Unsupported("not as many terms as operands")
    extents = [rank - sum(c != "..." for c in t) for t, rank in zip(terms, ranks, strict=True)]
    if any(n < 0 or (n and "..." not in t) for t, n in zip(terms, extents, strict=True)):
        raise Unsupported("a term that does not fit its operand")

    def labels(term: Sequence[str], extent: int) -> Labels:
        parts = [range(-extent, 0) if c == "..." else (c,) for c in term]
        return tuple(itertools.chain.from_iterable(parts))

    operands = tuple([labels(t, n) for t, n in zip(terms, extents, strict=True)])
    letters = [c for term in terms for c in term if c != "..."]
    if arrow:
        outputs = _terms(rest)
        if len(outputs) != 1 or len(set(outputs[0])) < len(outputs[0]):
            raise Unsupported("not one output, or a label twice in it")
        (output,) = outputs
        if not set(output) <= {*letters, "..."}:
            raise Unsupported("a label in the output alone")
    else:
        output = ("...", *sorted(c for c in set(letters) if letters.count(c) == 1))
    return Equation(operands, labels(output, max(extents)))


def _check_sizes(equation: Equation, shapes: Sequence[torch.Size]) -> None:
    sizes: dict[Label, int] = {}
    for labels, shape in zip(equation.operands, shapes, strict=True):
        own = dict(zip(labels, shape, strict=True))
        if any(own[label] != n for label, n in zip(labels, shape, strict=True)):
            raise Unsupported("a label twice in a term, of different sizes")
        for label, n in own.items():
            if n != 1 and sizes.setdefault(label, n) != n:
                raise Unsupported("sizes do not broadcast")


def _path(text: str, operands: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """Order of contraction, as torch chooses it: opt_einsum's where that is installed, else from
    left to right."""
    planner = torch.backends.opt_einsum
    if len(operands) > 2 and planner.enabled and planner.is_available():
        found = planner.get_opt_einsum().contract_path(
            text, *[tuple(t.shape) for t in operands], shapes=True, optimize=planner.strategy
        )[0]
        if all(len(pair) == 2 for pair in found):
            return tuple([(min(pair), max(pair)) for pair in found])
    count = len(operands)
    return tuple([(count - 1 - i, 0) if i else (0, 1) for i in range(count - 1)])


def _text(arguments: Sequence[Any]) -> tuple[str, Sequence[Tensor]]:
    """An equation and its operands, out of any of torch's ways to hand them over."""
    first, *rest = arguments
    if isinstance(first, str):
        if len(rest) == 1 and isinstance(rest[0], (tuple, list)):
            rest = list(rest[0])
        return first, rest
    if not all(isinstance(labels, (tuple, list)) for labels in arguments[1::2]):
        raise Unsupported("neither an equation nor lists of labels")
    lists = [*arguments[1::2], *(arguments[-1:] if len(arguments) % 2 else ())]
    for label in itertools.chain.from_iterable(lists):
        if label is not Ellipsis and not (type(label) is int and 0 <= label < len(LETTERS)):
            raise Unsupported("a label that is no number from 0 to 51")
    terms = ["".join("..." if n is Ellipsis else LETTERS[n] for n in labels) for labels in lists]
    operands = arguments[0 : len(arguments) - len(arguments) % 2 : 2]
    text = ",".join(terms[: len(operands)])
    return text + ("->" + terms[-1] if len(arguments) % 2 else ""), operands


def _bind(equation: str, *operands: Any) -> tuple[Tensors, Equation]:
    text, tensors = _text((equation, *operands))
    if not tensors:
        raise Unsupported("no operands")
    # Under autocast the products inside may have one dtype for operands that have several.
    admit_alike(*tensors, promoting=torch._C._is_any_autocast_enabled())
    found = parse(text, tuple([t.dim() for t in tensors]))
    _check_sizes(found, [t.shape for t in tensors])
    return tuple(tensors), found._replace(path=_path(text, tensors))


# -------------------------------------------------------------------------------------- contracting


class Labelled(NamedTuple):
    """A tensor whose dimensions have names, no two the same."""

    tensor: Tensor
    labels: Labels

    def size(self, label: Label) -> int:
        return self.tensor.shape[self.labels.index(label)]

    def without(self, dropped: Sequence[Label]) -> Labelled:
        """It without dimensions of size 1."""
        dims = tuple([self.labels.index(label) for label in dropped])
        kept = tuple([label for label in self.labels if label not in dropped])
        return Labelled(self.tensor.squeeze(dims), kept) if dims else self

    def summed_to(self, kept: set[Label]) -> Labelled:
        """It summed over every other dimension."""
        dims = [d for d, label in enumerate(self.labels) if label not in kept]
        if not dims:
            return self
        labels = tuple([label for label in self.labels if label in kept])
        return Labelled(self.tensor.sum(dims), labels)

    def permuted(self, labels: Sequence[Label]) -> Labelled:
        """It with its dimensions in another order."""
        if tuple(labels) == self.labels:
            return self
        dims = [self.labels.index(label) for label in labels]
        return Labelled(self.tensor.permute(dims), tuple(labels))

    def ordered(self, *groups: Sequence[Label]) -> Tensor:
        """It permuted, each group one dimension unless it is the first."""
        first, *rest = groups
        shape = [self.size(label) for label in first]
        shape += [math.prod([self.size(label) for label in group]) for group in rest]
        tensor = self.permuted([label for group in groups for label in group]).tensor
        return tensor if list(tensor.shape) == shape else tensor.reshape(shape)

    def spread(self, labels: Labels) -> Tensor:
        """It with dimensions in the order of ``labels``, of size 1 where it has none."""
        tensor = self.permuted([label for label in labels if label in self.labels]).tensor
        for d, label in enumerate(labels):
            if label not in self.labels:
                tensor = tensor.unsqueeze(d)
        return tensor


def _diagonal(tensor: Tensor, labels: Labels) -> Labelled:
    """``tensor`` without repeated labels: its diagonal along them."""
    for label in dict.fromkeys(labels):
        while labels.count(label) > 1:
            i = labels.index(label)
            j = labels.index(label, i + 1)
            tensor = tensor.diagonal(0, i, j)
            labels = (*labels[:i], *labels[i + 1 : j], *labels[j + 1 :], label)
    return Labelled(tensor, labels)


def _contract(x: Labelled, y: Labelled, kept: set[Label], order: Labels) -> Labelled:
    """The product of two, summed over what is not in ``kept``; elementwise, it is in ``order``."""
    shared = [label for label in x.labels if label in y.labels]
    # What one of them is broadcast along is the other's alone.
    unequal = [label for label in shared if x.size(label) != y.size(label)]
    x = x.without([label for label in unequal if x.size(label) == 1])
    y = y.without([label for label in unequal if y.size(label) == 1])
    x = x.summed_to(kept | set(y.labels))
    y = y.summed_to(kept | set(x.labels))
    batch = tuple([label for label in x.labels if label in y.labels and label in kept])
    depth = tuple([label for label in x.labels if label in y.labels and label not in kept])
    rows = tuple([label for label in x.labels if label not in y.labels])
    columns = tuple([label for label in y.labels if label not in x.labels])
    labels = (*batch, *columns, *rows)
    if labels == tuple(sorted(labels, key=order.index)):
        # The transposed product, which is the one that lies in memory as the result should.
        x, y, rows, columns = y, x, columns, rows
    labels = (*batch, *rows, *columns)
    if not depth:
        labels = tuple(sorted(labels, key=order.index))
        return Labelled(x.spread(labels) * y.spread(labels), labels)
    if not rows or not columns:
        # At most a matrix and a vector, limited by memory.
        own = rows or columns
        left, right = x.ordered((*batch, *rows), depth), y.ordered((*batch, *columns), depth)
        for _ in own:
            if rows:
                right = right.unsqueeze(-2)
            else:
                left = left.unsqueeze(-2)
        return Labelled(torch.linalg.vecdot(left, right), labels)
    product = torch.matmul(x.ordered(batch, rows, depth), y.ordered(batch, depth, columns))
    shape = [(x if label in x.labels else y).size(label) for label in labels]
    return Labelled(product if list(product.shape) == shape else product.reshape(shape), labels)


def _value(equation: Equation, *tensors: Tensor) -> Tensor:
    output = equation.output
    # torch keeps everything in this order, which shows in how results lie in memory.
    order = tuple(dict.fromkeys(itertools.chain(output, *equation.operands)))
    left = [_diagonal(t, labels) for t, labels in zip(tensors, equation.operands, strict=True)]
    left = [operand.permuted(sorted(operand.labels, key=order.index)) for operand in left]
    for i, j in equation.path:
        x, y = left[i], left[j]
        left = [operand for k, operand in enumerate(left) if k not in (i, j)]
        needed = set(output).union(*[operand.labels for operand in left])
        found = _contract(x, y, needed, order)
        left.append(found.permuted(sorted(found.labels, key=order.index)))
    result = left[0].summed_to(set(output)).permuted(output).tensor
    return result.view_as(result) if any(result is t for t in tensors) else result


# ----------------------------------------------------------------------------------------- samples


def _samples(make: Make) -> Iterator[Sample]:
    yield Sample(("ij,jk->ik", make(3, 5), make(5, 4)), {}, "matrix product")
    yield Sample(("bij,bkj->bik", make(2, 3, 5), make(2, 4, 5)), {}, "batch, transposed")
    yield Sample(("ij,j", make(3, 5), make(5)), {}, "matrix and vector")
    yield Sample(("i,ij", make(3), make(3, 5)), {}, "vector and matrix")
    yield Sample(("bi,bi->b", make(3, 5), make(3, 5)), {}, "batch of dot products")
    yield Sample(("i,j->ji", make(3), make(4)), {}, "outer product, transposed")
    yield Sample(("ij,ij->ij", make(3, 4), make(3, 1)), {}, "elementwise, broadcast")
    yield Sample(("ii->i", make(4, 4)), {}, "diagonal")
    yield Sample(("iji->j", make(3, 2, 3)), {}, "partial trace")
    yield Sample(("ijk->k", make(2, 3, 4)), {}, "sum")
    yield Sample(("...ij,...jk", make(2, 1, 3, 5), make(2, 5, 2)), {}, "ellipsis")
    yield Sample(("...i,ij->j...", make(2, 3), make(3, 4)), {}, "ellipsis at the end")
    yield Sample(("i...,i...", make(3, 2), make(3, 2)), {}, "ellipsis summed with nothing")
    yield Sample(("ik,kl,jl->ij", make(2, 3), make(3, 4), make(2, 4)), {}, "three")
    yield Sample(("bn,anm,bm->ba", make(2, 3), make(2, 3, 4), make(2, 4)), {}, "bilinear")
    yield Sample(("ij,kl->i", make(3, 2), make(2, 2)), {}, "summed in one operand alone")
    yield Sample(("ijk,ljk->il", make(2, 3, 4), make(3, 3, 4)), {}, "two summed")
    yield Sample(("ij,jk->ik", make(3, 4), make(1, 5)), {}, "summed where broadcast")
    yield Sample(("ij,jk->ik", make(18, 67), make(67, 35)), {}, "past one tile")
    yield Sample(("ij,jk->ik", make(3, 0), make(0, 4)), {}, "nothing to sum")
    yield Sample((make(3, 5), [0, 1], make(5, 4), [1, 2], [2, 0]), {}, "lists of labels")


composite(
    "einsum", torch.einsum,
    bind=_bind, value=_value,
    kernels=(*GEMM, *REDUCTION, *POINTWISE),
    formula="each operand's: the einsum of g with all the others",
    samples=_samples, autocast={"cuda": "lower"},
)  # fmt: skip
