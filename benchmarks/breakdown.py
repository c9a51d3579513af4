"""Where dagh's own time goes: each task under PyTorch's profiler, on one thread, by kind of operation.

Beside the share of the time stand the rate of the matrix products and of the convolutions, to be compared with the best
rate of a matrix product on one thread here. "Python and the rest" is time outside of
PyTorch's operations: the sweeps' own steps, which a batch of any size pays alike.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import GOALS, Goal
from benchmarks.problem import Problem, Spec
from benchmarks.tools.dagh_tool import MAKERS
from dagh._costs import product_rate

PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "linear", "addmv", "mv", "dot")
COPIES = ("copy_", "clone", "contiguous", "cat", "index", "gather", "index_select", "stack")
FRESH = ("fill_", "zero_", "empty", "empty_strided", "resize_", "zeros", "new_zeros", "set_")
KINDS = ("products", "convolutions", "element-wise", "copies", "fresh memory", "Python and the rest")


def kind_of(name: str) -> str:
    """The column in which an operation counts."""
    short = name.removeprefix("aten::")
    if "conv" in short:
        return "convolutions"
    for kind, names in (("products", PRODUCTS), ("copies", COPIES), ("fresh memory", FRESH)):
        if short in names:
            return kind
    return "element-wise" if name.startswith("aten::") else "Python and the rest"


def measure(goal: Goal) -> dict[str, Any]:
    """One row: milliseconds of a call, the share of each kind, GFLOP/s of products and convolutions."""
    problem = Problem(goal.case, goal.samples, torch.float32, task=goal.task)
    spec = Spec(goal.case, goal.task, goal.samples, "dagh", budget=goal.budget)
    call = MAKERS["dagh"][goal.task](problem, spec, {})
    call()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        if sum(times) > 10:
            break
    total = statistics.median(times)
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        call()
    spent = dict.fromkeys(KINDS, 0.0)
    for event in watched.key_averages():
        spent[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    inside = sum(v for k, v in spent.items() if k != KINDS[-1])
    # The profiler slows everything that is not an operation: that part is taken from the plain calls.
    shares = {k: v / max(total, inside) for k, v in spent.items()}
    shares[KINDS[-1]] = max(0.0, 1 - inside / max(total, inside))
    with FlopCounterMode(display=False) as counter:
        call()
    flops = dict.fromkeys(("products", "convolutions"), 0.0)
    for operation, count in counter.get_flop_counts()["Global"].items():
        flops[kind_of(f"aten::{str(operation).split('.')[-1]}")] += count
    rates = {k: f / spent[k] / 1e9 if spent[k] else 0.0 for k, f in flops.items()}
    return {"goal": goal, "seconds": total, "shares": shares, "rates": rates}


def table(rows: list[dict[str, Any]], best: float) -> str:
    """The rows in Markdown."""
    header = ["case", "task", "one thread", *KINDS[:1], "GFLOP/s", *KINDS[1:2], "GFLOP/s", *KINDS[2:]]
    lines = ["| " + " | ".join(header) + " |", "| --- | --- |" + " ---: |" * (len(header) - 2)]
    for row in rows:
        shares, goal = row["shares"], row["goal"]
        cells = [f"{goal.case}, N={goal.samples}", goal.task, f"{1e3 * row['seconds']:.0f} ms"]
        for kind in KINDS[:2]:
            cells += [f"{shares[kind]:.0%}", f"{row['rates'][kind]:.0f}" if shares[kind] > 0.005 else ""]
        cells += [f"{shares[k]:.0%}" for k in KINDS[2:]]
        lines.append("| " + " | ".join(cells) + " |")
    first = f"Best matrix product found on one thread: {best:.0f} GFLOP/s.\n\n"
    return first + "\n".join(lines) + "\n"


def run(largest: int = 10_000) -> str:
    """Every goal of dagh whose network has at most ``largest`` parameters."""
    torch.set_num_threads(1)
    best, rows = product_rate(torch.float32, "cpu", 1) / 1e9, []
    for goal in GOALS:
        if goal.task != "products" and Problem(goal.case, 1, torch.float32).size <= largest:
            rows.append(measure(goal))
    return table(rows, best)
