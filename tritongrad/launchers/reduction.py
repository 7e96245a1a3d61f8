from __future__ import annotations
import torch
from torch import Tensor


def sum_to(tensor: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return tensor.sum_to_size(shape).to(dtype)
