"""Operators over batches with inputs that belong to all samples, also where these are as many."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dagh

F64 = torch.float64


class Attention(nn.Module):
    """One head over T tokens, with a mask [T, T] that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.out = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = (self.q(x) @ self.q(x).mT).masked_fill(mask, -1e9)
        return self.out(torch.tanh(torch.softmax(scores, -1) @ self.v(x))).mean(1)


def dense(model: nn.Module, loss: Tensor) -> Tensor:
    params = list(model.parameters())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, create_graph=True)])
    rows = [torch.autograd.grad(g, params, retain_graph=True) for g in gradient]
    return torch.stack([torch.cat([r.flatten() for r in row]) for row in rows])


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("budget", [4000, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sizes", [(7, 5, 2), pytest.param((5, 5), marks=pytest.mark.slow)])
def test_masks_stay_whole(named: bool, budget: int | None, sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, tokens = Attention().double(), 5
    mask = torch.triu(torch.ones(tokens, tokens, dtype=torch.bool), 1)
    x, y = torch.randn(sum(sizes), tokens, 3, dtype=F64), torch.randint(2, (sum(sizes),))
    parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
    loader = [({"mask": mask, "x": a} if named else (a, mask), b) for a, b in parts]
    expected = dense(model, nn.functional.cross_entropy(model(x, mask), y))
    op = dagh.operator(model, "cross_entropy", loader, memory_budget=budget)
    torch.testing.assert_close(op @ torch.eye(op.shape[0], dtype=F64), expected, rtol=1e-9, atol=1e-12)
    assert op.samples == sum(sizes)
    one = dagh.operator(model, "cross_entropy", loader[0][0], parts[0][1], memory_budget=budget)
    expected = dense(model, nn.functional.cross_entropy(model(parts[0][0], mask), parts[0][1]))
    torch.testing.assert_close(one @ torch.eye(one.shape[0], dtype=F64), expected, rtol=1e-9, atol=1e-12)
