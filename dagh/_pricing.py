"""Pricing: what each sweep that can form a pair of leaves costs, from ancestry alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from dagh._costs import PASS, node_cost, node_flops, node_moved
from dagh._footprint import Alive, of_column, of_push, of_sweep
from dagh._ir import Node, Program
from dagh._plan_sweeps import Basis, Bridge, Column, Gate
from dagh._request import Pair, Request
from dagh._rules import rule_for
from dagh._strips import Strip
from dagh._structure import curved_pairs

#: Elements that a linearization keeps per element of a sample's values, and per direction while a product is formed.
_KEPT, _MOVING = 4, 3

Option = tuple[int, int, Basis]
Key = tuple[int, Basis, int]
#: Masks over the nodes: where tangents are needed, which of them are kept, curved nodes that matter, the way back.
Regions = tuple[Any, Any, Any, Any]


def gate_of(program: Program, leaf: Node) -> Gate | None:
    """The layer that is the leaf's only user: a linear one, or a plain convolution."""
    users = program.users[leaf]
    if leaf.op is not None or len(users) != 1 or users[0].inputs.count(leaf) != 1:
        return None
    node = users[0]
    argument = node.inputs.index(leaf)
    if argument == 0 or not node.inputs[0].batched:
        return None
    if node.key == "aten.linear.default" and node.inputs[0].numel and node.inputs[1].op is None:
        # Sweeps that keep axis 1 apart lay its directions out first: the order of the rows of x if axis 0 has length 1.
        apart = len(node.shape) >= 3 and node.shape[0] == 1 and node.inputs[0].shape[:2] == node.shape[:2]
        tokens = node.shape[1] if apart else 1
        return Gate(node, argument, rows=node.inputs[0].numel // node.inputs[0].shape[-1], tokens=tokens)
    if node.key == "dagh.convolution" and int(node.arg("groups")) == 1 and not node.arg("transposed"):
        return Gate(node, argument, channels=node.shape[1])
    return None


class Reach:
    """Ancestry of a program's nodes as Boolean arrays, and what each node costs."""

    def __init__(self, program: Program) -> None:
        n = len(program.nodes)
        self.program = program
        self.above = np.eye(n, dtype=bool)  # [v, u]: u is v or an ancestor of v
        for node in program:
            for parent in node.inputs:
                self.above[node.index] |= self.above[parent.index]
        self.numel = np.array([v.numel for v in program])
        self.cost = np.array([node_cost(v) for v in program])
        self.flops = np.array([node_flops(v) for v in program])
        self.moved = np.array([node_moved(v) for v in program])
        self.batched = np.array([v.batched for v in program], dtype=bool)
        self.keeps = np.array([v.op is not None and rule_for(v).keeps_channels(v) for v in program], dtype=bool)
        self._thin: dict[Node, np.ndarray[Any, Any]] = {}
        self._packed: dict[tuple[Node, bytes, bytes, Node | None], tuple[Any, Any]] = {}

    def nodes(self, mask: np.ndarray[Any, Any]) -> frozenset[Node]:
        return frozenset(self.program.nodes[i] for i in np.flatnonzero(mask))

    def mask(self, nodes: Iterable[Node]) -> np.ndarray[Any, Any]:
        """The inverse of :meth:`nodes`."""
        return np.isin(np.arange(len(self.program.nodes)), [v.index for v in nodes])

    def thin(self, seed: Node) -> np.ndarray[Any, Any]:
        """Nodes up to which tangents seeded in one channel (or token) of a node each stay in their channel."""
        if seed not in self._thin:
            below, thin = self.above[:, seed.index], np.zeros(len(self.program.nodes), dtype=bool)
            thin[seed.index] = True
            for i in np.flatnonzero(below):
                node = self.program.nodes[i]
                if node is seed:
                    continue
                moving = [p.index for p in node.inputs if below[p.index]]
                thin[i] = bool(thin[moving].all()) and self.keeps[i]
            self._thin[seed] = thin
        return self._thin[seed]

    def packed(
        self, seed: Node, meeting: np.ndarray[Any, Any], back: np.ndarray[Any, Any], spread: Node | None = None
    ) -> tuple[Any, Any]:
        """Curved nodes where such tangents leave rows that stay in their channel, and nodes whose rows all do.

        At ``spread``, rows begin that do not.
        """
        key = seed, meeting.tobytes(), back.tobytes(), spread
        if key not in self._packed:
            self._packed[key] = self._pack(seed, meeting, back, spread)
        return self._packed[key]

    def _pack(
        self, seed: Node, meeting: np.ndarray[Any, Any], back: np.ndarray[Any, Any], spread: Node | None
    ) -> tuple[Any, Any]:
        thin, below = self.thin(seed), self.above[:, seed.index]
        curves = np.zeros(len(thin), dtype=bool)
        rows = self.batched.copy()
        if spread is not None:
            rows[spread.index] = False
        for u in np.flatnonzero(meeting | back)[::-1]:
            parents = [p.index for p in self.program.nodes[u].inputs]
            keeps = self.keeps[u]
            if meeting[u]:
                curves[u] = all(thin[p] for p in parents if below[p])
            if (meeting[u] and not (keeps and curves[u])) or (back[u] and not (keeps and rows[u])):
                rows[parents] = False
        return curves, rows


class Sweeps:
    """The sweeps that can form a pair of leaves, priced."""

    def __init__(
        self,
        reached: Reach,
        request: Request,
        bits: dict[Node, int],
        gates: dict[int, Gate],
        parts: Collection[str] = ("outer", "functional"),
    ) -> None:
        program = reached.program
        assert program.loss is not None
        self.program, self.reach = program, reached
        self.request, self.bits, self.gates = request, bits, gates
        useful = reached.above[program.loss.index]
        met: dict[bool, list[tuple[int, int, int]]] = {True: [], False: []}
        for v in program:
            if v.op is not None and useful[v.index]:
                ends = [(v.index, v.inputs[i].index, v.inputs[j].index) for i, j in curved_pairs(v)]
                met[v.part == "model"] += ends
        # Curved nodes, with the argument that rows leave by and the one that tangents enter by: model's, and loss's.
        self.met, self._met_loss = (np.array(met[k], dtype=int).reshape(-1, 3).T for k in (True, False))
        self._met_strips = np.concatenate(
            [m for p, m in zip(("functional", "outer"), (self.met, self._met_loss), strict=True) if p in parts], 1
        )

    def label(self, leaf: int, basis: Basis) -> str:
        """Name of a route: the basis and whose columns."""
        name = self.request.names[leaf]
        return f"strips of {name}" if basis == "strips" else f"{basis} columns of {name}"

    def key(self, leaf: int, basis: Basis) -> Key:
        """What pairs must agree on to share a sweep: weight and bias share the outputs of their layer."""
        return self.seed(leaf, basis).index, basis, -1 if basis == "activation" else leaf

    def total(self, pairs: Collection[Pair], basis: Basis) -> float:
        """Operations per sample of one sweep for several (leaf, row) pairs."""
        if not pairs:
            return 0.0
        leaf = next(iter(pairs))[0]
        width, copies = self.shape(leaf, basis)
        rows = sorted({row for _, row in pairs})
        regions, seed = self._regions(leaf, basis, rows), self.seed(leaf, basis)
        total = width * self.sweep_cost(seed, regions, copies)
        if basis == "activation":
            total += sum(self.contraction(*pair, self.stays(*pair, regions, copies)) for pair in pairs)
        if basis == "input":
            gate, numel = self.gates[leaf], sum(self.request.sizes[row] for row in rows)
            total += (2.0 * gate.shape[0] + PASS) * width * numel
        return total

    def alternatives(self, i: int, j: int) -> dict[Option, float]:
        """Every way to form the pair, with its price per sample."""
        options: dict[Option, float] = {}
        for leaf, row in dict.fromkeys([(i, j), (j, i)]):
            for basis in self.bases(leaf, row):
                options[leaf, row, basis] = self.price(leaf, row, basis)
        return options

    def strips(self, i: int, j: int) -> dict[Option, float]:
        """The pair by strips of either leaf, with the price per sample; the loss's own curvature included."""
        pairs = dict.fromkeys([(i, j), (j, i)])
        return {(leaf, row, "strips"): self.price(leaf, row, "strips") for leaf, row in pairs}

    def bases(self, leaf: int, row: int) -> list[Basis]:
        """The bases in which the columns of a leaf can be swept for its block with ``row``."""
        gate = self.gates.get(leaf)
        if gate is None:
            return ["parameter"]
        if self._before(row, gate):  # the layer's own curvature counts; it is all there is if none follows
            return ["input", "parameter"] if self._last(gate) else ["parameter"]
        if not gate.channels:
            return ["activation", "parameter"]
        return ["channel", "parameter"] if gate.channels > 1 else ["parameter"]

    def _last(self, gate: Gate) -> bool:
        """Whether nothing after a linear layer is curved, and its weight meets its inputs alone."""
        after = self.reach.above[self.met[2], gate.node.index]
        return not gate.channels and gate.argument == 1 and not bool(after.any())

    def seed(self, leaf: int, basis: Basis) -> Node:
        """The node at which the sweep starts."""
        if basis == "input":
            return self.gates[leaf].node.inputs[0]
        return self.request.leaves[leaf] if basis in ("parameter", "strips") else self.gates[leaf].node

    def shape(self, leaf: int, basis: Basis) -> tuple[int, int]:
        """Number of directions swept, and channels (or tokens) that each stands for."""
        numel = self.request.leaves[leaf].numel
        if basis in ("parameter", "strips"):
            return numel, 1
        gate = self.gates[leaf]
        if basis == "input":
            return gate.node.inputs[0].numel, 1
        copies = gate.channels or gate.tokens
        return (numel if basis == "channel" else gate.node.numel) // copies, copies

    def price(self, leaf: int, row: int, basis: Basis) -> float:
        """Operations per sample of sweeping ``leaf``'s tangents to get its block with ``row``."""
        return self.total([(leaf, row)], basis)

    def stays(self, leaf: int, row: int, regions: Regions, copies: int) -> bool:
        """Whether what a sweep in activations finds at another linear layer is still apart by token."""
        if copies == 1 or not self._linear(row) or self.gates[row].tokens != copies:
            return False
        seed, other = self.gates[leaf].node, self.gates[row]
        _, rows = self.reach.packed(seed, regions[2], regions[3])
        into = other.node.inputs[0].index
        crossing = other.argument == 1 and self.reach.above[into, seed.index]
        return bool(rows[other.node.index]) and (not crossing or bool(self.reach.thin(seed)[into]))

    def contraction(self, leaf: int, row: int, stays: bool, passes: float = PASS) -> float:
        """Applying the inputs of the layers to what a sweep in activations found."""
        gate, sizes = self.gates[leaf], self.request.sizes
        if not self._linear(row):
            return 2.0 * gate.rows * sizes[leaf] * sizes[row] + passes * gate.node.numel * sizes[row]
        other = self.gates[row]
        terms = 2.0 if other.argument == 1 and self.reach.above[other.node.inputs[0].index, gate.node.index] else 1.0
        if gate.rows == other.rows == 1:  # kept per sample: the large product waits until the block is asked for
            return terms * passes * gate.node.numel * max(other.node.numel, other.node.inputs[0].numel)
        if stays:  # token by token; the panels of the product stay in the cache
            panel = gate.shape[0] * other.rows * sizes[row]
            return 2.0 * gate.rows * sizes[leaf] * sizes[row] + terms * 0.5 * passes * panel
        spread = sizes[leaf] * other.node.numel
        return terms * (2.0 * other.rows * sizes[leaf] * sizes[row] + (2.0 * gate.rows + passes) * spread)

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

    def _regions(self, leaf: int, basis: Basis, rows: list[int]) -> Regions:
        targets = [self.target(basis, r) for r in rows]
        if basis == "input":
            above, nothing = self.reach.above, np.zeros(len(self.program.nodes), dtype=bool)
            reachable = above[:, [t.index for t in targets]].any(1)
            return nothing, nothing, nothing, above[self.seed(leaf, basis).index] & reachable
        met = self._met_strips if basis == "strips" else None
        return self.regions(self.seed(leaf, basis), targets, self.paths(basis, rows), met)

    def paths(self, basis: Basis, rows: list[int]) -> list[Node]:
        """Inputs of linear layers whose outputs are targets: the path to them meets the layer's adjoint."""
        layers = [r for r in rows if self.target(basis, r) is not self.request.leaves[r]]
        return [self.gates[r].node.inputs[0] for r in layers if self.gates[r].argument == 1]

    def regions(self, seed: Node, targets: list[Node], paths: list[Node], met: Any = None) -> Regions:
        """What a sweep from ``seed`` passes to find rows at ``targets``, and tangents at ``paths``."""
        above = self.reach.above
        below = above[:, seed.index]
        reachable: Any = above[:, [t.index for t in targets]].any(1)
        meeting, held, entry = (np.zeros(len(below), dtype=bool) for _ in range(3))
        node, row_side, column_side = self.met if met is None else met
        active = reachable[row_side] & below[column_side] & (node != seed.index)
        meeting[node[active]] = held[column_side[active]] = entry[row_side[active]] = True
        for into in paths:
            held[into.index] |= below[into.index]
        within = above[held].any(0) & below
        back = above[entry].any(0) & reachable
        return within, held, meeting, back

    def sweep_cost(
        self, seed: Node, regions: Regions, copies: int, cost: Any = None, spread: Node | None = None
    ) -> float:
        """Price per sample and direction (or another figure per node, summed alike); rows are spread at ``spread``."""
        within, _, meeting, back = regions
        cost = self.reach.cost if cost is None else cost
        forward = curve = backward = cost
        if copies > 1:
            curves, rows = self.reach.packed(seed, meeting, back, spread)
            forward, curve, backward = (
                cost * np.where(thin, 1, copies) for thin in (self.reach.thin(seed), curves, rows)
            )
        own = forward[seed.index] if within[seed.index] else 0.0
        return float(forward[within].sum() - own + curve[meeting].sum() + backward[back].sum())

    def column(self, pairs: list[Pair], basis: Basis) -> Column:
        """The sweep for several (leaf, row) pairs with the same seed and basis."""
        leaves, rows = sorted({leaf for leaf, _ in pairs}), sorted({row for _, row in pairs})
        seed, (width, copies) = self.seed(leaves[0], basis), self.shape(leaves[0], basis)
        regions = self._regions(leaves[0], basis, rows)
        within, held, meeting, _ = regions
        backward, largest, unit = self.sizes(seed, regions, copies)
        targets = {r: self.target(basis, r) for r in rows}
        gate = None if basis == "parameter" else self.gates[leaves[0]]
        order = 1
        cost = self.total(pairs, basis)
        stays = {pair: basis == "activation" and self.stays(*pair, regions, copies) for pair in pairs}
        if basis == "activation" and gate is not None:
            order = gate.rows // copies
            unit += sum({t: int(backward[t.index]) for t in targets.values() if t.batched}.values())
            # The inputs of a layer with several rows per sample multiply what was found, before the rows are summed.
            fan = copies * max(self.gates[leaf].node.inputs[0].shape[-1] for leaf in leaves) / gate.rows
            apart = {row for (_, row), alone in stays.items() if alone}
            for row, target in targets.items():
                layer = target is not self.request.leaves[row]
                if row not in apart and (gate.rows > 1 or (layer and self.gates[row].rows > 1)):
                    into = target.inputs[0].numel if layer else 0
                    largest = max(largest, int(fan * max(into, target.numel)))
        nodes = self.reach.nodes
        flops = width * self.sweep_cost(seed, regions, copies, self.reach.flops)
        moved = width * self.sweep_cost(seed, regions, copies, self.reach.moved)
        if basis == "input":
            numel = sum(self.request.sizes[row] for row in rows)
            flops, moved = flops + 2.0 * self.gates[leaves[0]].shape[0] * width * numel, moved + width * numel
            order = self.gates[leaves[0]].rows
        if basis == "activation":
            products = sum(self.contraction(*pair, stays[pair], passes=0.0) for pair in pairs)
            flops += products
            moved += (sum(self.contraction(*pair, stays[pair]) for pair in pairs) - products) / PASS
        return Column(
            leaves=leaves, basis=basis, gate=gate, pairs=pairs, targets=targets, width=width, order=order, seed=seed,
            copies=copies, paths=[p for p in self.paths(basis, rows) if self.reach.above[p.index, seed.index]],
            within=nodes(within), held=nodes(held), curved=nodes(meeting),
            cost=cost, flops=flops, moved=moved, unit=unit, largest=largest,
        )  # fmt: skip

    def as_swept(self, column: Column, without: Collection[Node] = ()) -> Regions:
        """What the sweep of a column passes, a bridge on its way considered; not back by way of ``without``."""
        within, held, met = map(self.reach.mask, (column.within, column.held, column.curved))
        live = self.reach.mask(self.program.descendants([*column.targets.values()], without))
        met &= np.array([any(live[p.index] for p in v.inputs) for v in self.program])
        start = [column.via.index] if column.via is not None and not column.folded else []
        return within, held, met, self.reach.above[[*np.flatnonzero(met), *start]].any(0) & live

    def sizes(
        self, seed: Node, regions: Regions, copies: int, spread: Node | None = None
    ) -> tuple[np.ndarray[Any, Any], int, int]:
        """Elements of every node's rows per sample and direction, of the largest bundle, and of all that is held."""
        within, held, meeting, back = regions
        thin, apart = self.reach.thin(seed), self.reach.batched
        if copies > 1:
            apart = self.reach.packed(seed, meeting, back, spread)[1]
        forward, backward = (self.reach.numel * np.where(alone, 1, copies) for alone in (thin, apart))
        largest = int(max(forward[within].max(initial=1), backward[back & self.reach.batched].max(initial=1)))
        return backward, largest, int(forward[held].sum()) + 2 * largest

    def strip(self, pairs: list[Pair]) -> Strip:
        """The strips of one leaf for several (leaf, row) pairs."""
        leaf, rows = pairs[0][0], sorted({row for _, row in pairs})
        regions, seed = self._regions(leaf, "strips", rows), self.seed(leaf, "strips")
        width, _ = self.shape(leaf, "strips")
        within, _, meeting, back = regions
        spread = self.reach.numel * self.reach.batched
        moved = int(spread[within].sum() + spread[meeting | back].sum())
        largest = int(max(spread[within | back].max(initial=1), 1))
        kept = int(self.reach.numel[within | meeting | back].sum())
        weights = self.reach.numel[(within | back) & ~self.reach.batched]
        return Strip(
            leaf=leaf, pairs=tuple(pairs), width=width, cost=self.total(pairs, "strips"),
            flops=width * self.sweep_cost(seed, regions, 1, self.reach.flops),
            moved=width * self.sweep_cost(seed, regions, 1, self.reach.moved),
            unit=moved + _MOVING * largest, fixed=_KEPT * kept, largest=largest,
            result=2 * width + 2 * sum(self.request.sizes[r] for r in rows) + int(weights.sum()),
        )  # fmt: skip

    def alive(self, column: Column) -> Alive:
        """What the sweep of a column keeps in memory."""
        targets = list(column.targets.values())
        regions = self.regions(column.seed, targets, column.paths)
        if column.folded:
            regions = self.as_swept(column)
        return of_column(self.reach, column, regions, self.request.sizes)

    def measured(self, bridge: Bridge) -> Bridge:
        """The bridge with what its sweeps and those of its tables keep in memory, apart from what they find."""
        regions = self.regions(bridge.node, list(bridge.targets), list(bridge.paths))
        alive = of_sweep(self.reach, bridge, regions[2], regions[3], list(bridge.targets), keep=True)
        tables = tuple(replace(t, alive=of_push(self.reach, t, bridge.node)) for t in bridge.tables)
        return replace(bridge, alive=alive, tables=tables)
