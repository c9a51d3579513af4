"""Spectral quantities of an operator from its products alone: eigenpairs, spectral density, trace, Frobenius norm.

Whatever is estimated from random directions is returned as an :class:`Estimate` with its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor

from dagh._eigenpairs import Eigenpairs, eigsh
from dagh._estimates import Estimate, Symmetric, frobenius_norm, mean_of, random_signs, trace, whole
from dagh._lanczos import Recurrence, lanczos
from dagh.errors import ReductionError

__all__ = [
    "Eigenpairs", "Estimate", "SpectralDensity", "Symmetric", "eigsh", "frobenius_norm", "spectral_density", "trace"
]  # fmt: skip

_METHOD = "stochastic Lanczos quadrature"


@dataclass(frozen=True, repr=False)
class SpectralDensity:
    """Stochastic Lanczos quadrature: ``density`` and its standard ``error`` on ``grid``; it integrates to one.

    The error is that over probes; steps limit the resolution: eigenvalues that are closer than Lanczos tells them apart
    share nodes.

    ``nodes`` and ``weights`` (``[probes, steps]``) are the quadrature of each probe before smoothing with a Gaussian of
    width ``sigma``; where a probe's Krylov space was exhausted, a node is repeated with no weight. Functions of H
    follow from them: see :meth:`trace_of`.
    """

    grid: Tensor
    density: Tensor
    error: Tensor
    nodes: Tensor
    weights: Tensor
    sigma: float
    size: int
    recurrence: Recurrence

    def __repr__(self) -> str:
        low, high = float(self.nodes.min()), float(self.nodes.max())
        return f"SpectralDensity({low:.4g} to {high:.4g}, P={self.size}, {self.probes} probes, sigma={self.sigma:.2g})"

    @property
    def probes(self) -> int:
        """Random directions used."""
        return self.nodes.shape[0]

    def trace_of(self, f: Callable[[Tensor], Tensor]) -> Estimate:
        """Estimate of ``tr f(H)`` with its standard error over probes (the quadrature's own error is not in it)."""
        each = self.size * torch.where(self.weights > 0, self.weights * f(self.nodes), 0.0).sum(1)
        return mean_of(each, _METHOD, self.nodes.numel())

    def fraction_below(self, threshold: float = 0.0) -> Estimate:
        """Estimate of the share of eigenvalues below ``threshold``.

        For each probe the quadrature confines its share to an interval (Chebyshev, Markov and Stieltjes; Golub and
        Meurant, Matrices, Moments and Quadrature, chapter 6), wide where many eigenvalues lie near the threshold. The
        error is half of its width, beside the standard error over probes. More ``steps`` narrow it. Eigenvalues within
        rounding of the threshold (1e-10 of the norm in float64, 1e-5 in float32) may lie on either side: a kernel is
        not told from small negative eigenvalues at the threshold 0.

        Raises :class:`~dagh.errors.ReductionError` for a threshold that is no number.
        """
        if isinstance(threshold, bool) or not isinstance(threshold, Real) or math.isnan(threshold):
            raise ReductionError(f"threshold={threshold!r}: expected a number")
        low, high = self.recurrence.share_below(float(threshold), self.nodes, self.weights)
        found = mean_of((low + high) / 2, _METHOD, self.nodes.numel())
        return replace(found, error=found.error + float((high - low).mean()) / 2)


def spectral_density(
    op: Symmetric,
    *,
    probes: int = 8,
    steps: int = 60,
    points: int = 400,
    sigma: float | None = None,
    seed: int = 0,
) -> SpectralDensity:
    """Spectral density by stochastic Lanczos quadrature (Golub and Welsch, 1969; Ghorbani, Krishnan, Xiao, 2019).

    ``probes`` runs of ``steps`` Lanczos steps each, all runs at once, reorthogonalized fully in float64.
    ``sigma`` is the width of the Gaussians (default: 1 % of the spectrum's width). Each value is the mean over the
    points' share of the grid, so that the density integrates to one by the trapezoidal rule, however coarse the grid.
    """
    probes, steps = whole(probes, "probes", 2, ", so that there is an error to estimate"), whole(steps, "steps", 1)
    points = whole(points, "points", 2)
    if sigma is not None and (isinstance(sigma, bool) or not isinstance(sigma, Real) or not 0 < sigma < math.inf):
        raise ReductionError(f"sigma={sigma!r}: the width of the Gaussians is a positive number")
    p = op.shape[0]
    start = random_signs(op, probes, torch.Generator().manual_seed(seed)).double() / math.sqrt(p)
    nodes, weights, recurrence = lanczos(op, start, min(steps, p))
    low, high = float(nodes.min()), float(nodes.max())
    # All eigenvalues equal: a spike, as narrow as its place is known; of the zero matrix, 1 % of one wide.
    width = max(high - low, 1e-12 * max(abs(low), abs(high))) or 1.0
    sigma = 0.01 * width if sigma is None else float(sigma)
    room = max(5 * sigma, 64 * torch.finfo(torch.float64).eps * max(abs(low), abs(high)))
    grid = torch.linspace(low - room, high + room, points, dtype=torch.float64, device="cpu")
    edges = torch.cat([grid[:1], (grid[1:] + grid[:-1]) / 2, grid[-1:]])
    below = torch.special.ndtr((edges[:, None, None] - nodes) / sigma)
    shares = (below.diff(dim=0) * weights).sum(2)  # [points, probes]
    cells = edges.diff()
    error = shares.std(1) / math.sqrt(probes) / cells
    return SpectralDensity(grid, shares.mean(1) / cells, error, nodes, weights, sigma, p, recurrence)
