"""The point of least norm in the convex hull of finitely many vectors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Array = NDArray[np.float64]


def min_norm_weights(vectors: Array) -> Array:
    """Weights ``c ≥ 0``, ``Σ c = 1`` (``[n]``) that minimize ``‖vectorsᵀ c‖``; ``vectors`` is ``[n, p]``.

    Non-negative least squares ``[Vᵀ; 1ᵀ] c ≈ [0; 1]``, an active-set method: the value at the optimum along the ray of
    ``c`` is ``q/(1 + q)`` with ``q`` the squared norm of the normalized combination, so both problems have the same
    solution up to scale. No penalty parameter, exact up to rounding.
    """
    n = len(vectors)
    if n == 1:
        return np.ones(1)
    scale = float(np.linalg.norm(vectors, axis=1).max())
    if scale == 0:
        return np.full(n, 1 / n)
    # Only inner products matter: the triangular factor is as good as the vectors.
    factor = np.linalg.qr(vectors.T / scale, mode="r")
    system = np.vstack([factor, np.ones((1, n))])
    right = np.zeros(len(system))
    right[-1] = 1.0
    weights, _ = nnls(system, right)
    normalized: Array = weights / weights.sum()
    return normalized


def optimality_gap(vectors: Array, weights: Array) -> float:
    """``max_i (‖v‖² - ⟨v, v_i⟩)`` for ``v = vectorsᵀ weights``, relative to the largest ``‖v_i‖²``; 0 if optimal."""
    v = vectors.T @ weights
    size = float((vectors**2).sum(1).max())
    return 0.0 if size == 0 else max(0.0, float((v @ v - vectors @ v).max()) / size)
