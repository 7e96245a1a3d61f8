"""What our ops are timed beside: torch in its several ways, and the libraries that are installed.

A library's function is found by the torch function that it stands for. It takes that function's
arguments and raises ``Absent`` for a call that the library has nothing for: no library covers all,
and what is not there is a note in the results, not an error.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tritongrad.extension import EXTENSIONS
from tritongrad.op import Op

F = torch.nn.functional
Function = Callable[..., Any]

OURS, EAGER = "tritongrad", "torch"
COMPILED = {"torch.compile": "default", "torch.compile max-autotune": "max-autotune-no-cudagraphs"}
"""How torch's compiler is asked. Not for CUDA graphs: they would copy each call's inputs to the
memory that was captured, which is a cost of the benchmark's rotating inputs."""

SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}

LIBRARIES = {
    "Liger-Kernel": "liger-kernel",
    "FlagGems": "flag-gems",
    "flash-linear-attention": "flash-linear-attention",
    "quack": "quack-kernels",
}
"""Peer -> name of its distribution."""

PEERS = (*SDPA, *LIBRARIES)

ALONE = frozenset(("FlagGems",))
"""Those that are switched on for the whole process, which takes too long to do for each call."""


class Absent(Exception):
    """The peer is not installed, or has nothing for this call; the message says which."""


@cache
def version(peer: str) -> str | None:
    """Version of an installed library, None if it is not."""
    try:
        return importlib.metadata.version(LIBRARIES[peer])
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """The libraries that are installed."""
    return {peer: found for peer in LIBRARIES if (found := version(peer)) is not None}


def resolve(name: str, op: Op) -> Function:
    """The function named ``name`` for the torch function that ``op`` replaces.

    Raises:
        Absent: there is none here.
    """
    function = op.replaces[0]
    if name == OURS:
        return op.entry
    if name == EAGER:
        return function
    if name in COMPILED:
        torch._dynamo.reset()
        # A gradient that is computed again and again must not write over what was saved for it.
        torch._functorch.config.donated_buffer = False
        return torch.compile(function, mode=COMPILED[name], dynamic=False, fullgraph=True)
    if name in SDPA:
        if function is not F.scaled_dot_product_attention:
            raise Absent("no attention")
        return _with_backend(function, SDPA[name])
    if version(name) is None:
        raise Absent(f"not installed: pip install {LIBRARIES[name]}")
    if name == "FlagGems":
        return _on_flag_gems(function)
    found = _tables()[name].get(function)
    if found is None:
        raise Absent("the library has no such function")
    return found


NOTES: dict[tuple[str, Function], str] = {
    ("Liger-Kernel", F.cross_entropy): "with a copy of the logits, over which it writes gradients",
}
"""What a reader must know of a peer's times."""


def _with_backend(function: Function, backend: SDPBackend) -> Function:
    def call(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(backend):
            return function(*args, **kwargs)

    return call


def _on_flag_gems(function: Function) -> Function:
    """torch's function itself: FlagGems takes the place of what it calls, while ``running`` it."""
    library = importlib.import_module("flag_gems")
    name = getattr(function, "__name__", "")
    if not any(name in registered for registered in library.all_registered_ops()):
        raise Absent("the library has no such function")
    return function


@contextlib.contextmanager
def running(name: str) -> Iterator[None]:
    """What a peer needs around its calls. Their backward passes too."""
    if name == "FlagGems":
        with importlib.import_module("flag_gems").use_gems():
            yield
    else:
        yield


def _last(input: Tensor, dim: Any) -> None:
    """Raise unless ``dim`` is the last of ``input``."""
    if dim not in (-1, input.dim() - 1):
        raise Absent("the library has the last dimension only")


def _one_dim(input: Tensor, normalized_shape: Any) -> None:
    if len(normalized_shape) != 1:
        raise Absent("the library has one dimension only")


@cache
def _tables() -> dict[str, dict[Function, Function]]:
    """Peer -> torch function -> the peer's, with torch's arguments. Imported when called."""
    return {"Liger-Kernel": _liger(), "flash-linear-attention": _fla(), "quack": _quack()}


def _eps(eps: float | None, input: Tensor) -> float:
    return torch.finfo(input.dtype).eps if eps is None else eps


def _liger() -> dict[Function, Function]:
    def functional() -> Any:
        return importlib.import_module("liger_kernel.transformers.functional")

    def softmax(input: Tensor, dim: Any, dtype: Any = None) -> Tensor:
        _last(input, dim)
        return functional().liger_softmax(input)

    def layer_norm(
        input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5
    ) -> Tensor:
        _one_dim(input, normalized_shape)
        if weight is None or bias is None:
            raise Absent("the library wants a weight and a bias")
        return functional().liger_layer_norm(input, weight, bias, eps)

    def rms_norm(input: Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Any:
        _one_dim(input, normalized_shape)
        # Not in place: by default the gradient overwrites the one that came in.
        return functional().liger_rms_norm(
            input, weight, _eps(eps, input), in_place=False, casting_mode="gemma"
        )

    def cross_entropy(input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not input.requires_grad:
            return functional().liger_cross_entropy(input, target, *args, **kwargs)
        # Its gradient is written over the logits, which other implementations still read.
        return functional().liger_cross_entropy(input.clone(), target, *args, **kwargs)

    def kl_div(
        input: Tensor, target: Tensor, reduction: str = "mean", log_target: bool = False
    ) -> Tensor:
        return functional().liger_kl_div(
            input, target, reduction=reduction, log_target=log_target, eps=0.0
        )

    table: dict[Function, Function] = {
        torch.softmax: softmax,
        F.layer_norm: layer_norm,
        F.rms_norm: rms_norm,
        F.cross_entropy: cross_entropy,
        F.kl_div: kl_div,
    }
    ours: dict[str, Function] = {
        "swiglu": lambda a, b: functional().liger_swiglu(a, b),
        "geglu": lambda a, b: functional().liger_geglu(a, b),
        "relu_squared": lambda x: functional().liger_relu_squared(x),
        "linear_cross_entropy": lambda *args, **kwargs: (
            functional().liger_fused_linear_cross_entropy(*args, **kwargs)
        ),
    }
    return table | {EXTENSIONS[name]: call for name, call in ours.items() if name in EXTENSIONS}


def _fla() -> dict[Function, Function]:
    def layer_norm(
        input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5
    ) -> Tensor:
        _one_dim(input, normalized_shape)
        module = importlib.import_module("fla.modules.layernorm")
        return module.layer_norm(input, weight, bias, eps=eps)

    def rms_norm(input: Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Any:
        _one_dim(input, normalized_shape)
        module = importlib.import_module("fla.modules.layernorm")
        return module.rms_norm(input, weight, None, eps=_eps(eps, input))

    def activation(name: str) -> Function:
        return lambda *tensors: getattr(importlib.import_module("fla.modules.activations"), name)(
            *tensors
        )

    table: dict[Function, Function] = {
        F.layer_norm: layer_norm,
        F.rms_norm: rms_norm,
        F.silu: activation("swish"),
        torch.sigmoid: activation("sigmoid"),
        F.logsigmoid: activation("logsigmoid"),
    }
    if "swiglu" in EXTENSIONS:
        table[EXTENSIONS["swiglu"]] = activation("swiglu")
    return table


def _quack() -> dict[Function, Function]:
    def softmax(input: Tensor, dim: Any, dtype: Any = None) -> Tensor:
        _last(input, dim)
        if input.dim() != 2:
            raise Absent("the library has two dimensions only")
        return importlib.import_module("quack").softmax(input)

    def rms_norm(input: Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Any:
        _one_dim(input, normalized_shape)
        return importlib.import_module("quack").rmsnorm(input, weight, eps=_eps(eps, input))

    def cross_entropy(
        input: Tensor, target: Tensor, weight: Any = None, reduction: str = "mean"
    ) -> Tensor:
        return importlib.import_module("quack").cross_entropy(
            input, target, weight=weight, reduction=reduction
        )

    return {torch.softmax: softmax, F.rms_norm: rms_norm, F.cross_entropy: cross_entropy}
