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
from dagh._rules._axes import align, flat, unbroadcast
from dagh._rules._binary import Extremum
from dagh._rules._extrema import Extreme
from dagh._rules._select import MaxPool
from dagh._rules._switches import Switch
from dagh._state import State

Mask = dict[Node, Tensor]

#: Operations that take one value or another by a mask, and those on masks that act element by element.
_CHOOSING = ("where", "masked_fill")
_LOGIC = (
    "logical_and", "logical_or", "logical_xor", "logical_not", "bitwise_and", "bitwise_or", "bitwise_xor",
    "bitwise_not", "__and__", "__or__", "__xor__", "to", "_to_copy", "gt", "ge", "lt", "le", "eq", "ne",
)  # fmt: skip


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

    def follows(self, node: Node) -> bool:
        """Whether a node is computed from numbers that can move, directly."""
        return any(p.dtype.is_floating_point and self.moves(p) for p in node.inputs)

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
        return (
            rule.closed_form
            and node.dtype.is_floating_point
            and (rule.derivative in ("linear", "bilinear") or isinstance(rule, (MaxPool, Extreme, Extremum)))
        )

    def _forward(self) -> None:
        for node in self.state.program:
            if node not in self.within:
                continue
            value = self.state.values[node]
            if node in self.leaves:
                self.moving[node] = torch.ones_like(value, dtype=torch.bool)
                continue
            parents = [i for i, p in enumerate(node.inputs) if p in self.moving]
            if not parents:
                continue
            rule, call = self.state.rule(node), self.state.call(node)
            if self._index(node):
                continue
            masks = [i for i in parents if not node.inputs[i].dtype.is_floating_point]
            found = torch.zeros_like(value, dtype=torch.bool)
            if self._by_element(node) or (masks and node.operation in _CHOOSING):
                chosen = [i for i in parents if i not in masks] if masks and self._exact(node) else []
                for i in parents:
                    if i not in chosen:
                        found = found | align(self.moving[node.inputs[i]], 1, len(node.shape))
                parents = chosen
            if masks and rule.derivative != "bilinear" and any(i in masks for i in parents):
                found = found | self._anything(node, parents)
            elif self._exact(node):
                for i in parents:
                    seed = self.moving[node.inputs[i]].to(value.dtype).unsqueeze(1)
                    found = found | (rule.jvp(self._call(node), {i: seed}).squeeze(1) != 0)
            else:
                found = found | self._anything(node, parents)
            still = rule.settled(call)
            self.moving[node] = found if still is None else found & ~still

    def _index(self, node: Node) -> bool:
        """Integers computed from numbers (``argmax``): taken as they are."""
        whole = not node.dtype.is_floating_point and node.dtype != torch.bool
        return whole and any(p.dtype.is_floating_point for p in node.inputs if p in self.moving)

    def _anything(self, node: Node, parents: Collection[int]) -> Tensor:
        """Every element of a sample of which anything among the arguments moves."""
        value = self.state.values[node]
        found = torch.zeros_like(value, dtype=torch.bool)
        for i in parents:
            found = found | flat(self.moving[node.inputs[i]]).any(1).reshape(-1, *([1] * (value.dim() - 1)))
        return found

    def _by_element(self, node: Node) -> bool:
        """Whether each element depends on the like elements of the arguments alone, and all of them count."""
        rule = self.state.rule(node)
        if node.operation in _LOGIC and not all(p.dtype.is_floating_point for p in node.inputs):
            return True
        if node.dtype.is_floating_point:
            return rule.acts_per == "element" and (len(node.inputs) == 1 or isinstance(rule, Switch))
        return isinstance(rule, Switch)

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
            mask = next((p for p in node.inputs if p in self.moving and not p.dtype.is_floating_point), None)
            for i, parent in enumerate(node.inputs):
                if parent not in self.moving:
                    continue
                value, choosing = self.state.values[parent], mask is not None and node.operation in _CHOOSING
                if self._by_element(node) or (choosing and parent is mask):
                    found = self._shrunk(felt, parent)
                elif self._exact(node) and (parent.dtype.is_floating_point or rule.derivative == "bilinear"):
                    seed = felt.to(self.state.values[node].dtype).unsqueeze(1)
                    found = rule.vjp(self._call(node), seed, i, True).squeeze(1) != 0
                    if choosing and mask is not None:  # where the mask can change, either side may be taken
                        switching = align(self.moving[mask], 1, len(node.shape))
                        found = found | self._shrunk(felt & switching, parent)
                else:
                    found = flat(felt).any(1).reshape(-1, *([1] * (value.dim() - 1)))
                if value.shape[0] == 1 and found.shape[0] > 1:
                    found = found.any(0, keepdim=True)
                known = self.felt.get(parent)
                self.felt[parent] = found.expand(value.shape) if known is None else known | found

    def _shrunk(self, felt: Tensor, parent: Node) -> Tensor:
        """What of ``felt`` reaches an argument that was broadcast."""
        return unbroadcast(felt.to(self.state.weights.dtype), 1, parent.shape) != 0

    def affine(self) -> set[Node]:
        """Nodes that are affine in the leaves as long as every tie keeps its branch."""
        out: set[Node] = set()
        varies: set[Node] = set(self.leaves)
        for node in self.state.program:
            rule = self.state.rule(node)
            steps = isinstance(rule, Switch) or not node.dtype.is_floating_point
            if not steps and node in self.within and self.moves(node) and any(p in varies for p in node.inputs):
                varies.add(node)
            if node not in varies or not node.inputs:
                out.add(node)
                continue
            moving = [i for i, p in enumerate(node.inputs) if p in varies]
            if any(node.inputs[i] not in out for i in moving):
                continue
            pairs = rule.pairs(node) if rule.curved(node) else set()
            if pairs is not None and not any((i, j) in pairs for i in moving for j in moving):
                out.add(node)
        return out
