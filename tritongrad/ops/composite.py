"""Ops that other ops add up to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..dtypes import FLOATING
from ..op import Bind, Op, register
from ..sampling import Make, Sample

POINTWISE = ("pointwise_dense", "pointwise_strided")


def composite(
    name: str,
    *targets: Callable[..., Any],
    bind: Bind,
    value: Callable[..., Tensor],
    kernels: tuple[str, ...],
    formula: str,
    samples: Callable[[Make], Iterator[Sample]],
    autocast: Mapping[str, str] | None = None,
    opinfo: tuple[str, ...] | None = None,
    random: bool = False,
) -> None:
    """Register the op whose result is ``value(params, *tensors)``."""
    register(Op(
        name=name,
        bind=bind,
        # Whether operands of different dtypes may come in.
        ambient=torch._C._is_any_autocast_enabled,
        random=random,
        replaces=targets,
        reference=lambda params, *tensors: (value(params, *tensors),),
        autocast=autocast or {},
        opinfo=(name,) if opinfo is None else opinfo,
        kernels=kernels,
        formula=formula,
        dtypes=FLOATING,
        samples=samples,
        sources="torch's own definition",
    ))  # fmt: skip
