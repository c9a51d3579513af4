"""The set of limiting Hessians at a point, and what is made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

from dagh import _memory
from dagh._blockmatrix import BlockMatrix
from dagh._blocks import Block, DenseBlock, add_blocks
from dagh._clarke._along import along, sample_patterns
from dagh._clarke._box import box_of
from dagh._clarke._completion import Branching, complete
from dagh._clarke._hull import min_norm_weights, optimality_gap
from dagh._clarke._policy import AtKinks, direction_of
from dagh._clarke._search import Search
from dagh._clarke._sites import Sites, find_sites, forced, loss_jump
from dagh._ir import Node
from dagh._notebook import Shown
from dagh._state import State
from dagh.errors import KinkError, MemoryBudgetError

Array = NDArray[np.float64]
#: How far a set of patterns can be trusted.
Certainty = Literal["exact", "first_order", "sampled", "bound"]
Matrices = Mapping[str, BlockMatrix]


@dataclass(frozen=True)
class Branch:
    """The side of one tie: ``side`` is ``"left"``, ``"right"``, or the index of the element or argument copied."""

    node: str
    sample: int | None
    index: tuple[int, ...]
    side: str

    def __str__(self) -> str:
        at = ",".join(map(str, self.index))
        where = f"{self.node}[{at}]" if self.sample is None else f"{self.node}[{self.sample};{at}]"
        return f"{where} {self.side}"


@dataclass(frozen=True, eq=False)
class Limiting:
    """One smooth piece that meets the point: its branches, Hessian, gradient by name, and share of directions."""

    pattern: tuple[Branch, ...]
    hessian: BlockMatrix
    gradient: dict[str, Tensor]
    weight: float

    def __repr__(self) -> str:
        return f"Limiting({'; '.join(map(str, self.pattern)) or 'no ties'}; weight {self.weight:.3g})"


@dataclass(frozen=True, eq=False)
class LimitingSet(Shown):
    """All limiting Hessians found at a point, one per realizable pattern; a sequence of :class:`Limiting`.

    ``certainty`` is ``"exact"``; ``"first_order"`` (a pattern that only occurs in a cusp may be missing);
    ``"sampled"`` (some ties were settled by looking at points nearby); or ``"bound"`` (a sample of directions).
    """

    items: tuple[Limiting, ...]
    certainty: Certainty
    ties: int
    live_ties: int
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Limiting]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Limiting:
        return self.items[index]

    @property
    def distinct(self) -> list[BlockMatrix]:
        """The Hessians without repetition (equal to 1e-9 of the largest)."""
        kept: list[BlockMatrix] = []
        vectors = _flat([item.hessian for item in self.items])
        size = float(np.abs(vectors).max(initial=0.0))
        chosen: list[Array] = []
        for item, v in zip(self.items, vectors, strict=True):
            if all(np.abs(v - c).max() > 1e-9 * size for c in chosen):
                chosen.append(v)
                kept.append(item.hessian)
        return kept

    def __repr__(self) -> str:
        return f"LimitingSet({len(self)} patterns, {self.certainty}, {self.live_ties} of {self.ties} ties matter)"

    def __rich__(self) -> Table:
        table = Table(title=repr(self))
        for head in ("pattern", "weight", "‖gradient‖", "‖Hessian‖"):
            table.add_column(head, justify="left" if head == "pattern" else "right")
        for item in self.items:
            size = sum(float(g.double().square().sum()) for g in item.gradient.values()) ** 0.5
            pattern = "; ".join(map(str, item.pattern)) or "smooth"
            table.add_row(pattern, f"{item.weight:.4f}", f"{size:.4g}", f"{_size(item.hessian):.4g}")
        return table


@dataclass(eq=False)
class Found:
    """Patterns at a state, and how far to trust them."""

    sites: Sites
    branchings: list[Branching]
    certainty: Certainty
    notes: list[str] = field(default_factory=list)
    equal: int = 0
    sampled: int = 0

    def states(self) -> Iterator[State]:
        """The state under every pattern in turn."""
        for branching in self.branchings:
            yield forced(self.sites.state, self.sites.live, branching.branch)


def find_patterns(state: State, leaves: Sequence[Node], at: AtKinks) -> Found:
    """Realizable patterns at ``state`` when ``leaves`` vary.

    Raises :class:`~dagh.errors.KinkError` when there are too many to enumerate.
    """
    sites = find_sites(state, leaves)
    if not sites.live:
        return Found(sites, [Branching({}, 1.0, np.zeros(0))], "exact")
    if at.samples is not None or any(site.ties.opaque for site in sites.live):
        count = at.samples or 256
        found, read = sample_patterns(sites, count, at.seed)
        notes = [f"patterns along {count} random directions; others may exist", *indices_note(sites)]
        return Found(sites, found, "bound", notes, sampled=read)
    search = Search(sites, at.max_patterns, seed=at.seed)
    done = complete(sites, search.run(), at.seed)
    notes, certainty = indices_note(sites), "exact"
    assert sites.reach is not None
    affine = sites.reach.affine()
    if search.rejected and not all(p in affine for s in sites.live for p in s.node.inputs):
        certainty = "first_order"
        notes.append("pre-activations are curved: a pattern that only occurs in a cusp may be missing")
    if done.equal:
        notes.append(
            f"{_count(done.equal)} between candidates that agree at every point tried nearby: no choice to make"
        )
    if done.sampled:
        certainty = "sampled"
        notes.append(f"{_count(done.sampled)} undecided to first order, settled by points nearby")
    return Found(sites, done.branchings, certainty, notes, len(done.equal), len(done.sampled))  # type: ignore[arg-type]


def indices_note(sites: Sites) -> list[str]:
    """A line on integers computed from numbers that move (``argmax``): they are taken as they are."""
    reach = sites.reach
    if reach is None:
        return []
    names = [
        node.name
        for node in sites.state.program
        if node in reach.within
        and not node.dtype.is_floating_point
        and node.dtype != torch.bool
        and reach.follows(node)
    ]
    return [f"indices computed from the data are taken as they are: {', '.join(names[:4])}"] if names else []


def _refuse_jump(sites: Sites, branches: Sequence[Mapping[Node, Tensor]]) -> None:
    """Raise :class:`~dagh.errors.KinkError` where the loss itself jumps: then nothing is a limit of Hessians here."""
    steps = [site for site in sites.live if site.ties.levels is not None]
    jump = loss_jump(sites.state, (forced(sites.state, sites.live, b) for b in branches)) if steps else 0.0
    if jump:
        node = steps[0].node
        at = f" ({node.source})" if node.source else ""
        raise KinkError(
            f"the loss itself jumps here, by {jump:.3g}: {node.name!r}{at} stands at its threshold; move the point, or "
            "take kinks='torch' for what PyTorch computes"
        )


def _count(ties: set[tuple[str, int]]) -> str:
    return f"{len(ties)} ties" if len(ties) != 1 else "one tie"


def resolve(at: AtKinks, state: State, leaves: Sequence[Node], compute: Callable[[State], Matrices]) -> dict[str, Any]:
    """Apply a policy: ``compute`` gives the matrices of a state, by part; the first part decides weights.

    Returns a :class:`~dagh.BlockMatrix` per part, or a :class:`LimitingSet` for ``"enumerate"``.
    """
    if at.policy == "direction":
        sites = find_sites(state, leaves)
        if not sites.live:
            return dict(compute(state))
        taken = along(sites, direction_of(at, state, sites))
        _refuse_jump(sites, [taken.branch])
        info = {"policy": "direction", "ties": sites.live_ties, "read_off_nearby": taken.sampled}
        return _noted(compute(forced(state, sites.live, taken.branch)), info)
    if at.policy == "raise":
        from dagh._clarke._policy import settle

        return dict(compute(settle(at, state)))
    if state.per_sample:
        raise KinkError(f"kinks={at.policy!r} needs reduction='mean' or 'sum': patterns belong to the whole batch")
    if at.policy == "box":
        sites = find_sites(state, leaves)
        return {part: middle for part, (middle, _) in box_of(sites, compute, at.max_patterns).items()}
    found = find_patterns(state, leaves, at)
    _refuse_jump(found.sites, [b.branch for b in found.branchings])
    info = {
        "policy": at.policy,
        "patterns": len(found.branchings),
        "certainty": found.certainty,
        "ties": found.sites.live_ties,
        "notes": list(found.notes),
    }
    shares = np.array([b.share for b in found.branchings])
    if at.policy == "mean":
        return _noted(_stream(found, compute, shares), info)
    each: list[tuple[Matrices, State]] = []
    for made in found.states():
        each.append((compute(made), made))
        _check_memory(each[0][0], len(found.branchings), state)
    if at.policy == "enumerate":
        return {part: _as_set(found, [(m[part], s) for m, s in each]) for part in each[0][0]}
    matrices = [m for m, _ in each]
    first = [next(iter(m.values())) for m in matrices]
    if at.policy == "min_norm":
        vectors = _flat(first)
        weights = min_norm_weights(vectors)
        info |= {
            "weights": weights.tolist(),
            "gap": optimality_gap(vectors, weights),
            "bound": found.certainty == "bound",
        }
        return _noted({part: _mix([m[part] for m in matrices], weights) for part in matrices[0]}, info)
    return _noted({part: _blockwise([m[part] for m in matrices]) for part in matrices[0]}, info | {"consistent": None})


def _check_memory(matrices: Matrices, patterns: int, state: State) -> None:
    """Refuse to hold all Hessians where they cannot fit."""
    needed = 2 * patterns * sum(m.nbytes for m in matrices.values())
    budget = _memory.budget_bytes(next(iter(matrices.values())).memory_budget, state.weights.device)
    if needed > budget and patterns > 2:
        raise MemoryBudgetError(
            f"{patterns} Hessians at a kink need {needed / 2**30:.1f} GiB, {budget / 2**30:.1f} GiB are allowed; "
            "name blocks or parameters, or take kinks='mean' or 'direction', which hold one at a time"
        )


# -- combinations ----------------------------------------------------------------------------------


def _noted(matrices: Matrices, info: dict[str, Any]) -> dict[str, Any]:
    for matrix in matrices.values():
        matrix.info["kinks"] = info | matrix.info.get("kinks", {})
    return dict(matrices)


def _stream(found: Found, compute: Callable[[State], Matrices], weights: Array) -> Matrices:
    """The weighted sum, one pattern in memory at a time."""
    total: dict[str, BlockMatrix] = {}
    for state, weight in zip(found.states(), weights.tolist(), strict=True):
        for part, matrix in compute(state).items():
            term = _mix([matrix], np.array([weight]))
            total[part] = _mix([total[part], term], np.ones(2)) if part in total else term
    return total


def _mix(matrices: Sequence[BlockMatrix], weights: Array) -> BlockMatrix:
    """``Σ weights[i] matrices[i]``, with the labels of the first."""
    blocks: dict[tuple[int, int], Block] = {}
    for pair in matrices[0].blocks:
        for matrix, weight in zip(matrices, weights.tolist(), strict=True):
            if weight:
                term = matrix.blocks[pair].scale(weight)
                blocks[pair] = add_blocks(blocks[pair], term) if pair in blocks else term
    return matrices[0].derive(blocks, info=dict(matrices[0].info))


def _blockwise(matrices: Sequence[BlockMatrix]) -> BlockMatrix:
    """Every block of least norm by itself; ``info["kinks"]["consistent"]``: whether one set of weights fits all."""
    blocks: dict[tuple[int, int], Block] = {}
    for pair in matrices[0].blocks:
        stack = torch.stack([m.blocks[pair].dense().flatten() for m in matrices]).double()
        weights = min_norm_weights(stack.cpu().numpy())
        mixed = (torch.as_tensor(weights).to(stack) @ stack).reshape(matrices[0].blocks[pair].shape)
        blocks[pair] = DenseBlock(mixed.to(matrices[0].dtype))
    result = matrices[0].derive(blocks, info=dict(matrices[0].info))
    vectors = _flat(matrices)
    nearest = _nearest(vectors, _flat([result])[0])
    size = float(np.linalg.norm(vectors, axis=1).max())
    result.info["kinks"] = {"consistent": bool(nearest <= 1e-7 * size), "distance_to_hull": nearest}
    return result


def _nearest(vectors: Array, point: Array) -> float:
    """Distance of ``point`` to the convex hull of ``vectors``."""
    moved = vectors - point
    return float(np.linalg.norm(moved.T @ min_norm_weights(moved)))


def _flat(matrices: Sequence[BlockMatrix]) -> Array:
    """Each matrix as a vector whose Euclidean norm is its Frobenius norm: blocks off the diagonal count twice."""
    rows = []
    for matrix in matrices:
        parts = [
            matrix.blocks[i, j].dense().double().flatten().cpu().numpy() * (1.0 if i == j else 2**0.5)
            for i, j in matrix.blocks
        ]
        rows.append(np.concatenate(parts) if parts else np.zeros(0))
    return np.stack(rows)


def _as_set(found: Found, pairs: Sequence[tuple[BlockMatrix, State]]) -> LimitingSet:
    items = []
    for branching, (matrix, state) in zip(found.branchings, pairs, strict=True):
        items.append(
            Limiting(describe(found.sites, branching), matrix, gradient_of(state, found.sites), branching.share)
        )
    sites = found.sites
    return LimitingSet(tuple(items), found.certainty, sites.ties, sites.live_ties, tuple(found.notes))


def gradient_of(state: State, sites: Sites) -> dict[str, Tensor]:
    """The gradient under the state's branches, by name of the leaf."""
    out = {}
    for leaf in sites.leaves:
        delta = state.adjoints.get(leaf)
        out[leaf.name] = state.values[leaf].new_zeros(leaf.shape) if delta is None else delta.sum(0).reshape(leaf.shape)
    return out


def describe(sites: Sites, branching: Branching) -> tuple[Branch, ...]:
    """The branches of the ties that matter, readable."""
    out = []
    for site in sites.live:
        branch, node = branching.branch[site.node], site.node
        for k in site.live.nonzero().squeeze(1).tolist():
            c = int(branch[k])
            if site.ties.arg[0] == -1:
                side = ("left", "right")[c]
            elif len(set(site.ties.arg)) > 1:
                side = node.inputs[site.ties.arg[c]].name
            else:
                side = "takes " + ",".join(map(str, _index(sites.state, node.inputs[0], int(site.ties.place[k, c]))))
            sample = int(site.ties.sample[k]) if node.batched and sites.state.samples > 1 else None
            out.append(Branch(node.name, sample, _index(sites.state, node, int(site.ties.element[k])), side))
    return tuple(out)


def _index(state: State, node: Node, place: int) -> tuple[int, ...]:
    """Position within one sample, without the axis of length one that stands for the batch."""
    index = tuple(int(i) for i in np.unravel_index(place, node.shape or (1,)))
    return index[1:] if node.batched and not state.coupled and len(index) > 1 else index


def _size(matrix: BlockMatrix) -> float:
    """Frobenius norm over the blocks held, mirror images included."""
    return float(np.linalg.norm(_flat([matrix])))
