"""Linear systems and determinants with a block matrix.

Every group of parameters with zeros around it is written out and factored alone, so that the cost is that of the
largest group, not of the whole.
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
        cheaper = "H.block_diagonal(), or conjugate gradients on dagh.operator(...).to_scipy()"
        for group, dense in pieces(matrix, "solving", cheaper):
            if dense.shape[-1]:
                found = _solver(dense, number)(torch.cat([out[i] for i in group], -2))
                for i, part in zip(group, torch.split(found, [matrix.numels[i] for i in group], -2), strict=True):
                    out[i] = part
        return out

    return on_vectors(matrix, v, act)


def logdet(matrix: BlockMatrix, damping: Any) -> Tensor:
    """``log det(H + damping·I)``, [] or [N], of a positive definite matrix."""
    number = _checked(damping)
    total = torch.zeros(matrix.lead, dtype=matrix.dtype, device=matrix.device)
    for _, dense in pieces(matrix, "a determinant", "that of H.block_diagonal()"):
        lower, failed = torch.linalg.cholesky_ex(_damped(dense, number))
        if bool(failed.any()) or _singular(dense, partial(_from_factor, lower)):
            raise SingularError(
                f"{_shown(number)} is not positive definite to rounding, and has no log-determinant; give a larger "
                "damping (a prior precision, say), or take H_O in place of H"
            )
        total = total + 2 * lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return total


def _solver(dense: Tensor, damping: float) -> Solver:
    """From the factor of Cholesky, or those of LU where the matrix is indefinite."""
    damped = _damped(dense, damping)
    lower, failed = torch.linalg.cholesky_ex(damped)
    solver: Solver = partial(_from_factor, lower)
    if bool(failed.any()):
        factors, order, zero = torch.linalg.lu_factor_ex(damped)
        if bool(zero.any()):
            raise _is_singular(damping)
        solver = partial(torch.linalg.lu_solve, factors, order)
    if _singular(damped, solver):
        raise _is_singular(damping)
    return solver


def _from_factor(lower: Tensor, v: Tensor) -> Tensor:
    return torch.cholesky_solve(v, lower)


def _damped(dense: Tensor, damping: float) -> Tensor:
    if damping:
        dense.diagonal(dim1=-2, dim2=-1).add_(damping)
    return dense


def _singular(matrix: Tensor, solver: Solver) -> bool:
    """Whether the smallest eigenvalue is what rounding makes of zero.

    Some steps of the power method tell norms of the matrix and of its inverse from below; where the matrix is singular,
    the second is found in one step.
    """
    p = matrix.shape[-1]
    if not p:
        return False
    start = torch.randn(p, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = start.to(matrix).expand(*matrix.shape[:-1], 1)
    norm, inverse = _norm(lambda u: matrix @ u, v), _norm(solver, v)
    return not bool((norm * inverse * p * torch.finfo(matrix.dtype).eps < 1).all())


def _norm(act: Solver, v: Tensor) -> Tensor:
    found = torch.zeros(())
    for _ in range(_STEPS):
        v = v / v.norm(dim=-2, keepdim=True)
        v = act(v)
        found = v.norm(dim=-2)
    return found


def _is_singular(damping: float) -> SingularError:
    larger = "a larger damping" if damping else "a damping"
    return SingularError(f"{_shown(damping)} is singular to rounding; give {larger}, as in H.solve(v, damping=1e-3)")


def _shown(damping: float) -> str:
    return f"H + {damping:g}·I" if damping else "H"


def _checked(damping: Any) -> float:
    number = damping.item() if isinstance(damping, Tensor) and damping.numel() == 1 else damping
    if isinstance(number, bool) or not isinstance(number, Real) or not isfinite(number):
        raise ReductionError(f"damping is a finite number, added to the diagonal, not {damping!r}")
    return float(number)
