"""Diagonal entries without a way back: through shared parameters, gates, norms, bottlenecks and packed channels."""

from __future__ import annotations

import pytest
import torch
from oracles import assemble, functional_reference, hessian_double_backward
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import dagh

F = nn.functional


class Shared(nn.Module):
    """A kernel read twice and multiplied with its own value, a kernel made of a parameter, a layer read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.layer = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2, 4)
        self.kernel, self.gate = nn.Parameter(torch.randn(2, 2, 1, 1)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.conv(x))
        b = F.conv2d(F.softplus(self.conv(a) * a), self.kernel.exp() / self.kernel.norm())
        h = torch.tanh(self.layer(b.mean((2, 3))))
        return h * self.gate.exp() + self.layer(torch.tanh(h[:, :2]))


class WeightNorm(nn.Module):
    """Curved before it meets a sample: what comes of that belongs to none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.g = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(5))
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        w = self.g[:, None] * self.v / self.v.norm(dim=1, keepdim=True)
        return self.head(torch.sigmoid(x @ w.T)) + (self.g**3).sum()


def build(case: str) -> tuple[nn.Module, tuple[int, ...]]:
    if case == "shared":
        return Shared(), (2, 5, 5)
    if case == "weight norm":
        return WeightNorm(), (3,)
    if case == "layers":
        layers = (
            nn.Linear(3, 6), nn.Tanh(), nn.Softplus(), nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 4),
        )  # fmt: skip
        return nn.Sequential(*layers), (3,)
    if case == "tokens":
        layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True, activation="gelu")
        return nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(4)), (3, 6)
    if case == "channels":
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ELU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, groups=2),
            nn.Softmax(1), nn.Conv2d(4, 2, 1), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 4),
        ), (1, 10, 10)  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Softplus(), nn.Flatten(), nn.LazyLinear(2), nn.Tanh(), nn.Linear(2, 12), nn.Tanh(),
        nn.Linear(12, 4),
    ), (1, 6, 6)  # fmt: skip


CASES = ["shared", "weight norm", "layers", "tokens", "channels", "bottleneck"]


def problem(case: str, samples: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model, shape = build(case)
    x, y = torch.randn(samples, *shape).double(), torch.randint(4, (samples,))
    model = model.double().eval()
    model(x)
    for p in model.parameters():
        nn.init.normal_(p, std=0.6)
    return model, x, y


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_entries(case: str, samples: int) -> None:
    model, x, y = problem(case, samples)
    plan = dagh.plan(model, "cross_entropy", x, y, blocks="entries")
    assert any(c.one_way for c in plan.columns)
    assert "no sweep back, squares of tangents" in str(plan)
    with sdpa_kernel(SDPBackend.MATH):
        references = {
            "full": assemble(hessian_double_backward(model, F.cross_entropy, x, y)),
            "functional": assemble(functional_reference(model, F.cross_entropy, x, y)),
        }
        for part, reference in references.items():
            for budget in (None, "300KiB"):
                found = dagh.diagonal(model, "cross_entropy", x, y, part=part, memory_budget=budget)  # type: ignore[arg-type]
                got, scale = torch.cat([t.flatten() for t in found.values()]), float(reference.abs().max())
                torch.testing.assert_close(got, reference.diagonal(), rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("case", CASES)
def test_entries_of_every_sample(case: str) -> None:
    model, x, y = problem(case, 3)
    with sdpa_kernel(SDPBackend.MATH):
        found = dagh.diagonal(model, "cross_entropy", x, y, reduction="none")
        got = torch.cat([t.reshape(3, -1) for t in found.values()], 1)
        for k in range(3):
            reference = assemble(hessian_double_backward(model, F.cross_entropy, x[k : k + 1], y[k : k + 1]))
            scale = float(reference.abs().max())
            torch.testing.assert_close(got[k], reference.diagonal(), rtol=0, atol=1e-12 * scale)


def test_the_price_is_that_of_half_the_way() -> None:
    model, x, y = problem("layers", 3)
    entries = dagh.plan(model, "cross_entropy", x, y, blocks="entries", part="functional")
    swept = dagh.plan(model, "cross_entropy", x, y, blocks="diagonal", part="functional")
    assert not any(c.one_way for c in swept.columns)
    assert 0 < sum(c.flops for c in entries.columns) < sum(c.flops for c in swept.columns)
