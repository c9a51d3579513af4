"""Factors of channels before a convolution go to its weights on the way back, in whole networks."""

from __future__ import annotations

import pytest
import torch
from parts import check_outer_samples, checked_parts, random_statistics
from torch import Tensor, nn

from dagh._rules._conv import Convolution

F = nn.functional


class Residual(nn.Module):
    """Normalized convolutions beside each other, one kernel used twice, one bias, a scale by a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.short = nn.Conv2d(4, 4, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4, affine=k < 3) for k in range(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.norms[0](self.first(x)))
        b = self.norms[1](self.second(a)) + self.norms[2](self.short(a))
        c = F.softplus(self.norms[3](-0.5 * self.second(F.relu(b))))
        return self.head(c.mean((2, 3)))


def strided() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, stride=2), nn.BatchNorm1d(4), nn.LeakyReLU(), nn.Conv1d(4, 3, 2, dilation=2),
        nn.BatchNorm1d(3), nn.Tanh(), nn.ConvTranspose1d(3, 2, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Flatten(),
        nn.LazyLinear(3),
    )  # fmt: skip


def problem(name: str, samples: int = 3) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = torch.randn(samples, 2, *([4, 4] if name == "residual" else [9])).double(), torch.randint(3, (samples,))
    net = (Residual() if name == "residual" else strided()).double().eval()
    net(x)
    random_statistics(net)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return net, x, y


@pytest.fixture
def absorbed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Arguments for which a factor went to the weights."""
    found: list[int] = []
    plain = Convolution.vjp_scaled

    def watched(self: Convolution, call: object, base: Tensor, factor: object, arg: int, keep: bool) -> Tensor:
        found.append(arg)
        return plain(self, call, base, factor, arg, keep)  # type: ignore[arg-type]

    monkeypatch.setattr(Convolution, "vjp_scaled", watched)
    return found


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", ["residual", "strided"])
def test_every_part_of_the_hessian(name: str, samples: int, absorbed: list[int]) -> None:
    net, x, y = problem(name, samples)
    for _ in checked_parts(net, x, y):
        assert set(absorbed) == (set() if samples == 1 else {0, 1, 2})
        absorbed.clear()


def test_blocks_of_every_sample(absorbed: list[int]) -> None:
    """Rows of weights are kept apart, and so are those of their factors."""
    net, x, y = problem("residual")
    check_outer_samples(net, x, y)
    assert absorbed
