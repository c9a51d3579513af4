"""The plan: for every requested pair, which leaf's columns are swept and in which basis.

Two kinds of work make up a Hessian. The outer part H_O is formed from the factor S of the loss curvature, pulled back
once (K columns). The functional part H_F is formed column by column: the tangents of one leaf are pushed forward to the
curved nodes that matter, and the rows pulled back to the other leaf of the pair. The leaf whose columns are swept is
the cheaper one of the two. A linear layer's parameters can be replaced by the outputs of that layer (fewer, one set per
sample), with the outer product by the layer's inputs applied at the end.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from rich.table import Table

from dagh._ir import Node, Program
from dagh._request import Pair, Request
from dagh._rules import rule_for

Basis = Literal["parameter", "activation", "channel"]


@dataclass(frozen=True)
class Gate:
    """The layer through which alone a leaf acts: a linear one on a single row per sample, or a convolution."""

    node: Node
    argument: int
    channels: int = 0
    """Output channels of a convolution; 0 for a linear layer."""


@dataclass
class Column:
    """One sweep: tangents of ``leaf`` (in ``basis``), rows of the leaves at ``rows``."""

    leaf: int
    basis: Basis
    gate: Gate | None
    rows: list[int]
    width: int
    seed: Node
    within: frozenset[Node]
    held: frozenset[Node]
    curved: frozenset[Node]
    flops: int
    unit: int
    """Elements held per sample and direction."""
    largest: int
    """Elements of the largest bundle per sample and direction."""


@dataclass
class Plan:
    """How the requested blocks will be formed; ``print(plan)`` explains it.

    ``kinds`` says for every pair which parts are structurally present: ``"zero"``, ``"H_O"``, ``"H_F"``, ``"H_O+H_F"``.
    """

    names: tuple[str, ...]
    pairs: tuple[Pair, ...]
    kinds: dict[Pair, str]
    columns: list[Column]
    gates: dict[int, Gate]
    fallbacks: list[str]
    outer_rows: int
    signature: tuple[object, ...] = field(default=(), repr=False)

    def __rich__(self) -> Table:
        table = Table(title=f"Plan: {len(self.pairs)} blocks, {len(self.columns)} column sweeps for H_F")
        table.add_column("columns of")
        table.add_column("basis")
        for name in ("width", "rows", "nodes", "MFLOP / sample"):
            table.add_column(name, justify="right")
        for c in self.columns:
            table.add_row(
                self.names[c.leaf], c.basis, str(c.width), str(len(c.rows)), str(len(c.within)), f"{c.flops / 1e6:.3g}"
            )
        if self.fallbacks:
            table.caption = "generic derivatives: " + ", ".join(self.fallbacks)
        return table

    def __str__(self) -> str:
        lines = [f"{len(self.pairs)} blocks; H_F by {len(self.columns)} column sweeps, H_O by the loss factor"]
        lines += [
            f"  {self.names[c.leaf]}: {c.width} {c.basis} directions, rows of {len(c.rows)} leaves, "
            f"{c.flops / 1e6:.3g} MFLOP per sample"
            for c in self.columns
        ]
        if self.fallbacks:
            lines.append("  generic derivatives: " + ", ".join(self.fallbacks))
        return "\n".join(lines)


def reach(program: Program, leaves: Collection[Node]) -> dict[Node, int]:
    """For every node, the set of ``leaves`` it depends on, as bits."""
    bit = {leaf: 1 << i for i, leaf in enumerate(leaves)}
    bits: dict[Node, int] = {}
    for node in program:
        mask = bit.get(node, 0)
        if node.dtype.is_floating_point:
            for parent in node.inputs:
                mask |= bits[parent]
        if node.key == "dagh.stop_gradient":
            mask = 0
        bits[node] = mask
    return bits


def _curved_pairs(node: Node, bits: dict[Node, int]) -> list[tuple[int, int]]:
    """Leaf sets that meet at a curved node: one entry per pair of arguments with second derivatives."""
    rule = rule_for(node)
    if not rule.curved(node):
        return []
    pairs = rule.pairs(node)
    slots = range(len(node.inputs))
    if pairs is None:
        pairs = {(i, j) for i in slots for j in slots}
    return [(bits[node.inputs[i]], bits[node.inputs[j]]) for i, j in pairs]


def structure(program: Program, request: Request, bits: dict[Node, int]) -> dict[Pair, tuple[bool, bool]]:
    """Which pairs have an outer and a functional part, from the graph alone."""
    assert program.loss is not None
    useful = program.ancestors([program.loss])
    at_output = bits[program.output]
    loss_curved = any(_curved_pairs(n, bits) for n in program if n.part == "loss" and n.op is not None and n in useful)
    meets = [
        pair
        for node in program
        if node.op is not None and node.part == "model" and node in useful and bits[node]
        for pair in _curved_pairs(node, bits)
    ]
    kinds: dict[Pair, tuple[bool, bool]] = {}
    for i, j in request.pairs:
        a, b = 1 << i, 1 << j
        outer = loss_curved and bool(at_output & a) and bool(at_output & b)
        functional = any((p & a and q & b) or (p & b and q & a) for p, q in meets)
        kinds[i, j] = outer, functional
    return kinds


def gate_of(program: Program, leaf: Node) -> Gate | None:
    """The layer that is the leaf's only user: a linear one on a single row per sample, or a plain convolution."""
    users = program.users[leaf]
    if leaf.op is not None or len(users) != 1 or users[0].inputs.count(leaf) != 1:
        return None
    node = users[0]
    argument = node.inputs.index(leaf)
    if argument == 0 or not node.inputs[0].batched:
        return None
    if node.key == "aten.linear.default" and node.inputs[0].numel == node.inputs[0].shape[-1]:
        return Gate(node, argument)
    if node.key == "dagh.convolution" and int(node.arg("groups")) == 1 and not node.arg("transposed"):
        return Gate(node, argument, channels=node.shape[1])
    return None


def make_plan(program: Program, request: Request, *, functional: bool = True) -> Plan:
    """Choose columns and bases for every pair with a functional part."""
    assert program.loss is not None
    bits = reach(program, request.leaves)
    kinds = structure(program, request, bits)
    gates = {i: g for i, leaf in enumerate(request.leaves) if (g := gate_of(program, leaf)) is not None}
    linear = {i: g for i, g in gates.items() if not g.channels}
    useful = program.ancestors([program.loss])
    curved = [n for n in program if n.op is not None and n.part == "model" and n in useful and rule_for(n).curved(n)]
    needed = [p for p in request.pairs if kinds[p][1]] if functional else []
    options: dict[tuple[int, int], Column | None] = {}

    def option(column: int, row: int) -> Column | None:
        """Sweeping ``column``'s tangents to get its block with ``row``."""
        if (column, row) not in options:
            options[column, row] = _column(program, request, bits, curved, gates, column, [row])
        return options[column, row]

    groups: dict[int, list[int]] = {}
    for i, j in needed:
        choices = [c for c in (option(i, j), option(j, i)) if c is not None]
        best = min(choices, key=lambda c: (c.flops * c.width, c.leaf))
        groups.setdefault(best.leaf, []).append(j if best.leaf == i else i)
    columns = []
    for leaf in sorted(groups):
        by_basis: dict[Basis, list[int]] = {}
        for row in groups[leaf]:
            chosen = option(leaf, row)
            assert chosen is not None
            by_basis.setdefault(chosen.basis, []).append(row)
        for rows in by_basis.values():
            column = _column(program, request, bits, curved, gates, leaf, rows)
            assert column is not None
            columns.append(column)
    fallbacks = sorted({n.operation for n in program if n.op is not None and bits[n] and not rule_for(n).closed_form})
    labels = {
        p: {(0, 0): "zero", (1, 0): "H_O", (0, 1): "H_F", (1, 1): "H_O+H_F"}[int(o), int(f)]
        for p, (o, f) in kinds.items()
    }
    return Plan(request.names, request.pairs, labels, columns, linear, fallbacks, program.output.numel)


def _column(
    program: Program,
    request: Request,
    bits: dict[Node, int],
    curved: list[Node],
    gates: dict[int, Gate],
    leaf: int,
    rows: list[int],
) -> Column | None:
    node = request.leaves[leaf]
    gate = gates.get(leaf)
    if gate is not None and any(
        bits[gate.node.inputs[0]] >> row & 1 or _after(program, request.leaves[row], gate.node) for row in rows
    ):
        gate = None  # a row at or before the layer would need the layer's own curvature
    basis: Basis = "parameter"
    width = node.numel
    if gate is not None and gate.channels > 1:
        basis, width = "channel", node.numel // gate.channels
    elif gate is not None and not gate.channels and gate.node.numel < node.numel:
        basis, width = "activation", gate.node.numel
    else:
        gate = None
    seed = node if gate is None else gate.node
    copies = gate.channels if gate is not None and basis == "channel" else 1
    downstream = program.descendants([seed])
    reachable = program.descendants([request.leaves[r] for r in rows])
    meeting = [u for u in curved if u in downstream and u is not seed and u in reachable]
    arguments = {p for u in meeting for p in u.inputs if p in downstream}
    within = program.ancestors(list(arguments)) & downstream
    back = (program.ancestors(meeting) | set(meeting)) & reachable if meeting else set()
    thin = _channelwise(program, seed, within) if basis == "channel" else set()

    def size(n: Node) -> int:
        return n.numel * (1 if n in thin else copies)

    pushed = [n for n in within if n.op is not None and n is not seed]
    flops = sum(rule_for(n).flops(n) * (1 if n in thin else copies) for n in pushed)
    flops += 2 * copies * sum(rule_for(n).flops(n) for n in back if n.op is not None)
    held = frozenset(arguments)
    rows_size = sum(request.leaves[r].numel for r in rows) if basis == "activation" else 0
    largest = max([*(size(n) for n in within), *(n.numel * copies for n in back if n.batched)], default=1)
    unit = sum(size(n) for n in held) + 2 * largest + rows_size
    return Column(
        leaf, basis, gate, list(rows), width, seed, frozenset(within), held, frozenset(meeting), flops, unit, largest
    )


def _channelwise(program: Program, seed: Node, within: Collection[Node]) -> set[Node]:
    """Nodes up to which tangents of a convolution's weights stay in their channel."""
    thin = {seed}
    for node in program:
        if node in within and node is not seed and node.op is not None:
            moving = [p for p in node.inputs if p in within]
            if moving and all(p in thin for p in moving) and rule_for(node).keeps_channels(node):
                thin.add(node)
    return thin


def _after(program: Program, leaf: Node, node: Node) -> bool:
    """Whether ``leaf`` is a probe on a node at or before ``node`` (it would need the layer's own curvature)."""
    return leaf.op is not None and node in program.descendants([leaf])
