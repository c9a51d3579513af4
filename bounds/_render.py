"""A report as a table, LaTeX, HTML and a picture."""

from __future__ import annotations

import html as markup
import math
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dagh._pictures import check_picture
from dagh.errors import FileFormatError, ReductionError

from ._logs import text

if TYPE_CHECKING:
    from ._report import BoundReport

_STYLE = {"printed": "yellow", "corrected": "cyan", "ours": ""}
_PARTS = {"H_O": "‖H_O‖", "H_F": "‖H_F‖", "H": "‖H‖"}


def heading(report: BoundReport) -> str:
    """One line about what the bounds are about."""
    info = report.info
    data = f"{info['samples']} samples" if info["samples"] else "weights only"
    ball = f", R = {info['radius']:g}" if info["radius"] is not None else ""
    return (
        f"{report.model}: {info['parameters']:,} parameters, {info['loss']}, {data}, "
        f"‖x‖ ≤ {info['input_norm']:.4g} ({info['input_norm_from']}){ball}"
    )


def table(report: BoundReport, layers: bool = False) -> RenderableType:
    """The rows with a value by part, then the reasons of the others."""
    parts: list[RenderableType] = [Text(heading(report), style="bold"), Text()]
    out = Table(box=None, pad_edge=False)
    out.add_column("bound", no_wrap=True)
    out.add_column("of", no_wrap=True)
    for head in ("value", "× truth"):
        out.add_column(head, justify="right", no_wrap=True)
    out.add_column("needs", no_wrap=True)
    out.add_column("origin", no_wrap=True)
    out.add_column("statement", overflow="fold")
    last = None
    for row in report.present:
        if last is not None and row.part != last:
            out.add_row()
        last = row.part
        ratio = "" if row.log_ratio is None else text(row.log_ratio)
        out.add_row(
            row.id, _PARTS[row.part], text(row.log_value), ratio, row.needs, row.origin, row.statement,
            style=_STYLE[row.origin],
        )  # fmt: skip
    parts.append(out)
    if layers:
        parts += [Text(), _layers(report)]
    if report.absent:
        parts += [Text(), Text("Absent", style="bold")]
        grouped: dict[str, list[str]] = {}
        for row in report.absent:
            grouped.setdefault(row.reason or "", []).append(row.id)
        reasons = Table.grid(padding=(0, 2, 0, 0))
        reasons.add_column(overflow="fold")
        reasons.add_column(overflow="fold", style="dim")
        for reason, ids in grouped.items():
            reasons.add_row(", ".join(ids), reason)
        parts.append(reasons)
    return Group(*parts)


def _layers(report: BoundReport) -> RenderableType:
    rows = [row for row in report.present if row.per_layer]
    out = Table(box=None, pad_edge=False)
    out.add_column("parameter")
    for row in rows:
        out.add_column(row.id, justify="right", no_wrap=True)
    names = list(dict.fromkeys(name for row in rows for name in row.per_layer))
    for name in names:
        out.add_row(name, *(text(row.per_layer[name]) if name in row.per_layer else "" for row in rows))
    return out


def plain(report: BoundReport, layers: bool = False) -> str:
    """The table without colors."""
    console = Console(file=StringIO(), width=110, no_color=True, highlight=False, force_terminal=False)
    console.print(table(report, layers))
    assert isinstance(console.file, StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


# -- LaTeX -----------------------------------------------------------------------------------------

_TEX_PARTS = {"H_O": r"$\|H_O\|$", "H_F": r"$\|H_F\|$", "H": r"$\|H\|$"}


def latex(report: BoundReport) -> str:
    """A ``tabular`` of the rows with a value; needs the package booktabs."""
    lines = [
        r"\begin{tabular}{lllrr}", r"\toprule", r"bound & of & needs & value & $\times$ truth \\", r"\midrule"
    ]  # fmt: skip
    last = None
    for row in report.present:
        if last is not None and row.part != last:
            lines.append(r"\midrule")
        last = row.part
        name = row.id.replace("_", r"\_")
        cells = (name, _TEX_PARTS[row.part], row.needs, _tex(row.log_value), _tex(row.log_ratio))
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _tex(value: float | None) -> str:
    if value is None:
        return "--"
    shown = text(value)
    if "e" in shown:
        mantissa, exponent = shown.split("e")
        return rf"${mantissa} \cdot 10^{{{int(exponent)}}}$"
    return f"${shown}$"


# -- HTML ------------------------------------------------------------------------------------------

_CSS = """
.dagh-bounds{font:14px/1.45 system-ui,sans-serif;color:#1b1f24;max-width:64rem}
.dagh-bounds table{border-collapse:collapse;width:100%;margin:.6rem 0 1rem}
.dagh-bounds th{text-align:left;border-bottom:2px solid #1b1f24;padding:.25rem .6rem .25rem 0}
.dagh-bounds td{border-bottom:1px solid #e3e6ea;padding:.25rem .6rem .25rem 0;vertical-align:top}
.dagh-bounds .n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.dagh-bounds .id{font-family:ui-monospace,monospace;white-space:nowrap}
.dagh-bounds .printed .id{color:#9a6700}.dagh-bounds .corrected .id{color:#0969da}
.dagh-bounds small{color:#59636e}
""".strip()


def html(report: BoundReport) -> str:
    """A table with its own style, to stand alone or inside a page."""
    escape = markup.escape
    body = []
    for row in report.present:
        ratio = "" if row.log_ratio is None else text(row.log_ratio)
        verdict = f"<br><small>{escape(row.verdict)}</small>" if row.verdict else ""
        body.append(
            f'<tr class="{row.origin}"><td class="id">{escape(row.id)}</td><td>{_PARTS[row.part]}</td>'
            f'<td class="n">{text(row.log_value)}</td><td class="n">{ratio}</td><td>{row.needs}</td>'
            f"<td>{escape(row.statement)}: {escape(row.text)}{verdict}</td></tr>"
        )
    absent = "".join(
        f'<tr><td class="id">{escape(row.id)}</td><td>{escape(row.reason or "")}</td></tr>' for row in report.absent
    )
    rest = f"<p><strong>Absent</strong></p><table>{absent}</table>" if absent else ""
    return (
        f'<div class="dagh-bounds"><style>{_CSS}</style><p><strong>{escape(heading(report))}</strong></p><table>'
        '<tr><th>bound</th><th>of</th><th class="n">value</th><th class="n">× truth</th><th>needs</th>'
        f"<th>statement</th></tr>{''.join(body)}</table>{rest}</div>"
    )


# -- picture ---------------------------------------------------------------------------------------

_COLORS = {"printed": "#bf8700", "corrected": "#0969da", "ours": "#1a7f37"}


def plot(report: BoundReport, path: str | Path, part: str = "H_O") -> None:
    """The ladder of one part on a logarithmic axis."""
    check_picture(Path(path))
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ReductionError("plot needs matplotlib: pip install 'dagh[plot]'") from None
    rows = [row for row in report.present if row.part == part and row.log_value != -math.inf]
    if not rows:
        raise ReductionError(f"no bound on {part} has a value")
    figure = Figure(figsize=(6.4, 0.6 + 0.27 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    decimals = [float(row.log_value or 0) / math.log(10) for row in rows]
    low = min(0.0, *decimals) - 0.5
    for index, (row, value) in enumerate(zip(rows, decimals, strict=True)):
        color = "black" if row.needs == "exact" and row.id in ("c", "F_exact", "H.exact") else _COLORS[row.origin]
        axes.plot([low, value], [index, index], color=color, linewidth=1.2, alpha=0.5, zorder=1)
        axes.plot(value, index, "o", color=color, markersize=5, zorder=2)
        axes.annotate(text(row.log_value, 2), (value, index), xytext=(7, 0), textcoords="offset points",
                      va="center", fontsize=8)  # fmt: skip
    axes.set_yticks(range(len(rows)), [row.id for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(low, max(decimals) + 0.14 * (max(decimals) - low) + 0.5)
    axes.set_xlabel(f"log₁₀ of the bound on {_PARTS[part]}")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for origin in dict.fromkeys(row.origin for row in rows):
        axes.plot([], [], "o", color=_COLORS[origin], label=origin)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    try:
        figure.savefig(Path(path), dpi=160)
    except OSError as error:
        raise FileFormatError(f"cannot write {path}: {error.strerror or error}") from None
