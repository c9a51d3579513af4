"""Linear systems with an operator, by products alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dagh._blocksolve import finite
from dagh._blocktables import unflatten
from dagh._estimates import whole
from dagh.errors import ConvergenceError, ReductionError

if TYPE_CHECKING:
    from dagh._operator import HessianOperator

_ITERATIONS = 1000


def solve(
    op: HessianOperator,
    v: Any,
    *,
    damping: float = 0.0,
    method: Literal["cg", "minres"] | None = None,
    tol: float | None = None,
    max_iterations: int | None = None,
) -> Any:
    """``(H + damping·I)⁻¹ v`` by products alone; ``v`` and the result as in ``op @ v``.

    scipy's conjugate gradients for H_O (positive semidefinite under convex losses), MINRES for the others, which are
    indefinite; ``method`` says otherwise. ``tol`` bounds the residual ``‖v - (H + damping·I) x‖`` relative to ``‖v‖``
    (default: 1e-6 in float64, 1e-3 in float32); it is computed with a product of its own. Columns are solved apart.

    Raises :class:`~dagh.errors.ConvergenceError` where it is not met within ``max_iterations`` (default: 1000), and
    :class:`~dagh.errors.ReductionError` for an unknown option.
    """
    if method not in (None, "cg", "minres"):
        raise ReductionError(f"method={method!r}: expected 'cg' or 'minres'")
    damping = finite(damping)
    tol = (1e-6 if op.dtype == torch.float64 else 1e-3) if tol is None else tol
    if max_iterations is not None:
        max_iterations = whole(max_iterations, "max_iterations", 1)
    chosen = method or ("cg" if op.part == "outer" else "minres")
    if isinstance(v, Mapping):
        found = solve(op, op.flatten(v), damping=damping, method=chosen, tol=tol, max_iterations=max_iterations)
        return unflatten(found, op.shapes)
    op.check_direction(v)
    columns = v.detach().cpu().numpy() if isinstance(v, Tensor) else np.asarray(v)
    found = [_one(op, c, damping, chosen, tol, max_iterations or _ITERATIONS) for c in columns.reshape(len(v), -1).T]
    x = np.stack(found, 1).reshape(columns.shape) if found else np.zeros_like(columns)
    return torch.from_numpy(x).to(device=op.device, dtype=op.dtype) if isinstance(v, Tensor) else x


def _one(
    op: HessianOperator, b: NDArray[Any], damping: float, method: str, tol: float, iterations: int
) -> NDArray[Any]:
    from scipy.sparse.linalg import LinearOperator, cg, minres

    base = op.to_scipy()

    def product(x: NDArray[Any]) -> NDArray[Any]:
        """In float64 whatever the products are in: the recurrences lose less."""
        x = x.reshape(-1)
        return np.asarray(base.matvec(x.astype(base.dtype)).reshape(-1) + damping * x, dtype=np.float64)

    matrix = LinearOperator(base.shape, matvec=product, dtype=np.dtype(np.float64))
    b = b.astype(np.float64)
    size = float(np.linalg.norm(b))
    if not size:
        return b
    x = np.zeros_like(b)
    # MINRES stops by a residual relative to ‖H‖‖x‖, which is far larger where H is near singular: it is asked again.
    for _ in range(1 if method == "cg" else 4):
        left = b - product(x)
        if np.linalg.norm(left) <= tol * size:
            return x
        step, _ = (cg if method == "cg" else minres)(matrix, left, rtol=tol / 3, maxiter=iterations)
        x = x + step
    residual = float(np.linalg.norm(b - product(x))) / size
    if not residual <= tol:
        raise ConvergenceError(
            f"the residual is {residual:.1e} of the right-hand side after {iterations} iterations, not {tol:.0e}: "
            "raise damping, tol or max_iterations"
        )
    return x
