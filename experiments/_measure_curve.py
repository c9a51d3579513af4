"""|L_{k+1} − L_k| over k: all orders as cumulative sums, with bands, smoothing and a fitted slope."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.linalg import solve_banded
from torch import Tensor

from dagh.errors import ShapeError

from ._convergence import quantiles_over

Array = np.ndarray[Any, np.dtype[Any]]

#: Every k below this is kept; above it, this many spaced evenly and this many by ratio.
_DENSE, _SPARSE = 200, 900
#: The slope is fitted from here on.
_FIT_FROM = 10


@dataclass(frozen=True)
class Curve:
    """``arrays`` are over ``k`` (thinned); ``scalars`` summarize the curve before thinning."""

    arrays: dict[str, Array]
    scalars: dict[str, float]


def curve(losses: Tensor, shuffles: int, smooth: float, bootstrap: int, seed: int) -> Curve:
    """|L_{k+1} − L_k| = |ℓ_{k+1} − L_k| / (k + 1) over ``shuffles`` random orders of ``losses`` ``[N]``, N ≥ 3.

    Arrays over k: ``mean``, ``q05``, ``q50``, ``q95`` (over the orders), ``boot_lo``, ``boot_hi`` (95 % band of the
    mean by resampling orders; only with ``bootstrap``), ``smooth`` (exponential smoothing of the mean over every k).
    Scalars: ``slope`` of log mean against log k from k = 10 on with its 95 % interval over resampled orders, ``level``
    (mean of (k+1)|L_{k+1} − L_k| over the last half), ``mad`` (mean |ℓ_i − L|, what the level tends to), and
    ``identity_residual``: the largest deviation from the difference of the two means themselves.
    """
    n = len(losses)
    if losses.dim() != 1 or n < 3:
        raise ShapeError(f"per-sample losses must be one axis of at least three, got shape {tuple(losses.shape)}")
    losses = losses.double()
    rng = np.random.default_rng(seed)
    keep = thin(n - 1)
    counts = torch.arange(1, n + 1, dtype=torch.float64, device=losses.device)
    chosen = torch.from_numpy(keep).to(losses.device)
    total = torch.zeros(n - 1, dtype=torch.float64, device=losses.device)
    residual = torch.zeros((), dtype=torch.float64, device=losses.device)
    rows = []
    for _ in range(shuffles):
        order = torch.from_numpy(rng.permutation(n)).to(losses.device)
        one = losses[order]
        means = one.cumsum(0).div_(counts)
        signed = (one[1:] - means[:-1]).div_(counts[1:])
        residual = torch.maximum(residual, (means.diff() - signed).abs_().max())
        size = signed.abs_()
        total += size
        rows.append(size[chosen])
    mean = (total / shuffles).cpu().numpy()
    kept = torch.stack(rows).cpu().numpy()
    ks = keep + 1
    quantiles = quantiles_over(kept, (0.05, 0.5, 0.95))
    arrays: dict[str, Array] = {"k": ks, "mean": mean[keep], "smooth": smoothed(mean, smooth)[keep]}
    arrays |= dict(zip(("q05", "q50", "q95"), quantiles, strict=True))
    half = mean[(n - 1) // 2 :]
    level = float((half * (np.arange((n - 1) // 2, n - 1) + 2)).mean())
    scalars = {
        "slope": float(_slope(ks, mean[keep][None])[0]),
        "level": level,
        "mad": float((losses - losses.mean()).abs().mean()),
        "identity_residual": float(residual),
    }
    if bootstrap:
        weights = rng.multinomial(shuffles, np.full(shuffles, 1 / shuffles), size=bootstrap) / shuffles
        means_again = weights @ kept
        arrays["boot_lo"], arrays["boot_hi"] = quantiles_over(means_again, (0.025, 0.975))
        lo, hi = np.quantile(_slope(ks, means_again), [0.025, 0.975])
        scalars |= {"slope_lo": float(lo), "slope_hi": float(hi)}
    return Curve(arrays, scalars)


def thin(count: int) -> Array:
    """Positions kept of ``count``: all below 200, then evenly and geometrically spaced ones, the last among them."""
    dense = np.arange(min(count, _DENSE))
    if count <= _DENSE:
        return dense
    even = np.linspace(_DENSE, count - 1, _SPARSE).round().astype(np.int64)
    ratio = np.geomspace(_DENSE, count - 1, _SPARSE).round().astype(np.int64)
    return np.unique(np.concatenate([dense, even, ratio]))


def smoothed(values: Array, coefficient: float) -> Array:
    """``s_1 = v_1``, ``s_k = c s_{k−1} + (1 − c) v_k``."""
    if not coefficient:
        return values
    right = (1 - coefficient) * values
    right[0] = values[0]
    bands = np.stack([np.ones_like(values), np.full_like(values, -coefficient)])
    return np.asarray(solve_banded((1, 0), bands, right, check_finite=False))


def _slope(k: Array, rows: Array) -> Array:
    """Slope of log rows ``[S, K]`` against log k, least squares with the weight of a logarithmic spacing of k."""
    used = k >= min(_FIT_FROM, k[-1] // 2)
    x = np.log(k[used])
    w = np.gradient(x) if len(x) > 1 else np.ones(1)
    y = np.log(np.maximum(rows[:, used], np.finfo(np.float64).tiny))
    x = x - (w * x).sum() / w.sum()
    return np.asarray((y * (w * x)).sum(1) / (w * x * x).sum())
