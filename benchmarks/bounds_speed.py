"""Time of the bounds on two networks of a size that people use.

    python -m benchmarks.bounds_speed

A three-layer convolutional network (C = 6, 28 × 28) with a linear head on a batch of 64, every row; and row b2 of a
ResNet-18 for 32 × 32 images on a batch of 8.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

import dagh
from dagh.bounds import report


def small() -> tuple[nn.Module, Tensor, Tensor]:
    """Three valid 3 × 3 convolutions with six channels, then a linear head."""
    layers: list[nn.Module] = []
    for channels in (1, 6, 6):
        layers += [nn.Conv2d(channels, 6, 3, bias=False), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 22 * 22, 10, bias=False))
    return net, torch.rand(64, 1, 28, 28), torch.randint(10, (64,))


class Block(nn.Module):
    """Two convolutions with a skip connection."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.b, self.norm_b = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        same = stride == 1 and inside == out
        self.skip = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm_b(self.b(torch.relu(self.norm_a(self.a(x))))) + self.skip(x))


def resnet18() -> tuple[nn.Module, Tensor, Tensor]:
    """ResNet-18 in its form for 32 × 32 images."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    inside = 64
    for out, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Block(inside, out, stride), Block(out, out, 1)]
        inside = out
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)).eval()
    return net, torch.rand(8, 3, 32, 32), torch.randint(10, (8,))


def timed(what: str, work: Callable[[], object]) -> None:
    """Print the seconds that a call takes, and what it returns."""
    start = time.perf_counter()
    result = work()
    print(f"{what}: {time.perf_counter() - start:.1f} s", flush=True)
    print(result, flush=True)


def main() -> None:
    """Run both."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net, x, y = small()
        timed("28 × 28, C = 6, batch of 64, every row", lambda: report(net, "cross_entropy", x, y))
        net, x, y = resnet18()
        graph = dagh.trace(net, x)
        timed("ResNet-18, batch of 8, b2", lambda: report(graph, "cross_entropy", x, y, rows=["b2"]))
        timed("ResNet-18, weights only", lambda: report(graph, "cross_entropy", x, y, rows=["a1", "a2", "a3", "F_a"]))


if __name__ == "__main__":
    main()
