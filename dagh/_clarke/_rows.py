"""Gradients of single elements with respect to all leaves, and tangents of all elements along one direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dagh import _sweep
from dagh._bundles import matrices
from dagh._clarke._sites import Site, candidates, rows_of
from dagh._ir import Node
from dagh._state import State

Array = NDArray[np.float64]

#: Most rows pulled back at once, over all samples.
_BUNDLE = 512


def element_rows(
    state: State, node: Node, sample: Tensor, place: Tensor, leaves: Sequence[Node], weight: Tensor | None = None
) -> Tensor:
    """``∇ x_k`` for elements ``(sample[k], place[k])`` of a node: ``[K, P]``, leaves side by side.

    ``place`` may be ``[K, 2]`` with ``weight`` ``[K, 2]``: gradients of weighted sums of two elements.
    """
    value = state.values[node]
    place, weight = place.reshape(len(sample), -1), torch.ones(1, 1, device="cpu") if weight is None else weight
    weight = weight.to(value).expand(place.shape)
    width = sum(leaf.numel for leaf in leaves)
    out = value.new_zeros(len(sample), width)
    sample = rows_of(value, sample)
    rank = _rank_within(sample)
    step = max(1, _BUNDLE // value.shape[0])
    for start in range(0, int(rank.max()) + 1 if len(rank) else 0, step):
        chosen = ((rank >= start) & (rank < start + step)).nonzero().squeeze(1)
        slot = rank[chosen] - start
        seed = value.new_zeros(value.shape[0], int(slot.max()) + 1, node.numel)
        for column in range(place.shape[1]):
            at = (sample[chosen], slot, place[chosen, column])
            seed.index_put_(at, weight[chosen, column], accumulate=True)
        seed = seed.reshape(*seed.shape[:2], *node.shape)
        found = _sweep.pull_back(state, {node: seed}, list(leaves), keep=True)
        offset = 0
        for leaf in leaves:
            if leaf in found:
                rows = matrices(found[leaf])
                out[chosen, offset : offset + leaf.numel] = rows[rows_of(rows, sample[chosen]), slot]
            offset += leaf.numel
    return out


def _rank_within(group: Tensor) -> Tensor:
    """0, 1, 2, … within each group."""
    order = group.argsort(stable=True)
    ordered = group[order]
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[1:] = ordered[1:] != ordered[:-1]
    index = torch.arange(len(group), device=group.device)
    begin = torch.where(fresh, index, torch.zeros_like(index)).cummax(0).values if len(group) else index
    rank = torch.empty_like(index)
    rank[order] = index - begin
    return rank


def candidate_rows(state: State, site: Site, which: Tensor, leaves: Sequence[Node]) -> Array:
    """Gradients ``[k, C, P]`` of the candidates of the ties ``which``, ``sign`` included; NaN where there is none."""
    ties = site.ties
    width = sum(leaf.numel for leaf in leaves)
    out = torch.full((len(which), len(ties.arg), width), float("nan"), dtype=torch.float64, device="cpu")
    for c, arg in enumerate(ties.arg):
        there = ties.valid[which, c]
        if arg < 0:
            out[there.cpu(), c] = 0.0
            continue
        chosen = which[there]
        if len(chosen):
            rows = element_rows(state, site.node.inputs[arg], ties.sample[chosen], ties.place[chosen, c], leaves)
            out[there.cpu(), c] = ties.sign * rows.double().cpu()
    return out.numpy()


def candidate_tangents(state: State, site: Site, seeds: Mapping[Node, Tensor]) -> Tensor:
    """Tangents ``[K, C]`` of the candidates along a direction ``{leaf: [1, 1, *shape]}``; -inf where there is none."""
    within = state.program.descendants(list(seeds)) & state.program.ancestors([site.node])
    held = list(site.node.inputs)
    found = _sweep.push_forward(state, dict(seeds), within, held)
    values = {
        p: found[p].squeeze(1) if p in found else torch.zeros_like(state.values[p][:1])
        for p in site.node.inputs
        if p.dtype.is_floating_point
    }
    ties = replace(site.ties, level=torch.zeros_like(site.ties.level))
    return candidates(state, replace(site, ties=ties), values)
