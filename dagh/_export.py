"""The graph as plain data: rows, ``networkx``, dictionaries; tables, DOT and HTML use the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, TypeAlias

import networkx as nx
import torch
from torch import Tensor

from dagh._ir import Node, Program
from dagh._kinks import KinkRow
from dagh._rules import rule_for
from dagh._state import as_policy, evaluate_program
from dagh._version import __version__
from dagh.errors import DaghError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dagh._graph import Graph
    from dagh._state import State

#: A dimension: its length, or ``"N"`` (``"16N"``) where it is made of the samples.
Dim: TypeAlias = int | str

_PROBE = 3  # a batch size unlike one; comparing the two shows which axes are made of samples


@dataclass(frozen=True)
class NodeRow:
    """One node, as users see it.

    ``shape`` has the sample axis as ``"N"`` (whole numbers where samples are coupled); ``inputs`` are names
    in the order of the arguments; ``parameters`` the leaves used directly (for a leaf: all its tied names);
    ``scalars`` how many numbers they hold, counted at the first use only, ``shared`` tells that some were
    counted before. ``derivative``, ``acts_per`` and ``closed_form`` are None where nothing is differentiated.
    ``flops`` are per sample.
    """

    name: str
    kind: str
    operation: str
    module: str
    shape: tuple[Dim, ...]
    dtype: str
    inputs: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    scalars: int = 0
    shared: bool = False
    derivative: str | None = None
    acts_per: str | None = None
    closed_form: bool | None = None
    couples_samples: bool = False
    flops: int = 0
    source: str = ""
    part: str = "model"
    kinks: KinkRow | None = None

    def attributes(self) -> dict[str, Any]:
        """Attributes of the node in ``graph.nx``."""
        return {
            "kind": self.kind,
            "operation": self.operation,
            "module": self.module,
            "shape": self.shape,
            "dtype": self.dtype,
            "parameters": self.parameters,
            "derivative": self.derivative,
            "acts_per": self.acts_per,
            "couples_samples": self.couples_samples,
            "flops": self.flops,
            "closed_form": self.closed_form,
            "source": self.source,
            "part": self.part,
        }

    @property
    def op_like(self) -> bool:
        """Whether it is computed: an operation or the loss."""
        return self.kind in ("operation", "loss")

    def as_json(self) -> dict[str, Any]:
        """The row with JSON types alone."""
        out = {"name": self.name, **self.attributes(), "scalars": self.scalars, "shared": self.shared}
        out["shape"], out["parameters"] = list(self.shape), list(self.parameters)
        if self.kinks is not None:
            out["kinks"] = kink_json(self.kinks)
        return out


def kink_json(row: KinkRow) -> dict[str, Any]:
    """Counts and smallest margin (None: no kink within reach) of one node."""
    return {
        "elements": row.elements,
        "ties": row.exact,
        "margin": row.margin if isfinite(row.margin) else None,
    }


def shape_text(shape: Sequence[Dim]) -> str:
    """``N×6×26×26``; ``scalar`` for an empty shape."""
    return "×".join(map(str, shape)) or "scalar"


def node_rows(graph: Graph, state: State | None = None) -> list[NodeRow]:
    """Every node in topological order; with a ``state`` the loss and kinks too, else a placeholder loss."""
    program = graph.program if state is None else state.program
    coupled = graph.coupled or (state is not None and state.coupled)
    batch = _batch(program) if coupled else 1
    shapes = _concrete_shapes(program) if coupled else _symbolic_shapes(graph, program)
    mixing = _mixing(graph, program, state, batch) if coupled else frozenset()
    kinks = {} if state is None else {row.node: row for row in state.kinks()}
    counted: set[str] = set()
    rows = [_row(program, node, shapes, mixing, kinks, counted, batch) for node in program]
    if program.loss is None:
        name = "loss"
        while name in program.by_name:
            name += "_"
        dtype = _dtype(program.output)
        rows.append(NodeRow(name, "loss", "unspecified", "", (), dtype, (program.output.name,), part="loss"))
    return rows


def _row(
    program: Program,
    node: Node,
    shapes: dict[str, tuple[Dim, ...]],
    mixing: frozenset[str],
    kinks: dict[str, KinkRow],
    counted: set[str],
    batch: int,
) -> NodeRow:
    kind = "loss" if node is program.loss else node.kind
    leaves = [p for p in dict.fromkeys(node.inputs) if p.kind == "parameter"]
    new = [p for p in leaves if p.name not in counted]
    counted.update(p.name for p in new)
    fields: dict[str, Any] = {}
    if node.op is not None:
        rule = rule_for(node)
        fields["flops"] = rule.flops(node) // batch
        if node.dtype.is_floating_point:
            fields |= {
                "derivative": rule.derivative,
                "acts_per": rule.acts_per,
                "closed_form": rule.closed_form,
            }
    return NodeRow(
        node.name,
        kind,
        node.operation,
        node.names[0].rpartition(".")[0] if node.kind == "parameter" else node.module,
        shapes[node.name],
        _dtype(node),
        tuple(p.name for p in node.inputs),
        node.names if node.kind == "parameter" else tuple(p.name for p in leaves),
        node.numel if node.kind == "parameter" else sum(p.numel for p in new),
        len(new) < len(leaves),
        couples_samples=node.name in mixing,
        source=node.source,
        part=node.part,
        kinks=kinks.get(node.name),
        **fields,
    )


def _dtype(node: Node) -> str:
    return str(node.dtype).removeprefix("torch.")


# -- the sample axis ------------------------------------------------------------------------------


def _concrete_shapes(program: Program) -> dict[str, tuple[Dim, ...]]:
    return {n.name: tuple(n.shape) for n in program}


def _symbolic_shapes(graph: Graph, program: Program) -> dict[str, tuple[Dim, ...]]:
    """Shapes with the axes made of samples named: by comparing batches of one and of several, else axis 0."""
    shapes = {n.name: _leading(n) for n in program}
    captured = graph._captured.get(None)
    base = graph.program
    if captured is None:
        return shapes
    try:
        other = graph._lower(captured, _PROBE)
    except (DaghError, RuntimeError, ValueError):
        return shapes
    if [n.key for n in base] != [n.key for n in other]:
        return shapes
    for one, several in zip(base, other, strict=True):
        if one.name in shapes and len(one.shape) == len(several.shape):
            shapes[one.name] = tuple(_dim(a, b) for a, b in zip(one.shape, several.shape, strict=True))
    return shapes


def _leading(node: Node) -> tuple[Dim, ...]:
    shape: tuple[Dim, ...] = tuple(node.shape)
    return ("N", *shape[1:]) if node.batched and shape and shape[0] == 1 else shape


def _dim(one: int, several: int) -> Dim:
    if one == several:
        return one
    if several == _PROBE * one:
        return "N" if one == 1 else f"{one}N"
    return "?"


def _batch(program: Program) -> int:
    """Samples in a whole-batch program."""
    return next((n.shape[0] for n in program.inputs if n.shape), 1)


def _mixing(graph: Graph, program: Program, state: State | None, batch: int) -> frozenset[str]:
    """The nodes where samples first meet.

    Another first sample changes more than one sample's share of their elements, but not of their arguments'.
    """
    if batch < 2:
        return frozenset()
    with torch.no_grad():
        if state is None:
            args, kwargs = graph._example
            leaves = graph._leaf_values(program, args, kwargs, True)
            policy = as_policy("torch")
        else:
            leaves = {n: state.values[n] for n in program if n.op is None}
            policy = state.policy
        before = evaluate_program(program, leaves, policy)
        changed = {n: _other_sample(leaves[n]) for n in program.inputs if n.shape and n.shape[0] == batch}
        after = evaluate_program(program, {**leaves, **changed}, policy)
    wide = {n for n in program if _changes(before[n], after[n]) * batch > n.numel}
    part = "model" if graph.coupled else "loss"
    return frozenset(n.name for n in wide if n.part == part and not any(p in wide for p in n.inputs))


def _other_sample(x: Tensor) -> Tensor:
    """``x [1, N, …]`` with its first sample replaced."""
    x = x.clone()
    if x.dtype.is_floating_point:
        noise = torch.rand(
            x[0, 0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu"
        ).to(x)
        x[0, 0] = x[0, 0] * (0.5 + noise) + 0.1 * noise
        return x
    different = [k for k in range(1, x.shape[1]) if not torch.equal(x[0, k], x[0, 0])]
    if different:
        x[0, 0] = x[0, different[0]]
    return x


def _changes(a: Tensor, b: Tensor) -> int:
    """How many elements differ by more than rounding."""
    if a.numel() == 0 or a.shape != b.shape:
        return 0
    if not a.dtype.is_floating_point:
        return int((a != b).sum())
    tolerance = 1e-10 if a.dtype == torch.float64 else 1e-5
    scale = float(a.nan_to_num(posinf=0, neginf=0).abs().max())
    return int(((a - b).abs() > tolerance * scale).sum())


# -- other forms ----------------------------------------------------------------------------------


def edges(rows: Sequence[NodeRow]) -> list[tuple[str, str, int | tuple[int, ...]]]:
    """``(parent, child, position)``, each pair once; several positions as a tuple."""
    out: list[tuple[str, str, int | tuple[int, ...]]] = []
    for row in rows:
        for parent in dict.fromkeys(row.inputs):
            at = tuple(i for i, name in enumerate(row.inputs) if name == parent)
            out.append((parent, row.name, at[0] if len(at) == 1 else at))
    return out


def to_networkx(graph: Graph, state: State | None = None) -> nx.DiGraph[str]:
    """The graph with an edge from every argument to its user, nodes in topological order.

    Nodes carry ``kind`` (``input``, ``target``, ``parameter``, ``operation``, ``constant``, ``loss``),
    ``operation``, ``module``, ``shape`` (``"N"`` stands for the samples), ``dtype``, ``parameters``,
    ``derivative`` (``linear``, ``bilinear``, ``elementwise``, ``smooth``, ``kinked``; None for leaves and
    integers), ``acts_per``, ``couples_samples``, ``flops`` (of one sample), ``closed_form``, ``source`` and
    ``part`` (``model`` or ``loss``); edges carry ``arg``, the position among the child's arguments (a tuple
    when used several times).
    """
    rows = node_rows(graph, state)
    found: nx.DiGraph[str] = nx.DiGraph()
    for row in rows:
        found.add_node(row.name, **row.attributes())
    for parent, child, arg in edges(rows):
        found.add_edge(parent, child, arg=arg)
    return found


def header(graph: Graph) -> dict[str, Any]:
    """What is known about the whole model."""
    parameters = graph.parameters
    return {
        "dagh": __version__,
        "model": type(graph.model).__name__,
        "method": graph.method,
        "seconds": round(graph.seconds, 4),
        "mode": graph.mode,
        "coupled": graph.coupled,
        "coupling": graph.coupling,
        "output": graph.output_name,
        "parameters": {
            "tensors": len(parameters),
            "scalars": sum(p.numel() for p in parameters.values()),
            "trainable": len(graph.trainable),
            "tied": [list(names) for names in graph.parameter_names if len(names) > 1],
        },
    }


def to_dict(graph: Graph, state: State | None = None, rows: Sequence[NodeRow] | None = None) -> dict[str, Any]:
    """Header, nodes and edges with JSON types alone."""
    rows = node_rows(graph, state) if rows is None else rows
    return {
        **header(graph),
        "nodes": [row.as_json() for row in rows],
        "edges": [
            {"from": a, "to": b, "arg": list(arg) if isinstance(arg, tuple) else arg} for a, b, arg in edges(rows)
        ],
    }


def to_dot(graph: Graph, state: State | None = None) -> str:
    """Graphviz source with one cluster per module."""
    from dagh._export_dot import dot

    return dot(type(graph.model).__name__, node_rows(graph, state))


def rich_table(graph: Graph, state: State | None = None) -> RenderableType:
    """The nodes by module, for a rich console."""
    from dagh._export_text import node_table

    return node_table(node_rows(graph, state), title=repr(graph))


def html_table(graph: Graph, state: State | None = None) -> str:
    """The nodes by module, as a self-contained ``<div>``."""
    from dagh._export_html import fragment

    return fragment(node_rows(graph, state), title=repr(graph))
