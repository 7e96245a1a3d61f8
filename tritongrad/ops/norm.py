"""``layer_norm`` and ``rms_norm``: a kernel for the value, for the gradient, and for its gradient.

The derivatives are in ``norm_backward.py``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..admission import admit, settle, transforming
from ..dispatch import apply
from ..dtypes import COMPUTE_DTYPE, FLOATING, is_number
from ..function import vjp
from ..launchers import norm as launch
from ..layout import batch_first, batched
from ..op import BackwardParams, Bind, Needs, Op, Spec, Tensors, Unsupported, register
from ..sampling import Make, Sample
from .norm_backward import KERNELS, Layout, Params, backward_op, gradients_by_rule, three, times

F = torch.nn.functional

# ---------------------------------------------------------------------- reading torch's signatures


def read(
    input: Tensor,
    normalized_shape: Sequence[int],
    affine: tuple[Tensor | None, ...],
    eps: float,
    centred: bool,
    residual: tuple[Tensor, ...] = (),
) -> tuple[Tensors, Params]:
    admit(input)
    if input.dtype not in FLOATING:
        raise Unsupported(f"dtype {str(input.dtype).removeprefix('torch.')}")
    if not isinstance(normalized_shape, (tuple, list)):
        raise Unsupported(f"normalized_shape={normalized_shape!r}")
    shape, axes = tuple(normalized_shape), len(normalized_shape)
    if not shape or not all(type(n) is int for n in shape) or input.shape[-axes:] != shape:
        raise Unsupported("normalized_shape is not the end of the input's shape")
    for other in residual:
        admit(other)
        if (other.shape, other.dtype, other.device) != (input.shape, input.dtype, input.device):
            raise Unsupported("residual of another shape, dtype or device")
    check_affine(input, affine, torch.Size(shape), input.device.type == "cpu")
    if not is_number(eps) or isinstance(eps, bool):
        raise Unsupported(f"eps={eps!r}")
    tensors = (input, *residual, *affine)
    params = Params(axes, float(eps), centred)
    if not transforming():
        specs = tuple([None if t is None else Spec(t.shape, t.dtype) for t in tensors])
        params = params._replace(specs=specs)
    return tensors, params


def check_affine(
    input: Tensor, affine: tuple[Tensor | None, ...], shape: torch.Size, mixed: bool
) -> None:
    """Raise Unsupported for a weight or bias that does not fit.

    Args:
        mixed: whether float32 goes with an input of half precision.
    """
    present = [t for t in affine if t is not None]
    for t in present:
        admit(t)
        if t.shape != shape or t.device != input.device:
            raise Unsupported("weight or bias of another shape or device")
    allowed = {input.dtype} | ({COMPUTE_DTYPE[input.dtype]} if mixed else set())
    if len({t.dtype for t in present}) > 1 or any(t.dtype not in allowed for t in present):
        raise Unsupported("weight or bias of another dtype")


def _bind_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensors, Params]:
    return read(input, normalized_shape, (weight, bias), eps, True)


def _bind_torch_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> tuple[Tensors, Params]:
    if type(cudnn_enable) is not bool:
        raise Unsupported(f"cudnn_enable={cudnn_enable!r}")
    return read(input, normalized_shape, (weight, bias), eps, True)


def _bind_rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensors, Params]:
    return read(input, normalized_shape, (weight,), epsilon(input, eps), False)


def _spelled_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> tuple:
    return input, normalized_shape, weight, bias, eps


_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key


def epsilon(input: Tensor, eps: float | None) -> float:
    admit(input)
    if eps is not None or input.dtype not in FLOATING:
        return 0.0 if eps is None else eps
    return torch.finfo(COMPUTE_DTYPE[input.dtype]).eps


# ----------------------------------------------------------------------------------- made into ops


def tangent_of(op: Op, params: Params, x: Tensor, weight: Tensor | None, tangents: Any) -> Tensor:
    """That of the value: the Jacobian of a row is symmetric, so that the gradient's kernel computes
    it. Of ``op``, which has no second output."""
    compute = COMPUTE_DTYPE[x.dtype]
    dx, dweight, dbias = three([t if t is None else settle(t).to(compute) for t in tangents])
    total: Tensor | None = None
    if dx is not None:
        missing = (None,) * (len(tangents) - 1)
        needs, specs = (True, *map(bool, missing)), (Spec(x.shape, compute), *missing)
        saved = (x, *missing, *[None] * (2 + params.centred))
        (total, *_) = vjp(op, params, needs, specs, (dx,), saved, own_level=1)
        assert total is not None
        total = times(total, weight)
    if dweight is not None:
        xh = op.replaces[0](x.to(compute), x.shape[x.dim() - params.axes :], eps=params.eps)
        total = xh * dweight if total is None else total + xh * dweight
    if dbias is not None:
        total = dbias.expand(x.shape) if total is None else total + dbias
    assert total is not None
    return total.to(x.dtype)


def vmap_rows(op: Op, info: Any, params: Params, tensors: Tensors, dims: tuple, rows: int) -> Any:
    """The vmap rule of ops here: a batch is more rows, of the first ``rows`` tensors. What each
    sample has a weight of its own for is normalised without, and not rounded before it is
    multiplied."""
    params = params._replace(specs=None)
    inputs = batched(tensors[:rows], dims[:rows], info.batch_size)
    affine, affine_dims = tensors[rows:], dims[rows:]
    if all(d is None for d in affine_dims):
        found = apply(op, params, (*inputs, *affine), everything=True)
        return found, (0,) * len(found)
    dtype, rank = inputs[0].dtype, inputs[0].dim() - 1
    if rows == 2:
        inputs = (inputs[0] + inputs[1], torch.zeros_like(inputs[0]))
    wide = [t.to(COMPUTE_DTYPE[dtype]) for t in inputs]
    y, *rest = apply(op, params, (*wide, *[None] * len(affine)), everything=True)
    weight, bias = [
        t if t is None else batch_first(t, d, rank)
        for t, d in zip(three((None, *affine))[1:], three((None, *affine_dims))[1:], strict=True)
    ]
    y = times(y, weight)
    y = y if bias is None else y + bias
    found = tuple([t.to(dtype) for t in (y, *rest[: rows - 1])]) + tuple(rest[rows - 1 :])
    return found, (0,) * len(found)


def _norm(
    name: str,
    *targets: Callable[..., Any],
    bind: Bind,
    arity: int,
    samples: Callable[[Make], Iterator[Sample]],
    schema: str,
    formula: str,
    spelling: tuple[Callable[..., Any], Callable[..., tuple]] | None = None,
    differs: str = "",
    variants: Mapping[Callable[..., Any], Bind] | None = None,
) -> Op:
    """Make and register one of the two."""
    layout = Layout(arity, 1)

    def forward(params: Params, x: Tensor, *affine: Tensor | None) -> Any:
        _, weight, bias = three((x, *affine))
        y, _, mean, rstd = launch.forward(
            (x,), params.axes, params.centred, params.eps, weight, bias
        )
        return (y, mean, rstd) if params.centred else (y, rstd)

    def rule(params: Params, needs: Needs, specs: tuple, grads: Tensors, saved: Tensors) -> Tensors:
        bp = BackwardParams(params, needs, specs)
        return gradients_by_rule(layout, bp, grads, three(saved[:arity]))

    def jvp(params: Params, tensors: Tensors, outputs: Tensors, tangents: Tensors) -> Tensor:
        assert tensors[0] is not None
        return tangent_of(op, params, tensors[0], tensors[1], tangents)

    op = Op(
        name=name,
        bind=bind,
        forward=forward,
        replaces=targets,
        variants=variants or {},
        saves=lambda params, needs: _saves(params, needs, arity),
        specs=operator.attrgetter("specs"),
        rule=rule,
        backward=backward_op(name, layout),
        jvp=jvp,
        vmap=lambda info, params, tensors, dims: vmap_rows(op, info, params, tensors, dims, 1),
        # Of the CPU's lists it is in none, and rms_norm of CUDA's since torch 2.12.
        autocast={"cuda": "float32"} if _has_kernel(f"aten::{name}", "AutocastCUDA") else {},
        schema=schema,
        spelling=spelling,
        opinfo=(f"nn.functional.{name}",),
        kernels=KERNELS[:1],
        formula=formula,
        dtypes=FLOATING,
        samples=samples,
        sources="see kernels/norm.py",
        differs=differs,
        cost=cost_of,
    )
    return register(op)


def _saves(params: Params, needs: Needs, arity: int) -> tuple[int, ...]:
    """x, weight and statistics, of what the gradients that are needed depend on."""
    if not (needs[0] or needs[1]):
        return ()
    weight = (1,) if needs[0] else ()
    return (0, *weight, *range(arity + 1, arity + 2 + params.centred))


def cost_of(params: Params, x: Tensor, *affine: Tensor | None) -> tuple[int, int]:
    vectors = sum(t.numel() * t.element_size() for t in affine if t is not None)
    return 2 * x.numel() * x.element_size() + vectors, 6 * x.numel()


def _layer_norm_samples(make: Make) -> Iterator[Sample]:
    def call(
        x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, axes: int = 1
    ) -> tuple[Any, ...]:
        return x, x.shape[-axes:], weight, bias

    yield Sample(call(make(3, 5), make(5), make(5)), {}, "rows")
    two = call(make(2, 3, 4), make(3, 4), make(3, 4), 2)
    yield Sample(two, {"eps": 0.1}, "two dims")
    yield Sample(call(make(4, 6)), {}, "without weight and bias")
    yield Sample(call(make(4, 6)[:, ::2], make(6)[::2]), {}, "weight alone, every other column")
    yield Sample(call(make(4, 3).t(), make(4), make(8)[::2]), {}, "transposed")
    yield Sample(call(make(3, 1).expand(-1, 4), make(4)), {}, "expanded")
    yield Sample(call(make(6), make(6), make(6)), {}, "one row")
    yield Sample(call(make(0, 4), make(4), make(4)), {}, "no rows")
    yield Sample(call(make(4, 0), make(0), make(0)), {}, "rows of nothing")
    yield Sample(call(make(19, 33), make(33), make(33)), {}, "several rows a program, a tail")
    yield Sample(call(make(2, 8200), make(8200), make(8200)), {}, "walked in blocks")


def _rms_norm_samples(make: Make) -> Iterator[Sample]:
    for args, kwargs, note in _layer_norm_samples(make):
        yield Sample(args[:3], kwargs, note)


# ------------------------------------------------------------------------------------------- TABLE

OF_STATISTICS = (
    "Third derivatives are those of the function; torch's take its statistics for constants."
)

LAYER_NORM = _norm(
    "layer_norm", F.layer_norm,
    variants={torch.layer_norm: _bind_torch_layer_norm},
    spelling=(torch.layer_norm, _spelled_layer_norm),
    bind=_bind_layer_norm, arity=3, samples=_layer_norm_samples,
    schema="(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, "
    "float eps=1e-05) -> Tensor",
    formula="dx = r (u - E u - xh E[u xh]), u = g w; dw = sum of g xh; db = sum of g",
    differs=f"{OF_STATISTICS} So does its forward mode under reverse mode.",
)  # fmt: skip
RMS_NORM = _norm(
    "rms_norm", F.rms_norm, torch.rms_norm,
    bind=_bind_rms_norm, arity=2, samples=_rms_norm_samples,
    schema="(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None) "
    "-> Tensor",
    formula="dx = r (u - xh E[u xh]), u = g w; dw = sum of g xh",
)  # fmt: skip
