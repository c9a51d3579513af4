"""Parts of a layer's outputs, each of which goes its own way: queries, keys and values, the halves of a gated unit.

Among themselves their second derivatives are symmetric. So when the directions of later outputs are swept, the ways
back to the earlier ones are left out, and what would have arrived there is the mirror image of what is known.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from dagh._costs import PASS
from dagh._parts import ends_of
from dagh._plan_sweeps import Column

if TYPE_CHECKING:
    from dagh._pricing import Sweeps


def parted(sweeps: Sweeps, column: Column) -> Column:
    """The column with its layer's parts, and what the shorter ways back save.

    As it is, unless its rows are wanted of the layer as a whole, and of nothing before that; nor where each token's
    rows stay by themselves.
    """
    gate, above = column.gate, sweeps.reach.above
    if column.basis != "activation" or gate is None or gate.channels:
        return column
    if gate.rows == 1 and not sweeps.request.entries:  # kept per sample as it is
        return column
    targets = list(dict.fromkeys(column.targets.values()))
    if gate.node not in targets or any(t is not gate.node and above[gate.node.index, t.index] for t in targets):
        return column
    regions = sweeps.regions(column.seed, targets, column.paths)
    if any(
        sweeps.stays(*pair, regions, column.copies) for pair in column.pairs if column.targets[pair[1]] is gate.node
    ):
        return column
    ends = ends_of(sweeps.program, gate.node)
    if not ends:
        return column
    column = replace(column, ends=ends, swept=column)
    starts = [0, *(end for end, _ in ends)]
    lengths = [b - a for a, b in pairwise([*starts, gate.node.shape[-1]])]
    ways = [sweeps.as_swept(column, column.passed(start)) for start in starts]

    def saved(kind: Any) -> float:
        costs = [sweeps.sweep_cost(column.seed, way, column.copies, kind) for way in ways]
        return column.order * sum(k * (costs[0] - cost) for k, cost in zip(lengths, costs, strict=True))

    # Of a leaf's block with itself, half of the products are the mirror image of the others.
    own = [pair for pair in column.pairs if pair[0] == pair[1]]
    products = 0.5 * sum(sweeps.contraction(*pair, False, passes=0.0) for pair in own)
    passes = 0.5 * sum(sweeps.contraction(*pair, False) for pair in own) - products
    return replace(
        column,
        cost=column.cost - saved(sweeps.reach.cost) - products - passes,
        flops=column.flops - saved(sweeps.reach.flops) - products,
        moved=column.moved - saved(sweeps.reach.moved) - passes / PASS,
    )
