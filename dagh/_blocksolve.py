"""Linear systems and determinants with a block matrix.

Every group of parameters with zeros around it is written out and factored alone, so that the cost is that of the
largest group, not of the whole. Factors are in float64: those of float32 would lose what digits the blocks have.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import isfinite
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dagh._blockparts import pieces
from dagh._blockproducts import on_vectors
from dagh.errors import ReductionError, SingularError

if TYPE_CHECKING:
    from dagh._blockmatrix import BlockMatrix

Solver = Callable[[Tensor], Tensor]

#: Of the power method, where a factor of two in a norm is of no matter.
_STEPS = 4


def solve(matrix: BlockMatrix, v: Any, damping: Any) -> Any:
    """``(H + damping·I)⁻¹ v``; what ``v`` may be stands in ``BlockMatrix.__matmul__``."""
    number = _checked(damping)

    def act(rows: list[Tensor]) -> list[Tensor]:
        out = [r.expand(*matrix.lead, *r.shape[-2:]) for r in rows]
        cheaper = "H.block_diagonal(), or products alone, dagh.operator(...).solve(v)"
        for group, dense in pieces(matrix, "solving", cheaper, factors=True):
            if dense.shape[-1]:
                found = _solver(dense, number)(torch.cat([out[i] for i in group], -2).double()).to(matrix.dtype)
                for i, part in zip(group, torch.split(found, [matrix.numels[i] for i in group], -2), strict=True):
                    out[i] = part
        return out

    return on_vectors(matrix, v, act)


def logdet(matrix: BlockMatrix, damping: Any) -> Tensor:
    """``log det(H + damping·I)``, [] or [N] in float64, of a positive definite matrix."""
    number = _checked(damping)
    total = torch.zeros(matrix.lead, dtype=torch.float64, device=matrix.device)
    for _, dense in pieces(matrix, "a determinant", "that of H.block_diagonal(), or of dagh.gram(...)", factors=True):
        damped = _damped(dense, number)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if bool(failed.any()) or _condition(damped, partial(_from_factor, lower)) > _worst(dense.dtype):
            raise SingularError(
                f"{_shown(number)} is not positive definite to rounding in {_dtype(dense)}: no log-determinant; "
                "give a larger damping (a prior precision, say), or take H_O in place of H"
            )
        total = total + 2 * lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return total


def _solver(dense: Tensor, damping: float) -> Solver:
    """From the factor of Cholesky, or those of LU where the matrix is indefinite; in float64."""
    damped = _damped(dense, damping)
    lower, failed = torch.linalg.cholesky_ex(damped)
    solver: Solver = partial(_from_factor, lower)
    zero = torch.zeros(())
    if bool(failed.any()):
        factors, order, zero = torch.linalg.lu_factor_ex(damped)
        solver = partial(torch.linalg.lu_solve, factors, order)
    condition = float("inf") if bool(zero.any()) else _condition(damped, solver)
    if condition > _worst(dense.dtype):
        larger = "a larger damping" if damping else "a damping, as in H.solve(v, damping=1e-3)"
        number = f"condition number {condition:.0e}" if isfinite(condition) else "no inverse"
        raise SingularError(f"{_shown(damping)} is singular to rounding in {_dtype(dense)} ({number}); give {larger}")
    return solver


def _from_factor(lower: Tensor, v: Tensor) -> Tensor:
    return torch.cholesky_solve(v, lower)


def _damped(dense: Tensor, damping: float) -> Tensor:
    damped = dense.double()
    if damping:
        damped.diagonal(dim1=-2, dim2=-1).add_(damping)
    return damped


def _worst(dtype: torch.dtype) -> float:
    """The condition number from which on the smallest eigenvalues are what rounding, of the blocks, makes of zero."""
    return 0.1 / torch.finfo(dtype).eps


def _condition(matrix: Tensor, solver: Solver) -> float:
    """The condition number of the worst sample, from below.

    Some steps of the power method give the norms of the matrix and of its inverse; where the matrix is singular to
    rounding, the second is found in one step.
    """
    start = torch.randn(matrix.shape[-1], 1, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
    v = start.to(matrix.device).expand(*matrix.shape[:-1], 1)
    product = _norm(lambda u: matrix @ u, v) * _norm(solver, v)
    if not product.numel():
        return 1.0
    return float(torch.where(product.isnan(), torch.inf, product).max())


def _norm(act: Solver, v: Tensor) -> Tensor:
    found = torch.zeros(())
    for _ in range(_STEPS):
        v = act(v / v.norm(dim=-2, keepdim=True))
        found = v.norm(dim=-2)
    return found


def _shown(damping: float) -> str:
    return f"H + {damping:g}·I" if damping else "H"


def _dtype(dense: Tensor) -> str:
    return str(dense.dtype).removeprefix("torch.")


def _checked(damping: Any) -> float:
    return finite(damping.item() if isinstance(damping, Tensor) and damping.numel() == 1 else damping)


def finite(damping: Any) -> float:
    """A damping as a number; ``ReductionError`` for what is none."""
    if isinstance(damping, bool) or not isinstance(damping, Real) or not isfinite(damping):
        raise ReductionError(f"damping is a finite number, added to the diagonal, not {damping!r}")
    return float(damping)
