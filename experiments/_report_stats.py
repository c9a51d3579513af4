"""Rank correlations and monotonicity, with intervals that say how much the seeds allow to claim."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

Array = np.ndarray[Any, np.dtype[Any]]

_DRAWS = 4000


@dataclass(frozen=True)
class Interval:
    """An estimate with a 95 % interval; ``None`` where there is too little to estimate from."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "–"
        if self.low is None or self.high is None:
            return f"{self.value:.3g}"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def spearman(x: Array, y: Array) -> float:
    """Spearman's rank correlation; NaN where one of them is constant."""
    a, b = rankdata(x), rankdata(y)
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale else float("nan")


def correlation(x: Array, groups: Sequence[Any], *ys: Array, seed: int = 0) -> list[Interval]:
    """Rank correlations of ``x`` with each of ``ys``, and of the last column: that of the first minus the second.

    Intervals by resampling whole groups (networks of one shape), so that seeds of one network do not count as
    independent evidence. With fewer than four groups there is no interval.
    """
    names = list(dict.fromkeys(groups))
    index = [np.flatnonzero([g == name for g in groups]) for name in names]

    def all_of(rows: Array) -> list[float]:
        found = [spearman(x[rows], y[rows]) for y in ys]
        return [*found, found[0] - found[1]] if len(found) == 2 else found

    point = all_of(np.arange(len(x)))
    if len(names) < 4:
        return [Interval(None if np.isnan(v) else v) for v in point]
    rng = np.random.default_rng(seed)
    draws = np.array(
        [all_of(np.concatenate([index[i] for i in rng.integers(len(names), size=len(names))])) for _ in range(1000)]
    )
    return [_interval(v, column) for v, column in zip(point, draws.T, strict=True)]


def ratio(values: Array, seed: int = 0) -> Interval:
    """Median with a bootstrap interval."""
    if not len(values):
        return Interval(None)
    rng = np.random.default_rng(seed)
    draws = np.median(values[rng.integers(len(values), size=(1000, len(values)))], axis=1)
    return _interval(float(np.median(values)), draws)


@dataclass(frozen=True)
class Monotone:
    """How monotone the means over seeds are along an axis.

    ``probability``: of being strictly monotone in either direction, the means being known up to Student's t;
    ``rank`` is the rank correlation of all runs with the axis. ``direction`` is +1 or -1.
    """

    probability: float | None
    rank: Interval
    direction: int


def monotone(groups: Sequence[Array], seed: int = 0) -> Monotone:
    """Whether logarithms of ``groups`` (one array over seeds per value of the axis) are monotone in the mean.

    The spread between seeds is pooled over values. Without two seeds for some value, or with fewer than three
    values, there is no probability.
    """
    logs = [np.log(g[g > 0]) for g in groups]
    kept = [(i, g) for i, g in enumerate(logs) if len(g)]
    x = np.concatenate([np.full(len(g), i) for i, g in kept]) if kept else np.zeros(0)
    y = np.concatenate([g for _, g in kept]) if kept else np.zeros(0)
    rng = np.random.default_rng(seed)
    means = np.array([g.mean() for _, g in kept])
    counts = np.array([len(g) for _, g in kept])
    direction = 1 if len(means) < 2 or np.polyfit(np.arange(len(means)), means, 1)[0] >= 0 else -1
    free = int(counts.sum() - len(counts))
    if len(kept) < 3 or free < 1:
        return Monotone(None, Interval(spearman(x, y) if len(kept) > 1 else None), direction)
    spread = np.sqrt(sum(((g - g.mean()) ** 2).sum() for _, g in kept) / free)
    # One common draw of the variance: it is the same for all values.
    scale = spread * np.sqrt(free / rng.chisquare(free, size=(_DRAWS, 1)))
    drawn = means + rng.standard_normal((_DRAWS, len(means))) * scale / np.sqrt(counts)
    steps = np.diff(drawn, axis=1)
    probability = float(max((steps > 0).all(1).mean(), (steps < 0).all(1).mean()))
    ranks = _stratified(x, y, rng)
    return Monotone(probability, _interval(spearman(x, y), ranks), direction)


def _stratified(x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Rank correlations after resampling the runs within every value."""
    parts = [np.flatnonzero(x == v) for v in np.unique(x)]
    return np.array(
        [spearman(x, y[np.concatenate([p[rng.integers(len(p), size=len(p))] for p in parts])]) for _ in range(1000)]
    )


def _interval(value: float, draws: Array) -> Interval:
    good = draws[np.isfinite(draws)]
    if np.isnan(value) or len(good) < len(draws) / 2:
        return Interval(None if np.isnan(value) else value)
    low, high = np.quantile(good, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def decide(holds: Callable[[float], bool], interval: Interval) -> str:
    """``"holds"`` where both ends of the interval satisfy it, ``"does not hold"`` where none does, else
    ``"undecided"``.
    """
    if interval.low is None or interval.high is None:
        return "undecided"
    ends = [holds(interval.low), holds(interval.high)]
    return "holds" if all(ends) else "undecided" if any(ends) else "does not hold"
