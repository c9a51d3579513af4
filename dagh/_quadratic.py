"""Diagonal entries from tangents alone: ``Σ_u (J_u t)ᵀ M_u (J_u t)`` over the curved nodes u, with no way back.

``M_u`` acts on each argument's tangents as in a sweep back; at a bridge it is the bridge's own rows.
"""

from __future__ import annotations

from torch import Tensor

from dagh import _sweep
from dagh._bridge import Crossing, cross, directions
from dagh._bundles import Scaled, Tangents
from dagh._ir import Node
from dagh._plan_sweeps import Column
from dagh._state import State


def entries(state: State, column: Column, crossing: Crossing | None, part: slice) -> tuple[Tensor, Tensor]:
    """``tᵀ H_F t`` of some directions of the column, ``[N, D]``, and what belongs to no sample alone, ``[1, D]``."""
    tangents = directions(state, column, part)
    count = (part.stop - part.start) * column.copies
    each, common = state.weights.new_zeros(state.samples, count), state.weights.new_zeros(1, count)

    def add(found: Tensor) -> None:
        (each if found.shape[0] == state.samples else common).add_(found)

    for u in column.curved:
        delta = state.adjoints.get(u)
        args = [i for i, p in enumerate(u.inputs) if p in tangents]
        if delta is None or not args:
            continue
        factor = state.rule(u).curvature_scaling(state.call(u), delta) if len(u.inputs) == 1 else None
        if factor is not None:
            add(_weighed_squares(tangents, u.inputs[0], factor))
            continue
        for i, row, packed in _sweep.curve(state, u, delta, tangents, args, True):
            add(_products(tangents, u.inputs[i], row.value() if isinstance(row, Scaled) else row, packed))
    if crossing is not None and crossing.node in crossing.rows and crossing.node in tangents:
        v = crossing.node
        rows = Tangents({v: crossing.rows[v]}, crossing.rows.channelwise & {v})
        beyond = cross(state, column, Crossing(v, rows, Tangents({}), {}), tangents, True)
        if v in beyond:
            add(_products(tangents, v, beyond[v], v in beyond.channelwise))
    return each, common


def _weighed_squares(tangents: Tangents, node: Node, weights: Tensor) -> Tensor:
    """``Σ_k weights_k t_k²`` of the tangents of one node: ``[N, D]``; ``weights`` ``[N, 1, *shape]``."""
    weights = weights.expand(*weights.shape[:2], *node.shape)
    if node in tangents.channelwise:
        return _by_channel(tangents[node].square() * weights)
    lazy, numbers = tangents.lazy(node), weights.new_ones(())
    t: Tensor | None = None
    if lazy is not None and lazy.base.shape[0] == 1 and isinstance(lazy.factor, Tensor):
        # Neither the factors of single elements nor the numbers of single directions are multiplied out.
        if lazy.factor.shape[1] == 1:
            t, weights = lazy.base, weights * lazy.factor.square()
        elif lazy.factor.shape[2:].numel() == 1:
            t, numbers = lazy.base, lazy.factor.flatten(1).square()
    t = tangents[node] if t is None else t
    if t.shape[0] == 1:
        return (weights.reshape(len(weights), -1) @ t.reshape(t.shape[1], -1).square().T) * numbers
    squares = t.reshape(*t.shape[:2], -1).square()
    return (squares @ weights.reshape(len(weights), -1, 1)).squeeze(2)


def _products(tangents: Tangents, node: Node, rows: Tensor, packed: bool) -> Tensor:
    """``⟨t, row⟩`` of every direction at one node: ``[N or 1, D]``."""
    t = tangents[node]
    if node not in tangents.channelwise:
        return (t * rows).reshape(max(t.shape[0], rows.shape[0]), t.shape[1], -1).sum(2)
    if packed:
        return _by_channel(t * rows)
    b, c = t.shape[1], t.shape[3]
    own = rows.reshape(rows.shape[0], c, b, *rows.shape[2:]).diagonal(dim1=1, dim2=4)  # [N, b, m, …, C]
    return _by_channel(t * own.movedim(-1, 3))


def _by_channel(t: Tensor) -> Tensor:
    """Sums over each channel of ``[N, b, m, C, …]``: ``[N, C·b]``, channels first."""
    return t.movedim(3, 1).flatten(3).sum(3).flatten(1)
