"""The calculus of attention: the ops of its tangent, its gradient and the gradients of those.

    attention  (x) -> o, lse              jvp: TANGENT; backward: GRADIENT
    TANGENT    (x, x', o, lse) -> o', mu  backward: TANGENTS_GRADIENT, which along x' is GRADIENT
    GRADIENT   (g, h, x, o, lse) -> dx    jvp: GRADIENT + TANGENTS_GRADIENT; backward: SECOND, which
                                          is TANGENT along g and h, TANGENTS_GRADIENT along x

o and lse are what the kernels need not compute again. They are functions of x, and every derivative
along x is the whole one; so along o and lse there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..admission import launchable
from ..dispatch import apply
from ..dtypes import COMPUTE_DTYPE, FLOATING
from ..function import carries_tangents, vmap_by_samples
from ..launchers import attention as launch
from ..launchers.attention import DERIVED, Inputs, Options, Tangents
from ..op import BackwardParams, Needs, Op, Tensors
from . import attention_formulas as formulas

INPUTS = len(Inputs._fields)

BEYOND = "third order, and forward over forward, of all pairs in memory"
"""What the contract says of derivatives without kernels of their own."""

FORWARD = ("attention_fwd",)
BACKWARD = ("attention_rows", "attention_bwd_q", "attention_bwd_kv", "attention_bwd_mask")
JVP = ("attention_jvp",)
JVP_BACKWARD = (
    "attention_rows",
    "attention_jvp_bwd_q",
    "attention_jvp_bwd_kv",
    "attention_bwd_mask",
)

# How each tensor meets a batch of vmap: matrices have it in front, masks and numbers of heads in
# front of what they broadcast along, queries' numbers in front. "c": a batch of those is beyond the
# kernels.
INPUT_KINDS = "mmmbnnccc"
TANGENT_KINDS = "mmmbnn"


def wanted(found: Sequence[Tensor | None], needs: Sequence[bool]) -> Any:
    """The gradients that are needed, as a function returns them."""
    kept = tuple([t for t, need in zip(found, needs, strict=False) if need])
    return kept[0] if len(kept) == 1 else kept


def spread(found: Sequence[Tensor | None], needs: Needs) -> Tensors:
    """Gradients in their places, None where there is no need of one."""
    padded = (*found, *[None] * (len(needs) - len(found)))
    return tuple([t if need else None for t, need in zip(padded, needs, strict=True)])


# ---------------------------------------------------------------------------------- dropout's mask


def _keep_forward(params: tuple[float, tuple[int, ...], torch.dtype], seed: Tensor) -> Tensor:
    probability, shape, dtype = params
    return launch.keep(probability, seed, shape, dtype)


KEEP = Op(
    name="attention_keep",
    bind=None,
    forward=_keep_forward,
    differentiable=False,
    kernels=("attention_keep",),
    dtypes=FLOATING,
)


def keep(options: Options, x: Inputs) -> Tensor | None:
    """Dropout's factors of all pairs, for a formula."""
    if x.seed is None:
        return None
    shape = (*x.q.shape[:-1], x.k.shape[-2])
    return apply(KEEP, (options.dropout, shape, COMPUTE_DTYPE[x.q.dtype]), (x.seed,))


# ---------------------------------------------------------------------------------- batching rules


def _vmap_of(op: Callable[[], Op], kinds: Callable[[Any], str], results: Callable[..., str]) -> Any:
    """A batch as one more dimension in front. ``kinds`` are those of the tensors, ``results`` those
    of the outputs, of which masks and numbers come back with what they were padded by."""

    def vmap(info: Any, params: Any, tensors: Tensors, dims: tuple) -> Any:
        about, size = kinds(params), info.batch_size
        beyond = [
            t
            for t, kind, d in zip(tensors, about, dims, strict=True)
            if kind == "c" and t is not None and d is not None
        ]
        seeded = _seed(tensors, about) is not None
        if beyond or seeded:
            return vmap_by_samples(op(), info, params, tensors, dims)
        rank = _rank(tensors, about, dims)
        batched = tuple(
            [
                _front(t, kind, d, size, rank)
                for t, kind, d in zip(tensors, about, dims, strict=True)
            ]
        )
        found = apply(op(), params, batched, everything=True)
        many = type(found) is tuple
        shapes = [
            None
            if t is None or kind not in "bn"
            else t.shape
            if d is None
            else _without(t.shape, d)
            for t, kind, d in zip(tensors, about, dims, strict=True)
        ]
        outs = []
        for t, where in zip(found if many else (found,), results(params), strict=True):
            own = shapes[ord(where) - ord("A")] if where.isupper() else None
            outs.append(t if own is None else t.reshape(size, *own))
        return (tuple(outs), (0,) * len(outs)) if many else (outs[0], 0)

    return vmap


def _seed(tensors: Tensors, kinds: str) -> Tensor | None:
    """The last of the inputs that kernels cannot batch is dropout's seed."""
    return tensors[kinds.rindex("c")]


def _rank(tensors: Tensors, kinds: str, dims: tuple) -> int:
    """Dimensions of a query without the batch."""
    first = kinds.index(INPUT_KINDS)
    query = tensors[first]
    assert query is not None
    return query.dim() - (dims[first] is not None)


def _without(shape: torch.Size, dim: int) -> tuple[int, ...]:
    return tuple([n for i, n in enumerate(shape) if i != dim % len(shape)])


def _front(t: Tensor | None, kind: str, dim: int | None, size: int, rank: int) -> Tensor | None:
    if t is None or kind == "c":
        return t
    t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    padding = {"b": rank, "n": rank - 2}.get(kind, t.dim() - 1) - (t.dim() - 1)
    return t.reshape(size, *[1] * padding, *t.shape[1:]) if padding > 0 else t


# ------------------------------------------------------------------------------------- the tangent


def tangent(options: Options, x: Inputs, t: Tangents, out: Any, lse: Any) -> tuple[Tensor, Tensor]:
    """o' and mu, where a jvp is asked for."""
    tensors = (*x, *t, out, lse)
    if launchable(tensors) and not carries_tangents(tensors, 1):
        return apply(TANGENT, options, tensors)
    return formulas.jvp(options, x, t, keep(options, x))


def inputs_of(tensors: Sequence[Any]) -> Inputs:
    """The inputs at the beginning of ``tensors``."""
    return Inputs(*tensors[:INPUTS])


def _split(tensors: Sequence[Any]) -> tuple[Inputs, Tangents, Any, Any]:
    """The arguments of TANGENT."""
    x, t = inputs_of(tensors), Tangents(*tensors[INPUTS : INPUTS + DERIVED])
    out, lse = tensors[INPUTS + DERIVED :]
    return x, t, out, lse


def _tangent_forward(options: Options, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    x, t, out, lse = _split(tensors)
    return launch.jvp(options, x, t, out, lse)


def _tangent_rule(
    options: Options, needs: Needs, specs: tuple, grads: Tensors, saved: Tensors
) -> Tensors:
    x, t, *_ = _split(saved[: len(needs)])
    g, h = grads
    dropped = keep(options, x)
    found: list[Tensor | None] = [None] * INPUTS
    if any(needs[:DERIVED]):
        found[:DERIVED] = formulas.second(options, x, t, g, h, dropped)
    if any(needs[INPUTS:]):
        found += formulas.backward(options, x, g, h, dropped)
    return spread(found, needs)


def _tangents_gradient_forward(bp: BackwardParams, g: Any, h: Any, *rest: Tensor | None) -> Any:
    x, t, out, lse = _split(rest[:-2])
    o, mu = rest[-2:]
    first, second = bp.needs[:DERIVED], bp.needs[INPUTS : INPUTS + DERIVED]
    found: list[Tensor | None] = [None] * INPUTS
    if any(first):
        assert o is not None
        assert mu is not None
        found[:DERIVED] = launch.second(bp.params, x, first, g, h, out, lse, t, o, mu)
    if any(second):
        found += launch.backward(bp.params, x, second, g, h, out, lse)
    return wanted(found, bp.needs)


def _tangents_gradient_reference(bp: BackwardParams, g: Any, h: Any, *rest: Any) -> Tensors:
    found = _tangent_rule(bp.params, bp.needs, bp.specs, (g, h), rest)
    return tuple([t for t in found if t is not None])


def _own(kinds: str, needs: Sequence[bool]) -> str:
    """Results of a gradient: of masks and numbers, the place of the input whose shape they have."""
    return "".join(
        chr(ord("A") + i) if kind in "bn" else kind
        for i, kind in enumerate(kinds)
        if i < len(needs) and needs[i]
    )


TANGENT_ARGUMENTS = INPUT_KINDS + TANGENT_KINDS + "mr"

TANGENTS_GRADIENT: Op = Op(
    name="attention_tangent_backward",
    bind=None,
    forward=_tangents_gradient_forward,
    outputs=2 * DERIVED,
    reference=_tangents_gradient_reference,
    constants=tuple(range(2 + INPUTS + DERIVED, 2 + INPUTS + DERIVED + 4)),
    vmap=_vmap_of(
        lambda: TANGENTS_GRADIENT,
        lambda bp: "mr" + TANGENT_ARGUMENTS + "mr",
        lambda bp: _own("mr" + TANGENT_ARGUMENTS, (False, False, *bp.needs[: INPUTS + DERIVED])),
    ),
    kernels=JVP_BACKWARD + BACKWARD,
    dtypes=FLOATING,
    formula="see kernels/attention.py",
)

TANGENT: Op = Op(
    name="attention_tangent",
    bind=None,
    forward=_tangent_forward,
    outputs=2,
    saves=lambda options, needs: tuple(range(INPUTS + DERIVED + 4)),
    rule=_tangent_rule,
    backward=TANGENTS_GRADIENT,
    vmap=_vmap_of(lambda: TANGENT, lambda options: TANGENT_ARGUMENTS, lambda options: "mr"),
    kernels=JVP,
    dtypes=FLOATING,
    formula="o' = sum(D * p * (t * v + v')) - mu * o",
)

# ------------------------------------------------------------------------------------ the gradient


def _gradient_forward(bp: BackwardParams, g: Any, h: Any, *rest: Any) -> Any:
    x, (out, lse) = Inputs(*rest[:INPUTS]), rest[INPUTS:]
    found = launch.backward(bp.params, x, bp.needs[:DERIVED], g, h, out, lse)
    return wanted(found, bp.needs)


def attention_reference(options: Options, *tensors: Tensor | None) -> Tensors:
    x = inputs_of(tensors)
    return formulas.value(options, x, keep(options, x))


def attention_rule(
    options: Options, needs: Needs, specs: tuple, grads: Tensors, saved: Tensors
) -> Tensors:
    x, (g, h) = inputs_of(saved), grads
    return spread(formulas.backward(options, x, g, h, keep(options, x)), needs)


def _gradient_reference(bp: BackwardParams, g: Any, h: Any, *rest: Any) -> Tensors:
    found = attention_rule(bp.params, bp.needs, bp.specs, (g, h), rest)
    return tuple([t for t in found if t is not None])


def _directions(bp: BackwardParams, found: Sequence[Tensor | None]) -> Tangents:
    """Cotangents of a gradient's results, which are tangents of the inputs."""
    given = iter(found)
    return Tangents(*[next(given) if need else None for need in bp.needs[:DERIVED]])


def _gradient_rule(
    bp: BackwardParams, needs: Needs, specs: tuple, grads: Tensors, saved: Tensors
) -> Tensors:
    g, h, *rest = saved[: len(needs)]
    x, t = inputs_of(rest), _directions(bp, grads)
    dropped = keep(bp.params, x)
    found: list[Tensor | None] = [None, None]
    if any(needs[:2]):
        found = list(formulas.jvp(bp.params, x, t, dropped))
    if any(needs[2:]):
        found += formulas.second(bp.params, x, t, g, h, dropped)
    return spread(found, needs)


def _gradient_jvp(bp: BackwardParams, tensors: Tensors, outputs: Tensors, tangents: Tensors) -> Any:
    """<g, o(x)> has a symmetric Hessian: the tangent of its gradient in a direction of x is the
    gradient of its tangent in that direction."""
    (g, h), x, (out, lse) = tensors[:2], tensors[2 : 2 + INPUTS], tensors[2 + INPUTS :]
    dg, dh, *directions = tangents[: 2 + DERIVED]
    inputs, t = Inputs(*x), Tangents(*directions)  # type: ignore[arg-type]
    every = (*tensors, *tangents)
    kernels = launchable(every) and not carries_tangents(every, 1)
    total: list[Any] = [None] * sum(bp.needs)
    if dg is not None or dh is not None:
        if kernels:
            found = apply(GRADIENT, bp, (dg, dh, *tensors[2:]))
        else:
            found = wanted(
                formulas.backward(bp.params, inputs, dg, dh, keep(bp.params, inputs)), bp.needs
            )
        total = list(found) if type(found) is tuple else [found]
    if any(d is not None for d in directions):
        if kernels:
            both = apply(TANGENT, bp.params, (*x, *t, out, lse))
            needs = (*bp.needs, *[False] * (DERIVED + 2))
            below = BackwardParams(bp.params, needs, ())
            found = apply(TANGENTS_GRADIENT, below, (g, h, *x, *t, out, lse, *both))
        else:
            found = wanted(
                formulas.second(bp.params, inputs, t, g, h, keep(bp.params, inputs)), bp.needs
            )
        found = found if type(found) is tuple else (found,)
        total = [b if a is None else a + b for a, b in zip(total, found, strict=True)]
    return tuple(total) if len(total) > 1 else total[0]


def _second_forward(above: BackwardParams, *tensors: Any) -> Any:
    bp: BackwardParams = above.params
    count = sum(bp.needs)
    t = _directions(bp, tensors[:count])
    g, h, *rest = tensors[count : count + 2 + INPUTS + 2]
    x, (out, lse) = Inputs(*rest[:INPUTS]), rest[INPUTS:]
    o, mu = launch.jvp(bp.params, x, t, out, lse)
    found: list[Tensor | None] = [o, mu]
    needs = above.needs[2 : 2 + DERIVED]
    if any(needs):
        found += launch.second(bp.params, x, needs, g, h, out, lse, t, o, mu)
    return wanted(found, above.needs)


def _second_reference(above: BackwardParams, *tensors: Any) -> Tensors:
    count = sum(above.params.needs)
    found = _gradient_rule(above.params, above.needs, above.specs, tensors[:count], tensors[count:])
    return tuple([t for t in found if t is not None])


GRADIENT_ARGUMENTS = "mr" + INPUT_KINDS + "mr"


def _second_kinds(above: BackwardParams) -> str:
    first = "".join(k for k, n in zip(INPUT_KINDS, above.params.needs, strict=True) if n)
    return first + GRADIENT_ARGUMENTS + first


def _second_results(above: BackwardParams) -> str:
    count = sum(above.params.needs)
    return _own(_second_kinds(above), (*[False] * count, *above.needs[: 2 + DERIVED]))


SECOND: Op = Op(
    name="attention_backward_backward",
    bind=None,
    forward=_second_forward,
    outputs=2 + DERIVED,
    reference=_second_reference,
    vmap=_vmap_of(lambda: SECOND, _second_kinds, _second_results),
    kernels=JVP + JVP_BACKWARD,
    dtypes=FLOATING,
    formula="the tangent along cotangents, and its gradient",
)

GRADIENT: Op = Op(
    name="attention_backward",
    bind=None,
    forward=_gradient_forward,
    outputs=DERIVED,
    rule=_gradient_rule,
    reference=_gradient_reference,
    backward=SECOND,
    jvp=_gradient_jvp,
    vmap=_vmap_of(
        lambda: GRADIENT,
        lambda bp: GRADIENT_ARGUMENTS,
        lambda bp: _own(GRADIENT_ARGUMENTS, (False, False, *bp.needs)),
    ),
    kernels=BACKWARD,
    dtypes=FLOATING,
    formula="dq = scale * r @ k; dk = scale * r.mT @ q; dv = p.mT @ g; r = p * (g @ v.mT - delta)",
)


def attention_jvp(
    options: Options, tensors: Tensors, outputs: Tensors, tangents: Tensors
) -> tuple[Tensor, Tensor]:
    out, lse = outputs
    return tangent(options, inputs_of(tensors), Tangents(*tangents[:DERIVED]), out, lse)


def attention_vmap(op: Callable[[], Op]) -> Any:
    """The vmap rule of an op that computes the value."""
    return _vmap_of(op, lambda options: INPUT_KINDS, lambda options: "mr")
