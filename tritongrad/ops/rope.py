"""``rope``, of which every derivative is ``rope`` again or one sum over heads.

With R(x; c, s) the rotation and T(g, x) the gradients of the angles' cosines and sines, the form
<g, R(x; c, s)> is linear in each of g, x and (c, s). So R is differentiated to R(g; c, -s) by x and
T(g, x) by (c, s); and T, with u and v the gradients of what it returns, to R(x; u, v) by g and
R(g; u, -v) by x. These two ops are all orders.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..admission import admit, launchable, settle
from ..dispatch import apply
from ..dtypes import COMPUTE_DTYPE, FLOATING
from ..function import vmap_reference
from ..launchers.rope import angle_gradients, turn
from ..layout import batched
from ..op import Needs, Op, Spec, Tensors, Unsupported, register
from ..sampling import Make, Sample
from .rotation import AngleParams, Params, angles_summed, check, rope, turned


def _bind(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
    seq_dim: int = -2,
) -> tuple[Tensors, Params]:
    try:
        seq_dim = check(x, cos, sin, position_ids, interleaved, seq_dim)
    except (TypeError, RuntimeError, IndexError) as error:
        raise Unsupported(str(error)) from None
    tensors = x, cos, sin, position_ids
    for t in tensors:
        if t is not None:
            admit(t)
            if t.get_device() != x.get_device():
                raise Unsupported("tensors on different devices")
    if not {x.dtype, cos.dtype, sin.dtype} <= FLOATING:
        raise Unsupported("a dtype that kernels have not")
    return tensors, Params(interleaved, seq_dim)


# ------------------------------------------------------------------------------------- the rotation


def _forward(
    params: Params, x: Tensor, cos: Tensor | None, sin: Tensor | None, positions: Tensor | None
) -> Tensor:
    if positions is not None and positions.device.type == "cpu" and positions.numel():
        table = cos if cos is not None else sin
        assert table is not None
        low, high = (int(t) for t in torch.aminmax(positions))
        if low < -len(table) or high >= len(table):
            raise IndexError(f"rope: positions from {low} to {high} of {len(table)} rows")
    return turn(x, cos, sin, positions, params.seq_dim, *_flags(params), params.copy)


def _flags(params: Params) -> tuple[bool, bool]:
    return params.interleaved, params.inverse


def _rotate(
    params: Params, x: Tensor, cos: Tensor | None, sin: Tensor | None, positions: Tensor | None
) -> Tensor:
    """R, for rules."""
    tensors = x, cos, sin, positions
    if launchable(tensors):
        return apply(ROTATION, params, tensors)
    return turned(params, x, cos, sin, positions)


def _saves(params: Params, needs: Needs) -> tuple[int, ...]:
    kept = {1, 2} if needs[0] else set()
    kept |= {0} if needs[1] or needs[2] else set()
    return (*sorted(kept), 3)


def _rule(
    params: Params, needs: Needs, specs: tuple[Spec | None, ...], grads: Tensors, saved: Tensors
) -> Tensors:
    (g,), (x, cos, sin, positions) = grads, saved[:4]
    assert g is not None
    g = settle(g)
    dx = None
    if needs[0]:
        back = params._replace(inverse=not params.inverse)
        dx = _rotate(back, g, cos, sin, positions)
    angles = iter(())  # type: Iterator[Tensor]
    if needs[1] or needs[2]:
        assert x is not None
        angles = iter(_angles(params, needs[1:3], specs[1:3], g, x, positions))
    return dx, *[next(angles) if need else None for need in needs[1:3]], None


def _jvp(params: Params, tensors: Tensors, outputs: Tensors, tangents: Tensors) -> Tensor:
    x, cos, sin, positions = tensors
    assert x is not None
    dx, dcos, dsin, _ = (t if t is None else settle(t) for t in tangents)
    if dcos is None and dsin is None:
        assert dx is not None
        return _rotate(params, dx, cos, sin, positions)
    # What cancels must not have been rounded to half precision before.
    wide = COMPUTE_DTYPE[x.dtype]
    total = _rotate(params._replace(copy=False), x.to(wide), dcos, dsin, positions)
    if dx is not None:
        total = total + _rotate(params, dx.to(wide), cos, sin, positions)
    return total.to(x.dtype)


def _canonical(x: Tensor, seq_dim: int) -> Tensor:
    """(V, B, H, S, D), of a tensor that has the dimension of vmap in front."""
    x = x.movedim(seq_dim, -2)
    while x.dim() < 5:
        x = x.unsqueeze(-3)
    return x


def _restored(x: Tensor, rank: int, seq_dim: int) -> Tensor:
    """``_canonical`` undone, for a tensor of ``rank`` dimensions beside that of vmap."""
    for _ in range(4 - rank):
        x = x.squeeze(-3)
    return x.movedim(-2, seq_dim)


def _vmap(info: Any, params: Params, tensors: Tensors, dims: tuple) -> tuple[Tensor, int]:
    size, seq_dim = info.batch_size, params.seq_dim
    x, cos, sin, positions = batched(tensors, dims, size)
    rank = x.dim() - 1
    x = _canonical(x, seq_dim)
    each = x.shape[1]
    shared = all(d is None for d in dims[1:3])

    def joined(t: Tensor | None) -> Tensor | None:
        """(V B, S, ...) of what has (V, S, ...) or (V, B or 1, S, ...)."""
        if t is None:
            return None
        if t.dim() < (3 if t is positions else 4):
            t = t.unsqueeze(1)
        return t.expand(size, each, *t.shape[2:]).flatten(0, 1)

    if positions is not None and not shared:
        # Samples have tables of their own: rows are looked up here.
        at = positions if positions.dim() == 3 else positions.unsqueeze(1)
        sample = torch.arange(size, device=at.device)[:, None, None]
        cos, sin = (t if t is None else t[sample, at] for t in (cos, sin))
        positions = None
    if positions is not None:
        positions, cos, sin = joined(positions), tensors[1], tensors[2]
    elif shared and next(t for t in tensors[1:3] if t is not None).dim() == 2:
        cos, sin = tensors[1:3]
    else:
        cos, sin = joined(cos), joined(sin)
    folded = apply(ROTATION, params._replace(seq_dim=-2), (x.flatten(0, 1), cos, sin, positions))
    return _restored(folded.unflatten(0, (size, each)), rank, seq_dim), 0


# -------------------------------------------------------------------------- gradients of the angles


def _angles(
    params: Params,
    wanted: Needs,
    specs: tuple[Spec | None, ...],
    g: Tensor,
    x: Tensor,
    positions: Tensor | None,
) -> tuple[Tensor, ...]:
    """T, for rules: of each that is wanted."""
    call = AngleParams(params, wanted, specs)
    if launchable((g, x, positions)):
        found = apply(ANGLES, call, (g, x, positions))
        return found if type(found) is tuple else (found,)
    return angles_summed(call, g, x, positions)


def _angles_forward(call: AngleParams, g: Tensor, x: Tensor, positions: Tensor | None) -> Any:
    dtypes = [
        spec.dtype if wanted and spec is not None else None
        for spec, wanted in zip(call.specs, call.wanted, strict=True)
    ]
    params = call.turn
    found = angle_gradients(
        g, x, positions, params.seq_dim, *_flags(params), call.table, (dtypes[0], dtypes[1])
    )
    kept = tuple([t for t in found if t is not None])
    return kept[0] if len(kept) == 1 else kept


def _angles_rule(
    call: AngleParams, needs: Needs, specs: tuple[Spec | None, ...], grads: Tensors, saved: Tensors
) -> Tensors:
    g, x, positions = saved[:3]
    received = iter(grads)
    given = [next(received) if wanted else None for wanted in call.wanted]
    u, v = (t if t is None else settle(t) for t in given)
    params = call.turn._replace(copy=False)
    dg = dx = None
    if needs[0]:
        assert x is not None
        dg = _rotate(params, x, u, v, positions)
    if needs[1]:
        assert g is not None
        dx = _rotate(params._replace(inverse=not params.inverse), g, u, v, positions)
    return dg, dx, None


def _angles_jvp(call: AngleParams, tensors: Tensors, outputs: Tensors, tangents: Tensors) -> Any:
    g, x, positions = tensors
    dg, dx, _ = (t if t is None else settle(t) for t in tangents)
    assert g is not None
    assert x is not None
    pairs = [(a, b) for a, b in ((dg, x), (g, dx)) if a is not None and b is not None]
    terms = [_angles(call.turn, call.wanted, call.specs, a, b, positions) for a, b in pairs]
    found = tuple([sum(parts[1:], parts[0]) for parts in zip(*terms, strict=True)])
    return found[0] if len(found) == 1 else found


def _angles_vmap(info: Any, call: AngleParams, tensors: Tensors, dims: tuple) -> Any:
    if tensors[2] is not None:
        return vmap_reference(ANGLES, info, call, tensors, dims)
    size, table = info.batch_size, call.table
    g, x = (
        _canonical(t.expand(size, *t.shape[1:]), call.turn.seq_dim)
        for t in batched(tensors[:2], dims[:2], size)
    )
    each = x.shape[1]
    # Of each element of the batch by itself, and of those that share a table the sum.
    apart = torch.Size((size * each, *table[-2:]))
    specs = tuple([s if s is None else Spec(apart, s.dtype) for s in call.specs])
    params = call.turn._replace(seq_dim=-2)
    found = []
    for part in _angles(params, call.wanted, specs, g.flatten(0, 1), x.flatten(0, 1), None):
        part = part.unflatten(0, (size, each))
        if len(table) == 2:
            part = part.sum(1)
        elif table[0] == 1 != each:
            part = part.sum(1, keepdim=True)
        found.append(part)
    return (tuple(found), (0,) * len(found)) if len(found) > 1 else (found[0], 0)


ANGLES = Op(
    name="rope_angles",
    bind=None,
    forward=_angles_forward,
    outputs=2,
    rule=_angles_rule,
    jvp=_angles_jvp,
    vmap=_angles_vmap,
    kernels=("rope_angles_bwd", "rope_table_bwd"),
    formula="dg = rope(x; u, v); dx = rope(g; u, -v)",
    dtypes=FLOATING,
    sources="linear in g and in x",
)


def _cost(
    params: Params, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None
) -> tuple[int, int]:
    moved = sum(t.numel() * t.element_size() for t in (x, x, cos, sin))
    return moved, 3 * x.numel()


def _samples(make: Make) -> Iterator[Sample]:
    def angles(*shape: int) -> tuple[Tensor, Tensor]:
        return make(*shape), make(*shape)

    yield Sample((make(1, 2, 2, 4), *angles(2, 2)), {}, "small")
    yield Sample((make(2, 3, 5), *angles(3, 2)), {"interleaved": True}, "partial, without heads")
    yield Sample((make(2, 2, 1, 2), *angles(2, 2, 1)), {"seq_dim": 1}, "angles of each")
    at = make(2, 3, low=0, high=4, dtype=torch.int64, requires_grad=False)
    yield Sample((make(2, 1, 3, 3), *angles(4, 1), at), {}, "positions")
    yield Sample((make(1, 3, 140, 4).transpose(1, 2), *angles(140, 2)), {"seq_dim": 1}, "strided")
    yield Sample((make(2, 0, 3, 4), *angles(3, 2)), {}, "empty")


def _bench(make: Make, size: Any) -> Sample:
    """The heads of a batch of as many tokens at each length."""
    batch = max(2**14 // size.length, 1)
    return Sample((make(batch, 16, size.length, 128), make(size.length, 64), make(size.length, 64)))


ROTATION = register(
    Op(
        name="rope",
        bind=_bind,
        forward=_forward,
        replaces=(rope,),
        saves=_saves,
        rule=_rule,
        jvp=_jvp,
        vmap=_vmap,
        schema=(
            "(Tensor x, Tensor cos, Tensor sin, Tensor? position_ids=None, bool interleaved=False, "
            "int seq_dim=-2) -> Tensor"
        ),
        kernels=("rope_fwd", *ANGLES.kernels),
        formula="dx = rope(g; cos, -sin); dcos, dsin = sums of products of pairs over heads",
        dtypes=FLOATING,
        cost=_cost,
        samples=_samples,
        bench=_bench,
        sources="Su et al., arXiv 2104.09864; linear in x and in (cos, sin)",
    )
)
