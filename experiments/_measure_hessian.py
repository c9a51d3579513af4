"""Norms, extreme eigenvalues and traces of the Hessian and of its two parts, and the ladder of bounds on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import dagh
from dagh.bounds import report as bound_report
from dagh.bounds._logs import top_eigenvalue
from dagh.errors import DaghError, first_line

#: Tolerance of eigenvalues, relative to ‖H‖.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
#: Products spent on the trace of H_F.
_TRACE_PRODUCTS = 24
#: Distance within which an element counts as near a kink.
_NEAR = 1e-3
#: What makes a bound absent. Failures of LAPACK and of memory are RuntimeErrors.
_FAILURES = (DaghError, RuntimeError, MemoryError)
#: Rows of the ladder, in order of how much they need to know.
LADDER = ("P0", "P1", "a1", "a2", "a3", "b0", "b1", "b2", "b3", "c", "F_a", "F_b", "H.a3", "H.b2", "H.c")


def hessian_scalars(graph: dagh.Graph, loss: str, x: Tensor, y: Tensor, seed: int) -> dict[str, Any]:
    """Spectral quantities of the Hessian of the mean loss on these samples.

    ``outer_max`` is λ_max(H_O) = ‖H_O‖, exact from the dual, as are ``outer_trace`` and ``outer_fro``; ``outer_rank``
    counts the eigenvalues that its type tells from zero (:meth:`dagh.Gram.rank`). ``sample_outer_max`` and
    ``sample_outer_mean`` are those of ‖H_O‖ of single samples. ``max`` and ``min`` are the extreme eigenvalues of H,
    ``norm`` the larger of their magnitudes, ``functional_norm`` is ‖H_F‖ (Lanczos, residual below 1e-4 of the norm in
    float32). ``trace`` is tr H, exact where the diagonal blocks of H_F vanish, and else tr H_O plus an estimate of
    tr H_F, with ``trace_error`` its standard error. What did not converge is ``None``, and ``notes`` say why.
    """
    gram = dagh.gram(graph, loss, x, y)
    found: dict[str, Any] = {"samples": len(x), "parameters": gram.size, "notes": []}
    found |= {
        "outer_max": gram.lambda_max(), "outer_trace": gram.trace(), "outer_fro": gram.fro(), "outer_rank": gram.rank(),
    }  # fmt: skip
    found |= _by_sample(gram, len(x))
    full = dagh.operator(graph, loss, x, y)
    functional = dagh.operator(graph, loss, x, y, part="functional")
    found["loss"], found["gradient_norm"] = full.loss, float(full.gradient.norm())
    found["max"] = _eigenvalue(full, "LA", seed, found["notes"])
    found["min"] = _eigenvalue(full, "SA", seed, found["notes"])
    ends = [abs(v) for v in (found["max"], found["min"]) if v is not None]
    found["norm"] = max(ends) if len(ends) == 2 else None
    value = _eigenvalue(functional, "LM", seed, found["notes"])
    found["functional_norm"] = None if value is None else abs(value)
    found |= _trace(graph, loss, x, y, functional, gram.trace(), seed)
    return found


def _trace(
    graph: dagh.Graph, loss: str, x: Tensor, y: Tensor, functional: dagh.HessianOperator, outer: float, seed: int
) -> dict[str, float]:
    """Tr H, exact where no parameter bends its own block of H_F (piecewise linear nets without shared weights)."""
    kinds = dagh.plan(graph, loss, x[:2], y[:2], blocks="diagonal", memory_budget="1024TiB").kinds
    if not any("H_F" in kind for kind in kinds.values()):
        return {"trace": outer, "trace_error": 0.0}
    rest = functional.trace(products=_TRACE_PRODUCTS, seed=seed)
    return {"trace": outer + rest.value, "trace_error": rest.error}


def _by_sample(gram: dagh.Gram, n: int) -> dict[str, float]:
    """‖H_O‖ of every sample alone, from the blocks on the diagonal of the dual of the mean."""
    if gram.signs is not None or gram.side % n:
        return {}
    r = gram.side // n
    blocks = n * torch.stack([gram.matrix[i : i + r, i : i + r] for i in range(0, n * r, r)])
    norms = top_eigenvalue(blocks).clamp(min=0)
    return {"sample_outer_max": float(norms.max()), "sample_outer_mean": float(norms.mean())}


def _eigenvalue(op: dagh.HessianOperator, which: Any, seed: int, notes: list[str]) -> float | None:
    # A random direction: ones, say, are in the null space of the last bias under cross-entropy, whatever the net.
    start = torch.randn(op.shape[0], generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
    if not bool(torch.count_nonzero(op @ start.to(op.device, op.dtype))):
        return 0.0  # a linear model: nothing bends, and Lanczos has nothing to start from
    try:
        return float(op.eigsh(1, which, tol=_TOLERANCE[op.dtype], seed=seed).values[0])
    except DaghError as error:
        notes.append(f"{which} of {op.part}: {error}")
        return None


def bound_scalars(graph: dagh.Graph, loss: str, x: Tensor, y: Tensor) -> dict[str, Any]:
    """``{row: {"log": natural logarithm}}`` of the ladder, ``{"reason": why}`` where a bound does not apply."""
    found = bound_logs(graph, loss, x, y, LADDER)
    return {row: {"reason": value} if isinstance(value, str) else {"log": value} for row, value in found.items()}


def bound_logs(graph: dagh.Graph, loss: str, x: Tensor, y: Tensor, rows: Sequence[str]) -> dict[str, float | str]:
    """The natural logarithm of every row, or why there is none.

    A row that fails (a solver that does not converge, say) is absent for that reason: it must not cost a run the rows
    beside it, let alone its other measurements.
    """
    try:
        found = bound_report(graph, loss, x, y, rows=rows)
    except _FAILURES as error:
        if len(rows) == 1:
            return {rows[0]: f"it could not be computed: {first_line(error)}"}
        return {row: value for one in rows for row, value in bound_logs(graph, loss, x, y, [one]).items()}
    return {row.id: row.reason or "absent" if row.log_value is None else row.log_value for row in found.rows}


def kink_scalars(graph: dagh.Graph, loss: str, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Elements of piecewise operations on a kink, near one, and the smallest distance to one."""
    table = graph.evaluate(loss, x, y).kinks(_NEAR)
    elements = sum(row.elements for row in table)
    near = sum(row.near for row in table)
    return {
        "elements": elements, "exact": table.ties, "near": near, "near_share": near / elements if elements else 0.0,
        "within": _NEAR, "margin": table.margin,
    }  # fmt: skip
