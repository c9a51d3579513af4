"""curvlinops: its linear operators, times the identity in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator
from torch import Tensor, nn

from benchmarks.columns import Columns, Strip
from benchmarks.problem import Problem, Spec
from benchmarks.verify import directions


def _operator(problem: Problem, kind: Any) -> Any:
    return kind(
        problem.model,
        nn.CrossEntropyLoss(),
        problem.params,
        [(problem.x, problem.y)],
        check_deterministic=False,
        num_data=problem.samples,
    )


def _columns(kind: Any) -> Any:
    def make(problem: Problem, spec: Spec, row: dict[str, Any]) -> Columns:
        operator = _operator(problem, kind)
        strip = Strip("all", problem.size, problem.size, lambda chunk: lambda e: (operator @ e.T.contiguous()).T)
        return Columns(problem, [strip])

    return make


def _products(problem: Problem, spec: Spec, row: dict[str, Any]) -> Callable[[], dict[str, Tensor]]:
    operator = _operator(problem, HessianLinearOperator)
    return lambda: {"products": torch.stack([operator @ v for v in directions(problem)])}


MAKERS: dict[str, dict[str, Any]] = {
    "curvlinops": {
        "hessian": _columns(HessianLinearOperator),
        "ggn": _columns(GGNLinearOperator),
        "products": _products,
    }
}
