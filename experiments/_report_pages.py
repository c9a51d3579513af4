"""The report as Markdown and as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ._report_claims import Claim
from ._report_corollaries import NOTE, PREDICTED_NOTE, corollary_table, predicted_table
from ._report_data import LACKING, Panel, Results, nets_in, number
from ._report_tables import summary


@dataclass(frozen=True)
class Shown:
    """A figure: file name without ending, caption, and the PNG in base64."""

    name: str
    caption: str
    data: str


Figures = Mapping[tuple[str, str], Sequence[Shown]]

_CLAIM_HEADS = ["statement", "paper", "data", "test", "estimate [95 %]", "verdict", "runs", "note"]
_NOTES = (
    "|L(k+1) − L(k)| is measured on the training samples of each net, averaged over random orders. Because of "
    "L(k+1) − L(k) = (ℓ(k+1) − L(k))/(k+1), the curve depends on the distribution of the per-sample losses alone, "
    "falls as 1/k whatever the net, and tends to the mean absolute deviation of the losses over k + 1: what nets "
    "differ in is its level.",
    "Exponential smoothing with 0.995 averages over some 200 values of k: the flat beginning of the smoothed curves "
    "and their steep fall near k = 1,000 are the filter's, not the net's.",
    "Monotone: the mean level is strictly monotone along the axis with probability 95 % or more. Not monotone: both "
    "“it never falls” and “it never rises” are rejected at 5 %. For the rest, “holds” and “does not hold” are said "
    "where a 95 % interval is on one side. All else is undecided. Correlations over nets resample nets, not seeds, "
    "and are decided only where a permutation test of the nets agrees at 5 %, which takes five nets; a difference of "
    "two correlations takes seven, a median six. "
    "Several claims are tested at once, without correction.",
    "Norms of the Hessian are those of the mean loss over a fixed subsample of the training set; bounds are on the "
    "same quantity.",
)


def markdown(results: Results, claims: Sequence[Claim], figures: Figures) -> str:
    """The report as Markdown, with figures linked."""
    lines = [f"# {_title(results)}", "", _facts(results), ""]
    lines += _warnings(results)
    lines += ["## The paper's statements", "", *_table(_CLAIM_HEADS, _claim_cells(claims)), ""]
    lines += [f"- {note}" for note in _NOTES]
    for panel in results.panels:
        lines += ["", f"## {_heading(panel)}", "", *_table(*summary(panel)), ""]
        for figure in figures.get((panel.axis, panel.dataset), ()):
            lines += [f"![{figure.name}](figures/{figure.name}.png)", "", f"*{figure.caption}*", ""]
        for (heads, cells), note in _around(panel):
            lines += [*_table(heads, cells), "", f"*{note}*", ""]
    return "\n".join(lines).rstrip() + "\n"


def html(results: Results, claims: Sequence[Claim], figures: Figures) -> str:
    """The report as one page without outside references."""
    title = escape(_title(results))
    parts = [f"<h1>{title}</h1>", f"<p class=facts>{escape(_facts(results))}</p>"]
    for kind, names in results.lacking:
        if names:
            items = "".join(f"<li>{escape(n)}</li>" for n in names)
            parts.append(f"<details class=warn><summary>{_count(names, kind)}</summary><ul>{items}</ul></details>")
    links = "".join(f'<a href="#{p.name}">{escape(_heading(p))}</a>' for p in results.panels)
    parts.append(f"<nav><a href='#claims'>The paper's statements</a>{links}</nav>")
    parts.append("<h2 id=claims>The paper's statements</h2>")
    parts.append(_html_claims(claims))
    parts.append("<ul class=notes>" + "".join(f"<li>{escape(n)}</li>" for n in _NOTES) + "</ul>")
    for panel in results.panels:
        heads, cells = summary(panel)
        parts.append(f'<h2 id="{panel.name}">{escape(_heading(panel))}</h2>')
        for f in figures.get((panel.axis, panel.dataset), ()):
            parts.append(
                f'<figure><img alt="{escape(f.caption)}" src="data:image/png;base64,{f.data}">'
                f"<figcaption>{escape(f.caption)}</figcaption></figure>"
            )
        parts.append(_html_table(heads, cells, "numbers"))
        for (heads, cells), note in _around(panel):
            parts.append(f"<p class=facts>{escape(note)}</p>")
            parts.append(_html_table(heads, cells, "numbers"))
    body = "\n".join(parts)
    return (
        f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{title}</title>\n"
        f"<meta name=viewport content='width=device-width,initial-scale=1'>\n<style>{_STYLE}</style>\n"
        f"<main>\n{body}\n</main></html>\n"
    )


def _around(panel: Panel) -> list[tuple[tuple[list[str], list[list[str]]], str]]:
    """The tables of the differences around the trained point that have cells, each with its note."""
    tables = [(predicted_table(panel), PREDICTED_NOTE), (corollary_table(panel), NOTE)]
    return [(table, note) for table, note in tables if table[1]]


_STYLE = """
:root{color-scheme:light;--ink:#1f2937;--soft:#6b7280;--line:#e5e7eb}
body{margin:0;background:#fff;color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1280px;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 .4rem}
h2{font-size:1.2rem;margin:2.6rem 0 .7rem;padding-top:.8rem;border-top:1px solid var(--line)}
.facts,figcaption,.notes{color:var(--soft);font-size:.87rem}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;margin:1.1rem 0;font-size:.9rem}
a{color:#1d4ed8;text-decoration:none}a:hover{text-decoration:underline}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.82rem;width:100%}
th{text-align:left;font-weight:600;color:var(--soft);border-bottom:1px solid #9ca3af;padding:.35rem .5rem;
  vertical-align:bottom}
td{border-bottom:1px solid var(--line);padding:.35rem .5rem;vertical-align:top}
.numbers td,.numbers th{text-align:right;font-variant-numeric:tabular-nums}.numbers td{white-space:nowrap}
.numbers{font-size:.77rem}.numbers td,.numbers th{padding:.35rem}
.numbers td:first-child,.numbers th:first-child{text-align:left}
.verdict{white-space:nowrap;font-weight:600}
.holds{color:#047857}.does-not-hold{color:#b91c1c}.undecided{color:#92400e;font-weight:400}
figure{margin:1rem 0 1.6rem}img{max-width:100%;height:auto}
details.warn{background:#fffbeb;border:1px solid #fde68a;border-radius:6px;padding:.5rem .9rem;margin:.8rem 0;
  font-size:.88rem}
.notes{padding-left:1.1rem}.notes li{margin:.25rem 0}
@media print{nav{display:none}h2{break-after:avoid}figure,tr{break-inside:avoid}}
"""


def _html_claims(claims: Sequence[Claim]) -> str:
    if not claims:
        return "<p>Nothing here bears on them.</p>"
    rows = []
    for cells in _claim_cells(claims):
        kind = cells[5].replace(" ", "-")
        tds = [f"<td>{escape(c)}</td>" for c in cells]
        tds[5] = f'<td class="verdict {kind}">{escape(cells[5])}</td>'
        rows.append("<tr>" + "".join(tds) + "</tr>")
    head = "".join(f"<th>{escape(h)}</th>" for h in _CLAIM_HEADS)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _html_table(heads: Sequence[str], cells: Sequence[Sequence[str]], kind: str) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    rows = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in cells)
    return f'<div class=scroll><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _claim_cells(claims: Sequence[Claim]) -> list[list[str]]:
    return [[c.statement, c.source, c.dataset, c.test, str(c.estimate), c.verdict, str(c.runs), c.note] for c in claims]


def _title(results: Results) -> str:
    return "Convergence study" + (f": {results.titles[0]}" if len(results.titles) == 1 else "")


def _heading(panel: Panel) -> str:
    return f"{panel.label[0].upper()}{panel.label[1:]}, {panel.dataset}"


def _facts(results: Results) -> str:
    """One line: how many runs, on what, how long."""
    nets = len(set(nets_in(results.runs)))
    seeds = len({r.seed for r in results.runs})
    wall = sum(sum(_seconds(r.scalars.get("wall_s"))) for r in results.runs)
    parts = [f"{_count(results.runs, 'finished run')} ({_count(range(nets), 'net')}, {_count(range(seeds), 'seed')})"]
    samples = sorted({int(n) for r in results.runs if (n := number(r.scalars, "train.samples"))})
    if samples:
        parts.append(f"{', '.join(f'{n:,}' for n in samples)} training samples")
    residuals = [v for r in results.runs if (v := number(r.scalars, "identity_residual")) is not None]
    if residuals:
        parts.append(f"largest residual of the identity {max(residuals):.0e}")
    if wall:
        parts.append(f"{wall / 60:,.1f} minutes of measuring")
    environments = {
        f"dagh {e.get('dagh')}, torch {e.get('torch')}, {e.get('device_name')}"
        for r in results.runs
        if isinstance(e := r.scalars.get("environment"), Mapping)
    }
    return "; ".join([*parts, *sorted(environments)]) + "."


def _seconds(parts: Any) -> list[float]:
    return [v for v in parts.values() if isinstance(v, (int, float))] if isinstance(parts, Mapping) else []


def _count(things: Sequence[Any], what: str) -> str:
    if what in LACKING:
        return f"{len(things)} {'run' if len(things) == 1 else 'runs'} {what}"
    return f"{len(things)} {what}{'' if len(things) == 1 else 's'}"


def _warnings(results: Results) -> list[str]:
    lines = []
    for kind, names in results.lacking:
        if names:
            lines += [f"**{_count(names, kind)}:**", "", *(f"- {n}" for n in names), ""]
    return lines


def _table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    if not cells:
        return ["Nothing here bears on them."]
    rule = ["---"] * len(heads)
    rows = [[c.replace("|", "\\|") for c in row] for row in (heads, rule, *cells)]
    return [f"| {' | '.join(row)} |" for row in rows]
