"""Rank correlations and monotonicity, with intervals that say how much the seeds allow to claim."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_DRAWS = 4000
#: Networks from which on there are intervals of correlations, and of medians.
_FEWEST, FEWEST_MEDIAN = 4, 6
#: Networks from which on a correlation, and a difference of two, can be decided: fewer have no p-value below 5 %.
FEWEST_RANK, FEWEST_DIFFERENCE = 5, 7
#: Up to so many rearrangements all of them are tried, then so many random ones.
_ALL, _SOME = 5040, 4999


def _ranks(values: Any) -> Array:
    """Ranks from 1 on, ties by their mean."""
    from scipy.stats import rankdata  # it takes most of a second to import, and sweeps do not need it

    return np.asarray(rankdata(values))


@dataclass(frozen=True)
class Interval:
    """An estimate with a 95 % interval; ``None`` where there is too little to estimate from.

    ``p`` is the two-sided p-value of the permutation test of a correlation, or of a difference of two.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "–"
        if self.low is None or self.high is None:
            return f"{self.value:.3g}"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def spearman(x: Array, y: Array) -> float:
    """Spearman's rank correlation; NaN where one of them is constant."""
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale else float("nan")


def correlation(x: Array, groups: Sequence[Any], *ys: Array, seed: int = 0) -> list[Interval]:
    """Rank correlations of ``x`` with each of ``ys``, and of the last column: that of the first minus the second.

    Intervals by resampling whole groups (networks of one shape), so that seeds of one network do not count as
    independent evidence; p-values by exchanging groups. With fewer than four groups there are neither.
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
    across, *others = (_scores(np.array([_ranks(v)[rows].mean() for rows in index])) for v in (x, *ys))
    p = [_permuted(across, other, rng) for other in others]
    p += [_swapped(across, others[0], others[1], rng)] if len(others) == 2 else []
    return [replace(_interval(v, column), p=q) for v, column, q in zip(point, draws.T, p, strict=True)]


def _scores(values: Array) -> Array:
    """Ranks of the groups, centred and of length one; zero where all are alike."""
    ranks = _ranks(values)
    ranks = ranks - ranks.mean()
    return np.asarray(ranks / max(float(np.linalg.norm(ranks)), 1e-12))


def _permuted(x: Array, y: Array, rng: np.random.Generator) -> float:
    """Two-sided p-value of the correlation of the groups when y is as likely in any other order."""
    count = len(x)
    whole = math.factorial(count) <= _ALL
    orders = list(permutations(range(count))) if whole else [rng.permutation(count) for _ in range(_SOME)]
    return _share(np.abs(y[np.array(orders)] @ x), abs(float(y @ x)), whole)


def _swapped(x: Array, one: Array, two: Array, rng: np.random.Generator) -> float:
    """Two-sided p-value of the difference of the correlations when each group's two ranks may as well be exchanged."""
    count = len(x)
    whole = 2**count <= _ALL
    swaps = np.array(list(product((False, True), repeat=count))) if whole else rng.random((_SOME, count)) < 0.5
    first, second = (np.where(swaps, a, b) for a, b in ((two, one), (one, two)))
    found = np.abs(_correlations(first, x) - _correlations(second, x))
    return _share(found, abs(float(_correlations(one[None], x)[0] - _correlations(two[None], x)[0])), whole)


def _correlations(rows: Array, x: Array) -> Array:
    rows = rows - rows.mean(1, keepdims=True)
    return np.asarray(rows @ x / np.maximum(np.linalg.norm(rows, axis=1), 1e-12))


def _share(found: Array, observed: float, whole: bool) -> float:
    """How often a rearrangement is as extreme as what was seen; a random sample of them counts that, too."""
    count = int((found >= observed - 1e-9).sum())
    return count / len(found) if whole else (1 + count) / (1 + len(found))


def median(values: Array, groups: Sequence[Any], seed: int = 0) -> Interval:
    """Median over groups (networks of one shape) of their medians, with an interval by resampling at least six."""
    names = list(dict.fromkeys(groups))
    means = np.array([np.median([v for v, g in zip(values, groups, strict=True) if g == name]) for name in names])
    if len(means) < FEWEST_MEDIAN:
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


def decide_sign(interval: Interval, nets: int, fewest: int) -> str:
    """``"holds"`` where a correlation is positive, ``"does not hold"`` where negative: by the interval and by the
    permutation test at 5 %, of at least ``fewest`` networks; an interval that touches 0 leaves it undecided.
    """
    if nets < fewest or interval.p is None or interval.p >= 0.05 or interval.low is None or interval.high is None:
        return "undecided"
    return "holds" if interval.low > 0 else "does not hold" if interval.high < 0 else "undecided"
