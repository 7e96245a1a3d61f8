"""``group_norm``, ``instance_norm`` and ``batch_norm``: x less its mean over some dimensions, over
its deviation, times a weight and plus a bias of each channel.

Composites: views, then the op of ``channel_norm_calculus.py``, which any layout is read by as it is
and kept. Running statistics are updated by the call itself, once, and not by what differentiates
it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..admission import admit, transforming
from ..dispatch import apply
from ..dtypes import COMPUTE_DTYPE, FLOATING, is_number
from ..op import Bind, Op, Tensors, Unsupported, register
from ..sampling import Make, Sample
from .channel_norm_calculus import KERNELS, NORMED, Over, shifted
from .norm import OF_STATISTICS, check_affine
from .norm_backward import times

F = torch.nn.functional


class Params(NamedTuple):
    """What a call is beside its tensors (input, weight, bias, running mean, running variance).

    Attributes:
        groups: of channels that are normalised together; None: each channel by itself.
        dims: that statistics are taken over, of the input with its channels in groups; none: they
            are the running ones.
        eps: what the variance is raised by.
        momentum: share of a call's statistics in the running ones.
        instances: whether those are averages over the batch.
        dense: whether the input is made contiguous first, as torch does.
    """

    groups: int | None
    dims: tuple[int, ...]
    eps: float
    momentum: float = 0.0
    instances: bool = False
    dense: bool = False


# ---------------------------------------------------------------------- reading torch's signatures


def _read(
    input: Tensor,
    affine: tuple[Tensor | None, Tensor | None],
    running: tuple[Tensor | None, Tensor | None],
    numbers: Sequence[Any],
    mixed: bool,
) -> None:
    admit(input)
    if not input.numel():
        raise Unsupported("nothing to normalise")
    if input.dtype not in FLOATING or input.dim() < 2:
        raise Unsupported("not a floating-point tensor with channels")
    channels = input.shape[1:2]
    check_affine(input, affine, channels, mixed)
    check_affine(input, running, channels, True)
    if any(t is not None and t.requires_grad for t in running):
        raise Unsupported("running statistics that require a gradient")
    if len({t is None for t in running}) > 1:
        raise Unsupported("one running statistic of two")
    if not all(is_number(n) and not isinstance(n, bool) for n in numbers):
        raise Unsupported(f"eps or momentum among {numbers!r}")


def _layout(input: Tensor, channels_last: bool) -> bool:
    """Whether torch makes the input contiguous."""
    if transforming() or input.is_contiguous():
        return False
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    known = formats.get(input.dim()) if channels_last else None
    return known is None or not input.is_contiguous(memory_format=known)


def _bind_group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensors, Params]:
    admit(input)
    _read(input, (weight, bias), (None, None), (eps,), input.device.type == "cpu")
    if type(num_groups) is not int or num_groups < 1 or input.shape[1] % num_groups:
        raise Unsupported(f"num_groups={num_groups!r}")
    if input.numel() == num_groups:
        raise Unsupported("one value for each group")
    dims = tuple(range(2, input.dim() + 1))
    params = Params(num_groups, dims, float(eps), dense=_layout(input, True))
    return (input, weight, bias, None, None), params


def _bind_torch_group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> tuple[Tensors, Params]:
    _check_flag(cudnn_enabled)
    return _bind_group_norm(input, num_groups, weight, bias, eps)


def _check_flag(flag: Any) -> None:
    if type(flag) is not bool:
        raise Unsupported(f"{flag!r} is not a bool")


def _bind_instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensors, Params]:
    _check_flag(use_input_stats)
    _read(input, (weight, bias), (running_mean, running_var), (momentum, eps), True)
    if math.prod(input.shape[2:]) == 1:
        raise Unsupported("one value for each channel")
    dims = tuple(range(2, input.dim()))
    return _bound(
        input, weight, bias, running_mean, running_var, use_input_stats,
        Params(None, dims, float(eps), float(momentum), True, _layout(input, False)),
    )  # fmt: skip


def _bind_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensors, Params]:
    _check_flag(training)
    _read(input, (weight, bias), (running_mean, running_var), (momentum, eps), True)
    if training and input.numel() == input.shape[1]:
        raise Unsupported("one value for each channel")
    if eps <= 0 if training else eps < 0:
        raise Unsupported(f"eps={eps!r}")
    dims = (0, *range(2, input.dim()))
    return _bound(
        input, weight, bias, running_mean, running_var, training,
        Params(None, dims, float(eps), float(momentum), False, _layout(input, True)),
    )  # fmt: skip


def _bound(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    own: bool,
    params: Params,
) -> tuple[Tensors, Params]:
    """A call that uses its ``own`` statistics, or the running ones."""
    if not own:
        if running_mean is None:
            raise Unsupported("no statistics")
        params = params._replace(dims=())
    elif running_mean is not None and running_var is not None:
        if transforming():
            raise Unsupported("running statistics in a transform")
        for t in (running_mean, running_var):
            frozen = t.is_inference() and not torch.is_inference_mode_enabled()
            if frozen or not t.is_contiguous():
                raise Unsupported("running statistics that cannot be written to")
    return (input, weight, bias, running_mean, running_var), params


def _bind_torch_instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> tuple[Tensors, Params]:
    _check_flag(cudnn_enabled)
    return _bind_instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )


def _bind_torch_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> tuple[Tensors, Params]:
    _check_flag(cudnn_enabled)
    return _bind_batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


# ------------------------------------------------------------------------------------ their meaning


def _normalised(
    params: Params,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
) -> Tensors:
    dtype, compute = x.dtype, COMPUTE_DTYPE[x.dtype]
    if params.dense:
        x = x.contiguous()
    channels: tuple[int, ...] = (x.shape[1],)
    if params.groups is not None:
        channels = (params.groups, x.shape[1] // params.groups)
        x = x.unflatten(1, channels)

    def of_channels(value: Tensor | None) -> Any:
        if value is None:
            return None
        return value.reshape(*channels, *[1] * (x.dim() - 1 - len(channels)))

    weight, bias = of_channels(weight), of_channels(bias)
    if params.dims:
        over = Over(params.dims, params.eps, params.momentum)
        if running_mean is None or running_var is None or not params.instances:
            y = apply(NORMED, over, (x, weight, bias, running_mean, running_var))
        else:
            tensors = (x, weight, bias, None, None)
            y, origin, offset, _, var = apply(NORMED, over, tensors, everything=True)
            count = math.prod([x.shape[d] for d in params.dims])
            _update(params, running_mean, origin + offset)
            _update(params, running_var, var * (count / (count - 1)))
    else:
        mean, var = (of_channels(t).to(compute) for t in (running_mean, running_var))
        y = shifted(x, mean, times(torch.rsqrt(var + params.eps), weight), bias).to(dtype)
    return (y if params.groups is None else y.flatten(1, 2),)


@torch.no_grad()
def _update(params: Params, running: Tensor, now: Tensor) -> None:
    """Of instances: averages over the batch go into the running ones."""
    now = now.detach().mean(0)
    before = running.to(now.dtype)
    running.copy_(before * (1 - params.momentum) + now.reshape(-1) * params.momentum)


def _norm(
    name: str,
    target: Any,
    plain: Any,
    *,
    bind: Bind,
    bind_plain: Bind,
    samples: Any,
    autocast: dict[str, str],
) -> Op:
    """Make and register one. ``plain`` is torch's own of another signature."""
    op = Op(
        name=name,
        bind=bind,
        # Whether operands of different dtypes may come in.
        ambient=torch._C._is_any_autocast_enabled,
        replaces=(target,),
        variants={plain: bind_plain},
        reference=_normalised,
        autocast=autocast,
        opinfo=(f"nn.functional.{name}",),
        kernels=KERNELS,
        formula="dx = r (u - E u - xh E[u xh]), u = g w; dw = sum of g xh; db = sum of g",
        dtypes=FLOATING,
        samples=samples,
        sources="torch's own definition",
        differs="" if name == "group_norm" else OF_STATISTICS,
    )
    return register(op)


def _group_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(2, 4, 3), 2, make(4), make(4)), {}, "groups")
    yield Sample((make(3, 4), 2), {"eps": 0.1}, "no space")
    yield Sample((make(2, 4, 3)[:, :, ::2], 2, make(4)), {}, "strided, weight alone")
    yield Sample((make(2, 6, 4, 259), 3, make(6), make(6)), {}, "past one block")


def _instance_samples(make: Make) -> Iterator[Sample]:
    def stats() -> dict[str, Tensor]:
        return {
            "running_mean": make(2, requires_grad=False),
            "running_var": make(2, low=0.5, requires_grad=False),
        }

    yield Sample((make(3, 2, 4),), {"weight": make(2), "bias": make(2)}, "affine")
    yield Sample((make(3, 2, 4),), {**stats(), "use_input_stats": False}, "of those alone")
    yield Sample((make(2, 2, 3, 2).mT,), {}, "strided")
    yield Sample((make(2, 3, 1031),), {}, "past one block")


def _batch_samples(make: Make) -> Iterator[Sample]:
    def stats() -> tuple[Tensor, Tensor]:
        return make(2, requires_grad=False), make(2, low=0.5, requires_grad=False)

    # None with statistics to update, which transforms leave to torch: tests/test_norm.py has those.
    training = {"training": True}
    yield Sample((make(3, 2, 4), None, None, make(2), make(2)), training, "training")
    yield Sample((make(3, 2, 4), *stats(), make(2), make(2)), {}, "evaluation")
    yield Sample((make(5, 2), None, None), training, "no space, no statistics")
    last = make(2, 2, 3, 2).movedim(3, 1)
    yield Sample((last, None, None, make(2)), training, "channels last, weight alone")
    yield Sample((make(4, 2, 517), None, None, make(2), make(2)), training, "past one block")


# ------------------------------------------------------------------------------------------- TABLE

_norm(
    "group_norm", F.group_norm, torch.group_norm,
    bind=_bind_group_norm, bind_plain=_bind_torch_group_norm, samples=_group_samples,
    autocast={"cuda": "float32", "cpu": "keep"},
)  # fmt: skip
_norm(
    "instance_norm", F.instance_norm, torch.instance_norm,
    bind=_bind_instance_norm, bind_plain=_bind_torch_instance_norm, samples=_instance_samples,
    autocast={"cuda": "keep", "cpu": "keep"},
)  # fmt: skip
_norm(
    "batch_norm", F.batch_norm, torch.batch_norm,
    bind=_bind_batch_norm, bind_plain=_bind_torch_batch_norm, samples=_batch_samples,
    autocast={"cuda": "keep", "cpu": "keep"},
)  # fmt: skip
