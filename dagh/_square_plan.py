"""What is taken from tangents alone, and its price: blocks of leaves with themselves where that is the cheaper way
(:mod:`dagh._squares`), and diagonal entries (:mod:`dagh._quadratic`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dagh._costs import PASS
from dagh._footprint import of_tangents
from dagh._plan_sweeps import Column

if TYPE_CHECKING:
    from dagh._pricing import Sweeps

#: A product of matrices this narrow takes about so many times as long per operation as a large one.
_NARROW = 1.3


def squared(sweeps: Sweeps, column: Column, limit: int | None) -> Column:
    """The column without a way back, if that is cheaper and its tangents fit (``limit`` numbers)."""
    own = [(leaf, leaf) for leaf in column.leaves]
    if column.basis not in ("parameter", "channel") or column.pairs != own or column.after:
        return column
    reach, seed, spread = sweeps.reach, column.seed, column.spread
    _, _, met, back = sweeps.as_swept(column)
    nothing = np.zeros(len(back), dtype=bool)
    curves = reach.packed(seed, met, back, spread)[0] if column.copies > 1 else nothing
    thin = reach.thin(seed) if column.copies > 1 else nothing
    products = written = 0.0
    ends = [(u, p) for u in column.curved for p in dict.fromkeys(u.inputs) if reach.above[p.index, seed.index]]
    if column.via is not None and not column.folded:
        ends.append((column.via, column.via))
    for u, p in ends:
        packed = curves[u.index] and thin[p.index]
        rows, others = (1, 1) if packed else (column.copies, 1 if thin[p.index] else column.copies)
        # Half of the products are the mirror image of the others, unless each channel's tangents meet all rows.
        half = 0.5 if packed or others == column.copies else 1.0
        products += 2.0 * half * column.width**2 * rows * others * p.numel
        written += column.width * (rows + others) * p.numel

    cost, flops, moved = _way_back(sweeps, column)
    saved = cost - _NARROW * products - PASS * written
    alive = of_tangents(reach, column)
    if not pays(saved) or (limit is not None and 3 * alive.elements(1, column.width) > limit):
        return column
    return replace(
        column, square=alive, swept=column, cost=column.cost - saved, flops=column.flops - flops + products,
        moved=column.moved - moved + written,
    )  # fmt: skip


def one_way(sweeps: Sweeps, column: Column) -> Column:
    """The column of diagonal entries without a way back, where its directions are those of the entries."""
    gate = column.gate
    if column.basis == "activation":
        own = gate is not None and gate.rows == column.copies == 1
        own = own and all(gate is not None and v is gate.node for v in column.targets.values())
    else:
        own = column.basis in ("parameter", "channel") and not column.after
    if not own:
        return column
    alive = min(of_tangents(sweeps.reach, column), column.alive, key=lambda a: a.elements(1, 1))
    cost, flops, moved = _way_back(sweeps, column)
    return replace(
        column, one_way=True, folded=False, alive=alive, cost=column.cost - cost, flops=column.flops - flops,
        moved=column.moved - moved,
    )  # fmt: skip


def _way_back(sweeps: Sweeps, column: Column) -> tuple[float, float, float]:
    """Price, arithmetic and elements written of all ways back of a column."""
    within, held, met, back = sweeps.as_swept(column)
    nothing = np.zeros(len(back), dtype=bool)

    def of(kind: Any) -> float:
        whole, there = (
            sweeps.sweep_cost(column.seed, (within, held, met, b), column.copies, kind, column.spread)
            for b in (back, nothing)
        )
        return float(column.width * (whole - there))

    return of(sweeps.reach.cost), of(sweeps.reach.flops), of(sweeps.reach.moved)


def pays(saved: float) -> bool:
    """Whether a saving of so much is worth another way."""
    return saved > 0
