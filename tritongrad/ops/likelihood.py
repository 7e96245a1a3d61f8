"""Negative log likelihoods of a Poisson and of a Gaussian variable: torch's signatures, and one row
a loss.

The rules are those that torch's own compositions have (Loss.cpp, functional.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..dtypes import is_number
from ..kernels import loss as k
from ..op import Unsupported
from ..sampling import Make, Sample
from .criterion import Form, Params, loss
from .loss_calls import Call, modern, read, samples_of, values

F = torch.nn.functional

_TAU = 2 * math.pi


def _stirling(g: Tensor, y: Tensor) -> Tensor:
    g = torch.where(y <= 1, 0.0, g)
    # The middle is 0, and NaN where torch's is.
    return g * torch.log(y) + (g * y / y - g) + 0.5 * g / (_TAU * y) * _TAU


def _pushed_stirling(g: Tensor, y: Tensor) -> Tensor:
    # Forward mode selects.
    return torch.where(y <= 1, 0.0, g * (torch.log(y) + 0.5 / y))


POISSON = Form(
    ("x", "y"), k.poisson_nll_loss, k.poisson_nll_loss_bwd,
    {
        "x": lambda g, x, y, eps: g * (1 - y / (x + eps)),
        "y": lambda g, x, eps: -g * torch.log(x + eps),
    },
    ("eps",),
)  # fmt: skip
POISSON_FULL = Form(
    ("x", "y"), k.poisson_full, k.poisson_full_bwd,
    {
        "x": POISSON.rules["x"],
        "y": lambda g, x, y, eps: -g * torch.log(x + eps) + _stirling(g, y),
    },
    ("eps",),
    pushes={"y": lambda g, x, y, eps: -g * torch.log(x + eps) + _pushed_stirling(g, y)},
)  # fmt: skip
POISSON_LOG = Form(
    ("x", "y"), k.poisson_log_input, k.poisson_log_input_bwd,
    {"x": lambda g, x, y: g * (torch.exp(x) - y), "y": lambda g, x: -g * x},
)  # fmt: skip
POISSON_LOG_FULL = Form(
    ("x", "y"), k.poisson_log_input_full, k.poisson_log_input_full_bwd,
    {
        "x": POISSON_LOG.rules["x"],
        "y": lambda g, x, y: -g * x + _stirling(g, y),
    },
    pushes={"y": lambda g, x, y: -g * x + _pushed_stirling(g, y)},
)  # fmt: skip


def bind_poisson_nll(
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    size_average: bool | None = None,
    eps: float = 1e-8,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Call:
    modern(size_average, reduce)
    if type(log_input) is not bool or type(full) is not bool or not is_number(eps):
        raise Unsupported(f"log_input={log_input!r}, full={full!r}, eps={eps!r}")
    if log_input:
        form = POISSON_LOG_FULL if full else POISSON_LOG
    else:
        form = POISSON_FULL if full else POISSON
    # torch computes the logarithm of counts in the default dtype.
    integral = None if full else 1
    numbers = () if log_input else (eps,)
    return read(form, (input, target), reduction, numbers=numbers, integral=integral)


_HALF_LOG_TAU = 0.5 * math.log(_TAU)


def _at_least(v: Tensor | float, eps: float) -> Tensor | float:
    """A variance raised to ``eps``, behind autograd's back as torch does it: its slope stays, but
    forward mode sees it raised."""
    if not isinstance(v, Tensor):
        return v
    with torch.no_grad():  # which forward mode does not heed
        raised, unlinked = torch.clamp_min(v, eps), v.view_as(v)
    return torch.where(v < eps, raised + (v - unlinked), v)


def _gaussian_slope(g: Tensor, d: Tensor, v: Tensor | float) -> Tensor:
    return 0.5 * g / v * (2 * d)


def _variance_slope(g: Tensor, d: Tensor, v: Any) -> Tensor:
    g = 0.5 * g
    return g / v - g * (d**2 / v / v)


GAUSSIAN = Form(
    ("x", "y", "v"), k.gaussian_nll_loss, k.gaussian_nll_loss_bwd,
    {
        "x": lambda g, x, y, v, eps: _gaussian_slope(g, x - y, _at_least(v, eps)),
        "y": lambda g, x, y, v, eps: _gaussian_slope(g, y - x, _at_least(v, eps)),
        "v": lambda g, x, y, v, eps: _variance_slope(g, x - y, _at_least(v, eps)),
    },
    ("eps", "constant"),
    pushes={
        "v": lambda g, x, y, v, eps: _variance_slope(
            torch.where(v >= eps, g, 0.0), x - y, torch.clamp_min(v, eps)
        )
    },
)  # fmt: skip


def bind_gaussian_nll(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Call:
    if type(full) is not bool or not is_number(eps):
        raise Unsupported(f"full={full!r}, eps={eps!r}")
    number, v = 1.0, None
    if isinstance(var, float):
        number = max(var, eps)
    elif isinstance(var, Tensor) and isinstance(input, Tensor):
        v = _variance_of_each(var, input)
    else:
        raise Unsupported(f"a {type(var).__name__} for the variance")
    numbers = (eps, _HALF_LOG_TAU if full else 0.0)
    call = read(
        GAUSSIAN, (input, target, v), reduction, numbers=numbers, integral=1, absent={"v": number}
    )
    if v is None and var < 0:
        raise Unsupported("negative variance")
    return call


def _look_at_variances(params: Params, input: Tensor, target: Tensor, var: Tensor | None) -> None:
    if var is not None and (values(var) < 0).any():
        raise Unsupported("negative variance")


def _variance_of_each(var: Tensor, input: Tensor) -> Tensor:
    """``var`` as it broadcasts with ``input``: of the same size, but for one dimension."""
    if var.shape == input.shape:
        return var
    if input.shape[:-1] == var.shape:
        return var.unsqueeze(-1)
    pairs = zip(input.shape, var.shape, strict=False)
    if input.dim() != var.dim() or sum(b for a, b in pairs if a != b) != 1:
        raise Unsupported("var of incorrect size")
    return var


def _gaussian_samples(make: Make) -> Iterator[Sample]:
    def triple(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
        return make(*shape), make(*shape), make(*shape, low=0.3, high=2.0)

    yield Sample(triple(3, 5), {"reduction": "none"}, "each")
    yield Sample(triple(3, 5), {"full": True}, "full")
    # Where the variance is below eps its slope is not that of what it is raised to.
    constant = make(3, 5, low=0.3, requires_grad=False)
    yield Sample((make(3, 5), make(3, 5), constant), {"eps": 0.8}, "some variances below eps")
    yield Sample((make(3, 5), make(3, 5), 0.7), {}, "one number")
    yield Sample((make(3, 5), make(3, 5), make(3, low=0.3)), {}, "a variance for each row")
    yield Sample((make(4, 3), make(3), make(4, 1, low=0.3)), {"reduction": "none"}, "broadcast")
    yield Sample(triple(2, 0), {"reduction": "sum"}, "empty")
    yield Sample(triple(1031), {"reduction": "none"}, "past one block")
    yield Sample(tuple([t[:, 1:] for t in triple(9, 258)]), {}, "shared by several programs")


# -------------------------------------------------------------------------------------------- TABLE

loss(
    "poisson_nll_loss", F.poisson_nll_loss, bind=bind_poisson_nll, form=POISSON_LOG,
    samples=samples_of((0.1, 2.0), (0.1, 3.0), log_input=(False,), full=(True,)),
)  # fmt: skip
loss(
    "gaussian_nll_loss", F.gaussian_nll_loss, bind=bind_gaussian_nll, form=GAUSSIAN,
    samples=_gaussian_samples,
    text="dx = g * (x - y) / v; dy = -dx; dv = g * (v - (x - y) ** 2) / (2 * v**2)",
    autocast={"cuda": "float32"}, look=_look_at_variances,
)  # fmt: skip
