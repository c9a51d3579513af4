"""Enumeration of the branch patterns that occur arbitrarily close to a point.

Ties are decided in topological order. Under the branches chosen so far every pre-activation has a gradient, and a
branch can be taken to first order when some direction satisfies its inequalities and all earlier ones strictly: a
linear program, unless one of a fixed set of random directions shows it already. Where the candidates of a tie have
equal gradients, first order says nothing; such ties are settled by looking at points nearby (:mod:`._completion`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dagh._clarke._cone import interior, solid_angle, unit_rows
from dagh._clarke._rows import candidate_rows
from dagh._clarke._sites import Site, Sites, forced
from dagh._ir import Node
from dagh.errors import KinkError

Array = NDArray[np.float64]


def equality(dtype: torch.dtype) -> float:
    """Derivatives closer than this, relative to the largest of a node, count as equal."""
    return 1e-9 if dtype == torch.float64 else 1e-5


#: Numbers that the random directions may fill.
_DIRECTIONS = 2**24
#: Ties of the first node that are looked at before the search begins.
_LOOKED_AT = 64


@dataclass(eq=False)
class Piece:
    """One pattern that meets the point: branches, the cone where it rules to first order, and its share of directions.

    ``open_ties`` are those that first order leaves undecided, as ``(site, tie, candidates)``.
    """

    branch: dict[Node, Tensor]
    rows: Array
    inside: Array
    """``[k, P]`` directions in the cone, one at least"""
    share: float
    open_ties: list[tuple[Site, int, list[int]]] = field(default_factory=list)


@dataclass(eq=False)
class Search:
    """Depth-first search over the live ties of a network.

    Raises :class:`~dagh.errors.KinkError` beyond ``cap`` patterns or ``16 · cap`` linear programs.
    """

    sites: Sites
    cap: int
    directions: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        self.live = self.sites.live
        self.equal = equality(self.sites.state.weights.dtype)
        self.width = sum(leaf.numel for leaf in self.sites.leaves)
        rng = np.random.default_rng(self.seed)
        half = max(1, min(self.directions, _DIRECTIONS // max(self.width, 1)) // 2)
        d = rng.standard_normal((half, self.width))
        self.directions_: Array = np.concatenate([d, -d])
        self.pieces: list[Piece] = []
        self.programs = 0
        self.rejected = False
        self._rows: dict[object, Array] = {}
        self._ancestors = [
            [j for j, other in enumerate(self.live[:i]) if other.node in sites_ancestors(self.sites, site.node)]
            for i, site in enumerate(self.live)
        ]

    def run(self) -> list[Piece]:
        """Every pattern that first order admits."""
        self._refuse_early()
        everything = np.arange(len(self.directions_))
        self._site(0, {}, np.zeros((0, self.width)), everything, self.directions_[:1], [])
        if not all(piece.share > 0 for piece in self.pieces):
            # A cone too thin for the random directions to hit still has a share.
            for piece in self.pieces:
                piece.share = max(piece.share, 0.5 / len(self.directions_))
        exact = [solid_angle(piece.rows) for piece in self.pieces]
        if all(e is not None for e in exact):
            for piece, share in zip(self.pieces, exact, strict=True):
                assert share is not None
                piece.share = share
        total = sum(piece.share for piece in self.pieces)
        for piece in self.pieces:
            piece.share /= total
        return self.pieces

    def _refuse_early(self) -> None:
        """Refuse before any linear program where the random directions alone show too many patterns."""
        site = self.live[0]
        which = site.live.nonzero().squeeze(1)[:_LOOKED_AT]
        if len(self.directions_) <= self.cap or len(which) < 2:
            return
        rows = candidate_rows(self.sites.state, site, which, self.sites.leaves)
        merged = site.merged[which].cpu().numpy()
        rates = np.where(merged[:, :, None], np.where(merged[:, :, None], rows, 0.0) @ self.directions_.T, -np.inf)
        best = rates.max(1, keepdims=True)
        # Equal gradients differ by rounding: the first candidate up to that counts.
        first = (rates >= best - 100 * self.equal * np.abs(best).max()).argmax(1).astype(np.int16)
        seen = len(np.unique(first, axis=1).T)
        if seen > self.cap:
            raise too_many(self.sites, f"more than {self.cap} patterns")

    # -- one site ----------------------------------------------------------------------------------

    def _site(
        self,
        i: int,
        branch: dict[Node, Tensor],
        rows: Array,
        hits: NDArray[np.int64],
        witness: Array,
        open_: list[object],
    ) -> None:
        if i == len(self.live):
            self._leaf(branch, rows, hits, witness, open_)
            return
        site = self.live[i]
        which = site.live.nonzero().squeeze(1)
        key = (i, *(tuple(branch[self.live[j].node].tolist()) for j in self._ancestors[i]))
        if key not in self._rows:
            state = forced(self.sites.state, self.live[:i], branch)
            self._rows[key] = candidate_rows(state, site, which, self.sites.leaves)
        gradients = self._rows[key]
        start = site.merged.to(torch.uint8).argmax(1)
        self._tie(i, 0, which.tolist(), gradients, start, branch, rows, hits, witness, open_)

    def _tie(
        self,
        i: int,
        k: int,
        which: list[int],
        gradients: Array,
        chosen: Tensor,
        branch: dict[Node, Tensor],
        rows: Array,
        hits: NDArray[np.int64],
        witness: Array,
        open_: list[object],
    ) -> None:
        site = self.live[i]
        if k == len(which):
            self._site(i + 1, {**branch, site.node: chosen}, rows, hits, witness, open_)
            return
        allowed = site.merged[which[k]].nonzero().squeeze(1).tolist()
        groups = _groups(gradients[k], allowed, self.equal * float(np.nanmax(np.abs(gradients), initial=0.0)))
        for g, members in enumerate(groups):
            own = gradients[k, members[0]]
            apart = [own - gradients[k, other[0]] for h, other in enumerate(groups) if h != g]
            new = unit_rows(np.array(apart)) if apart else np.zeros((0, self.width))
            found = self._enter(rows, new, hits, witness)
            if found is None:
                self.rejected = True
                continue
            picked = chosen.clone()
            picked[which[k]] = members[0]
            still = open_ if len(members) == 1 else [*open_, (site, which[k], members)]
            self._tie(
                i, k + 1, which, gradients, picked, branch, np.concatenate([rows, new]), found[0], found[1], still
            )

    def _enter(
        self, rows: Array, new: Array, hits: NDArray[np.int64], witness: Array
    ) -> tuple[NDArray[np.int64], Array] | None:
        """Directions left in the cone after adding ``new`` inequalities, with a witness; ``None`` when it is empty."""
        if len(new) == 0:
            return hits, witness
        kept = hits[((self.directions_[hits] @ new.T) > 0).all(1)]
        if len(kept):
            return kept, self.directions_[kept[:1]]
        if bool(((witness @ new.T) > 1e-9).all()) and len(rows):
            return kept, witness
        if len(rows) and bool((new @ rows.T <= -1 + 1e-12).any()):
            return None
        self.programs += 1
        if self.programs > 16 * self.cap:
            raise too_many(self.sites, f"{len(self.pieces)} patterns found after {self.programs - 1} linear programs")
        d = interior(np.concatenate([rows, new]))
        return None if d is None else (kept, d[None])

    def _leaf(
        self, branch: dict[Node, Tensor], rows: Array, hits: NDArray[np.int64], witness: Array, open_: list[object]
    ) -> None:
        if len(self.pieces) == self.cap:
            raise too_many(self.sites, f"more than {self.cap} patterns")
        inside = self.directions_[hits[:256]] if len(hits) else witness
        ties: list[tuple[Site, int, list[int]]] = list(open_)  # type: ignore[arg-type]
        self.pieces.append(Piece(branch, rows, inside, len(hits) / len(self.directions_), ties))


def sites_ancestors(sites: Sites, node: Node) -> set[Node]:
    """Nodes that ``node`` is computed from."""
    found: set[Node] = sites.state.program.ancestors([node])
    return found


def _groups(rows: Array, allowed: Sequence[int], tolerance: float) -> list[list[int]]:
    """Candidates with equal gradients together."""
    groups: list[list[int]] = []
    for c in allowed:
        for group in groups:
            if np.abs(rows[c] - rows[group[0]]).max() <= tolerance:
                group.append(c)
                break
        else:
            groups.append([c])
    return groups


def too_many(sites: Sites, what: str) -> KinkError:
    """The refusal of an enumeration, with the ways out."""
    return KinkError(
        f"{sites.live_ties} ties that matter: {what}; ask for a sample, kinks=dagh.AtKinks(policy, samples=64), for "
        "one branch, kinks='direction', for bounds, kinks='box', or raise max_patterns"
    )
