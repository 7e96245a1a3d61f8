"""Networks whose losses hold derivatives: physics, penalties, learning to learn, scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .measure import DEVICE

Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Model:
    """What is trained.

    Attributes:
        about: what its loss asks of the library, for the table.
        build: makes the parameters and the loss as a function of them.
        dtype: of its parameters.
    """

    about: str
    build: Callable[[], tuple[list[Tensor], Loss]]
    dtype: torch.dtype = torch.float64


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


NETWORKS = {
    "poisson": Model("second derivatives in the loss", poisson),
    "burgers": Model("mixed and second derivatives in the loss", burgers),
    "gradient penalty": Model("norm of a gradient in the loss", gradient_penalty),
    "meta-learning": Model("torch.func.grad under vmap in the loss", meta_learning),
    "score matching": Model("forward mode in the loss, reverse mode over it", score_matching),
}
