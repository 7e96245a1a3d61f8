"""Calls of the losses of classes: what torch's arguments mean, and parts of samples of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..admission import admit, transforming
from ..dtypes import COMPUTE_DTYPE, FLOATING
from ..extension import extended
from ..launchers import classification as launcher
from ..launchers.classification import Smoothing
from ..layout import overlaps
from ..op import Tensors, Unsupported
from ..runtime import INTERPRETED
from ..sampling import Make
from .loss_calls import REDUCTIONS, modern, not_derived, values

F = torch.nn.functional

KEPT = {"cuda": "keep", "cpu": "keep"}
"""Under autocast the result is float32, and the kernels convert what they read."""

OUT_OF_RANGE = (
    "On a GPU a label that is no class gives NaN in what it is part of, where torch's kernel stops "
    "the process; on the CPU both raise IndexError."
)


class Params(NamedTuple):
    """What a call is beside its tensors.

    Attributes:
        call: what each launch is told.
        batch: dimensions in front that vmap added: their losses stay apart.
        reduction: torch's.
        number: rows of which a mean of probabilities' losses is taken.
        result: dtype of the result.
        overwrites: whether the gradient is written into the memory of the logits.
    """

    call: launcher.Call
    batch: int
    reduction: str
    number: int
    result: torch.dtype
    overwrites: bool = False

    @property
    def averaged(self) -> bool:
        """Whether the sum of losses is divided by that of their labels' weights."""
        return self.reduction == "mean" and self.call.labelled

    @property
    def row_dtype(self) -> torch.dtype:
        """Of each row's loss: what is summed is not rounded before."""
        return self.result if self.reduction == "none" else self.call.compute

    @property
    def factor(self) -> float | None:
        """Each row's part in a mean, where that is the same for all."""
        if self.reduction == "mean" and not self.call.labelled:
            return 1.0 / max(self.number, 1)
        return None


def read(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    probabilities: bool = True,
) -> tuple[Tensors, Params]:
    """The canonical call of either loss; ``probabilities`` may be targets of one of them."""
    admit(input)
    if not input.dim():
        raise Unsupported("no dimension of classes")
    weight, params = read_targets(
        input.shape, min(input.dim() - 1, 1), input, target, weight, ignore_index, reduction,
        label_smoothing, z_loss, probabilities,
    )  # fmt: skip
    return (input, target, weight), params


def read_targets(
    shape: torch.Size,
    dim: int,
    like: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float = 0.0,
    probabilities: bool = True,
) -> tuple[Tensor | None, Params]:
    """``read`` for logits of ``shape``, classes along ``dim``, in the dtype and on the device of
    ``like``. Returns the weight, and the parameters."""
    if type(reduction) is not str or reduction not in REDUCTIONS:
        raise Unsupported(f"reduction={reduction!r}")
    if type(ignore_index) is not int or type(label_smoothing) not in (int, float):
        raise Unsupported("an ignore_index or label_smoothing of another type")
    if not -(2**63) <= ignore_index < 2**63:
        raise Unsupported("ignore_index beyond 64 bits")
    if not label_smoothing <= 1:
        raise Unsupported("label_smoothing above 1")
    for tensor in (target, *([] if weight is None else [weight])):
        admit(tensor)
        if tensor.get_device() != like.get_device():
            raise Unsupported("tensors on different devices")
    result = result_of(like)
    classes = shape[dim]
    kept = torch.Size((*shape[:dim], *shape[dim + 1 :]))
    if not classes:
        raise Unsupported("no classes")
    labelled = not (probabilities and target.shape == shape)
    if labelled:
        if target.dtype is not torch.int64:
            raise Unsupported(f"labels of {str(target.dtype).removeprefix('torch.')}")
        if target.shape != kept:
            raise Unsupported("not one label for each row")
        weight = without_derivative(weight)
        if INTERPRETED:
            # torch raises there. On a GPU its kernel traps where the result here is NaN.
            check_labels(target, classes, ignore_index)
    elif result_of(target) is not result:
        raise Unsupported("probabilities of another dtype")
    elif ignore_index >= 0:
        raise Unsupported("ignore_index beside probabilities")
    if weight is not None and (weight.shape != (classes,) or result_of(weight) is not result):
        raise Unsupported("weight is not one number of the input's dtype for each class")
    smoothing = None
    if label_smoothing > 0:
        smoothing = Smoothing(1 - label_smoothing, label_smoothing / classes)
    compute = COMPUTE_DTYPE[result]
    call = launcher.Call(dim, labelled, ignore_index, smoothing, z_loss, compute, classes)
    return weight, Params(call, 0, reduction, kept.numel(), result)


def result_of(tensor: Tensor) -> torch.dtype:
    """The dtype that a tensor is taken for. Under autocast that is float32, as which the kernels
    read half precision anyway: it is converted in no copy of the logits."""
    if tensor.dtype not in FLOATING:
        raise Unsupported(f"dtype {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.dtype is not torch.float64 and torch.is_autocast_enabled(tensor.device.type):
        return torch.float32
    return tensor.dtype


def without_derivative(weight: Tensor | None) -> Tensor | None:
    """The weight of a call in which torch has no derivative by it."""
    if weight is None:
        return None
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(weight).tangent is not None:
        raise Unsupported("forward mode by weight, of which torch has none")
    return not_derived(weight, "weight")


def check_labels(target: Tensor, classes: int, ignored: int) -> None:
    labels = values(target)
    if ((labels < 0) | (labels >= classes)).logical_and(labels != ignored).any():
        raise Unsupported("a label that is no class")


@extended
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    inplace_grad: bool = False,
) -> Tensor:
    """``torch.nn.functional.cross_entropy`` with two options more.

    Args:
        z_loss: what is added to the loss of each row that is not ignored, and reduced with it: so
            many times the square of the logarithm of the sum of its exponentials.
        inplace_grad: lets the gradient have the memory of the logits, which hold it after backward.
            They are marked as modified then: autograd raises its error where it needs what they
            were, in a second backward as well, and there is no second derivative. Where torch runs
            the call, and under ``torch.func``, the gradient has memory of its own.

    Raises:
        RuntimeError: ``inplace_grad`` of logits that are a leaf.
        ValueError: ``inplace_grad`` of logits whose elements share memory.
    """
    if type(inplace_grad) is not bool:
        raise TypeError(f"inplace_grad must be a bool, not {type(inplace_grad).__name__}")
    if not z_loss:
        return F.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    if size_average is not None or reduce is not None:
        raise ValueError("size_average and reduce are deprecated, and not taken beside z_loss")
    losses = F.cross_entropy(
        input, target, weight, None, ignore_index, None, "none", label_smoothing
    )
    further = z_loss * torch.logsumexp(input, min(input.dim() - 1, 1)).square()
    probabilities = target.shape == input.shape
    if not probabilities:
        further = torch.where(target == ignore_index, 0.0, further)
    losses = losses + further
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if probabilities:
        return losses.sum() / losses.numel()
    ones = torch.ones_like(target, dtype=losses.dtype)
    weights = ones if weight is None else weight[target.clamp(0, weight.shape[0] - 1)]
    return losses.sum() / torch.where(target == ignore_index, 0.0, weights).sum()


def bind_extended(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    inplace_grad: bool = False,
) -> tuple[Tensors, Params]:
    modern(size_average, reduce)
    if type(z_loss) not in (int, float) or type(inplace_grad) is not bool:
        raise Unsupported("options of another type")
    tensors, params = read(
        input, target, weight, ignore_index, reduction, label_smoothing, float(z_loss)
    )
    if inplace_grad and not transforming():
        if overlaps(input.shape, input.stride()):
            raise ValueError("inplace_grad: elements of the logits share memory")
        params = params._replace(overwrites=True)
    return tensors, params


def labels(make: Make, classes: int, *shape: int) -> Tensor:
    """Labels in the shape, with a 1 behind it that is left away: so they are as many as the rows
    where sizes are changed."""
    found = make(*shape, 1, low=0, high=classes, dtype=torch.int64, requires_grad=False)
    return found.squeeze(-1)


def without(target: Tensor, label: int) -> Tensor:
    """Targets of which the first is ``label``."""
    target.view(-1)[:1] = label
    return target
