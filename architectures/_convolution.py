"""Chains of convolutions, with what stands between them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dagh import Graph

from ._family import Family
from ._plugins import Match
from ._pooling import PoolingLayer, pooling_layer
from ._walk import Walk

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Pooling:
    """A pooling step: its operation, kernel and stride (``None`` where windows differ), and the sizes it leaves."""

    operation: str
    kernel: Sizes | None
    stride: Sizes | None
    size_after: Sizes


@dataclass(frozen=True)
class ConvolutionLayer:
    """One convolution and what follows it, up to the next one.

    ``size_before`` and ``size_after`` are the spatial sizes around the convolution itself; a padding that is
    an operation of its own (circular, reflect) counts into ``size_before``, zero padding is ``padding``.
    """

    node: str
    module: str
    parameters: tuple[str, ...]
    channels_in: int
    channels_out: int
    kernel: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes
    groups: int
    size_before: Sizes
    size_after: Sizes
    activation: str | None = None
    normalized: bool = False
    pooling: tuple[Pooling, ...] = ()


@dataclass(frozen=True)
class ConvolutionChain:
    """Recognizes maximal chains of ``dims``-dimensional convolutions without branches.

    Between two convolutions may stand elementwise activations, normalizations, scalings and shifts, poolings and
    paddings. A node that several operations use, or an operation on two tensors that both depend on the input, ends a
    chain. Dimensions: ``L`` (one less than the convolutions), ``C``, ``k``, ``d`` or ``m`` and ``n`` (sizes after the
    first one), and ``l``, ``k_pool`` where there is pooling.
    """

    name: str
    description: str
    dims: int
    fields: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(ConvolutionLayer))

    def match(self, graph: Graph) -> list[Match]:
        """Every maximal chain, in the order of the computation."""
        walk = Walk.of(graph)
        family = Family.of(walk)
        taken: set[str] = set()
        found = []
        for node in walk.order:
            if node in taken or not walk.is_convolution(node, self.dims):
                continue
            layers, path = self._follow(walk, node)
            taken.update(path)
            statements = family.chain_statements()
            found.append(Match(self.name, tuple(layers), walk.sources(node)[0], path[-1], _dims(layers), statements))
        return found

    def _follow(self, walk: Walk, node: str) -> tuple[list[ConvolutionLayer], list[str]]:
        layers, path = [_layer(walk, node)], [node]
        pending: list[str] = []  # paddings belong to the chain only where a convolution follows
        while (following := walk.after((pending or path)[-1])) is not None:
            last = layers[-1]
            if walk.is_convolution(following, self.dims):
                layers.append(_layer(walk, following))
            elif walk.is_padding(following):
                pending.append(following)
                continue
            elif pending:
                break
            elif walk.is_pooling(following) and (layer := pooling_layer(walk, following)) is not None:
                layers[-1] = dataclasses.replace(last, pooling=(*last.pooling, _pooling(walk, following, layer)))
            elif walk.is_activation(following):
                if last.activation is not None:
                    break
                layers[-1] = dataclasses.replace(last, activation=walk.operation(following))
            elif walk.is_normalization(following):
                layers[-1] = dataclasses.replace(last, normalized=True)
            elif walk.is_affine(following):
                pass
            else:
                break
            path += [*pending, following]
            pending = []
        return layers, path


def _dims(layers: list[ConvolutionLayer]) -> dict[str, Any]:
    """The paper's names: L hidden layers of L + 1, the most channels and the widest kernel, the sizes of layer 1."""
    dims: dict[str, Any] = {
        "L": len(layers) - 1,
        "C": max(max(layer.channels_in, layer.channels_out) for layer in layers),
        "k": max(max(layer.kernel) for layer in layers),
    }
    first = layers[0].size_after
    dims |= dict(zip({1: ("d",), 2: ("m", "n")}.get(len(first), ()), first, strict=False))
    pooled = [i for i, layer in enumerate(layers, start=1) if layer.pooling]
    if pooled:
        kernels = [k for layer in layers for p in layer.pooling for k in p.kernel or ()]
        dims |= {"l": tuple(pooled), "k_pool": max(kernels, default=None)}
    return dims


def _layer(walk: Walk, node: str) -> ConvolutionLayer:
    weight = walk.weight_shape(node)
    assert weight is not None
    groups = int(walk.option(node, "groups"))
    return ConvolutionLayer(
        node=node,
        module=str(walk.nx.nodes[node]["module"]),
        parameters=walk.parameters(node),
        channels_in=weight[1] * groups,
        channels_out=weight[0],
        kernel=weight[2:],
        stride=tuple(walk.option(node, "stride")),
        padding=tuple(walk.option(node, "padding")),
        dilation=tuple(walk.option(node, "dilation")),
        groups=groups,
        size_before=walk.shape(walk.sources(node)[0])[1:],
        size_after=walk.shape(node)[1:],
    )


def _pooling(walk: Walk, node: str, layer: PoolingLayer) -> Pooling:
    return Pooling(walk.operation(node), layer.kernel, layer.stride, layer.size_after)


CONV1D = ConvolutionChain("conv1d", "chain of one-dimensional convolutions, with activations and pooling", dims=1)
CONV2D = ConvolutionChain("conv2d", "chain of two-dimensional convolutions, with activations and pooling", dims=2)
