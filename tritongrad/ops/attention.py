"""``scaled_dot_product_attention``, and what torch's has not: a window, a soft cap, ALiBi, sinks,
packed sequences, and the logarithm of the sum of exponentials.

A call with one of these goes to the same kernels. Its definition is ``attention``, an extension,
which returns both results; torch's name returns both on ``return_lse=True``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..admission import admit
from ..dtypes import FLOATING
from ..extension import extension
from ..launchers import matmul
from ..launchers.attention import MOST_HEAD_DIM, Inputs, Options, allocate
from ..op import Op, Tensors, Unsupported, register
from ..sampling import Make, Sample
from . import attention_calculus as calculus
from . import attention_formulas as formulas

F = torch.nn.functional

Window = tuple[int | None, int | None]


@extension
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``scaled_dot_product_attention`` with more to it, and the log-sum-exp of its scores.

    Args:
        query, key, value: (..., heads, length, size) each, as torch's.
        attn_mask, dropout_p, is_causal, scale, enable_gqa: as torch's.
        window: how many keys before and after the one at its own place a query sees, None for all.
        softcap: c of c tanh(score / c), applied before anything is added to the score.
        alibi_slopes: (heads,): score - slope * |place of query - place of key|.
        sinks: (heads,): one more logit in each row's sum, with nothing to attend to.
        cu_seqlens_q, cu_seqlens_k: (n + 1,) integers each. Length is that of n sequences, packed
            one after the other; the i-th is from cu_seqlens[i] to cu_seqlens[i + 1]. Queries see
            keys of their own sequence, in which places are counted for all of the above; a query in
            none gives 0. The values are not looked at: they rise from 0 and stay inside.

    Returns:
        The result, and (..., heads, length) of log sum exp scores in float32, or float64 if the
        query is; both differentiable by query, key, value, attn_mask, slopes and sinks.

    Raises:
        RuntimeError: what torch refuses, ``is_causal`` beside a mask for one.
        ValueError: a window, soft cap or packing that means nothing.
    """
    options, inputs = _read(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, softcap,
        alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, refusal=ValueError,
    )  # fmt: skip
    keep = None
    if dropout_p > 0.0:
        shape = (*inputs.q.shape[:-1], inputs.k.shape[-2])
        ones = torch.ones(shape, dtype=torch.float32, device=query.device)
        keep = F.dropout(ones, dropout_p).to(torch.promote_types(query.dtype, torch.float32))
    # In the inputs' dtype and float32, as the kernels: autocast would round lse.
    device = query.device.type
    with torch.autocast(device, enabled=False) if _has_autocast(device) else nullcontext():
        return formulas.value(options, inputs, keep)


def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


# Asked while it is traced: Dynamo of torch 2.11 does not know what that calls.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------- reading signatures


def _read(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    window: Window | None,
    softcap: float | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    *,
    refusal: Callable[[str], Exception],
) -> tuple[Options, Inputs]:
    """A call, its batches broadcast, without a seed; a ``refusal`` for what means nothing."""

    def demand(holds: bool, why: str) -> None:
        if not holds:
            raise refusal(why)

    demand(min(query.dim(), key.dim(), value.dim()) >= 2, "not matrices")
    demand(query.dtype == key.dtype == value.dtype, "query, key and value of several dtypes")
    demand(query.dtype in FLOATING, "not floating-point")
    demand(query.device == key.device == value.device, "several devices")
    demand(query.shape[-1] == key.shape[-1], "query and key differ in size")
    demand(key.shape[-2] == value.shape[-2], "key and value differ in length")
    demand(scale is None or type(scale) in (int, float), "scale is no number")
    demand(type(is_causal) is type(enable_gqa) is bool, "no bool where one is due")
    demand(type(dropout_p) in (int, float) and 0 <= dropout_p <= 1, "dropout_p is no probability")
    if enable_gqa:
        demand(min(query.dim(), key.dim(), value.dim()) >= 3, "no heads to share")
        heads, shared = query.shape[-3], key.shape[-3]
        demand(shared == value.shape[-3], "as many heads of keys as of values are shared")
        demand(shared > 0 and heads % shared == 0, "heads are not a multiple of those shared")
        query, key, value = _broadcast((query, key, value), 3, refusal)
    else:
        query, key, value = _broadcast((query, key, value), 2, refusal)
    lengths = query.shape[-2], key.shape[-2]
    if attn_mask is not None:
        demand(not is_causal, "a mask and is_causal")
        demand(attn_mask.device == query.device, "several devices")
        demand(
            attn_mask.dtype in (torch.bool, torch.float32, query.dtype), "a mask of another dtype"
        )
        demand(2 <= attn_mask.dim() <= query.dim(), "the mask has not the rank of a mask")
        pairs = (*query.shape[:-2], *lengths)
        sizes = zip(reversed(attn_mask.shape), reversed(pairs), strict=False)
        demand(all(a in (1, b) for a, b in sizes), "the mask does not broadcast")
    # A library op has a list of it.
    demand(window is None or (type(window) in (tuple, list) and len(window) == 2), f"{window=!r}")
    down, up = window or (None, None)
    demand(all(n is None or (type(n) is int and n >= 0) for n in (down, up)), f"{window=!r}")
    if is_causal:
        up = 0
    demand(softcap is None or (type(softcap) in (int, float) and softcap > 0), f"{softcap=!r}")
    for numbers, name in ((slopes, "alibi_slopes"), (sinks, "sinks")):
        if numbers is not None:
            demand(query.dim() >= 3 and numbers.shape == query.shape[-3:-2], f"not {name} of heads")
            demand(numbers.is_floating_point(), f"{name} not floating-point")
            demand(numbers.device == query.device, "several devices")
    demand((cu_q is None) == (cu_k is None), "cu_seqlens of queries or keys alone")
    if cu_q is not None and cu_k is not None:
        for cu in (cu_q, cu_k):
            demand(cu.dim() == 1 and cu.shape == cu_q.shape and len(cu) > 0, "cu_seqlens' shapes")
            demand(cu.dtype in (torch.int32, torch.int64), "cu_seqlens not int32 or int64")
            demand(cu.device == query.device, "several devices")
    options = Options(
        None if scale is None else float(scale),
        None if softcap is None else float(softcap),
        down,
        up,
        float(dropout_p),
    )
    return options, Inputs(query, key, value, attn_mask, sinks, slopes, cu_q, cu_k)


def _broadcast(
    matrices: tuple[Tensor, Tensor, Tensor], own: int, refusal: Callable[[str], Exception]
) -> tuple[Tensor, Tensor, Tensor]:
    """The three with one batch: all dimensions but the last ``own``."""
    batches = [t.shape[:-own] for t in matrices]
    if batches[0] == batches[1] == batches[2]:
        return matrices
    try:
        batch = torch.broadcast_shapes(*batches)
    except RuntimeError as error:
        raise refusal("batches do not broadcast") from error
    q, k, v = [t.expand(*batch, *t.shape[-own:]) for t in matrices]
    return q, k, v


def _admitted(*arguments: Any) -> tuple[Tensors, Options]:
    """A call as the kernels take it, or Unsupported."""
    query, key, value, mask, *_, slopes, sinks, cu_q, cu_k = arguments
    for t in (query, key, value):
        admit(t)
    for t in (mask, slopes, sinks, cu_q, cu_k):
        if t is not None:
            admit(t)
    options, x = _read(*arguments, refusal=Unsupported)
    broadcast = any(a is not b for a, b in zip(x[:3], arguments, strict=False))
    if broadcast and 0 in (query.numel(), key.numel()):
        raise Unsupported("nothing, broadcast: torch leaves that as it is")
    sizes = x.q.shape[-1], x.v.shape[-1]
    if not 0 < min(sizes) <= max(sizes) <= MOST_HEAD_DIM:
        raise Unsupported(f"head dimension beyond {MOST_HEAD_DIM}, or 0")
    if options.dropout > 0:
        # A tensor that the caller did not give: recall does not remember this call.
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=x.q.device)
        x = x._replace(seed=seed)
    return tuple(x), options._replace(precision=matmul.float32_precision())


def _bind(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensors, Options]:
    return _admitted(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
        None, None, None, None, None, None,
    )  # fmt: skip


def _bind_more(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensors, Options]:
    return _admitted(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window, softcap,
        alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k,
    )  # fmt: skip


def _bind_both(*args: Any, return_lse: bool, **kwargs: Any) -> tuple[Tensors, Options]:
    if return_lse is not True:
        raise Unsupported(f"{return_lse=!r}")
    return _bind_more(*args, **kwargs)


# ------------------------------------------------------------------------------------ compiled code


def _compiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window | None = None,
    **further: Any,
) -> bool:
    """Not with dropout, whose seed would be another one in backward, nor where a gradient would
    have to be summed to what was broadcast, nor a window of which one side is open."""
    own = 3 if enable_gqa else 2
    return (
        dropout_p == 0
        and min(query.dim(), key.dim(), value.dim()) >= own
        and query.shape[:-own] == key.shape[:-own] == value.shape[:-own]
        and min(query.shape[-1], value.shape[-1]) > 0
        and max(query.shape[-1], value.shape[-1]) <= MOST_HEAD_DIM
        and (window is None or None not in window)
    )


def _compiles_named(*args: Any, return_lse: bool = False, **kwargs: Any) -> bool:
    """Under torch's name, what torch's function has not cannot be torch's where it is not ours."""
    ours = not return_lse and _compiles(*args, **kwargs)
    if not ours and (return_lse or not _TORCHS.issuperset(kwargs)):
        raise NotImplementedError(
            "compiled, scaled_dot_product_attention has no dropout, broadcast batches, open window "
            "or return_lse beside what torch's has not: call tritongrad.nn.functional.attention"
        )
    return ours


_TORCHS = frozenset(inspect.signature(_bind).parameters)

_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, "
    "bool is_causal=False, *, float? scale=None, bool enable_gqa=False, int[]? window=None, "
    "float? softcap=None, Tensor? sinks=None, Tensor? alibi_slopes=None, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None) -> (Tensor, Tensor)"
)
"""Tensors in the order of ``Inputs``, which is that of their gradients."""


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Any:
    common = query, key, value, attn_mask, dropout_p, is_causal
    F.scaled_dot_product_attention(*common, scale=scale, enable_gqa=enable_gqa)  # knows the errors
    _read(
        *common, scale, enable_gqa, window, softcap, alibi_slopes, sinks, cu_seqlens_q,
        cu_seqlens_k, refusal=ValueError,
    )  # fmt: skip
    return allocate(query, value)


# ----------------------------------------------------------------------------------------- samples


def _samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 1), make(4, 1), make(4, 2)), {}, "matrices alone")
    bias = make(2, 3)
    yield Sample((make(2, 2, 2), make(2, 3, 2), make(2, 3, 1), bias), {"scale": 0.3}, "bias")
    causal = {"is_causal": True}
    yield Sample((make(1, 1, 5, 2), make(1, 1, 3, 2), make(1, 1, 3, 2)), causal, "causal")
    shared = make(1, 4, 2, 2), make(1, 2, 3, 2), make(1, 2, 3, 2), make(2, 3, dtype=torch.bool)
    yield Sample(shared, {"enable_gqa": True}, "heads share keys, bool mask")
    yield Sample((make(2, 1, 3, 2), make(2, 4, 2), make(2, 4, 2)), {}, "batches broadcast")
    long = make(1, 1, 19, 4), make(1, 1, 37, 4), make(1, 1, 37, 20)
    yield Sample(long, {}, "past one block")
    # Of the sizes that a GPU sees, a head dimension of 64: a slice, and rows with others between.
    inside = [make(1, 19, 2, 2).transpose(1, 2)[..., :64] for _ in range(3)]
    yield Sample(tuple(inside), causal, "heads inside")


def _more_samples(make: Make) -> Iterator[Sample]:
    def qkv(heads: int, length: int, keys: int) -> tuple[Tensor, ...]:
        return make(heads, length, 2), make(heads, keys, 2), make(heads, keys, 2)

    yield Sample(qkv(1, 2, 3), {"window": (1, 0)}, "window")
    options = {"sinks": make(2), "window": (1, 2), "softcap": 1.5}
    yield Sample(qkv(2, 2, 3), options, "sinks")
    slopes = make(2, low=0.1, high=0.9)
    yield Sample(qkv(2, 2, 3), {"alibi_slopes": slopes, "is_causal": True}, "ALiBi")
    packed = {
        name: torch.tensor(places, dtype=torch.int32, device=slopes.device)
        for name, places in (("cu_seqlens_q", (0, 1, 4)), ("cu_seqlens_k", (0, 3, 5)))
    }
    yield Sample(qkv(1, 4, 5), packed | {"softcap": 2.0, "attn_mask": make(4, 5)}, "packed")
    yield Sample(qkv(1, 19, 35), {"window": (3, 0)}, "past one block")


def _bench(make: Make, size: Any) -> Sample:
    """Causal, 16 heads of 128, a batch of as many tokens at each length."""
    shape = (max(2**14 // size.length, 1), 16, size.length, 128)
    return Sample((make(*shape), make(*shape), make(*shape)), {"is_causal": True})


# ------------------------------------------------------------------------------------------- TABLE


def _cost(options: Options, *tensors: Any) -> tuple[int, int]:
    x = Inputs(*tensors)
    (length, size), (keys, values) = x.q.shape[-2:], x.v.shape[-2:]
    many = x.q.numel() // max(length * size, 1)
    moved = (x.q.numel() + many * length * values + x.k.numel() + x.v.numel()) * x.q.element_size()
    share = 0.5 if options.up == 0 and options.down is None else 1
    return moved, int(2 * many * length * keys * (size + values) * share)


def _make(name: str, *targets: Any, **fields: Any) -> Op:
    op = Op(
        name=name,
        forward=lambda options, *tensors: calculus.launch.forward(options, Inputs(*tensors)),
        replaces=targets,
        ambient=matmul.float32_precision,
        outputs=2,
        saves=lambda options, needs: tuple(range(calculus.INPUTS + 2)),
        rule=calculus.attention_rule,
        reference=calculus.attention_reference,
        backward=calculus.GRADIENT,
        jvp=calculus.attention_jvp,
        vmap=calculus.attention_vmap(lambda: op),
        kernels=calculus.FORWARD,
        dtypes=FLOATING,
        formula=f"{calculus.GRADIENT.formula}; {calculus.BEYOND}",
        sources="kernels/attention.py",
        cost=_cost,
        bench=_bench,
        **fields,
    )
    return register(op)


def _result(found: tuple[Any, ...]) -> Any:
    """Not lse."""
    return found[0]


_make(
    "scaled_dot_product_attention", F.scaled_dot_product_attention,
    autocast={"cpu": "lower", "cuda": "lower"},
    bind=_bind, overloads=(_bind_more,), returns=_result, samples=_samples,
    opinfo=("nn.functional.scaled_dot_product_attention",),
    schema=_SCHEMA, compiles=_compiles_named, fake=_fake,
)  # fmt: skip
_make(
    "attention", attention,
    bind=_bind_more, variants={F.scaled_dot_product_attention: _bind_both},
    shares=(F.scaled_dot_product_attention,), samples=_more_samples,
    schema=_SCHEMA, compiles=_compiles, fake=_fake,
)  # fmt: skip
