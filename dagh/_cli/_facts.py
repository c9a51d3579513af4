"""Lines that installed packages add to the header of ``dagh trace``."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from dagh._cli._group import complain, one_line
from dagh._graph import Graph

#: Entry points of callables ``(graph, loss, inputs, targets) -> str | None``; its name labels the line.
GROUP = "dagh.facts"


def plugin_facts(graph: Graph, loss: str, inputs: Any, targets: Any) -> list[tuple[str, str]]:
    """Label and text of each line, by label; one that fails costs a warning, nothing else."""
    facts = []
    for point in sorted(entry_points(group=GROUP), key=lambda p: p.name):
        try:
            text = point.load()(graph, loss, inputs, targets)
        except (Exception, SystemExit) as error:  # foreign code can fail in any way
            complain("warning", f"fact {point.name!r} ({point.value}) is left out: {type(error).__name__}: {error}")
            continue
        if text is not None:
            facts.append((point.name.replace("_", " "), one_line(text)))
    return facts
