"""Sweeps over the DAG: tangents forward, adjoints and second-order rows backward.

A bundle is ``[N, B, *shape]`` per node. The reverse sweep carries, for a fixed bundle of directions ``t`` with tangents
``J_v t``, the rows ``H_v = ∂(δ_v)/∂t``; eliminating a node u in reverse topological order adds

    H_p += D_{u←p}ᵀ H_u + Σ_q [M_u]_{p,q} J_q t        for every argument p of u,

which is the elimination of the live-block recursion restricted to the columns t. Structural zeros are never formed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from dagh._ir import Node

if TYPE_CHECKING:
    from dagh._state import State

Bundle = dict[Node, Tensor]


class Tangents(dict[Node, Tensor]):
    """Tangents by node, ``[N, B, *shape]``.

    The bundle of a node in ``channelwise`` is channel-diagonal: ``[N, b, m, C, …]`` stands for C·b directions, member
    (c, b) being ``[:, b]`` restricted to channel c. A convolution's own weights move one output channel each, so up to
    the next operation that mixes channels C times fewer numbers say the same.
    """

    def __init__(self, values: Mapping[Node, Tensor], channelwise: Iterable[Node] = ()) -> None:
        super().__init__(values)
        self.channelwise = set(channelwise)

    def dense(self, node: Node) -> Tensor:
        """The bundle with every direction written out."""
        return expand_channels(self[node]) if node in self.channelwise else self[node]


def matrices(t: Tensor) -> Tensor:
    """A bundle ``[N, B, *shape]`` with the node's axes flattened: ``[N, B, d]``."""
    return t.reshape(*t.shape[:2], t.shape[2:].numel())


def expand_channels(t: Tensor) -> Tensor:
    """``[N, b, m, C, …]`` channel-diagonal to dense ``[N, C·b, m, C, …]``."""
    n, b, _, c = t.shape[:4]
    out = t.new_zeros(n, c, *t.shape[1:])
    out.diagonal(dim1=1, dim2=4).copy_(t.movedim(3, -1))
    return out.reshape(n, c * b, *t.shape[2:])


def push_forward(
    state: State,
    seeds: Mapping[Node, Tensor],
    within: Collection[Node],
    held: Collection[Node] | None = None,
    *,
    channelwise: bool = False,
) -> Tangents:
    """Tangents of every node of ``within`` that depends on a seed. A seed adds to what flows into its node.

    With ``held``, only those nodes' tangents are returned and the others are dropped as soon as they are used up.
    ``channelwise``: the seeds are channel-diagonal (see :class:`Tangents`).
    """
    tangents = Tangents(seeds, seeds if channelwise else ())
    waiting = {n: sum(u in within for u in state.program.users[n]) for n in within} if held is not None else {}
    for node in state.program:
        if node.op is None or node not in within:
            continue
        moving = [p for p in node.inputs if p in tangents]
        if not moving or not node.dtype.is_floating_point or (node in seeds and not moving):
            continue
        t = _push(state, node, tangents, moving)
        tangents[node] = t + seeds[node] if node in seeds else t
        if held is None:
            continue
        for parent in dict.fromkeys(node.inputs):
            if parent in waiting:
                waiting[parent] -= 1
                if waiting[parent] == 0 and parent not in held:
                    tangents.pop(parent, None)
    return tangents


def _push(state: State, node: Node, tangents: Tangents, moving: list[Node]) -> Tensor:
    """``Σ D t`` at one node, channel-diagonal as long as that is possible."""
    rule, call = state.rule(node), state.call(node)
    special = [p for p in moving if p in tangents.channelwise]
    if special:
        if len(special) == len(moving) and rule.keeps_channels(node):
            tangents.channelwise.add(node)
            return rule.jvp(call, {i: tangents[p] for i, p in enumerate(node.inputs) if p in tangents})
        if moving == special == [node.inputs[0]]:
            t = rule.jvp_channels(call, tangents[node.inputs[0]])
            if t is not None:
                return t
    return rule.jvp(call, {i: tangents.dense(p) for i, p in enumerate(node.inputs) if p in tangents})


def pull_back(
    state: State,
    start: Mapping[Node, Tensor],
    wanted: Collection[Node],
    *,
    tangents: Tangents | None = None,
    curved: Collection[Node] = (),
    keep: bool = False,
) -> Bundle:
    """Rows of every node of ``wanted``.

    ``start`` holds the rows to begin with; curvature is added at the nodes of ``curved``, along ``tangents``. Rows of
    nodes that do not depend on the sample are summed over samples unless ``keep``.
    """
    tangents = Tangents({}) if tangents is None else tangents
    rows: Bundle = {}
    route = state.program.descendants(list(wanted))

    def add(node: Node, row: Tensor) -> None:
        samples = state.values[node].shape[0]
        if samples == 1 and row.shape[0] > 1 and not keep:
            row = row.sum(0, keepdim=True)
        elif samples > 1 and row.shape[0] == 1:
            row = row.expand(samples, *row.shape[1:])
        rows[node] = rows[node] + row if node in rows else row

    for node, row in start.items():
        add(node, row)
    wanted = set(wanted)
    found: Bundle = {}
    for node in reversed(state.program.nodes):
        current = rows.pop(node, None)
        if node in wanted and current is not None:
            found[node] = current
        if node.op is None or node not in route:
            continue
        args = [i for i, p in enumerate(node.inputs) if p in route and p.dtype.is_floating_point]
        if not args:
            continue
        rule, call = state.rule(node), state.call(node)
        if current is not None:
            for i in args:
                add(node.inputs[i], rule.vjp(call, current, i, keep))
        if node in curved and rule.curved(node):
            delta = state.adjoints.get(node)
            if delta is not None:
                for i, row in _curve(state, node, delta, tangents, args, keep).items():
                    add(node.inputs[i], row)
    return found


def _curve(
    state: State, node: Node, delta: Tensor, tangents: Tangents, args: list[int], keep: bool
) -> dict[int, Tensor]:
    """``Σ_q [M]_{p,q} J_q t`` at one node."""
    rule, call = state.rule(node), state.call(node)
    moving = [p for p in node.inputs if p in tangents]
    if not moving:
        return {}
    if moving == [node.inputs[0]] and node.inputs[0] in tangents.channelwise:
        found = rule.curvature_channels(call, delta, tangents[node.inputs[0]], keep)
        if found is not None:
            return {i: row for i, row in found.items() if i in args}
    incoming = {i: tangents.dense(p) for i, p in enumerate(node.inputs) if p in tangents}
    return rule.curvature(call, delta, incoming, args, keep)


def adjoints(state: State) -> dict[Node, Tensor]:
    """``δ_v = ∇_{f_v} L`` for every node on a path to the loss: ``[N, *shape]`` (``[1, …]`` where shared,
    unless the state is per sample).
    """
    program = state.program
    loss = program.loss
    assert loss is not None
    result: dict[Node, Tensor] = {}
    n = state.samples
    pending: dict[Node, Tensor] = {loss: state.weights.expand(n).reshape(n, *([1] * len(loss.shape)))}
    for node in reversed(program.nodes):
        delta = pending.pop(node, None)
        if delta is None:
            continue
        result[node] = delta
        if node.op is None:
            continue
        rule, call = state.rule(node), state.call(node)
        for i, parent in enumerate(node.inputs):
            if not parent.dtype.is_floating_point or not state.active(parent):
                continue
            back = rule.vjp(call, delta.unsqueeze(1), i, state.per_sample)
            samples = state.values[parent].shape[0]
            if samples == 1 and back.shape[0] > 1 and not state.per_sample:
                back = back.sum(0, keepdim=True)
            elif samples > 1 and back.shape[0] == 1:
                back = back.expand(samples, *back.shape[1:])
            back = back.squeeze(1)
            pending[parent] = pending[parent] + back if parent in pending else back
    return result
