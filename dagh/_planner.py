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
from typing import Any, Literal

import numpy as np
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
    """One sweep: tangents of ``leaves`` (in ``basis``), rows of the leaves that they are paired with.

    In the activation basis the leaves are the weight and bias of one layer, and the rows of another linear layer are
    taken at its output as well: ``targets`` says where.
    """

    leaves: list[int]
    basis: Basis
    gate: Gate | None
    pairs: list[Pair]
    """(leaf, row) in that order."""
    targets: dict[int, Node]
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

    @property
    def rows(self) -> list[int]:
        return list(self.targets)


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

    def __post_init__(self) -> None:
        self._swept = {pair for c in self.columns for pair in c.pairs}

    def oriented(self, i: int, j: int) -> Pair:
        """The pair in the order in which its sweep forms it."""
        return (j, i) if (j, i) in self._swept and (i, j) not in self._swept else (i, j)

    def structured(self, i: int, j: int, samples: int) -> bool:
        """Whether the block of two linear layers takes less memory kept per sample."""
        i, j = self.oriented(i, j)
        first, second = self.gates.get(i), self.gates.get(j)
        if first is None or second is None or self.kinds[min(i, j), max(i, j)] == "zero":
            return False
        (o_a, i_a), (o_b, i_b) = _layer_shape(first), _layer_shape(second)
        crossed = (i, j) in self._swept and first.node is not second.node
        per_sample = o_a * o_b + i_a + i_b + (o_a * i_b + o_b if crossed else 0)
        return samples * per_sample < o_a * i_a * o_b * i_b

    def result_elements(self, request: Request, samples: int, keep: bool) -> int:
        """Numbers that the blocks hold, in the structure they are kept in."""
        total = 0
        for i, j in request.pairs:
            dense = request.sizes[i] * request.sizes[j]
            if keep:
                total += samples * dense
            elif not self.structured(i, j, samples):
                total += dense if self.kinds[i, j] != "zero" else 0
            else:
                (o_a, i_a), (o_b, i_b) = _layer_shape(self.gates[i]), _layer_shape(self.gates[j])
                total += samples * (o_a * o_b + i_a + i_b + max(o_a * i_b, o_b * i_a))
        return total

    def __rich__(self) -> Table:
        table = Table(title=f"Plan: {len(self.pairs)} blocks, {len(self.columns)} column sweeps for H_F")
        table.add_column("columns of")
        table.add_column("basis")
        for name in ("width", "rows", "nodes", "MFLOP / sample"):
            table.add_column(name, justify="right")
        for c in self.columns:
            table.add_row(
                " + ".join(self.names[i] for i in c.leaves),
                c.basis,
                str(c.width),
                str(len(c.rows)),
                str(len(c.within)),
                f"{c.flops / 1e6:.3g}",
            )
        if self.fallbacks:
            table.caption = "generic derivatives: " + ", ".join(self.fallbacks)
        return table

    def __str__(self) -> str:
        lines = [f"{len(self.pairs)} blocks; H_F by {len(self.columns)} column sweeps, H_O by the loss factor"]
        lines += [
            f"  {' + '.join(self.names[i] for i in c.leaves)}: {c.width} {c.basis} directions, "
            f"rows of {len(c.rows)} leaves, {c.flops / 1e6:.3g} MFLOP per sample"
            for c in self.columns
        ]
        if self.fallbacks:
            lines.append("  generic derivatives: " + ", ".join(self.fallbacks))
        return "\n".join(lines)


def _layer_shape(gate: Gate) -> tuple[int, int]:
    """Outputs and inputs of a linear layer; one input for its bias."""
    return gate.node.numel, gate.node.inputs[0].numel if gate.argument == 1 else 1


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


def curved_pairs(node: Node) -> set[tuple[int, int]]:
    """Pairs of arguments with non-zero mixed second derivatives."""
    rule = rule_for(node)
    if not rule.curved(node):
        return set()
    pairs = rule.pairs(node)
    slots = range(len(node.inputs))
    return {(i, j) for i in slots for j in slots} if pairs is None else pairs


def _curved_pairs(node: Node, bits: dict[Node, int]) -> list[tuple[int, int]]:
    """Leaf sets that meet at a curved node: one entry per pair of arguments with second derivatives."""
    return [(bits[node.inputs[i]], bits[node.inputs[j]]) for i, j in curved_pairs(node)]


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
    partners = [0] * len(request.leaves)
    for first, second in set(meets):
        for i in range(len(request.leaves)):
            if first >> i & 1:
                partners[i] |= second
            if second >> i & 1:
                partners[i] |= first
    kinds: dict[Pair, tuple[bool, bool]] = {}
    for i, j in request.pairs:
        outer = loss_curved and bool(at_output >> i & 1) and bool(at_output >> j & 1)
        kinds[i, j] = outer, bool(partners[i] >> j & 1)
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


class _Reach:
    """Ancestry of a program's nodes as Boolean arrays, and what each node costs."""

    def __init__(self, program: Program) -> None:
        n = len(program.nodes)
        self.program = program
        self.above = np.eye(n, dtype=bool)  # [v, u]: u is v or an ancestor of v
        for node in program:
            for parent in node.inputs:
                self.above[node.index] |= self.above[parent.index]
        self.numel = np.array([v.numel for v in program])
        self.flops = np.array([rule_for(v).flops(v) if v.op is not None else 0 for v in program])
        self.batched = np.array([v.batched for v in program], dtype=bool)
        self._thin: dict[Node, np.ndarray[Any, Any]] = {}

    def nodes(self, mask: np.ndarray[Any, Any]) -> frozenset[Node]:
        return frozenset(self.program.nodes[i] for i in np.flatnonzero(mask))

    def thin(self, seed: Node) -> np.ndarray[Any, Any]:
        """Nodes up to which tangents of a convolution's weights, seeded at its output, stay in their channel."""
        if seed not in self._thin:
            below, thin = self.above[:, seed.index], np.zeros(len(self.program.nodes), dtype=bool)
            thin[seed.index] = True
            for i in np.flatnonzero(below):
                node = self.program.nodes[i]
                if node is seed:
                    continue
                moving = [p.index for p in node.inputs if below[p.index]]
                thin[i] = bool(thin[moving].all()) and rule_for(node).keeps_channels(node)
            self._thin[seed] = thin
        return self._thin[seed]


def make_plan(program: Program, request: Request, *, functional: bool = True) -> Plan:
    """Choose columns and bases for every pair with a functional part."""
    assert program.loss is not None
    bits = reach(program, request.leaves)
    kinds = structure(program, request, bits)
    gates = {i: g for i, leaf in enumerate(request.leaves) if (g := gate_of(program, leaf)) is not None}
    linear = {i: g for i, g in gates.items() if not g.channels}
    needed = [p for p in request.pairs if kinds[p][1]] if functional else []
    columns: list[Column] = []
    if needed:
        sweeps = _Sweeps(program, request, bits, gates)
        chosen: dict[tuple[int, Basis, int], list[Pair]] = {}
        for i, j in needed:
            leaf, row = (i, j) if sweeps.price(i, j) <= sweeps.price(j, i) else (j, i)
            basis, _, seed, _, _ = sweeps.basis(leaf, row)
            own = -1 if basis == "activation" else leaf  # weight and bias share the outputs of their layer
            chosen.setdefault((seed.index, basis, own), []).append((leaf, row))
        columns = [sweeps.column(pairs) for _, pairs in sorted(chosen.items())]
    fallbacks = sorted({n.operation for n in program if n.op is not None and bits[n] and not rule_for(n).closed_form})
    labels = {pair: _LABELS[outer, inner] for pair, (outer, inner) in kinds.items()}
    return Plan(request.names, request.pairs, labels, columns, linear, fallbacks, program.output.numel)


_LABELS = {(False, False): "zero", (True, False): "H_O", (False, True): "H_F", (True, True): "H_O+H_F"}


class _Sweeps:
    """The sweeps that can form a pair of leaves, priced."""

    def __init__(self, program: Program, request: Request, bits: dict[Node, int], gates: dict[int, Gate]) -> None:
        assert program.loss is not None
        self.program, self.request, self.bits, self.gates = program, request, bits, gates
        self.reach = _Reach(program)
        useful = self.reach.above[program.loss.index]
        self.curved = np.array(
            [v.op is not None and v.part == "model" and useful[v.index] and rule_for(v).curved(v) for v in program],
            dtype=bool,
        )
        self._prices: dict[tuple[int, int], float] = {}

    def price(self, leaf: int, row: int) -> float:
        """Flops per sample of sweeping ``leaf``'s tangents to get its block with ``row``."""
        if (leaf, row) not in self._prices:
            basis, _, seed, width, copies = self.basis(leaf, row)
            within, _, meeting, back = self._regions(seed, basis, [row])
            self._prices[leaf, row] = width * self._flops(seed, within, meeting, back, basis, copies)
        return self._prices[leaf, row]

    def basis(self, leaf: int, row: int) -> tuple[Basis, Gate | None, Node, int, int]:
        """Basis of the sweep, its layer, the node to seed, the number of directions, and channels per direction."""
        node, gate = self.request.leaves[leaf], self.gates.get(leaf)
        if gate is not None and self._before(row, gate):
            gate = None  # a row at or before the layer would need the layer's own curvature
        if gate is not None and gate.channels > 1:
            return "channel", gate, gate.node, node.numel // gate.channels, gate.channels
        if gate is not None and not gate.channels and (gate.node.numel < node.numel or self._linear(row)):
            return "activation", gate, gate.node, gate.node.numel, 1
        return "parameter", None, node, node.numel, 1

    def _linear(self, row: int) -> bool:
        gate = self.gates.get(row)
        return gate is not None and not gate.channels

    def target(self, basis: Basis, row: int) -> Node:
        """Where the rows of a leaf are taken: at its layer's output, if both layers are linear."""
        return self.gates[row].node if basis == "activation" and self._linear(row) else self.request.leaves[row]

    def _before(self, row: int, gate: Gate) -> bool:
        leaf = self.request.leaves[row]
        if leaf.op is not None:
            return bool(self.reach.above[gate.node.index, leaf.index])
        return bool(self.bits[gate.node.inputs[0]] >> row & 1)

    def _regions(self, seed: Node, basis: Basis, rows: list[int]) -> tuple[Any, Any, Any, Any]:
        """Masks: nodes whose tangents are needed, those kept, the curved nodes that matter, nodes on the way back."""
        above = self.reach.above
        below = above[:, seed.index]
        targets = [self.target(basis, r) for r in rows]
        reachable: Any = above[:, [t.index for t in targets]].any(1)
        meeting, held, entry = (np.zeros(len(below), dtype=bool) for _ in range(3))
        for u in np.flatnonzero(self.curved & below & reachable):
            node = self.program.nodes[u]
            if node is seed:
                continue
            for i, j in curved_pairs(node):
                row_side, column_side = node.inputs[i].index, node.inputs[j].index
                if reachable[row_side] and below[column_side]:
                    meeting[u] = held[column_side] = entry[row_side] = True
        for r, target in zip(rows, targets, strict=True):
            if target is not self.request.leaves[r] and self.gates[r].argument == 1:
                into = target.inputs[0].index  # the path to a later layer's input meets that layer's adjoint
                held[into] |= below[into]
        within = above[held].any(0) & below
        back = above[entry].any(0) & reachable
        return within, held, meeting, back

    def _flops(self, seed: Node, within: Any, meeting: Any, back: Any, basis: Basis, copies: int) -> float:
        flops = self.reach.flops
        if basis == "channel":
            spread = np.where(self.reach.thin(seed), 1, copies)
            forward = (flops * spread)[within].sum()
        else:
            forward = flops[within].sum()
        own = flops[seed.index] if within[seed.index] else 0
        return float(forward - own + 2 * copies * flops[back].sum())

    def column(self, pairs: list[Pair]) -> Column:
        """The sweep for several (leaf, row) pairs with the same seed and basis."""
        leaves, rows = sorted({leaf for leaf, _ in pairs}), sorted({row for _, row in pairs})
        basis, gate, seed, width, copies = self.basis(*pairs[0])
        within, held, meeting, back = self._regions(seed, basis, rows)
        spread = np.full(len(self.program.nodes), copies)
        if basis == "channel":
            spread[self.reach.thin(seed)] = 1
        size = self.reach.numel * spread
        largest = int(
            max(size[within].max(initial=1), (self.reach.numel * copies)[back & self.reach.batched].max(initial=1))
        )
        unit = int(size[held].sum()) + 2 * largest
        targets = {r: self.target(basis, r) for r in rows}
        if basis == "activation":
            unit += sum({t: t.numel for t in targets.values()}.values())
        nodes = self.reach.nodes
        return Column(
            leaves, basis, gate, pairs, targets, width, seed, nodes(within), nodes(held), nodes(meeting),
            int(self._flops(seed, within, meeting, back, basis, copies)), unit, largest,
        )  # fmt: skip
