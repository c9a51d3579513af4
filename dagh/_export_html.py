"""The table of nodes as HTML, and the styles of every page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dagh._export import NodeRow, shape_text
from dagh._export_text import acts_text, kink_text, notes, params_text
from dagh._export_tree import Line, lines

#: Colors follow the reader's theme; every rule is under ``.dagh``, as a notebook has styles of its own.
STYLE = """
.dagh{--ink:#1d2733;--soft:#5f6c7b;--line:#dfe5ec;--card:#fff;--band:#f5f7fa;--accent:#0b6bcb;--warn:#b45309;
--c-linear:#64748b;--c-bilinear:#0b7285;--c-elementwise:#2b8a3e;--c-smooth:#9c36b5;--c-kinked:#c2560c;
--k-o:11,107,203;--k-f:156,54,181;--k-b:217,119,6;
font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;color:var(--ink)}
@media(prefers-color-scheme:dark){.dagh{--ink:#e3e9f0;--soft:#98a6b5;--line:#2e3945;--card:#171e26;
--band:#1e2731;--accent:#6cb2f7;--warn:#f6ad55;--c-linear:#94a3b8;--c-bilinear:#4dd0e1;
--c-elementwise:#7bd389;--c-smooth:#d59ae8;
--c-kinked:#f6a35c;--k-o:77,158,240;--k-f:200,120,225;--k-b:240,165,60}}
.dagh table{border-collapse:collapse;font-variant-numeric:tabular-nums}
.dagh .nodes{width:100%}
.dagh .nodes th{font-weight:600;font-size:12px;color:var(--soft);text-align:left;padding:6px 10px;
border-bottom:1px solid var(--line);background:none}
.dagh .nodes td{padding:3px 10px;text-align:left;border:0;background:none;vertical-align:baseline}
.dagh .nodes tr:hover td{background:var(--band)}
.dagh .nodes .num{text-align:right}
.dagh code,.dagh .mono{font-family:ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;
font-size:12.5px}
.dagh .soft{color:var(--soft)}
.dagh .warn{color:var(--warn);font-weight:600}
.dagh .mod{font-weight:600}
.dagh .times{color:var(--accent);font-weight:600;margin-left:.5em}
.dagh .twist{display:inline-block;width:1.1em;color:var(--soft);cursor:pointer;user-select:none}
.dagh .leaf{display:inline-block;width:1.1em}
.dagh .tag{display:inline-block;font-size:12px;padding:0 7px;border-radius:9px;border:1px solid currentColor}
.dagh .linear{color:var(--c-linear)}.dagh .bilinear{color:var(--c-bilinear)}
.dagh .elementwise{color:var(--c-elementwise)}
.dagh .smooth{color:var(--c-smooth)}.dagh .kinked{color:var(--c-kinked)}
.dagh .notes{color:var(--soft);font-size:12.5px;margin:8px 10px 0}
"""

#: Folds modules; the page reads as well without it.
SCRIPT = """
document.querySelectorAll('.dagh .twist').forEach(t=>t.addEventListener('click',()=>{
const tr=t.closest('tr'),d=+tr.dataset.depth,shut=t.textContent==='\\u25be';
t.textContent=shut?'\\u25b8':'\\u25be';
for(let r=tr.nextElementSibling;r&&+r.dataset.depth>d;r=r.nextElementSibling){r.hidden=shut;
const u=r.querySelector('.twist');if(u)u.textContent='\\u25be';}}));
"""


def fragment(rows: Sequence[NodeRow], title: str = "") -> str:
    """A ``<div>`` with its own styles, for notebooks."""
    head = f'<div class="mod">{escape(title)}</div>' if title else ""
    return f'<div class="dagh"><style>{STYLE}</style>{head}{node_table(rows)}</div>'


def node_table(
    rows: Sequence[NodeRow], *, depth: int | None = None, collapse: bool = False, hide: Sequence[str] = ()
) -> str:
    """The table of operations by module."""
    shown = lines(rows, depth=depth, collapse=collapse, hide=hide)
    kinks = any(line.ties is not None for line in shown)
    heads = [
        "module · operation",
        "output",
        "params",
        "derivative",
        "acts per",
        *(["kinks on the data"] if kinks else []),
    ]
    head = "".join(f'<th class="num">{h}</th>' if h == "params" else f"<th>{h}</th>" for h in heads)
    body = "".join(_tr(line, kinks) for line in shown)
    under = "<br>".join(escape(note) for note in notes(rows, shown))
    foot = f'<div class="notes">{under}</div>' if under else ""
    return f'<table class="nodes"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{foot}'


def _tr(line: Line, kinks: bool) -> str:
    cells = [
        f'<td style="padding-left:{10 + 20 * line.depth}px">{_label(line)}</td>',
        f'<td class="mono soft">{escape("" if line.shape is None else shape_text(line.shape))}</td>',
        f'<td class="num">{escape(params_text(line))}</td>',
        f"<td>{_tags(line)}</td>",
        f'<td class="{"warn" if line.coupled else "soft"}">{escape(acts_text(line))}</td>',
    ]
    if kinks:
        cells.append(f'<td class="{"warn" if line.ties else "soft"}">{escape(kink_text(line))}</td>')
    return f'<tr data-depth="{line.depth}" title="{escape(_tip(line))}">{"".join(cells)}</tr>'


def _label(line: Line) -> str:
    head, dot, tail = line.label.partition(" · ")
    module = bool(dot) or line.row is None
    twist = '<span class="leaf"></span>'
    if line.row is None and line.ops is None:
        twist = '<span class="twist">▾</span>'
    text = f'<span class="{"mod" if module else "op"}">{escape(head)}</span>'
    if dot:
        text += f'<span class="soft"> · </span>{escape(tail)}'
    if line.times > 1:
        text += f'<span class="times">× {line.times}</span>'
    return twist + text


def _tags(line: Line) -> str:
    tags = " ".join(f'<span class="tag {name}">{name}</span>' for name in line.derivatives)
    return f"{tags}*" if line.generic else tags


def _tip(line: Line) -> str:
    if line.row is None:
        return f"{line.flops:,} flops per sample" if line.flops else ""
    row = line.row
    parts = [row.name, row.dtype]
    if row.parameters and row.kind != "parameter":
        parts.append("parameters: " + ", ".join(row.parameters))
    if line.flops:
        parts.append(f"{line.flops:,} flops per sample")
    if row.source:
        parts.append(row.source)
    return "; ".join(parts)
