"""Repeated Hessian products against the fastest eager alternative: a double-backward graph that is kept.

Both run in this process, in turn, on the same threads; before anything is timed their products are compared.

    python benchmarks/repeated_products.py                     # all cases, 50 products each
    OMP_NUM_THREADS=2 python benchmarks/repeated_products.py lenet --rounds 20 --json results.json
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import dagh

F = nn.functional


class Attention(nn.Module):
    """One post-norm encoder block with softmax attention."""

    def __init__(self, width: int = 16, heads: int = 2, hidden: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down, self.head = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = torch.softmax(q @ k.mT / (d // self.heads) ** 0.5, -1) @ v
        x = self.norm1(x + self.out(mixed.transpose(1, 2).reshape(n, t, d)))
        return self.head(self.norm2(x + self.down(F.gelu(self.up(x)))).mean(1))


class Residual(nn.Module):
    """Two residual blocks with Batch-Norm in evaluation mode."""

    def __init__(self, c: int = 8) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.convs = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for _ in range(4))
        self.head = nn.Linear(c, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        for i in (0, 2):
            y = F.relu(self.norms[i](self.convs[i](x)))
            x = F.relu(x + self.norms[i + 1](self.convs[i + 1](y)))
        return self.head(x.mean((2, 3)))


def lenet(act: type[nn.Module], channels: tuple[int, int], kernel: int) -> nn.Module:
    a, b = channels
    size = ((28 - kernel + 1) // 2 - kernel + 1) // 2
    return nn.Sequential(
        nn.Conv2d(1, a, kernel), act(), nn.AvgPool2d(2), nn.Conv2d(a, b, kernel), act(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(b * size * size, 120), act(), nn.Linear(120, 84), act(), nn.Linear(84, 10),
    )  # fmt: skip


def digits() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 10)
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


#: name: model, shape of one sample, number of samples
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "lenet": (lambda: lenet(nn.Tanh, (6, 16), 5), (1, 28, 28), 256),
    "lenet_variant": (lambda: lenet(nn.GELU, (9, 20), 3), (1, 28, 28), 256),
    "attention": (Attention, (8, 16), 256),
    "residual": (Residual, (3, 16, 16), 32),
    "digits": (digits, (1, 8, 8), 256),
    "mlp": (mlp, (64,), 256),
}


def double_backward(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Products from a first-order graph that is built once and kept."""
    params = list(model.parameters())
    sizes = [p.numel() for p in params]
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), params, create_graph=True)

    def product(v: Tensor) -> Tensor:
        parts = [t.view_as(p) for t, p in zip(v.split(sizes), params, strict=True)]
        found = torch.autograd.grad(grads, params, parts, retain_graph=True)
        return torch.cat([t.reshape(-1) for t in found])

    return product


def in_turn(functions: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of every call, the functions taking turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            started = clock()
            function()
            times[name].append(clock() - started)
    return times


def measure(name: str, products: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Time ``products`` products of one case, ``rounds`` times over. Raises ``SystemExit`` where they disagree."""
    make, shape, n = CASES[name]
    torch.manual_seed(0)
    model, x, y = make().eval(), torch.randn(n, *shape), torch.randint(10, (n,))
    started = time.perf_counter()
    graph = dagh.trace(model, x)
    traced = time.perf_counter()
    op = dagh.operator(graph, "cross_entropy", x, y)
    linearized = time.perf_counter()
    peer = double_backward(model, x, y)
    v = torch.randn(op.shape[0])
    exact = dagh.operator(copy.deepcopy(model).double(), "cross_entropy", x.double(), y) @ v.double()
    errors = {"dagh": float((op @ v - exact).norm() / exact.norm())}
    errors["peer"] = float((peer(v) - exact).norm() / exact.norm())
    if max(errors.values()) > 1e-4:
        raise SystemExit(f"{name}: products disagree with float64: {errors}")

    def repeat(function: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(products):
                function(v)

        return run

    functions = {"peer": repeat(peer), "dagh": repeat(op.matvec)}
    in_turn(functions, 1, clock)
    times = in_turn(functions, rounds, clock)
    each = {k: {"min": min(t) / products, "median": statistics.median(t) / products} for k, t in times.items()}
    ratio = {k: each["peer"][k] / each["dagh"][k] for k in ("min", "median")}
    seconds = {"trace": traced - started, "linearize": linearized - traced}
    return {"case": name, "P": op.shape[0], "N": n, "seconds": each, "ratio": ratio, "errors": errors, "setup": seconds}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument("--products", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--cpu-time", action="store_true", help="processor time instead of wall time (a busy machine)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.cases) - CASES.keys())
    if unknown:
        parser.error(f"unknown case {unknown[0]!r}; known: {', '.join(CASES)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    results = [measure(name, options.products, options.rounds, clock) for name in options.cases or CASES]
    kind = "processor" if options.cpu_time else "wall"
    table = Table(
        title=f"ms per product ({kind} time, median of {options.rounds} × {options.products})", title_justify="left"
    )
    for column in ("case", "P", "N", "double backward", "dagh", "ratio", "error"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for r in results:
        ours, theirs = (f"{1e3 * r['seconds'][k]['median']:.2f}" for k in ("dagh", "peer"))
        ratio, error = f"{r['ratio']['median']:.2f}×", f"{r['errors']['dagh']:.0e}"
        table.add_row(r["case"], f"{r['P']:,}", str(r["N"]), theirs, ours, ratio, error)
    console = Console()
    console.print(table)
    environment = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    console.print(
        f"torch {environment['torch']}, {environment['threads']} threads, {sys.platform} {platform.machine()}"
    )
    if options.json:
        options.json.write_text(json.dumps({"environment": environment, "clock": kind, "results": results}, indent=1))


if __name__ == "__main__":
    main()
