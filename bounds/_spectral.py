"""Spectral norms of matrices: exact, and bounded from above by Gram iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from dagh.errors import DtypeError, NonFiniteError, ReductionError, ShapeError


def spectral_norm(matrix: Tensor) -> Tensor:
    """Largest singular value by a dense singular value decomposition.

    Args:
        matrix: ``[..., m, n]``, real or complex; the weight ``[out, in]`` of a linear layer, for instance.

    Returns:
        ``[...]``, real; 0 where m or n is 0.

    Raises:
        ShapeError: fewer than two axes.
        DtypeError: neither floating point nor complex, or half precision.
        NonFiniteError: NaN or Inf among the entries.
    """
    check_matrix(matrix)
    if 0 in matrix.shape[-2:]:
        return matrix.abs().new_zeros(matrix.shape[:-2])
    values: Tensor = torch.linalg.svdvals(matrix)
    return values[..., 0]


def gram_bound(matrix: Tensor, steps: int = 6) -> Tensor:
    """Upper bound on the spectral norm by Gram iteration, without a decomposition.

    The value is ``‖(WᴴW)^{2^(t-1)}‖_F^{1/2^t}`` after ``t = steps`` squarings, the Frobenius norm of W where
    t = 0. With the singular values σ₁ ≥ … ≥ σ_r > 0 of W it equals ``(Σ_i σ_i^{2^{t+1}})^{1/2^{t+1}}``, hence

        σ₁ ≤ bound ≤ r^{1/2^{t+1}} σ₁,

    and it decreases with every step: a p-norm of the singular values decreases in p and is never below their
    maximum. After six steps the excess is below 5.6 % for ranks up to 1000.

    Args:
        matrix: ``[..., m, n]``, real or complex.
        steps: number of squarings t ≥ 0.

    Returns:
        ``[...]``, real.

    Raises:
        ShapeError: fewer than two axes.
        DtypeError: neither floating point nor complex, or half precision.
        NonFiniteError: NaN or Inf among the entries.
        ReductionError: ``steps`` is negative.
    """
    check_matrix(matrix)
    if steps < 0:
        raise ReductionError(f"steps={steps}: expected a non-negative number of squarings")
    if 0 in matrix.shape[-2:]:
        return matrix.abs().new_zeros(matrix.shape[:-2])
    # The power 2^(t+1) of a norm overflows at once: each iterate is divided by its norm, whose logarithm is
    # kept.
    gram, log_scale = _normalized(matrix)
    if matrix.shape[-2] < matrix.shape[-1]:
        gram = gram.mH  # the smaller of the two Gram matrices
    power = 1.0
    for _ in range(steps):
        gram, log_step = _normalized(gram.mH @ gram)
        power /= 2
        log_scale = log_scale + power * log_step
    return log_scale.exp()


def check_matrix(matrix: Tensor, axes: int = 2) -> None:
    """Refuse what has no spectral norm in floating point."""
    if matrix.dim() < axes:
        raise ShapeError(f"expected at least {axes} axes, got shape {tuple(matrix.shape)}")
    if matrix.dtype not in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        raise DtypeError(f"expected single or double precision, got {str(matrix.dtype).removeprefix('torch.')}")
    if not torch.isfinite(matrix).all():
        raise NonFiniteError("the matrix has NaN or Inf entries")


def _normalized(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``matrix / ‖matrix‖_F`` and ``log ‖matrix‖_F`` (zero matrices stay zero, with logarithm -inf)."""
    # Scaled by the largest entry first: the squares of very small entries would underflow.
    largest = matrix.abs().amax((-2, -1), keepdim=True)
    scaled = matrix / torch.where(largest > 0, largest, 1)
    norm = torch.linalg.vector_norm(scaled, dim=(-2, -1), keepdim=True)
    unit = scaled / torch.where(norm > 0, norm, 1)
    return unit, (largest.log() + norm.log())[..., 0, 0]
