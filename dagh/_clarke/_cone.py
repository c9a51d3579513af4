"""Open polyhedral cones ``{d : A d > 0}``: whether they are empty, a point inside, the angle they fill."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse.csgraph import connected_components

Array = NDArray[np.float64]

#: Cones thinner than this (smallest cosine to a facet's normal) count as empty.
_THIN = 1e-9


def unit_rows(rows: Array) -> Array:
    """Rows of length one (rows of zeros stay)."""
    size = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(size > 0, size, 1.0)


def interior(rows: Array) -> Array | None:
    """A unit vector ``d`` with ``rows @ d > 0``, or ``None`` when there is none.

    Linear programming (HiGHS) for ``rows @ d ≥ 1`` in the space that the rows span, the answer checked afterwards.
    By Gordan's theorem there is none exactly when a convex combination of the rows is 0.
    """
    a = unit_rows(rows)
    if len(a) == 1:
        only: Array = a[0]
        return only
    # d = aᵀ y loses nothing; an orthonormal basis of the row space keeps the program small.
    _, s, vt = np.linalg.svd(a, full_matrices=False)
    basis = vt[s > 1e-12 * s[0]]
    small = a @ basis.T
    k = small.shape[1]
    # min Σ|c| keeps the answer near the middle of the cone rather than at a far corner.
    cost = np.ones(2 * k)
    found = linprog(cost, A_ub=-np.hstack([small, -small]), b_ub=-np.ones(len(a)), bounds=(0, None), method="highs")
    if found.status != 0 or found.x is None:
        return None
    d = (found.x[:k] - found.x[k:]) @ basis
    d = d / np.linalg.norm(d)
    return d if float((a @ d).min()) > _THIN else None


def solid_angle(rows: Array) -> float | None:
    """The share of all directions in a non-empty cone; ``None`` where no closed form applies.

    Closed forms: planar cones, and products of them in orthogonal subspaces.
    """
    if len(rows) == 0:
        return 1.0
    a = unit_rows(rows)
    gram = a @ a.T
    count, label = connected_components(np.abs(gram) > 1e-12, directed=False)
    shares = [_planar(a[label == k]) for k in range(count)]
    known = [s for s in shares if s is not None]
    return float(np.prod(known)) if len(known) == count else None


def _planar(a: Array) -> float | None:
    _, s, vt = np.linalg.svd(a, full_matrices=False)
    rank = int((s > 1e-10 * s[0]).sum())
    if rank == 1:
        return 0.5
    if rank > 2:
        return None
    plane = a @ vt[:2].T
    middle = plane.sum(0)
    angle = np.arctan2(plane[:, 1], plane[:, 0]) - math.atan2(float(middle[1]), float(middle[0]))
    turn = (angle + math.pi) % (2 * math.pi) - math.pi
    # The cone is the dual of the one its normals span: a half turn less their spread.
    return float(max(0.0, math.pi - (turn.max() - turn.min())) / (2 * math.pi))
