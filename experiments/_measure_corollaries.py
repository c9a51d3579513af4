"""What Corollaries 1 and 2 of the convolutional paper say about the differences that were measured."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

import dagh
from dagh.bounds import corollary_corrected, corollary_printed

from ._measure_hessian import bound_logs

Array = np.ndarray[Any, np.dtype[Any]]

#: Column: the form of the corollary, and the row that bounds ‖H_O‖ in it.
COROLLARIES = {
    "printed": (corollary_printed, "P0"),
    "corrected": (corollary_corrected, "P1"),
    "weights": (corollary_corrected, "a3"),
}


def corollaries(
    graph: dagh.Graph, loss: str, x: Tensor, y: Tensor, arrays: dict[str, Array]
) -> tuple[dict[str, Array], dict[str, str]]:
    """Arrays ``[K, R]`` of natural logarithms of bounds on |L_{k+1} − L_k|, and reasons for those that are absent.

    ``terms_log_printed`` is ``2W/(k+1) + 2R²B/(k+1)`` with B by the printed theorem (row P0), ``terms_log_corrected``
    ``W/(k+1) + R²B/(2(k+1))`` with B by the corrected one (P1), ``terms_log_weights`` the same with row a3. B bounds
    ‖H_O‖ of every one of these samples at θ*, W is the largest of their losses seen at θ* and on the lines
    (``terms_level``). None of them is a theorem: see section "Corollaries" of the documentation of the bounds.
    """
    found, absent = {}, {}
    ladder = bound_logs(graph, loss, x, y, [row for _, row in COROLLARIES.values()])
    at, radii = arrays["terms_k"].tolist(), arrays["terms_radius"].tolist()
    for name, (corollary, row) in COROLLARIES.items():
        log_bound = ladder[row]
        if isinstance(log_bound, str):
            absent[name] = f"{row}: {log_bound}"
            continue
        largest = arrays["terms_level"] * (arrays["terms_k"][:, None] + 1)
        found[f"terms_log_{name}"] = np.array(
            [[corollary(k, r, float(largest[i, j]), log_bound) for j, r in enumerate(radii)] for i, k in enumerate(at)]
        )
    return found, absent
