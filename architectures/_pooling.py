"""Pooling: windows of which the largest element or the mean is kept."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from dagh import Graph

from ._plugins import Match
from ._walk import Walk

Sizes = tuple[int, ...]
Kind = Literal["max", "avg", "sum"]


@dataclass(frozen=True)
class PoolingLayer:
    """One pooling step; ``pool`` is ``"sum"`` where sums of windows are divided by a number that is not their size.

    ``kernel``, ``stride`` and ``padding`` are ``None`` where windows have several sizes (adaptive pooling that does
    not divide its input). ``position`` counts the convolutions before it on its chain, ``None`` where none is (after
    a residual sum, say). ``disjoint``: every element falls in at most one window, all windows lie within the input.
    """

    node: str
    module: str
    pool: Kind
    kernel: Sizes | None
    stride: Sizes | None
    padding: Sizes | None
    size_before: Sizes
    size_after: Sizes
    disjoint: bool
    position: int | None


@dataclass(frozen=True)
class Poolings:
    """Recognizes poolings after a convolution, as layers or as a mean or maximum over all positions."""

    name: str
    description: str
    fields: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(PoolingLayer))

    def match(self, graph: Graph) -> list[Match]:
        """Each pooling by itself, in the order of the computation."""
        from ._family import Family

        walk = Walk.of(graph)
        family = Family.of(walk)
        found = []
        for node in walk.order:
            layer = pooling_layer(walk, node)
            if layer is not None and _after_convolution(walk, node):
                dims = {"l": layer.position, "pool": layer.pool, "k_pool": max(layer.kernel) if layer.kernel else None}
                statements = family.pooling_statements() if family.has(layer.node) else ()
                found.append(Match(self.name, (layer,), walk.sources(node)[0], node, dims, statements))
        return found


def pooling_layer(walk: Walk, node: str) -> PoolingLayer | None:
    """The pooling that ``node`` is, or ``None``."""
    if len(walk.sources(node)) != 1:
        return None
    (source,) = walk.sources(node)
    operation = walk.operation(node)
    if "pool" in operation and "max_unpool" not in operation:
        return _layer(walk, node, source, "max" if "max" in operation else "avg")
    if operation in {"mean", "amax"} and _over_all_positions(walk, node, source):
        return _global(walk, node, source, "avg" if operation == "mean" else "max")
    return None


def _layer(walk: Walk, node: str, source: str, pool: Kind) -> PoolingLayer:
    kernel = walk.option(node, "kernel") or walk.option(node, "kernel_size")
    padding = walk.option(node, "padding")
    dilation = walk.option(node, "dilation")
    before, after = _spatial(walk, source, node)
    regular = not walk.option(node, "ceil_mode")
    if kernel is None:  # adaptive: regular where the sizes divide
        if all(n % m == 0 for n, m in zip(before, after, strict=True)):
            kernel = [n // m for n, m in zip(before, after, strict=True)]
        padding = [0] * len(before)
    stride = walk.option(node, "stride") or kernel
    if walk.option(node, "divisor_override") not in (None, math.prod(kernel or ())):
        pool = "sum"
    disjoint = (
        kernel is not None
        and regular
        and all(s >= k for k, s in zip(kernel, stride, strict=True))
        and not any(padding or ())
        and all(d == 1 for d in dilation or ())
    )
    return PoolingLayer(
        node=node,
        module=str(walk.nx.nodes[node]["module"]),
        pool=pool,
        kernel=tuple(kernel) if kernel else None,
        stride=tuple(stride) if stride else None,
        padding=tuple(padding) if padding is not None and kernel else None,
        size_before=before,
        size_after=after,
        disjoint=disjoint,
        position=_position(walk, node),
    )


def _global(walk: Walk, node: str, source: str, pool: Kind) -> PoolingLayer:
    before = walk.shape(source)[1:]
    return PoolingLayer(
        node=node,
        module=str(walk.nx.nodes[node]["module"]),
        pool=pool,
        kernel=before,
        stride=before,
        padding=(0,) * len(before),
        size_before=before,
        size_after=(1,) * len(before),
        disjoint=True,
        position=_position(walk, node),
    )


def _over_all_positions(walk: Walk, node: str, source: str) -> bool:
    """Whether the axes reduced are all those after the channels."""
    rank = len(walk.sizes(source))
    reduced = {d % rank for d in walk.option(node, "dim") or ()}
    return rank >= 3 and reduced == set(range(2, rank))


def _spatial(walk: Walk, source: str, node: str) -> tuple[Sizes, Sizes]:
    """The sizes that pooling changes: all axes after the channels."""
    return walk.shape(source)[1:], walk.shape(node)[1:]


def _after_convolution(walk: Walk, node: str) -> bool:
    return any(walk.is_convolution(n, d) for n in walk.order if walk.reaches(n, node) for d in (1, 2, 3))


def _position(walk: Walk, node: str) -> int | None:
    """How many convolutions precede ``node`` on its chain."""
    count = 0
    at: str | None = walk.sources(node)[0]
    while at is not None and walk.kind(at) == "operation":
        count += any(walk.is_convolution(at, d) for d in (1, 2, 3))
        at = walk.before(at)
    return count or None


POOLING = Poolings("pooling", "max or average pooling after convolutions, global pooling included")
