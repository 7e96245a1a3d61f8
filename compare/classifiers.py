"""Networks that choose among classes, as they are written for torch: digits, and characters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .measure import DEVICE
from .networks import Loss, Model

TEXT = """
Here backpropagate simply means to trace through the computational graph, filling in the partial
derivatives with respect to each parameter. Calling backward on a tensor that is no scalar needs the
gradient of what is differentiated with respect to it.
"""


def digits() -> tuple[list[Tensor], Loss]:
    """A multilayer perceptron on scikit-learn's images of handwritten digits, 8 x 8."""
    from sklearn.datasets import load_digits  # takes a second to import

    data = load_digits()
    images = torch.tensor(data.data / 16.0, dtype=torch.float32, device=DEVICE)[:64]
    labels = torch.tensor(data.target, device=DEVICE)[:64]
    net = nn.Sequential(
        nn.Linear(64, 32),
        nn.LayerNorm(32),
        nn.GELU(),
        nn.Linear(32, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    ).to(DEVICE)

    def loss() -> Tensor:
        return F.cross_entropy(net(images), labels, label_smoothing=0.1)

    return list(net.parameters()), loss


class Block(nn.Module):
    """Attention and a multilayer perceptron, each after a norm and around a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each batch, heads, length, width of a head
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.before_mlp(x))


def characters() -> tuple[list[Tensor], Loss]:
    """A transformer that predicts the next character of a text."""
    alphabet = sorted(set(TEXT))
    text = torch.tensor([alphabet.index(c) for c in TEXT], device=DEVICE)
    length, width, heads = 12, 16, 2
    starts = torch.randint(len(text) - length, (3,)).tolist()
    inputs = torch.stack([text[i : i + length] for i in starts])
    targets = torch.stack([text[i + 1 : i + length + 1] for i in starts])
    tokens, positions = nn.Embedding(len(alphabet), width), nn.Embedding(length, width)
    blocks = nn.Sequential(Block(width, heads), Block(width, heads), nn.LayerNorm(width))
    head = nn.Linear(width, len(alphabet))
    net = nn.ModuleList([tokens, positions, blocks, head]).to(DEVICE, torch.float64)
    places = torch.arange(length, device=DEVICE)

    def loss() -> Tensor:
        logits = head(blocks(tokens(inputs) + positions(places)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return list(net.parameters()), loss


CLASSIFIERS = {
    "digits": Model("norm, activations, label smoothing", digits, torch.float32),
    "characters": Model("embedding, attention, norms: a transformer", characters),
}
