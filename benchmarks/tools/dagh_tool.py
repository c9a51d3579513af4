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


def plan_totals(plan: Any) -> dict[str, float | None]:
    """What a plan predicts for the whole batch: flops, bytes moved, seconds, peak bytes; ``None`` if it is silent."""
    found: dict[str, float | None] = {}
    for name in ("flops", "bytes", "seconds", "peak_memory"):
        value = getattr(plan, name, None)
        value = value() if callable(value) else value
        found[name] = float(value) if isinstance(value, int | float) else None
    return found


def exact_diagonal(graph: dagh.Graph, problem: Problem, options: dict[str, Any]) -> tuple[Tensor, Any]:
    """The diagonal of H and the plan of the work; the one place to change when there is a shorter way."""
    H = dagh.hessian(graph, LOSS, problem.x, problem.y, blocks="diagonal", **options)
    return H.diagonal(), H.plan


def _written(H: dagh.BlockMatrix, found: dict[str, Tensor], task: str) -> int:
    """Bytes of the results that are not held by the blocks themselves."""
    if task in ("hessian", "ggn"):
        return sum(t.numel() * t.element_size() for t in found.values())
    return sum(block.dense_nbytes for block in H.blocks.values() if block.structure != "dense")


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
                diagonal, plan = exact_diagonal(graph, problem, options)
                found = {"diagonal": diagonal}
            else:
                product = _products(graph, problem)
                found = {"products": torch.stack([product(v) for v in directions(problem)])}
            if plan is not None and "plan" not in row:
                row["plan"] = plan_totals(plan)
                if task != "diagonal":
                    row["plan"]["peak_memory"] = max(plan.peak_memory, plan.result_bytes + _written(H, found, task))
            return found

        return run

    return make


MAKERS = {"dagh": {task: _make(task) for task in ("hessian", "ggn", "blocks", "pair", "diagonal", "products")}}
