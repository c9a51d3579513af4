"""Which elements can move at all near a point, and which can still be felt by the loss: certain, by structure.

Two sweeps with booleans. An element that a ReLU has switched off is constant nearby; a window of such elements is tied
without any choice to make. An element that loses in a max-pool window is not felt, and its own ties do not matter.
"Constant" and "not felt" are proofs; their opposites are only possibilities.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from dagh._ir import Node
from dagh._rules import Call
from dagh._rules._base import flat
from dagh._rules._binary import Extremum
from dagh._rules._extrema import Extreme
from dagh._rules._select import MaxPool
from dagh._state import State

Mask = dict[Node, Tensor]


class Reach:
    """``moving[v]`` and ``felt[v]``: boolean ``[N or 1, *shape]`` for nodes between ``leaves`` and the loss."""

    def __init__(self, state: State, leaves: Collection[Node]) -> None:
        assert state.program.loss is not None
        self.state, self.leaves = state, set(leaves)
        self.within = state.program.descendants(list(leaves)) & state.program.ancestors([state.program.loss])
        self._calls: dict[Node, Call] = {}
        self.moving: Mask = {}
        self.felt: Mask = {}
        with torch.no_grad():
            self._forward()
            self._backward(state.program.loss)

    def moves(self, node: Node) -> bool:
        """Whether any element of the node can move."""
        return node in self.moving and bool(self.moving[node].any())

    # -- one node ----------------------------------------------------------------------------------

    def _call(self, node: Node) -> Call:
        """The node at stand-in arguments whose derivatives have no cancellation: 1 where something can be non-zero."""
        if node not in self._calls:
            call, rule = self.state.call(node), self.state.rule(node)
            if isinstance(rule, (MaxPool, Extreme)):
                call = Call(node, call.xs, call.out, "split")
            elif isinstance(rule, Extremum):
                call = Call(node, call.xs, call.out, 0.5)
            elif rule.derivative == "bilinear":
                xs = []
                for parent, x in zip(node.inputs, call.xs, strict=True):
                    alive = x != 0
                    if parent in self.moving:
                        alive = alive | self.moving[parent]
                    xs.append(alive.to(call.out.dtype))
                call = Call(node, xs, call.out)
            self._calls[node] = call
        return self._calls[node]

    def _exact(self, node: Node) -> bool:
        """Whether indicators pushed through the rule, one argument at a time, tell what depends on what."""
        rule = self.state.rule(node)
        return rule.closed_form and (
            rule.derivative in ("linear", "bilinear") or isinstance(rule, (MaxPool, Extreme, Extremum))
        )

    def _forward(self) -> None:
        for node in self.state.program:
            if node not in self.within or not node.dtype.is_floating_point:
                continue
            value = self.state.values[node]
            if node in self.leaves:
                self.moving[node] = torch.ones_like(value, dtype=torch.bool)
                continue
            parents = [i for i, p in enumerate(node.inputs) if p in self.moving]
            if not parents:
                continue
            rule = self.state.rule(node)
            if self._exact(node):
                found = torch.zeros_like(value, dtype=torch.bool)
                for i in parents:
                    seed = self.moving[node.inputs[i]].to(value.dtype).unsqueeze(1)
                    found = found | (rule.jvp(self._call(node), {i: seed}).squeeze(1) != 0)
            elif rule.acts_per == "element" and len(node.inputs) == 1:
                found = self.moving[node.inputs[0]].expand(value.shape)
            else:
                found = torch.zeros_like(value, dtype=torch.bool)
                for i in parents:
                    some = flat(self.moving[node.inputs[i]]).any(1)
                    found = found | some.reshape(-1, *([1] * (value.dim() - 1)))
            still = rule.settled(self.state.call(node))
            self.moving[node] = found if still is None else found & ~still

    def _backward(self, loss: Node) -> None:
        self.felt[loss] = torch.ones_like(self.state.values[loss], dtype=torch.bool)
        for node in reversed(self.state.program.nodes):
            felt = self.felt.get(node)
            if felt is None or node.op is None or node not in self.within:
                continue
            rule = self.state.rule(node)
            still = rule.settled(self.state.call(node))
            if still is not None:
                felt = felt & ~still
            for i, parent in enumerate(node.inputs):
                if parent not in self.moving:
                    continue
                value = self.state.values[parent]
                if self._exact(node):
                    seed = felt.to(value.dtype).unsqueeze(1)
                    found = rule.vjp(self._call(node), seed, i, True).squeeze(1) != 0
                elif rule.acts_per == "element" and len(node.inputs) == 1:
                    found = felt
                else:
                    found = flat(felt).any(1).reshape(-1, *([1] * (value.dim() - 1)))
                if value.shape[0] == 1 and found.shape[0] > 1:
                    found = found.any(0, keepdim=True)
                known = self.felt.get(parent)
                self.felt[parent] = found.expand(value.shape) if known is None else known | found

    def affine(self) -> set[Node]:
        """Nodes that are affine in the leaves as long as every tie keeps its branch."""
        out: set[Node] = set()
        for node in self.state.program:
            if node not in self.within or not self.moves(node) or not node.inputs:
                out.add(node)
                continue
            moving = [i for i, p in enumerate(node.inputs) if self.moves(p)]
            if any(node.inputs[i] not in out for i in moving):
                continue
            rule = self.state.rule(node)
            pairs = rule.pairs(node) if rule.curved(node) else set()
            if pairs is not None and not any((i, j) in pairs for i in moving for j in moving):
                out.add(node)
        return out
