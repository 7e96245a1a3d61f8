"""The autograd.Function of an Op: reverse mode, forward mode, torch.func.

One ``autograd.Function`` an op serves ``torch.func``; eager calls take a short way into it.

Derivatives. ``Function.backward`` calls the op's backward op, an Op like any other, so that a
second derivative meets a second Function. What has no kernel of its own is evaluated from the rule
under ``rules()``, where torch mathematics means our ops, whoever called and on whichever thread.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import runtime
from .admission import is_plain, launchable, memory, settle, transforming
from .dispatch import apply, rules
from .op import BackwardParams, Needs, Op, Rule, Spec, Tensors
from .runtime import local

_unwrap_if_dead = torch._C._functorch.unwrap_if_dead
_shares_memory = torch._C._is_alias_of  # type: ignore[attr-defined]


_ALL = tuple(range(64))  # indices of an op's tensors, which are never so many


@cache
def _picking(places: tuple[int, ...]) -> Callable[[Tensors], Tensors]:
    """What picks from a tuple a tuple of what is in these places."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    (place,) = places
    return lambda values: (values[place],)


def make_function(op: Op) -> tuple[type[torch.autograd.Function], Callable[..., Any]]:
    """The autograd.Function of ``op``, and how to enter it outside of transforms.

    Its arguments are ``params``, then the tensors. The entry is ``apply`` of a subclass whose
    ``forward`` records, which spares a call, taken below the Python layer of ``Function.apply``,
    which binds the signature by ``inspect`` each time (12 us against 3).
    """

    # Constants of the op, looked up once: recording is on the hot path.
    assert op.forward is not None
    saves, known_specs, public, differentiable = op.saves, op.specs, op.outputs, op.differentiable
    compute, constant = op.forward, op.constant_outputs

    # One function for both ways in: a call inside of the eager one would be 3 % of its time.
    def forward(ctx: Any, params: Any, *tensors: Tensor | None, output: Any = None) -> Any:
        if output is None:
            output = compute(params, *tensors)
        outputs = output if type(output) is tuple else (output,)
        if not differentiable:
            ctx.mark_non_differentiable(*outputs)
            return output
        specs: Any = None if known_specs is None else known_specs(params)
        if specs is None:
            # Plain pairs here, Specs in backward: it is the forward call that users wait for.
            specs = [None if t is None else (t.shape, t.dtype) for t in tensors]
        ctx.call = params, specs, local.session
        # An output that the loss does not depend on sends None, not a tensor of zeros, whose
        # product with an infinite slope would be NaN (the `out` of a backward op has no use of
        # its own).
        ctx.set_materialize_grads(False)
        kept = saves and saves(params, ctx.needs_input_grad[1:])
        if kept is None or kept == _ALL[: len(tensors)]:
            ctx.save_for_backward(*tensors)
        elif kept:
            ctx.save_for_backward(*_picking(tuple(kept))(tensors + outputs))
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(*tensors, *outputs)
        if output is outputs:
            # An index beside a value has no derivative either.
            integers = [out for out in outputs[:public] if not out.is_floating_point()]
            if constant is not None and forward_ad._current_level < 0:  # it may have a tangent
                integers += [outputs[i] for i in constant(params, ctx.needs_input_grad[1:])]
            if integers or len(outputs) > public:
                ctx.mark_non_differentiable(*integers, *outputs[public:])
        return output

    def transformed(params: Any, *tensors: Tensor | None) -> Any:
        # torch refuses to save an input that is returned as it is (a gradient handed on).
        output = compute(params, *tensors)
        if type(output) is tuple:
            return tuple([apart(out, tensors) for out in output])
        return apart(output, tensors)

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        forward(ctx, *inputs, output=output)

    def backward(ctx: Any, *grads: Tensor | None) -> Tensors:
        needs = ctx.needs_input_grad[1:]
        # Everything in its place, None for what was not saved. What a transform wrapped that has
        # ended meanwhile is unwrapped, as torch's own operators do by themselves.
        params, specs, session = ctx.call
        kept = range(len(needs)) if saves is None else saves(params, needs)
        saved: list[Tensor | None] = [None] * (len(needs) + len(grads))
        # A graph that holds nothing can be walked again after it was freed, as torch's own can.
        for i, t in zip(kept, ctx.saved_tensors if kept else (), strict=True):
            saved[i] = t if t is None else _unwrap_if_dead(t)
        grads = tuple([g if g is None else _unwrap_if_dead(g) for g in grads[:public]])
        if all(g is None for g in grads):
            return (None,) * (1 + len(needs))
        if specs == ():
            like = next(g for g in grads if g is not None)
            specs = (Spec(like.shape, like.dtype),) * len(needs)
        else:
            specs = tuple([None if s is None else Spec(*s) for s in specs])
        previous = local.session, local.bypass
        local.session, local.bypass = session, 1
        try:
            result = vjp(op, params, needs, specs, grads, tuple(saved))
        finally:
            local.session, local.bypass = previous
        return (None, *result)

    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        if not differentiable:
            return None
        params, _, session = ctx.call
        # What was saved still carries the tangents of this very level.
        saved = [
            t if t is None else forward_ad.unpack_dual(t, level=0).primal for t in ctx.saved_tensors
        ]
        count = len(tangents)
        tensors, outputs = tuple(saved[:count]), tuple(saved[count:])
        # Forward mode is off while torch calls this. A second level of it, as in
        # jacfwd(jacfwd(f)), would silently lose its tangents here.
        with (
            runtime.attribute_to(session),
            rules(),
            forward_ad._set_fwd_grad_enabled(True),
        ):
            result = pushforward(op, params, tensors, outputs, tangents)
            several = type(result) is tuple
            owned = [own(t, tangents) for t in (result if several else (result,))]
        extra = len(outputs) - op.outputs
        return (*owned, *[None] * extra) if several or extra > 0 else owned[0]

    def vmap(info: Any, in_dims: tuple, params: Any, *tensors: Tensor | None) -> Any:
        with rules():
            if op.vmap is not None and info.batch_size:
                return op.vmap(info, params, tensors, in_dims[1:])
            return vmap_reference(op, info, params, tensors, in_dims[1:])

    name = "Triton" + "".join(part.capitalize() for part in op.name.split("_"))
    members: dict[str, Any] = {
        "op": op,
        "forward": staticmethod(transformed),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "jvp": staticmethod(jvp),
        "vmap": staticmethod(vmap),
        "__doc__": f"{op.name}: {op.formula}",
        "__module__": __name__,
    }
    function = type(name, (torch.autograd.Function,), members)
    unset = torch.autograd.function._SingleLevelFunction.setup_context
    members = {
        "op": op,
        "forward": staticmethod(forward),
        "setup_context": staticmethod(unset),
        "__module__": __name__,
    }
    eager = type(name, (function,), members)
    return function, super(torch.autograd.Function, eager).apply  # type: ignore[misc]


def apart(output: Any, tensors: Tensors) -> Any:
    """A result that is none of the op's tensors itself."""
    if output is None or all(output is not t for t in tensors):
        return output
    return output.view_as(output)


def vjp(
    op: Op,
    params: Any,
    needs: Needs,
    specs: tuple[Spec | None, ...],
    grads: Tensors,
    saved: Tensors,
    own_level: int = 0,
) -> Tensors:
    """Gradients of the op's tensors, given those of its public outputs.

    ``own_level`` is 1 where a ``jvp`` calls it, for the forward-mode level it evaluates.
    """
    if op.rule is None:
        return differentiate(op, params, needs, grads, saved[: len(needs)])
    return pull(op.rule, op.backward, params, needs, specs, grads, saved, own_level)


def pull(
    rule: Rule,
    backward: Op | None,
    params: Any,
    needs: Needs,
    specs: tuple[Spec | None, ...],
    grads: Tensors,
    saved: Tensors,
    own_level: int = 0,
) -> Tensors:
    """``vjp`` by ``backward`` where its kernels may stand for ``rule``, else by that."""
    if backward is not None:
        grads = tuple([g if g is None or is_plain(g) else settle(g) for g in grads])
        if _kernel_sees_everything(backward, (*grads, *saved), own_level):
            found = apply(backward, BackwardParams(params, needs, specs), (*grads, *saved))
            # One that is constant in its last tensors, results kept from forward, leaves them out.
            results = iter(found if type(found) is tuple else (found,))
            return tuple([next(results, None) if need else None for need in needs])
    with rules():
        return rule(params, needs, specs, grads, saved)


def _kernel_sees_everything(backward: Op, tensors: Tensors, own_level: int) -> bool:
    """Whether a backward kernel may stand for the rule here: not for tensors that carry a
    forward-mode tangent, because the rule's operations propagate it, unless ``backward`` does."""
    if backward.jvp is None and carries_tangents(tensors, own_level):
        return False
    return launchable(tensors)


def carries_tangents(tensors: Tensors, own_level: int) -> bool:
    """Whether forward mode may be differentiating through ``tensors``.

    Exact for dual numbers. Under torch.func the tangents of outer levels are out of reach, so
    every forward-mode level but the one being evaluated (``own_level`` of them) counts.
    """
    if forward_ad._current_level < 0:
        return False
    if not transforming():
        return any(
            t is not None and forward_ad.unpack_dual(t, level=0).tangent is not None
            for t in tensors
        )
    stack = torch._C._functorch.get_interpreter_stack() or ()
    levels = sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)
    # No level of torch.func's own: the dual numbers are the user's, below the transforms.
    return levels == 0 or levels > own_level


def differentiate(op: Op, params: Any, needs: Needs, grads: Tensors, tensors: Tensors) -> Tensors:
    """Gradients of an op that is defined by its reference: reverse mode through it."""
    if op.reference is None:
        raise NotImplementedError(
            f"tritongrad: op {op.name!r} has no derivative (differentiated beyond its "
            f"maximum order, {op.max_order})"
        )
    reference = op.reference
    # A constant gets nothing: zeros, in the op that it came from, could meet an infinite slope.
    wanted = [i for i, need in enumerate(needs) if need and i not in op.constants]
    received = [i for i, g in enumerate(grads) if g is not None]
    cotangents: tuple[Any, ...] = tuple(grads[i] for i in received)

    def outputs(*primals: Tensor) -> tuple[Tensor, ...]:
        full: list[Any] = list(tensors)
        for i, primal in zip(wanted, primals, strict=True):
            full[i] = primal
        found: Any = reference(params, *full)
        return tuple(found[i] for i in received)

    primals: list[Any] = [tensors[i] for i in wanted]
    found: Sequence[Tensor | None]
    if transforming():
        with rules():
            pull = torch.func.vjp(outputs, *primals)[1]
            found = pull(cotangents)
    else:
        # Not where nothing is attached: values out of a transform that has ended left their graph
        # behind, and what is computed from them must not claim one.
        attached = any(t.requires_grad for t in (*primals, *cotangents))
        create_graph = torch.is_grad_enabled() and attached
        with torch.enable_grad(), rules():
            # Aliases: one saved tensor may have been computed from another, and only the
            # partial derivative is wanted.
            primals = [
                t.view_as(t) if create_graph and t.requires_grad else t.detach().requires_grad_()
                for t in primals
            ]
            values = outputs(*primals)
            linked = [(v, c) for v, c in zip(values, cotangents, strict=True) if v.requires_grad]
            # Zeros where the rule does not depend on what it was given (a kink's slope): so torch
            # answers, instead of calling its input unused.
            found = torch.autograd.grad(
                [v for v, _ in linked],
                primals,
                [c for _, c in linked],
                create_graph=create_graph,
                allow_unused=True,
                materialize_grads=len(received) == len(grads),
            )
    results = dict(zip(wanted, found, strict=True))
    return tuple(results.get(i) for i in range(len(needs)))


def own(tangent: Any, given: Tensors) -> Any:
    """A result's tangent in memory of its own: what is done to the result in place is done to it,
    and must not reach a tangent of the inputs."""
    if tangent is not None:
        held = memory(tangent)
        if any(t is not None and _shares_memory(held, memory(t)) for t in given):
            return tangent.clone()
    return tangent


def pushforward(op: Op, params: Any, tensors: Tensors, outputs: Tensors, tangents: Tensors) -> Any:
    """Tangents of the op's public outputs."""
    if not op.differentiable:
        return None
    if op.jvp is None:
        raise NotImplementedError(f"tritongrad: op {op.name!r} has no forward-mode derivative")
    return op.jvp(params, tensors, outputs[: op.outputs], tangents)


def vmap_reference(op: Op, info: Any, params: Any, tensors: Tensors, dims: tuple) -> Any:
    """Batch an op that has no rule of its own: a backward op through its definition, another one
    sample by sample, because only its kernels make what its backward needs."""
    if op.rule is not None or op.reference is None or not info.batch_size:
        return vmap_by_samples(op, info, params, tensors, dims)
    present = [i for i, t in enumerate(tensors) if t is not None]

    def body(*values: Tensor) -> Any:
        full: list[Tensor | None] = [None] * len(tensors)
        for i, value in zip(present, values, strict=True):
            full[i] = value
        assert op.reference is not None
        return op.reference(params, *full)

    batched = torch.vmap(body, tuple(dims[i] for i in present), 0, randomness=info.randomness)
    values: list[Any] = [tensors[i] for i in present]
    found = batched(*values)
    return found, (0,) * len(found)


def vmap_by_samples(op: Op, info: Any, params: Any, tensors: Tensors, dims: tuple) -> Any:
    """Batch an op by calling it for each sample."""

    def of(t: Tensor | None, d: int | None, i: int) -> Tensor | None:
        if t is None or d is None:
            return t
        if not info.batch_size:  # zeros, of which only the shapes of results are taken
            return t.new_zeros(t.movedim(d, 0).shape[1:])
        return t.select(d, i)

    results = []
    for i in range(info.batch_size or 1):
        sample = tuple([of(t, d, i) for t, d in zip(tensors, dims, strict=True)])
        found = apply(op, params, sample, everything=True)
        results.append(found if type(found) is tuple else (found,))
    parts = zip(*results, strict=True)
    stacked = tuple(torch.stack(part)[: info.batch_size] for part in parts)
    return (stacked, (0,) * len(stacked)) if len(stacked) > 1 else (stacked[0], 0)
