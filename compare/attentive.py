"""Networks of attention whose losses hold its derivatives: flows, and forces.

torch's own fused attention has none of these, so that its formula in torch mathematics (the "math"
backend) is what ours is compared with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .measure import DEVICE
from .networks import Loss, Model, derivative


class Attentive(nn.Module):
    """A layer of attention over a set of points, and a norm."""

    def __init__(self, inputs: int, width: int, outputs: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.into, self.out = nn.Linear(inputs, width), nn.Linear(width, outputs)
        # Not LayerNorm: of its forward-mode derivative torch's own reverse mode is wrong, which
        # tests/test_norm.py compares with the formula. Ours is right.
        self.norm, self.qkv = nn.RMSNorm(width), nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.into(x))
        qkv = self.qkv(self.norm(h)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        with sdpa_kernel(SDPBackend.MATH):
            attended = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(h + attended.transpose(1, 2).flatten(-2))
        return out


def mean_flow() -> tuple[list[Tensor], Loss]:
    """The mean velocity u between times r and t, of which the identity u = v - (t - r) du/dt is
    asked, the derivative along the path by forward mode (MeanFlow)."""
    net = Attentive(4, 8, 2).to(DEVICE, torch.float64)
    data, noise = torch.randn(2, 4, 5, 2, dtype=torch.float64, device=DEVICE)
    r, t = torch.rand(2, 4, 1, 1, dtype=torch.float64, device=DEVICE).sort(0).values
    z, v = (1 - t) * data + t * noise, noise - data

    def velocity(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        times = torch.cat([r, t], -1).expand(-1, z.shape[1], -1)
        found: Tensor = net(torch.cat([z, times], -1))
        return found

    def loss() -> Tensor:
        moving = v, torch.zeros_like(r), torch.ones_like(t)
        u, slope, *_ = torch.func.jvp(velocity, (z, r, t), moving)
        # In the paper the target is a constant. Here its derivative counts: reverse mode over
        # forward mode, through attention and norm.
        return (u - (v - (t - r) * slope)).square().mean()

    return list(net.parameters()), loss


def forces() -> tuple[list[Tensor], Loss]:
    """An energy of points by attention, its gradient fitted to forces, and a penalty on that."""
    net = Attentive(3, 8, 1).to(DEVICE, torch.float64)
    points = torch.randn(3, 6, 3, dtype=torch.float64, device=DEVICE).requires_grad_()
    wanted = -points.detach()

    def loss() -> Tensor:
        force = -derivative(net(points).sum((1, 2)), points)
        return (force - wanted).square().mean() + 0.1 * (force.norm(dim=-1) - 1).square().mean()

    return list(net.parameters()), loss


ATTENTIVE = {
    "mean flow": Model("forward mode through attention and norm, reverse mode over it", mean_flow),
    "forces": Model("gradient and gradient penalty through attention", forces),
}
