"""Figures of a report: the paper's four, the Hessian beside its bounds, predictions beside measurements."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from dagh.errors import DaghError

from ._datasets import MissingPackageError
from ._report_data import Array, Panel, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_H_O = r"$\Vert H_O\Vert$"
_INK, _SOFT = "#1f2937", "#6b7280"
#: The ladder from the loosest to the truth: row, color, what it is.
_LADDER = (
    ("P0", "#b91c1c", "as published (P0)"),
    ("P1", "#ea580c", "corrected (P1)"),
    ("a3", "#ca8a04", "weights alone (a3)"),
    ("b0", "#65a30d", "one forward pass (b0)"),
    ("b2", "#0d9488", "Jacobians of layers (b2)"),
    ("b3", "#2563eb", "parameter Jacobians (b3)"),
)


def draw(panel: Panel) -> Iterator[tuple[str, str, Figure]]:
    """Name, caption and figure of everything there is to draw for one axis on one data set.

    Raises :class:`MissingPackageError` without matplotlib.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("a report needs matplotlib; pip install 'dagh[plot]'") from error
    for kind, make in (("curves", _curves), ("hessian", _hessian), ("terms", _terms)):
        try:
            made = make(panel)
        except DaghError:
            raise
        if made is not None:
            yield f"{kind}-{panel.name}", _CAPTIONS[kind].format(label=panel.label, dataset=panel.dataset), made


_CAPTIONS = {
    "curves": "Mean |L(k+1) − L(k)| over random orders against k, {label}, {dataset}. Left: exponentially smoothed as "
    "in the paper. Middle: as measured, with a band from the smallest to the largest seed; with one seed, the 95 % "
    "bootstrap band of its mean over orders. Right: the level of the "
    "curve, (k+1)|L(k+1) − L(k)| over the last half of k, one dot per seed.",
    "hessian": "The Hessian at the trained point against {label}, {dataset}. Left: norms, one dot per seed. Right: "
    "bounds on ‖H_O‖, and ‖H_O‖ itself; geometric means over seeds.",
    "terms": "Predicted and measured differences around the trained point, {label}, {dataset}. Left: single "
    "differences, |second-order prediction| against |measurement|, every order and direction on its own. Right: mean "
    "absolute values of the terms against the distance R, at the middle k, geometric means over all runs.",
}


def _figure(columns: int, wide: float = 4.0) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(wide * columns, 3.6), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(_SOFT)
        ax.tick_params(colors=_SOFT, labelcolor=_INK, labelsize=8)
        ax.grid(True, which="major", color="#e5e7eb", linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, list(axes)


def _titled(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=9.5, color=_INK, loc="left")
    ax.set_xlabel(x, fontsize=8.5, color=_INK)
    ax.set_ylabel(y, fontsize=8.5, color=_INK)


def _colors(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](v) for v in np.linspace(0.0, 0.88, max(count, 1))]


def curves_of(panel: Panel, name: str) -> dict[str, tuple[Array, Array]]:
    """``k`` and the mean over seeds of one array of the curve, per value; runs of another length are left out."""
    found = {}
    for value, runs in panel.runs.items():
        arrays = [(r.arrays["k"], r.arrays[name]) for r in runs if name in r.arrays and "k" in r.arrays]
        if arrays:
            k = arrays[0][0]
            found[value] = k, np.mean([a for ks, a in arrays if np.array_equal(ks, k)], axis=0)
    return found


def band_of(panel: Panel) -> dict[str, tuple[Array, Array]]:
    """Lower and upper end around the mean curve, per value: over several seeds theirs, else that of the orders."""
    found = {}
    for value, runs in panel.runs.items():
        arrays = [r.arrays for r in runs if "mean" in r.arrays and "k" in r.arrays]
        alike = [a for a in arrays if np.array_equal(a["k"], arrays[0]["k"])]
        if len(alike) > 1:
            rows = np.array([a["mean"] for a in alike])
            found[value] = rows.min(0), rows.max(0)
        elif alike and "boot_lo" in alike[0] and "boot_hi" in alike[0]:
            found[value] = alike[0]["boot_lo"], alike[0]["boot_hi"]
    return found


def spaced(k: Array, count: int) -> Array:
    """Positions of about ``count`` geometrically spaced k, the first and the last among them."""
    wanted = np.geomspace(k[0], k[-1], count)
    return np.unique(np.searchsorted(k, wanted).clip(max=len(k) - 1))


def _curves(panel: Panel) -> Figure | None:
    smooth, raw = curves_of(panel, "smooth"), curves_of(panel, "mean")
    if not raw:
        return None
    bands = band_of(panel)
    figure, (left, middle, right) = _figure(3)
    colors = dict(zip(panel.values, _colors(len(panel.values)), strict=True))
    for value in panel.values:
        if value in smooth:
            k, mean = smooth[value]
            some = spaced(k, 300)
            left.plot(k[some], mean[some], color=colors[value], linewidth=1.3, label=value)
        if value in raw:
            k, mean = raw[value]
            some = spaced(k, 160)
            middle.plot(k[some], mean[some], color=colors[value], linewidth=0.8)
            if value in bands:
                low, high = bands[value]
                middle.fill_between(k[some], low[some], high[some], color=colors[value], alpha=0.2, linewidth=0)
    for ax in (left, middle):
        ax.set_xscale("log")
        ax.set_yscale("log")
    _titled(left, "smoothed, as in the paper", "samples k", "mean |L(k+1) − L(k)|")
    _titled(middle, "as measured", "samples k", "")
    legend = left.legend(title=panel.label, fontsize=7.5, title_fontsize=7.5, frameon=False, ncols=2, loc="lower left")
    legend.get_title().set_color(_INK)
    _dots(right, panel, [("level", "#334155", "")])
    _titled(right, "level of the curve", panel.label, "(k+1) |L(k+1) − L(k)|")
    return figure


def _dots(ax: Axes, panel: Panel, series: list[tuple[str, str, str]]) -> None:
    """One dot per run and a line through the geometric means, on a logarithmic axis."""
    x = panel.positions
    width = 0.04 * (x.max() - x.min() or 1.0) / max(len(series), 1)
    for i, (path, color, label) in enumerate(series):
        groups = [g[g > 0] for g in panel.scalar(path)]
        kept = [j for j, g in enumerate(groups) if len(g)]
        if not kept:
            continue
        shift = (i - (len(series) - 1) / 2) * width
        for j in kept:
            ax.plot(
                np.full(len(groups[j]), x[j] + shift),
                groups[j],
                "o",
                color=color,
                markersize=3.2,
                alpha=0.7,
                markeredgewidth=0,
            )
        means = [float(np.exp(np.log(groups[j]).mean())) for j in kept]
        ax.plot(x[kept] + shift, means, color=color, linewidth=1.1, label=label or None)
    _ticks(ax, panel)
    _log(ax)


def _log(ax: Axes) -> None:
    """A logarithmic axis whose ticks can be read over less than a decade, too."""
    from matplotlib.ticker import LogLocator, NullFormatter

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high < 100 * low:
        if high < 3 * low:
            middle, half = (low * high) ** 0.5, (high / low) ** 0.5
            ax.set_ylim(middle / max(half, 3**0.5), middle * max(half, 3**0.5))
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        ax.yaxis.set_major_formatter(lambda v, _: f"{v:.3g}")
    ax.yaxis.set_minor_formatter(NullFormatter())


def _ticks(ax: Axes, panel: Panel) -> None:
    ax.set_xticks(panel.positions, panel.values)
    ax.minorticks_off()


def _hessian(panel: Panel) -> Figure | None:
    if not any(len(g) for g in panel.scalar("hessian.outer_max")):
        return None
    from matplotlib.ticker import MaxNLocator

    figure, (left, right) = _figure(2, 5.0)
    _dots(
        left, panel,
        [
            ("hessian.outer_max", "#2563eb", _H_O), ("hessian.norm", "#111827", r"$\Vert H\Vert$"),
            ("hessian.functional_norm", "#dc2626", r"$\Vert H_F\Vert$"),
            ("gradient_norm", "#9ca3af", r"$\Vert\nabla L\Vert$"),
        ],
    )  # fmt: skip
    low, high = left.get_ylim()
    left.set_ylim(low, high * (high / low) ** 0.12)  # room for the legend
    left.legend(fontsize=7.5, frameon=False, ncols=4, loc="upper left")
    _titled(left, "measured", panel.label, "norm")
    x = panel.positions
    for row, color, label in _LADDER:
        groups = panel.scalar(f"bounds.{row}.log")
        kept = [j for j, g in enumerate(groups) if len(g)]
        if kept:
            log10 = np.array([groups[j].mean() for j in kept]) / np.log(10)
            right.plot(x[kept], log10, "o-", color=color, markersize=3, linewidth=1.1, label=label)
    groups = [g[g > 0] for g in panel.scalar("hessian.outer_max")]
    kept = [j for j, g in enumerate(groups) if len(g)]
    truth = [float(np.log10(groups[j]).mean()) for j in kept]
    right.plot(x[kept], truth, "s-", color=_INK, markersize=3.5, linewidth=1.6, label=f"{_H_O}, exact")
    _ticks(right, panel)
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    right.yaxis.set_major_formatter(lambda v, _: f"$10^{{{v:g}}}$")
    right.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _titled(right, "beside its bounds", panel.label, f"bound on {_H_O}")
    return figure


def _terms(panel: Panel) -> Figure | None:
    runs = [r for r in panel if "terms_pairs_measured" in r.arrays and "terms_measured" in r.arrays]
    if not runs:
        return None
    axes = ("terms_radius", "terms_k")
    runs = [r for r in runs if all(np.array_equal(r.arrays[a], runs[0].arrays[a]) for a in axes)]
    radii = runs[0].arrays["terms_radius"]
    figure, (left, right) = _figure(2, 5.0)
    for i, color in zip(range(len(radii)), _colors(len(radii)), strict=True):
        found = [np.abs(r.arrays[f"terms_pairs_{n}"][:, i].ravel()) for n in ("predicted", "measured") for r in runs]
        predicted, measured = np.concatenate(found[: len(runs)]), np.concatenate(found[len(runs) :])
        step = max(1, len(predicted) // 1500)
        left.plot(
            predicted[::step], measured[::step], ".", color=color, markersize=2.4, alpha=0.5, markeredgewidth=0,
            label=f"R = {radii[i]:g}", rasterized=True,
        )  # fmt: skip
    left.set_xscale("log")
    left.set_yscale("log")
    ends = [max(left.get_xlim()[0], left.get_ylim()[0]), min(left.get_xlim()[1], left.get_ylim()[1])]
    left.plot(ends, ends, color=_SOFT, linewidth=0.8, zorder=0)
    left.legend(fontsize=7.5, frameon=False, markerscale=4, loc="upper left")
    _titled(left, "prediction and measurement", "|predicted|", "|measured|")
    middle = len(runs[0].arrays["terms_k"]) // 2
    k = int(runs[0].arrays["terms_k"][middle])
    for name, color, label, style in (
        ("measured", _INK, "measured", "-"), ("zeroth", "#2563eb", "zeroth", "-"), ("first", "#0d9488", "first", "-"),
        ("second", "#ca8a04", "second, $H$", "-"), ("second_outer", "#ca8a04", "second, $H_O$", ":"),
        ("remainder", "#dc2626", "remainder", "--"),
    ):  # fmt: skip
        rows = np.array([r.arrays[f"terms_{name}"][middle] for r in runs])
        means = np.exp(np.log(np.maximum(rows, 1e-300)).mean(0))
        right.plot(radii, means, style, color=color, marker="o", markersize=3, linewidth=1.2, label=label)
    right.set_xscale("log")
    right.set_yscale("log")
    right.legend(fontsize=7.5, frameon=False, ncols=2, loc="lower right")
    _titled(right, f"terms at k = {k}", "R = ‖θ − θ*‖", "mean absolute value")
    return figure


def norm_ratio(panel: Panel, row: str) -> list[Array]:
    """log10 of a bound over ‖H_O‖, per value."""
    found = []
    for runs in panel.runs.values():
        pairs = [(number(r.scalars, f"bounds.{row}.log"), number(r.scalars, "hessian.outer_max")) for r in runs]
        found.append(
            np.array([(b - np.log(t)) / np.log(10) for b, t in pairs if b is not None and t is not None and t > 0])
        )
    return found
