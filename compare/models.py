"""``compare models``: small models trained on our kernels and on torch alone, step by step.

Each is a training loop that people write: unmodified torch code, in float64, from the same seed.
Its loss curve under ``use()`` must be torch's, and no arithmetic may have run on torch: only views
and the creation of tensors may. The optimizer steps outside of ``use()``: its updates are in place.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from tritongrad import use

from .measure import DEVICE, arithmetic_on_torch
from .terminal import add_json_option, choose, make_console, plural, tracked, write_json

STEPS = 20
TOLERANCE = 1e-10
"""Largest relative difference of a loss: the curves start from the same parameters."""

Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Model:
    """What is trained.

    Attributes:
        about: what its loss asks of the library, for the table.
        build: makes the parameters and the loss as a function of them.
    """

    about: str
    build: Callable[[], tuple[list[Tensor], Loss]]


def derivative(y: Tensor, x: Tensor) -> Tensor:
    """dy/dx of each row, as part of the graph."""
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return slope


def network(*widths: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """A multilayer perceptron on the device that our kernels run on."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after, dtype=torch.float64, device=DEVICE), activation()]
    return nn.Sequential(*layers[:-1])


def poisson() -> tuple[list[Tensor], Loss]:
    """u'' = -pi^2 sin(pi x), u(0) = u(1) = 0: the residual holds second derivatives of u."""
    net = network(1, 16, 16, 1)
    x = torch.linspace(0, 1, 21, dtype=torch.float64, device=DEVICE)[:, None].requires_grad_()
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64, device=DEVICE)
    source = (torch.pi**2 * torch.sin(torch.pi * x)).detach()

    def loss() -> Tensor:
        u = net(x)
        residual = derivative(derivative(u, x), x) + source
        return (residual**2).mean() + 10 * (net(ends) ** 2).sum()

    return list(net.parameters()), loss


def burgers() -> tuple[list[Tensor], Loss]:
    """u_t + u u_x = nu u_xx in two variables, with an initial condition."""
    net = network(2, 16, 16, 1)
    points = torch.rand(24, 2, dtype=torch.float64, device=DEVICE)
    t, x = points[:, :1].clone().requires_grad_(), points[:, 1:].clone().requires_grad_()
    start = torch.cat([torch.zeros_like(points[:, :1]), points[:, 1:]], 1)
    profile = -torch.sin(torch.pi * points[:, 1:])

    def loss() -> Tensor:
        u = net(torch.cat([t, x], 1))
        u_x = derivative(u, x)
        residual = derivative(u, t) + u * u_x - 0.01 * derivative(u_x, x)
        return (residual**2).mean() + ((net(start) - profile) ** 2).mean()

    return list(net.parameters()), loss


def gradient_penalty() -> tuple[list[Tensor], Loss]:
    """A critic whose gradient is to have norm 1 (WGAN-GP)."""
    critic = network(3, 16, 16, 1)
    real, fake, mix = torch.rand(3, 12, 3, dtype=torch.float64, device=DEVICE)

    def loss() -> Tensor:
        between = (mix * real + (1 - mix) * fake).requires_grad_()
        norms = derivative(critic(between), between).norm(dim=1)
        return critic(fake).mean() - critic(real).mean() + 10 * ((norms - 1) ** 2).mean()

    return list(critic.parameters()), loss


def meta_learning() -> tuple[list[Tensor], Loss]:
    """One step of gradient descent on each of several tasks, all at once by vmap, inside the loss
    (MAML): the derivative of a gradient, through torch.func."""
    net = network(1, 16, 16, 1)
    parameters: dict[str, Tensor] = dict(net.named_parameters())
    x = torch.rand(4, 10, 1, dtype=torch.float64, device=DEVICE) * 4 - 2
    phase = torch.rand(4, 1, 1, dtype=torch.float64, device=DEVICE)
    y = torch.sin(x + phase)

    def error(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return ((torch.func.functional_call(net, weights, (x,)) - y) ** 2).mean()

    def after_a_step(x: Tensor, y: Tensor) -> Tensor:
        slopes = torch.func.grad(error)(parameters, x[:5], y[:5])
        adapted = {name: p - 0.1 * slopes[name] for name, p in parameters.items()}
        return error(adapted, x[5:], y[5:])

    def loss() -> Tensor:
        return torch.vmap(after_a_step)(x, y).mean()

    return list(parameters.values()), loss


def score_matching() -> tuple[list[Tensor], Loss]:
    """Trace of the Jacobian by forward mode over the batch (Hyvarinen's loss)."""
    net = network(2, 16, 16, 2)
    x = torch.randn(16, 2, dtype=torch.float64, device=DEVICE)
    axes = torch.eye(2, dtype=torch.float64, device=DEVICE)

    def loss() -> Tensor:
        trace: Any = 0.0
        for i, direction in enumerate(axes):
            score, slope, *_ = torch.func.jvp(net, (x,), (direction.expand(16, -1),))
            trace = trace + slope[:, i]
        return (trace + 0.5 * (score**2).sum(1)).mean()

    return list(net.parameters()), loss


MODELS = {
    "poisson": Model("second derivatives in the loss", poisson),
    "burgers": Model("mixed and second derivatives in the loss", burgers),
    "gradient penalty": Model("norm of a gradient in the loss", gradient_penalty),
    "meta-learning": Model("torch.func.grad under vmap in the loss", meta_learning),
    "score matching": Model("forward mode in the loss, reverse mode over it", score_matching),
}


@dataclass
class Row:
    """How one model trained.

    Attributes:
        losses, torchs: after each step, on our kernels and on torch.
        fell_back: arithmetic that ran on torch under ``use()``.
        launches: Triton kernels launched.
    """

    model: str
    losses: list[float] = field(default_factory=list)
    torchs: list[float] = field(default_factory=list)
    fell_back: dict[str, int] = field(default_factory=dict)
    launches: int = 0
    problem: str = ""

    @property
    def difference(self) -> float:
        """The largest relative one."""
        pairs = zip(self.losses, self.torchs, strict=True)
        return max((abs(a - b) / abs(b) if a != b else 0.0 for a, b in pairs), default=0.0)

    @property
    def passed(self) -> bool:
        right = self.difference <= TOLERANCE and self.launches > 0
        return right and not self.fell_back and not self.problem


def train(model: Model, row: Row | None) -> list[float]:
    """Loss before each of the steps; on our kernels, counted in ``row``, if there is one."""
    torch.manual_seed(0)
    parameters, loss_of = model.build()
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    losses = []
    for _ in range(STEPS):
        with nullcontext() if row is None else use() as session:
            loss = loss_of()
            optimizer.zero_grad()
            loss.backward()
        if row is not None and session is not None:
            row.launches += session.launches
            for what, count in arithmetic_on_torch(session).items():
                row.fell_back[what] = row.fell_back.get(what, 0) + count
        optimizer.step()
        losses.append(loss.item())
    return losses


def check(name: str) -> Row:
    """Train the model of this name twice. What is raised on the way is its problem."""
    row = Row(name)
    try:
        row.losses = train(MODELS[name], row)
        row.torchs = train(MODELS[name], None)
    except Exception as problem:
        row.problem = f"{type(problem).__name__}: {problem}"
    return row


def present(rows: Sequence[Row], console: Console) -> None:
    """Print the table."""
    table = Table(title=f"{STEPS} steps of training in float64")
    table.add_column("model", no_wrap=True)
    table.add_column("asks for")
    for heading in ("first loss", "last loss", "relative difference", "kernels"):
        table.add_column(heading, justify="right")
    table.add_column("fell back to torch", overflow="fold")
    table.add_column("verdict", overflow="fold")
    for row in rows:
        table.add_row(row.model, MODELS[row.model].about, *_cells(row))
    console.print(table)
    failed = sum(not row.passed for row in rows)
    console.print(f"{plural(len(rows), 'model')}, {failed} failed; limit {TOLERANCE:g}")


def _cells(row: Row) -> Iterator[str]:
    yield f"{row.losses[0]:.6g}" if row.losses else "–"
    yield f"{row.losses[-1]:.6g}" if row.losses else "–"
    yield f"{row.difference:.1e}" if row.torchs else "–"
    yield str(row.launches)
    yield escape("\n".join(f"{what} ({count})" for what, count in row.fell_back.items()))
    yield "[green]ok[/]" if row.passed else "\n".join(["[red]FAILED[/]", escape(row.problem)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Returns 1 where a model trains otherwise than on torch."""
    parser = argparse.ArgumentParser(prog="compare models", description=__doc__)
    parser.add_argument("--only", action="append", metavar="MODEL", help="a model")
    add_json_option(parser)
    options = parser.parse_args(arguments)
    names = choose(parser, options.only, MODELS)
    console = make_console()
    rows = [check(name) for name in tracked(names, "training", console)]
    present(rows, console)
    if options.json is not None:
        write_json(options.json, [asdict(row) | {"passed": row.passed} for row in rows])
    return 0 if all(row.passed for row in rows) else 1
