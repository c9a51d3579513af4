"""dagh, through its public functions alone, on a graph traced beforehand."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dagh
from benchmarks.problem import Problem, Spec, flat
from benchmarks.verify import directions

LOSS = "cross_entropy"


def plan_totals(plan: dagh.Plan) -> dict[str, float]:
    """What a plan predicts for the whole batch: flops, bytes moved, seconds, peak bytes."""
    return {name: float(getattr(plan, name)) for name in ("flops", "bytes", "seconds", "peak_memory")}


def _write_out(H: dagh.BlockMatrix, found: dict[str, Tensor], task: str) -> dict[str, float]:
    """Flops and bytes of forming the dense results from the blocks, which a plan leaves out, and the peak with them."""
    blocks = H.blocks.values()
    if task in ("hessian", "ggn"):
        written = sum(t.numel() * t.element_size() for t in found.values())
    else:
        written = sum(block.dense_nbytes for block in blocks if block.structure != "dense")
    totals = plan_totals(H.plan)
    return {
        "flops": totals["flops"] + 2 * sum(block.dense_flops() for block in blocks),
        "bytes": totals["bytes"] + written,
        "peak_memory": max(totals["peak_memory"], H.plan.result_bytes + written),
    }


def _products(graph: dagh.Graph, problem: Problem) -> Callable[[Tensor], Tensor]:
    if hasattr(dagh, "operator"):
        operator = dagh.operator(graph, LOSS, problem.x, problem.y)
        return lambda v: operator @ v
    state = graph.evaluate(LOSS, problem.x, problem.y)
    return lambda v: flat(state.hessian_product(problem.unflatten(v)).values())


def _make(task: str) -> Callable[[Problem, Spec, dict[str, Any]], Callable[[], dict[str, Tensor]]]:
    def make(problem: Problem, spec: Spec, row: dict[str, Any]) -> Callable[[], dict[str, Tensor]]:
        start = time.perf_counter()
        graph = dagh.trace(problem.model, problem.x)
        row["trace_seconds"] = time.perf_counter() - start
        options: dict[str, Any] = {} if spec.budget is None else {"memory_budget": spec.budget}
        args = graph, LOSS, problem.x, problem.y

        def run() -> dict[str, Tensor]:
            plan = None
            if task == "hessian" or task == "ggn":
                H = (dagh.hessian if task == "hessian" else dagh.gauss_newton)(*args, **options)
                found, plan = {"all": H.dense()}, H.plan
            elif task == "blocks":
                H = dagh.hessian(*args, blocks="diagonal", **options)
                found, plan = {name: H[name, name] for name in H}, H.plan
            elif task == "pair":
                a, b = (problem.names[i] for i in problem.pair)
                H = dagh.hessian(*args, blocks=[(a, b)], **options)
                found, plan = {"pair": H[a, b].T}, H.plan
            elif task == "diagonal":
                found = {"diagonal": flat(dagh.diagonal(*args, **options).values())}
                if "plan" not in row:
                    row["plan"] = plan_totals(dagh.plan(*args, blocks="entries", **options))
            else:
                product = _products(graph, problem)
                found = {"products": torch.stack([product(v) for v in directions(problem)])}
            if plan is not None and "plan" not in row:
                row["plan"] = plan_totals(plan) | _write_out(H, found, task)
            return found

        return run

    return make


MAKERS = {"dagh": {task: _make(task) for task in ("hessian", "ggn", "blocks", "pair", "diagonal", "products")}}
