"""Parity: every op's samples on our kernels and on the torch function that the op replaces."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from tritongrad.admission import transforming
from tritongrad.dispatch import bypass
from tritongrad.op import TARGETS, Bind, Op, Unsupported
from tritongrad.ops.add_norm import add_layer_norm
from tritongrad.sampling import Random, Sample, clone, tensors

from .definitions import batch_norm, instance_norm, layer_norm
from .measure import DEVICE, Derivation, Errors, calling, compare, leaves
from .terminal import dtype_name

DTYPES = (torch.float64, torch.float32)

F = torch.nn.functional


def _bags(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    mode: str = "mean",
    per_sample_weights: Tensor | None = None,
    padding_idx: int | None = None,
    **others: Any,
) -> Tensor:
    """torch's embedding_bag, of rows that are in memory."""

    def native(weight: Tensor) -> Tensor:
        return F.embedding_bag(
            input,
            weight,
            offsets,
            mode=mode,
            per_sample_weights=per_sample_weights,
            padding_idx=padding_idx,
            **others,
        )

    if not transforming():
        with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
            native(weight)  # it raises what it refuses
    if mode == "max" or others:
        return native(weight)
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    left_out = (input == padding).unsqueeze(-1)
    rows = F.embedding(input, weight).masked_fill(left_out, 0)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    counts = (~left_out).to(weight.dtype)
    if offsets is None:
        sums, counts = rows.sum(1), counts.sum(1)
    else:
        each = torch.arange(input.shape[0], device=input.device)
        number = torch.searchsorted(offsets, each, right=True) - 1
        members = F.one_hot(number, offsets.shape[0]).to(weight.dtype).t()
        sums, counts = members @ rows, members @ counts
    return sums if mode == "sum" else sums / counts.clamp(min=1)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """torch's formula; with dropout, the op's own, of the numbers that it draws."""

    def native(*arguments: Any, **kwargs: Any) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(*arguments, **kwargs)

    call = native
    if dropout_p:
        call = _own_numbers(*TARGETS[F.scaled_dot_product_attention], native)
    result: Tensor = call(query, key, value, attn_mask, dropout_p, *args, **kwargs)
    return result


def _gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """torch's definition, without the test of values."""
    var = var.clone() if isinstance(var, Tensor) else torch.full_like(input, var)
    if var.shape != input.shape and input.shape[:-1] == var.shape:
        var = var.unsqueeze(-1)
    with torch.no_grad():
        var.clamp_(min=eps)
    loss = 0.5 * (torch.log(var) + (input - target) ** 2 / var)
    if full:
        loss = loss + 0.5 * math.log(2 * math.pi)
    return loss if reduction == "none" else getattr(loss, reduction)()


STAND_INS: dict[Callable[..., Any], Callable[..., Any]] = {
    # torch's has no second derivative, and its first is float32's 1 / 6 in float64 too.
    F.hardsigmoid: lambda input: torch.where(
        (input > -3) & (input < 3), input / 6 + 0.5, F.hardsigmoid(input.detach())
    ),
    F.embedding_bag: _bags,  # torch's has neither a second derivative nor a tangent
    # torch's third derivatives take statistics for constants.
    F.layer_norm: layer_norm,
    F.instance_norm: instance_norm,
    F.batch_norm: batch_norm,
    add_layer_norm: lambda input, residual, *args, **kwargs: (
        layer_norm(total := input + residual, *args, **kwargs),
        total,
    ),
    # torch's is 0 in the lower tail, from where 1 + erf cancels.
    torch.special.ndtr: lambda input: 0.5 * torch.erfc(-math.sqrt(0.5) * input),
    # torch's other backends have no second derivative and no forward mode.
    F.scaled_dot_product_attention: _attention,
    # torch's looks for negative variances, which it cannot under transforms.
    F.gaussian_nll_loss: _gaussian_nll_loss,
}
"""torch function -> what is compared with in its place: the same, composed of other functions."""


def seeded(op: Op, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, if ``op`` is random with the same numbers in each call."""
    return fixed(function) if op.random else function


def fixed(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with the same random numbers in each call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return function(*args, **kwargs)

    return call


def _own_numbers(op: Op, bind: Bind, function: Callable[..., Any]) -> Callable[..., Any]:
    """The definition of a random op in torch mathematics, of the numbers that the op draws; where
    it takes no call, torch's function."""

    def native(*args: Any, **kwargs: Any) -> Any:
        with bypass():
            try:
                tensors, params = bind(*args, **kwargs)
            except (Unsupported, TypeError):
                return function(*args, **kwargs)
            assert op.reference is not None
            return op.reference(params, *tensors)[0]

    return native


if torch.cuda.is_available():
    # CUDA's are of float32's 1 / 6 in float64 too.
    STAND_INS[F.hardsigmoid] = lambda input: torch.where(
        (input > -3) & (input < 3), input / 6 + 0.5, (input.detach() + 3).clamp(0, 6) / 6
    )
    STAND_INS[F.hardswish] = lambda input: torch.where(
        input < 3, torch.where(input <= -3, input * 0, input * (input / 6 + 0.5)), input
    )

STAND_INS |= {
    function: _own_numbers(op, bind, function)
    for function, (op, bind) in TARGETS.items()
    if op.random
}


def check(op: Op, sample: Sample, dtype: torch.dtype) -> Errors:
    """Run ``sample``, made in ``dtype``, on ``op`` through ``use()``, and on torch.

    Compared are the value and, for a differentiable op, gradient, gradient of the gradient and
    forward mode.
    """
    torch_function = seeded(op, op.replaces[0])
    native = seeded(op, STAND_INS.get(op.replaces[0], op.replaces[0]))
    exact = None
    if dtype != torch.float64:
        wide = in_float64(sample)
        exact = Derivation(calling(native, wide), tensors(wide), dtype)
    inputs, clones = leaves(sample), tensors(clone(sample))
    return compare(
        calling(torch_function, sample),
        inputs,
        clones,
        exact,
        op.max_order,
        calling(native, sample),
    )


def in_float64(sample: Sample) -> Sample:
    """The call with the same values in float64."""

    def widen(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, torch.dtype) and value.is_floating_point:
            return torch.float64
        if type(value) in (list, tuple):
            return type(value)(map(widen, value))
        return value

    kwargs = {name: widen(value) for name, value in sample.kwargs.items()}
    return Sample(tuple(map(widen, sample.args)), kwargs, sample.note)


def check_all(op: Op) -> Errors:
    """``check`` on every sample of ``op`` in float64 and float32, taken together."""
    total = Errors()
    if op.samples is None:
        total.problems.append("no samples")
        return total
    for dtype in DTYPES:
        for sample in op.samples(Random(dtype, DEVICE)):
            about = f"{dtype_name(dtype)}, {sample.note or 'unnamed sample'}"
            try:
                with warnings.catch_warnings():
                    # torch's remarks on what a sample asks for. Tests take a warning for an error.
                    warnings.simplefilter("ignore", UserWarning)
                    total.merge(check(op, sample, dtype), about)
            except Exception as problem:
                # torch itself refuses the call: the sample is wrong, and the next may be right.
                total.problems.append(f"{about}: {type(problem).__name__}: {problem}")
    if not total.forward_kernels:
        total.problems.append("forward launches no Triton kernel")
    if op.backward is not None and not total.backward_kernels:
        total.problems.append("backward launches no Triton kernel")
    return total
