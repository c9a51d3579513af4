"""What the graph alone says about a Hessian: which leaves reach which nodes, and which pairs have which parts."""

from __future__ import annotations

from collections.abc import Collection

from dagh._ir import Node, Program
from dagh._request import Pair, Request
from dagh._rules import rule_for


def reach(program: Program, leaves: Collection[Node]) -> dict[Node, int]:
    """For every node, the set of ``leaves`` it depends on, as bits."""
    bit = {leaf: 1 << i for i, leaf in enumerate(leaves)}
    bits: dict[Node, int] = {}
    for node in program:
        mask = bit.get(node, 0)
        if node.dtype.is_floating_point:
            for parent in node.inputs:
                mask |= bits[parent]
        if node.key == "dagh.stop_gradient":
            mask = 0
        bits[node] = mask
    return bits


def curved_pairs(node: Node) -> set[tuple[int, int]]:
    """Pairs of arguments with non-zero mixed second derivatives."""
    rule = rule_for(node)
    if not rule.curved(node):
        return set()
    pairs = rule.pairs(node)
    slots = range(len(node.inputs))
    return {(i, j) for i in slots for j in slots} if pairs is None else pairs


def _curved_pairs(node: Node, bits: dict[Node, int]) -> list[tuple[int, int]]:
    """Leaf sets that meet at a curved node: one entry per pair of arguments with second derivatives."""
    return [(bits[node.inputs[i]], bits[node.inputs[j]]) for i, j in curved_pairs(node)]


def structure(program: Program, request: Request, bits: dict[Node, int]) -> dict[Pair, tuple[bool, bool]]:
    """Which pairs have an outer and a functional part, from the graph alone."""
    assert program.loss is not None
    useful = program.ancestors([program.loss])
    at_output = bits[program.output]
    loss_curved = any(_curved_pairs(n, bits) for n in program if n.part == "loss" and n.op is not None and n in useful)
    meets = [
        pair
        for node in program
        if node.op is not None and node.part == "model" and node in useful and bits[node]
        for pair in _curved_pairs(node, bits)
    ]
    partners = [0] * len(request.leaves)
    for first, second in set(meets):
        for i in range(len(request.leaves)):
            if first >> i & 1:
                partners[i] |= second
            if second >> i & 1:
                partners[i] |= first
    kinds: dict[Pair, tuple[bool, bool]] = {}
    for i, j in request.pairs:
        outer = loss_curved and bool(at_output >> i & 1) and bool(at_output >> j & 1)
        kinds[i, j] = outer, bool(partners[i] >> j & 1)
    return kinds
