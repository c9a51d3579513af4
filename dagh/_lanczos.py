"""Lanczos runs from several vectors at once, and what they say of the measure behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dagh._spectra import Symmetric


@dataclass(frozen=True)
class Recurrence:
    """Diagonals ``[probes, steps]`` of the Jacobi matrices of Lanczos runs, and which runs were exhausted."""

    alpha: Tensor
    beta: Tensor
    exhausted: Tensor

    def share_below(self, threshold: float, nodes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest weight ``[probes]`` below ``threshold`` of measures with the moments of each run.

        Those of the quadrature with a node at the threshold, without and with that node's own weight.
        """
        counted = (weights * (nodes < threshold)).sum(1)
        low, high = counted.clone(), counted.clone()
        steps = self.alpha.shape[1]
        for i in (~self.exhausted).nonzero().flatten().tolist():
            if steps == 1:
                low[i], high[i] = 0.0, 1.0
                continue
            matrix, last = _jacobi(self.alpha[i], self.beta[i]), self.beta[i, -2]
            inner = matrix[:-1, :-1] - threshold * torch.eye(steps - 1, dtype=matrix.dtype)
            # In the basis of eigenvectors, with no eigenvalue at the threshold itself.
            values, vectors = torch.linalg.eigh(inner)
            tiny = 1e-14 * float(matrix.abs().max())
            values = torch.where(values.abs() < tiny, tiny, values)
            matrix[-1, -1] = threshold + last**2 * (vectors[-1].square() / values).sum()
            at, parts = torch.linalg.eigh(matrix)
            shares, here = parts[0].square(), int((at - threshold).abs().argmin())
            low[i] = shares[:here].sum()
            high[i] = low[i] + shares[here]
        return low, high


def _jacobi(alpha: Tensor, beta: Tensor) -> Tensor:
    """Tridiagonal matrices with ``alpha`` on the diagonal and all of ``beta`` but the last beside it."""
    beside = beta[..., :-1]
    return torch.diag_embed(alpha) + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)


def lanczos(op: Symmetric, start: Tensor, steps: int) -> tuple[Tensor, Tensor, Recurrence]:
    """Gauss quadratures of every column of ``start`` (unit vectors ``[P, b]``): nodes and weights ``[b, steps]``."""
    p, b = start.shape
    basis = torch.zeros(b, steps, p, dtype=torch.float64, device=start.device)
    alpha, beta = (
        torch.zeros(b, steps, dtype=torch.float64, device="cpu"),
        torch.zeros(b, steps, dtype=torch.float64, device="cpu"),
    )
    v, alive = start.T.clone(), torch.ones(b, dtype=torch.bool, device="cpu")
    size = torch.zeros(b, dtype=torch.float64, device="cpu")
    for j in range(steps):
        basis[:, j] = v
        w = (op @ v.T.to(op.dtype)).double().T
        alpha[:, j] = (w * v).sum(1).cpu()
        for _ in range(2):  # twice is enough (Parlett)
            known = basis[:, : j + 1]
            w = w - (known.mT @ (known @ w.unsqueeze(2))).squeeze(2)
        norm = w.norm(dim=1).cpu()
        size = torch.maximum(size, alpha[:, j].abs() + norm)
        alive &= norm > 1e-10 * size if op.dtype == torch.float64 else norm > 1e-5 * size
        if j + 1 == steps or not bool(alive.any()):
            break
        beta[:, j] = torch.where(alive, norm, 0.0)
        v = torch.where(alive.to(w.device)[:, None], w / norm.clamp(min=1e-300).to(w.device)[:, None], 0.0)
    nodes, vectors = torch.linalg.eigh(_jacobi(alpha, beta))
    return nodes, vectors[:, 0].square(), Recurrence(alpha, beta, ~alive | (steps == p))
