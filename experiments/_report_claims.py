"""The statements of the convolutional paper, each put to a test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ._report_data import Array, Panel, Results, nets_in, number
from ._report_stats import (
    FEWEST_DIFFERENCE,
    FEWEST_MEDIAN,
    FEWEST_RANK,
    Interval,
    correlation,
    decide,
    decide_sign,
    median,
    monotone,
)
from ._store import RunRecord

#: Above this ‖H_F‖/‖H‖, H is not said to be close to H_O.
_CLOSE = 0.1
#: Above this bound over truth, a bound is said to exceed realistic values significantly.
_LOOSE = 10.0


@dataclass(frozen=True)
class Claim:
    """One statement on one data set: what was estimated, with an interval, and what follows."""

    statement: str
    source: str
    dataset: str
    test: str
    estimate: Interval
    verdict: str
    runs: int
    note: str = ""


_SHAPES = {
    "L": ("is not monotone in the number of layers", False),
    "k": ("is not monotone in the kernel size", False),
    "C": ("is monotone in the number of channels", True),
    "pool_at": ("is monotone in the position of pooling", True),
}


def claims(results: Results) -> list[Claim]:
    """Every statement that the results bear on, data set by data set."""
    found = [c for panel in results.panels if panel.axis in _SHAPES for c in _shape(panel)]
    for dataset in results.datasets:
        runs = results.distinct(dataset)
        found += [*_drivers(dataset, runs), *_dominance(dataset, runs), *_size(dataset, runs)]
    found += [c for panel in results.panels for c in _along(panel)]
    return found


def _shape(panel: Panel) -> Iterator[Claim]:
    """Whether the level of the curve is monotone along the axis."""
    words, wants = _SHAPES[panel.axis]
    groups = panel.scalar("level")
    found = monotone(groups)
    runs = sum(map(len, groups))
    verdict = "undecided" if found.verdict is None else "holds" if found.verdict == wants else "does not hold"
    note = _why_not(groups)
    if found.probability is not None:
        note = (
            f"monotone with probability {found.probability:.2g}; never falling: p = {found.rising:.1g}, "
            f"never rising: p = {found.falling:.1g}"
        )
    test = "rank correlation of the mean level with the axis"
    yield Claim(f"|L(k+1) − L(k)| {words}", _figure(panel), panel.dataset, test, found.rank, verdict, runs, note)


def _why_not(groups: list[Array]) -> str:
    values = sum(bool(len(g)) for g in groups)
    return f"{values} values: at least three are needed" if values < 3 else "one seed: no spread to compare with"


def _figure(panel: Panel) -> str:
    return {"L": "Fig. 1", "k": "Fig. 2", "C": "Fig. 3", "pool_at": "Fig. 4"}[panel.axis]


def _drivers(dataset: str, runs: list[RunRecord]) -> Iterator[Claim]:
    """Does the loss at the optimum, or the Hessian norm, order the nets as the curve does?"""
    found = _columns(runs, "level", "train.loss", "hessian.outer_max")
    if found is None:
        return
    x, (level, loss, norm), groups = found
    if len(x) < 4:
        return
    by_loss, by_norm, difference = correlation(level, groups, loss, norm)
    test = "rank correlation over nets"
    nets = len(set(groups))
    yield Claim(
        "the loss at the optimum orders the nets as |L(k+1) − L(k)| does", "VII", dataset, f"{test}: level, train loss",
        by_loss, decide_sign(by_loss, nets, FEWEST_RANK), len(x), _nets(by_loss, nets, FEWEST_RANK),
    )  # fmt: skip
    yield Claim(
        "the Hessian norm orders the nets as |L(k+1) − L(k)| does", "V, VIII", dataset, f"{test}: level, ‖H_O‖",
        by_norm, decide_sign(by_norm, nets, FEWEST_RANK), len(x), _nets(by_norm, nets, FEWEST_RANK),
    )  # fmt: skip
    yield Claim(
        "the loss at the optimum is the predominant factor", "VII", dataset, "difference of the two correlations",
        difference, decide_sign(difference, nets, FEWEST_DIFFERENCE), len(x),
        _nets(difference, nets, FEWEST_DIFFERENCE),
    )  # fmt: skip


def _dominance(dataset: str, runs: list[RunRecord]) -> Iterator[Claim]:
    """Which part of equation (1) is larger, at every distance."""
    ratios: dict[float, list[tuple[float, str]]] = {}
    for r, net in zip(runs, nets_in(runs), strict=True):
        if "terms_zeroth" not in r.arrays:
            continue
        rest = r.arrays["terms_first"] + r.arrays["terms_second"]
        share = np.median(r.arrays["terms_zeroth"] / np.maximum(rest, np.finfo(float).tiny), axis=0)
        for radius, value in zip(r.arrays["terms_radius"].tolist(), share.tolist(), strict=True):
            ratios.setdefault(radius, []).append((value, net))
    for radius, pairs in sorted(ratios.items()):
        values, nets = zip(*pairs, strict=True)
        found = median(np.array(values), nets)
        yield Claim(
            f"the first part of equation (1) outweighs the others at R = {radius:g}", "VII", dataset,
            "zeroth over first + second term (median)", found, decide(lambda v: v > 1, found), len(values), _few(nets),
        )  # fmt: skip


def _size(dataset: str, runs: list[RunRecord]) -> Iterator[Claim]:
    """H ≈ H_O, and the size of the published bound."""
    found = _columns(runs, "hessian.functional_norm", "hessian.norm")
    if found is not None:
        x, (functional, full), nets = found
        share = median(functional / np.maximum(full, np.finfo(float).tiny), nets)
        yield Claim(
            "H ≈ H_O at the trained point", "eq. (2)", dataset, f"‖H_F‖/‖H‖ (median), below {_CLOSE:g}", share,
            decide(lambda v: v < _CLOSE, share), len(x), _few(nets),
        )  # fmt: skip
    for row, words in (("P0", "the published bound"), ("a3", "the bound from the norms of the layers")):
        found = _columns(runs, f"bounds.{row}.log", "hessian.outer_max")
        if found is None:
            continue
        x, (log, norm), nets = found
        excess = median((log - np.log(norm)) / np.log(10), nets)
        verdict = decide(lambda v: v > np.log10(_LOOSE), excess)
        yield Claim(
            f"{words} ({row}) exceeds realistic values significantly", "VII", dataset,
            "log10 of bound over ‖H_O‖ (median)", excess, verdict, len(x),
            "; ".join(filter(None, [f"significantly: above {_LOOSE:g}×", _few(nets)])),
        )  # fmt: skip


def _along(panel: Panel) -> Iterator[Claim]:
    """Whether ‖H_O‖ follows the published bound along the axis."""
    found = _columns(list(panel), "hessian.outer_max", "bounds.P0.log")
    if found is None or len(panel.values) < 4:
        return
    x, (norm, log), groups = found
    (rank,) = correlation(norm, groups, log)
    nets = len(set(groups))
    yield Claim(
        f"‖H_O‖ follows the published bound along {panel.axis}", "V", panel.dataset, "rank correlation: ‖H_O‖, P0",
        rank, decide_sign(rank, nets, FEWEST_RANK), len(x), _nets(rank, nets, FEWEST_RANK),
    )  # fmt: skip


def _nets(found: Interval, nets: int, fewest: int) -> str:
    """How many networks a correlation is of, and whether they are enough to decide it."""
    if nets < fewest:
        return f"{nets} nets: at least {fewest} are needed"
    return f"{nets} nets" + ("" if found.p is None else f"; permutation test: p = {found.p:.1g}")


def _few(nets: Sequence[str]) -> str:
    count = len(set(nets))
    return "" if count >= FEWEST_MEDIAN else f"{count} nets: at least {FEWEST_MEDIAN} are needed"


def _columns(runs: list[RunRecord], *paths: str) -> tuple[Array, list[Array], list[str]] | None:
    """Runs that have all of these numbers: their positions, the numbers, and their nets."""
    rows = [[number(r.scalars, p) for p in paths] for r in runs]
    good = [i for i, row in enumerate(rows) if all(v is not None for v in row)]
    if not good:
        return None
    columns = np.array([rows[i] for i in good], dtype=np.float64)
    if "hessian.outer_max" in paths:
        positive = columns[:, paths.index("hessian.outer_max")] > 0
        good, columns = [i for i, keep in zip(good, positive, strict=True) if keep], columns[positive]
        if not good:
            return None
    return np.arange(len(good)), list(columns.T), nets_in(runs[i] for i in good)
