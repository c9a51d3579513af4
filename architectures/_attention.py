"""Dot-product attention: softmax of products of queries and keys, applied to values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dagh import Graph

from ._family import ANY_GRAPH
from ._plugins import Match
from ._walk import Walk

_SOFTMAX = {"softmax", "_softmax", "_safe_softmax"}
_SCALING = {"mul", "div", "add", "sub", "masked_fill", "where", "dropout", "clamp", "tanh"}


@dataclass(frozen=True)
class AttentionLayer:
    """One attention; ``node`` is the softmax.

    ``query``, ``key``, ``value`` and ``output`` are the parameters of the projections, empty where there is none;
    a projection that makes several of them at once appears in each. ``queries`` and ``keys`` count the tokens of one
    sample, ``width`` is that of a head. ``self_attention``: all three are computed from the same tensor.
    """

    node: str
    module: str
    query: tuple[str, ...]
    key: tuple[str, ...]
    value: tuple[str, ...]
    output: tuple[str, ...]
    heads: int
    width: int
    queries: int
    keys: int
    masked: bool
    self_attention: bool


@dataclass(frozen=True)
class Attention:
    """Recognizes ``softmax(QKᵀ·scale + mask) V`` with any number of heads, however the products are written."""

    name: str
    description: str
    fields: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(AttentionLayer))

    def match(self, graph: Graph) -> list[Match]:
        """Each attention by itself, in the order of the computation."""
        walk = Walk.of(graph)
        return [m for node in walk.order if (m := self._at(walk, node)) is not None]

    def _at(self, walk: Walk, node: str) -> Match | None:
        if walk.operation(node) not in _SOFTMAX or node not in walk.data:
            return None
        scores, masked = _scores(walk, node)
        applied = _applied(walk, node)
        if scores is None or applied is None:
            return None
        sizes = walk.sizes(node)
        axis = int(walk.option(node, "dim")) % len(sizes)
        keys = sizes[axis]
        if len(sizes) < 2 or axis < len(sizes) - 2:
            return None
        queries = sizes[-2] if axis == len(sizes) - 1 else sizes[-1]
        query, key = sorted(walk.sources(scores), key=lambda p: walk.positions(p, scores))
        if axis == len(sizes) - 2:
            query, key = key, query
        (value,) = (s for s in walk.sources(applied) if not walk.reaches(node, s))
        ends = [_projection(walk, n) for n in (query, key, value)]
        heads = walk.numel(node) // (queries * keys)
        output, sink = _output(walk, applied)
        layer = AttentionLayer(
            node=node,
            module=str(walk.nx.nodes[node]["module"]),
            query=ends[0][0],
            key=ends[1][0],
            value=ends[2][0],
            output=output,
            heads=heads,
            width=walk.numel(query) // (heads * queries),
            queries=queries,
            keys=keys,
            masked=masked,
            self_attention=len({source for _, source in ends}) == 1,
        )
        dims = {"heads": heads, "d": layer.width, "tokens": keys if queries == keys else (queries, keys)}
        return Match(self.name, (layer,), ends[0][1], sink, dims, ANY_GRAPH)


def _scores(walk: Walk, softmax: str) -> tuple[str | None, bool]:
    """The product of queries and keys behind a softmax, and whether something masks or biases it."""
    at, masked = walk.sources(softmax), False
    while len(at) == 1:
        (node,) = at
        if walk.is_product(node):
            return node, masked
        operation = walk.operation(node)
        if operation not in _SCALING and not walk.is_move(node):
            break
        masked |= operation in {"masked_fill", "where"} or (operation in {"add", "sub"} and _adds_a_table(walk, node))
        at = walk.sources(node)
    return None, False


def _adds_a_table(walk: Walk, node: str) -> bool:
    return len(list(walk.nx.predecessors(node))) == 2


def _applied(walk: Walk, softmax: str) -> str | None:
    """The product of the attention weights and values."""
    queue, seen = list(walk.users(softmax)), set()
    while queue:
        node = queue.pop(0)
        if node in seen:
            continue
        seen.add(node)
        others = [s for s in walk.sources(node) if not walk.reaches(softmax, s)]
        if walk.is_product(node) and len(others) == 1:
            return node
        if len(walk.sources(node)) == 1 and (walk.operation(node) in _SCALING or walk.is_move(node)):
            queue += walk.users(node)
    return None


def _projection(walk: Walk, node: str) -> tuple[tuple[str, ...], str]:
    """Parameters of the linear layer behind ``node`` (rearranged, selected, scaled, rotated), and what feeds it."""
    queue, seen, hits = [node], {node}, []
    while queue:
        at = queue.pop(0)
        if walk.is_parametric(at) or not _is_rearranged(walk, at):
            hits.append(at)
            continue
        for source in walk.sources(at):
            if source not in seen:
                seen.add(source)
                queue.append(source)
    if len(hits) != 1:
        return (), node
    (end,) = hits
    return (walk.leaves(end), walk.sources(end)[0]) if walk.is_parametric(end) else ((), end)


def _is_rearranged(walk: Walk, node: str) -> bool:
    """Moved, selected, scaled, normalized, or rotated with what was selected."""
    operation = walk.operation(node).partition("[")[0]
    rotating = {"select", "slice", "split", "unsafe_split", "chunk", "unbind", "repeat", "cat", "stack", "neg", "add"}
    return walk.kind(node) == "operation" and (
        walk.is_move(node) or walk.is_normalization(node) or walk.is_affine(node) or operation in rotating
    )


def _output(walk: Walk, applied: str) -> tuple[tuple[str, ...], str]:
    """The projection after the values, if rearranging leads straight to one."""
    at = applied
    while (following := walk.after(at)) is not None and (walk.is_move(following) or walk.is_parametric(following)):
        if walk.is_parametric(following):
            return walk.leaves(following), following
        at = following
    return (), applied


ATTENTION = Attention("attention", "dot-product attention, softmax(QKᵀ)V, with any number of heads")
