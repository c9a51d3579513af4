"""nngeometry: the Fisher matrix of a classifier, which is H_O under cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nngeometry.metrics import FIM
from nngeometry.object import PMatDense
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.problem import Problem, Spec


def _fisher(problem: Problem, spec: Spec, row: dict[str, Any]) -> Callable[[], dict[str, Tensor]]:
    loader = DataLoader(TensorDataset(problem.x, problem.y), batch_size=problem.samples)
    return lambda: {"all": FIM(problem.model, loader, PMatDense, variant="classif_logits").to_torch()}


MAKERS: dict[str, dict[str, Any]] = {"nngeometry": {"ggn": _fisher}}
