"""Bridges at work: the derivatives by one node's directions, and tangents carried across by matrix products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dagh import _sweep
from dagh._bundles import Tangents, matrices
from dagh._chunks import ranges
from dagh._ir import Node
from dagh._plan_sweeps import Bridge, Column, Table
from dagh._request import itemsize
from dagh._rules._conv import Convolution
from dagh._state import State


@dataclass
class Crossing:
    """``rows``: derivatives of the adjoints of the bridge's targets; ``paths``: of the values of some nodes.

    Bundles over the directions of the bridge's node; channel-diagonal ones (tokens) are marked as such.
    ``tables``: tangents at the bridge's node by the directions of targets before it.
    """

    node: Node
    rows: Tangents
    paths: Tangents
    tables: dict[Node, Tensor]


def build(state: State, bridge: Bridge, working: float) -> Crossing:
    """Sweep all directions of the bridge's node, a part at a time."""
    like = state.values[bridge.node]
    step = bridge.step(state.samples, working, itemsize(like.dtype))
    pieces = []
    for part in ranges(bridge.width, step):
        seed = unit_vectors(bridge.node, bridge.copies, torch.arange(part.start, part.stop, device="cpu"), like)
        tangents = _sweep.push_forward(
            state, {bridge.node: seed}, bridge.within, bridge.held, channelwise=bridge.copies > 1
        )
        rows = _sweep.pull_back(state, {}, bridge.targets, tangents=tangents, curved=bridge.curved, keep=True)
        pieces.append((rows, tangents))
    return Crossing(
        bridge.node,
        _joined([rows for rows, _ in pieces], bridge.targets, bridge.copies),
        _joined([tangents for _, tangents in pieces], bridge.paths, bridge.copies),
        {table.target: _table(state, table, bridge.node, working) for table in bridge.tables},
    )


def _table(state: State, table: Table, node: Node, working: float) -> Tensor:
    """Tangents at ``node`` by all directions of the table's target, a part at a time: ``[C or 1, N, d, width]``.

    In the order that the products want; channel-diagonal ones have an axis for the channel in front.
    """
    like = state.values[table.seed]
    step = table.step(state.samples, working, itemsize(like.dtype))
    pieces: list[Tensor] = []
    apart = 1
    for part in ranges(table.width, step):
        seed = seeds(state, table, part)
        tangents = _sweep.push_forward(state, {table.seed: seed}, table.within, {node}, channelwise=table.copies > 1)
        packed = node in tangents.channelwise
        t, c = tangents[node], node.shape[1] if packed else 1
        apart = 1 if packed else table.copies
        t = t.expand(state.samples, *t.shape[1:]).reshape(state.samples, apart, -1, *_split(node, c))
        pieces.append(t.permute(4, 0, 3, 5, 1, 2))  # [C or 1, N, m, rest, copies, part]
    return torch.cat(pieces, 5).flatten(4).flatten(2, 3)


def _split(node: Node, channels: int) -> tuple[int, int, int]:
    """A node's axes before the channels, the channels, and what comes after them."""
    before = node.shape[0] if channels > 1 else 1
    return before, channels, node.numel // (before * channels)


def fold(crossing: Crossing, rows: Tensor, target: Node, keep: bool, first: int = 0) -> Tensor:
    """Rows at a target from ``rows`` ``[N, B, *node]`` at the bridge's node: their products with its tangents.

    Summed over samples (``[1, B, *target]``) where the target is one and the same for all, unless ``keep``; only then
    the members of each channel before ``first`` may be left out (zero).
    """
    table = crossing.tables[target]
    (n, b), c = rows.shape[:2], table.shape[0]
    left = rows.reshape(n, b, *_split(crossing.node, c)).permute(3, 1, 0, 2, 4)  # [C, B, N, m, rest]
    if keep or target.batched:
        each = [part.flatten(2).transpose(0, 1) @ right for part, right in zip(left, table, strict=True)]
        return torch.stack(each, 2).reshape(n, b, *target.shape)
    found = left.flatten(2) @ table.flatten(1, 2)[..., first:]
    if first:
        found = F.pad(found, (first, 0))
    return found.transpose(0, 1).reshape(1, b, *target.shape)


def seeds(state: State, sweep: Column | Table, part: slice) -> Tensor:
    """Where the sweep of some directions begins: unit vectors, or one entry of the kernel of every channel."""
    if sweep.gate is not None and sweep.gate.channels:
        return Convolution().seed_channels(state.call(sweep.seed), sweep.gate.argument)[:, part]
    return unit_vectors(sweep.seed, sweep.copies, chosen(sweep, part), state.values[sweep.seed])


def chosen(sweep: Column | Table, part: slice) -> Tensor:
    """Elements of the seed at which unit vectors stand, in the order of the sweep."""
    each, order = sweep.seed.numel // sweep.copies, sweep.order if isinstance(sweep, Column) else 1
    # A range of a layer's outputs, for all of its rows: what is summed over the rows must be together.
    outputs = slice(part.start // order, part.stop // order)
    return torch.arange(each, device="cpu").reshape(order, -1)[:, outputs].flatten()


def directions(state: State, column: Column, part: slice) -> Tangents:
    """Tangents of what a column holds, by some of its directions."""
    units = chosen(column, part) if column.copies == 1 and column.basis != "channel" else None
    start = {column.seed: seeds(state, column, part)}
    return _sweep.push_forward(
        state, start, column.within, column.held, channelwise=column.copies > 1, trim=True, units=units
    )


def unit_vectors(node: Node, copies: int, chosen: Tensor, like: Tensor) -> Tensor:
    """Some of the basis of a node: ``[1, B, *shape]``, alike in each of the channels (tokens) it stands for."""
    each, shape = node.numel // copies, node.shape
    eye = torch.zeros(len(chosen), each, dtype=like.dtype, device=like.device)
    eye[torch.arange(len(chosen), device="cpu"), chosen] = 1
    if copies == 1:
        return eye.reshape(1, len(chosen), *shape)
    return eye.reshape(1, len(chosen), shape[0], 1, *shape[2:]).expand(-1, -1, -1, copies, *shape[2:])


def _joined(pieces: list[Tangents], nodes: tuple[Node, ...], copies: int) -> Tangents:
    """Bundles of several parts of the directions."""
    out = Tangents({})
    for node in nodes:
        if node not in pieces[0]:
            continue
        if node in pieces[0].channelwise:
            out.channelwise.add(node)
            out[node] = torch.cat([p[node] for p in pieces], 1)
            continue
        # Spread out, a direction's channels come first: [N, copies · part, …].
        parts = [p[node] for p in pieces]
        apart = [t.reshape(t.shape[0], copies, -1, *t.shape[2:]) for t in parts]
        out[node] = parts[0] if len(parts) == 1 else torch.cat(apart, 2).flatten(1, 2)
    return out


def cross(state: State, column: Column, crossing: Crossing, tangents: Tangents, per_sample: bool) -> Tangents:
    """Rows of the column's targets beyond the bridge; tangents of the nodes it reads there are put into ``tangents``.

    The returned rows include those at the bridge's own node, with which the sweep back starts.
    """
    found = Tangents({})
    if crossing.node not in tangents:  # these directions move nothing there: unused rows of a table, say
        return found
    for node in [crossing.node, *column.after]:
        if node in crossing.rows:
            _carry(state, crossing, crossing.rows, node, tangents, found, per_sample or node.batched)
    for node in column.paths:
        if node in crossing.paths and node not in tangents:
            _carry(state, crossing, crossing.paths, node, tangents, tangents, True)
    return found


def _carry(
    state: State, crossing: Crossing, source: Tangents, node: Node, tangents: Tangents, into: Tangents, keep: bool
) -> None:
    v, n = crossing.node, state.samples
    table = source[node].expand(n, *source[node].shape[1:])
    if node in source.channelwise:
        packed = v in tangents.channelwise
        t = tangents[v]
        t, b, c = t.expand(n, *t.shape[1:]), t.shape[1], v.shape[1]
        left = t.reshape(n, b, c, -1).transpose(1, 2)
        right = table.reshape(n, table.shape[1], c, -1).transpose(1, 2)
        into[node] = (left @ right).transpose(1, 2).reshape(n, b, *node.shape)
        if packed:
            into.channelwise.add(node)
        return
    table = matrices(table)
    if v in tangents.channelwise:  # each channel meets its own part of the table alone
        c, width = v.shape[1], table.shape[2]
        left = tangents[v].expand(n, *tangents[v].shape[1:])
        b = left.shape[1]
        left = left.reshape(n, b, v.shape[0], c, -1)
        right = table.reshape(n, v.shape[0], c, -1, width)
        if keep:
            product = left.permute(0, 3, 1, 2, 4).flatten(3) @ right.transpose(1, 2).flatten(2, 3)
        else:
            product = left.permute(3, 1, 0, 2, 4).flatten(2) @ right.permute(2, 0, 1, 3, 4).flatten(1, 3)
        into[node] = product.reshape(-1, c * b, *node.shape)
        return
    t = matrices(tangents.dense(v))
    t = t.expand(n, *t.shape[1:])
    if keep:
        into[node] = (t @ table).reshape(n, t.shape[1], *node.shape)
    else:
        summed = t.transpose(0, 1).flatten(1) @ table.flatten(0, 1)
        into[node] = summed.reshape(1, t.shape[1], *node.shape)
