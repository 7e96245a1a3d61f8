"""Gated units: one row an op, as activation.py's, of two tensors or of the halves of one.

A packed call reads both halves through their strides, and its backward writes both gradients into
one tensor: nothing is split or joined in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..admission import admit
from ..dtypes import FLOATING
from ..extension import extension
from ..kernels import gated as k
from ..op import Tensors, Unsupported
from ..sampling import Make, Sample
from .activation import gelu_slope, silu_slope
from .operands import Params, read_operands
from .rows import row

F = torch.nn.functional
pointwise = partial(row, k, inputs=("x", "y"))

# ----------------------------------------------------------------------- what torch has no name for


def _pair(name: str, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both operands of a gated unit, which come in one tensor if ``up`` is None."""
    if up is not None:
        return gate, up
    if not gate.dim() or gate.shape[-1] % 2:
        raise RuntimeError(
            f"{name}: the last dimension of a packed tensor must be even, got {list(gate.shape)}"
        )
    half = gate.shape[-1] // 2
    return gate.narrow(-1, 0, half), gate.narrow(-1, half, half)


@extension
def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """``silu(gate) * up``, of tensors that broadcast.

    Args:
        gate: what the activation is applied to; without ``up``, both: the first half along the last
            dimension is the gate, the second what it gates.

    Raises:
        RuntimeError: the last dimension of a packed tensor is not even; shapes do not broadcast.

    Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202.
    """
    gate, up = _pair("swiglu", gate, up)
    return F.silu(gate) * up


@extension
def geglu(gate: Tensor, up: Tensor | None = None, approximate: str = "none") -> Tensor:
    """``gelu(gate, approximate=approximate) * up``, of tensors that broadcast.

    Args:
        gate: what the activation is applied to; without ``up``, both: the first half along the last
            dimension is the gate, the second what it gates.
        approximate: "none" or "tanh", as torch's gelu has it.

    Raises:
        RuntimeError: the last dimension of a packed tensor is not even; shapes do not broadcast;
            another ``approximate``.

    Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202.
    """
    gate, up = _pair("geglu", gate, up)
    return F.gelu(gate, approximate=approximate) * up


@extension
def reglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """``relu(gate) * up``, of tensors that broadcast.

    Args:
        gate: what the activation is applied to; without ``up``, both: the first half along the last
            dimension is the gate, the second what it gates.

    Raises:
        RuntimeError: the last dimension of a packed tensor is not even; shapes do not broadcast.

    Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202.
    """
    gate, up = _pair("reglu", gate, up)
    return torch.relu(gate) * up


# -------------------------------------------------------------------------------- reading the calls


def _bind(gate: Tensor, up: Tensor | None = None) -> tuple[Tensors, Params]:
    if up is None:
        return _bind_halves(gate, -1)
    if not isinstance(gate, Tensor) or not isinstance(up, Tensor):
        raise Unsupported("operands are not tensors")
    if gate.dtype is not up.dtype:
        raise Unsupported("different dtypes")  # the activation is rounded to the gate's
    if gate.get_device() != up.get_device():
        raise Unsupported("tensors on different devices")
    return read_operands(("gate", "up"), (gate, up))


def _bind_geglu(
    gate: Tensor, up: Tensor | None = None, approximate: str = "none"
) -> tuple[Tensors, Params]:
    if approximate not in ("none", "tanh"):
        raise Unsupported(f"approximate is {approximate!r}")
    tensors, params = _bind(gate, up)
    return tensors, params._replace(form="_tanh" if approximate == "tanh" else "")


def _bind_halves(input: Tensor, dim: int = -1) -> tuple[Tensors, Params]:
    admit(input)
    if input.dtype not in FLOATING:
        raise Unsupported(f"dtype {str(input.dtype).removeprefix('torch.')}")
    rank = input.dim()
    if type(dim) is not int or not -rank <= dim < rank:
        raise Unsupported(f"dim={dim!r}")
    if input.shape[dim] % 2:
        raise Unsupported("an odd number cannot be halved")
    return (input, None), Params((), (), input.dtype, halves=dim if dim < 0 else dim - rank)


# -------------------------------------------------------------------------------------------- TABLE


def _glu_samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 6),), {}, "small")
    yield Sample((make(4, 5),), {"dim": 0}, "halves of the rows")
    yield Sample((make(2, 4, 3),), {"dim": 1}, "inner dim")
    yield Sample((make(3, 1034),), {}, "past one block")
    yield Sample((make(6, 7).t(),), {}, "transposed")
    yield Sample((make(4, 12)[:, ::2],), {}, "every other column")
    yield Sample((make(6),), {}, "halves that are dense")
    yield Sample((make(3, 0),), {}, "empty")


def _samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(3, 5), make(3, 5)), {}, "small")
    yield Sample((make(3, 6),), {}, "packed")
    yield Sample((make(), make()), {}, "0-dim")
    yield Sample((make(1031), make(1031)), {}, "past one block")
    yield Sample((make(3, 1034),), {"up": None}, "packed, past one block")
    yield Sample((make(4, 1), make(1, 16)), {}, "broadcast")
    yield Sample((make(6, 7).t(), make(7, 6)), {}, "transposed")
    yield Sample((make(2, 12)[:, ::2],), {}, "packed, every other column")
    yield Sample((make(2, 0), make(2, 1)), {}, "empty")


def _geglu_samples(make: Make) -> Iterator[Sample]:
    yield from _samples(make)
    yield Sample((make(3, 5), make(3, 5)), {"approximate": "tanh"}, "arguments")
    yield Sample((make(3, 6), None, "tanh"), {}, "packed, arguments")


def _reglu_push(dx: Tensor | None, dy: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    """The slope of 0 is a factor here, as in torch's, not a choice."""
    total = None if dx is None else torch.where(x <= 0, 0.0, dx) * y
    if dy is None:
        assert total is not None
        return total
    part = torch.relu(x) * dy
    return part if total is None else total + part


GATES = "Shazeer, arXiv 2002.05202; torch derivatives.yaml of the activation"

pointwise(
    "glu", F.glu,
    bind=_bind_halves,
    rules={
        "x": lambda g, y: g * torch.sigmoid(y),
        "y": lambda g, x, y: (1 - torch.sigmoid(y)) * torch.sigmoid(y) * g * x,
    },
    samples=_glu_samples, opinfo=("nn.functional.glu",),
    schema="(Tensor input, int dim=-1) -> Tensor",
)  # fmt: skip
pointwise(
    "swiglu", swiglu,
    bind=_bind,
    rules={"x": lambda g, x, y: silu_slope(g * y, x), "y": lambda g, x: g * F.silu(x)},
    samples=_samples, opinfo=(), sources=GATES,
    schema="(Tensor gate, Tensor? up=None) -> Tensor",
)  # fmt: skip
pointwise(
    "geglu", geglu,
    bind=_bind_geglu, forms=("", "_tanh"),
    rules={
        "x": lambda g, x, y, form="": gelu_slope(g * y, x, form),
        "y": lambda g, x, form="": g * F.gelu(x, approximate="tanh" if form else "none"),
    },
    samples=_geglu_samples, opinfo=(), sources=GATES,
    schema='(Tensor gate, Tensor? up=None, str approximate="none") -> Tensor',
)  # fmt: skip
pointwise(
    "reglu", reglu,
    bind=_bind,
    rules={
        "x": lambda g, x, y: torch.where(x <= 0, 0.0, g * y),
        "y": lambda g, x: g * torch.relu(x),
    },
    jvp=_reglu_push,
    samples=_samples, opinfo=(), sources=GATES,
    schema="(Tensor gate, Tensor? up=None) -> Tensor",
)  # fmt: skip
