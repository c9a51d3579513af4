"""Block matrices that fall apart: the block-diagonal part, and the groups of parameters with zeros between them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations_with_replacement
from math import prod
from typing import TYPE_CHECKING

import networkx as nx
from torch import Tensor

from dagh._block_simple import ZeroBlock
from dagh._blockcombine import module_members
from dagh._blocktables import Pair, check_budget
from dagh.errors import ReductionError

if TYPE_CHECKING:
    from dagh._blockmatrix import BlockMatrix


def block_diagonal(matrix: BlockMatrix, by: str) -> BlockMatrix:
    """The blocks of single parameters, or of modules, with zeros for all others."""
    if by == "parameter":
        groups = [[i] for i in range(len(matrix.names))]
    elif by == "module":
        groups = list(module_members(matrix).values())
    else:
        raise ReductionError(f"a block-diagonal part is taken by 'parameter' or 'module', not {by!r}")
    home = {i: g for g, group in enumerate(groups) for i in group}
    blocks, kinds = {}, {}
    for i, j in combinations_with_replacement(range(len(matrix.names)), 2):
        if home[i] == home[j]:
            blocks[i, j] = matrix.block(matrix.names[i], matrix.names[j])
            kinds[i, j] = matrix.kinds[i, j]
        else:
            shape = matrix.numels[i], matrix.numels[j]
            blocks[i, j] = ZeroBlock(shape, matrix.samples, dtype=matrix.dtype, device=matrix.device)
            kinds[i, j] = "zero"
    return matrix.derive(blocks, kinds=kinds, plan=None, info=matrix.info | {"block_diagonal": by})


def components(matrix: BlockMatrix) -> list[list[int]]:
    """Positions of the parameters, in groups between which every block is zero; the matrix must be complete."""
    matrix.require_complete()
    coupled: nx.Graph[int] = nx.Graph()
    coupled.add_nodes_from(range(len(matrix.names)))
    coupled.add_edges_from(pair for pair, block in matrix.blocks.items() if not isinstance(block, ZeroBlock))
    return sorted(sorted(group) for group in nx.connected_components(coupled))


def restricted(matrix: BlockMatrix, positions: list[int]) -> BlockMatrix:
    """The matrix of some of the parameters, in the order they have."""
    place = {i: k for k, i in enumerate(positions)}
    kept: dict[Pair, Pair] = {(place[i], place[j]): (i, j) for i, j in matrix.blocks if i in place and j in place}
    return matrix.derive(
        {new: matrix.blocks[old] for new, old in kept.items()},
        kinds={new: matrix.kinds[old] for new, old in kept.items()},
        names=[matrix.names[i] for i in positions],
        shapes=[matrix.shapes[i] for i in positions],
        modules=[matrix.modules[i] for i in positions],
        plan=None,
    )


def pieces(
    matrix: BlockMatrix, what: str, cheaper: str, *, factors: bool = False
) -> Iterator[tuple[list[int], Tensor]]:
    """The components, written out one by one: their positions and ``[(N,) p, p]``.

    The budget is asked first: for the largest one and a copy, with ``factors`` two copies in float64.
    """
    groups = components(matrix)
    largest = max((sum(matrix.numels[i] for i in group) for group in groups), default=0)
    entry = matrix.dtype.itemsize + (16 if factors else matrix.dtype.itemsize)
    needed = prod(matrix.lead) * largest**2 * entry
    check_budget(f"{what} at P={matrix.size}", needed, matrix.memory_budget, matrix.device, cheaper)
    for group in groups:
        whole = len(group) == len(matrix.names)
        yield group, (matrix if whole else restricted(matrix, group)).dense()
