"""Curvature of cross-entropy where the softmax is saturated: no digit is lost."""

from __future__ import annotations

import mpmath
import pytest
import torch
from torch import Tensor, nn

import dagh
from dagh._outer import loss_curvature

MARGINS = [[20.0, 0.0, -3.0], [0.0, 40.0, 1.0], [100.0, 0.0, -3.0], [40.0, 39.0, 0.0]]


def truth(logits: list[float]) -> Tensor:
    """``diag p - p pᵀ`` in 200 digits, over its largest entry."""
    with mpmath.workdps(200):
        e = [mpmath.e ** mpmath.mpf(z - max(logits)) for z in logits]
        p = [a / mpmath.fsum(e) for a in e]
        rows = [[(a if i == j else 0) - a * b for j, b in enumerate(p)] for i, a in enumerate(p)]
        scale = max(abs(a) for row in rows for a in row)
        return torch.tensor([[float(a / scale) for a in row] for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("logits", MARGINS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_curvature_of_a_saturated_softmax(logits: list[float], smoothing: float) -> None:
    model = nn.Linear(1, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor(logits)[:, None])
    x, y = torch.ones(1, 1).double(), torch.tensor([0])
    loss = nn.CrossEntropyLoss(label_smoothing=smoothing)
    graph, expected = dagh.trace(model, x), truth(logits)
    found = loss_curvature(graph._evaluate(loss, x, y, reduction="mean", kinks="torch", wrt=["weight"]))[0]
    for got in (
        found,
        dagh.hessian(graph, loss, x, y).dense(),
        dagh.operator(graph, loss, x, y) @ torch.eye(3).double(),
    ):
        assert float((got / got.abs().max() - expected).norm()) <= 1e-14 * float(expected.norm())
