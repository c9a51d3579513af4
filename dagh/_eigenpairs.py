"""The eigenpairs at an end of the spectrum, with every copy of a multiple eigenvalue, from products alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dagh._estimates import whole
from dagh._lanczos import Multiplies, lanczos
from dagh.errors import ConvergenceError, ReductionError

if TYPE_CHECKING:
    from dagh._estimates import Symmetric

#: Restarts of ARPACK, and iterations of LOBPCG, unless told otherwise.
_RESTARTS, _ITERATIONS = 200, 500
#: Probability that a search overlooks an eigenvalue, and the directions that it starts from at most.
_OVERLOOKED, _WIDEST = 1e-4, 8

Array = NDArray[np.float64]
#: Products with every column ``[P, b]``.
Products = Callable[[Array], Array]
Which = Literal["LA", "SA", "LM"]


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


def eigsh(
    op: Symmetric,
    k: int = 1,
    which: Which = "LA",
    *,
    method: Literal["arpack", "lobpcg"] = "arpack",
    tol: float | None = None,
    max_iterations: int | None = None,
    seed: int = 0,
) -> Eigenpairs:
    """The ``k`` largest (``"LA"``), smallest (``"SA"``) or largest in magnitude (``"LM"``) eigenpairs.

    ARPACK's implicitly restarted Lanczos method, or LOBPCG (``"LA"`` and ``"SA"`` alone; k products at a time), as in
    scipy. ``tol`` bounds every residual ``‖H v - λ v‖`` relative to ``‖H‖``, which is estimated in twelve Lanczos steps
    (default: 1e-8 in float64, 1e-4 in float32); residuals are computed with products of their own.

    A Krylov method can miss copies of a multiple eigenvalue. The complement of what was found is therefore searched
    from a new random vector until nothing in it belongs among the k: as many products again at most, fewer where there
    is a gap below the k eigenvalues. What is farther than ``tol`` inside is missed with a probability of 1e-4 across a
    gap (Kuczyński and Woźniakowski, 1992, theorem 4.1).

    Raises :class:`~dagh.errors.ConvergenceError` where it is not met, :class:`~dagh.errors.ReductionError` for a bad
    ``k``, ``which``, ``method``, ``tol`` or ``max_iterations``.
    """
    p = op.shape[0]
    if which not in ("LA", "SA", "LM") or method not in ("arpack", "lobpcg") or (method, which) == ("lobpcg", "LM"):
        raise ReductionError(f"which={which!r}, method={method!r}: expected 'LA', 'SA' or (arpack) 'LM'")
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k <= p:
        raise ReductionError(f"k={k!r}: expected 1 to {p} eigenvalues")
    tol = (1e-8 if op.dtype == torch.float64 else 1e-4) if tol is None else tol
    if isinstance(tol, bool) or not isinstance(tol, Real) or not 0 < tol < math.inf:
        raise ReductionError(f"tol={tol!r}: expected a positive number")
    if max_iterations is not None:
        max_iterations = whole(max_iterations, "max_iterations", 1)
    k, norm = int(k), norm_of(op, p, seed)
    if norm == 0:
        values, vectors = np.zeros(k), np.eye(p, k)
    elif p <= max(3 * k + 20, 50):
        values, vectors = _dense(op, k, which)
    else:

        def product(v: Array) -> Array:
            """Over the norm, and in float64 whatever the products are in: the recurrences lose less."""
            rows = torch.from_numpy(np.ascontiguousarray(v)).to(device=op.device, dtype=op.dtype)
            found = (op @ rows).detach().cpu().double().numpy() / norm
            return np.asarray(found, dtype=np.float64)

        values, vectors = extremal(product, p, k, which, float(tol), max_iterations, seed, method)
        values = values * norm
    return _checked(op, values, vectors, float(tol), norm)


def _checked(op: Symmetric, values: Array, vectors: Array, tol: float, norm: float) -> Eigenpairs:
    """In ascending order, with residuals from products of their own."""
    order = np.argsort(values)
    lam = torch.from_numpy(np.ascontiguousarray(values[order])).to(device=op.device, dtype=op.dtype)
    v = torch.from_numpy(np.ascontiguousarray(vectors[:, order])).to(device=op.device, dtype=op.dtype)
    size = norm or 1.0  # squares of numbers far from 1 leave the range of floating point
    residuals = ((op @ v) / size - v * (lam / size)).norm(dim=0) * size
    worst, scale = float(residuals.max()), max(float(lam.abs().max()), norm)
    if not worst <= tol * scale:
        raise ConvergenceError(
            f"the largest residual is {worst:.1e} in a spectrum up to {scale:.1e}, above tol={tol:.0e}; "
            "raise max_iterations or tol"
        )
    return Eigenpairs(lam, v, residuals)


def norm_of(op: Multiplies, p: int, seed: int = 0) -> float:
    """A close lower bound on ``‖H‖`` by a few Lanczos steps; 0 for the zero matrix."""
    start = torch.randn(p, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
    nodes, _, _ = lanczos(op, (start / start.norm()).to(op.device), min(12, p))
    return float(nodes.abs().max())


def _dense(op: Symmetric, k: int, which: Which) -> tuple[Array, Array]:
    """All eigenpairs of a small matrix, formed product by product."""
    matrix = op @ torch.eye(op.shape[0], dtype=op.dtype, device=op.device)
    values, vectors = (x.cpu().numpy() for x in torch.linalg.eigh((matrix + matrix.T) / 2))
    keep = np.argsort(-_rank(values, which))[:k]
    return values[keep], vectors[:, keep]


def _rank(values: Array, which: Which) -> Array:
    """What is largest for the eigenvalues asked for."""
    return {"LA": values, "SA": -values, "LM": np.abs(values)}[which]


def extremal(
    product: Products,
    p: int,
    k: int,
    which: Which,
    tol: float,
    iterations: int | None = None,
    seed: int = 0,
    method: str = "arpack",
) -> tuple[Array, Array]:
    """The ``k`` eigenpairs of a matrix of norm about 1, copies of multiple ones included: ``[k]`` and ``[P, k]``.

    Raises :class:`~dagh.errors.ConvergenceError`.
    """
    counted = _Counted(product)
    values, vectors = (_arpack if method == "arpack" else _lobpcg)(counted, p, k, which, tol, iterations, seed)
    vectors = np.linalg.qr(vectors)[0]  # ARPACK's are orthogonal to rounding, LOBPCG's nearly so
    generator, width, limit = np.random.default_rng([seed, 1]), 1, max(counted.count, 40)
    while vectors.shape[1] < p:
        worst = float(np.sort(_rank(values, which))[-k])
        search = _Search(product, vectors, which, tol / 10, generator)
        more, found = search.run(worst + tol, width, limit, max(2 * k, 20) + 2 * width, iterations or _RESTARTS)
        if not len(more):
            break
        values, vectors = np.concatenate([values, more]), np.concatenate([vectors, found], 1)
        width = min(2 * width, _WIDEST)
    keep = np.argsort(-_rank(values, which))[:k]
    return values[keep], vectors[:, keep]


class _Counted:
    """Products, and how many there were."""

    def __init__(self, product: Products) -> None:
        self.product, self.count = product, 0

    def __call__(self, v: Array) -> Array:
        self.count += v.shape[1]
        return self.product(v)


class _Search:
    """Block Lanczos, restarted with its best Ritz vectors (Wu and Simon, 2000), orthogonal to vectors known."""

    def __init__(
        self, product: Products, known: Array, which: Which, tol: float, generator: np.random.Generator
    ) -> None:
        self.product, self.known, self.which, self.tol, self.generator = product, known, which, tol, generator

    def run(self, bar: float, width: int, limit: int, room: int, restarts: int) -> tuple[Array, Array]:
        """Eigenpairs of the complement that rank above ``bar``; none when a search as long as ``limit`` finds none.

        Ritz values never leave the spectrum: one above the bar is proof that something was missed, and all of its kind
        are then made to converge.
        """
        p = self.known.shape[0]
        basis = np.zeros((p, 0))
        inner = np.zeros((0, 0))
        block, used, cycles = self._orthonormal(self.generator.standard_normal((p, width)), basis), 0, 0
        while True:
            basis = np.concatenate([basis, block], 1)
            moved = self.product(block)
            used += block.shape[1]
            inner = _bordered(inner, basis.T @ moved)
            block, beta = self._next(moved, basis)
            values, turn = np.linalg.eigh(inner)
            residuals = np.linalg.norm(beta @ turn[-beta.shape[1] :], axis=0) if beta.size else 0 * values
            order = np.argsort(-_rank(values, self.which))
            good = [i for i in order if _rank(values, self.which)[i] > bar]
            if not block.shape[1] or (good and residuals[good].max() <= self.tol):
                return values[good], basis @ turn[:, good]
            if not good and (used >= limit or self._settled(values, residuals, order[0], bar, used / width)):
                return values[:0], basis[:, :0]
            if basis.shape[1] + block.shape[1] > min(room + len(good), p - self.known.shape[1]):
                cycles += 1
                if cycles > restarts:
                    raise ConvergenceError(
                        f"{len(good)} copies of multiple eigenvalues did not converge within the iterations allowed; "
                        "raise max_iterations or tol, or ask for fewer"
                    )
                kept = order[: max(len(good) + width, basis.shape[1] // 2)]
                basis, inner = basis @ turn[:, kept], np.diag(values[kept])

    def _settled(self, values: Array, residuals: Array, best: int, bar: float, steps: float) -> bool:
        """Whether an eigenvalue above the bar would have shown itself: Lanczos from a random vector comes within a
        share ``g`` of the spectrum's width of the largest with probability ``1 - 1.648 √P exp(-√g (2 steps - 1))``.
        """
        top = float(_rank(values, self.which)[best])
        gap = (bar - top) / (bar + 1.1 * max(1.0, float(np.abs(values).max())))
        if residuals[best] <= self.tol:
            return True
        return 1.648 * math.sqrt(len(self.known)) * math.exp(-math.sqrt(gap) * (2 * steps - 1)) <= _OVERLOOKED

    def _orthonormal(self, block: Array, basis: Array) -> Array:
        for _ in range(2):  # twice is enough (Parlett)
            block = block - self.known @ (self.known.T @ block)
            block = np.linalg.qr(block - basis @ (basis.T @ block))[0]
        return block

    def _next(self, moved: Array, basis: Array) -> tuple[Array, Array]:
        """What the products leave of the space: an orthonormal block, and its coefficients."""
        left = moved
        for _ in range(2):
            left = left - self.known @ (self.known.T @ left)
            left = left - basis @ (basis.T @ left)
        block, beta = np.linalg.qr(left)
        u, size, turn = np.linalg.svd(beta)
        rank = int((size > 1e-12).sum())  # in units of the norm
        block = block @ u[:, :rank]
        return (self._orthonormal(block, basis) if rank else block), size[:rank, None] * turn[:rank]


def _bordered(inner: Array, across: Array) -> Array:
    """The projected matrix with the columns of another block, and their rows."""
    old = len(inner)
    found = np.zeros((len(across), len(across)))
    found[:old, :old], found[:, old:], found[old:, :old] = inner, across, across[:old].T
    found[old:, old:] = (across[old:] + across[old:].T) / 2
    return found


def _arpack(
    product: Products, p: int, k: int, which: Which, tol: float, iterations: int | None, seed: int
) -> tuple[Array, Array]:
    """Largest in magnitude as they are; at one end of the spectrum after a shift to where it is large.

    ARPACK measures convergence relative to each eigenvalue, and the smallest ones of a semidefinite matrix are zero; it
    cannot start where a product vanishes.
    """
    from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator
    from scipy.sparse.linalg import eigsh as solve

    shift, sign = (0.0, 1.0) if which == "LM" else (2.0, 1.0 if which == "LA" else -1.0)

    def moved(v: Array) -> Array:
        return np.asarray(shift * v.reshape(-1) + sign * product(v.reshape(-1, 1)).reshape(-1))

    try:
        values, vectors = solve(
            LinearOperator((p, p), matvec=moved, dtype=np.dtype(np.float64)),
            k,
            which="LM" if which == "LM" else "LA",
            tol=tol / 10,
            maxiter=iterations or _RESTARTS,
            v0=np.random.default_rng(seed).standard_normal(p),
            ncv=min(p, 2 * k + 20),
        )
    except ArpackNoConvergence as error:
        raise ConvergenceError(
            f"{len(error.eigenvalues)} of {k} eigenvalues converged within the iterations allowed; "
            "raise max_iterations or tol, or ask for fewer"
        ) from None
    except ArpackError:
        if which != "LM":
            raise
        ends = [_arpack(product, p, k, end, tol, iterations, seed) for end in ("LA", "SA")]
        return _best(np.concatenate([v for v, _ in ends]), np.concatenate([u for _, u in ends], 1), k)
    return sign * (np.asarray(values) - shift), np.asarray(vectors)


def _best(values: Array, vectors: Array, k: int) -> tuple[Array, Array]:
    """The ``k`` largest in magnitude of both ends of the spectrum, which may overlap."""
    order = np.argsort(-np.abs(values), kind="stable")
    basis = np.zeros((len(vectors), 0))
    kept: list[int] = []
    for i in order:
        left = vectors[:, i] - basis @ (basis.T @ vectors[:, i])
        if len(kept) < k and np.linalg.norm(left) > 0.5:
            kept.append(int(i))
            basis = np.concatenate([basis, (left / np.linalg.norm(left))[:, None]], 1)
    return values[kept], basis


def _lobpcg(
    product: Products, p: int, k: int, which: Which, tol: float, iterations: int | None, seed: int
) -> tuple[Array, Array]:
    import warnings

    from scipy.sparse.linalg import LinearOperator, lobpcg

    def matmat(v: Array) -> Array:
        return product(v.reshape(p, -1))

    start = np.random.default_rng(seed).standard_normal((p, k))
    matrix = LinearOperator((p, p), matvec=matmat, matmat=matmat, dtype=np.dtype(np.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the residuals are checked by the caller
        values, vectors = lobpcg(matrix, start, largest=which == "LA", tol=tol / 10, maxiter=iterations or _ITERATIONS)
    return np.asarray(values), np.asarray(vectors)
