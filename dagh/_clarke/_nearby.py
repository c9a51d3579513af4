"""The network at points nearby, to see which branches it takes there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dagh._clarke._sites import Site, candidates
from dagh._ir import Node
from dagh._rules import Call
from dagh._state import State


def steps(dtype: torch.dtype) -> tuple[float, float]:
    """Two distances at which a network is looked at; a branch counts when both agree."""
    return (1e-4, 1e-6) if dtype == torch.float64 else (1e-2, 2e-3)


def values_at(state: State, shift: Mapping[Node, Tensor], until: Node | None = None) -> dict[Node, Tensor]:
    """Values with ``shift[v]`` (``[1, *shape]``) added to leaves and probed nodes, up to the node ``until``."""
    program = state.program
    moved = program.descendants(list(shift))
    values: dict[Node, Tensor] = {}
    with torch.no_grad():
        for node in program:
            if node not in moved or node.op is None:
                values[node] = state.values[node]
            else:
                values[node] = state.rule(node).value(node, [values[p] for p in node.inputs])
            if node in shift:
                values[node] = values[node] + shift[node]
            if node is until:
                break
    return values


def branches_at(state: State, sites: Sequence[Site], values: Mapping[Node, Tensor]) -> dict[Node, Tensor]:
    """The branch of every tie at other values: a candidate, or -1 where several are equal up to rounding."""
    out = {}
    for site in sites:
        if site.ties.opaque:
            out[site.node] = _picked(state, site, values)
            continue
        q = candidates(state, site, values)
        best = q.max(1, keepdim=True)
        size = max(float(values[p].abs().max()) for p in site.node.inputs if p.dtype.is_floating_point)
        near = q >= best.values - 64 * torch.finfo(q.dtype).eps * max(size, float(site.ties.level.abs().max()))
        out[site.node] = best.indices.squeeze(1).masked_fill(near.sum(1) > 1, -1)
    return out


def _picked(state: State, site: Site, values: Mapping[Node, Tensor]) -> Tensor:
    ties, node = site.ties, site.node
    xs = [values[p] for p in node.inputs]
    rule = state.rule(node)
    places = rule.picks(Call(node, xs, rule.value(node, xs)))
    assert places is not None
    place = places[ties.sample if places.shape[0] > 1 else torch.zeros_like(ties.sample), ties.element]
    hit = (ties.place == place.unsqueeze(1)) & ties.valid
    return hit.to(torch.uint8).argmax(1).masked_fill(~hit.any(1), -1)
