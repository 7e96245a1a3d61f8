"""``add_layer_norm`` and ``add_rms_norm``: of a sum that is returned, too, by the same kernels.

The two inputs have one gradient, which the kernel of the norm's computes of both that come in.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..dtypes import FLOATING
from ..extension import extension
from ..function import pull
from ..launchers import norm as launch
from ..op import BackwardParams, Bind, Needs, Op, Tensors, Unsupported, register
from ..sampling import Make, Sample
from .norm import LAYER_NORM, RMS_NORM, cost_of, epsilon, read, tangent_of, vmap_rows
from .norm_backward import KERNELS, Layout, Params, backward_op, gradients_by_rule, three

F = torch.nn.functional


@extension
def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """``layer_norm`` of ``input + residual``, and that sum.

    The arguments are those of ``torch.nn.functional.layer_norm`` otherwise.
    """
    total = input + residual
    return F.layer_norm(total, list(normalized_shape), weight, bias, eps), total


@extension
def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``rms_norm`` of ``input + residual``, and that sum.

    The arguments are those of ``torch.nn.functional.rms_norm`` otherwise.
    """
    total = input + residual
    return F.rms_norm(total, list(normalized_shape), weight, eps), total


def _bind_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensors, Params]:
    _refuse_autocast(input)
    return read(input, normalized_shape, (weight, bias), eps, True, (residual,))


def _bind_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensors, Params]:
    _refuse_autocast(input)
    return read(input, normalized_shape, (weight,), epsilon(input, eps), False, (residual,))


def _refuse_autocast(input: Any) -> None:
    """There the norm is computed in float32, and the sum is not."""
    if isinstance(input, Tensor) and input.is_cuda and torch.is_autocast_enabled("cuda"):
        raise Unsupported("two dtypes under autocast")


def _add_norm(
    norm: Op,
    target: Callable[..., Any],
    *,
    bind: Bind,
    arity: int,
    samples: Callable[[Make], Iterator[Sample]],
    schema: str,
) -> None:
    """Make and register one of the two. ``arity`` as of ``Layout``."""
    name = f"add_{norm.name}"
    layout = Layout(arity, 2)
    backward = backward_op(name, layout)
    count = arity + 1  # tensors

    def forward(params: Params, x: Tensor, residual: Tensor, *affine: Tensor | None) -> Any:
        _, weight, bias = three((x, *affine))
        y, total, mean, rstd = launch.forward(
            (x, residual), params.axes, params.centred, params.eps, weight, bias
        )
        return (y, total, mean, rstd) if params.centred else (y, total, rstd)

    def saves(params: Params, needs: Needs) -> tuple[int, ...]:
        dx = needs[0] or needs[1]
        if not (dx or needs[2]):
            return ()
        total = count + 1
        return (*([2] if dx else []), *range(total, total + 2 + params.centred))

    def of_sum(bp: BackwardParams, needs: Needs, specs: tuple, g: Tensors, saved: Tensors) -> Any:
        of = BackwardParams(bp, needs, specs)
        return gradients_by_rule(layout, of, g, three(saved[:arity]))

    def rule(params: Params, needs: Needs, specs: tuple, grads: Tensors, saved: Tensors) -> Tensors:
        g, h = grads
        dx = needs[0] or needs[1]
        found: Tensors = (h, *[None] * (arity - 1))
        if g is not None:
            _, total, *statistics = saved[count:]
            own = (total, *saved[2:count], None, None, *statistics)
            needed = (dx, *needs[2:])
            of = (specs[0], *specs[2:])
            found = pull(of_sum, backward, params, needed, of, grads, own)
        dsum, *others = found
        return (dsum if needs[0] else None, dsum if needs[1] else None, *others)

    def jvp(params: Params, tensors: Tensors, outputs: Tensors, tangents: Tensors) -> Any:
        total, (first, other, *affine) = outputs[1], tangents
        assert total is not None
        along = other if first is None else first if other is None else first + other
        value = tangent_of(norm, params, total, tensors[2], (along, *affine))
        return value, torch.zeros_like(total) if along is None else along

    op = Op(
        name=name,
        bind=bind,
        # Whether the two outputs have one dtype.
        ambient=torch._C._is_any_autocast_enabled,
        forward=forward,
        replaces=(target,),
        outputs=2,
        saves=saves,
        constant_outputs=lambda params, needs: () if needs[0] or needs[1] else (1,),
        specs=operator.attrgetter("specs"),
        rule=rule,
        jvp=jvp,
        vmap=lambda info, params, tensors, dims: vmap_rows(op, info, params, tensors, dims, 2),
        schema=schema,
        kernels=KERNELS[:1],
        formula=f"that of {norm.name}, plus that of the sum",
        dtypes=FLOATING,
        samples=samples,
        sources="see kernels/norm.py",
        cost=lambda params, x, residual, *affine: (
            2 * cost_of(params, x, *affine)[0],
            cost_of(params, x)[1] + x.numel(),
        ),
    )
    register(op)


def _samples(make: Make) -> Iterator[Sample]:
    def call(x: Tensor, residual: Tensor, *affine: Tensor | None, axes: int = 1) -> tuple[Any, ...]:
        return x, residual, x.shape[-axes:], *affine

    yield Sample(call(make(3, 5), make(3, 5), make(5), make(5)), {}, "rows")
    strided = call(make(2, 3, 4), make(4, 3, 2).transpose(0, 2), axes=2)
    yield Sample(strided, {}, "two dims, strided")
    yield Sample(call(make(0, 4), make(0, 4), make(4), make(4)), {}, "no rows")
    rows = make(9, 33), make(1, 33).expand(9, -1)
    yield Sample(call(*rows, make(33), make(33)), {}, "several rows a program, a tail")
    yield Sample(call(make(2, 8200), make(2, 8200), make(8200)), {}, "walked in blocks")


def _without_bias(make: Make) -> Iterator[Sample]:
    for args, kwargs, note in _samples(make):
        yield Sample(args[:4], kwargs, note)


# ------------------------------------------------------------------------------------------- TABLE

_add_norm(
    LAYER_NORM, add_layer_norm, bind=_bind_layer_norm, arity=3, samples=_samples,
    schema="(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None, "
    "Tensor? bias=None, float eps=1e-05) -> (Tensor, Tensor)",
)  # fmt: skip
_add_norm(
    RMS_NORM, add_rms_norm, bind=_bind_rms_norm, arity=2, samples=_without_bias,
    schema="(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None, "
    "float? eps=None) -> (Tensor, Tensor)",
)  # fmt: skip
