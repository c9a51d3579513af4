"""Whether a leaf's block with itself is taken from its tangents alone (:mod:`dagh._squares`): prices of both ways."""

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
    within, held, met, back = sweeps.as_swept(column)
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

    def way_back(kind: Any) -> float:
        whole = sweeps.sweep_cost(seed, (within, held, met, back), column.copies, kind, spread)
        return column.width * (
            whole - sweeps.sweep_cost(seed, (within, held, met, nothing), column.copies, kind, spread)
        )

    saved = way_back(reach.cost) - _NARROW * products - PASS * written
    alive = of_tangents(reach, column)
    if not pays(saved) or (limit is not None and 3 * alive.elements(1, column.width) > limit):
        return column
    return replace(
        column, square=alive, swept=column, cost=column.cost - saved,
        flops=column.flops - way_back(reach.flops) + products,
        moved=column.moved - way_back(reach.moved) + written,
    )  # fmt: skip


def pays(saved: float) -> bool:
    """Whether a saving of so much is worth another way."""
    return saved > 0
