"""Branches, sharing, several inputs and outputs, frozen and unused parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo._case import case, randn

F = nn.functional


class Residual(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(blocks))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for block in self.blocks:
            h = h + block(h).tanh()
        return self.head(h)


class ResidualConv(nn.Module):
    """A basic block with batch normalization and a projected shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 2, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(2)
        self.conv2, self.norm2 = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)
        self.shortcut, self.head = nn.Conv2d(1, 2, 1, stride=2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm1(self.conv1(x)), inplace=True)
        h = self.norm2(self.conv2(h))
        h += self.shortcut(x)
        return self.head(F.silu(h).mean((2, 3)))


class Dense(nn.Module):
    """Every layer sees the concatenation of all earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(w, 2) for w in (3, 5, 7))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x).tanh()], 1)
        return x[:, -4:]


class Gate(nn.Module):
    """A residual gate whose weight is used on both sides of the product."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.gate, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.shared(x).tanh()
        b = a + self.gate(a).sigmoid() * self.shared(a)
        return self.head(torch.cat([a, b], 1))


class Product(nn.Module):
    """``b = a^2, out = a b``: the second derivative runs across two children that meet later."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        a = self.a * x
        return a * a.square()


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = self.tower(left), self.tower(right)
        return torch.cat([a * b, (a - b).square()], 1)


class Autoencoder(nn.Module):
    """One matrix encodes, its transpose decodes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(2, 4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight).tanh(), self.weight.t(), self.bias)


class Repeated(nn.Module):
    """One layer applied three times, and its square weight used once more as a quadratic form."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.step(self.step(self.step(x).tanh()).tanh())
        return h + 0.1 * (h @ self.step.weight) * h


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(2, 3)

    def forward(self, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return (self.a(image).tanh() * self.b(text)).sin() * scale


class Several(nn.Module):
    """Several outputs, as a dictionary or a tuple."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body, self.left, self.right = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 3)
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        h = self.body(x).tanh()
        named = {"features": h, "left": self.left(h), "logits": self.right(h)}
        return named if self.kind == "dict" else tuple(named.values())


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = h + self.b(h).tanh()
        h += x.sum(1, keepdim=True)
        h[:, 0] = (2 * h[:, 1]) * (h[:, 2] + 1)
        h[:, 1:].mul_(0.5)
        h = F.leaky_relu_(h, 0.2)
        return self.c(h * h.sigmoid())


class Einsum(nn.Module):
    """Tensor contractions written with einsum, three factors in one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.zeros(3, 2, 2)), nn.Parameter(torch.zeros(2, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("ni,ijk->njk", x, self.u).tanh()
        return torch.einsum("njk,nkl,jlc->nc", h, h, self.v)


class FreeParameters(nn.Module):
    """Parameters that meet nothing but each other before the data, a scalar and a buffer among them."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.rank = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(2, 3))
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("offset", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.low @ self.rank).tanh() * self.log_scale.exp()
        return (x + self.offset) @ weight + weight.diagonal()


class Partial(nn.Module):
    """A frozen layer, a parameter that is never used and one that is used but has no effect."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.frozen, self.b = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.unused, self.idle = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.frozen(self.a(x).tanh()).tanh()) + 0 * self.idle


class TokenMixer(nn.Module):
    """Patches by reshape and permute, mixing over tokens and then over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.tokens, self.channels = nn.Linear(4, 3), nn.Linear(4, 4), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        patches = x.reshape(n, 2, 2, 2, 2).permute(0, 1, 3, 2, 4).reshape(n, 4, 4)
        h = self.embed(patches).transpose(1, 2)
        h = h + self.tokens(h).tanh()
        return self.channels(h.transpose(1, 2)).mean(1)


class Hyper(nn.Module):
    """One net's output is the weight of another, sample by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Linear(2, 6)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        weight = self.make(z).view(-1, 2, 3).tanh()
        return torch.bmm(weight, x[:, :, None]).squeeze(2).sin()


class BatchStatistics(nn.Module):
    """Samples interact through a mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        return self.b(h * (h - h.mean(0, keepdim=True)))


def several(kind: str) -> Callable[[], nn.Module]:
    return lambda: Several(kind)


KEYWORDS = {"image": randn(3, 3), "text": randn(3, 2, seed=2), "scale": randn(3, 1, seed=3)}
STRUCTURE = [
    case("residual", Residual, (3, 3), tags=["branch"]),
    case("residual_conv", ResidualConv, (2, 1, 4, 4), tags=["branch", "conv"]),
    case("residual_conv_train", ResidualConv, (3, 1, 4, 4), mode="train", tags=["branch", "conv", "coupled"]),
    case("dense_cat", Dense, (3, 3), tags=["branch"]),
    case("gate_shared", Gate, (3, 3), tags=["branch", "shared"]),
    case("square_times_self", Product, (2, 1), "mse", tags=["branch"]),
    case("siamese", Siamese, (randn(3, 3), randn(3, 3, seed=2)), "mse", tags=["shared"]),
    case("autoencoder_tied", Autoencoder, (3, 4), "mse", tags=["shared"]),
    case("repeated_layer", Repeated, (3, 3), tags=["shared"]),
    case("keyword_inputs", Keywords, KEYWORDS, "mse", tags=["inputs"]),
    case("dict_output", several("dict"), (3, 3), output="logits", tags=["outputs"]),
    case("tuple_output", several("tuple"), (3, 3), "mse", output=1, tags=["outputs"]),
    case("inplace", InPlace, (3, 3), tags=["inplace", "kinked"], gain=1.4),
    case("einsum", Einsum, (3, 3), "mse", tags=["einsum"], gain=1.5),
    case("free_parameters", FreeParameters, (3, 3), tags=["branch"]),
    case("frozen_and_unused", Partial, (3, 3), tags=["frozen"]),
    case("token_mixer", TokenMixer, (2, 1, 4, 4), tags=["branch"]),
    case("hypernetwork", Hyper, (randn(3, 3), randn(3, 2, seed=2)), "mse", tags=["inputs"]),
    case("batch_mean", BatchStatistics, (4, 3), tags=["coupled"]),
]
