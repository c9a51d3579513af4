"""Ties that first order leaves open, settled at points nearby.

Where the candidates of a tie have equal gradients, either they are one function (then the branch changes nothing) or
higher orders decide. Both show at ``θ + ε d`` for random directions ``d`` in the cone of the pattern. Piecewise
analytic candidates that agree at random points agree, with probability one; that is proof by chance, not by argument,
and the result says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dagh._clarke._nearby import branches_at, steps, values_at
from dagh._clarke._search import Piece
from dagh._clarke._sites import Site, Sites
from dagh._ir import Node

Array = NDArray[np.float64]

#: Directions tried in a cone, first to see whether anything is open at all, then in all; and over all cones.
_FIRST, _ALL, _TOTAL = 8, 256, 4096


@dataclass(eq=False)
class Branching:
    """A pattern that occurs near the point, its share of directions, and one direction along which it does."""

    branch: dict[Node, Tensor]
    share: float
    direction: Array


@dataclass
class Completion:
    """Patterns, and how they were found: ties settled by sampling, and ties between equal functions."""

    branchings: list[Branching]
    sampled: set[tuple[str, int]]
    equal: set[tuple[str, int]]


def complete(sites: Sites, pieces: Sequence[Piece], seed: int = 0) -> Completion:
    """Split every piece with open ties into the patterns seen nearby."""
    rng = np.random.default_rng(seed)
    out = Completion([], set(), set())
    most = max(2 * _FIRST, min(_ALL, _TOTAL // max(1, sum(bool(piece.open_ties) for piece in pieces))))
    for piece in pieces:
        if not piece.open_ties:
            out.branchings.append(Branching(piece.branch, piece.share, piece.inside[0]))
            continue
        _split(sites, piece, rng, out, most)
    out.equal -= out.sampled
    return out


def _split(sites: Sites, piece: Piece, rng: np.random.Generator, out: Completion, most: int) -> None:
    seen: Counter[tuple[int, ...]] = Counter()
    example: dict[tuple[int, ...], Array] = {}
    names = [(site.node.name, k) for site, k, _ in piece.open_ties]
    decided: set[tuple[str, int]] = set()
    for number, d in enumerate(_inside(piece, rng, most)):
        if number == _FIRST and not decided:
            break
        found = _look(sites, piece, d)
        if found is None:
            continue
        decided |= {name for name, b in zip(names, found, strict=True) if b >= 0}
        seen[found] += 1
        example.setdefault(found, d)
    out.sampled |= decided if seen else set(names)
    out.equal |= set(names) - out.sampled
    if not seen:
        out.branchings.append(Branching(piece.branch, piece.share, piece.inside[0]))
    for found, count in seen.items():
        branch = {node: b.clone() for node, b in piece.branch.items()}
        for (site, k, members), b in zip(piece.open_ties, found, strict=True):
            branch[site.node][k] = members[0] if b < 0 else b
        out.branchings.append(Branching(branch, piece.share * count / seen.total(), example[found]))


def _inside(piece: Piece, rng: np.random.Generator, most: int) -> list[Array]:
    """Directions in the cone: random ones that fell into it, then random steps from one of them."""
    found = [d / np.abs(d).max() for d in piece.inside[:most]]
    while len(found) < most:
        base = found[int(rng.integers(len(found)))]
        r = rng.standard_normal(len(base))
        here, slope = piece.rows @ base, piece.rows @ r
        with np.errstate(divide="ignore", invalid="ignore"):
            limit = np.where(slope < 0, -here / slope, np.inf).min(initial=np.inf)
        d = base + min(limit, 10.0) * rng.uniform(0, 0.9) * r
        found.append(d / np.abs(d).max())
    return found


def _look(sites: Sites, piece: Piece, d: Array) -> tuple[int, ...] | None:
    """Branches of the open ties along ``d`` (-1: still equal), or ``None`` where another pattern rules."""
    answers = []
    for step in steps(sites.state.weights.dtype):
        values = values_at(sites.state, split(sites, step * d), sites.live[-1].node)
        read = branches_at(sites.state, sites.live, values)
        open_ = {(site.node, k) for site, k, _ in piece.open_ties}
        if not all(_agrees(site, read[site.node], piece.branch[site.node], open_) for site in sites.live):
            return None
        answer = tuple(int(read[site.node][k]) for site, k, _ in piece.open_ties)
        if any(b >= 0 and b not in members for b, (_, _, members) in zip(answer, piece.open_ties, strict=True)):
            return None
        answers.append(answer)
    return answers[0] if answers[0] == answers[1] else None


def _agrees(site: Site, read: Tensor, wanted: Tensor, open_: set[tuple[Node, int]]) -> bool:
    differ = ((read != wanted) & site.live).nonzero().squeeze(1).tolist()
    return all((site.node, k) in open_ for k in differ)


def split(sites: Sites, flat: Array) -> dict[Node, Tensor]:
    """``[P]`` cut into ``[1, *shape]`` per leaf."""
    out: dict[Node, Tensor] = {}
    offset = 0
    for leaf in sites.leaves:
        like = sites.state.values[leaf]
        piece = torch.as_tensor(flat[offset : offset + leaf.numel]).to(like)
        out[leaf] = piece.reshape(1, *leaf.shape)
        offset += leaf.numel
    return out


def join(sites: Sites, direction: Mapping[Node, Tensor]) -> Array:
    """The inverse of :func:`split`, zeros where a leaf has no entry."""
    parts = [
        direction[leaf].detach().double().cpu().reshape(-1).numpy() if leaf in direction else np.zeros(leaf.numel)
        for leaf in sites.leaves
    ]
    return np.concatenate(parts) if parts else np.zeros(0)
