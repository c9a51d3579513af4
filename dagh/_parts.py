"""Which elements of a node's value its views read."""

from __future__ import annotations

import torch

from dagh._costs import VIEWS
from dagh._ir import Node, Program
from dagh._rules import rule_for


def readers(program: Program, node: Node) -> tuple[Node, ...]:
    """The nodes that read parts of a node, where every element is read by exactly one of them; otherwise none."""
    if node not in program.parts:
        found = [u for u in program.users[node] if rule_for(u).copies_part]
        places = torch.arange(node.numel, device="cpu").reshape(1, *node.shape)
        read = [rule_for(u).value(u, [places]).flatten() for u in found]
        apart = bool(read) and torch.cat(read).sort().values.equal(places.flatten())
        program.parts[node] = tuple(found) if apart else ()
    return program.parts[node]


def ends_of(program: Program, layer: Node) -> tuple[tuple[int, Node], ...]:
    """Views of a linear layer's outputs (of its last axis) that do not read the last of them.

    With the number of outputs up to the last one that is read, in ascending order.
    """
    outputs = layer.shape[-1]
    places = {layer: torch.arange(outputs, device="cpu").expand(1, *layer.shape)}
    ends = []
    for node in program:
        if len(node.inputs) != 1 or node.inputs[0] not in places or node.operation not in VIEWS:
            continue
        places[node] = read = rule_for(node).value(node, [places[node.inputs[0]]])
        end = int(read.max()) + 1 if read.numel() else 0
        if end < outputs:
            ends.append((end, node))
    return tuple(sorted(ends, key=lambda one: one[0]))
