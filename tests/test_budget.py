"""Memory budgets: kept, or refused before anything large is formed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import dagh
from dagh import _memory
from dagh.errors import MemoryBudgetError

LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")

MEASURE = """
import ctypes, gc, sys
import torch
from torch import nn
import dagh

def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024

torch.manual_seed(0)
torch.set_num_threads(1)
kind, share, samples = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
if kind == "conv":
    first, second = [nn.Conv2d(1, 8, 3), nn.ReLU()], [nn.Conv2d(8, 8, 3), nn.ReLU()]
    last = [nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 10)]
    model, x = nn.Sequential(*first, *second, *last), torch.randn(samples, 1, 28, 28)
else:
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    x = torch.randn(samples, 16, 8)
    model = nn.Sequential(*model, nn.Flatten(), nn.Linear(160, 10))
y = torch.randint(10, (samples,))
graph = dagh.trace(model, x)
form = dagh.gauss_newton if len(sys.argv) > 4 else dagh.hessian
part = "outer" if len(sys.argv) > 4 else "full"
whole = dagh.plan(graph, "cross_entropy", x, y, part=part)
budget = int(share * whole.peak_memory)
form(graph, "cross_entropy", x[:2], y[:2])  # the kernels' own buffers
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
form(graph, "cross_entropy", x, y, memory_budget=budget)
print(budget, status("VmHWM") - before)
"""


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [("conv", "0.5", "256"), ("conv", "0.9", "512", "outer"), ("mlp", "0.7", "2048")],
    ids=lambda a: "-".join(a),
)
def test_the_peak_stays_within_the_budget(arguments: tuple[str, ...]) -> None:
    """Resident memory, in a process of its own; a tenth above the budget is allowed."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    budget, peak = map(int, run.stdout.split())
    assert budget >= 64 * 2**20, "the example is too small to say anything"
    assert peak <= 1.1 * budget, f"{peak / budget:.2f} times the budget"


def test_a_budget_below_the_smallest_pieces_is_refused() -> None:
    """The values of the forward pass alone take more."""
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))
    x, y = torch.randn(400, 1, 64, 64), torch.randint(2, (400,))
    plan = dagh.plan(model, "cross_entropy", x, y, memory_budget="64MiB")
    assert plan.peak_memory > 2 * 64 * 2**20
    with pytest.raises(MemoryBudgetError, match="fewer samples at once") as caught:
        dagh.hessian(model, "cross_entropy", x, y, memory_budget="64MiB")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("blocks", ["all", "diagonal"])
def test_freed_memory_is_given_back_within_small_budgets(blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every piece of work, and only where the C library's own share would not fit."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))
    x, y = torch.randn(40, 1, 8, 8), torch.randint(3, (40,))
    graph, calls = dagh.trace(model, x), []
    monkeypatch.setattr(_memory, "_trim", lambda: calls.append)
    plenty = dagh.hessian(graph, "cross_entropy", x, y, blocks=blocks, memory_budget="2GiB")
    assert not calls
    little = dagh.hessian(graph, "cross_entropy", x, y, blocks=blocks, memory_budget="12MiB")
    assert len(calls) > len(little.plan.columns)
    for i, j in plenty.blocks:
        a, b = plenty.names[i], plenty.names[j]
        torch.testing.assert_close(little[a, b], plenty[a, b], rtol=1e-4, atol=1e-6)
