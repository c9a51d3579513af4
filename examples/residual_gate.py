"""Branches, a concatenation and a shared weight: the structures that per-layer methods cannot follow.

One ``transform`` is applied twice (its parameters are shared), a gate multiplies the two branches, a skip
connection adds the input back, and the head reads the gated sum beside the untouched features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

INPUT_SHAPE = (8,)


class ResidualGate(nn.Module):
    def __init__(self, features: int = 8, hidden: int = 6, classes: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(features, hidden)
        self.transform = nn.Linear(hidden, hidden)
        self.gate = nn.Linear(hidden, hidden)
        self.head = nn.Linear(2 * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.embed(x))
        once = torch.tanh(self.transform(h))
        twice = torch.tanh(self.transform(once))
        gated = h + torch.sigmoid(self.gate(h)) * twice
        logits: Tensor = self.head(torch.cat([gated, once], dim=1))
        return logits


def build(seed: int = 0) -> ResidualGate:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResidualGate()


model = build()
