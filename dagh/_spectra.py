"""Spectral quantities of an operator from its products alone: eigenpairs, spectral density, trace, Frobenius norm.

Whatever is estimated from random directions is returned as an :class:`Estimate` with its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dagh._lanczos import Recurrence, lanczos
from dagh.errors import ConvergenceError, ReductionError

#: Restarts of ARPACK, and iterations of LOBPCG, unless told otherwise.
_RESTARTS, _ITERATIONS = 200, 500


class Symmetric(Protocol):
    """What is needed of an operator."""

    shape: tuple[int, int]

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def __matmul__(self, v: Tensor, /) -> Tensor: ...
    def to_scipy(self) -> Any: ...


@dataclass(frozen=True)
class Estimate:
    """A number estimated from random directions: ``value``, its standard ``error``, and the products used."""

    value: float
    error: float
    method: str
    products: int

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.6g} ± {self.error:.2g} ({self.method}, {self.products} products)"


@dataclass(frozen=True, repr=False)
class Eigenpairs:
    """Eigenvalues ``[k]`` in ascending order, eigenvectors ``[P, k]``, and ``‖H v - λ v‖`` for each, ``[k]``."""

    values: Tensor
    vectors: Tensor
    residuals: Tensor

    def __repr__(self) -> str:
        shown = ", ".join(f"{float(v):.6g}" for v in self.values[-5:].flip(0))
        more = ", …" if len(self.values) > 5 else ""
        return f"Eigenpairs({shown}{more}; {len(self.values)} of P={self.vectors.shape[0]})"


@dataclass(frozen=True, repr=False)
class SpectralDensity:
    """Stochastic Lanczos quadrature: ``density`` and its standard ``error`` on ``grid``; it integrates to one.

    The error is that over probes; steps limit the resolution: eigenvalues that are closer than Lanczos tells them apart
    share nodes.

    ``nodes`` and ``weights`` (``[probes, steps]``) are the quadrature of each probe before smoothing with a Gaussian of
    width ``sigma``; where a probe's Krylov space was exhausted, the weights left over are zero. Functions of H follow
    from them: see :meth:`trace_of`.
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
        each = self.size * (self.weights * f(self.nodes)).sum(1)
        return _mean(each, "stochastic Lanczos quadrature", self.nodes.numel())

    def fraction_below(self, threshold: float = 0.0) -> Estimate:
        """Estimate of the share of eigenvalues below ``threshold``.

        For each probe the quadrature confines its share to an interval (Chebyshev, Markov and Stieltjes; Golub and
        Meurant, Matrices, Moments and Quadrature, chapter 6), wide where many eigenvalues lie near the threshold. The
        error is half of its width, beside the standard error over probes. More ``steps`` narrow it.
        """
        low, high = self.recurrence.share_below(threshold, self.nodes, self.weights)
        found = _mean((low + high) / 2, "stochastic Lanczos quadrature", self.nodes.numel())
        return replace(found, error=found.error + float((high - low).mean()) / 2)


def eigsh(
    op: Symmetric,
    k: int = 1,
    which: Literal["LA", "SA", "LM"] = "LA",
    *,
    method: Literal["arpack", "lobpcg"] = "arpack",
    tol: float | None = None,
    max_iterations: int | None = None,
    seed: int = 0,
) -> Eigenpairs:
    """The ``k`` largest (``"LA"``), smallest (``"SA"``) or largest in magnitude (``"LM"``) eigenpairs.

    ARPACK's implicitly restarted Lanczos method, or LOBPCG (``"LA"`` and ``"SA"`` alone; k products at a time), as in
    scipy. ``tol`` bounds every residual ``‖H v - λ v‖`` relative to ``‖H‖``, which is estimated in twelve Lanczos steps
    (default: 1e-8 in float64, 1e-4 in float32); residuals are computed with products of their own. As with every Krylov
    method, copies of a multiple eigenvalue can be missed (H_O has as many zeros as it lacks rank).

    Raises :class:`~dagh.errors.ConvergenceError` where it is not met, :class:`~dagh.errors.ReductionError` for a bad
    ``k``, ``which`` or ``method``.
    """
    p = op.shape[0]
    if which not in ("LA", "SA", "LM") or method not in ("arpack", "lobpcg") or (method, which) == ("lobpcg", "LM"):
        raise ReductionError(f"which={which!r}, method={method!r}: expected 'LA', 'SA' or (arpack) 'LM'")
    if not isinstance(k, int) or not 1 <= k <= p:
        raise ReductionError(f"k={k!r}: expected 1 to {p} eigenvalues")
    tol = (1e-8 if op.dtype == torch.float64 else 1e-4) if tol is None else tol
    norm = _norm(op, seed)
    if p <= max(3 * k + 20, 50):
        values, vectors = _dense(op, k, which)
    elif method == "arpack":
        values, vectors = _arpack(op, k, which, tol, max_iterations, seed, norm)
    else:
        values, vectors = _lobpcg(op, k, which, tol * norm, max_iterations, seed)
    order = np.argsort(values)
    lam = torch.from_numpy(np.ascontiguousarray(values[order])).to(device=op.device, dtype=op.dtype)
    v = torch.from_numpy(np.ascontiguousarray(vectors[:, order])).to(device=op.device, dtype=op.dtype)
    residuals = (op @ v - v * lam).norm(dim=0)
    worst, scale = float(residuals.max()), max(float(lam.abs().max()), norm)
    if not worst <= tol * scale:
        raise ConvergenceError(
            f"the largest residual is {worst:.1e} in a spectrum up to {scale:.1e}, above tol={tol:.0e}; "
            "raise max_iterations or tol"
        )
    return Eigenpairs(lam, v, residuals)


def _norm(op: Symmetric, seed: int) -> float:
    """A close lower bound on ``‖H‖`` by a few Lanczos steps."""
    start = torch.randn(
        op.shape[0], 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu"
    )
    nodes, _, _ = lanczos(op, (start / start.norm()).to(op.device), min(12, op.shape[0]))
    return max(float(nodes.abs().max()), torch.finfo(op.dtype).tiny)


def _dense(op: Symmetric, k: int, which: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """All eigenpairs of a small matrix, formed product by product."""
    matrix = op @ torch.eye(op.shape[0], dtype=op.dtype, device=op.device)
    values, vectors = (x.cpu().numpy() for x in torch.linalg.eigh((matrix + matrix.T) / 2))
    keep = {"LA": slice(-k, None), "SA": slice(None, k), "LM": np.argsort(-np.abs(values))[:k]}[which]
    return values[keep], vectors[:, keep]


def _arpack(
    op: Symmetric, k: int, which: str, tol: float, iterations: int | None, seed: int, norm: float
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Largest or smallest by magnitude as they are; at one end of the spectrum after a shift to where it is large.

    ARPACK measures convergence relative to each eigenvalue, and the smallest ones of a semidefinite matrix are zero.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator
    from scipy.sparse.linalg import eigsh as solve

    base = op.to_scipy()
    start = np.random.default_rng(seed).standard_normal(op.shape[0])
    shift, sign = (0.0, 1.0) if which == "LM" else (norm, 1.0 if which == "LA" else -1.0)

    def moved(v: NDArray[Any]) -> NDArray[Any]:
        """In float64 whatever the products are in: the recurrences lose less."""
        product = base.matvec(v.reshape(-1).astype(base.dtype)).reshape(-1)
        return np.asarray(shift * v.reshape(-1) + sign * product, dtype=np.float64)

    matrix = LinearOperator(base.shape, matvec=moved, dtype=np.dtype(np.float64))
    try:
        values, vectors = solve(
            matrix,
            k,
            which="LM" if which == "LM" else "LA",
            tol=tol / 10,
            maxiter=iterations or _RESTARTS,
            v0=start,
            ncv=min(op.shape[0], 2 * k + 20),
        )
    except ArpackNoConvergence as error:
        raise ConvergenceError(
            f"{len(error.eigenvalues)} of {k} eigenvalues converged within the iterations allowed; "
            "raise max_iterations or tol, or ask for fewer"
        ) from None
    return sign * (np.asarray(values) - shift), np.asarray(vectors)


def _lobpcg(
    op: Symmetric, k: int, which: str, tol: float, iterations: int | None, seed: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    import warnings

    from scipy.sparse.linalg import lobpcg

    start = np.random.default_rng(seed).standard_normal((op.shape[0], k))
    start = start.astype(np.float64 if op.dtype == torch.float64 else np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the residuals are checked by the caller
        values, vectors = lobpcg(
            op.to_scipy(), start, largest=which == "LA", tol=tol / 10, maxiter=iterations or _ITERATIONS
        )
    return np.asarray(values), np.asarray(vectors)


def trace(
    op: Symmetric,
    method: Literal["hutch++", "xtrace", "hutchinson"] = "xtrace",
    *,
    products: int = 60,
    seed: int = 0,
) -> Estimate:
    """Estimate of the trace from ``products`` products, with its standard error.

    ``"hutchinson"``: the mean of ``zᵀ H z`` over random signs z. ``"hutch++"`` (Meyer, Musco, Musco, Woodruff, 2021):
    exact on a third of the products' range, Hutchinson on what is left. ``"xtrace"`` (Epperly, Tropp, Webber, 2024):
    the same with every direction in both roles in turn. Where ``products`` reach P, the trace is exact and the error 0.
    """
    p = op.shape[0]
    if method not in ("hutch++", "xtrace", "hutchinson"):
        raise ReductionError(f"method={method!r}: expected 'hutch++', 'xtrace' or 'hutchinson'")
    if products < 6:
        raise ReductionError(f"products={products}: give at least 6, so that there is an error to estimate")
    if products >= p:
        matrix = op @ torch.eye(p, dtype=op.dtype, device=op.device)
        return Estimate(float(matrix.diagonal().double().sum()), 0.0, "exact", p)
    generator = torch.Generator().manual_seed(seed)
    if method == "hutchinson":
        z = _signs(op, products, generator)
        return _mean((z * (op @ z)).double().sum(0), method, products)
    if method == "xtrace":
        return _xtrace(op, products // 2, generator)
    third = products // 3
    q = torch.linalg.qr(op @ _signs(op, third, generator)).Q
    known = float((q * (op @ q)).double().sum())
    z = _signs(op, products - 2 * third, generator)
    z = z - q @ (q.T @ z)
    rest = _mean((z * (op @ z)).double().sum(0), method, products)
    return Estimate(known + rest.value, rest.error, method, 2 * third + z.shape[1])


def _xtrace(op: Symmetric, m: int, generator: torch.Generator) -> Estimate:
    """XTrace with directions normalized in what each leave-one-out range leaves over (section 2 of the paper)."""
    p = op.shape[0]
    omega = torch.randn(p, m, generator=generator, dtype=torch.float64, device="cpu")
    omega = (omega * (math.sqrt(p) / omega.norm(dim=0))).to(device=op.device, dtype=op.dtype)
    y = op @ omega
    q, r = torch.linalg.qr(y)
    # Below rounding there is no range to speak of: a matrix of rank < m is captured exactly.
    rank = int((r.diagonal().abs() > r.diagonal().abs().max() * torch.finfo(op.dtype).eps * p).sum())
    if rank < m:
        q = torch.linalg.svd(y, full_matrices=False).U[:, :rank] if rank else q[:, :0]
        known = float((q * (op @ q)).double().sum()) if rank else 0.0
        left = omega - q @ (q.T @ omega)
        rest = (left * (op @ left)).double().sum(0)
        return Estimate(known + float(rest.mean()), _mean(rest, "", 0).error, "xtrace", 3 * m)
    q, r, y = q.double(), r.double(), y.double()
    z = (op @ q.to(op.dtype)).double()
    omega = omega.double()
    # Column i of s is orthogonal, within span Q, to the range without direction i.
    s = torch.linalg.inv(r).T
    s = s / s.norm(dim=0)
    h = q.T @ z
    w = q.T @ omega  # [m, m]
    inner = (s * w).sum(0)
    x = w - s * inner  # what the range without i sees of direction i
    scale = (p - m + 1) / (p - x.square().sum(0))
    hx = h @ x
    t = z.T @ omega  # Qᵀ H Ω
    along = (s * (h @ s)).sum(0)
    quad = (omega * y).sum(0) - 2 * (x * t).sum(0) + (x * hx).sum(0)
    each = h.trace() - along + scale * quad
    return _mean(each, "xtrace", 2 * m)


def frobenius_norm(op: Symmetric, *, products: int = 30, seed: int = 0) -> Estimate:
    """Estimate of ``‖H‖_F`` from ``‖H z‖²`` over random signs z; the error is carried over from the square."""
    p = op.shape[0]
    if products < 2:
        raise ReductionError(f"products={products}: give at least 2, so that there is an error to estimate")
    if products >= p:
        matrix = op @ torch.eye(p, dtype=op.dtype, device=op.device)
        return Estimate(float(matrix.double().norm()), 0.0, "exact", p)
    z = _signs(op, products, torch.Generator().manual_seed(seed))
    square = _mean((op @ z).double().square().sum(0), "", products)
    value = math.sqrt(square.value)
    return Estimate(value, square.error / (2 * value) if value else 0.0, "hutchinson", products)


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
    ``sigma`` is the width of the Gaussians (default: 1 % of the spectrum's width).
    """
    if probes < 2 or steps < 1 or points < 2:
        raise ReductionError("give at least 2 probes (for the error), 1 step and 2 points")
    p = op.shape[0]
    start = _signs(op, probes, torch.Generator().manual_seed(seed)).double() / math.sqrt(p)
    nodes, weights, recurrence = lanczos(op, start, min(steps, p))
    real = nodes[weights > 0]
    low, high = float(real.min()), float(real.max())
    width = max(high - low, 1e-12 * max(abs(low), abs(high)), torch.finfo(torch.float64).tiny)
    sigma = 0.01 * width if sigma is None else sigma
    grid = torch.linspace(low - 5 * sigma, high + 5 * sigma, points, dtype=torch.float64, device="cpu")
    bumps = torch.exp(-0.5 * ((grid[:, None, None] - nodes) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    each = (bumps * weights).sum(2)  # [points, probes]
    error = each.std(1) / math.sqrt(probes)
    return SpectralDensity(grid, each.mean(1), error, nodes, weights, sigma, p, recurrence)


def _signs(op: Symmetric, columns: int, generator: torch.Generator) -> Tensor:
    """Random signs ``[P, columns]``."""
    z = torch.randint(0, 2, (op.shape[0], columns), generator=generator, dtype=torch.int8, device="cpu")
    return (2 * z - 1).to(device=op.device, dtype=op.dtype)


def _mean(each: Tensor, method: str, products: int) -> Estimate:
    """Mean and its standard error."""
    error = float(each.std()) / math.sqrt(len(each)) if len(each) > 1 else math.inf
    return Estimate(float(each.mean()), error, method, products)
