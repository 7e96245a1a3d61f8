"""Hazards of derivatives: how a backward pass goes wrong in silence. Every test walks OPS.

The tests' numbers are those of the project's list of hazards, which each docstring restates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from scenarios import SUMMED, agree, gradients, launches, linked, small, square_sum
from support import ALL, DEVICE, DIFFERENTIABLE, Call, assert_same, floats, random_like
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import tritongrad
from tritongrad.sampling import tensors

each_op = pytest.mark.parametrize("name", DIFFERENTIABLE)

# ------------------------------------------------------------------- 1: upstream gradients' layout

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda g: (
        g.flatten()[:1].reshape([1] * g.dim()).expand(g.shape) if g.numel() else g
    ),
    "transposed": lambda g: g.movedim(0, -1).contiguous().movedim(-1, 0) if g.dim() else g,
    "slice of a cat": lambda g: torch.cat([g + 1, g], -1)[..., g.shape[-1] :] if g.dim() else g,
    "every other": lambda g: torch.stack([g, g + 1], -1).flatten(-2)[..., ::2] if g.dim() else g,
    "stride 0 rows": lambda g: g[..., :1].expand(g.shape) if g.dim() and g.shape[-1] else g,
    "offset by one": lambda g: torch.cat([g.new_ones(1), g.flatten()])[1:].view(g.shape),
    "negated lazily": torch._neg_view,
    "zero tensor": lambda g: torch._efficientzerotensor(g.shape, dtype=g.dtype, device=g.device),
}


NO_ZERO_TENSORS = {
    **dict.fromkeys(
        ("vector_norm", "norm", "std", "std_mean", "pairwise_distance"),
        "torch's own backward writes into the gradient, and cannot into zero tensors",
    ),
    "group_norm": "torch's own backward reads memory that a zero tensor does not have",
}
"""Op -> why torch has no gradient of zeros that take no memory."""


@each_op
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.mechanism
def test_gradient_layout(name: str, layout: str) -> None:
    """1: an upstream gradient of any layout is read where its elements are."""
    if layout == "zero tensor" and name in NO_ZERO_TENSORS:
        pytest.skip(NO_ZERO_TENSORS[name])

    def scenario(f, inputs):
        outputs = linked(f(*inputs))
        return gradients(outputs, inputs, [LAYOUTS[layout](g) for g in random_like(outputs)])

    agree(name, scenario)


@each_op
@pytest.mark.mechanism
def test_gradient_from_sum_and_view(name: str) -> None:
    """1: the gradients that sum (stride 0), slicing and stacking send, twice differentiated."""

    def scenario(f, inputs):
        outputs = linked(f(*inputs))
        loss = sum(
            out.sum() * 3 + torch.stack([out, out])[0].flatten()[::2].sum() for out in outputs
        )
        first = gradients([loss], inputs, create_graph=True)
        return first, gradients([square_sum(first) + loss], inputs)

    agree(name, scenario, SUMMED)


# ------------------------------------------------------------ 2, 3: more than one backward pass


@each_op
def test_gradient_penalty(name: str) -> None:
    """2: ``(L + |dL/dx|^2).backward()``: the first gradient does not come back detached."""

    def scenario(f, inputs):
        outputs = linked(f(*inputs))
        loss = square_sum(outputs)
        first = gradients([loss], inputs, create_graph=True)
        attached.append([g is not None and g.requires_grad for g in first])
        return first, gradients([loss + square_sum(first)], inputs)

    attached: list[list[bool]] = []
    agree(name, scenario, SUMMED)
    for ours, theirs in zip(attached[::2], attached[1::2], strict=True):
        # One way only: a derivative that is constant may say so with zeros.
        assert all(a or not b for a, b in zip(ours, theirs, strict=True))


@each_op
@pytest.mark.mechanism
def test_second_backward_with_another_scale(name: str) -> None:
    """3: ``retain_graph=True`` and a second backward that scales differently."""

    def scenario(f, inputs):
        outputs = linked(f(*inputs))
        grads = random_like(outputs)
        first = gradients(outputs, inputs, grads, retain_graph=True)
        second = gradients(outputs, inputs, [-2.5 * g for g in grads], retain_graph=True)
        return first, second, gradients(outputs, inputs, grads)

    agree(name, scenario)


@each_op
@pytest.mark.mechanism
def test_used_twice(name: str) -> None:
    """3: ``f(x) + f(x)``, and ``f(x) + x`` where the shapes allow it; gradients accumulate."""

    def scenario(f, inputs):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        once, again = linked(f(*leaves)), linked(f(*leaves))
        joined = [a + b for a, b in zip(once, again, strict=True)]
        joined += [out + x for out in once for x in leaves if x.shape == out.shape]
        torch.autograd.backward(joined, random_like(joined), retain_graph=True)
        torch.autograd.backward(joined, random_like(joined, seed=1))
        return [x.grad for x in leaves]

    agree(name, scenario)


# ------------------------------------------------------------------------ 4: nothing is overwritten


def bits(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of what the tensors hold, NaN comparable."""
    return [t.detach().reshape(-1).clone().view(torch.uint8) for t in tensors]


@each_op
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.mechanism
def test_nothing_overwritten(name: str, dtype: torch.dtype) -> None:
    """4: inputs, saved tensors and incoming gradients keep their bits."""
    for call in small(name, dtype, most=3):
        saved: list[Tensor] = []
        with saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            outputs = linked(call.triton(*call.inputs))
        grads = [g.requires_grad_() for g in random_like(outputs)]
        watched = [*call.inputs, *outputs, *grads, *saved]
        before = bits(watched)
        first = gradients(outputs, call.inputs, grads, create_graph=True)
        present = [g for g in first if g is not None and g.requires_grad]
        watched += present
        before += bits(present)
        if present:
            gradients(present, [*call.inputs, *grads])
        assert all(map(torch.equal, before, bits(watched))), str(call)


@each_op
@pytest.mark.mechanism
def test_tangents_of_inputs_are_not_results(name: str) -> None:
    """4: what is done to a result in place is done to its tangent, and to no input's."""
    for call in small(name, most=4):
        for x in call.inputs:
            (given,) = random_like([x])
            before = given.clone()
            with forward_ad.dual_level():
                duals = [
                    forward_ad.make_dual(t.detach().clone(), given) if t is x else t.detach()
                    for t in call.inputs
                ]
                for result in floats(call.triton(*duals)):
                    result.mul_(2)
            assert_same(given, before, str(call))


@each_op
def test_saved_tensor_modified(name: str) -> None:
    """4: what was saved and then changed in place raises torch's version error; what torch does
    not save is the user's to change, and the gradient is that of the values at the call."""
    if name == "kron":
        pytest.skip("torch's own kron does not notice, and its gradient is that of other values")

    def attempt(f: Callable[..., Any], inputs: Sequence[Tensor], which: int) -> Any:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        fresh = [x * 1 for x in leaves]
        outputs = linked(f(*fresh))
        expected = gradients(outputs, leaves, retain_graph=True)
        with torch.no_grad():
            (*fresh, *outputs)[which].mul_(2)
        return expected, unless_modified(lambda: gradients(outputs, leaves))

    for call in small(name):
        outputs, kept = stored(call.original, call.inputs)
        own = {storage(t) for t in (*tensors(call.sample), *linked(outputs))}
        for which in range(len(call.inputs) + len(linked(outputs))):
            where = f"{call}, tensor {which}"
            _, native = attempt(call.original, call.inputs, which)
            expected, found = attempt(call.triton, call.inputs, which)
            if found is not None:
                assert_same(found, expected, where)
            else:
                # Where torch saves a copy it made on the way, ours may save the original.
                # An empty one has no address to tell it by.
                copied = kept - own or not all(x.numel() for x in call.inputs)
                assert native is None or copied, f"{where}: torch lets this tensor be changed"


@each_op
def test_result_modified(name: str) -> None:
    """4: where torch lets a result be modified in place, as in ``relu_(linear(x))``, so do we."""

    def attempt(f: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
        outputs = linked(f(*inputs))
        expected = gradients([out * 2 for out in outputs], inputs, retain_graph=True)
        for out in outputs:
            out.mul_(2)
        return expected, unless_modified(lambda: gradients(outputs, inputs))

    for call in small(name):
        expected, native = attempt(call.torch, call.inputs)
        if call.native is not call.func:  # what stands in for it saves other tensors
            _, native = attempt(call.original, call.inputs)
        _, found = attempt(call.triton, call.inputs)
        if name in KEEPS_ALL and found is None:
            continue
        if found is not None or native is not None:
            assert_same(found, expected, str(call))


def unless_modified(run: Callable[[], Any]) -> Any:
    """What ``run`` returns, None if torch noticed that a saved tensor was modified."""
    try:
        return run()
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return None


# -------------------------------------------------------------------- 5: what is needed, no more


def storage(t: Tensor) -> tuple[int, int]:
    """Address of the memory that ``t`` keeps alive, and bytes of its elements there."""
    nbytes = min(t.numel() * t.element_size(), t.untyped_storage().nbytes())
    return t.untyped_storage().data_ptr(), nbytes


def stored(f: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[Any, set[tuple[int, int]]]:
    """The results of a call, and the memory that it keeps for backward."""
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        outputs = f(*inputs)
    return outputs, set(map(storage, kept))


def size(kept: set[tuple[int, int]]) -> int:
    return sum(nbytes for _, nbytes in kept)


# The quotients, the difference, its sign, the hinge, the logarithms of probabilities, which torch
# keeps, are never in memory.
KEEPS_INPUTS = (
    "cosine_similarity",
    "pairwise_distance",
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "gaussian_nll_loss",
    "hinge_embedding_loss",
    "margin_ranking_loss",
    "cosine_embedding_loss",
    "triplet_margin_loss",
    "cross_entropy",
    "rope",  # of which torch keeps two views
    "linear_cross_entropy",
)

# A bool for each row: where its norm was raised to eps.
KEEPS_MASK = ("normalize",)
# Arguments and results, as torch's fused kernels do; its formula in separate operations keeps the
# probabilities instead.
KEEPS_ALL = ("scaled_dot_product_attention", "attention")

# A number for each row, where torch keeps the normalised rows, if there is anything in them.
KEEPS_STATISTICS = ("rms_norm", "add_rms_norm")

# A few numbers for each channel, at most as many as there are channels in the batch.
KEEPS_CHANNELS = ("group_norm", "instance_norm", "batch_norm")


@each_op
def test_each_input_alone(name: str) -> None:
    """5: each input that requires a gradient gets it, whichever others do; what no gradient needs
    is neither saved nor computed."""
    for call in small(name):
        _, everything = launches(partial(gradients, linked(call.triton(*call.inputs)), call.inputs))
        for i in range(len(call.inputs)):
            inputs = [x.detach().requires_grad_(i == j) for j, x in enumerate(call.inputs)]
            where = f"{call}, input {i}"
            _, torch_keeps = stored(call.original, inputs)
            ours, kept = stored(call.triton, inputs)
            if name in KEEPS_INPUTS:
                kept = kept - set(map(storage, tensors(call.sample)))
            if name in KEEPS_ALL:
                kept = kept - set(map(storage, [*tensors(call.sample), *inputs, *floats(ours)]))
            allowed = size(torch_keeps) + (call.inputs[0].numel() if name in KEEPS_MASK else 0)
            if name in KEEPS_STATISTICS:
                allowed += call.inputs[0][..., :0].sum(-1).nbytes
            if name in KEEPS_CHANNELS:
                allowed += call.inputs[0].unsqueeze(-1).flatten(2)[..., 0].nbytes
            assert size(kept) <= allowed, f"{where}: keeps {kept}, torch {torch_keeps}"
            found, count = launches(partial(gradients, linked(ours), inputs[i : i + 1]))
            theirs = linked(call.torch(*inputs))
            assert_same(found, gradients(theirs, inputs[i : i + 1]), where)
            assert count <= everything, f"{where}: {count} launches alone, {everything} for all"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.mechanism
def test_nothing_saved_without_grad(name: str) -> None:
    """5: no_grad and inference_mode save nothing, build no graph, and give the same numbers; nor
    does a call none of whose inputs requires a gradient."""
    for call in small(name):
        detached = [x.detach() for x in call.inputs]
        expected = call.torch(*detached)
        for guard, inputs in (
            (torch.no_grad, call.inputs),
            (torch.inference_mode, call.inputs),
            (torch.enable_grad, detached),
        ):
            with guard():
                outputs, kept = stored(call.triton, inputs)
            assert not kept, f"{call}: {guard.__name__} saves {kept}"
            assert not any(isinstance(t, Tensor) and t.requires_grad for t in floats(outputs))
            with torch.inference_mode():
                assert_same(outputs, expected, str(call))


# ----------------------------------------------------------------------------- 8: autograd's habits


@each_op
@pytest.mark.mechanism
def test_hooks(name: str) -> None:
    """8: hooks on inputs, results and graph nodes are called and may replace gradients."""
    if name in ("add_layer_norm", "add_rms_norm"):
        pytest.skip("the sum's gradient is, in the definition, also that of what is normalised")

    def hook(seen: list[Tensor], g: Tensor | None) -> Tensor | None:
        if g is None:  # torch calls it all the same, for a norm of order 0
            return None
        seen.append(g.clone())
        return g * 2

    def order(g: Tensor) -> Any:
        return g.shape, g.sum().item()

    def scenario(f, inputs):
        seen: list[Tensor] = []
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        outputs = linked(f(*leaves))
        for t in (*leaves, *outputs):
            t.register_hook(partial(hook, seen))
        for node in {out.grad_fn for out in outputs}:  # torch's may have one for each result
            node.register_prehook(lambda grads: tuple([g if g is None else g + 1 for g in grads]))
        for out in outputs:
            out.retain_grad()
        torch.autograd.backward(outputs, random_like(outputs))
        return [t.grad for t in (*leaves, *outputs)], sorted(seen, key=order)

    agree(name, scenario)


@each_op
@pytest.mark.mechanism
def test_views_detach_and_late_requires_grad(name: str) -> None:
    """8: inputs that are views, results that are viewed, detached or set to require a gradient."""

    def scenario(f, inputs):
        bases = [torch.stack([x.detach(), x.detach()]).requires_grad_() for x in inputs]
        outputs = linked(f(*[b[1] for b in bases]))
        viewed = [out.unsqueeze(0).flatten() for out in outputs]
        cut = [out.detach().requires_grad_() for out in outputs]
        late = [out.sin() for out in cut]
        return gradients([*viewed, *late], [*bases, *cut]), [out.detach() for out in outputs]

    agree(name, scenario)


@each_op
@pytest.mark.mechanism
def test_anomaly_mode(name: str) -> None:
    """8: anomaly mode changes nothing."""

    def scenario(f, inputs):
        with torch.autograd.detect_anomaly(check_nan=False):
            first = gradients(linked(f(*inputs)), inputs, create_graph=True)
            return first, gradients([square_sum(first)], inputs)

    with pytest.warns(UserWarning, match="Anomaly Detection has been enabled"):
        # It keeps the stack of each operation, every line of a kernel under the interpreter too.
        agree(name, scenario, SUMMED, most=1)


@each_op
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.mechanism
def test_checkpoint(name: str, reentrant: bool) -> None:
    """8: both kinds of checkpoint, backward inside ``use()`` so that both passes meet our ops."""
    for call in small(name, most=3):
        again = 0

        def square(*inputs: Tensor, call: Call = call) -> Tensor:
            nonlocal again
            again += 1
            return square_sum(floats(call.original(*inputs)))

        expected = gradients([square_sum(linked(call.torch(*call.inputs)))], call.inputs, [None])
        with tritongrad.use() as session:
            loss = checkpoint(square, *call.inputs, use_reentrant=reentrant)
            loss.backward()
        assert session.ran[name] >= again >= 1
        assert not any(func.endswith(call.func.__name__) for func, _ in session.fell_back)
        assert_same([x.grad for x in call.inputs], expected, str(call))


@each_op
@pytest.mark.mechanism
def test_freed_graph(name: str) -> None:
    """8: a second backward through a freed graph raises torch's error; where an op of torch or of
    ours keeps nothing that could be freed, it is right."""

    def attempt(f: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
        outputs = linked(f(*inputs))
        first = gradients(outputs, inputs)
        try:
            return first, gradients(outputs, inputs)
        except RuntimeError as error:
            if "backward through the graph a second time" not in str(error):
                raise
            return first, None

    for call in small(name):
        _, native = attempt(call.original, call.inputs)
        first, second = attempt(call.triton, call.inputs)
        if second is not None:
            assert_same(second, first, str(call))
        else:
            assert native is None, f"{call}: torch can walk this graph again"


@each_op
@pytest.mark.mechanism
def test_saved_tensors_hooks(name: str) -> None:
    """8: saved tensors may be packed, moved and recomputed: twice differentiated."""

    def scenario(f, inputs):
        found = []
        for hooks in (
            save_on_cpu(),
            saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t),
            saved_tensors_hooks(lambda t: (t.cpu().numpy(), t.device), unpack),
        ):
            with hooks:
                first = gradients(linked(f(*inputs)), inputs, create_graph=True)
            found.append(first)
        return found

    def unpack(packed: Any) -> Tensor:
        return torch.from_numpy(packed[0].copy()).to(packed[1])

    def scenario_twice(f, inputs):
        with save_on_cpu():
            outputs = linked(f(*inputs))
            first = gradients([square_sum(outputs)], inputs, create_graph=True)
        return gradients([square_sum(first)], inputs)

    agree(name, scenario, most=2)
    agree(name, scenario_twice, SUMMED, most=1)


# ------------------------------------------------------------------------------- 26: determinism

# The interpreter runs programs one after the other: there, only what is left in memory or in a
# cache can differ from run to run.
RUNS = 20 if DEVICE.type == "cuda" else 3


@pytest.mark.parametrize("name", ALL)
@pytest.mark.mechanism
def test_every_run_has_the_same_bits(name: str) -> None:
    """26: the forward and every gradient have the same bits in every run."""
    call = small(name)[-2 if len(small(name)) > 1 else 0]

    def run() -> list[Tensor]:
        outputs = call.triton(*call.inputs)
        kept = [t for t in floats(outputs) if t.requires_grad]
        first = gradients(kept, call.inputs) if kept else ()
        return bits([t for t in (*floats(outputs), *first) if t is not None])

    expected = run()
    for _ in range(RUNS - 1):
        assert all(map(torch.equal, run(), expected))
