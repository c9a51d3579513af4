"""A :class:`~dagh.KinkReport` on the terminal."""

from __future__ import annotations

import io
from math import isfinite, isnan
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dagh._fitted import FittedTable

if TYPE_CHECKING:
    from dagh._clarke._report import KinkReport

_SHOWN_PATTERNS = 12
_SHOWN_BRANCHES = 6
_BAR = 40

_CERTAINTY = {
    "exact": "all of them: every other one is excluded",
    "first_order": "to first order: patterns that only occur in a cusp may be missing",
    "sampled": "some ties settled by points nearby",
    "bound": "along random directions: there may be more",
}


def number(value: float | None) -> str:
    """Three digits, ``·`` where there is nothing."""
    if value is None or isnan(value):
        return "·"
    return f"{value:.3g}" if isfinite(value) else "∞"


def verdict(report: KinkReport) -> str:
    """One line: what the ties mean for the Hessian."""
    if not report.ties:
        return "no exact ties: the Hessian exists"
    if not report.live_ties:
        return f"{_n(report.ties, 'exact tie')}, none that matters: the Hessian exists"
    if report.realizable == 1 and report.certainty != "bound":
        return f"{_n(report.ties, 'exact tie')} between candidates that agree nearby: the Hessian exists"
    matter = f"{_n(report.ties, 'exact tie')}"
    if report.live_ties < report.ties:
        matter += f", {report.live_ties:,} of which {'matters' if report.live_ties == 1 else 'matter'}"
    if report.loss_jump:
        return f"{matter}: the loss itself jumps, by up to {number(report.loss_jump)}: no derivative of any kind"
    if report.removable:
        certain = "" if report.certainty == "exact" else " as far as seen"
        return f"{matter}, but all patterns agree{certain}: the Hessian exists; PyTorch's answer may be another"
    if report.c11:
        return f"{matter}: the gradient is Lipschitz (C^1,1), and the Clarke generalized Hessian is defined"
    if report.gradient_jump <= 1e-9 * max((p.gradient for p in report.patterns), default=0.0):
        return f"{matter}: the gradient is continuous at this point, its derivative is not"
    return f"{matter}: the gradient jumps, there is no Hessian"


def full(report: KinkReport) -> RenderableType:
    """Everything."""
    parts: list[RenderableType] = [Text(verdict(report), style="bold"), Text()]
    if report.live_ties:
        parts += [_facts(report), Text(), _patterns(report), Text()]
    if report.nodes:
        parts += [Text("Nodes", style="bold"), _nodes(report), Text()]
        parts += [Text("Distances to the nearest kink, all elements", style="bold"), _histogram(report)]
    parts += [Text(f"note: {note}", style="dim") for note in report.notes]
    return Group(*parts)


def as_text(report: KinkReport) -> str:
    """:func:`full` without colors, 120 columns."""
    out = io.StringIO()
    Console(file=out, width=120, no_color=True, highlight=False, force_terminal=False).print(full(report))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _n(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _facts(report: KinkReport) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    least = "at least " if report.certainty == "bound" else ""
    grid.add_row("patterns", f"{least}{report.realizable:,} ({_CERTAINTY[report.certainty]})")
    grid.add_row("gradient jump", f"{least}{number(report.gradient_jump)}")
    grid.add_row(
        "spread of Hessians", f"{least if report.hessian_spread is not None else ''}{number(report.hessian_spread)}"
    )
    if report.box is not None:
        box = report.box
        proven = f"‖H‖ in [{number(box.least_norm)}, {number(box.largest_norm)}], spread at most {number(box.spread)}"
        if box.eigenvalues is not None:
            proven += f", eigenvalues in [{number(box.eigenvalues[0])}, {number(box.eigenvalues[1])}]"
        grid.add_row("bounds on all", f"{proven} (proven for every pattern, seen or not; by {box.form})")
    return grid


def _patterns(report: KinkReport) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("‖∇L‖", justify="right", no_wrap=True)
    table.add_column("‖H‖", justify="right", no_wrap=True)
    table.add_column(Text("branches: node[sample; element] side"), overflow="fold")
    ranked = sorted(report.patterns, key=lambda p: -p.weight)
    for row in ranked[:_SHOWN_PATTERNS]:
        shown = "; ".join(row.branches[:_SHOWN_BRANCHES])
        more = len(row.branches) - _SHOWN_BRANCHES
        shown += f"; and {more:,} more" if more > 0 else ""
        table.add_row(f"{row.weight:.3f}", number(row.gradient), number(row.hessian), Text(shown))
    if len(ranked) > _SHOWN_PATTERNS:
        table.add_row("", "", "", Text(f"and {len(ranked) - _SHOWN_PATTERNS:,} more patterns", style="dim"))
    return table


def _nodes(report: KinkReport) -> Table:
    near = f"≤ {report.tol:g}"
    spare = ("module", near, "in x", "elements", "in θ")
    table = FittedTable(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, spare=spare)
    table.add_column("node", overflow="ellipsis", no_wrap=True)
    table.add_column("module", overflow="ellipsis", no_wrap=True, style="dim")
    for head in ("elements", "ties", "matter", near, "margin", "in θ", "in x"):
        table.add_column(head, justify="right", no_wrap=True)
    for n in report.nodes:
        style = "bold yellow" if n.live else ""
        table.add_row(
            n.node, n.module, f"{n.elements:,}", f"{n.ties:,}", f"{n.live:,}", f"{n.near:,}",
            number(n.margin), number(n.parameter_margin), number(n.input_margin), style=style,
        )  # fmt: skip
    return table


def _histogram(report: KinkReport) -> Table:
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(justify="right", style="dim", no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(no_wrap=True)
    most = max(report.histogram, default=0) or 1
    for low, edge, count in zip((0.0, *report.edges), report.edges, report.histogram, strict=False):
        label = "exactly 0" if edge == 0 else f"up to {edge:g}" if isfinite(edge) else f"above {low:g}"
        grid.add_row(label, f"{count:,}", "█" * round(_BAR * count / most) or ("▏" if count else ""))
    return grid
