"""Arithmetic on natural logarithms, so that no bound overflows: 1e400 is 921.03 like any other number."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: A logarithm, or one per sample ``[N]``.
Log = Any

ZERO = -math.inf


def log(value: float) -> float:
    """Logarithm of a non-negative number; -inf for 0."""
    return math.log(value) if value > 0 else (ZERO if value == 0 else math.nan)


def log_tensor(values: Tensor) -> NDArray[np.float64]:
    """Logarithms of non-negative values, in float64."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(values.detach().double().cpu().numpy()))


def add(*logs: Log) -> Log:
    """Logarithm of the sum of what the arguments are logarithms of."""
    total: Log = ZERO
    for one in logs:
        total = np.logaddexp(total, one)
    return total if isinstance(total, np.ndarray) and total.ndim else float(total)


def add_all(logs: Iterable[Log]) -> Log:
    """:func:`add` of an iterable."""
    return add(*logs)


def total(logs: Log) -> float:
    """Logarithm of the sum over samples."""
    return float(np.logaddexp.reduce(np.atleast_1d(logs)))


def times(first: Log, second: Log) -> Log:
    """Logarithm of a product, with 0 · ∞ = 0."""
    product = np.where(np.isneginf(first) | np.isneginf(second), ZERO, np.nan_to_num(first, neginf=0.0, posinf=np.inf)
                       + np.nan_to_num(second, neginf=0.0, posinf=np.inf))  # fmt: skip
    return product if product.ndim else float(product)


def largest_eigenvalue(logs: NDArray[np.float64]) -> float:
    """Logarithm of the largest eigenvalue of a symmetric matrix of non-negative numbers given by their logarithms."""
    if logs.size == 0:
        return ZERO
    top = float(logs.max())
    if not math.isfinite(top):
        return top
    return top + log(max(float(np.linalg.eigvalsh(np.exp(logs - top))[-1]), 0.0))


def flat(values: Tensor, lead: int = 1) -> Tensor:
    """All axes but the ``lead`` leading ones as one, numbers included."""
    return values.reshape(*values.shape[:lead], values.shape[lead:].numel())


def spectral(matrices: Tensor) -> Tensor:
    """Largest singular value of each real or complex matrix ``[..., m, n]``, through the smaller Gram matrix.

    Scaled to the largest entry first; the relative error is a few ``n·eps``, on either side.
    """
    if 0 in matrices.shape:
        return matrices.abs().new_zeros(matrices.shape[:-2])
    top = matrices.abs().amax((-2, -1), keepdim=True)
    unit = matrices / torch.where(top > 0, top, 1)
    gram = unit @ unit.mH if unit.shape[-2] <= unit.shape[-1] else unit.mH @ unit
    norms: Tensor = top_eigenvalue(gram).clamp(min=0).sqrt() * top[..., 0, 0]
    return norms


def top_eigenvalue(matrices: Tensor) -> Tensor:
    """Largest eigenvalue of each symmetric or Hermitian matrix ``[..., n, n]``.

    LAPACK's solver fails now and then in float32, on matrices with many zero eigenvalues; float64 is tried then.
    """
    try:
        values: Tensor = torch.linalg.eigvalsh(matrices)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # it is there, and documented
        exact = matrices.to(torch.promote_types(matrices.dtype, torch.float64))
        if exact.dtype == matrices.dtype:
            raise
        values = torch.linalg.eigvalsh(exact).to(matrices.real.dtype)
    return values[..., -1]


def text(value: float | None, digits: int = 3) -> str:
    """A number given by its natural logarithm, in scientific notation of any size."""
    if value is None:
        return "—"
    if value == ZERO:
        return "0"
    if not math.isfinite(value):
        return "∞" if value > 0 else "nan"
    decimal = value / math.log(10)
    if -3 <= decimal < 3:
        return f"{math.exp(value):.{digits}g}"
    exponent = math.floor(decimal)
    mantissa = f"{10 ** (decimal - exponent):.{digits - 1}f}"
    if mantissa.startswith("10"):
        mantissa, exponent = f"{1:.{digits - 1}f}", exponent + 1
    return f"{mantissa}e{exponent:+03d}"
