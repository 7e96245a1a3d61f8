"""Scans: ``cumsum``, ``cumprod``, and ``prod``, whose derivatives are made of them.

Every derivative of a product of x is a product without some of the x. Nothing here divides by x,
which may be 0: the gradient of a cumulative product is the solution of a first-order recurrence,
which has a gradient that is one again, so that every order is exact at a cost that grows with the
length alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..admission import admit, launchable, settle
from ..dispatch import apply
from ..dtypes import COMPUTE_DTYPE, FLOATING, INTEGRAL
from ..kernels import reduction as k
from ..kernels import reduction_backward as kb
from ..launchers.reduction import Reduction, plan_for, run_many
from ..launchers.scan import (
    CUMPROD,
    CUMPROD_BACKWARD,
    CUMSUM,
    RECURRENCE,
    Launch,
    Scan,
    prepare,
    run,
)
from ..layout import batched
from ..op import Needs, Op, Spec, Tensors, Unsupported, register
from ..sampling import Make, Sample
from .reduction import (
    OMITTED,
    Kind,
    Params,
    backward_op,
    bind_total,
    exact_pointwise,
    reduction,
    restored,
    shifted,
    short_samples,
)


class ScanParams(NamedTuple):
    """What a scan is beside its tensors.

    Attributes:
        dims: the dimension that it goes along; none of a number.
        reverse: whether it begins at the last element.
        result: dtype of the result, to which torch converts the input first.
        specs: of the tensor, and
        launch: of a call that is remembered; neither of another, nor of other tensors.
    """

    dims: tuple[int, ...]
    reverse: bool
    result: torch.dtype
    specs: tuple[Spec, ...] | None = None
    launch: Launch | None = None

    def elsewhere(self, **changes: Any) -> ScanParams:
        """Of other tensors."""
        return self._replace(specs=None, launch=None, **changes)


def _bind(
    input: Tensor, dim: int, *, dtype: torch.dtype | None = None
) -> tuple[Tensors, ScanParams]:
    admit(input)
    result = input.dtype if dtype is None else dtype
    if result in INTEGRAL:
        raise Unsupported("integer result")
    if result not in FLOATING or input.dtype not in FLOATING | INTEGRAL:
        raise Unsupported(f"dtype {str(result).removeprefix('torch.')}")
    if type(dim) is not int:
        raise Unsupported(f"dim={dim!r}")
    rank = input.dim()
    if not -max(rank, 1) <= dim < max(rank, 1):
        raise Unsupported("dim out of range")
    return (input,), ScanParams((dim % rank,) if rank else (), False, result)


def _run(kind: Scan, params: ScanParams, *operands: Tensor) -> Tensor:
    if params.launch is not None:
        return run(params.launch, operands)
    if not params.dims:  # of a number, or of numbers in a batch
        along = params._replace(dims=(operands[0].dim(),))
        # In place: a view made inside a Function could not be modified in place by the user.
        return _run(kind, along, *[t.unsqueeze(-1) for t in operands]).squeeze_(-1)
    return run(_launch(kind, params, operands), operands)


def _launch(kind: Scan, params: ScanParams, operands: tuple[Tensor, ...]) -> Launch:
    (dim,) = params.dims
    return prepare(kind, operands, dim, params.reverse, params.result)


def _other_way(params: ScanParams) -> ScanParams:
    return params.elsewhere(reverse=not params.reverse)


# -------------------------------------------------------------------------------- torch mathematics


def _moved(x: Tensor, params: ScanParams, steps: int, fill: float) -> Tensor:
    """``x`` moved along the scan, by a negative number of steps towards its beginning; ``fill``
    where it was."""
    if not params.dims:
        return torch.full_like(x, fill)
    (dim,) = params.dims
    kept = max(x.shape[dim] - abs(steps), 0)
    edge = torch.full_like(x.narrow(dim, 0, x.shape[dim] - kept), fill)
    if (steps > 0) != params.reverse:
        return torch.cat([edge, x.narrow(dim, 0, kept)], dim)
    return torch.cat([x.narrow(dim, x.shape[dim] - kept, kept), edge], dim)


def _flipped(function: Callable[..., Tensor], x: Tensor, params: ScanParams) -> Tensor:
    """A scan on torch, for what only torch can see (tracers)."""
    if not params.dims:
        return function(x, 0)
    (dim,) = params.dims
    return function(x.flip(dim), dim).flip(dim) if params.reverse else function(x, dim)


def _sums(x: Tensor, params: ScanParams) -> Tensor:
    if launchable((x,)):
        return apply(cumsum, params.elsewhere(), (x,))
    return _flipped(torch.cumsum, x, params)


def _products(x: Tensor, params: ScanParams) -> Tensor:
    if launchable((x,)):
        return apply(cumprod, params.elsewhere(), (x,))
    return _flipped(torch.cumprod, x, params)


def _solved(a: Tensor, b: Tensor, params: ScanParams) -> Tensor:
    """y[i] = a[i] y[i-1] + b[i], beginning with 0."""
    if launchable((a, b)):
        return apply(recurrence, params.elsewhere(), (a, b))
    step, length = 1, a.shape[params.dims[0]] if params.dims else 1
    while step < length:
        # Each element has taken in `step` before it, and takes in those of the one so far back.
        a, b = a * _moved(a, params, step, 1.0), a * _moved(b, params, step, 0.0) + b
        step *= 2
    return b


# ------------------------------------------------------------------------------------------- rules


def _cumsum_rule(params: ScanParams, spec: Spec, g: Tensor, x: None, out: None) -> Tensor:
    return _sums(g, _other_way(params)).to(spec.dtype)


def _cumsum_jvp(params: ScanParams, x: Tensor, out: Tensor, tangent: Tensor) -> Tensor:
    return _sums(tangent.to(params.result), params)


def _cumprod_rule(params: ScanParams, spec: Spec, g: Tensor, x: Tensor, out: Tensor) -> Tensor:
    following = _moved(x.to(params.result), params, -1, 0.0)
    total = _solved(following, g, _other_way(params))
    return (total * _moved(out, params, 1, 1.0)).to(spec.dtype)


def _cumprod_backward(params: ScanParams, spec: Spec, g: Tensor, x: Tensor, out: Tensor) -> Tensor:
    found = _run(CUMPROD_BACKWARD[params.reverse], _other_way(params), x, g, out)
    return found.to(spec.dtype)


def _cumprod_jvp(params: ScanParams, x: Tensor, out: Tensor, tangent: Tensor) -> Tensor:
    steps = tangent * _moved(out, params, 1, 1.0)
    return _solved(x.to(params.result), steps.to(params.result), params)


def _recurrence_rule(
    params: ScanParams, needs: Needs, specs: Any, grads: Tensors, saved: Tensors
) -> Tensors:
    (g,), (a, _, y) = grads, saved
    assert g is not None
    assert a is not None
    db = _solved(_moved(a, params, -1, 0.0), g, _other_way(params))
    if not needs[0]:
        return None, db
    assert y is not None
    return db * _moved(y, params, 1, 0.0), db if needs[1] else None


def _recurrence_jvp(
    params: ScanParams, tensors: Tensors, outputs: Tensors, tangents: Tensors
) -> Tensor:
    (a, _), (y,), (da, db) = tensors, outputs, tangents
    assert a is not None
    assert y is not None
    steps = None if db is None else settle(db)
    if da is not None:
        change = settle(da) * _moved(y, params, 1, 0.0)
        steps = change if steps is None else steps + change
    assert steps is not None
    return _solved(a, steps, params)


def _recurrence_vmap(
    info: Any, params: ScanParams, tensors: Tensors, dims: tuple
) -> tuple[Tensor, int]:
    return apply(recurrence, shifted(params), batched(tensors, dims, info.batch_size)), 0


recurrence = Op(
    name="recurrence",
    bind=None,
    forward=lambda params, a, b: _run(RECURRENCE, params, a, b),
    saves=lambda params, needs: (0, 2) if needs[0] else (0,),
    rule=_recurrence_rule,
    jvp=_recurrence_jvp,
    vmap=_recurrence_vmap,
    kernels=("scan",),
    formula="db[i] = a[i+1] db[i+1] + g[i]; da[i] = db[i] y[i-1]",
    dtypes=FLOATING,
)


def _scan_op(
    name: str,
    *targets: Callable[..., Any],
    kind: Scan,
    rule: Callable[..., Tensor],
    jvp: Callable[..., Tensor],
    saves: tuple[int, ...],
    formula: str,
    backward: Callable[..., Tensor] | None = None,
    differs: str = "",
) -> Op:
    """Make and register a scan of one tensor."""

    def full_rule(
        params: ScanParams, needs: Needs, specs: tuple, grads: Tensors, saved: Tensors
    ) -> Tensors:
        return (rule(params, specs[0], grads[0], *saved),)

    def full_jvp(params: ScanParams, tensors: Tensors, outs: Tensors, tangents: Tensors) -> Tensor:
        assert tangents[0] is not None
        return jvp(params, *tensors, *outs, settle(tangents[0]))

    def prepared(params: ScanParams, x: Tensor) -> ScanParams:
        launch = _launch(kind, params, (x,)) if params.dims else None
        return params._replace(specs=(Spec(x.shape, x.dtype),), launch=launch)

    def vmap(info: Any, params: ScanParams, tensors: Tensors, dims: tuple) -> tuple[Any, int]:
        return apply(op, shifted(params.elsewhere()), batched(tensors, dims)), 0

    op = Op(
        name=name,
        bind=_bind,
        forward=lambda params, x: _run(kind, params, x),
        prepare=prepared,
        replaces=targets,
        specs=operator.attrgetter("specs"),
        saves=lambda params, needs: saves,
        rule=full_rule,
        backward=None
        if backward is None
        else backward_op(name, full_rule, backward, kernels=("scan",)),
        jvp=full_jvp,
        vmap=vmap,
        autocast={"cuda": "float32"},
        opinfo=(name,),
        kernels=("scan",),
        formula=formula,
        dtypes=FLOATING,
        samples=_samples,
        sources="torch derivatives.yaml",
        differs=differs,
        cost=lambda params, x: (x.numel() * (x.element_size() + params.result.itemsize), x.numel()),
    )
    return register(op)


def _samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 5), 1), {}, "rows")
    yield Sample((make(2, 3, 4), -2), {}, "middle dim")
    yield Sample((make(), 0), {}, "0-dim")
    yield Sample((make(4, 9)[:, ::2].t(), 0), {}, "strided")
    yield Sample((make(2, 0, 3), 2), {}, "empty")
    yield Sample((make(2, 1031, low=0.9, high=1.1), 1), {}, "past one block")
    yield Sample((make(70, 65, low=0.9, high=1.1), 0), {}, "past one block of rows")
    yield Sample((make(3, 5), 1), {"dtype": torch.float64}, "dtype")


# -------------------------------------------------------------------------------------------- prod

PROD = Reduction(k.keep, k.multiply, (1.0,))
REST = Reduction(k.nonzero_factor, k.multiply_and_count, (1.0, 0.0, 0.0))


def _prod(number: float, count: int) -> Kind:
    return Kind(PROD)


_bind_total = bind_total(_prod)


def _bind_prod(
    input: Tensor, dim: int = OMITTED, keepdim: bool = OMITTED, *, dtype: torch.dtype | None = None
) -> tuple[Tensors, Params]:
    if dim is not OMITTED and type(dim) is not int:
        raise Unsupported(f"dim={dim!r}")
    return _bind_total(input, dim, keepdim, dtype=dtype)


def _prod_rule(params: Params, spec: Spec, g: Tensor, x: Tensor, out: None) -> Tensor:
    if not params.dims:
        return g.to(spec.dtype, copy=True)  # a number, whose slope is 1, NaN or not
    g = restored(g, params)
    x = x.to(params.result)
    first = params.dims[:1]
    # Several dimensions are all there are.
    row = x if len(params.dims) == 1 else x.flatten(*first)
    return (g * _others(row, first).reshape(spec.shape)).to(spec.dtype)


def _others(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The product of all elements along a dimension but each itself."""
    forward = ScanParams(dims, False, x.dtype)
    backward = _other_way(forward)
    if not x.numel():
        return x
    before = _moved(_products(x, forward), forward, 1, 1.0)
    return before * _moved(_products(x, backward), backward, 1, 1.0)


def _prod_backward(params: Params, spec: Spec, g: Tensor, x: Tensor, out: None) -> Tensor:
    if not params.dims:
        return _prod_rule(params, spec, g, x, out)
    compute = COMPUTE_DTYPE[params.result]
    launch = plan_for((x,), REST, params.dims, True, params.result)
    rows = run_many(launch, (x,), (compute,) * 3)
    operands = (restored(g, params), x, *rows)
    return exact_pointwise(kb.prod_bwd, operands, params.result, spec.dtype)


def _prod_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 5, low=0.5),), {}, "all")
    for sample in short_samples(lambda *shape, **_: make(*shape, low=0.99, high=1.01)):
        if isinstance(sample.args[1], int):
            yield sample
    zeros = make(3, 5, low=0.5)
    with torch.no_grad():
        zeros[0, 1] = 0.0
        zeros[1, 2:4] = 0.0
    yield Sample((zeros, 1), {"keepdim": True}, "no zero, one, and two")
    yield Sample((make(8, 5000, low=0.9999, high=1.0001),), {}, "shared by several programs")


# ------------------------------------------------------------------------------------------- TABLE

T = Tensor
cumsum = _scan_op(
    "cumsum", torch.cumsum, T.cumsum,
    kind=CUMSUM, rule=_cumsum_rule, jvp=_cumsum_jvp, saves=(),
    formula="dx = cumsum(g) from the end",
)  # fmt: skip
cumprod = _scan_op(
    "cumprod", torch.cumprod, T.cumprod,
    kind=CUMPROD, rule=_cumprod_rule, backward=_cumprod_backward, jvp=_cumprod_jvp, saves=(0, 1),
    formula="dx[i] = out[i-1] s[i], s[i] = x[i+1] s[i+1] + g[i]",
    differs="The gradient multiplies the other factors; torch's divides by each, and is NaN beside "
    "infinities.",
)  # fmt: skip
reduction(
    "prod", torch.prod, T.prod,
    bind=_bind_prod, kind_of=_prod, rule=_prod_rule, backward=_prod_backward,
    saves=lambda params, needs: (0,), samples=_prod_samples,
    formula="dx = g * product of the others",
    autocast={"cuda": "float32", "cpu": "float32"},
)  # fmt: skip
