"""Pictures of the rows: scaling curves, and every tool in every case."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.cases import CASES, CURVES, GOALS, Goal, parameter_count
from benchmarks.tables import Comparison, compare, digits, floor_seconds, marks, mebibytes, seconds
from benchmarks.tools import TOOLS

Row = dict[str, Any]

OWN = "#c1121f"
INK, FAINT, GRID = "#22262b", "#6b7280", "#e4e7eb"
#: Colors that stay apart for color-blind readers (after Okabe and Ito), one marker each.
STYLE: dict[str, tuple[str, str]] = {
    "dagh": (OWN, "o"),
    "torch_hessian": ("#56b4e9", "P"),
    "torch_jvp": ("#0072b2", "s"),
    "torch_vjp": ("#009e73", "^"),
    "torch_loop": ("#7a7a7a", "v"),
    "torch_double": ("#b8b8b8", "v"),
    "torch_jac": ("#0072b2", "D"),
    "jax_hessian": ("#f0c808", "P"),
    "jax_jvp": ("#e69f00", "s"),
    "jax_jac": ("#e69f00", "D"),
    "curvlinops": ("#cc79a7", "X"),
    "backpack": ("#8c564b", "h"),
    "nngeometry": ("#5c4b8a", "p"),
}
LOOK = {
    "font.size": 9.5,
    "font.family": "sans-serif",
    "axes.edgecolor": "#9aa1a9",
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "text.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "dagh",
    "figure.facecolor": "white",
}
#: Titles that fit over a panel.
SHORT = {
    "hessian": "Full Hessian",
    "ggn": "Gauss–Newton H_O",
    "blocks": "Diagonal blocks",
    "diagonal": "Exact diagonal",
    "pair": "Off-diagonal block",
    "products": "50 products H @ v",
}


def write(rows: Iterable[Row], environment: Row, dtype: str, stem: Path) -> list[Path]:
    """PNG and SVG of every picture that the rows suffice for."""
    rows = [r for r in rows if r["dtype"] == dtype]
    made = {"tools": tools_figure(rows, environment, dtype), "scaling": scaling_figure(rows, environment)}
    paths = []
    for name, figure in made.items():
        if figure is None:
            continue
        for suffix in (".png", ".svg"):
            path = stem.with_name(f"{stem.name}-{name}{suffix}")
            metadata = {"Date": None} if suffix == ".svg" else {"Software": None}
            figure.savefig(path, dpi=160, bbox_inches="tight", pad_inches=0.12, metadata=metadata)
            paths.append(path)
        plt.close(figure)
    return paths


# -- scaling -----------------------------------------------------------------------------------------------------------


def _axis_value(curve: str, case: str, samples: int) -> float:
    if curve == "P":
        return parameter_count(CASES[case])
    return samples if curve == "N" else float(case.rpartition("_")[2])


def scaling_figure(rows: list[Row], environment: Row) -> Figure | None:
    """Time (above) and memory (below) against P, N and depth, on logarithmic axes."""
    at = {(r["case"], r["N"], r["tool"]): r for r in rows if r["task"] == "hessian"}
    drawn = {
        curve: points
        for curve, (_, points) in CURVES.items()
        if sum((case, n, "dagh") in at for case, n in points) >= 2
    }
    if not drawn:
        return None
    with mpl.rc_context(LOOK):
        width = 1.2 + 3.35 * len(drawn)
        figure, axes = plt.subplots(2, len(drawn), figsize=(width, 6.6), squeeze=False, sharex="col", sharey="row")
        tools: dict[str, None] = {}
        some_floor = False
        for column, (curve, points) in enumerate(drawn.items()):
            above, below = axes[0, column], axes[1, column]
            xs = [_axis_value(curve, case, n) for case, n in points]
            for tool in TOOLS:
                found = [
                    (x, at[case, n, tool]) for x, (case, n) in zip(xs, points, strict=True) if (case, n, tool) in at
                ]
                found = [(x, r) for x, r in found if r["status"] == "ok"]
                if len(found) > 1:
                    tools[tool] = None
                    _curve(above, tool, found, "seconds")
                    _curve(below, tool, found, "work_MiB")
            some_floor |= _floors(above, below, xs, points, at, environment)
            _log_axes(above, below, xs)
            below.set_xlabel(CURVES[curve][0])
        axes[0, 0].set_ylabel("time of a full Hessian")
        axes[1, 0].set_ylabel("memory of a call")
        for axis in axes[0]:
            axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _tick(seconds(v))))
        for axis in axes[1]:
            axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _tick(mebibytes(v))))
        handles = [_handle(t) for t in tools]
        handles.append(_hollow())
        if some_floor:
            handles.append(Line2D([], [], color=OWN, ls=":", lw=1.3, label="floor of dagh's plan"))
        handles.append(Line2D([], [], color=FAINT, ls=(0, (1, 2)), lw=1.3, label="the P × P result itself"))
        figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=min(4, len(handles)))
        figure.suptitle("Exact Hessians: time and memory", fontsize=13, fontweight="bold", x=0.02, ha="left")
        figure.tight_layout(rect=(0, 0.01, 1, 0.99))
    return figure


def _tick(text: str) -> str:
    """``1.00 s`` as ``1 s``."""
    number, _, unit = text.partition(" ")
    return f"{float(number):g} {unit}"


def _curve(axis: Axes, tool: str, found: list[tuple[float, Row]], field: str) -> None:
    """A line through all points; those that are extrapolated have an open marker."""
    color, marker = STYLE[tool]
    own = tool == "dagh"
    xs = [x for x, _ in found]
    ys = [max(r[field], 1e-9 if field == "seconds" else 0.3) for _, r in found]
    axis.plot(xs, ys, color=color, lw=2.4 if own else 1.3, alpha=1 if own else 0.85, zorder=5 if own else 3)
    for (x, r), y in zip(found, ys, strict=True):
        hollow = "extrapolated" in r.get("flags", [])
        axis.plot(
            [x], [y], marker, color=color, ms=6 if own else 5, mfc="white" if hollow else color, mew=1.2, zorder=6
        )


def _floors(
    above: Axes, below: Axes, xs: list[float], points: list[tuple[str, int]], at: dict[Any, Row], environment: Row
) -> bool:
    floors = [
        (x, floor_seconds(at.get((case, n, "dagh")), environment)) for x, (case, n) in zip(xs, points, strict=True)
    ]
    known = [(x, f) for x, f in floors if f]
    if known:
        above.plot(*zip(*known, strict=True), color=OWN, ls=":", lw=1.3, zorder=4)
    size = 4 if all(r["dtype"] == "float32" for r in at.values()) else 8
    result = [parameter_count(CASES[case]) ** 2 * size / 2**20 for case, _ in points]
    below.plot(xs, result, color=FAINT, ls=(0, (1, 2)), lw=1.3, zorder=2)
    return bool(known)


def _log_axes(above: Axes, below: Axes, xs: list[float]) -> None:
    for axis in (above, below):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(numticks=12))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(which="minor", length=0)
        axis.set_xticks(xs, [f"{x / 1e3:.1f}k" if x >= 1e4 else f"{x:g}" for x in xs])
        axis.minorticks_off()


def _handle(tool: str) -> Line2D:
    color, marker = STYLE[tool]
    width, size = (2.4, 6) if tool == "dagh" else (1.3, 5)
    return Line2D([], [], color=color, marker=marker, lw=width, ms=size, label=TOOLS[tool].label)


def _hollow() -> Line2D:
    return Line2D([], [], color=FAINT, marker="o", mfc="white", ls="", label="scaled from part of the columns")


# -- every tool --------------------------------------------------------------------------------------------------------


def tools_figure(rows: list[Row], environment: Row, dtype: str) -> Figure | None:
    """One panel per task, one line per network, a point for the time of every tool; the floor as a tick."""
    at = {(r["task"], r["case"], r["N"], r["tool"]): r for r in rows}
    panels: dict[str, list[Goal]] = {}
    for goal in GOALS:
        if any((goal.task, goal.case, goal.samples, t) in at for t in TOOLS):
            panels.setdefault(goal.task, []).append(goal)
    if not panels:
        return None
    heights = [len(p) for p in panels.values()]
    with mpl.rc_context(LOOK | {"axes.grid.axis": "x"}):
        figure, axes = plt.subplots(
            len(panels),
            1,
            figsize=(9.2, 1.6 + 0.36 * sum(heights) + 0.55 * len(panels)),
            sharex=True,
            squeeze=False,
            height_ratios=[h + 0.6 for h in heights],
        )
        used: dict[str, None] = {}
        some_floor = False
        for axis, (task, cases) in zip(axes[:, 0], panels.items(), strict=True):
            for y, goal in enumerate(cases):
                found = {t: at.get((task, goal.case, goal.samples, t)) for t in TOOLS}
                right = {t: r for t, r in found.items() if r and r["status"] == "ok"}
                _line(axis, y, right, compare(goal, right.values(), environment, dtype))
                used |= dict.fromkeys(right)
                if floor := floor_seconds(right.get("dagh"), environment):
                    axis.plot([floor], [y], "|", color=OWN, ms=13, mew=1.6, zorder=4)
                    some_floor = True
            axis.set_yticks(range(len(cases)), [f"{g.case}, N={g.samples}" for g in cases], color=INK)
            axis.set_ylim(len(cases) - 0.4, -0.6)
            axis.set_title(SHORT[task], loc="left", pad=4)
            axis.set_xscale("log")
            axis.spines["left"].set_visible(False)
            axis.tick_params(axis="y", length=0)
            axis.xaxis.set_major_locator(LogLocator(numticks=12))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _tick(seconds(v))))
            axis.minorticks_off()
        low, high = axes[0, 0].get_xlim()
        axes[0, 0].set_xlim(low, high * 2.2)  # room for the ratio
        handles = [_handle(t) for t in TOOLS if t in used]
        handles.append(_hollow())
        if some_floor:
            handles.append(Line2D([], [], color=OWN, marker="|", ms=12, mew=1.6, ls="", label="floor of dagh's plan"))
        for handle in handles:
            handle.set_linestyle("")
        figure.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3)
        title = "Time to the finished result; the number is the fastest peer over dagh"
        figure.suptitle(title, fontsize=12, fontweight="bold", x=0.02, ha="left")
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.12 / figure.get_figheight()), h_pad=0.9)
    return figure


def _line(axis: Axes, y: float, right: dict[str, Row], found: Comparison) -> None:
    """The tools of one case; the distance from dagh to the fastest peer is drawn and written."""
    if found.ratio and found.own and found.peer:
        shade = OWN if found.ratio > 1 else FAINT
        ends = [found.own["seconds"], found.peer["seconds"]]
        axis.plot(ends, [y, y], color=shade, lw=3, alpha=0.22, solid_capstyle="butt", zorder=2)
        number = digits(found.ratio) if found.ratio < 100 else f"{found.ratio:.0f}"
        axis.annotate(
            f"{marks(found.peer)[0]}{number}×",
            (max(r["seconds"] for r in right.values()), y),
            (9, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=shade,
            fontweight="bold",
        )
    for tool, row in right.items():
        color, marker = STYLE[tool]
        own_tool, hollow = tool == "dagh", "extrapolated" in row.get("flags", [])
        axis.plot(
            [row["seconds"]],
            [y],
            marker,
            color=color,
            mfc="white" if hollow else color,
            ms=8 if own_tool else 6,
            mew=1.3,
            zorder=6 if own_tool else 5,
        )
