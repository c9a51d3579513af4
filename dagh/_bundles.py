"""Bundles ``[N, B, *shape]`` of directions, one per node, some of them not written out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dagh._ir import Node


@dataclass(frozen=True)
class Scaled:
    """A bundle ``base · factor`` not multiplied out: a chain of element-wise operations costs one pass over it."""

    base: Tensor
    factor: Tensor | float

    @staticmethod
    def by(bundle: Tensor | Scaled, factor: Tensor | float) -> Tensor | Scaled:
        """``bundle · factor``."""
        if isinstance(factor, float) and factor == 1.0:
            return bundle
        if isinstance(bundle, Scaled):
            return Scaled(bundle.base, bundle.factor * factor)
        return Scaled(bundle, factor)

    def value(self) -> Tensor:
        return self.base * self.factor

    def in_order(self) -> Tensor:
        """The product in the order of its axes: where channels share a base, it would put them last in memory."""
        shape = self._shape()
        return self.value() if shape is None else torch.mul(self.base, self.factor, out=self.base.new_empty(shape))

    def _shape(self) -> tuple[int, ...] | None:
        """Of the product, where the axes of both correspond."""
        if not isinstance(self.factor, Tensor):
            return tuple(self.base.shape)
        if self.factor.dim() != self.base.dim():
            return None
        return tuple(map(max, self.base.shape, self.factor.shape))

    def add_to(self, total: Tensor) -> bool:
        """Add the product to ``total`` in one pass, unless it is of another shape."""
        if not isinstance(self.factor, Tensor) or self._shape() != total.shape:
            return False
        total.addcmul_(self.base, self.factor)
        return True

    def into_place(self) -> Tensor:
        """The product in the memory of ``base``, if it fits there."""
        return self.base.mul_(self.factor) if self._shape() == self.base.shape else self.value()


@dataclass(frozen=True)
class Picked:
    """A bundle that max-pooling has pulled back, not spread out.

    ``base · factor`` ``[N, B, m, C, L]`` stands at the places ``index`` ``[N, 1, m, C, L]`` of a flattened ``space``;
    what meets at one place adds up.
    """

    base: Tensor
    index: Tensor
    space: torch.Size
    factor: Tensor | float = 1.0

    def by(self, factor: Tensor | float) -> Picked:
        """The bundle times ``factor``, of which only what stands at the places is read."""
        if isinstance(factor, Tensor):
            if factor.shape[4:].numel() == 1:
                factor = factor.flatten(4)
            else:
                whole = factor.expand(*self.index.shape[:4], *self.space).flatten(4)
                factor = whole.gather(4, self.index)
        return replace(self, factor=self.factor * factor)

    def in_order(self, *axes: int) -> Tensor:
        """``base · factor`` with its axes in this order in memory."""
        base = self.base.permute(axes)
        if not isinstance(self.factor, Tensor):
            return base if self.factor == 1.0 else base * self.factor
        return torch.mul(base, self.factor.permute(axes), out=base.new_empty(base.shape))

    def value(self) -> Tensor:
        out = self.base.new_zeros(*self.base.shape[:4], self.space.numel())
        out.scatter_add_(4, self.index.expand_as(self.base), self.in_order(0, 1, 2, 3, 4))
        return out.reshape(*self.base.shape[:4], *self.space)


def written_out(bundle: Tensor | Scaled | Picked) -> Tensor:
    return bundle if isinstance(bundle, Tensor) else bundle.value()


class Tangents(dict[Node, Tensor]):
    """Tangents by node, ``[N, B, *shape]``; those of element-wise operations are written out when first read.

    The bundle of a node in ``channelwise`` is channel-diagonal: ``[N, b, m, C, …]`` stands for C·b directions, member
    (c, b) being ``[:, b]`` restricted to channel c. A convolution's own weights move one output channel each, so up to
    the next operation that mixes channels C times fewer numbers say the same.
    """

    def __init__(self, values: Mapping[Node, Tensor], channelwise: Iterable[Node] = ()) -> None:
        super().__init__(values)
        self.channelwise = set(channelwise)
        self._scaled: dict[Node, Scaled] = {}

    def __contains__(self, node: object) -> bool:
        return super().__contains__(node) or node in self._scaled

    def __getitem__(self, node: Node) -> Tensor:
        if node in self._scaled:
            self[node] = self._scaled.pop(node).value()
        return super().__getitem__(node)

    def scale(self, node: Node, parent: Node, factor: Tensor | float) -> None:
        """The tangent of ``node`` is that of ``parent`` times ``factor``."""
        known = self._scaled.get(parent)
        scaled = Scaled.by(super().__getitem__(parent) if known is None else known, factor)
        if isinstance(scaled, Scaled):
            self._scaled[node] = scaled
        else:
            self[node] = scaled
        if parent in self.channelwise:
            self.channelwise.add(node)

    def lazy(self, node: Node) -> Scaled | None:
        """The tangent of a node as long as it is not written out."""
        return self._scaled.get(node)

    def hold(self, node: Node, scaled: Scaled) -> None:
        """A tangent to be written out when it is first read."""
        self._scaled[node] = scaled

    def drop(self, node: Node) -> None:
        self.pop(node, None)
        self._scaled.pop(node, None)

    def dense(self, node: Node) -> Tensor:
        """The bundle with every direction written out."""
        return expand_channels(self[node]) if node in self.channelwise else self[node]


def expanded(t: Tensor) -> bool:
    """Whether elements share memory."""
    return any(step == 0 and size > 1 for step, size in zip(t.stride(), t.shape, strict=True))


def matrices(t: Tensor) -> Tensor:
    """A bundle ``[N, B, *shape]`` with the node's axes flattened: ``[N, B, d]``."""
    return t.reshape(*t.shape[:2], t.shape[2:].numel())


def expand_channels(t: Tensor) -> Tensor:
    """``[N, b, m, C, …]`` channel-diagonal to dense ``[N, C·b, m, C, …]``."""
    n, b, _, c = t.shape[:4]
    out = t.new_zeros(n, c, *t.shape[1:])
    out.diagonal(dim1=1, dim2=4).copy_(t.movedim(3, -1))
    return out.reshape(n, c * b, *t.shape[2:])
