"""Moving along the path that the data take through a graph."""

from __future__ import annotations

import weakref
from functools import cached_property
from typing import Any

import networkx as nx

from dagh import Graph

_CONVOLUTIONS = {"convolution", "conv1d", "conv2d", "conv3d"}
_SHAPE_CHANGES = {"reshape", "flatten", "view", "_unsafe_view", "squeeze"}
_MOVES = _SHAPE_CHANGES | {"unsqueeze", "transpose", "permute", "t", "expand", "clone", "contiguous"}
_PRODUCTS = {"matmul", "bmm", "mm", "mv", "dot", "einsum", "linear", "baddbmm", "addmm"}
_NORMALISATIONS = {
    "standardize",
    "standardize_fixed",
    "batch_norm",
    "layer_norm",
    "group_norm",
    "instance_norm",
}


class Walk:
    """A graph seen as paths of data: what depends on the inputs is data, the rest (weights) hangs off it."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nx: nx.DiGraph[str] = graph.nx
        inputs = [n for n in self.nx if self.kind(n) == "input"]
        self.data: set[str] = set(inputs).union(*(nx.descendants(self.nx, n) for n in inputs))
        self.order: list[str] = list(nx.topological_sort(self.nx))

    @classmethod
    def of(cls, graph: Graph) -> Walk:
        """The walk of this graph, made once for all plug-ins."""
        kept = _WALKS.get(graph)
        if kept is None or kept[0] is not graph.program:
            kept = _WALKS[graph] = (graph.program, cls(graph))
            kept[1].graph = weakref.proxy(graph)
        return kept[1]

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {n: i for i, n in enumerate(self.order)}

    @cached_property
    def _ancestors(self) -> dict[str, int]:
        """For every node, the nodes it is computed from (itself among them) as bits."""
        above: dict[str, int] = {}
        for node in self.order:
            bits = 1 << self._positions[node]
            for p in self.nx.predecessors(node):
                bits |= above[p]
            above[node] = bits
        return above

    def reaches(self, first: str, second: str) -> bool:
        """Whether ``second`` is ``first`` or computed from it."""
        return bool(self._ancestors[second] >> self._positions[first] & 1)

    def between(self, first: str, second: str) -> list[str]:
        """Data nodes on the paths from ``first`` to ``second``, both included, in the order of the computation."""
        low, high = self._positions[first], self._positions[second]
        return [n for n in self.order[low : high + 1] if n in self.data and self._on_path(first, n, second)]

    def _on_path(self, first: str, node: str, second: str) -> bool:
        return self.reaches(first, node) and self.reaches(node, second)

    def numel(self, node: str) -> int:
        """Elements of one sample (of the whole batch where samples are coupled)."""
        return self.graph.program.by_name[node].numel

    def sizes(self, node: str) -> tuple[int, ...]:
        """Shape with the sample axis in place, of length one."""
        return tuple(self.graph.program.by_name[node].shape)

    def kind(self, node: str) -> str:
        return str(self.nx.nodes[node]["kind"])

    def operation(self, node: str) -> str:
        return str(self.nx.nodes[node]["operation"])

    def shape(self, node: str) -> tuple[int, ...]:
        """Shape of one sample; the batch axis is dropped from data."""
        shape = tuple(self.nx.nodes[node]["shape"])
        return shape[1:] if node in self.data else shape

    def option(self, node: str, name: str) -> Any:
        """A non-tensor argument of the operation, e.g. ``stride``."""
        return self.graph.program.by_name[node].arg(name)

    def sources(self, node: str) -> list[str]:
        """The arguments that are data."""
        return [p for p in self.nx.predecessors(node) if p in self.data]

    def users(self, node: str) -> list[str]:
        """Operations on ``node``; the loss is none."""
        return [s for s in self.nx.successors(node) if self.kind(s) == "operation"]

    def argument(self, node: str, index: int) -> str | None:
        """The node at position ``index`` of the arguments."""
        return next((p for p in self.nx.predecessors(node) if index in self.positions(p, node)), None)

    def positions(self, parent: str, node: str) -> tuple[int, ...]:
        """Where ``parent`` stands among the arguments of ``node``."""
        arg = self.nx.edges[parent, node]["arg"]
        return (arg,) if isinstance(arg, int) else tuple(arg)

    def before(self, node: str) -> str | None:
        """The only data argument of ``node``, unless something else uses it too."""
        sources = self.sources(node)
        return sources[0] if len(sources) == 1 and len(self.users(sources[0])) == 1 else None

    def after(self, node: str) -> str | None:
        """The only operation on ``node``, unless it takes other data too."""
        users = self.users(node)
        return users[0] if len(users) == 1 and self.sources(users[0]) == [node] else None

    def parameters(self, node: str) -> tuple[str, ...]:
        """Parameters that ``node`` uses directly, in the order of its arguments."""
        leaves = [p for p in self.nx.predecessors(node) if self.kind(p) == "parameter"]
        return tuple(sorted(leaves, key=lambda p: self.positions(p, node)))

    def weight_shape(self, node: str) -> tuple[int, ...] | None:
        """Shape of the second argument, if it does not depend on the data."""
        weight = self.argument(node, 1)
        return None if weight is None or weight in self.data else self.shape(weight)

    def leaves(self, node: str) -> tuple[str, ...]:
        """Parameters in ``node`` itself or in what it computes from parameters alone (reshaped, scaled)."""
        found: dict[str, None] = {}
        for parent in sorted(self.nx.predecessors(node), key=lambda p: self.positions(p, node)):
            if self.kind(parent) == "parameter":
                found[parent] = None
            elif parent not in self.data:
                found.update(dict.fromkeys(self.leaves(parent)))
        return tuple(found)

    def is_parametric(self, node: str) -> bool:
        """A layer with weights: a product, convolution or scaling of data by something made of parameters."""
        return len(self.sources(node)) == 1 and bool(self.leaves(node)) and self.is_weighted(node)

    def is_weighted(self, node: str) -> bool:
        """A matrix product or convolution, transposed ones included."""
        return self.operation(node) in _PRODUCTS or "conv" in self.operation(node)

    def is_product(self, node: str) -> bool:
        """A matrix product of two tensors that are both data."""
        return self.operation(node) in _PRODUCTS and len(self.sources(node)) == 2

    def is_move(self, node: str) -> bool:
        """Elements rearranged: reshaped, transposed; or repeated."""
        return self.operation(node) in _MOVES or self._is_full_slice(node)

    def repeats(self, node: str) -> bool:
        """Whether a move copies elements, and so is longer than what it moves."""
        return self.numel(node) > self.numel(self.sources(node)[0])

    def _is_full_slice(self, node: str) -> bool:
        return self.operation(node) == "slice" and self.sizes(node) == self.sizes(self.sources(node)[0])

    def is_convolution(self, node: str, dims: int) -> bool:
        """A convolution over ``dims`` axes, not transposed, whose weight does not depend on the data."""
        return (
            self.operation(node) in _CONVOLUTIONS
            and len(self.shape(node)) == dims + 1
            and self.weight_shape(node) is not None
            and not self.option(node, "transposed")
        )

    def is_linear(self, node: str) -> bool:
        """A linear layer on vectors, with a weight that does not depend on the data."""
        return self.operation(node) == "linear" and len(self.shape(node)) == 1 and self.weight_shape(node) is not None

    def is_pooling(self, node: str) -> bool:
        return "pool" in self.operation(node)

    def is_normalization(self, node: str) -> bool:
        """A normalization by means and variances, without the scale and shift that follow it."""
        return self.operation(node) in _NORMALISATIONS

    def is_affine(self, node: str) -> bool:
        """A scale or shift by numbers, constants or parameters."""
        return self.operation(node) in {"mul", "add", "sub", "div"} and len(self.sources(node)) == 1

    def is_padding(self, node: str) -> bool:
        return "pad" in self.operation(node)

    def is_shape_change(self, node: str) -> bool:
        return self.operation(node) in _SHAPE_CHANGES

    def is_activation(self, node: str) -> bool:
        """A function of each element, the same for all of them."""
        (source,) = self.sources(node) if len(self.sources(node)) == 1 else (None,)
        return (
            source is not None
            and self.nx.nodes[node]["derivative"] in ("elementwise", "kinked")
            and not self.is_pooling(node)
            and not self.is_affine(node)
            and self.operation(node).partition("[")[0] not in {"sort", "topk", "cummax", "cummin", "kthvalue"}
            and self.shape(node) == self.shape(source)
        )


_WALKS: weakref.WeakKeyDictionary[Graph, tuple[Any, Walk]] = weakref.WeakKeyDictionary()
