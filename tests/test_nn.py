"""``tritongrad.nn``: torch's modules on our ops, against torch's own on its ModuleInfo samples."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from support import (
    DEVICE,
    FLOAT32_CONSTANTS,
    assert_same,
    flatten,
    floats,
    on_the_cpu,
    random_like,
)
from torch import Tensor, nn
from torch.testing._internal.common_modules import FunctionInput, ModuleInfo, module_db

import tritongrad
from tritongrad.reroute import HARMLESS

NO_KERNEL = (
    "Conv", "Pool", "RNN", "GRU", "LSTM", "CTCLoss", "MultiLabelMarginLoss", "MultiMarginLoss",
    "Bilinear", "LocalResponseNorm",
)  # fmt: skip
"""What names of modules that run on torch, all or the most of them, have in them."""

MODULES = {
    info.name: info
    for info in module_db
    if not any(part in info.name for part in NO_KERNEL) and "Pad" not in info.name
}
"""Those that we have the ops of; padding moves data, no more."""

OPTIONS = "options, which choose torch's own pieces"
"""Inside of which torch's function writes into pieces that it has allocated."""

ALLOWED = HARMLESS | {
    "in-place",  # counts of batches, masks
    "nothing to normalise",
    OPTIONS,
}

MOST = 5
"""Samples of each module in a plain run, an even selection: of some torch has a thousand, and those
of the ops are in test_opinfo.py. All with --every-op."""


def runs(info: ModuleInfo, training: bool, most: int) -> Iterator[tuple[nn.Module, nn.Module, Any]]:
    """Samples of the module: torch's module, ours with the same state, and its inputs."""
    samples = info.module_inputs_func(
        info, device=DEVICE, dtype=torch.float64, requires_grad=True, training=training
    )
    samples = [sample for sample in samples if sample.forward_input is not None]
    for sample in samples[:: -(-len(samples) // most)]:
        arguments, keywords = sample.constructor_input.args, sample.constructor_input.kwargs
        theirs = info.module_cls(*arguments, **keywords).to(DEVICE, torch.float64).train(training)
        own = getattr(tritongrad.nn, info.module_cls.__name__)
        ours = own(*arguments, **keywords).to(DEVICE, torch.float64).train(training)
        ours.load_state_dict(theirs.state_dict())
        yield theirs, ours, sample.forward_input


def results(module: nn.Module, call: Any) -> Any:
    """What the module returns, all gradients, and its state afterwards."""

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().clone().requires_grad_(value.requires_grad)
        if isinstance(value, (tuple, list)):
            return type(value)(map(leaf, value))
        return value

    args = [leaf(value) for value in call.args]
    kwargs = {name: leaf(value) for name, value in call.kwargs.items()}
    found = module(*args, **kwargs)
    outputs = [out for out in floats(found) if out.requires_grad]
    inputs = [t for t in floats([args, list(kwargs.values())]) if t.requires_grad]
    inputs += list(module.parameters())
    gradients: Any = ()
    if outputs and inputs:
        gradients = torch.autograd.grad(
            outputs, inputs, random_like(outputs), allow_unused=True, materialize_grads=True
        )
    return flatten(found), gradients, list(module.state_dict().values())


def applied(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``results`` of these arguments."""
    return results(module, FunctionInput(*args, **kwargs))


# torch's own, of a short way that the module's settings bar, and of options without effect.
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.filterwarnings("ignore:linear_cross_entropy. ``options`` ignored:UserWarning")
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_module_equals_torchs(name: str, training: bool, pytestconfig: pytest.Config) -> None:
    most = 10**6 if pytestconfig.getoption("every_op") else MOST
    for theirs, ours, call in runs(MODULES[name], training, most):
        with tritongrad.use() as session:
            found = results(ours, call)
        if name.removeprefix("nn.").lower() in FLOAT32_CONSTANTS:
            expected = on_the_cpu(partial(applied, theirs.cpu()), *call.args, **call.kwargs)
        else:
            expected = results(theirs, call)
        assert_same(found, expected, f"{ours} of {call}")
        if OPTIONS in {reason for _, reason in session.fell_back}:
            continue
        assert {what for what in session.fell_back if what[1] not in ALLOWED} == set()


PAIR = ((4, 5), (4, 5))
WITHOUT_INFO: dict[str, tuple[tuple[Any, ...], tuple[tuple[int, ...], ...]]] = {
    # module: arguments, shapes of its inputs
    "CosineSimilarity": ((), PAIR),
    "PairwiseDistance": ((3.0,), PAIR),
    "TripletMarginLoss": ((), (*PAIR, (4, 5))),
    "TripletMarginWithDistanceLoss": ((), (*PAIR, (4, 5))),
    "LazyLinear": ((3,), ((4, 5),)),
    "LazyBatchNorm1d": ((), ((4, 5),)),
    "LazyInstanceNorm1d": ((), ((2, 4, 5),)),
}
"""Modules that torch has no ModuleInfo of. Those that drop out, and bags, are in their families'
tests."""


@pytest.mark.parametrize("name", WITHOUT_INFO)
def test_module_without_info_equals_torchs(name: str) -> None:
    arguments, shapes = WITHOUT_INFO[name]
    inputs = [
        torch.randn(shape, dtype=torch.float64, device=DEVICE).requires_grad_() for shape in shapes
    ]
    theirs = getattr(nn, name)(*arguments).to(DEVICE, torch.float64)
    ours = getattr(tritongrad.nn, name)(*arguments).to(DEVICE, torch.float64)
    for module in (theirs, ours):
        module(*inputs)  # a lazy one has its state from here on
    assert type(ours).__module__ == tritongrad.nn.__name__
    ours.load_state_dict(theirs.state_dict())
    with tritongrad.use() as session:
        found = results(ours, call := FunctionInput(*inputs))
    assert_same(found, results(theirs, call), name)
    assert {what for what in session.fell_back if what[1] not in ALLOWED} == set()
    assert session.ran


def test_they_are_torchs_modules() -> None:
    linear = tritongrad.nn.Linear(3, 4)
    assert isinstance(linear, nn.Linear)
    assert tritongrad.nn.Linear is tritongrad.nn.Linear
    assert repr(linear) == repr(nn.Linear(3, 4))
    for copied in (pickle.loads(pickle.dumps(linear)), copy.deepcopy(linear)):
        assert type(copied) is tritongrad.nn.Linear
        assert_same(list(copied.parameters()), list(linear.parameters()))
    assert tritongrad.nn.Module is nn.Module
    assert tritongrad.nn.ModuleList is nn.ModuleList


def test_what_they_contain_runs_on_our_ops() -> None:
    """Modules that torch, or the user, has made."""
    model = tritongrad.nn.Sequential(nn.Linear(3, 4), nn.Tanh()).to(DEVICE)
    x = torch.randn(2, 3, device=DEVICE)
    with tritongrad.use() as session:
        model(x)
    assert session.ran == {"linear": 1, "tanh": 1}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), model(x))
