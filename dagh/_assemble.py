"""Assembly of the requested blocks, in ranges of samples and of directions that fit the memory budget."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import partial
from threading import Event

import torch
from torch import Tensor

from dagh import _contract, _memory, _outer, _sweep
from dagh._accumulate import Accumulator
from dagh._bridge import Crossing, build, cross, directions, fold, seeds
from dagh._bundles import Tangents, matrices
from dagh._chunks import ranges
from dagh._entries import Entries
from dagh._ir import Node
from dagh._outer_blocks import add_outer
from dagh._plan import Plan
from dagh._plan_sweeps import Column
from dagh._quadratic import entries
from dagh._request import Request, itemsize
from dagh._squares import add_square
from dagh._state import State
from dagh._strips import add_strip
from dagh._workers import FEWEST, Stopped, side_by_side


@dataclass(frozen=True)
class _Share:
    """Some samples of the batch: the state at them alone, and the bytes for what is held at once."""

    state: State
    request: Request
    plan: Plan
    window: slice
    """Where they lie in the batch."""
    room: float
    tight: bool
    """Freed memory has to be given back between two pieces of work."""

    def narrow(self, part: slice) -> _Share:
        """Some of its samples, counted from its first one."""
        if part == slice(0, self.state.samples):
            return self
        window = slice(self.window.start + part.start, self.window.start + part.stop)
        return replace(self, state=self.state.narrow(part), window=window)


def assemble(state: State, request: Request, plan: Plan, *, parts: dict[str, Accumulator], budget: int) -> None:
    """Fill the accumulators of the ``"outer"`` and/or ``"functional"`` part (they may be one and the same)."""
    if plan.strips:
        held = plan.result_elements * len({id(p) for p in parts.values()}) * itemsize(state.weights.dtype)
        _add_strips(state, request, plan, parts, budget - held)
        if not plan.columns and not plan.factored:
            return
    step, working = plan.chunks(budget)
    dense = plan.summed_bytes * len({id(p) for p in parts.values()})
    count = plan.shares(working, dense)
    forks = [parts, *(_fork(parts) for _ in range(1, count))]
    room = max(1.0, (working - (count - 1) * dense) / count)
    tight = _memory.tight(budget, plan.peak_memory, state.weights.device)

    def fill(mine: dict[str, Accumulator], window: slice, enough: Event) -> None:
        share = _Share(state.narrow(window), request, plan, window, room, tight)
        if "outer" in mine:
            _add_outer(share, mine["outer"])
        if "functional" not in mine:
            return
        if plan.columns:
            _ = share.state.adjoints  # what lives longest is made first: nothing is left between its pieces
        for part in ranges(share.state.samples, plan.tile(share.state.samples)):
            _add_functional(share.narrow(part), mine["functional"], enough)

    for window in ranges(state.samples, step):
        side_by_side([partial(fill, *one) for one in zip(forks, _split(window, count), strict=False)])
    for fork in forks[1:]:
        for part, result in parts.items():
            result.merge(fork[part])


def _add_strips(state: State, request: Request, plan: Plan, parts: dict[str, Accumulator], room: int) -> None:
    """Blocks by products, in ranges of samples of which one direction fits ``room`` bytes."""
    for strip in plan.strips:
        at_once = 1 if plan.keep else strip.window(state.samples, room, itemsize(state.weights.dtype))
        for window in ranges(state.samples, at_once):
            add_strip(state.narrow(window), request, plan, strip, parts, window, room)


def _fork(parts: dict[str, Accumulator]) -> dict[str, Accumulator]:
    """Accumulators for another share; what is one and the same stays so."""
    made = {id(p): p.fork() for p in parts.values()}
    return {name: made[id(p)] for name, p in parts.items()}


def _split(window: slice, count: int) -> list[slice]:
    """A range of samples in at most ``count`` ranges of nearly equal length."""
    length = window.stop - window.start
    count = max(1, min(count, length // FEWEST))
    ends = [window.start + length * k // count for k in range(count + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


# -- the two parts ---------------------------------------------------------------------------------


def _add_outer(share: _Share, result: Accumulator) -> None:
    state, plan = share.state, share.plan
    pairs = plan.factored
    if not pairs:
        return
    leaves = {i for pair in pairs for i in pair}
    factor = _outer.factor_loss(state)
    if factor.columns.shape[1] == 0:
        return
    # Pulled back in ranges of samples that stay in the cache; multiplied all at once, unless only squares are wanted.
    gathered = _outer.Gathered(
        state.samples, plan.kept_rows, lambda leaf, r, width: result.rows.room(leaf, r, width, share.window)
    )
    for part in ranges(state.samples, plan.outer_step(state.samples, share.room)):
        some = share.narrow(part)
        rows = _outer.pull_rows(some.state, factor.columns[part], share.request, plan, leaves)
        if isinstance(result, Entries):
            result.add_rows(rows, None if factor.signs is None else factor.signs[part], some.window)
        else:
            gathered.put(part, rows)
        del rows
        if share.tight:
            _memory.give_back()
    if gathered:
        add_outer(gathered, pairs, factor.signs, plan, result, share.window)


def _add_functional(share: _Share, result: Accumulator, enough: Event) -> None:
    plan = share.plan
    crossings = {v: build(share.state, bridge, share.room) for v, bridge in plan.bridges.items()}
    for column in plan.columns:
        if enough.is_set():
            raise Stopped
        _add_column(share, column, None if column.via is None else crossings[column.via], result)


def _add_column(share: _Share, column: Column, crossing: Crossing | None, result: Accumulator) -> None:
    if column.square is not None:
        at_once = column.together(share.state.samples, share.room, itemsize(share.state.weights.dtype))
        (leaf,) = column.leaves
        add_square(result.block(leaf, leaf), share.state, column, crossing, at_once, share.tight)
        return
    step = column.step(share.state.samples, share.room, itemsize(share.state.weights.dtype))
    for part in ranges(column.width, step):
        _add_directions(share, column, crossing, result, part)
        if share.tight:
            _memory.give_back()


def _add_directions(share: _Share, column: Column, crossing: Crossing | None, result: Accumulator, part: slice) -> None:
    """Sweep some directions of a column and add what is found; nothing of it stays alive."""
    state, window = share.state, share.window
    if isinstance(result, Entries) and column.one_way:
        _add_entries(share, column, crossing, result, part)
        return
    per_sample = result.keep or column.basis in ("activation", "input")
    tangents, found, own = _sweep_column(state, column, crossing, part, per_sample)
    if column.basis == "activation":
        _add_activation(share, column, tangents, found, result, part)
        return
    if column.basis == "input":
        _add_inputs(share, column, found, result, part)
        return
    for leaf, row in column.pairs:
        target = column.targets[row]
        if target not in found:
            continue
        h = found.dense(target)
        if h.shape[0] > 1 and not result.keep:
            h = h.sum(0, keepdim=True)
        h = matrices(h)  # [N or 1, B, p_row]
        piece = h.expand(state.samples, *h.shape[1:]) if result.keep else h[0]
        if column.gate is not None and column.basis == "channel":
            result.add_channels(leaf, row, piece, column.gate.channels, part, window)
            if leaf == row and own is not None:
                result.add_mirrored(leaf, matrices(own)[0], column.gate.channels, part)
        else:
            result.add(leaf, row, piece, part, window)


def _add_entries(share: _Share, column: Column, crossing: Crossing | None, result: Entries, part: slice) -> None:
    each, common = entries(share.state, column, crossing, part)
    for leaf in column.leaves:
        if column.basis == "activation":
            x = _outer.layer_inputs(share.state, share.plan.layers[leaf])[:, 0]  # [n, i]
            result.add_squares(leaf, each, x, part, share.window)
        else:
            piece = each if result.keep else each.sum(0) + common[0]
            result.add_own(leaf, piece, column.copies, part, share.window)


def _sweep_column(
    state: State, column: Column, crossing: Crossing | None, part: slice, per_sample: bool
) -> tuple[Tangents, Tangents, Tensor | None]:
    """The tangents, the rows at the targets, and those of them that are to be mirrored, too: products taken once."""
    if column.basis == "input":
        seed = seeds(state, column, part)
        start = {column.seed: seed.expand(state.samples, *seed.shape[1:])}
        return Tangents({}), _sweep.pull_back(state, start, list(column.targets.values()), keep=per_sample), None
    tangents = directions(state, column, part)
    targets, curved, spare = list(column.targets.values()), column.curved, column.paths
    passed = column.passed(part.start // column.order)
    if crossing is None:
        found = _sweep.pull_back(
            state, {}, targets, tangents=tangents, curved=curved, keep=per_sample, spare=spare, without=passed
        )
        return tangents, found, None
    beyond = cross(state, column, crossing, tangents, per_sample)
    here = [t for t in targets if t not in column.after]
    folded: dict[Node, Tensor] = {}
    own = None if per_sample else column.mirrored
    start = Tangents({v: beyond.pop(v) for v in [crossing.node] if v in beyond}, beyond.channelwise & {crossing.node})
    if column.folded and start:
        rows = start.dense(crossing.node)
        folded = {
            t: fold(crossing, rows, t, per_sample, part.start if t is own else 0)
            for t in dict.fromkeys(here)
            if t in crossing.tables
        }
        start = Tangents({})
        del rows
    found = _sweep.pull_back(
        state, start, here, tangents=tangents, curved=curved, keep=per_sample, spare=spare, without=passed
    )
    for node, rows in folded.items():
        found[node] = found.dense(node) + rows if node in found else rows
        found.channelwise.discard(node)
    for node in column.after:
        if node in beyond:
            found[node] = beyond[node]
    found.channelwise |= beyond.channelwise & column.after
    return tangents, found, None if own is None else folded.get(own)


def _add_activation(
    share: _Share, column: Column, tangents: Tangents, found: Tangents, result: Accumulator, part: slice
) -> None:
    """Apply the layers' inputs: directions of ``z`` become directions of W (or b)."""
    state, plan, window = share.state, share.plan, share.window
    n, gate = state.samples, column.gate
    assert gate is not None

    def whole(t: Tensor) -> Tensor:
        """``[n, rows, outputs, d]``."""
        t = matrices(t.expand(n, *t.shape[1:]))
        return t.reshape(n, gate.rows, -1, t.shape[2])

    outputs = slice(part.start // column.order, part.stop // column.order)
    half: Tensor | None = None
    for leaf, row in column.pairs:
        x = _outer.layer_inputs(state, plan.layers[leaf])  # [n, T, i]
        target, other = column.targets[row], plan.layers.get(row)
        if other is None or target is not other.node:
            if target in found:
                _contract.add_rows(result, (leaf, row), x, whole(found.dense(target)), outputs, window)
            continue
        y = _outer.layer_inputs(state, other)
        into, delta = other.node.inputs[0], state.adjoints.get(other.node)
        crosses = other.argument == 1 and into in tangents and delta is not None
        if target not in found and not crosses:
            continue
        adjoint = None if delta is None else delta.expand(n, *delta.shape[1:]).reshape(n, other.rows, -1)
        if column.ends and target is gate.node and not isinstance(result, Entries):
            if target in found:
                if half is None:
                    own = whole(found.dense(target))
                    half = _contract.arranged(own.reshape(*own.shape[:3], gate.rows, -1)[..., outputs.start :])
                _contract.add_halved(result, (leaf, row), x, y, half, outputs)
            continue
        apart = (target not in found or target in found.channelwise) and (not crosses or into in tangents.channelwise)
        if apart and column.copies == gate.rows == other.rows:
            core, path = (
                bundles[node].expand(n, *bundles[node].shape[1:]) if present else None
                for bundles, node, present in ((found, target, target in found), (tangents, into, crosses))
            )
            _contract.add_tokens(result, (leaf, row), x, y, core, path, adjoint, outputs, window)
            continue
        core = whole(found.dense(target)) if target in found else None
        path = whole(tangents.dense(into)) if crosses else None
        _contract.add_layers(result, (leaf, row), x, y, core, path, adjoint, outputs, window)


def _add_inputs(share: _Share, column: Column, found: Tangents, result: Accumulator, part: slice) -> None:
    """``δ_o ∂x_i``: a linear layer's own curvature, from the derivatives of its inputs (summed over its rows)."""
    gate, n = column.gate, share.state.samples
    assert gate is not None
    delta = share.state.adjoints[gate.node]
    delta = delta.expand(n, *delta.shape[1:]).reshape(n, gate.rows, -1)
    members = slice(part.start // gate.rows, part.stop // gate.rows)
    for leaf, row in column.pairs:
        if column.targets[row] not in found:
            continue
        h = found.dense(column.targets[row])
        h = h.expand(n, *h.shape[1:]).reshape(n, gate.rows, members.stop - members.start, -1)
        if result.keep:
            piece = torch.einsum("nto,ntip->noip", delta, h).flatten(1, 2)
        else:
            piece = (delta.flatten(0, 1).T @ h.flatten(0, 1).flatten(1)).reshape(-1, h.shape[3])
        result.add_channels(leaf, row, piece, delta.shape[2], members, share.window)
