"""The fully connected layers at the end of a model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dagh import Graph

from ._family import Family
from ._plugins import Match
from ._walk import Walk


@dataclass(frozen=True)
class DenseLayer:
    """One linear layer and the activation after it."""

    node: str
    module: str
    parameters: tuple[str, ...]
    features_in: int
    features_out: int
    activation: str | None = None


@dataclass(frozen=True)
class DenseHead:
    """Recognizes the chain of linear layers that ends in the model's output.

    Elementwise activations may stand between the layers, and a softmax or log-softmax after the last one.
    Dimensions: ``P`` layers, ``h`` the largest width (of the flattened input too), ``K`` outputs.
    """

    name: str
    description: str
    fields: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(DenseLayer))

    def match(self, graph: Graph) -> list[Match]:
        """The head, or nothing where the output is not that of a linear layer on vectors."""
        walk = Walk.of(graph)
        output = graph.program.output.name
        layers: list[DenseLayer] = []
        node: str | None = output
        activation: str | None = None
        source = ""
        while node is not None:
            if walk.is_linear(node):
                layers.insert(0, _layer(walk, node, activation))
                activation, source = None, walk.sources(node)[0]
            elif activation is None and (walk.is_activation(node) or self._closes(walk, node, layers)):
                activation = walk.operation(node)
            elif not walk.is_shape_change(node) or layers:
                break
            node = walk.before(node)
        if not layers:
            return []
        widths = [layers[0].features_in, *(layer.features_out for layer in layers)]
        dims = {"P": len(layers), "h": max(widths), "K": layers[-1].features_out}
        family = Family.of(walk)
        whole = not family.convolutions  # a multilayer perceptron: the head is all there is
        statements = family.chain_statements() if whole else family.head_statements()
        return [Match(self.name, tuple(layers), source, output, dims, statements)]

    def _closes(self, walk: Walk, node: str, layers: list[DenseLayer]) -> bool:
        return not layers and walk.operation(node) in {"softmax", "_softmax", "log_softmax", "_log_softmax"}


def _layer(walk: Walk, node: str, activation: str | None) -> DenseLayer:
    weight = walk.weight_shape(node)
    assert weight is not None
    return DenseLayer(
        node=node,
        module=str(walk.nx.nodes[node]["module"]),
        parameters=walk.parameters(node),
        features_in=weight[1],
        features_out=weight[0],
        activation=activation,
    )


FC_HEAD = DenseHead("fc_head", "fully connected layers that end in the model's output")
