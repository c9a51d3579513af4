"""The rows of the loss factor in a plan: which ones are kept as a result, and what their products take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dagh._request import Pair

if TYPE_CHECKING:
    from dagh._plan import Plan

#: Entries of the product of a layer's cotangents with dense rows that are formed at once.
MIXED = 1 << 22


def kept_rows(plan: Plan) -> frozenset[int]:
    """Leaves whose R = N·r rows of the loss factor are kept, once for all blocks between them.

    A block takes ``R (p_a + p_b)`` numbers then instead of ``p_a p_b``. Where that spares memory for one block, the
    rows of further leaves join as long as they spare more than they take. Only for H_O alone: a sum with H_F is dense.
    """
    if plan.keep or plan.entries or plan.parts != ("outer",):
        return frozenset()
    rank, sizes = plan.samples * plan.outer_rows, plan.sizes
    partners: dict[int, set[int]] = {}
    kept: set[int] = set()
    for i, j in plan.factored:
        if i in plan.gates and j in plan.gates:
            continue
        partners.setdefault(i, set()).add(j)
        partners.setdefault(j, set()).add(i)
        if rank * sum(sizes[k] for k in {i, j}) < sizes[i] * sizes[j]:
            kept |= {i, j}
    more = set(kept)
    while more:
        more = {
            i
            for i, others in partners.items()
            if i not in kept and rank < sum(sizes[j] for j in others if j in kept or j == i)
        }
        kept |= more
    return frozenset(kept)


def dense_rows(plan: Plan) -> int:
    """Entries of one row of H_O's factor that are written out."""
    return sum(plan.sizes[i] for i in {i for p in plan.factored for i in p} if i not in plan.gates)


def gathered_rows(plan: Plan) -> int:
    """Entries of one row that are held until they are multiplied: those that are not a result."""
    return dense_rows(plan) - sum(plan.sizes[i] for i in plan.kept_rows if i not in plan.gates)


def gathered_elements(plan: Plan) -> int:
    """Numbers per sample in the rows of H_O that are held until they are multiplied."""
    if plan.entries:
        return 0
    leaves = {i for p in plan.factored for i in p}
    layers = [plan.gates[i] for i in leaves if i in plan.gates]
    return plan.outer_rows * (gathered_rows(plan) + sum(g.shape[0] for g in layers)) + sum(g.shape[1] for g in layers)


def largest_product(plan: Plan, window: int) -> int:
    """Entries of the largest product of a layer's cotangents with other rows that are formed at once."""
    if plan.entries:
        return 0
    pairs = [(i, j) for i, j in plan.factored if not plan.low_rank(i, j)]
    cores = [
        window * plan.gates[i].shape[0] * plan.gates[j].shape[0]
        for i, j in pairs
        if i in plan.gates and j in plan.gates
    ]
    layers: list[Pair] = [
        (i, j) if i in plan.gates else (j, i) for i, j in pairs if (i in plan.gates) != (j in plan.gates)
    ]
    mixed = [
        min(MIXED, window * plan.gates[i].shape[0] * plan.sizes[j]) * (2 if plan.gates[i].shape[1] < window else 1)
        for i, j in layers  # twice where the sum over samples is one product, of as many entries at most
    ]
    return max([0, *cores, *mixed])
