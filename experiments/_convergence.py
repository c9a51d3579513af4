"""How much one more sample moves the mean loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dagh.errors import NonFiniteError, ReductionError, ShapeError

Array = np.ndarray[Any, np.dtype[np.float64]]

DEFAULT_QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class LossDifferences:
    """``|L_{k+1} − L_k|`` over random orders of the samples; row i of every array belongs to ``k[i] = i +
    1``.

    ``mean`` is the average over the orders, ``quantiles`` maps each level to its quantile over them.
    """

    k: np.ndarray[Any, np.dtype[np.int64]]
    mean: Array
    quantiles: Mapping[float, Array]
    samples: int
    shuffles: int

    def __repr__(self) -> str:
        return f"LossDifferences({self.samples} samples, {self.shuffles} shuffles)"


def loss_differences(
    per_sample_losses: ArrayLike,
    shuffles: int = 100,
    seed: int = 0,
    quantiles: Sequence[float] = DEFAULT_QUANTILES,
) -> LossDifferences:
    """Absolute differences of consecutive mean losses, over random orders of the samples.

    With ``L_k = (ℓ_1 + … + ℓ_k) / k`` the difference is exactly ``L_{k+1} − L_k = (ℓ_{k+1} − L_k) / (k +
    1)``, so one cumulative sum per order gives all of them, without the cancellation of subtracting two
    nearly equal means.

    Args:
        per_sample_losses: ``[N]``, N ≥ 2, in any order.
        shuffles: number of random orders, at least 1.
        seed: of the random orders.
        quantiles: levels in [0, 1].

    Returns:
        Arrays of length N − 1; ``shuffles × (N − 1)`` doubles are held while they are computed.

    Raises:
        ShapeError: the losses are not one axis of at least two.
        NonFiniteError: a loss is NaN or Inf.
        ReductionError: ``shuffles`` below 1 or a quantile outside [0, 1].
    """
    try:
        losses = np.asarray(per_sample_losses, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ShapeError("per-sample losses must be one axis of real numbers") from error
    if losses.ndim != 1 or len(losses) < 2:
        raise ShapeError(f"per-sample losses must be one axis of at least two, got shape {losses.shape}")
    if not np.isfinite(losses).all():
        raise NonFiniteError(f"the loss of sample {int(np.argmin(np.isfinite(losses)))} is NaN or Inf")
    if shuffles < 1:
        raise ReductionError(f"shuffles={shuffles}: expected a positive number")
    if not all(0 <= q <= 1 for q in quantiles):
        raise ReductionError(f"quantiles={tuple(quantiles)}: expected levels in [0, 1]")
    generator = np.random.default_rng(seed)
    k = np.arange(1, len(losses))
    differences = np.empty((shuffles, len(k)))
    for row in differences:
        order = generator.permutation(losses)
        means = np.cumsum(order[:-1]) / k
        np.abs((order[1:] - means) / (k + 1), out=row)
    levels = quantiles_over(differences, quantiles)
    return LossDifferences(
        k=k,
        mean=differences.mean(0),
        quantiles=dict(zip(quantiles, levels, strict=True)),
        samples=len(losses),
        shuffles=shuffles,
    )


def quantiles_over(rows: Array, levels: Sequence[float]) -> Array:
    """Quantiles over axis 0 of ``rows`` ``[S, K]``, those of :func:`numpy.quantile`: ``[Q, K]``.

    Whole columns are sorted, each contiguous: twice as fast as selecting few elements of each.
    """
    ordered = np.sort(np.ascontiguousarray(rows.T), axis=1)
    last = len(rows) - 1
    found = np.empty((len(levels), rows.shape[1]))
    for row, level in zip(found, levels, strict=True):
        below = min(int(level * last), last)
        share = level * last - below
        low, high = ordered[:, below], ordered[:, min(below + 1, last)]
        row[:] = low + (high - low) * share if share < 0.5 else high - (high - low) * (1 - share)
    return found
