"""Graphviz source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dagh._export import NodeRow, edges, shape_text

_SHAPES = {
    "input": "invhouse",
    "target": "invhouse",
    "parameter": "ellipse",
    "constant": "plaintext",
    "operation": "box",
    "loss": "doubleoctagon",
}
_FILLS = {
    "linear": "#e8edf2",
    "bilinear": "#cfe3f5",
    "elementwise": "#d9ecd2",
    "smooth": "#efe3f6",
    "kinked": "#fbdfc4",
}


@dataclass
class _Cluster:
    rows: list[NodeRow] = field(default_factory=list)
    inner: dict[str, _Cluster] = field(default_factory=dict)


def dot(title: str, rows: Sequence[NodeRow]) -> str:
    """A directed graph: one cluster per module, one node shape per kind, colors by derivative class."""
    root = _Cluster()
    for row in rows:
        place = root
        # A tied parameter belongs to no module in particular.
        tied = row.kind == "parameter" and len(row.parameters) > 1
        for part in row.module.split(".") if row.module and not tied else ():
            place = place.inner.setdefault(part, _Cluster())
        place.rows.append(row)
    used = {name for row in rows for name in row.inputs}
    out = [
        f"digraph {_quoted(title)} {{",
        '  graph [rankdir=TB, fontname="Helvetica", style="rounded", color="#9aa5b1", compound=true];',
        '  node [fontname="Helvetica", fontsize=10, style="filled,rounded", fillcolor="#ffffff",',
        '    color="#52606d"];',
        '  edge [fontname="Helvetica", fontsize=8, color="#7b8794"];',
        *_body(root, "", "  ", used),
    ]
    several = {row.name for row in rows if len(row.inputs) > 1}
    for parent, child, arg in edges(rows):
        where = ",".join(map(str, arg)) if isinstance(arg, tuple) else str(arg)
        label = f" [label={_quoted(where)}]" if child in several else ""
        out.append(f"  {_quoted(parent)} -> {_quoted(child)}{label};")
    return "\n".join([*out, "}", ""])


def _body(cluster: _Cluster, path: str, indent: str, used: set[str]) -> list[str]:
    out = [f"{indent}{_quoted(row.name)} [{_style(row, used)}];" for row in cluster.rows]
    for name, inner in cluster.inner.items():
        full = f"{path}.{name}" if path else name
        out.append(f"{indent}subgraph {_quoted('cluster_' + full)} {{")
        out.append(f"{indent}  label={_quoted(full)};")
        out += _body(inner, full, indent + "  ", used)
        out.append(f"{indent}}}")
    return out


def _style(row: NodeRow, used: set[str]) -> str:
    label = [row.operation if row.kind == "operation" else row.name, shape_text(row.shape)]
    if row.kind == "loss" and row.operation != "unspecified":
        label.insert(1, row.operation)
    if row.kind == "parameter" and len(row.parameters) > 1:
        label.insert(1, "= " + ", ".join(row.parameters[1:]))
    style = {"label": "\n".join(label), "shape": _SHAPES[row.kind]}
    if row.derivative:
        style["fillcolor"] = _FILLS[row.derivative]
    if row.couples_samples:
        style["color"], style["penwidth"] = "#c2410c", "2"
    if row.closed_form is False or (row.kind == "parameter" and row.name not in used):
        style["style"] = "filled,rounded,dashed"
    style["tooltip"] = ", ".join(p for p in (row.name, row.derivative or row.kind, row.dtype, row.source) if p)
    return ", ".join(f"{key}={_quoted(value)}" for key, value in style.items())


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
