"""Moving along the path that the data take through a graph."""

from __future__ import annotations

from typing import Any

import networkx as nx

from dagh import Graph

_CONVOLUTIONS = {"convolution", "conv1d", "conv2d", "conv3d"}
_SHAPE_CHANGES = {"reshape", "flatten", "view", "_unsafe_view", "squeeze"}
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
        """A normalization, or the scale and shift by parameters that follow one."""
        return self.operation(node) in _NORMALISATIONS or self.is_affine(node)

    def is_affine(self, node: str) -> bool:
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
