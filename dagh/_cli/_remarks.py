"""Lines that other installed packages add to ``dagh trace``, by the entry points ``dagh.remarks``."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from dagh._cli._group import complain
from dagh._graph import Graph


def foreign_remarks(graph: Graph, loss: str, inputs: Any, targets: Any) -> list[str]:
    """What every ``remark(graph, loss, inputs, targets)`` of the group says (``None``: nothing)."""
    lines = []
    for point in sorted(entry_points(group="dagh.remarks"), key=lambda p: p.name):
        try:
            line = point.load()(graph, loss, inputs, targets)
        except Exception as error:  # foreign code can fail in any way
            complain("warning", f"remark {point.name!r} ({point.value}) failed: {type(error).__name__}: {error}")
            continue
        if line:
            lines.append(str(line))
    return lines
