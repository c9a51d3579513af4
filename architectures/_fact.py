"""The line that ``dagh trace`` shows."""

from __future__ import annotations

from typing import Any

from dagh import Graph

from ._plugins import Match, recognize


def architecture_line(graph: Graph, *batch: Any) -> str | None:
    """What the installed plug-ins recognize, on one line, each architecture once; the loss and its data do not matter.

    Returns:
        For instance ``conv2d (L=2, C=6, k=3, m=26, n=26); residual × 3 (depth=2, shortcut=identity/linear)``, where
        several values of a dimension are ranges or alternatives; ``None`` where nothing is recognized.
    """
    by_name: dict[str, list[Match]] = {}
    for match in recognize(graph):
        by_name.setdefault(match.architecture, []).append(match)
    return "; ".join(_text(name, matches) for name, matches in by_name.items()) or None


def _text(name: str, matches: list[Match]) -> str:
    count = f" × {len(matches)}" if len(matches) > 1 else ""
    values: dict[str, list[Any]] = {}
    for match in matches:
        for dim, value in match.dims.items():
            if value is not None and value not in values.setdefault(dim, []):
                values[dim].append(value)
    dims = ", ".join(f"{dim}={_shown(found)}" for dim, found in values.items() if found)
    return f"{name}{count} ({dims})" if dims else f"{name}{count}"


def _shown(values: list[Any]) -> str:
    if len(values) > 1 and all(isinstance(v, int) for v in values):
        return f"{min(values)}–{max(values)}"
    return "/".join(",".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in values)
