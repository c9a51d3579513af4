"""How much memory is alive at each moment: a sweep is walked through without doing it.

Bundles are counted as the sweeps of :mod:`dagh._sweep` make and drop them: tangents until their last user (or, where
curvature reads them, until the way back has passed), rows until they are pulled further, element-wise factors that are
not multiplied out, copies in which a product wants its arguments, and the temporaries of a rule.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dagh._costs import VIEWS
from dagh._ir import Node, Program
from dagh._rules import Rule, rule_for
from dagh._rules._elementwise import Unary

if TYPE_CHECKING:
    from dagh._plan_sweeps import Column, Table
    from dagh._pricing import Reach, Regions

#: The allocator of the C library keeps freed blocks of up to 32 MiB for itself and cannot always use them again:
#: with sizes that change from node to node, resident memory was 1.1 to 2 times what is alive (median 1.5).
RESIDENT = 1.6
#: The same where all samples' rows of H_O are pulled back: ranges of samples alike, one after the other.
RESIDENT_ROWS = 1.38
#: What several shares of the samples take beyond that: each thread has an allocator's pool of its own.
APART = 1.2
#: The same at its worst, which budgets are cut for.
RESIDENT_MOST = 2.2
#: Kernels' own memory (packed factors of matrix products, oneDNN's compiled convolutions), whatever the problem.
BASE = 3 * 2**20


@dataclass(frozen=True)
class Alive:
    """Most numbers alive at once during a sweep, per direction: for every sample, and once."""

    each: float
    once: float

    def elements(self, samples: int, directions: int) -> float:
        return directions * (samples * self.each + self.once)


#: Of a sweep that was not walked through.
NOTHING = Alive(0.0, 0.0)


class _Live:
    """Bundles alive, by token, and the most that there were."""

    def __init__(self) -> None:
        self.total, self.peak = [0.0, 0.0], [0.0, 0.0]
        self._sizes: dict[int, tuple[int, float]] = {}
        self._held: dict[int, int] = {}

    def take(self, kind: int, size: float) -> int:
        """A new bundle; ``kind`` 0 counts for every sample, 1 once."""
        token = len(self._sizes)
        self._sizes[token], self._held[token] = (kind, size), 1
        self.total[kind] += size
        self.peak[kind] = max(self.peak[kind], self.total[kind])
        return token

    def share(self, token: int) -> int:
        self._held[token] += 1
        return token

    def drop(self, token: int | None) -> None:
        if token is None:
            return
        self._held[token] -= 1
        if self._held[token] == 0:
            kind, size = self._sizes[token]
            self.total[kind] -= size

    def need(self, size: float) -> None:
        """Temporaries of one operation."""
        self.peak[0] = max(self.peak[0], self.total[0] + size)


def _scales(rule: Rule, node: Node, arg: int) -> bool:
    """Whether the sweeps keep a bundle as a factor here."""
    if type(rule).scaling is Rule.scaling:
        return False
    batched = [p for p in node.inputs if p.batched]
    return node.inputs[arg].shape == node.shape and (len(batched) == 1 or rule.derivative != "smooth")


def _scratch(rule: Rule, node: Node, into: float, out: float) -> float:
    """Temporaries of a rule from a bundle of ``into`` to one of ``out`` elements, apart from these two."""
    if not rule.closed_form:
        return 3 * (into + out)
    if node.operation in VIEWS:
        return 0.0
    if rule.derivative == "bilinear" and rule.flops(node) > 2 * node.numel:
        return into  # the argument in the order that the product wants
    if rule.derivative == "smooth":
        return 2 * out
    return 0.0


class Walk:
    """One sweep; ``forward[v]`` and ``backward[v]`` are the copies in which tangents and rows of a node stand."""

    def __init__(self, program: Program, keep: bool, forward: Any, backward: Any, copies: int) -> None:
        self.program, self.keep, self.copies = program, keep, copies
        self.forward, self.backward = forward, backward
        self.live = _Live()
        self.tangents: dict[Node, int] = {}
        self.lazy: set[Node] = set()
        self.own: set[Node] = set()  # rows that the sweep may change in place

    @property
    def alive(self) -> Alive:
        return Alive(*self.live.peak)

    def _tangent(self, node: Node) -> float:
        return float(node.numel * self.forward[node.index])

    def _row(self, node: Node) -> float:
        return float(node.numel * self.backward[node.index])

    def push(self, seed: Node, within: Collection[Node], held: Collection[Node], width: float) -> None:
        """Tangents from ``seed``, whose own bundle has ``width`` elements for every sample."""
        live, tangents = self.live, self.tangents
        tangents[seed] = live.take(0, width)
        waiting = {n: sum(u in within for u in self.program.users[n]) for n in within}
        for node in self.program:
            if node.op is None or node not in within or node is seed:
                continue
            moving = [p for p in dict.fromkeys(node.inputs) if p in tangents]
            if not moving:
                continue
            rule, size = rule_for(node), self._tangent(node)
            kind = 0 if node.batched else 1
            arg = node.inputs.index(moving[0])
            if len(moving) == 1 and _scales(rule, node, arg):
                tangents[node] = live.share(tangents[moving[0]])
                self.lazy.add(node)
            elif node.operation in VIEWS and len(moving) == 1:
                self._write(moving[0])
                tangents[node] = live.share(tangents[moving[0]])
            else:
                for parent in moving:
                    self._write(parent)
                into = self._tangent(moving[0])
                if self.forward[moving[0].index] < self.forward[node.index]:
                    into *= self.copies  # spread out, where the operation mixes channels
                tangents[node] = live.take(kind, size)
                live.need(_scratch(rule, node, into, size))
            for parent in dict.fromkeys(node.inputs):
                if parent in waiting:
                    waiting[parent] -= 1
                    if waiting[parent] == 0 and parent not in held:
                        live.drop(tangents.pop(parent, None))

    def _write(self, node: Node) -> None:
        """Multiply a factor out."""
        if node in self.lazy and node in self.tangents:
            self.lazy.discard(node)
            token = self.live.take(0 if node.batched else 1, self._tangent(node))
            self.live.drop(self.tangents[node])
            self.tangents[node] = token

    def pull(
        self, start: dict[Node, float], targets: Collection[Node], curved: Collection[Node], spare: Collection[Node]
    ) -> None:
        """Rows from ``start``, and from the curvature of ``curved``, to ``targets``."""
        live = self.live
        rows: dict[Node, int] = {n: live.take(0, size) for n, size in start.items()}
        lazy: set[Node] = set()
        self.own = set()
        found: list[int] = []
        route = self.program.descendants(list(targets))
        for node in reversed(self.program.nodes):
            if node not in spare:
                live.drop(self.tangents.pop(node, None))
            current, own = rows.pop(node, None), node in self.own
            if node in targets and current is not None:
                current = self._written(node, current, lazy, own)
                found.append(live.share(current))
                own = False
            if node.op is None or node not in route:
                live.drop(current)
                continue
            rule = rule_for(node)
            args = [i for i, p in enumerate(node.inputs) if p in route and p.dtype.is_floating_point]
            if current is not None:
                scaled = {i for i in args if _scales(rule, node, i)}
                if len(scaled) < len(args):
                    current = self._written(node, current, lazy, own)
                for i in args:
                    parent = node.inputs[i]
                    if i in scaled:
                        self._add(rows, parent, live.share(current), lazy, scaled=True, own=own and len(args) == 1)
                        continue
                    if node.operation in VIEWS:
                        self._add(rows, parent, live.share(current), lazy)
                        continue
                    into = self._row(node) * (self.copies if self._spread(node, parent) else 1)
                    kind, size = (0 if parent.batched or self.keep else 1), self._row(parent)
                    live.need(_scratch(rule, node, into, size))
                    self._add(rows, parent, live.take(kind, size), lazy, own=rule.fresh)
                live.drop(current)
            if node in curved and rule.curved(node):
                self._curve(rule, node, args, rows, lazy)

    def _written(self, node: Node, token: int, lazy: set[Node], own: bool) -> int:
        """A row with its factor multiplied out: in place where it is our ``own``, else in new memory."""
        if node not in lazy:
            return token
        lazy.discard(node)
        if own:
            return token
        written = self.live.take(0, self._row(node))
        self.live.drop(token)
        return written

    def _spread(self, node: Node, parent: Node) -> bool:
        return bool(self.backward[node.index] < self.backward[parent.index])

    def _curve(self, rule: Rule, node: Node, args: list[int], rows: dict[Node, int], lazy: set[Node]) -> None:
        pairs = rule.pairs(node)
        for i in args:
            others = [p for j, p in enumerate(node.inputs) if p in self.tangents and (not pairs or (i, j) in pairs)]
            if not others:
                continue
            for p in others:
                self._write(p)
            parent = node.inputs[i]
            kind, size = (0 if parent.batched or self.keep else 1), self._row(parent)
            self.live.need(_scratch(rule, node, self._tangent(others[0]), size) + (size if kind == 0 else 0))
            self._add(rows, parent, self.live.take(kind, size), lazy)

    def _add(
        self, rows: dict[Node, int], node: Node, token: int, lazy: set[Node], *, scaled: bool = False, own: bool = False
    ) -> None:
        """A row arrives: the first one stays as it is, others are added to it, in place if nobody else holds it."""
        before = rows.get(node)
        if before is None:
            rows[node] = token
            if scaled:
                lazy.add(node)
            if own:
                self.own.add(node)
            return
        kind, size = (0 if node.batched or self.keep else 1), self._row(node)
        if node in self.own:
            if kind == 0 and scaled:
                self.live.need(size)
        else:
            rows[node] = self.live.take(kind, size)
            if kind == 0:
                self.live.need(size * ((node in lazy) + scaled))
            self.live.drop(before)
            self.own.add(node)
        lazy.discard(node)
        self.live.drop(token)


def held_by_state(program: Program, leaves: Collection[Node], size: int) -> tuple[float, float]:
    """Numbers per sample in the values, and in adjoints and local derivatives of what depends on ``leaves``."""
    moving = program.descendants(list(leaves))
    values = local = 0.0
    for node in program:
        if node.op is None or not node.batched or node.operation in VIEWS:
            continue
        rule = rule_for(node)
        values += node.numel
        if node not in moving:
            continue
        if node.inputs and not (rule.derivative == "linear" and _scales(rule, node, 0)):
            local += node.numel
        if isinstance(rule, Unary):
            local += node.numel * (1 + rule.curved(node))
        elif rule.derivative == "kinked":
            local += node.numel * 8 / size  # places of the largest elements
    return values, local


def _spread_out(reach: Reach, seed: Node, copies: int) -> Any:
    """The copies in which tangents from ``seed`` stand at every node: one as long as each stays in its channel."""
    return np.where(reach.thin(seed), 1, copies) if copies > 1 else np.ones_like(reach.numel)


def of_sweep(reach: Reach, part: Any, meeting: Any, back: Any, targets: Collection[Node], *, keep: bool) -> Alive:
    """What a column or a bridge (``part``) keeps alive; masks ``meeting`` and ``back`` as its price was made with."""
    seed, copies = (part.seed, part.copies) if hasattr(part, "seed") else (part.node, part.copies)
    forward, backward = _spread_out(reach, seed, copies), reach.numel * 0 + 1
    if copies > 1:
        backward = backward + (copies - 1) * ~reach.packed(seed, meeting, back)[1]
    walk = Walk(reach.program, keep, forward, backward, copies)
    if not part.within and not part.curved:
        walk.pull({seed: float(seed.numel)}, targets, (), ())
    else:
        gate = getattr(part, "gate", None)
        unfolded = gate is not None and gate.channels and gate.argument == 1 and copies > 1
        walk.push(seed, part.within, part.held, seed.numel / copies if unfolded else 0.0)
        start, via = {}, getattr(part, "via", None)
        if via is not None:
            for node in [*part.after, *(p for p in part.paths if p not in walk.tangents)]:
                walk.live.take(0 if node.batched or keep else 1, float(node.numel * copies))
            if part.folded:  # the rows at the bridge, and a copy in the order of the product
                walk.live.need(2.0 * via.numel * copies)
            else:
                start = {via: float(via.numel * backward[via.index])}
        here = [t for t in targets if t not in getattr(part, "after", ())]
        walk.pull(start, here, part.curved, part.paths)
    return walk.alive


def of_tangents(reach: Reach, column: Column) -> Alive:
    """What the tangents of a column keep alive with the rows that they are multiplied by."""
    forward = _spread_out(reach, column.seed, column.copies)
    walk = Walk(reach.program, True, forward, forward, column.copies)
    walk.push(column.seed, column.within, column.held, 0.0)
    # The row, and copies of both in the order of the product.
    walk.live.need(4.0 * max((float(p.numel * forward[p.index]) for p in column.held), default=0.0))
    return walk.alive


def of_push(reach: Reach, table: Table, at: Node) -> Alive:
    """What the sweep of a table, forward to the node ``at``, keeps alive."""
    forward = _spread_out(reach, table.seed, table.copies)
    walk = Walk(reach.program, False, forward, forward, table.copies)
    unfolded = table.gate is not None and table.gate.argument == 1 and table.copies > 1
    walk.push(table.seed, table.within, {at}, table.seed.numel / table.copies if unfolded else 0.0)
    return walk.alive


def of_column(reach: Reach, column: Column, regions: Regions, sizes: Sequence[int]) -> Alive:
    """What the sweep of a column keeps alive, the products at its end included."""
    targets = list(column.targets.values())
    keep = column.basis in ("activation", "input")
    alive = of_sweep(reach, column, regions[2], regions[3], targets, keep=keep)
    each, once = alive.each, alive.once
    if column.basis == "activation":
        assert column.gate is not None
        inputs = max(column.gate.node.inputs[0].shape[-1], 1)
        plain = [sizes[row] for row, target in column.targets.items() if target.op is None]
        once = max(once, 2.0 * inputs * max(plain, default=0))
        ends = sum(t.numel for t in {*targets, *column.paths} if t.batched)
        if column.gate.rows > 1:
            each = max(each, ends + 2.0 * column.largest)
    return Alive(each, once)


def of_rows(reach: Reach, targets: Collection[Node]) -> Alive:
    """What pulling the loss factor's columns back keeps alive, per column."""
    program, ones = reach.program, reach.numel * 0 + 1
    walk = Walk(program, True, ones, ones, 1)
    walk.pull({program.output: float(program.output.numel)}, targets, (), ())
    return walk.alive
