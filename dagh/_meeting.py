"""Meeting at a bottleneck: sweeps that stop at a node through which everything they need passes.

Let every path from the seed of a sweep to the loss lead through a node v. The derivatives of all that comes after v by
the directions of v itself, ``C_t = ∂δ_t/∂f_v`` and ``M = ∂δ_v/∂f_v``, are found once (a *bridge*); a sweep then pushes
its tangents T to v only, and reads off ``C_t T``, ``M T`` by matrix products. Several sweeps share a bridge, and it is
narrow where they are wide: 128 directions at a residual sum instead of 384 queries, keys and values.

What comes back from v to a target before it is either swept there, or *folded*: with the tangents T' of all directions
of the target at v (a *table*, itself shared), it is ``T'ᵀ M T``. Only the curvature between the seed and v is then
swept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dagh._costs import PASS
from dagh._ir import Node
from dagh._plan_sweeps import Basis, Bridge, Column, Table
from dagh._pricing import Regions, Sweeps

#: Column-and-node combinations that are looked at; larger plans go without.
_CANDIDATES = 20_000
#: Ways back from a bridge: swept, and folded.
FOLDS = (False, True)


@dataclass
class _Cut:
    """A column stopped at a node: what is left to sweep, and what the bridge has to provide."""

    regions: Regions
    after: frozenset[Node]
    paths: frozenset[Node]
    own: bool
    """The rows at v are needed: ``M T``."""
    spread: Node | None
    """v, where rows that do not stay in their channel start from it."""
    tables: frozenset[tuple[int, Node]]
    """Leaves and targets to which nothing is swept from v: what arrives there is folded."""
    cost: float
    """Price per sample, without the contraction at the end, which stays as it is."""


def meet(sweeps: Sweeps, columns: Sequence[Column]) -> tuple[list[Column], dict[Node, Bridge]]:
    """The same columns, stopped at bridges where that is cheaper, and the bridges."""
    program = sweeps.program
    widest = max((c.width * c.copies for c in columns), default=0)
    nodes = [v for v in program if v.op is not None and v.part == "model" and v.batched and 0 < v.numel < widest]
    columns = list(columns)
    mixed = program.loss is not None and program.precision != program.loss.dtype  # a bridge multiplies across casts
    if mixed or len(nodes) * len(columns) > _CANDIDATES:
        return columns, {}
    meeting = _Meeting(sweeps)
    whole = {i: meeting.whole(c) for i, c in enumerate(columns) if c.basis != "input"}
    cuts = {
        (v, fold): {
            i: cut for i in whole if worthwhile(columns[i], v) and (cut := meeting.cut(columns[i], v, fold)) is not None
        }
        for v in nodes
        for fold in FOLDS
    }
    bridges: dict[Node, Bridge] = {}
    while True:
        best, gain = None, 0.0
        for (v, _), found in cuts.items():
            if v in bridges:
                continue
            better = {i: c for i, c in found.items() if saves(whole[i], c.cost)}
            if better:
                bridge, price = meeting.bridge(v, list(better.values()))
                total = saving(sum(whole[i] - c.cost for i, c in better.items()), price)
                if total > gain:
                    best, gain = (v, bridge, price, better), total
        if best is None:
            return columns, bridges
        v, bridge, price, better = best
        bridges[v] = bridge
        for i, cut in better.items():
            columns[i] = meeting.stopped(columns[i], v, cut, whole.pop(i), price / len(better))
        cuts = {key: {i: c for i, c in found.items() if i in whole} for key, found in cuts.items()}


def worthwhile(column: Column, v: Node) -> bool:
    """Whether a bridge can pay at all: it is narrower than the sweep."""
    return v.numel < column.width * column.copies


def saves(before: float, after: float) -> bool:
    """Whether a column is better off."""
    return after < 0.9 * before


def saving(gained: float, price: float) -> float:
    """What a bridge is worth."""
    return gained - price


class _Meeting:
    def __init__(self, sweeps: Sweeps) -> None:
        self.sweeps, self.reach = sweeps, sweeps.reach
        loss = sweeps.program.loss
        assert loss is not None
        self.useful: Any = self.reach.above[loss.index]
        self._jumps: dict[Node, Any] = {}
        self._apart: dict[Node, bool] = {}

    def whole(self, column: Column) -> float:
        """Price of a column's sweep as it is."""
        return column.width * self.sweeps.sweep_cost(column.seed, self._regions(column), column.copies)

    def _regions(self, column: Column) -> Regions:
        return self.sweeps.regions(column.seed, list(column.targets.values()), column.paths)

    def jumps(self, v: Node) -> Any:
        """Nodes other than v and its descendants that a descendant of v uses."""
        if v not in self._jumps:
            after = self.reach.above[:, v.index]
            mask = np.zeros(len(after), dtype=bool)
            for u in np.flatnonzero(after & self.useful):
                if u != v.index:
                    mask[[p.index for p in self.sweeps.program.nodes[u].inputs]] = True
            self._jumps[v] = mask & ~after
        return self._jumps[v]

    def separates(self, v: Node, start: Node) -> bool:
        """Whether all paths from ``start`` to the loss lead through v."""
        above = self.reach.above
        return bool(above[v.index, start.index]) and not bool((above[:, start.index] & self.jumps(v)).any())

    def apart(self, v: Node) -> bool:
        """Whether the rows at v by v's own directions stay in their channel."""
        if v not in self._apart:
            regions = self.sweeps.regions(v, [v], [])
            self._apart[v] = self._copies(v) > 1 and bool(self.reach.packed(v, regions[2], regions[3])[1][v.index])
        return self._apart[v]

    def cut(self, column: Column, v: Node, fold: bool) -> _Cut | None:
        """The column stopped at v, if v separates its seed and everything before v that it needs from the rest.

        ``fold``: with tables for the targets before v.
        """
        above, seed = self.reach.above, column.seed
        if v is seed or not self.separates(v, seed):
            return None
        targets = list(dict.fromkeys(column.targets.values()))
        before = [t for t in targets if above[v.index, t.index]]
        if not all(self.separates(v, t) for t in before if t is not v):
            return None
        after: Any = above[:, v.index].copy()
        after[v.index] = False

        _, held, meeting, _ = self._regions(column)
        beyond = bool((meeting & after).any())
        paths = frozenset(p for p in column.paths if after[p.index])
        aims = frozenset(t for t in targets if t not in before) if beyond else frozenset()
        own = bool(before) and beyond
        if not own and not paths and not aims:
            return None
        if fold and (not own or self.apart(v) or v in before):
            return None
        tables = frozenset((row, t) for row, t in column.targets.items() if fold and t in before)
        held = held & ~after
        held[v.index] = True
        below = above[:, seed.index]
        local = self.sweeps.regions(seed, before, [p for p in column.paths if p not in paths])
        meeting, entry = local[2] & ~after, np.zeros(len(after), dtype=bool)
        node, rows, columns = self.sweeps.met
        reachable: Any = above[:, [t.index for t in before]].any(1)
        active = meeting[node] & reachable[rows] & below[columns]
        entry[rows[active]] = True
        if own and not fold:
            entry[v.index] = True
        back = above[entry].any(0) & reachable
        regions = above[held].any(0) & below, held, meeting, back
        spread = v if own and not fold and not self.apart(v) else None
        cost = column.width * self.sweeps.sweep_cost(seed, regions, column.copies, spread=spread)
        found = _Cut(regions, aims, paths, own, spread, tables, 0.0)
        found.cost = cost + self._products(column, v, found)
        return found

    def _copies(self, v: Node) -> int:
        return v.shape[1] if len(v.shape) >= 3 and v.shape[0] == 1 else 1

    def _products(self, column: Column, v: Node, cut: _Cut, passes: float = PASS) -> float:
        """Multiplying the tangents at v by what the bridge found beyond it, and by its tables."""
        copies = self._copies(v)
        thin, forward = column.copies > 1 and self.reach.thin(column.seed)[v.index], self.reach.thin(v)
        total = 0.0
        for end in [*cut.after, *cut.paths, *([v] if cut.own else [])]:
            apart = self.apart(v) if end is v else copies > 1 and bool(forward[end.index])
            directions = column.width * (1 if thin and apart else column.copies)
            inner = v.numel / (copies if apart else column.copies if thin else 1)
            total += directions * end.numel * (2.6 * inner + passes)
        for row, target in cut.tables:
            table = self.table(row, target, v)
            written = v.numel + (target.numel if target.batched else 0)
            half = 0.5 if column.mirrored is target else 1.0
            total += column.width * column.copies * (2.6 * half * v.numel * table.width + passes * written)
        return total

    def table(self, row: int, target: Node, v: Node) -> Table:
        """The tangents at v by all directions of a leaf, or of the outputs of its layer."""
        gate = self.sweeps.gates.get(row)
        if target.op is not None and gate is not None:
            basis: Basis = "activation"
        else:
            basis = "channel" if gate is not None and gate.channels > 1 else "parameter"
        seed = target if basis == "parameter" else self.sweeps.seed(row, basis)
        width, copies = self.sweeps.shape(row, basis)
        regions = self._up_to(seed, v)
        return Table(
            target=target, seed=seed, gate=gate if basis == "channel" else None, copies=copies, width=width,
            within=self.reach.nodes(regions[0]), largest=self.sweeps.sizes(seed, regions, copies)[1],
        )  # fmt: skip

    def _up_to(self, seed: Node, v: Node) -> Regions:
        """A sweep forward alone."""
        nothing = np.zeros(len(self.reach.numel), dtype=bool)
        held = nothing.copy()
        held[v.index] = True
        return self.reach.above[v.index] & self.reach.above[:, seed.index], held, nothing, nothing

    def _elements(self, table: Table, v: Node) -> int:
        """Numbers that a table holds per sample."""
        return table.width * v.numel * (1 if self.reach.thin(table.seed)[v.index] else table.copies)

    def bridge(self, v: Node, cuts: Sequence[_Cut]) -> tuple[Bridge, float]:
        """The bridge that serves some cuts, and its price."""
        aims = set().union(*(c.after for c in cuts)) | ({v} if any(c.own for c in cuts) else set())
        paths = set().union(*(c.paths for c in cuts))
        copies = self._copies(v)
        regions = self.sweeps.regions(v, sorted(aims, key=lambda t: t.index), sorted(paths, key=lambda t: t.index))
        within, held, meeting, _ = regions
        width = v.numel // copies
        price = width * self.sweeps.sweep_cost(v, regions, copies)
        wanted = sorted(set().union(*(c.tables for c in cuts)), key=lambda one: (one[1].index, one[0]))
        tables = tuple({t: self.table(row, t, v) for row, t in wanted}.values())
        for table in tables:
            price += table.width * self.sweeps.sweep_cost(table.seed, self._up_to(table.seed, v), table.copies)
        ends = self.reach.packed(v, regions[2], regions[3])[1] & (copies > 1)
        size = sum(t.numel * (1 if ends[t.index] else copies) for t in aims)
        size += sum(t.numel * (1 if self.reach.thin(v)[t.index] else copies) for t in paths)
        nodes = self.reach.nodes
        found = Bridge(
            node=v, copies=copies, width=width, within=nodes(within), held=nodes(held), curved=nodes(meeting),
            targets=tuple(sorted(aims, key=lambda t: t.index)), paths=tuple(sorted(paths, key=lambda t: t.index)),
            elements=width * size + sum(self._elements(t, v) for t in tables), tables=tables,
            largest=int(max((self.reach.numel * copies)[within | regions[3]].max(initial=1), 1)),
        )  # fmt: skip
        return found, price

    def stopped(self, column: Column, v: Node, cut: _Cut, whole: float, share: float) -> Column:
        """The column as it will be swept; its figures include its share of the bridge."""
        within, held, meeting, _ = cut.regions
        sweeps, nodes = self.sweeps, self.reach.nodes

        def figure(kind: Any) -> float:
            before = sweeps.sweep_cost(column.seed, self._regions(column), column.copies, kind)
            return column.width * (
                sweeps.sweep_cost(column.seed, cut.regions, column.copies, kind, cut.spread) - before
            )

        products = self._products(column, v, cut, 0.0)
        written = (self._products(column, v, cut) - products) / PASS
        if column.basis != "activation":
            _, largest, unit = sweeps.sizes(column.seed, cut.regions, column.copies, cut.spread)
            whole_rows = v.numel * column.copies if cut.own else 0
            column = replace(column, largest=max(largest, whole_rows), unit=unit + 2 * whole_rows)
        return replace(
            column, within=nodes(within), held=nodes(held), curved=nodes(meeting),
            via=v, spread=cut.spread, after=cut.after, folded=bool(cut.tables),
            cost=column.cost - whole + cut.cost + share,
            flops=column.flops + figure(self.reach.flops) + products,
            moved=column.moved + figure(self.reach.moved) + written,
        )  # fmt: skip
