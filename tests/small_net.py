"""A small network with everything awkward about parameters, and how to compare with its reference."""

from __future__ import annotations

from typing import Any

import torch
from oracles import Blocks, hessian_double_backward
from torch import Tensor, nn

F = nn.functional


class Net(nn.Module):
    """A convolution, a skip connection, a tied head, a parameter used before any input, and one never
    used.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(1, 2, 2), nn.Conv1d(2, 2, 1)
        self.fc1, self.fc2 = nn.Linear(6, 3), nn.Linear(6, 3)
        self.fc2.weight = self.fc1.weight
        self.scale = nn.Parameter(0.5 * torch.randn(3))
        self.spare = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv1(x.unsqueeze(1)))
        h = (h + F.softplus(self.conv2(h))).flatten(1)
        return self.fc1(h) * torch.exp(self.scale) + torch.tanh(self.fc2(h.flip(1)))


def build(n: int = 5, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    return Net().double(), torch.randn(n, 4).double(), torch.randint(3, (n,))


def reference(model: nn.Module, x: Tensor, y: Tensor, loss: Any = F.cross_entropy) -> Blocks:
    return hessian_double_backward(model, loss, x, y)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    assert got.shape == expected.shape
    assert float((got - expected).norm()) <= tolerance * max(float(expected.norm()), 1e-2)
