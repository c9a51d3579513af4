"""The table of nodes for a console."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from dagh._export import NodeRow, shape_text
from dagh._export_tree import Line, lines
from dagh._fitted import FittedTable

DERIVATIVE_STYLES = {
    "linear": "dim",
    "bilinear": "cyan",
    "elementwise": "green",
    "smooth": "magenta",
    "kinked": "yellow",
}


def node_table(
    rows: Sequence[NodeRow],
    *,
    title: str = "",
    depth: int | None = None,
    collapse: bool = False,
    hide: Sequence[str] = (),
) -> Group:
    """Operations by module: shape, parameters, derivative class, what they act on, kinks when known."""
    shown = lines(rows, depth=depth, collapse=collapse, hide=hide)
    head = [Text(title, style="bold")] if title else []
    return Group(*head, _table(shown), *(Text(note, style="dim") for note in notes(rows, shown)))


def _table(shown: Sequence[Line]) -> Table:
    kinks = any(line.ties is not None for line in shown)
    spare = ("per", "derivative", "output")
    table = FittedTable(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, spare=spare)
    table.add_column("module · operation", overflow="fold", min_width=16)
    table.add_column("output", no_wrap=True, style="dim")
    table.add_column("params", no_wrap=True, justify="right")
    table.add_column("derivative", overflow="fold")
    table.add_column("per", no_wrap=True)
    if kinks:
        table.add_column("kinks", no_wrap=True)
    for line in shown:
        cells = [
            _label(line),
            Text("" if line.shape is None else shape_text(line.shape)),
            Text(params_text(line)),
            _derivative(line),
            Text(acts_text(line), style="bold red" if line.coupled else "dim"),
        ]
        table.add_row(*cells, *([_kinks(line)] if kinks else []))
    return table


def notes(rows: Sequence[NodeRow], shown: Sequence[Line]) -> list[str]:
    """Lines that explain the signs in use."""
    out = []
    if any(line.shared for line in shown):
        out.append("↑ parameters shared with a node above, counted there")
    if any(line.times > 1 for line in shown):
        out.append("× n: n identical modules in a row; numbers are their sums")
    if any(line.generic for line in shown):
        out.append("* generic derivatives: exact, without a closed form")
    if any(line.coupled for line in shown):
        out.append("batch: here samples start to interact")
    if any(line.ties is not None for line in shown):
        out.append("kinks: elements exactly on a kink of the data, or the smallest distance to one")
    used = {name for row in rows for name in row.inputs}
    unused = [row.name for row in rows if row.kind == "parameter" and row.name not in used]
    if unused:
        more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
        out.append(f"not used by the output: {', '.join(unused[:5])}{more}")
    return out


def params_text(line: Line) -> str:
    """Numbers held, ``↑`` where some are shared with a node above."""
    count = f"{line.scalars:,}" if line.scalars else ""
    return f"{count} ↑".strip() if line.shared else count


def acts_text(line: Line) -> str:
    """What the operation acts on separately; for a module, how many operations it has."""
    if line.coupled:
        return "batch"
    if line.ops is not None:
        return f"{line.ops} op{'s' if line.ops != 1 else ''}"
    return (line.row.acts_per or "") if line.row is not None else ""


def kink_text(line: Line) -> str:
    """``3 ties`` or the smallest distance to a kink."""
    if line.ties is None:
        return ""
    if line.ties:
        return f"{line.ties:,} tie{'s' if line.ties != 1 else ''}"
    return f"≥ {line.margin:.1e}" if line.margin is not None and isfinite(line.margin) else "none near"


def _label(line: Line) -> Text:
    head, dot, tail = line.label.partition(" · ")
    module = bool(dot) or line.row is None
    text = Text("  " * line.depth)
    text.append(head, style="bold" if module else "")
    if dot:
        text.append(dot, style="dim").append(tail)
    if line.times > 1:
        text.append(f"  × {line.times}", style="bold cyan")
    return text


def _derivative(line: Line) -> Text:
    text = Text()
    for i, name in enumerate(line.derivatives):
        text.append(", " if i else "").append(name, style=DERIVATIVE_STYLES[name])
    return text.append("*") if line.generic else text


def _kinks(line: Line) -> Text:
    return Text(kink_text(line), style="bold yellow" if line.ties else "dim")
