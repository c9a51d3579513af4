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


def _with_writing(plan: dagh.Plan) -> dict[str, float]:
    """What the plan predicts, with the dense results written out."""
    totals = plan_totals(plan)
    return {
        "flops": totals["flops"] + plan.dense_flops,
        "bytes": totals["bytes"] + plan.dense_bytes,
        "seconds": totals["seconds"] + plan.dense_seconds,
        "peak_memory": totals["peak_memory"] + plan.dense_bytes,
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
                row["plan"] = _with_writing(plan)
            return found

        return run

    return make


MAKERS = {"dagh": {task: _make(task) for task in ("hessian", "ggn", "blocks", "pair", "diagonal", "products")}}
