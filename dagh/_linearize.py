"""A loss linearized at a point: a fixed list of steps that turns directions into Hessian products.

Everything that does not depend on the directions is planned and computed when the list is made: which nodes move, which
ones bend, which rows may be overwritten, and each node's derivatives (:mod:`dagh._local`). A product is then one sweep
of tangents forward and one of rows back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from dagh import _local_conv, _local_smooth  # noqa: F401  (these register their classes)
from dagh._ir import Node
from dagh._local import Local, Site, make_local
from dagh._local_products import NarrowLocal

if TYPE_CHECKING:
    from dagh._state import State

Part = Literal["full", "outer", "functional"]


@dataclass
class _Step:
    """One node: where its arguments' tangents are, and where its arguments' rows go."""

    node: int
    local: Local
    moving: tuple[tuple[int, int], ...]
    wanted: tuple[tuple[int, int], ...]


class Linearization:
    """``v ↦ H v`` of ``L`` at one state, for directions of ``sources`` and rows of ``targets``.

    ``part="outer"`` bends at the nodes of the loss alone, ``"functional"`` at those of the model alone; sweeps stop
    where nothing is left to bend. The result does not change when the model's parameters do.
    """

    def __init__(self, state: State, sources: Sequence[Node], targets: Sequence[Node], part: Part = "full") -> None:
        self.state, self.sources, self.targets = state, list(sources), list(targets)
        program = state.program
        moving = {n for n in program.descendants(self.sources) if n.dtype.is_floating_point}
        route = program.descendants(self.targets)
        self._bending = self._find_bending(moving, route, part)
        needed = program.ancestors([p for n, args in self._bending.items() for p in _parents(n, args)])
        with torch.no_grad():
            steps = self._make(moving & needed, route)
        self._steps = steps
        self._forward = [s for s in steps if s.moving and program.nodes[s.node] in needed]
        self._backward = [s for s in reversed(steps) if s.wanted]
        #: targets whose rows are passed on
        self._taken = {n.index for n in self.targets if n.op is not None}
        self._lock = threading.Lock()

    def _find_bending(self, moving: set[Node], route: set[Node], part: Part) -> dict[Node, tuple[int, ...]]:
        """Nodes whose curvature counts, with the arguments whose tangents it takes."""
        state, bending = self.state, {}
        for node in state.program:
            if node.op is None or (part != "full" and (node.part == "loss") != (part == "outer")):
                continue
            rule = state.rule(node)
            if not rule.curved(node) or node not in state.adjoints:
                continue
            pairs = rule.pairs(node)
            used = []
            for j, other in enumerate(node.inputs):
                hit = (pairs is None or (i, j) in pairs for i, p in enumerate(node.inputs) if _carries(p, route))
                if other in moving and any(hit):
                    used.append(j)
            if used:
                bending[node] = tuple(used)
        return bending

    def _make(self, moving: set[Node], route: set[Node]) -> list[_Step]:
        """One step per node that has a tangent to push or a row to pull, in topological order."""
        state, program = self.state, self.state.program
        sites: list[Site] = []
        with_rows: set[Node] = set()
        for node in reversed(program.nodes):
            if node.op is None:
                continue
            bends, has_row = node in self._bending, node in with_rows
            wanted = tuple(i for i, p in enumerate(node.inputs) if _carries(p, route)) if bends or has_row else ()
            if bends and not has_row:
                pairs = state.rule(node).pairs(node)
                tangents = self._bending[node]
                wanted = tuple(i for i in wanted if pairs is None or any((i, j) in pairs for j in tangents))
            with_rows.update(node.inputs[i] for i in wanted)
            arguments = tuple(i for i, p in enumerate(node.inputs) if p in moving)
            if not wanted and not (arguments and node in moving):
                continue
            delta = state.adjoints[node] if bends else None
            sites.append(Site(node, state.rule(node), state.call(node), delta, arguments, wanted, has_row))
        return [
            _Step(
                s.node.index,
                make_local(s),
                tuple((i, s.node.inputs[i].index) for i in s.moving),
                tuple((i, s.node.inputs[i].index) for i in s.wanted),
            )
            for s in reversed(sites)
        ]

    def product(self, directions: Mapping[Node, Tensor]) -> dict[Node, Tensor]:
        """``H v`` for bundles ``[B, *shape]`` of directions: ``[B, *shape]`` per target (absent where zero).

        A source that is not named stands still.
        """
        nodes = self.state.program.nodes
        tangents: list[Tensor | None] = [None] * len(nodes)
        rows: list[Tensor | None] = [None] * len(nodes)
        taken: dict[int, Tensor] = {}
        mine: set[int] = set()  # nodes whose row is a tensor of its own, which may be overwritten
        seeds = {node.index: _spread(t.unsqueeze(0), self.state.values[node]) for node, t in directions.items()}
        for index, seed in seeds.items():
            tangents[index] = seed
        with self._lock, torch.no_grad():
            several = any(t.shape[0] > 1 for t in directions.values())
            for step in self._steps:
                step.local.transient = several
            for step in self._forward:
                t = _gather(step.moving, tangents)
                if t:
                    moved = _spread(step.local.push(t), step.local.call.out)
                    seed_here = seeds.get(step.node)
                    tangents[step.node] = moved if seed_here is None else moved + seed_here
            for step in self._backward:
                row, own = rows[step.node], step.node in mine
                rows[step.node] = None
                if step.node in self._taken and row is not None:
                    taken[step.node] = row.clone()
                t = _gather(step.moving, tangents) if step.local.adjoint is not None else {}
                if row is None and not t:
                    continue
                if isinstance(step.local, NarrowLocal) and row is not None:
                    ((_, parent),) = step.wanted
                    before = rows[parent]
                    rows[parent] = step.local.into(before if before is None or parent in mine else before.clone(), row)
                    mine.add(parent)
                    continue
                found = step.local.pull(row, t, own)
                passed = own and step.local.passes and len(found) == 1
                for arg, parent in step.wanted:
                    term = found.get(arg)
                    if term is None:
                        continue
                    before = rows[parent]
                    if before is None:
                        rows[parent] = term
                        if not (step.local.fresh or passed):
                            continue
                    else:
                        rows[parent] = before.add_(term) if parent in mine else before + term
                    mine.add(parent)
        for index, kept in taken.items():
            rows[index] = kept
        return {n: _total(r) for n in self.targets if (r := rows[n.index]) is not None}

    def bytes(self) -> int:
        """Memory held by the values, adjoints and local derivatives."""
        held = [*self.state.values.values(), *self.state.adjoints.values()]
        for step in self._steps:
            held += step.local.tensors()
        return storage_bytes(held)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind ``tensors``."""
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values())


def _parents(node: Node, args: Iterable[int]) -> list[Node]:
    return [node.inputs[i] for i in args]


def _carries(parent: Node, route: set[Node]) -> bool:
    return parent in route and parent.dtype.is_floating_point


def _gather(places: tuple[tuple[int, int], ...], tangents: list[Tensor | None]) -> dict[int, Tensor]:
    return {i: t for i, k in places if (t := tangents[k]) is not None}


def _spread(t: Tensor, value: Tensor) -> Tensor:
    """A bundle with as many samples as the node's value has."""
    return t if t.shape[0] == value.shape[0] else t.expand(value.shape[0], *t.shape[1:])


def _total(row: Tensor) -> Tensor:
    return row.sum(0) if row.shape[0] > 1 else row[0]
