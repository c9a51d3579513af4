"""Lanczos runs from several vectors at once, and what they say of the measure behind them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Multiplies(Protocol):
    """What gives products ``[P, b]``."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def __matmul__(self, v: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Recurrence:
    """Diagonals ``[probes, steps]`` of the Jacobi matrices of Lanczos runs, and which runs were exhausted.

    Nodes within ``rounding`` of each other are not told apart.
    """

    alpha: Tensor
    beta: Tensor
    exhausted: Tensor
    rounding: float = 0.0

    def share_below(self, threshold: float, nodes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest weight ``[probes]`` below ``threshold`` of measures with the moments of each run.

        Those of the quadrature with a node at the threshold, without and with that node's own weight. Eigenvalues
        within rounding of the threshold may lie on either side of it.
        """
        least, _ = self._bounds(threshold - self.rounding, nodes, weights)
        _, most = self._bounds(threshold + self.rounding, nodes, weights)
        return least, most

    def _bounds(self, threshold: float, nodes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        counted = (weights * (nodes < threshold)).sum(1)
        low, high = counted.clone(), counted.clone()
        if math.isinf(threshold):
            return low, high
        steps, scale = self.alpha.shape[1], max(float(nodes.abs().max()), abs(threshold))
        for i in (~self.exhausted).nonzero().flatten().tolist():
            if steps == 1:
                low[i], high[i] = 0.0, 1.0
                continue
            matrix, last, at = _jacobi(self.alpha[i], self.beta[i]) / scale, self.beta[i, -2] / scale, threshold / scale
            inner = matrix[:-1, :-1] - at * torch.eye(steps - 1, dtype=matrix.dtype)
            # In the basis of eigenvectors, with no eigenvalue at the threshold itself.
            values, vectors = torch.linalg.eigh(inner)
            tiny = 1e-14 * float(matrix.abs().max())
            values = torch.where(values.abs() < tiny, tiny, values)
            matrix[-1, -1] = at + last**2 * (vectors[-1].square() / values).sum()
            found, parts = torch.linalg.eigh(matrix)
            shares, here = parts[0].square(), int((found - at).abs().argmin())
            low[i] = shares[:here].sum()
            high[i] = low[i] + shares[here]
        return low, high


def _jacobi(alpha: Tensor, beta: Tensor) -> Tensor:
    """Tridiagonal matrices with ``alpha`` on the diagonal and all of ``beta`` but the last beside it."""
    beside = beta[..., :-1]
    return torch.diag_embed(alpha) + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)


def lanczos(op: Multiplies, start: Tensor, steps: int) -> tuple[Tensor, Tensor, Recurrence]:
    """Gauss quadratures of every column of ``start`` (unit vectors ``[P, b]``): nodes and weights ``[b, steps]``.

    A run that is exhausted early has its first node again, with no weight, in the places left over.
    """
    p, b = start.shape
    basis = torch.zeros(b, steps, p, dtype=torch.float64, device=start.device)
    alpha, beta = (
        torch.zeros(b, steps, dtype=torch.float64, device="cpu"),
        torch.zeros(b, steps, dtype=torch.float64, device="cpu"),
    )
    v, alive = start.T.clone(), torch.ones(b, dtype=torch.bool, device="cpu")
    size, taken = torch.zeros(b, dtype=torch.float64, device="cpu"), torch.zeros(b, dtype=torch.long, device="cpu")
    spent, rounding = (1e-13, 1e-10) if op.dtype == torch.float64 else (1e-5, 1e-5)
    scale = 1.0
    for j in range(steps):
        basis[:, j] = v
        w = (op @ v.T.to(op.dtype)).double().T
        if j == 0:
            scale = power_of_two(w)
        w = w / scale
        alpha[:, j] = torch.where(alive, (w * v).sum(1).cpu(), 0.0)
        taken += alive
        for _ in range(2):  # twice is enough (Parlett)
            known = basis[:, : j + 1]
            w = w - (known.mT @ (known @ w.unsqueeze(2))).squeeze(2)
        norm = w.norm(dim=1).cpu()
        size = torch.maximum(size, alpha[:, j].abs() + norm)
        alive &= norm > spent * size
        if j + 1 == steps or not bool(alive.any()):
            break
        beta[:, j] = torch.where(alive, norm, 0.0)
        v = torch.where(alive.to(w.device)[:, None], w / norm.clamp(min=1e-300).to(w.device)[:, None], 0.0)
    nodes, weights = torch.zeros_like(alpha), torch.zeros_like(alpha)
    for m in sorted(set(taken.tolist())):
        some = taken == m
        found, vectors = torch.linalg.eigh(_jacobi(alpha[some, :m], beta[some, :m]))
        nodes[some] = torch.cat([found, found[:, :1].expand(-1, steps - m)], 1)
        weights[some, :m] = vectors[:, 0].square()
    rounding *= scale * float(nodes.abs().max())
    return scale * nodes, weights, Recurrence(scale * alpha, scale * beta, ~alive | (steps == p), rounding)


def power_of_two(x: Tensor) -> float:
    """The size of the largest number of ``x``, rounded so that dividing by it is exact; 1 for zeros."""
    largest = float(x.abs().max()) if x.numel() else 0.0
    return 2.0 ** math.floor(math.log2(largest)) if 0.0 < largest < math.inf else 1.0
