"""Calls of losses: what torch's arguments mean, and samples of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..admission import admit, transforming
from ..dtypes import FLOATING, Number
from ..layout import broadcast_sizes, broadcasts
from ..op import Tensors, Unsupported
from ..sampling import Make, Sample
from .criterion import Form, Params

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_unwrapped = torch._C._functorch.get_unwrapped

Call = tuple[Tensors, Params]

INTEGRAL_TARGETS = frozenset((torch.int16, torch.int32, torch.int64))
"""dtypes of class labels and counts that losses of floating-point targets take as well."""

WEIGHTS = {"p": 1.0, "w": 1.0}
"""Inputs that may be absent, the weight of what is positive, and the weight; and what they are."""

REDUCTIONS = frozenset(("none", "mean", "sum"))
WITH_BATCHMEAN = REDUCTIONS | {"batchmean"}


def read(
    form: Form,
    tensors: Tensors,
    reduction: str,
    *,
    numbers: tuple[Number, ...] = (),
    integral: int | None = None,
    by_weight: bool = False,
    reductions: frozenset[str] = REDUCTIONS,
    absent: Mapping[str, Number] = WEIGHTS,
) -> tuple[Tensors, Params]:
    """The canonical call of a loss.

    Args:
        tensors: of all inputs of the op, None for one that is absent.
        integral: place of the tensor that may be integral, in which case it has no gradient.
        by_weight: whether the mean divides by the sum of the weights.
        reductions: those that torch has of this loss.
        absent: the numbers in the places of inputs that may be absent.
    """
    if type(reduction) is not str or reduction not in reductions:
        raise Unsupported(f"reduction={reduction!r}")
    first = tensors[0]
    for i, (n, t) in enumerate(zip(form.inputs, tensors, strict=True)):
        if t is None and n in absent:
            continue
        if not isinstance(t, Tensor) or not isinstance(first, Tensor):
            raise Unsupported(f"a {type(t).__name__} in a tensor's place")
        admit(t)
        if t.get_device() != first.get_device():
            raise Unsupported("tensors on different devices")
        if t.dtype is not first.dtype and not (i == integral and t.dtype in INTEGRAL_TARGETS):
            raise Unsupported("tensors of different dtypes")
    assert first is not None
    if first.dtype not in FLOATING:
        raise Unsupported(f"dtype {str(first.dtype).removeprefix('torch.')}")
    # Types first: to a cache, True is 1.
    if any(type(n) not in (int, float) for n in numbers):
        raise Unsupported("a parameter that is not a number")
    shapes = tuple([t if t is None else t.shape for t in tensors])
    scalars = tuple(
        [absent[n] if t is None else None for n, t in zip(form.inputs, tensors, strict=True)]
    )
    return tensors, _params(form, shapes, scalars, first.dtype, reduction, numbers, by_weight)


@lru_cache(maxsize=4096)
def _params(
    form: Form,
    shapes: tuple[torch.Size | None, ...],
    scalars: tuple[Number | None, ...],
    result: torch.dtype,
    reduction: str,
    numbers: tuple[Number, ...],
    by_weight: bool,
) -> Params:
    present = [s for s in shapes if s is not None]
    if not broadcasts(*present):
        raise Unsupported("shapes do not broadcast")
    shape = broadcast_sizes(present)
    if len(shape) > 64:
        raise Unsupported("more than 64 dimensions")
    dims = None if reduction == "none" else tuple(range(len(shape)))
    divisor = None
    if reduction == "mean":
        divisor = shape.numel()
    elif reduction == "batchmean" and present[0]:
        divisor = present[0][0]
    by_weight = by_weight and reduction == "mean"
    return Params(form, scalars, numbers, dims, divisor, by_weight, result)


def modern(size_average: bool | None, reduce: bool | None) -> None:
    if size_average is not None or reduce is not None:
        raise Unsupported("size_average and reduce are deprecated")


def warn_of_sizes(input: Tensor, target: Tensor) -> None:
    if target.size() != input.size():
        warnings.warn(
            f"Using a target size ({target.size()}) that is different to the input size "
            f"({input.size()}). This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=3,
        )


def same_size(input: Tensor, other: Tensor | None) -> None:
    if isinstance(input, Tensor) and isinstance(other, Tensor) and input.shape != other.shape:
        raise Unsupported("tensors of different sizes")


def factor(weight: Tensor | None, input: Tensor, target: Tensor) -> bool:
    """Whether there is a weight of each error."""
    if weight is None:
        return False
    same_size(input, weight)
    same_size(input, target)
    if isinstance(input, Tensor) and torch.is_autocast_enabled(input.device.type):
        raise Unsupported("weight under autocast")
    return True


def constant(tensor: Tensor | None) -> Tensor | None:
    """A tensor in which a loss has no derivative."""
    if not isinstance(tensor, Tensor):
        return tensor
    moving = tensor.requires_grad or transforming() or forward_ad._current_level >= 0
    return tensor.detach() if moving else tensor


def not_derived(tensor: Tensor | None, name: str) -> Tensor | None:
    """A tensor for which torch refuses a derivative."""
    if isinstance(tensor, Tensor) and _asks(tensor):
        raise Unsupported(f"{name} requires a gradient, of which torch has none")
    return constant(tensor)


def _asks(tensor: Tensor) -> bool:
    """Whether a derivative by ``tensor`` may be wanted, by an outer transform, too."""
    if tensor.requires_grad or not _is_wrapped(tensor):
        return tensor.requires_grad
    levels = torch._C._functorch.get_interpreter_stack() or ()
    forward = torch._C._functorch.TransformType.Jvp
    if any(level.key() == forward for level in levels):
        return True  # tangents of outer levels are out of reach
    return _asks(_unwrapped(tensor))


def values(tensor: Tensor) -> Tensor:
    """The memory under a tensor's wrappers."""
    while _is_wrapped(tensor):
        tensor = _unwrapped(tensor)
    return tensor.detach()


def samples_of(
    x: tuple[float, float] = (-2.0, 2.0),
    y: tuple[float, float] | None = None,
    **named: Any,
) -> Callable[[Make], Iterator[Sample]]:
    """Calls of a loss of two tensors with values in these ranges, and each option of ``named``.

    Args:
        y: None: labels -1 and 1.
    """

    def samples(make: Make) -> Iterator[Sample]:
        def pair(*shape: int) -> tuple[Tensor, Tensor]:
            first = make(*shape, low=x[0], high=x[1])
            if y is None:
                return first, make(*shape, requires_grad=False).sign()
            return first, make(*shape, low=y[0], high=y[1])

        yield Sample(pair(3, 5), {"reduction": "none"}, "each")
        yield Sample(pair(3, 5), {"reduction": "mean"}, "mean")
        for name, options in named.items():
            for option in options:
                yield Sample(pair(3, 5), {"reduction": "sum", name: option}, name)
        yield Sample(pair(), {"reduction": "sum"}, "0-dim")
        yield Sample(pair(2, 0), {"reduction": "sum"}, "empty")
        yield Sample(tuple([t.t() for t in pair(7, 6)]), {"reduction": "none"}, "transposed")
        yield Sample(pair(1031), {"reduction": "none"}, "past one block")
        shared = tuple([t[:, 1:] for t in pair(9, 258)])
        yield Sample(shared, {"reduction": "sum"}, "shared by several programs")

    return samples


def with_weights(
    plain: Callable[[Make], Iterator[Sample]],
    *names: str,
    grad: bool = True,
    low: float = 0.5,
    shape: tuple[int, ...] = (3, 5),
) -> Callable[[Make], Iterator[Sample]]:
    """``plain``, and its first with weights."""

    def samples(make: Make) -> Iterator[Sample]:
        found = list(plain(make))
        yield from found
        args, kwargs, _ = found[0]
        weights = {n: make(*shape, low=low, high=2.0, requires_grad=grad) for n in names}
        yield Sample(args, kwargs | weights, "weighted")
        yield Sample(args, kwargs | weights | {"reduction": "mean"}, "weighted mean")

    return samples
