"""torch's normalisations by their definitions, whose derivatives are right at every order.

What torch refuses, it refuses here, too, and updates running statistics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

F = torch.nn.functional


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """torch's by its definition; what it refuses, torch refuses."""
    F.layer_norm(input.detach(), normalized_shape, weight, bias, eps)
    dims = tuple(range(-len(normalized_shape), 0))
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    centred = wide - wide.mean(dims, True)
    result = centred * torch.rsqrt(centred.square().mean(dims, True) + eps)
    result = result if weight is None else result * weight
    return (result if bias is None else result + bias).to(input.dtype).contiguous()


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """By its definition."""
    native = F.batch_norm(
        input.detach(), running_mean, running_var, weight, bias, training, momentum, eps
    )
    running = None if training else (running_mean, running_var)
    dims = (0, *range(2, input.dim()))
    return _of_channels(input, dims, running, weight, bias, eps, native)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """By its definition."""
    native = F.instance_norm(
        input.detach(), running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )
    running = None if use_input_stats else (running_mean, running_var)
    dims = tuple(range(2, input.dim()))
    return _of_channels(input, dims, running, weight, bias, eps, native)


def _of_channels(
    input: Tensor,
    dims: tuple[int, ...],
    running: tuple[Tensor | None, Tensor | None] | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    native: Tensor,
) -> Tensor:
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    column = (-1, *[1] * (input.dim() - 2))
    if running is None:
        centred = wide - wide.mean(dims, True)
        var = centred.square().mean(dims, True)
    else:
        mean, var = (t.reshape(column) for t in running if t is not None)
        centred = wide - mean
    result = centred * torch.rsqrt(var + eps)
    result = result if weight is None else result * weight.reshape(column)
    result = result if bias is None else result + bias.reshape(column)
    return (result.contiguous() if native.is_contiguous() else result).to(input.dtype)
