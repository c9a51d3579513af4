"""Networks on which bounds are compared with the truth: every kind of layer, with scales that leave no room."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

F = nn.functional


class Residual(nn.Module):
    """A skip connection, normalized by running statistics, then an average over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1, bias=False)
        self.bn, self.fc = nn.BatchNorm2d(3), nn.Linear(3, 3)
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.5, 2)
        nn.init.normal_(self.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.b(torch.relu(self.bn(self.a(x)))))
        return self.fc(x.mean((2, 3)))


class Attention(nn.Module):
    """One block of self-attention with layer normalization and a gated output."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.norm, self.qkv, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)
        self.gate, self.fc = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        scores = q @ k.transpose(1, 2) / 2
        if self.causal:
            t = x.shape[1]
            scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf"))
        x = x + self.out(torch.softmax(scores, -1) @ v)
        return self.fc(F.silu(self.gate(x[:, -1])) * x[:, -1])


class Shared(nn.Module):
    """A weight used three times, a transposed copy of it, and one behind a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 4) / 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.w(x))
        return F.linear(F.linear(x, self.w.weight.t()), torch.sinh(self.v))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.fc = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.cell(x)[0][:, -1])


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(5, 3), nn.Linear(3, 5)
        self.fc.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.table(tokens)).sum(1))


def _conv(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain1d": (lambda: _conv(nn.Conv1d(1, 2, 3, bias=False), nn.ReLU(), nn.Conv1d(2, 2, 2, bias=False), nn.Flatten()), (1, 5)),
    "plain2d": (
        lambda: _conv(nn.Conv2d(2, 3, 2, bias=False), nn.ReLU(), nn.Conv2d(3, 2, 2, bias=False), nn.Flatten()), (2, 3, 4),
    ),
    "head": (
        lambda: _conv(
            nn.Conv2d(1, 2, 2, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 2, 1, bias=False), nn.ReLU(),
            nn.Flatten(), nn.Linear(8, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False),
        ),
        (1, 5, 5),
    ),
    "average": (
        lambda: _conv(
            nn.Conv2d(1, 2, 2, bias=False), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(2, 3, 2, bias=False), nn.Flatten()
        ),
        (1, 5, 5),
    ),
    "overlap": (
        lambda: _conv(
            nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 1), nn.AvgPool2d(2, 1, padding=1),
            nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(18, 3),
        ),
        (1, 4, 4),
    ),
    "strided": (
        lambda: _conv(
            nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.LeakyReLU(0.3), nn.Conv2d(4, 2, 2, dilation=2),
            nn.Tanh(), nn.Flatten(), nn.Linear(2, 3),
        ),
        (2, 5, 5),
    ),
    "circular": (
        lambda: _conv(
            nn.Conv1d(1, 2, 3, padding=1, padding_mode="circular"), nn.GELU(),
            nn.Conv1d(2, 2, 3, padding=2, padding_mode="reflect"), nn.SiLU(), nn.Flatten(), nn.Linear(12, 3),
        ),
        (1, 4),
    ),
    "transposed": (
        lambda: _conv(
            nn.Conv1d(1, 2, 3), nn.Sigmoid(), nn.ConvTranspose1d(2, 2, 3, stride=2), nn.ELU(), nn.Flatten(),
            nn.Linear(14, 3),
        ),
        (1, 5),
    ),
    "mlp": (lambda: _conv(nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 4), nn.Mish(), nn.Linear(4, 3)), (4,)),
    "prelu": (lambda: _conv(nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 3)), (4,)),
    "residual": (Residual, (1, 4, 4)),
    "attention": (Attention, (3, 4)),
    "causal": (lambda: Attention(causal=True), (3, 4)),
    "shared": (Shared, (4,)),
    "recurrent": (Recurrent, (3, 2)),
    "tokens": (Tokens, (3,)),
}  # fmt: skip


def build(name: str, seed: int, samples: int = 3, spread: float = 0.0) -> tuple[nn.Module, Tensor, Tensor]:
    """A network in float64 with data; ``spread`` scales every parameter by a random power of ten up to it."""
    torch.manual_seed(seed)
    make, shape = NETS[name]
    model = make().double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10 ** (spread * (2 * torch.rand(()) - 1)))
    if name == "tokens":
        return model, torch.randint(5, (samples, *shape)), torch.randint(5, (samples,))
    x = torch.randn(samples, *shape).double()
    classes = model(x).shape[1]
    return model, x, torch.randint(classes, (samples,))
