"""Gradients of pointwise ops: all inputs' in one kernel, that kernel's own, vmap of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import apply, rules
from ..dtypes import FLOATING, Number
from ..function import differentiate
from ..launchers.pointwise import elementwise
from ..launchers.reduction import sum_of, sum_to
from ..layout import batch_first, broadcast_shape
from ..op import BackwardParams, Needs, Op, Spec, Tensors
from .operands import Params

KERNELS = ("pointwise_dense", "pointwise_strided")


def reduce_to(value: Tensor, spec: Spec) -> Tensor:
    """A gradient summed over what its input was broadcast along, in its input's dtype."""
    if value.shape != spec.shape:
        missing = value.dim() - len(spec.shape)
        dims = list(range(missing))
        dims += [
            d for d, size in enumerate(spec.shape, missing) if size == 1 and value.shape[d] != 1
        ]
        if dims:
            value = torch.sum(value, dims, keepdim=True)
        value = value.expand(*value.shape[:missing], *spec.shape).reshape(spec.shape)
    return value if value.dtype is spec.dtype else value.to(spec.dtype)


def halved(tensors: Tensors, at: int, params: Params) -> Tensors:
    """``tensors`` with the halves of the one at ``at`` in its place and the next, of a call whose
    two inputs are halves of one tensor."""
    whole = tensors[at]
    if params.halves is None or whole is None:
        return tensors
    return (*tensors[:at], *whole.chunk(2, params.halves), *tensors[at + 2 :])


class Row(NamedTuple):
    """What the gradients of an op of the pointwise table are made from.

    Attributes:
        name: the op's.
        functions: device functions of the gradients by form, ``NAME_bwd``, and
        seconds: of those functions' gradients, ``NAME_bwd_bwd``.
        inputs: names of the op's inputs.
        for_number: as ``row`` has it.
        rule: the op's, the definition of both.
        differentiable: names of the inputs that have a gradient, in the order in which the device
            functions return those.
        unchanged: ``(form, consts)`` to whether the gradient of each input is ``g`` itself.
    """

    name: str
    functions: Mapping[str, Any]
    seconds: Mapping[str, Any]
    inputs: tuple[str, ...]
    for_number: Callable[[Number], tuple[Any, Any]] | None
    rule: Any
    differentiable: tuple[str, ...]
    unchanged: Callable[[str, tuple[Number, ...]], tuple[bool, ...]]

    def has_number(self, params: Params) -> bool:
        """Whether a number is in the place for which there are other device functions."""
        return bool(self.for_number and params.scalars and params.scalars[-1] is not None)


def backward_op(row: Row) -> Op:
    """The op that computes all of a row's gradients in one kernel, from ``(g, *inputs, out)``."""
    inputs = row.inputs
    names = ("g", *inputs, "out")
    # Where each input's gradient stands in what the device function returns.
    columns = tuple(
        [row.differentiable.index(n) if n in row.differentiable else -1 for n in inputs]
    )

    def forward(bp: BackwardParams, g: Tensor, *saved: Tensor | None) -> Any:
        params, needs, specs = bp
        device_function = row.functions.get(params.form)
        if device_function is None:
            wanted = [s for s, need in zip(specs, needs, strict=True) if need and s is not None]
            constant = tuple([g.new_zeros(s.shape, dtype=s.dtype) for s in wanted])
            return constant[0] if len(constant) == 1 else constant
        if row.for_number is not None and row.has_number(params):
            _, device_function = row.for_number(params.scalars[-1])
        tensors = halved((g, *saved), 1, params)
        numbers = (None, *(params.scalars or (None,) * len(inputs)), None)
        unchanged = row.unchanged(params.form, params.consts)
        others = tuple([n and not u for n, u in zip(needs, unchanged, strict=True)])
        found: Any = ()
        if any(others):
            found = _launch(
                device_function, names, tensors, numbers, params, columns, others, specs, 0
            )
        if others == needs:
            return found
        # What is `g` as it is takes no kernel, unless its input was broadcast.
        rest = iter(found if type(found) is tuple else (found,))
        results = tuple(
            [
                next(rest) if other else sum_to(g, *spec)
                for other, need, spec in zip(others, needs, specs, strict=True)
                if need and spec is not None
            ]
        )
        return results[0] if len(results) == 1 else results

    def reference(bp: BackwardParams, g: Tensor, *saved: Tensor | None) -> Tensors:
        found = row.rule(bp.params, bp.needs, bp.specs, (g,), saved)
        return tuple(t for t in found if t is not None)

    def rule(
        bp: BackwardParams, needs: Needs, specs: tuple, grads: Tensors, saved: Tensors
    ) -> Tensors:
        return differentiate(op, bp, needs, grads, saved[: len(needs)])

    def vmap(info: Any, bp: BackwardParams, tensors: Tensors, dims: tuple) -> Any:
        return vmap_backward(op, info, bp, tensors, dims)

    op = Op(
        name=f"{row.name}_backward",
        bind=None,
        forward=forward,
        outputs=len(inputs),
        rule=rule if row.seconds else None,
        reference=reference,
        backward=_second_op(row, lambda: op) if row.seconds else None,
        vmap=vmap,
        kernels=KERNELS,
        dtypes=FLOATING,
        formula=f"autograd through the rule of {row.name}",
    )
    return op


def _second_op(row: Row, first: Callable[[], Op]) -> Op:
    """The op that computes the gradients of all that ``first`` reads, in one kernel, from
    ``(*gradients of its results, g, *inputs, out)``."""
    inputs, count = row.inputs, len(row.inputs)
    names = (*[f"v{n}" for n in inputs], "g", *inputs, "out")
    needed = [i for i, n in enumerate(inputs) if n in row.differentiable]

    @cache
    def columns(function: Any) -> tuple[int, ...]:
        """Where the gradient of each of ``first``'s tensors is in what the device function
        returns: one of everything that it reads beside the ``v``."""
        read = [n for n in function.arg_names if n in names[count:]]
        return tuple([read.index(n) if n in read else -1 for n in names[count:]])

    def forward(above: BackwardParams, *tensors: Tensor | None) -> Any:
        bp, needs, specs = above
        params = bp.params
        received = iter(tensors)
        cotangents = [next(received) if need else None for need in bp.needs]
        everything = halved(halved((*cotangents, *received), 0, params), count + 1, params)
        device_function = row.seconds.get(params.form)
        absent = any(everything[i] is None for i in needed)
        if device_function is None or absent or row.has_number(params):
            # Of a gradient that is absent, 0 times an infinity must not come in.
            with rules():
                found = reference(above, *tensors)
            return found[0] if len(found) == 1 else found
        numbers = (*[None] * (count + 1), *(params.scalars or (None,) * count), None)
        return _launch(
            device_function, names, everything, numbers, params,
            columns(device_function), needs, specs, 1,
        )  # fmt: skip

    def reference(above: BackwardParams, *tensors: Tensor | None) -> Tensors:
        bp, needs, specs = above
        split = sum(bp.needs)
        grads, saved = tensors[:split], tensors[split : split + len(specs)]
        # Of a tensor that all samples of vmap share, each sample has a gradient.
        saved = tuple(
            t if t is None or s is None or t.shape == s.shape else t.expand(s.shape)
            for t, s in zip(saved, specs, strict=True)
        )
        found = differentiate(first(), bp, needs, grads, saved)
        like = next(t for t in grads if t is not None)
        return tuple(
            like.new_zeros(s.shape, dtype=s.dtype) if t is None else t
            for t, s, need in zip(found, specs, needs, strict=True)
            if need and s is not None
        )

    def vmap(info: Any, above: BackwardParams, tensors: Tensors, dims: tuple) -> Any:
        bp = above.params
        specs = specs_by_sample(bp.specs, info.batch_size, logical_rank(tensors, dims))
        above = above._replace(params=bp._replace(specs=specs))
        return vmap_backward(op, info, above, tensors, dims)

    op = Op(
        name=f"{row.name}_backward_backward",
        bind=None,
        forward=forward,
        outputs=count + 2,
        reference=reference,
        vmap=vmap,
        kernels=KERNELS,
        dtypes=FLOATING,
        formula=f"autograd through the rule of {row.name}_backward",
    )
    return op


@cache
def _arguments(function: Any, names: tuple[str, ...]) -> tuple[tuple[int, ...], int]:
    """Which of the tensors of these names a device function takes, and which are conditions."""
    taken = [n for n in function.arg_names if n in names]
    return tuple(map(names.index, taken)), sum(1 << i for i, n in enumerate(taken) if n == "c")


def _launch(
    function: Any,
    names: tuple[str, ...],
    tensors: Tensors,
    numbers: tuple[Number | None, ...],
    params: Params,
    columns: tuple[int, ...],
    needs: Needs,
    specs: tuple[Spec | None, ...],
    inputs_at: int,
) -> Any:
    """``gradients`` by a device function of some of ``tensors``, which have these names, or of the
    numbers in their places; ``inputs_at``: place of the first input in ``needs``."""
    order, raw = _arguments(function, names)
    operands = tuple([tensors[i] for i in order])
    scalars = tuple([numbers[i] for i in order])
    present = [t for t in tensors if t is not None]
    full = broadcast_shape(present)
    call = Call(function, raw, operands, scalars, params.consts, params.result)
    whole = None
    if params.halves is not None:
        whole = Whole(inputs_at, params.halves, present[0])
    return gradients(call, columns, needs, specs, full, whole)


class Call(NamedTuple):
    """A device function and what it is called with, as ``elementwise`` has them."""

    function: Any
    raw: int
    operands: Tensors
    scalars: tuple[Number | None, ...]
    consts: tuple[Number, ...]
    element: torch.dtype


class Whole(NamedTuple):
    """A tensor whose halves along ``dim`` are two inputs; ``at``: where its gradient is wanted;
    ``like``: a tensor of its device."""

    at: int
    dim: int
    like: Tensor


def gradients(
    call: Call,
    columns: tuple[int, ...],
    needs: Needs,
    specs: tuple[Spec | None, ...],
    full: torch.Size,
    whole: Whole | None = None,
) -> Any:
    """Gradients of the inputs that need one: of those that have the shape ``full`` in one launch,
    of each that was broadcast to it in a reduction, so that nothing larger than it is stored.

    Args:
        call: of the device function of the gradients, over the shape ``full``.
        columns: place of each input's gradient among its results.
        whole: the input of which two are halves: their gradients are written into one tensor.
    """
    count = max(columns) + 1
    dtypes: list[torch.dtype | None] = [None] * count
    into: list[Tensor | None] = [None] * count
    wanted: list[tuple[int, Spec, Tensor | None]] = []
    for place, (i, need, spec) in enumerate(zip(columns, needs, specs, strict=True)):
        if not need or spec is None:
            continue
        assert i >= 0, "a tensor that the device function does not read needs a gradient"
        gradient = None
        if whole is not None and place == whole.at:
            gradient = whole.like.new_empty(spec.shape, dtype=spec.dtype)
            pair = i, columns[place + 1]
            for column, half in zip(pair, gradient.chunk(2, whole.dim), strict=True):
                dtypes[column], into[column] = spec.dtype, half
        elif math.prod(spec.shape) == full.numel():
            dtypes[i] = spec.dtype
        wanted.append((i, spec, gradient))
    outs: list[Tensor | None] = []
    if any(dtypes):
        outs = elementwise(*call, tuple(dtypes), () if whole is None else tuple(into))
    found = []
    for i, spec, gradient in wanted:
        if gradient is None:
            gradient = outs[i] if dtypes[i] else sum_of(*call, i, full, *spec)
            assert gradient is not None
            if gradient.shape != spec.shape:
                gradient = gradient.reshape(spec.shape)
        found.append(gradient)
    return found[0] if len(found) == 1 else tuple(found)


def logical_rank(tensors: Tensors, dims: tuple) -> int:
    return max(
        t.dim() - (d is not None) for t, d in zip(tensors, dims, strict=True) if t is not None
    )


def batch_all(tensors: Tensors, dims: tuple, rank: int) -> Tensors:
    return tuple(
        None if t is None else batch_first(t, d, rank) for t, d in zip(tensors, dims, strict=True)
    )


def vmap_backward(
    op: Op, info: Any, bp: BackwardParams, tensors: Tensors, dims: tuple
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Each sample has gradients of its own, also for an input that all samples share."""
    rank = logical_rank(tensors, dims)
    return gradients_by_sample(op, info.batch_size, bp, rank, batch_all(tensors, dims, rank))


def gradients_by_sample(
    op: Op, size: int, bp: BackwardParams, rank: int, tensors: Tensors
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """``vmap_backward`` of tensors that have the batch dimension in front, before ``rank`` logical
    ones."""
    found = apply(op, bp._replace(specs=specs_by_sample(bp.specs, size, rank)), tensors)
    found = found if type(found) is tuple else (found,)
    shapes = [spec.shape for spec, need in zip(bp.specs, bp.needs, strict=True) if need and spec]
    results = tuple(
        gradient.reshape(size, *shape) for gradient, shape in zip(found, shapes, strict=True)
    )
    return results, (0,) * len(results)


def specs_by_sample(
    specs: tuple[Spec | None, ...], size: int, rank: int
) -> tuple[Spec | None, ...]:
    """Those of ``size`` samples of ``rank`` dimensions."""
    return tuple(
        spec and Spec(torch.Size((size, *[1] * (rank - len(spec.shape)), *spec.shape)), spec.dtype)
        for spec in specs
    )
