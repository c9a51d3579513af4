"""Search for violated bounds: random networks and scales, and gradient ascent on the Hessian norm within fixed limits.

    python -m benchmarks.bounds_search --nets 200 --steps 200

prints the smallest ratio of bound to truth that was found for every row, and exits with 1 where a rigorous one is
below 1.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import dagh
from dagh.bounds import STATEMENTS, report

#: Rounding: a bound may lie this far below the truth, relatively.
SLACK = 1e-9


def half_mse(z: Tensor, t: Tensor) -> Tensor:
    """``½ ‖z − t‖²``, averaged over samples; its curvature is the identity."""
    return 0.5 * (z - t).square().sum(1).mean()


LOSSES: dict[str, tuple[object, float | None]] = {"cross_entropy": ("cross_entropy", None), "half": (half_mse, 1.0)}


def _conv(dims: int, *args: int, **options: int) -> nn.Module:
    return (nn.Conv1d, nn.Conv2d)[dims - 1](*args, bias=False, **options)


def chains(generator: torch.Generator) -> Iterator[tuple[nn.Sequential, tuple[int, ...]]]:
    """Random chains that the published statements cover: 1D or 2D, with or without pooling and head."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    while True:
        dims, depth, pooled, headed = draw(1, 2), draw(1, 3), draw(0, 2), draw(0, 1)
        size, channels, layers = draw(4, 7), [draw(1, 2)], []
        side = size
        at = draw(1, depth)
        for p in range(1, depth + 1 + headed):
            kernel = draw(1, min(3, side))
            channels.append(draw(1, 3))
            layers += [_conv(dims, channels[-2], channels[-1], kernel), nn.ReLU()]
            side -= kernel - 1
            if pooled and p == at and side >= 2:
                pool = draw(2, side)
                kind = (nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d)[2 * (pooled - 1) + dims - 1]
                layers.append(kind(pool))
                side //= pool
        layers.append(nn.Flatten())
        if headed:
            width = channels[-1] * side**dims
            layers += [nn.Linear(width, 3, bias=False)]
        else:
            layers = [*layers[:-1], _conv(dims, channels[-1], draw(1, 3), draw(1, side)), layers[-1]]
        net = nn.Sequential(*layers).double()
        try:
            outputs = net(torch.zeros(1, channels[0], *[size] * dims).double()).shape[1]
        except RuntimeError:
            continue
        if 2 <= outputs <= 12:
            yield net, (channels[0], *[size] * dims)


def outer_norm(net: nn.Module, x: Tensor, loss: str) -> Tensor:
    """``‖H_O‖`` at one sample, differentiable in the weights and x."""
    parameters = list(net.parameters())
    z = net(x)[0]
    rows = []
    for value in z:
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, create_graph=True)]))
    jacobian = torch.stack(rows)
    gram = jacobian @ jacobian.T
    if loss == "cross_entropy":
        p = torch.softmax(z, 0).clamp(min=1e-300)
        factor = torch.diag(p.sqrt()) - torch.outer(p, p.sqrt())
        gram = factor.T @ gram @ factor
    return torch.linalg.eigvalsh(gram)[-1] if bool(torch.isfinite(gram).all()) else gram.sum() * math.nan


def ascend(net: nn.Module, x: Tensor, loss: str, steps: int, limits: list[float]) -> Tensor:
    """Adam on ``log ‖H_O‖`` over weights within ``±limit`` (one per parameter) and ``‖x‖ = 1``; changes ``net``."""
    x = x.clone().requires_grad_(True)
    parameters = list(net.parameters())
    optimizer = torch.optim.Adam([*parameters, x], lr=0.1)
    best, kept = -math.inf, [p.detach().clone() for p in [*parameters, x]]
    for _ in range(steps):
        norm = outer_norm(net, x, loss)
        if norm.item() > best:
            best, kept = norm.item(), [p.detach().clone() for p in [*parameters, x]]
        if not 0 < norm.item() < math.inf:
            break
        optimizer.zero_grad()
        (-norm.log()).backward()
        optimizer.step()
        with torch.no_grad():
            for p, limit in zip(parameters, limits, strict=True):
                p.clamp_(-limit, limit)
            x /= x.norm().clamp(min=1e-12)
    with torch.no_grad():
        for p, value in zip([*parameters, x], kept, strict=True):
            p.copy_(value)
    return x.detach()


@dataclass
class Findings:
    """The smallest logarithm of bound over truth by row, and how many were compared."""

    least: dict[str, float] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)

    def add(self, graph: dagh.Graph, loss: str, x: Tensor, y: Tensor) -> None:
        name, curvature = LOSSES[loss]
        found = report(graph, name, x, y, curvature=curvature)
        for row in found.present:
            if row.log_ratio is None or found[EXACT[row.part]].log_value == -math.inf:
                continue
            if row.part == "H_F" and row.log_value == -math.inf:
                continue
            self.count[row.id] = self.count.get(row.id, 0) + 1
            self.least[row.id] = min(self.least.get(row.id, math.inf), row.log_ratio)

    def violated(self) -> list[str]:
        """Rigorous rows that were found below the truth."""
        return [
            row for row, value in self.least.items()
            if STATEMENTS[row].origin != "printed" and value < math.log1p(-SLACK)
        ]  # fmt: skip


EXACT = {"H_O": "c", "H_F": "F_exact", "H": "H.exact"}


def search(nets: int, steps: int, seed: int = 0, progress: Callable[[int], None] | None = None) -> Findings:
    """Every bound on random chains: with random scales, then after ascent from random and from all-equal starts."""
    findings = Findings()
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    drawn = chains(generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index in range(nets):
            net, shape = next(drawn)
            loss = list(LOSSES)[index % 2]
            x = torch.randn(1, *shape, generator=generator).double()
            graph = dagh.trace(net, x)
            for equal in (False, True):
                scales = 10 ** (1.5 * torch.randn(len(list(net.parameters())), generator=generator).clamp(-2, 2) / 2)
                limits = []
                with torch.no_grad():
                    for p, scale in zip(net.parameters(), scales, strict=True):
                        limits.append(float(scale))
                        p.copy_(
                            torch.full_like(p, float(scale)) if equal else torch.empty_like(p).uniform_(-1, 1) * scale
                        )
                    x = torch.ones_like(x) if equal else torch.randn_like(x)
                    x /= x.norm()
                target = _target(net, x, loss)
                findings.add(graph, loss, x, target)
                x = ascend(net, x, loss, steps, limits)
                findings.add(graph, loss, x, _target(net, x, loss))
            if progress is not None:
                progress(index + 1)
    return findings


def _target(net: nn.Module, x: Tensor, loss: str) -> Tensor:
    with torch.no_grad():
        z = net(x)
    return torch.zeros(1, dtype=torch.long) if loss == "cross_entropy" else torch.zeros_like(z)


def main() -> int:
    """Run the search and print its findings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--nets", type=int, default=50)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    findings = search(arguments.nets, arguments.steps, arguments.seed)
    print("bound     compared  least bound/truth")
    for row, value in findings.least.items():
        mark = "  (not a bound)" if STATEMENTS[row].origin == "printed" and value < 0 else ""
        print(f"{row:9s} {findings.count[row]:8d}  {math.exp(value):.6g}{mark}")
    violated = findings.violated()
    print(f"violated: {', '.join(violated) or 'none'}")
    return bool(violated)


if __name__ == "__main__":
    sys.exit(main())
