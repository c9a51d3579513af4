"""Rank correlations and monotonicity, with intervals that say how much the seeds allow to claim."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

Array = np.ndarray[Any, np.dtype[Any]]

_DRAWS = 4000
#: Networks from which on there are intervals.
_FEWEST = 4


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
    if len(names) < _FEWEST:
        return [Interval(None if np.isnan(v) else v) for v in point]
    rng = np.random.default_rng(seed)
    draws = np.array(
        [all_of(np.concatenate([index[i] for i in rng.integers(len(names), size=len(names))])) for _ in range(1000)]
    )
    return [_interval(v, column) for v, column in zip(point, draws.T, strict=True)]


def median(values: Array, groups: Sequence[Any], seed: int = 0) -> Interval:
    """Median over groups (networks of one shape) of their medians, with an interval by resampling at least four."""
    names = list(dict.fromkeys(groups))
    means = np.array([np.median([v for v, g in zip(values, groups, strict=True) if g == name]) for name in names])
    if len(means) < _FEWEST:
        return Interval(float(np.median(means)) if len(means) else None)
    rng = np.random.default_rng(seed)
    draws = np.median(means[rng.integers(len(means), size=(1000, len(means)))], axis=1)
    return _interval(float(np.median(means)), draws)


@dataclass(frozen=True)
class Monotone:
    """How monotone the means over seeds are along an axis.

    ``probability``: of being strictly monotone in either direction, the means being known up to Student's t.
    ``rising`` and ``falling`` are p-values of the hypotheses that the means never fall, and never rise. ``rank`` is the
    rank correlation of the means with the axis, ``direction`` +1 or -1.
    """

    probability: float | None
    rising: float | None
    falling: float | None
    rank: Interval
    direction: int

    @property
    def verdict(self) -> bool | None:
        """Monotone, not monotone (neither hypothesis can be upheld at 5 %), or not to be told."""
        if self.probability is None or self.rising is None or self.falling is None:
            return None
        if self.probability >= 0.95:
            return True
        return False if max(self.rising, self.falling) < 0.05 else None


def monotone(groups: Sequence[Array], seed: int = 0) -> Monotone:
    """Whether logarithms of ``groups`` (one array over seeds per value of the axis) are monotone in the mean.

    The spread between seeds is pooled over values. Without two seeds for some value, or with fewer than three
    values, nothing but the rank correlation is found. The p-values are those of the likelihood ratio against order
    restrictions (Bartholomew 1959; Robertson, Wright and Dykstra 1988) at the least favorable point, simulated.
    """
    logs = [g for g in (np.log(g[g > 0]) for g in groups) if len(g)]
    means = np.array([g.mean() for g in logs])
    counts = np.array([len(g) for g in logs])
    x = np.arange(len(means))
    direction = 1 if len(means) < 2 or np.polyfit(x, means, 1)[0] >= 0 else -1
    free = int(counts.sum() - len(counts))
    if len(means) < 3 or free < 1:
        value = spearman(x, means) if len(means) > 1 else float("nan")
        return Monotone(None, None, None, Interval(None if np.isnan(value) else value), direction)
    spread = max(float(np.sqrt(sum(((g - g.mean()) ** 2).sum() for g in logs) / free)), 1e-12)
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((_DRAWS, len(means))) / np.sqrt(counts)
    # One draw of the variance for all values: it is pooled.
    scale = np.sqrt(free / rng.chisquare(free, size=(_DRAWS, 1)))
    drawn = means + spread * scale * noise
    steps = np.diff(drawn, axis=1)
    probability = float(max((steps > 0).all(1).mean(), (steps < 0).all(1).mean()))
    null = noise * scale
    p = {}
    for sign in (1, -1):
        observed = _misfit(sign * means[None] / spread, counts)[0]
        p[sign] = float((1 + (_misfit(sign * null, counts) >= observed).sum()) / (1 + _DRAWS))
    order = drawn.argsort(1).argsort(1)  # no ties: the draws are continuous
    ranks = 12 * ((order - order.mean(1, keepdims=True)) * (x - x.mean())).sum(1) / (len(x) ** 3 - len(x))
    return Monotone(probability, p[1], p[-1], _interval(spearman(x, means), ranks), direction)


def _misfit(rows: Array, weights: Array) -> Array:
    """Weighted squared distance ``[R]`` of every row ``[R, V]`` from the nearest non-decreasing one."""
    count = rows.shape[1]
    sums = np.concatenate([np.zeros((len(rows), 1)), (rows * weights).cumsum(1)], 1)
    mass = np.concatenate([[0], weights.cumsum()])
    fitted = np.full_like(rows, -np.inf)
    for i in range(count):  # the largest, over starts, of the smallest, over ends, mean of a stretch around i
        for start in range(i + 1):
            ends = np.arange(i, count) + 1
            means = (sums[:, ends] - sums[:, [start]]) / (mass[ends] - mass[start])
            fitted[:, i] = np.maximum(fitted[:, i], means.min(1))
    return np.asarray((weights * (rows - fitted) ** 2).sum(1))


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
