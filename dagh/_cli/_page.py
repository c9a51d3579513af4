"""The report as one self-contained HTML page."""

from __future__ import annotations

from html import escape
from math import log10

from dagh._blockview import MEANINGS, SYMBOLS, shorten
from dagh._cli._blocks import BlockTable
from dagh._cli._report import Report
from dagh._export_html import SCRIPT, STYLE, node_table
from dagh._version import __version__

_PAGE_ROWS = 64

_STYLE = """
:root{color-scheme:light dark}
body{margin:0;background:#eef1f5}
@media(prefers-color-scheme:dark){body{background:#0f151c}}
.page{max-width:1080px;margin:0 auto;padding:28px 20px 56px}
.page h1{font-size:24px;margin:0 0 2px;letter-spacing:-.01em}
.page h2{font-size:16px;margin:0 0 10px}
.page section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:18px 20px;
margin-top:18px;overflow-x:auto}
.page dl{display:grid;grid-template-columns:max-content 1fr;gap:3px 18px;margin:0}
.page dt{color:var(--soft)}.page dd{margin:0;overflow-wrap:anywhere}
.page .map{border-collapse:separate;border-spacing:2px;font-size:12.5px}
.page .map th{font-weight:400;text-align:right;padding:0 8px 0 0;white-space:nowrap}
.page .map thead th{text-align:center;padding:0 2px;color:var(--soft);vertical-align:bottom;height:0}
.page .map td{width:var(--side,34px);min-width:var(--side,34px);height:min(28px,var(--side,28px));
text-align:center;border-radius:4px;padding:0;box-sizing:border-box;cursor:default;line-height:1}
.page .map.small td,.page .map.small thead th{font-size:10.5px}
.page .map.bare{border-spacing:1px}.page .map.bare td,.page .map.bare thead th{font-size:0;border-radius:2px}
.page .map.wide td{width:78px;min-width:78px;height:42px;font-size:11.5px;line-height:1.25}
.page .map td.zero{color:var(--soft);border:1px dashed var(--line);box-sizing:border-box}
.page .map td.none{opacity:.35}
.page .map th.name{text-align:left}.page .map thead th.size{text-align:right;padding-right:8px}
.page .key{display:inline-flex;align-items:center;gap:6px;margin-right:18px}
.page .key i{width:14px;height:14px;border-radius:3px;display:inline-block;box-sizing:border-box}
.page ul{margin:0;padding-left:20px}
.page .rows td,.page .rows th{padding:3px 14px 3px 0;text-align:left;font-weight:400}
.page .rows th{color:var(--soft);font-size:12px;font-weight:600;border-bottom:1px solid var(--line)}
.page .rows .num{text-align:right}
.page pre{margin:0;font:12.5px/1.5 ui-monospace,"DejaVu Sans Mono",monospace;white-space:pre-wrap}
.page footer{color:var(--soft);font-size:12.5px;margin-top:16px}
@media print{.page section{break-inside:avoid}}
"""

_COLOURS = {"H_O": "--k-o", "H_F": "--k-f", "H_O+H_F": "--k-b"}
_LABELS = {"H_O": "H<sub>O</sub>", "H_F": "H<sub>F</sub>", "H_O+H_F": "H<sub>O</sub>+H<sub>F</sub>"}


def page(report: Report) -> str:
    """The whole page; nothing is loaded from elsewhere."""
    facts = "".join(f"<dt>{escape(label)}</dt><dd{_warned(text)}>{escape(text)}</dd>" for label, text in report.facts())
    sections = [
        f"<section><dl>{facts}</dl></section>",
        _section("Graph", node_table(report.rows, depth=report.depth, collapse=report.collapse, hide=report.hide)),
        _section("Hessian", _map(report.blocks)),
    ]
    if len(report.kinks):
        sections.append(_section("Kinks on the data", _kinks(report)))
    if report.plan is not None:
        sections.append(_section("Plan", f"<pre>{escape(str(report.plan))}</pre>"))
    remarks = "".join(f"<li>{escape(line)}</li>" for line in report.remarks())
    sections.append(_section("Remarks", f"<ul>{remarks}</ul>"))
    name, _, file = report.title.partition(" ")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(report.title)}</title><style>{STYLE}{_STYLE}</style></head>"
        f'<body><main class="page dagh"><h1>{escape(name)}</h1>'
        f'<div class="soft mono">{escape(file.strip("()"))}</div>'
        f"{''.join(sections)}<footer>dagh {escape(__version__)}</footer></main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _warned(text: str) -> str:
    return ' class="warn"' if text.startswith("coupled") else ""


def _map(blocks: BlockTable) -> str:
    table = blocks.compact(_PAGE_ROWS)
    n = len(table.names)
    wide = table.norms is not None and n <= 10
    side = min(34, max(11, 720 // n - 2))
    bare = side < 15  # no room for a sign; the tooltip says it
    size = "" if wide or side == 34 else f' style="--side:{side}px"'
    values = [] if table.norms is None else [log10(v.full) for v in table.norms.values() if v.full > 0]
    low, high = (min(values), max(values)) if values else (0.0, 0.0)
    heads = "".join(f'<th title="{escape(name)}">{c}</th>' for c, name in enumerate(table.names, 1))
    body = []
    for r, name in enumerate(table.names):
        tip = ", ".join(table.members[r]) if table.members else name
        cells = "".join(_cell(table, r, c, wide, low, high) for c in range(n))
        body.append(
            f'<tr title="{escape(tip)}"><th class="soft">{r + 1}</th>'
            f'<th class="name mono">{escape(shorten(name))}</th>'
            f'<th class="soft">{table.sizes[r]:,}</th>{cells}</tr>'
        )
    keys = "".join(
        f'<span class="key"><i style="{_swatch(kind)}"></i><span>{SYMBOLS[kind]} {_meaning(kind)}</span></span>'
        for kind in MEANINGS
        if kind in table.kinds.values()
    )
    notes = list(table.notes)
    if values:
        notes.append(f"depth of color: log of the Frobenius norm, {10**low:.1e} to {10**high:.1e}")
    under = "".join(f"<div>{escape(note)}</div>" for note in notes)
    return (
        f'<div style="margin-bottom:12px">{escape(blocks.summary())}</div>'
        f'<table class="map{" wide" if wide else " bare" if bare else " small" if side < 24 else ""}"{size}>'
        f'<thead><tr><th></th><th></th><th class="size">size</th>{heads}</tr></thead>'
        f'<tbody>{"".join(body)}</tbody></table><div class="notes" style="margin-left:0">{keys}{under}</div>'
    )


def _meaning(kind: str) -> str:
    return {"zero": "zero", "H_O": "H<sub>O</sub> only", "H_F": "H<sub>F</sub> only"}.get(
        kind, "both H<sub>O</sub> and H<sub>F</sub>"
    )


def _swatch(kind: str) -> str:
    if kind == "zero":
        return "border:1px dashed var(--soft)"
    return f"background:rgba(var({_COLOURS[kind]}),.75)"


def _cell(table: BlockTable, r: int, c: int, wide: bool, low: float, high: float) -> str:
    pair = (min(r, c), max(r, c))
    kind = table.kinds.get(pair)
    tip = f"{table.names[r]} × {table.names[c]} ({table.sizes[r]:,} × {table.sizes[c]:,}): "
    if kind is None:
        return f'<td class="none" title="{escape(tip)}not asked for">-</td>'
    tip += MEANINGS[kind]
    if kind == "zero":
        return f'<td class="zero" title="{escape(tip)}">·</td>'
    strength, text = 0.5, SYMBOLS[kind]
    if table.norms is not None:
        norms = table.norms[pair]
        about = norms.about
        tip += f"; ‖H_O‖ = {norms.outer:.4e}, ‖H_F‖ = {about}{norms.functional:.4e}, ‖H‖ = {about}{norms.full:.4e}"
        t = (log10(norms.full) - low) / (high - low) if norms.full > 0 and high > low else float(norms.full > 0)
        strength = 0.14 + 0.72 * t
        if wide:
            text = _LABELS[kind] + f"<br>{norms.about}{norms.full:.1e}"
    return f'<td title="{escape(tip)}" style="background:rgba(var({_COLOURS[kind]}),{strength:.2f})">{text}</td>'


def _kinks(report: Report) -> str:
    rows = "".join(
        f"<tr><td>{escape(f'{r.module} · {r.operation}' if r.module else r.operation)}</td>"
        f'<td class="mono soft">{escape(r.node)}</td><td class="num">{r.elements:,}</td>'
        f'<td class="num{" warn" if r.exact else ""}">{r.exact:,}</td>'
        f'<td class="num">{r.margin:.2e}</td></tr>'
        for r in report.kinks
    )
    return (
        '<table class="rows"><thead><tr><th>where</th><th>node</th><th class="num">elements</th>'
        f'<th class="num">on a kink</th><th class="num">smallest distance</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )
