"""Residual blocks: a branch added to what it was computed from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from dagh import Graph

from ._family import ANY_GRAPH
from ._plugins import Match
from ._walk import Walk


@dataclass(frozen=True)
class ResidualBlock:
    """``s(x) + f(x)``: ``source`` is x, ``node`` the sum.

    ``shortcut`` is the kind of s: ``"identity"`` (rearranged or scaled at most), or ``"linear"`` (a projection,
    pooling, padding, normalization), with its operations in ``shortcut_nodes``. ``parameters`` are those of the
    branch f, ``depth`` counts its weight layers, ``activation`` follows the sum.
    """

    node: str
    module: str
    source: str
    shortcut: Literal["identity", "linear"]
    shortcut_nodes: tuple[str, ...]
    branch_nodes: tuple[str, ...]
    parameters: tuple[str, ...]
    shortcut_parameters: tuple[str, ...]
    depth: int
    activation: str | None


@dataclass(frozen=True)
class Residual:
    """Recognizes sums of a tensor, or a linear function of it, and a branch computed from it.

    The branch has a weight layer at least; where the shortcut has weights of its own, the branch must be nonlinear,
    or the sum would be one linear layer written as two.
    """

    name: str
    description: str
    fields: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(ResidualBlock))

    def match(self, graph: Graph) -> list[Match]:
        """Each block by itself, in the order of the computation."""
        walk = Walk.of(graph)
        statements = _statements(walk)
        found = []
        for node in walk.order:
            block = _block(walk, node)
            if block is not None:
                dims = {"depth": block.depth, "shortcut": block.shortcut}
                sink = node if block.activation is None else walk.users(node)[0]
                found.append(Match(self.name, (block,), block.source, sink, dims, statements))
        return found


def _block(walk: Walk, node: str) -> ResidualBlock | None:
    if walk.operation(node) != "add" or len(walk.sources(node)) != 2:
        return None  # a difference, as in some gated cells, takes something away: no block
    candidates = []
    sources = sorted(walk.sources(node), key=lambda p: walk.positions(p, node))
    for end, other in (sources, sources[::-1]):
        path = _shortcut(walk, end, other)
        if path is not None and (block := _described(walk, node, path, other)) is not None:
            candidates.append(block)
    return min(candidates, key=lambda b: len(b.shortcut_nodes), default=None)


def _shortcut(walk: Walk, end: str, other: str) -> list[str] | None:
    """Linear operations from an ancestor of ``other`` to ``end``: that ancestor first, nearest to ``end``.

    Sums are followed into both arguments: ``x + f(x) + g(x)`` is a block twice.
    """
    queue, seen = [[end]], {end}
    while queue:
        path = queue.pop(0)
        at = path[0]
        if walk.reaches(at, other):
            return path
        if _is_sum(walk, at) or _is_linear_step(walk, at):
            for source in walk.sources(at):
                if source not in seen:
                    seen.add(source)
                    queue.append([source, *path])
    return None


def _is_sum(walk: Walk, node: str) -> bool:
    return walk.operation(node) in {"add", "sub"} and len(walk.sources(node)) == 2


def _is_linear_step(walk: Walk, node: str) -> bool:
    """A linear operation on one tensor that looks at all of it: no selection of a time step or a token."""
    if walk.kind(node) != "operation" or len(walk.sources(node)) != 1:
        return False
    operation = walk.operation(node)
    return (
        walk.is_move(node)
        or walk.is_affine(node)
        or operation in {"standardize_fixed", "neg"}
        or walk.is_weighted(node)
        or walk.is_padding(node)
        or ("pool" in operation and "max" not in operation)
        or (operation == "slice" and (walk.option(node, "step") or 1) > 1)
    )


def _described(walk: Walk, node: str, path: list[str], other: str) -> ResidualBlock | None:
    source, steps = path[0], tuple(path[1:])
    branch = walk.between(source, other)[1:]
    layers = [n for n in branch if walk.is_parametric(n)]
    if not layers or set(steps) & set(branch):
        return None
    own = tuple(dict.fromkeys(p for s in steps for p in walk.leaves(s)))
    projects = any(walk.is_weighted(s) for s in steps)
    if projects and (all(_is_linear_step(walk, n) for n in branch) or _reused(walk, own)):
        return None
    plain = all(walk.is_move(s) or walk.is_affine(s) or _is_sum(walk, s) for s in steps)
    following = walk.after(node)
    acts = following is not None and walk.is_activation(following)
    return ResidualBlock(
        node=node,
        module=str(walk.nx.nodes[node]["module"]),
        source=source,
        shortcut="identity" if plain else "linear",
        shortcut_nodes=steps,
        branch_nodes=tuple(branch),
        parameters=tuple(dict.fromkeys(p for n in branch for p in walk.leaves(n))),
        shortcut_parameters=own,
        depth=len(layers),
        activation=walk.operation(following) if acts and following is not None else None,
    )


def _reused(walk: Walk, parameters: tuple[str, ...]) -> bool:
    return any(len(walk.users(p)) > 1 for p in parameters)


def _statements(walk: Walk) -> tuple[str, ...]:
    """Weights-only bounds follow the sum of paths, unless data are multiplied by data or weights used twice."""
    products = any(len(walk.sources(n)) > 1 and not _is_sum(walk, n) for n in walk.data)
    weights = tuple(n for n in walk.order if walk.kind(n) == "parameter")
    return ANY_GRAPH if products or _reused(walk, weights) else ("a1", "a2", "a3", *ANY_GRAPH)


RESIDUAL = Residual("residual", "a branch added to a linear function of its input, usually the identity")
