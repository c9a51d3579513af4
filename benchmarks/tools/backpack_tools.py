"""BackPACK: the exact diagonal of H, and the square root of the Gauss–Newton matrix. Chains of its own modules only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from backpack import backpack, extend
from backpack.extensions import DiagHessian, SqrtGGNExact
from torch import Tensor, nn

from benchmarks.cases import CLASSES
from benchmarks.problem import Problem, Spec, flat
from benchmarks.tools import NotAvailableError


def _make(extension: Any, field: str, finish: Callable[[Problem, list[Tensor]], dict[str, Tensor]]) -> Any:
    def make(problem: Problem, spec: Spec, row: dict[str, Any]) -> Callable[[], dict[str, Tensor]]:
        model, loss = extend(problem.model), extend(nn.CrossEntropyLoss())

        def run() -> dict[str, Tensor]:
            model.zero_grad()
            try:
                with backpack(extension()):
                    loss(model(problem.x), problem.y).backward()
            except NotImplementedError as missing:
                raise NotAvailableError(f"not implemented there: {' '.join(str(missing).split())[:160]}") from missing
            if not all(hasattr(p, field) for p in problem.params):
                raise NotAvailableError(f"sets no {field} on some parameters of this network")
            return finish(problem, [getattr(p, field).detach() for p in problem.params])

        return run

    return make


def _gram(problem: Problem, roots: list[Tensor]) -> dict[str, Tensor]:
    V = torch.cat([r.reshape(CLASSES * problem.samples, -1) for r in roots], 1)
    return {"all": V.T @ V}


MAKERS: dict[str, dict[str, Any]] = {
    "backpack": {
        "ggn": _make(SqrtGGNExact, "sqrt_ggn_exact", _gram),
        "diagonal": _make(DiagHessian, "diag_h", lambda problem, found: {"diagonal": flat(found)}),
    }
}
