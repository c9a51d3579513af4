"""The blocks of H_O from the rows of every leaf, with few and large matrix products."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from dagh import _outer
from dagh._accumulate import Accumulator
from dagh._chunks import panels, ranges
from dagh._ir import Node
from dagh._outer import Gathered, Rows
from dagh._outer_plan import MIXED
from dagh._plan import Plan
from dagh._request import Pair


def add_outer(
    rows: Gathered, pairs: list[Pair], signs: Tensor | None, plan: Plan, result: Accumulator, window: slice
) -> None:
    """Add ``Σ_r σ_r B_aᵀ B_b`` for every pair with rows; where these are kept, nothing is multiplied."""
    _keep_rows(rows, signs, plan, result, window)
    pairs = [(i, j) for i, j in pairs if i in rows and j in rows and not plan.low_rank(i, j)]
    layers = [p for p in pairs if rows[p[0]].kronecker and rows[p[1]].kronecker]
    meeting: dict[tuple[Node, Node], list[Pair]] = {}  # weight and bias of a layer have the same cotangents
    for i, j in layers:
        first, second = plan.oriented(i, j)
        meeting.setdefault((plan.gates[first].node, plan.gates[second].node), []).append((first, second))
    for group in meeting.values():
        core: Tensor | None = None
        for first, second in sorted(group, key=lambda p: not result.structured(*p)):
            x, y = rows[first].inputs, rows[second].inputs
            assert x is not None and y is not None
            if core is None and result.structured(first, second):
                # Nothing is there yet: the loss factor comes first, once for every sample.
                core = _outer.core(rows[first], rows[second], signs, result.core((first, second), x, y, window))
                continue
            if core is None:
                core = _outer.core(rows[first], rows[second], signs)
            result.add_layers((first, second), x, y, core, None, None, slice(0, core.shape[1]), window)
    rest = [(i, j) for i, j in pairs if not (rows[i].kronecker and rows[j].kronecker)]
    if result.keep:
        for i, j in rest:
            result.add(i, j, _outer.combine_each(rows[i], rows[j], signs), slice(None), window)
        return
    dense = [p for p in rest if not rows[p[0]].kronecker and not rows[p[1]].kronecker]
    members = sorted({i for p in dense for i in p})
    if len(dense) > 1 and 2 * len(dense) == len(members) * (len(members) + 1):
        _add_all(rows, members, signs, result)
    else:
        for i, j in dense:
            if i == j:
                _add_all(rows, [i], signs, result)
            else:
                result.add(i, j, _outer.combine_dense(rows[i], rows[j], signs), slice(None), window)
    # Weight and bias of a layer have the same cotangents: what these give with other rows serves both.
    partners: dict[tuple[Node, int], list[int]] = {}
    for i, j in rest:
        if rows[i].kronecker or rows[j].kronecker:
            layer, other = (i, j) if rows[i].kronecker else (j, i)
            partners.setdefault((plan.gates[layer].node, other), []).append(layer)
    for (_, other), layers_of in partners.items():
        _add_mixed(rows, layers_of, other, signs, result)


def _keep_rows(rows: Gathered, signs: Tensor | None, plan: Plan, result: Accumulator, window: slice) -> None:
    """Write out those of linear layers; the dense ones were gathered where they are kept."""
    kept = [i for i in sorted(plan.kept_rows) if i in rows]
    for i in kept:
        cotangent = rows[i].cotangent
        if cotangent is not None:
            _outer.write_rows(rows[i], result.rows.room(i, cotangent.shape[1], result.request.sizes[i], window))
    if kept:
        first = next(t for t in (rows[kept[0]].dense, rows[kept[0]].cotangent) if t is not None)
        result.rows.put_signs(signs, first.shape[1], window)


def _add_all(rows: Gathered, members: list[int], signs: Tensor | None, result: Accumulator) -> None:
    """All pairs of dense leaves: one symmetric product, the upper half of it panel by panel."""
    if rows.dense is not None and members == rows.members:
        joined = rows.dense.flatten(0, 1)
    else:
        joined = torch.cat([_dense(rows[i]).flatten(0, 1) for i in members], 1)
    left = joined if signs is None else joined * signs.reshape(-1, 1)
    ends = [0, *accumulate(_dense(rows[i]).shape[2] for i in members)]
    for panel in panels(ends[-1]):
        product = left[:, panel].T @ joined[:, panel.start :]
        for a, (first, last) in enumerate(pairwise(ends)):
            if first < panel.stop and last > panel.start:
                _share_out(product, members, ends, a, panel, result)


def _share_out(product: Tensor, members: list[int], ends: list[int], a: int, panel: slice, result: Accumulator) -> None:
    """The rows of leaf ``a`` among those of a panel, to its blocks; columns begin where the panel does."""
    low, high = max(ends[a], panel.start), min(ends[a + 1], panel.stop)
    strip, own = product[low - panel.start : high - panel.start], slice(low - ends[a], high - ends[a])
    for b in range(a, len(members)):
        begin = max(ends[b], panel.start)
        piece = strip[:, begin - panel.start : ends[b + 1] - panel.start]
        result.block(members[a], members[b])[own, begin - ends[b] :] += piece
    if ends[a + 1] > panel.stop:  # the half of the leaf's own block below the panel
        below = strip[:, panel.stop - panel.start : ends[a + 1] - panel.start]
        result.block(members[a], members[a])[panel.stop - ends[a] :, own] += below.T


def _add_mixed(rows: dict[int, Rows], layers: list[int], other: int, signs: Tensor | None, result: Accumulator) -> None:
    """Leaves of one linear layer against dense rows: the sum over r first, then that over the samples."""
    s, dense = rows[layers[0]].cotangent, _dense(rows[other])
    inputs = [x for i in layers if (x := rows[i].inputs) is not None]
    assert s is not None
    s = (s if signs is None else s * signs.unsqueeze(2)).transpose(1, 2)  # [N, o, r]
    widths = [t.shape[1] for t in inputs]
    n, o = s.shape[:2]
    # One product for all outputs, unless it would take more memory than what it is made of.
    joined = torch.cat(inputs, 1).T if sum(widths) <= n else None
    for part in ranges(dense.shape[2], max(1, MIXED // max(1, n * o))):
        mixed = s @ dense[:, :, part]  # [N, o, part]
        if joined is not None:
            product = (joined @ mixed.flatten(1)).view(len(joined), *mixed.shape[1:])  # [i, o, part]
            pieces = torch.split(product, widths)
        for k, (layer, x) in enumerate(zip(layers, inputs, strict=True)):
            block = result.block(min(layer, other), max(layer, other))
            if layer < other:
                target = block.view(o, widths[k], block.shape[1])[:, :, part]
            else:
                target = block.view(block.shape[0], o, widths[k])[part].permute(1, 2, 0)
            if joined is not None:
                target += pieces[k].transpose(0, 1)
                continue
            for each, m in zip(target, mixed.unbind(1), strict=True):
                each.addmm_(x.T, m)


def _dense(rows: Rows) -> Tensor:
    assert rows.dense is not None
    return rows.dense
