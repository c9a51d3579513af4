"""Twelve small functions at a kink, with everything that is known about them by hand.

``limits`` are the distinct limiting Hessians, ``least`` the squared norm of the smallest element of their convex hull,
``jump`` the largest difference between two limiting gradients, ``patterns`` the number of realizable patterns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

F = nn.functional
Matrix = list[list[float]]


class Function(nn.Module):
    """``f(self, x)`` with scalar or vector parameters."""

    def __init__(self, f: Callable[[Any, Tensor], Tensor], **parameters: Any) -> None:
        super().__init__()
        self.f = f
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(torch.tensor(value, dtype=torch.float64)))

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)


class Together(nn.Module):
    """Many functions, each at parameters ``z.i`` of its own, all times ``v``: one trace for all of them."""

    def __init__(self, functions: Sequence[Callable[[Tensor], Tensor]], at: Sequence[Any], v: float = 2.0) -> None:
        super().__init__()
        rows = [torch.as_tensor(values, dtype=torch.float64).reshape(1, -1) for values in at]
        self.functions, self.z = functions, nn.ParameterList(rows)
        self.v = nn.Parameter(torch.tensor(v, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([f(z).reshape(1, -1) for f, z in zip(self.functions, self.z, strict=True)], 1) * x * self.v


@dataclass(frozen=True)
class Example:
    """A function, where it stands, and what is known."""

    f: Callable[[Any, Tensor], Tensor]
    at: dict[str, Any]
    target: list[float]
    limits: list[Matrix]
    least: float
    jump: float
    patterns: int
    certainty: str = "exact"
    x: list[list[float]] = field(default_factory=lambda: [[1.0]])
    chain: dict[float, Matrix] = field(default_factory=dict)
    """Hessian with one slope at all kinks"""
    torch: Matrix | None = None

    def model(self) -> Function:
        return Function(self.f, **self.at)

    def data(self) -> tuple[Tensor, Tensor]:
        x = torch.tensor(self.x, dtype=torch.float64)
        return x, torch.tensor(self.target, dtype=torch.float64).reshape(len(x), -1)


def half_square(output: Tensor, target: Tensor) -> Tensor:
    """``½ Σ (output - target)²``."""
    return 0.5 * (output.reshape(target.shape) - target).square().sum()


def zeros(n: int) -> Matrix:
    return [[0.0] * n for _ in range(n)]


EXAMPLES: dict[str, Example] = {
    "E1": Example(
        lambda m, x: F.relu(m.w1) * m.w2 * x, {"w1": 0.0, "w2": 2.0}, [3.0],
        [zeros(2), [[4, -3], [-3, 0]]], 0.0, 6.0, 2,
        chain={0.0: zeros(2), 0.5: [[1, -1.5], [-1.5, 0]], 1.0: [[4, -3], [-3, 0]]}, torch=zeros(2),
    ),
    "E1b": Example(
        lambda m, x: F.relu(m.w1) * m.w2 * x, {"w1": 0.0, "w2": 2.0}, [0.0],
        [zeros(2), [[4, 0], [0, 0]]], 0.0, 0.0, 2, chain={0.5: [[1, 0], [0, 0]]},
    ),
    "E2": Example(
        lambda m, x: (F.relu(m.w) * m.a - F.relu(-m.w) * m.b) * x, {"w": 0.0, "a": 1.0, "b": 1.0}, [1.0],
        [[[1, -1, 0], [-1, 0, 0], [0, 0, 0]], [[1, 0, -1], [0, 0, 0], [-1, 0, 0]]], 2.0, 0.0, 2,
        chain={0.0: zeros(3), 1.0: [[4, -1, -1], [-1, 0, 0], [-1, 0, 0]]}, torch=zeros(3),
    ),
    "E3": Example(
        lambda m, x: torch.maximum(2 * m.w1 + m.w2, m.w1 + 2 * m.w2) * x, {"w1": 1.0, "w2": 1.0}, [3.0],
        [[[4, 2], [2, 1]], [[1, 2], [2, 4]]], 20.5, 0.0, 2, chain={0.5: [[2.25, 2.25], [2.25, 2.25]]},
    ),
    "E4": Example(
        lambda m, x: torch.maximum(m.w1, m.w2) * x, {"w1": 1.0, "w2": 1.0}, [0.0],
        [[[1, 0], [0, 0]], [[0, 0], [0, 1]]], 0.5, 2**0.5, 2, chain={0.5: [[0.25, 0.25], [0.25, 0.25]]},
    ),
    "E5": Example(
        lambda m, x: (F.relu(m.w1) - 2 * F.relu(m.w2)) * x, {"w1": 0.0, "w2": 0.0}, [1.0],
        [zeros(2), [[0, 0], [0, 4]], [[1, 0], [0, 0]], [[1, -2], [-2, 4]]], 0.0, 5**0.5, 4,
    ),
    "E6": Example(
        lambda m, x: m.v * F.relu(m.w * x), {"w": 0.0, "v": 1.0}, [1.0, -1.0],
        [[[1, -1], [-1, 0]]], 3.0, 0.0, 2, x=[[1.0], [-1.0]],
        chain={0.5: [[0.5, -1], [-1, 0]]}, torch=zeros(2),
    ),
    "E7": Example(
        lambda m, x: F.relu(m.w2 * F.relu(m.w1)) * x, {"w1": 0.0, "w2": 0.0}, [1.0],
        [zeros(2), [[0, -1], [-1, 0]]], 0.0, 0.0, 3, certainty="sampled",
    ),
    "E8": Example(
        lambda m, x: m.v * F.relu(m.w2 * F.relu(m.w1) + m.b) * x, {"w1": -1.0, "w2": 1.0, "b": 0.0, "v": 2.0}, [1.0],
        [zeros(4), [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 4, -1], [0, 0, -1, 0]]], 0.0, 2.0, 2,
    ),
    "E9": Example(
        lambda m, x: m.v * F.relu(m.w * x), {"w": 1.0, "v": 1.0}, [1.0], [zeros(2)], 0.0, 0.0, 1, x=[[0.0]],
    ),
    "E10": Example(
        lambda m, x: F.relu(F.relu(m.w1) - F.relu(m.w2)) * x, {"w1": 0.0, "w2": 0.0}, [-1.0],
        [zeros(2), [[1, 0], [0, 0]], [[1, -1], [-1, 1]]], 0.0, 2**0.5, 5,
    ),
    "E11": Example(
        lambda m, x: m.v * m.w.amax() * x, {"w": [1.0, 1.0, 1.0], "v": 2.0}, [0.0],
        [
            [[4, 0, 0, 4], zeros(4)[0], zeros(4)[0], [4, 0, 0, 1]],
            [zeros(4)[0], [0, 4, 0, 4], zeros(4)[0], [0, 4, 0, 1]],
            [zeros(4)[0], zeros(4)[0], [0, 0, 4, 4], [0, 0, 4, 1]],
        ], 17.0, 32**0.5, 3,
        chain={0.5: [[4 / 9] * 3 + [4 / 3]] * 3 + [[4 / 3] * 3 + [1.0]]},
        torch=[[4 / 9] * 3 + [4 / 3]] * 3 + [[4 / 3] * 3 + [1.0]],
    ),
}  # fmt: skip


def penalized_relu_squared() -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
    """E12: one relu² unit at w = 0 on four samples, with ½‖w‖² as further outputs."""

    def f(m: Any, x: Tensor) -> Tensor:
        h = m.v * F.relu(x[:, :2] @ m.w) ** 2
        return torch.stack([h, x[:, 2] * m.w[0], x[:, 2] * m.w[1]], 1)

    x = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 0], [1, -1, 0]], dtype=torch.float64)
    y = torch.zeros(4, 3, dtype=torch.float64)
    y[:, 0] = torch.tensor([1.0, 1.0, -1.0, 0.5])
    return Function(f, w=[0.0, 0.0], v=1.0), half_square, x, y
