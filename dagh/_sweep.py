"""Sweeps over the DAG: tangents forward, adjoints and second-order rows backward.

A bundle is ``[N, B, *shape]`` per node. The reverse sweep carries, for a fixed bundle of directions ``t`` with tangents
``J_v t``, the rows ``H_v = ∂(δ_v)/∂t``; eliminating a node u in reverse topological order adds

    H_p += D_{u←p}ᵀ H_u + Σ_q [M_u]_{p,q} J_q t        for every argument p of u,

which is the elimination of the live-block recursion restricted to the columns t. Structural zeros are never formed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from dagh._bundles import Picked, Scaled, Tangents, expand_channels, expanded, written_out
from dagh._ir import Node
from dagh._parts import readers
from dagh._rules import Call, Rule
from dagh._rules._axes import room_in_order

if TYPE_CHECKING:
    from dagh._state import State

Bundle = dict[Node, Tensor]


def push_forward(
    state: State,
    seeds: dict[Node, Tensor],
    within: Collection[Node],
    held: Collection[Node] | None = None,
    *,
    channelwise: bool = False,
    trim: bool = False,
    units: Tensor | None = None,
) -> Tangents:
    """Tangents of every node of ``within`` that depends on a seed. A seed adds to what flows into its node.

    With ``held``, only those nodes' tangents are returned; the others are dropped as soon as they are used up, out of
    ``seeds`` as well.
    ``channelwise``: the seeds are channel-diagonal (see :class:`Tangents`). ``trim``: parts of a value that the seeds
    do not move (the keys, where queries move) have no tangent at all, instead of a bundle of zeros.
    ``units``: the only seed has a one as its only entry in every member, at these places of the flattened node.
    """
    tangents = Tangents(seeds, seeds if channelwise else ())
    unit = None if units is None else next(iter(seeds.values()))
    waiting = {n: sum(u in within for u in state.program.users[n]) for n in within} if held is not None else {}
    for node in state.program:
        if node.op is None or node not in within:
            continue
        moving = [p for p in node.inputs if p in tangents]
        if not moving or not node.dtype.is_floating_point or (node in seeds and not moving):
            continue
        factor = None
        if len(moving) == 1 and node.inputs.count(moving[0]) == 1 and node not in seeds:
            factor = state.rule(node).scaling(state.call(node), node.inputs.index(moving[0]))
        if factor is not None:
            tangents.scale(node, moving[0], factor)
        elif (
            units is not None
            and node not in seeds
            and (numbered := _push_units(state, node, tangents, moving, units, unit))
        ):
            tangents.hold(node, numbered)
        else:
            t = _push(state, node, tangents, moving)
            if node in seeds:
                t = t + seeds[node]
            if not (trim and t.shape[0] == 1 and state.rule(node).copies_part and not t.any()):
                tangents[node] = t
            del t
        if held is None:
            continue
        for parent in dict.fromkeys(node.inputs):
            if parent in waiting:
                waiting[parent] -= 1
                if waiting[parent] == 0 and parent not in held:
                    tangents.drop(parent)
                    seeds.pop(parent, None)
    return tangents


def _push_units(
    state: State, node: Node, tangents: Tangents, moving: list[Node], units: Tensor, unit: Tensor | None
) -> Scaled | None:
    """Unit vectors that have been scaled element by element: each is still a unit vector times a number per sample.

    The numbers pass through ``D`` untouched, so that it meets the unit vectors alone: one sample instead of all.
    """
    lazy = tangents.lazy(moving[0]) if len(moving) == 1 else None
    if lazy is None or lazy.base is not unit or not isinstance(lazy.factor, Tensor):
        return None
    n, members, shape = lazy.factor.shape[0], len(units), moving[0].shape
    numbers = lazy.factor.expand(n, 1, *shape).reshape(n, -1)[:, units]
    bundles = {i: lazy.base for i, p in enumerate(node.inputs) if p is moving[0]}
    pushed = state.rule(node).jvp(state.call(node), bundles)
    pushed = pushed[:1] if pushed.stride(0) == 0 else pushed
    return Scaled(pushed, numbers.reshape(n, members, *([1] * len(node.shape))))


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
    spare: Collection[Node] | None = None,
    without: Collection[Node] = (),
) -> Tangents:
    """Rows of every node of ``wanted``; nothing is pulled back by way of the nodes ``without``.

    ``start`` holds the rows to begin with (channel-diagonal ones, if a :class:`Tangents` says so); curvature is added
    at the nodes of ``curved``, along ``tangents``. Rows of nodes that do not depend on the sample are summed over
    samples unless ``keep``. Rows stay channel-diagonal as long as all that is added to them is. With ``spare``, the
    tangents of other nodes are dropped as soon as they are used up.
    """
    tangents = Tangents({}) if tangents is None else tangents
    rows = _Rows(state, keep)
    route = state.program.descendants(list(wanted), without)
    for node in start:
        rows.add(node, start[node], isinstance(start, Tangents) and node in start.channelwise)
    wanted = set(wanted)
    found = Tangents({})
    for node in reversed(state.program.nodes):
        current, thin, own = rows.pop(node)
        dense = None
        if spare is not None and node not in spare:
            tangents.drop(node)
        if node in wanted and current is not None:
            current = found[node] = rows.whole(node, current, own)
            own = False
            if thin:
                found.channelwise.add(node)
        if node.op is None or node not in route:
            continue
        args = [i for i, p in enumerate(node.inputs) if p in route and p.dtype.is_floating_point]
        if not args:
            continue
        rule, call = state.rule(node), state.call(node)
        if current is not None:
            keeps = thin and rule.keeps_channels(node)
            factors = {i: rule.scaling(call, i) for i in args}
            absorbed = isinstance(current, Scaled) and not thin and rule.absorbs(call, current.factor)
            mixing = [i for i in args if factors[i] is None]
            if isinstance(current, Picked) and not thin and not any(node.inputs[i].batched for i in mixing):
                mixing = [i for i in mixing if not rows.pick(node.inputs[i], rule, call, current, i)]
            left = [i for i in args if i in mixing or factors[i] is not None]
            if not absorbed and (mixing or (own and len(left) > 1)):
                current = rows.whole(node, current, own)  # multiplied out once, for all arguments
            for i in left:
                parent, factor = node.inputs[i], factors[i]
                if factor is not None:
                    scaled = current.by(factor) if isinstance(current, Picked) else Scaled.by(current, factor)
                    rows.add(parent, scaled, thin, own=own and len(left) == 1)
                    continue
                assert not isinstance(current, Picked)
                if isinstance(current, Scaled):
                    base = rows.whole(node, current.base)
                    rows.add(parent, rule.vjp_scaled(call, base, current.factor, i, keep), own=rule.fresh)
                    continue
                if keeps and parent.batched:
                    rows.put(parent, rule, call, current, i, True)
                    continue
                row = rule.vjp_channels(call, current, i, keep) if thin and not parent.batched else None
                if row is not None:
                    rows.add(parent, row, own=True)
                    continue
                if dense is None:
                    dense = expand_channels(current) if thin else current
                if parent.batched:
                    rows.put(parent, rule, call, dense, i, False)
                    continue
                rows.add(parent, rule.vjp(call, dense, i, keep), own=rule.fresh)
        if node in curved and rule.curved(node):
            current = dense = None
            rows.curve(node, tangents, args)
    return found


class _Rows:
    """The rows that have arrived at each node so far."""

    def __init__(self, state: State, keep: bool) -> None:
        self.state, self.keep = state, keep
        self._rows: dict[Node, Tensor | Scaled | Picked] = {}
        self._packed: set[Node] = set()
        self._own: set[Node] = set()  # bundles that nobody else holds
        self._bare: dict[Node, set[Node]] = {}  # who reads the parts of a bundle that are not written yet

    def pop(self, node: Node) -> tuple[Tensor | Scaled | Picked | None, bool, bool]:
        """The rows of a node, whether they are channel-diagonal, and whether nobody else holds them."""
        self._fill(node)
        packed, own = node in self._packed, node in self._own
        self._packed.discard(node)
        self._own.discard(node)
        return self._rows.pop(node, None), packed, own

    def whole(self, node: Node, row: Tensor | Scaled | Picked, own: bool = False) -> Tensor:
        """Written out (in place where it is our ``own``), one for every sample of the node."""
        row = row.into_place() if own and isinstance(row, Scaled) else written_out(row)
        samples = self.state.values[node].shape[0]
        return row.expand(samples, *row.shape[1:]) if samples > 1 and row.shape[0] == 1 else row

    def pick(self, node: Node, rule: Rule, call: Call, cotangent: Picked, arg: int) -> bool:
        """Add what ``rule`` pulls back without spreading the cotangent out, if it can."""
        row = rule.vjp_picked(call, cotangent, arg, self.keep)
        if row is not None:
            self.add(node, row, own=True)
        return row is not None

    def put(self, node: Node, rule: Rule, call: Call, cotangent: Tensor, arg: int, packed: bool) -> None:
        """Add what ``rule`` pulls back to one of its arguments, in place where it concerns a part of that alone."""
        picked = rule.picked(call, cotangent)
        if picked is not None:
            self.add(node, picked, packed, own=True)
            return
        shape = (*cotangent.shape[:2], *node.shape)
        if node not in self._rows and rule.copies_part:
            self._rows[node] = room = room_in_order(cotangent, shape, self.state.values[node])
            self._bare[node] = set(readers(self.state.program, node))
            if not self._bare[node]:
                room.zero_()
            self._own.add(node)
            if packed:
                self._packed.add(node)
        held = self._rows.get(node)
        fits = node in self._own and packed == (node in self._packed)
        if rule.copies_part and fits and isinstance(held, Tensor) and held.shape == shape:
            place = rule.place(call, held)
            if call.node in self._bare.get(node, ()):
                place.copy_(cotangent)
                self._bare[node].discard(call.node)
            else:
                place.add_(cotangent)
            return
        self.add(node, rule.vjp(call, cotangent, arg, self.keep), packed, own=rule.fresh)

    def _fill(self, node: Node) -> None:
        """Zeros where nothing was written to."""
        for reader in self._bare.pop(node, ()):
            held = self._rows[node]
            assert isinstance(held, Tensor)
            self.state.rule(reader).place(self.state.call(reader), held).zero_()

    def curve(self, node: Node, tangents: Tangents, args: list[int]) -> None:
        """Add the curvature of ``node`` along ``tangents`` to what its arguments have."""
        delta = self.state.adjoints.get(node)
        if delta is None:
            return
        found = curve(self.state, node, delta, tangents, args, self.keep)
        while found:
            i, row, packed = found.pop(0)
            self.add(node.inputs[i], row, packed)

    def add(self, node: Node, row: Tensor | Scaled | Picked, packed: bool = False, own: bool = False) -> None:
        """Add to what a node has; channel-diagonal rows (``packed``) are spread out where others are not.

        ``own``: nobody else holds the row (or the base of a scaled one), so that it may be changed later on.
        """
        self._fill(node)
        own = own and not expanded(row if isinstance(row, Tensor) else row.base)
        samples, before = self.state.values[node].shape[0], self._rows.get(node)
        if before is None:
            if packed:
                self._packed.add(node)
            if own:
                self._own.add(node)
            if not isinstance(row, Tensor) and samples > 1:
                self._rows[node] = row
                return
        elif packed != (node in self._packed):
            if packed:
                row = expand_channels(written_out(row))
            else:
                self._packed.discard(node)
                before = expand_channels(written_out(before))
                self._own.add(node)
        if before is not None and node in self._own:
            before = self._rows[node] = self.whole(node, before, own=True)
            if isinstance(row, Scaled) and samples > 1 and row.add_to(before):
                return
        own = own or not isinstance(row, Tensor)
        row = written_out(row)
        if samples == 1 and row.shape[0] > 1 and not self.keep:
            row = row.sum(0, keepdim=True)
        whole = self.whole(node, row)
        if before is None:
            self._rows[node] = whole
            if whole is not row:  # expanded
                self._own.discard(node)
            return
        before = self.whole(node, before)
        alike = before.shape == whole.shape and before.dtype == whole.dtype
        if alike and node in self._own:
            self._rows[node] = before.add_(whole)
        elif alike and own and whole is row:
            self._rows[node] = whole.add_(before)
        else:
            self._rows[node] = before + whole
        self._own.add(node)


def curve(
    state: State, node: Node, delta: Tensor, tangents: Tangents, args: list[int], keep: bool
) -> list[tuple[int, Tensor | Scaled, bool]]:
    """``Σ_q [M]_{p,q} J_q t`` at one node: arguments, their rows, and whether these are channel-diagonal."""
    rule, call = state.rule(node), state.call(node)
    if len(node.inputs) == 1:
        (parent,) = node.inputs
        factor = rule.curvature_scaling(call, delta) if parent in tangents and args else None
        if factor is not None:
            packed = parent in tangents.channelwise and rule.keeps_channels(node) and parent.batched
            return [(0, Scaled(tangents[parent] if packed else tangents.dense(parent), factor), packed)]
    pairs = rule.pairs(node)
    if pairs is not None:
        args = [i for i in args if any(a == i and node.inputs[j] in tangents for a, j in pairs)]
    moving = [p for p in node.inputs if p in tangents]
    if not moving or not args:
        return []
    if moving == [node.inputs[0]] and node.inputs[0] in tangents.channelwise:
        found = rule.curvature_channels(call, delta, tangents[node.inputs[0]], keep)
        if found is not None:
            return [(i, row, False) for i, row in found.items() if i in args]
    out: list[tuple[int, Tensor | Scaled, bool]] = []
    if all(p in tangents.channelwise for p in moving) and rule.keeps_channels(node):
        # Each channel's rows depend on that channel alone: packed bundles in, packed rows out.
        thin = [i for i in args if node.inputs[i].batched]
        bundles = {i: tangents[p] for i, p in enumerate(node.inputs) if p in tangents}
        if thin:
            out = [(i, row, True) for i, row in rule.curvature(call, delta, bundles, thin, keep).items()]
        args = [i for i in args if not node.inputs[i].batched]
        if not args:
            return out
    incoming = {i: tangents.dense(p) for i, p in enumerate(node.inputs) if p in tangents}
    return out + [(i, row, False) for i, row in rule.curvature(call, delta, incoming, args, keep).items()]


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
