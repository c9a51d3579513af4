"""A box that contains every limiting Hessian, realizable or not: entry by entry, proven by how entries depend on ties.

A pattern is a choice of one candidate at each tie that matters. Flipping ties changes the Hessian in one of three ways.

``affine``
    Every tie is C^{1,1}: Jacobians and adjoints do not depend on the pattern, each second derivative depends on the
    branch of its own element. ``H(s) = H₀ + Σ_k D_k(s_k)``.
``pairs``
    No tie lies behind another. Every path meets one tie at most, so Jacobians and adjoints are affine in the branches,
    and no term has a tie on both sides: ``H(s) = H₀ + Σ_k D_k(s_k) + Σ_{k<l} D_{kl}(s_k, s_l)``, pairs within a sample.
``patterns``
    Otherwise: samples add up, and within each all patterns are tried.

Entrywise extremes of each term add up to bounds of each entry, exact up to rounding for ``patterns``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import lsq_linear

from dagh import _memory
from dagh._blockmatrix import BlockMatrix
from dagh._blocks import Block, DenseBlock
from dagh._clarke._sites import Site, Sites, forced
from dagh._state import State
from dagh.errors import KinkError, MemoryBudgetError

Array = NDArray[np.float64]
#: One tie: site, number, and its candidates, the first of which is the base.
Tie = tuple[Site, int, list[int]]


@dataclass(frozen=True, eq=False)
class Box:
    """Bounds of every entry of a vector made of a state, over all patterns; ``steps`` ``[k, n]`` where it is affine."""

    lower: Array
    upper: Array
    form: str
    evaluations: int
    base: Array
    steps: Array | None = None


def enclose(sites: Sites, measure: Callable[[State], Array], cap: int, memory: int) -> Box:
    """Bounds of ``measure(state)``, a vector linear in the Hessian, over all patterns of the ties that matter.

    Raises :class:`~dagh.errors.KinkError` where more than ``cap`` evaluations are needed, and
    :class:`~dagh.errors.MemoryBudgetError` where what must be held takes more than ``memory`` bytes.
    """
    ties = _ties(sites)
    groups = _groups(sites, ties)
    form, count = _form(sites, ties, groups)
    if count > cap:
        raise KinkError(
            f"{len(ties)} ties that matter: a box around all their patterns takes {count:.3g} Hessians, more than "
            f"{cap}; ask for a sample, kinks=dagh.AtKinks('mean', samples=64), for one branch, kinks='direction', "
            "for fewer samples, or raise max_patterns"
        )
    base = {site.node: site.merged.to(site.merged.dtype).int().argmax(1) for site in sites.live}

    def at(*flips: tuple[Tie, int]) -> Array:
        branch = dict(base)
        for (site, k, _), c in flips:
            branch[site.node] = branch[site.node].clone()
            branch[site.node][k] = c
        return measure(forced(sites.state, sites.live, branch))

    first = at()
    held = first.nbytes * (4 + (count if form != "patterns" else 0))
    if held > memory:
        raise MemoryBudgetError(
            f"a box around {len(ties)} ties holds {held / 2**30:.1f} GiB, {memory / 2**30:.1f} GiB are allowed; name "
            "blocks or parameters, or take kinks='direction'"
        )
    if form == "patterns":
        lower, upper = _by_patterns(groups, first, at)
        return Box(lower, upper, form, count, first)
    single = {(i, c): at((tie, c)) - first for i, tie in enumerate(ties) for c in tie[2][1:]}
    lower, upper = first.copy(), first.copy()
    for i, tie in enumerate(ties):
        _widen(lower, upper, [single[i, c] for c in tie[2][1:]])
    if form == "affine":
        two = bool(ties) and all(len(tie[2]) == 2 for tie in ties)
        steps = np.stack([single[i, tie[2][1]] for i, tie in enumerate(ties)]) if two else None
        return Box(lower, upper, form, count, first, steps)
    numbers = {id(tie): i for i, tie in enumerate(ties)}
    for group in groups:
        for a, b in itertools.combinations(group, 2):
            both = itertools.product(a[2][1:], b[2][1:])
            i, j = numbers[id(a)], numbers[id(b)]
            _widen(lower, upper, [at((a, c), (b, d)) - first - single[i, c] - single[j, d] for c, d in both])
    return Box(lower, upper, form, count, first)


def _ties(sites: Sites) -> list[Tie]:
    out = []
    for site in sites.live:
        for k in site.live.nonzero().squeeze(1).tolist():
            out.append((site, k, site.merged[k].nonzero().squeeze(1).tolist()))
    return out


def _groups(sites: Sites, ties: Sequence[Tie]) -> list[list[Tie]]:
    """Ties whose effects do not add up, together: those of one sample; all of them where samples are not separate."""
    state = sites.state
    if state.coupled or any(state.values[site.node].shape[0] == 1 for site in sites.live):
        return [list(ties)]
    found: dict[int, list[Tie]] = {}
    for tie in ties:
        found.setdefault(int(tie[0].ties.sample[tie[1]]), []).append(tie)
    return list(found.values())


def _form(sites: Sites, ties: Sequence[Tie], groups: Sequence[Sequence[Tie]]) -> tuple[str, int]:
    """The cheapest form that is proven, and how many Hessians it takes."""
    flips = sum(len(tie[2]) - 1 for tie in ties)
    options = {"patterns": 1 + sum(prod(len(tie[2]) for tie in group) - 1 for group in groups)}
    steps = any(site.ties.levels is not None for site in sites.live)
    if all(bool(site.smooth[site.live].all()) for site in sites.live) and not steps:
        options["affine"] = 1 + flips
    elif not steps and not _behind_one_another(sites):
        pairs = sum((len(a[2]) - 1) * (len(b[2]) - 1) for g in groups for a, b in itertools.combinations(g, 2))
        options["pairs"] = 1 + flips + pairs
    form = min(options, key=lambda name: (options[name], name))
    return form, options[form]


def _behind_one_another(sites: Sites) -> bool:
    nodes = {site.node for site in sites.live}
    return any(nodes & (sites.state.program.ancestors([node]) - {node}) for node in nodes)


def _widen(lower: Array, upper: Array, changes: Sequence[Array]) -> None:
    """Add the extremes of one term, whose value on the base is 0."""
    low, high = np.zeros_like(lower), np.zeros_like(upper)
    for change in changes:
        np.minimum(low, change, out=low)
        np.maximum(high, change, out=high)
    lower += low
    upper += high


def _by_patterns(groups: Sequence[Sequence[Tie]], first: Array, at: Callable[..., Array]) -> tuple[Array, Array]:
    lower, upper = first.copy(), first.copy()
    for group in groups:
        low, high = np.zeros_like(first), np.zeros_like(first)
        for chosen in _choices(group):
            change = at(*chosen) - first
            np.minimum(low, change, out=low)
            np.maximum(high, change, out=high)
        lower += low
        upper += high
    return lower, upper


def _choices(group: Sequence[Tie]) -> Iterator[list[tuple[Tie, int]]]:
    """Every pattern of a group but the base."""
    for chosen in itertools.islice(itertools.product(*(tie[2] for tie in group)), 1, None):
        yield list(zip(group, chosen, strict=True))


def least_norm(box: Box) -> float:
    """A lower bound of the norm of every vector in the convex hull; over the zonotope where the form is affine."""
    nearest = np.clip(0.0, box.lower, box.upper)
    least = float(np.linalg.norm(nearest))
    if box.steps is not None:
        found = lsq_linear(box.steps.T, -box.base, bounds=(0, 1), tol=1e-14)
        v = box.base + box.steps.T @ found.x
        size = float(np.linalg.norm(v))
        # A bound whatever the solver did: every point of the zonotope is at least this far along v.
        along = float(box.base @ v + np.minimum(box.steps @ v, 0).sum())
        least = max(least, along / size if size > 0 else 0.0)
    return least


def largest_norm(box: Box) -> float:
    """An upper bound of the norm of every vector in the convex hull."""
    return float(np.linalg.norm(np.maximum(np.abs(box.lower), np.abs(box.upper))))


Matrices = Mapping[str, BlockMatrix]


def box_of(sites: Sites, compute: Callable[[State], Matrices], cap: int) -> dict[str, tuple[BlockMatrix, Box]]:
    """By part: the middle of the box, with its half width and bounds under ``info["kinks"]``, and the box itself."""
    like: Matrices = compute(sites.state)
    budget = _memory.budget_bytes(next(iter(like.values())).memory_budget, sites.state.weights.device)
    box = enclose(sites, lambda state: np.concatenate([_entries(m) for m in compute(state).values()]), cap, budget)
    out, start = {}, 0
    for part, matrix in like.items():
        stop = start + len(_entries(matrix))
        own = Box(
            box.lower[start:stop], box.upper[start:stop], box.form, box.evaluations, box.base[start:stop],
            None if box.steps is None else box.steps[:, start:stop],
        )  # fmt: skip
        middle, radius = _matrix(matrix, (own.lower + own.upper) / 2), _matrix(matrix, (own.upper - own.lower) / 2)
        weight = _twice_off_diagonal(matrix)
        scaled = Box(
            own.lower * weight, own.upper * weight, own.form, own.evaluations, own.base * weight,
            None if own.steps is None else own.steps * weight,
        )  # fmt: skip
        middle.info["kinks"] = {
            "policy": "box",
            "certainty": "bound",
            "ties": sites.live_ties,
            "form": box.form,
            "evaluations": box.evaluations,
            "radius": radius,
            "least_norm": least_norm(scaled),
            "largest_norm": largest_norm(scaled),
            "spread": float(np.linalg.norm(scaled.upper - scaled.lower)),
            "eigenvalues": _spectrum(middle, radius),
        }
        out[part] = middle, scaled
        start = stop
    return out


def _entries(matrix: BlockMatrix) -> Array:
    parts = [matrix.blocks[pair].dense().double().flatten().cpu().numpy() for pair in matrix.blocks]
    return np.concatenate(parts) if parts else np.zeros(0)


def _twice_off_diagonal(matrix: BlockMatrix) -> Array:
    """Weights under which the Euclidean norm of the entries is the Frobenius norm."""
    parts = [np.full(prod(matrix.blocks[i, j].shape), 1.0 if i == j else 2**0.5) for i, j in matrix.blocks]
    return np.concatenate(parts) if parts else np.zeros(0)


def _matrix(like: BlockMatrix, entries: Array) -> BlockMatrix:
    blocks: dict[tuple[int, int], Block] = {}
    start = 0
    for pair in like.blocks:
        shape = like.blocks[pair].shape
        piece = torch.as_tensor(entries[start : start + prod(shape)]).reshape(shape)
        blocks[pair] = DenseBlock(piece.to(dtype=like.dtype, device=like.device))
        start += prod(shape)
    return like.derive(blocks, info=dict(like.info))


def _spectrum(middle: BlockMatrix, radius: BlockMatrix) -> tuple[float, float] | None:
    """An interval with all eigenvalues (Weyl, and ``‖E‖₂ ≤ ‖R‖₂`` where ``|E| ≤ R``); ``None`` for missing blocks."""
    if not middle.is_complete or not middle.size:
        return None
    values, width = middle.eigvalsh(), float(radius.eigvalsh()[-1])
    return float(values[0]) - width, float(values[-1]) + width
