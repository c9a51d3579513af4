"""Nets that stand exactly on their kinks, where PyTorch's own choice of derivative decides."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from zoo._case import Case, case, randn, randomize

F = nn.functional


class OnKink(nn.Module):
    """A function of parameters that sit on its kink, then a smooth map of it and the data."""

    def __init__(self, f: Callable[[Tensor], Tensor], size: int) -> None:
        super().__init__()
        self.f, self.theta = f, nn.Parameter(torch.zeros(size))
        self.head = nn.Linear(size, 2)

    def forward(self, x: Tensor) -> Tensor:
        # theta enters squared as well, so that the second derivatives depend on the choice at the kink.
        return self.head(self.f(self.theta * x) * (1 + self.theta) + self.theta.square()).sin()


def _at(name: str, f: Callable[[Tensor], Tensor], *values: float) -> Case:
    def prepare(model: nn.Module) -> None:
        with torch.no_grad():
            model.theta.copy_(torch.tensor(values, dtype=torch.float64))

    data = torch.ones(2, len(values), dtype=torch.float64)
    return case(
        f"kink_{name}",
        lambda: OnKink(f, len(values)),
        data,
        "mse",
        tags=["kinked", "at-kink"],
        prepare=prepare,
    )


def _pool(z: Tensor) -> Tensor:
    return F.max_pool1d(z[:, None], 2)[:, 0].repeat_interleave(2, 1)


def _zero_relu() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def _silence(model: nn.Module) -> None:
    """Dead units: a zero row and zero bias make the pre-activation exactly zero."""
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[0].bias[:2] = 0


def _exact_fit() -> tuple[nn.Module, Tensor, Tensor]:
    """Some residuals are zero, the others are not."""
    model = randomize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    data = randn(3, 3)
    with torch.no_grad():
        target = model(data)
    target[:, 0] += 1
    return model, data, target


KINKS = [
    case("kink_relu_net", _zero_relu, (3, 3), tags=["kinked", "at-kink"], prepare=_silence),
    _at("relu", F.relu, 0.0, 0.5, -0.5),
    _at("leaky_relu", lambda z: F.leaky_relu(z, 0.3), 0.0, 0.5, -0.5),
    _at("abs", torch.abs, 0.0, 0.5, -0.5),
    _at("hardtanh", lambda z: F.hardtanh(z, -0.5, 0.5), 0.5, -0.5, 0.1),
    _at("clamp", lambda z: z.clamp(-0.5, 0.5), 0.5, -0.5, 0.1),
    _at("relu6", lambda z: F.relu6(4 * z), 0.0, 1.5, 0.5),
    _at("hardswish", lambda z: F.hardswish(3 * z), 1.0, -1.0, 0.0),
    _at("elu", lambda z: F.elu(z, 0.6), 0.0, 0.5, -0.5),
    _at("selu", F.selu, 0.0, 0.5, -0.5),
    _at("max_pool", _pool, 0.5, 0.5, -0.1, -0.1),
    _at("max_dim", lambda z: z * z.max(1, keepdim=True).values, 0.5, 0.5, 0.1),
    _at("amax", lambda z: z * z.amax(1, keepdim=True), 0.5, 0.5, 0.1),
    _at("maximum", lambda z: torch.maximum(z, z.flip(1)), 0.5, 0.2, 0.5),
    Case("kink_l1", _exact_fit, "l1", F.l1_loss, tags=frozenset({"kinked", "at-kink"})),
]
