"""The branches taken along one direction: always a pattern that occurs, at the cost of a few forward passes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dagh import _sweep
from dagh._clarke._completion import Branching, split
from dagh._clarke._nearby import branches_at, steps, values_at
from dagh._clarke._rows import candidate_tangents
from dagh._clarke._search import equality
from dagh._clarke._sites import Site, Sites, forced
from dagh._ir import Node
from dagh._state import State

Array = NDArray[np.float64]


@dataclass(eq=False)
class Along:
    """The branches along ``θ + t d``, ``t ↓ 0``; ``sampled`` ties were read off at small ``t``."""

    branch: dict[Node, Tensor]
    sampled: int


def along(sites: Sites, d: Array) -> Along:
    """Decide the ties in topological order by the derivatives of their candidates along ``d`` (``[P]``).

    Ties whose candidates have equal derivatives are read off at two small steps. Those that ``d`` leaves unmoved are
    decided by a second, random direction, infinitely smaller: the pattern then occurs nearby, beside ``θ + t d``.
    """
    seeds = {leaf: t.unsqueeze(1) for leaf, t in split(sites, d).items()}
    aside = np.random.default_rng(0).standard_normal(d.shape)
    second = {leaf: t.unsqueeze(1) for leaf, t in split(sites, aside).items()}
    branch: dict[Node, Tensor] = {}
    sampled = 0
    nearby: list[dict[Node, Tensor]] | None = None
    for i, site in enumerate(sites.live):
        state = forced(sites.state, sites.live[:i], branch)
        if site.ties.opaque:
            branch[site.node] = torch.where(site.live, _ordered(state, site, seeds), 0)
            continue
        rates = candidate_tangents(state, site, seeds).masked_fill(~site.merged, float("-inf"))
        best = rates.max(1, keepdim=True)
        size = rates.masked_fill(rates.isinf(), 0.0).abs().max()
        level = rates >= best.values - equality(rates.dtype) * size
        equal = level.sum(1) > 1
        chosen = best.indices.squeeze(1)
        if bool((equal & site.live).any()):
            if nearby is None:
                scale = max(float(np.abs(d).max()), 1e-300)
                nearby = [
                    branches_at(
                        sites.state,
                        sites.live,
                        values_at(sites.state, split(sites, s * d / scale), sites.live[-1].node),
                    )
                    for s in steps(state.weights.dtype)
                ]
            near, nearer = (n[site.node] for n in nearby)
            read = equal & (near == nearer) & (near >= 0) & site.merged.gather(1, near.clamp(min=0)[:, None])[:, 0]
            sampled += int((read & site.live).sum())
            chosen = torch.where(read, near, chosen)
            unmoved = equal & ~read & site.live
            if bool(unmoved.any()):
                apart = candidate_tangents(state, site, second).masked_fill(~level, float("-inf"))
                chosen = torch.where(unmoved, apart.argmax(1), chosen)
        branch[site.node] = torch.where(site.live, chosen, site.merged.to(torch.uint8).argmax(1))
    return Along(branch, sampled)


def _ordered(state: State, site: Site, seeds: dict[Node, Tensor]) -> Tensor:
    """Branches of a sorting node: the values, and among equal ones their derivatives, in order."""
    parent = site.node.inputs[0]
    within = state.program.descendants(list(seeds)) & state.program.ancestors([parent])
    found = _sweep.push_forward(state, dict(seeds), within, [parent])
    x = state.values[parent]
    rate = found[parent].squeeze(1) if parent in found else torch.zeros_like(x)
    gaps = x.flatten().sort().values.diff()
    gaps = gaps[gaps > 0]
    step = (float(gaps.min()) if len(gaps) else 1.0) / (4 * max(float(rate.abs().max()), 1e-300))
    moved = {p: state.values[p] for p in site.node.inputs} | {parent: x + step * rate}
    return branches_at(state, [site], moved)[site.node].clamp(min=0)


def sample_patterns(sites: Sites, count: int, seed: int) -> tuple[list[Branching], int]:
    """Patterns along ``count`` random directions with their frequencies; and how many ties were read off nearby."""
    rng = np.random.default_rng(seed)
    width = sum(leaf.numel for leaf in sites.leaves)
    found: dict[object, Branching] = {}
    sampled = 0
    half = rng.standard_normal((max(1, (count + 1) // 2), width))
    for d in np.concatenate([half, -half])[:count]:
        result = along(sites, d)
        sampled = max(sampled, result.sampled)
        key = tuple(tuple(b.tolist()) for b in result.branch.values())
        if key not in found:
            found[key] = Branching(result.branch, 0.0, d)
        found[key].share += 1 / count
    return list(found.values()), sampled
