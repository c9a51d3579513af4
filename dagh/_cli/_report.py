"""Everything ``dagh trace`` has to say, and its table and JSON forms."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import isfinite
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dagh._clarke._sites import find_sites
from dagh._cli._blocks import BlockTable
from dagh._export import NodeRow, kink_json, shape_text, to_dict
from dagh._export_text import node_table
from dagh._graph import Graph
from dagh._kinks import KinkTable
from dagh._plan import Plan
from dagh._state import State


@dataclass(frozen=True)
class Report:
    """A traced model at a batch; ``depth``, ``collapse`` and ``hide`` shape the node table.

    ``plugin_facts`` are lines of other packages, label and text.
    """

    file: str
    graph: Graph
    state: State
    rows: list[NodeRow]
    loss: str
    samples: int
    data: str
    blocks: BlockTable
    kinks: KinkTable
    plan: Plan | None
    depth: int | None
    collapse: bool
    hide: tuple[str, ...]
    plugin_facts: list[tuple[str, str]]

    @property
    def live_ties(self) -> int:
        """Elements exactly on a kink that something can move and the loss can feel."""
        return find_sites(self.state, [n for n in self.state.program if n in self.state.sources]).live_ties

    @property
    def title(self) -> str:
        return f"{type(self.graph.model).__name__} ({self.file})"

    @property
    def generic(self) -> dict[str, int]:
        """Operations that run on generic derivatives, and how many nodes of each."""
        out: dict[str, int] = {}
        for row in self.rows:
            if row.closed_form is False:
                out[row.operation] = out.get(row.operation, 0) + 1
        return out

    def facts(self) -> list[tuple[str, str]]:
        """The header: label and text of each line."""
        graph = self.graph
        parameters = graph.parameters
        scalars = sum(p.numel() for p in parameters.values())
        held = f"{len(parameters)} tensors, {scalars:,} numbers"
        frozen = len(parameters) - len(graph.trainable)
        held += f", {frozen} frozen" if frozen else ""
        tied = [" = ".join(names) for names in graph.parameter_names if len(names) > 1]
        shown = ", ".join(f"{r.name} {shape_text(r.shape)} {r.dtype}" for r in self.rows if r.kind == "input")
        operations = sum(r.kind == "operation" and r.part == "model" for r in self.rows)
        flops = sum(r.flops for r in self.rows)
        facts = [
            ("parameters", held),
            *([("tied", "; ".join(tied))] if tied else []),
            ("input", shown),
            ("traced by", f"{graph.method}, {graph.seconds:.2f} s"),
            ("operations", f"{operations}, {_count(flops)}FLOP per sample"),
            ("loss", f"{self.loss} = {self.state.loss:.6g}, mean over {self.samples} samples ({self.data})"),
            ("mode", graph.mode),
            ("samples", self._coupling()),
            *self.plugin_facts,
        ]
        if graph.output_name not in ("", "output"):
            facts.insert(3, ("output", graph.output_name))
        return facts

    def _coupling(self) -> str:
        if not self.state.coupled:
            return "independent"
        return f"coupled: {self.graph.coupling or 'the loss mixes them'}"

    def remarks(self) -> list[str]:
        """Lines after the maps: generic derivatives, kinks."""
        out = []
        if self.generic:
            names = ", ".join(f"{name} × {n}" if n > 1 else name for name, n in self.generic.items())
            out.append(f"generic derivatives (exact, without a closed form): {names}")
        else:
            out.append("every operation has a closed form")
        tied = [row for row in self.kinks if row.exact]
        if tied:
            places = ", ".join(f"{_place(row.module, row.operation)} {row.exact:,}" for row in tied[:4])
            more = f" and {len(tied) - 4} more nodes" if len(tied) > 4 else ""
            matter = self.live_ties
            what = (
                "none of them matters"
                if not matter
                else f"{matter:,} may matter, see dagh kinks; PyTorch's choice is taken"
            )
            out.append(f"kinks: {self.kinks.ties:,} elements sit exactly on one ({places}{more}); {what}")
        elif len(self.kinks) and isfinite(self.kinks.margin):
            near = sum(row.near for row in self.kinks)
            close = f", {near:,} within {self.kinks.tol:.0e}" if near else ""
            out.append(f"kinks: none hit, the nearest at a distance of {self.kinks.margin:.1e}{close}")
        return out

    # -- forms -------------------------------------------------------------------------------------

    def renderable(self) -> RenderableType:
        """The report for a console."""
        facts = Table.grid(padding=(0, 2, 0, 0))
        facts.add_column(style="dim", no_wrap=True)
        facts.add_column(overflow="fold")
        for label, text in self.facts():
            facts.add_row(label, Text(text, style="bold red" if text.startswith("coupled") else ""))
        parts: list[RenderableType] = [
            Panel(
                facts,
                title=Text(self.title, style="bold"),
                title_align="left",
                border_style="dim",
                expand=False,
            ),
            Text(),
            Text("Graph", style="bold"),
            node_table(self.rows, depth=self.depth, collapse=self.collapse, hide=self.hide),
            Text(),
            Text(self.blocks.summary(), style="bold"),
            self.blocks,
            Text(),
        ]
        if self.plan is not None:
            parts += [self.plan, Text()]
        return Group(*parts, *(Text(line) for line in self.remarks()))

    def as_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(self.as_dict(), indent=2, allow_nan=False)

    def as_dict(self) -> dict[str, Any]:
        """The graph's header, then the batch, blocks and kinks, then nodes and edges."""
        graph = to_dict(self.graph, rows=self.rows)
        nodes, edges = graph.pop("nodes"), graph.pop("edges")
        out: dict[str, Any] = {
            "file": self.file,
            **graph,
            "loss": {"name": self.loss, "value": self.state.loss, "samples": self.samples, "data": self.data},
            "generic": self.generic,
            "facts": dict(self.plugin_facts),
            "blocks": self.blocks.as_json(),
            "kinks": [{"node": r.node, "operation": r.operation, **kink_json(r)} for r in self.kinks],
        }
        if self.plan is not None:
            out["plan"] = str(self.plan).splitlines()
        return {**out, "nodes": nodes, "edges": edges}


def _place(module: str, operation: str) -> str:
    return f"{module} · {operation}" if module else operation


def _count(n: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if n < 1000 or unit == "T":
            return f"{n:.3g} {unit}"
        n /= 1000
    raise AssertionError
