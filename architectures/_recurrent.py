"""Recurrent layers, unrolled: the same weights at every step, applied to a state and new data."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

from dagh import Graph

from ._family import ANY_GRAPH
from ._plugins import Match
from ._walk import Walk

_CELLS = {1: "rnn", 3: "gru", 4: "lstm"}


@dataclass(frozen=True)
class RecurrentLayer:
    """One recurrent layer; ``nodes`` are the uses of its first recurrent weight, one for each step.

    ``recurrent`` are the weights that multiply the state, ``inputs`` the other parameters of a step. ``hidden`` is
    the length of the state, ``gates`` how many vectors of that length the weights make of it: 1 in a simple
    recurrent network, 3 in a GRU, 4 in an LSTM.
    """

    nodes: tuple[str, ...]
    module: str
    recurrent: tuple[str, ...]
    inputs: tuple[str, ...]
    steps: int
    hidden: int
    gates: int
    cell: str


@dataclass(frozen=True)
class Recurrent:
    """Recognizes weights used step after step, each use fed by the one before and by data that it did not make.

    Two steps at least, with something nonlinear between them. A layer that is merely applied several times in a row
    gets no new data, and is none.
    """

    name: str
    description: str
    fields: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(RecurrentLayer))

    def match(self, graph: Graph) -> list[Match]:
        """Each layer by itself, in the order of the computation."""
        walk = Walk.of(graph)
        chains = {w: uses for w in walk.order if walk.kind(w) == "parameter" and (uses := _steps(walk, w))}
        found = []
        for group in _cells(walk, chains):
            if not _matrices(walk, group):
                continue
            layer = _layer(walk, group, chains)
            dims = {"T": layer.steps, "h": layer.hidden, "cell": layer.cell}
            sink = layer.nodes[-1]
            found.append(Match(self.name, (layer,), layer.nodes[0], sink, dims, ANY_GRAPH))
        return sorted(found, key=lambda m: walk.order.index(m.source))


def _steps(walk: Walk, weight: str) -> list[str]:
    """The uses of a recurrent weight in the order of time; none where it is not recurrent."""
    uses = [n for n in walk.order if walk.is_weighted(n) and weight in walk.leaves(n)]
    if len(uses) < 2 or any(len(walk.sources(n)) > 1 for n in uses):
        return []
    return uses if all(_is_step(walk, a, b) for a, b in itertools.pairwise(uses)) else []


def _is_step(walk: Walk, first: str, second: str) -> bool:
    """Whether ``second`` uses what a nonlinearity made of ``first`` and of data unrelated to it."""
    if not walk.reaches(first, second):
        return False
    segment = [n for n in walk.order if walk.reaches(first, n) and walk.reaches(n, second) and n != first]
    new = [s for n in segment for s in walk.sources(n) if not walk.reaches(first, s) and not walk.reaches(s, first)]
    return bool(new) and any(walk.is_activation(n) or "softmax" in walk.operation(n) for n in segment)


def _cells(walk: Walk, chains: dict[str, list[str]]) -> list[list[str]]:
    """Weights of the same cell: each feeds the other's next step. Stacked layers feed one way only."""
    groups: list[list[str]] = []
    for weight, uses in chains.items():
        for group in groups:
            others = chains[group[0]]
            if len(uses) == len(others) and walk.reaches(uses[0], others[1]) and walk.reaches(others[0], uses[1]):
                group.append(weight)
                break
        else:
            groups.append([weight])
    return groups


def _matrices(walk: Walk, group: list[str]) -> list[str]:
    """The weights of a cell without the biases that are used together with them."""
    return [w for w in group if len(walk.sizes(w)) > 1]


def _layer(walk: Walk, group: list[str], chains: dict[str, list[str]]) -> RecurrentLayer:
    weights = _matrices(walk, group)
    uses = chains[weights[0]]
    hidden = _state(walk, uses)
    gates = max(sum(walk.numel(chains[w][1]) for w in weights) // hidden, 1)
    made: dict[str, None] = {}
    for first, second in (chains[w][:2] for w in weights):
        for node in walk.between(first, second):
            made.update(dict.fromkeys(walk.leaves(node)))
            for source in walk.sources(node):  # new data, perhaps selected from what a layer made of all steps
                made.update(dict.fromkeys(_behind(walk, source, first)))
    return RecurrentLayer(
        nodes=tuple(uses),
        module=str(walk.nx.nodes[uses[0]]["module"]),
        recurrent=tuple(weights),
        inputs=tuple(p for p in made if p not in weights),
        steps=len(uses),
        hidden=hidden,
        gates=gates,
        cell=_CELLS.get(gates, f"{gates} gates"),
    )


def _behind(walk: Walk, node: str, first: str) -> tuple[str, ...]:
    """Parameters of the layer that made new data, through selections."""
    while (
        walk.kind(node) == "operation"
        and not walk.reaches(first, node)
        and len(walk.sources(node)) == 1
        and not walk.leaves(node)
    ):
        (node,) = walk.sources(node)
    return walk.leaves(node) if walk.kind(node) == "operation" and not walk.reaches(first, node) else ()


def _state(walk: Walk, uses: list[str]) -> int:
    """Length of the state: what the second use takes, less new data put beside it."""
    (at,) = walk.sources(uses[1])
    while walk.is_move(at) and len(walk.sources(at)) == 1:
        (at,) = walk.sources(at)
    if walk.operation(at) in {"cat", "concat"}:
        return sum(walk.numel(s) for s in walk.sources(at) if walk.reaches(uses[0], s))
    return walk.numel(at)


RECURRENT = Recurrent("recurrent", "weights used at every step of a sequence: simple, gated and LSTM cells, unrolled")
