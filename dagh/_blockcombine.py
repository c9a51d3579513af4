"""Block matrices made from others: sums, differences and merged rows."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dagh._block_base import identity
from dagh._blocks import Block, GridBlock, LowRankBlock
from dagh._blocktables import Pair, join_kinds, join_parts, restrict_kind
from dagh.errors import BlockNotComputedError, DtypeError, ReductionError, ShapeError

if TYPE_CHECKING:
    from dagh._blockmatrix import BlockMatrix


def combine(first: BlockMatrix, second: BlockMatrix, sign: int) -> BlockMatrix:
    """``first + sign * second``, block by block; both must hold the same blocks of the same parameters."""
    if (first.names, first.shapes) != (second.names, second.shapes):
        raise ShapeError("the two matrices have different parameters")
    if (first.reduction, first.samples) != (second.reduction, second.samples):
        raise ShapeError(f"the reductions differ: {first!r} and {second!r}")
    if first.blocks.keys() != second.blocks.keys():
        raise ShapeError("the two matrices hold different blocks")
    if (first.dtype, first.device.type) != (second.dtype, second.device.type):
        raise DtypeError(f"the dtypes or devices differ: {first!r} and {second!r}")
    part = join_parts(first.part, second.part, sign)
    blocks: dict[Pair, Block] = {}
    kinds: dict[Pair, str] = {}
    for pair, block in first.blocks.items():
        other = second.blocks[pair]
        blocks[pair] = block.add(other if sign > 0 else other.scale(-1.0))
        kinds[pair] = restrict_kind(join_kinds(first.kinds[pair], second.kinds[pair]), part)
    return first.derive(blocks, kinds=kinds, part=part, plan=None, info={})


def converted(matrix: BlockMatrix, targets: Sequence[torch.dtype | torch.device | str]) -> BlockMatrix:
    """The matrix in another dtype or on another device; low-rank blocks go on sharing their factors."""
    dtype, device = matrix.dtype, matrix.device
    for target in targets:
        if isinstance(target, torch.dtype):
            dtype = target
        else:
            device = torch.device(target)
    if dtype not in (torch.float32, torch.float64):
        raise DtypeError(f"{dtype} is not supported; use torch.float32 or torch.float64")
    made: dict[Hashable, Tensor] = {}

    def once(t: Tensor) -> Tensor:
        key = identity(t)
        if key not in made:
            made[key] = t.to(dtype=dtype, device=device)
        return made[key]

    blocks = {
        pair: block.rebuild(*map(once, block.tensors())) if isinstance(block, LowRankBlock) else block.to(dtype, device)
        for pair, block in matrix.blocks.items()
    }
    return matrix.derive(blocks, dtype=dtype, device=device)


def merge_by_module(matrix: BlockMatrix, by: str, depth: int | None) -> BlockMatrix:
    """Blocks merged per module path, cut to ``depth`` components."""
    if by != "module":
        raise ReductionError(f"blocks are grouped by 'module', not {by!r}")
    if depth is not None and depth < 1:
        raise ReductionError(f"depth is at least 1, not {depth}")
    members = module_members(matrix, depth)
    names, groups = list(members), list(members.values())
    blocks: dict[Pair, Block] = {}
    kinds: dict[Pair, str] = {}
    for r, c in combinations_with_replacement(range(len(groups)), 2):
        grid = [[_oriented(matrix, i, j) for j in groups[c]] for i in groups[r]]
        rows = [[block for block in row if block is not None] for row in grid]
        if [len(row) for row in rows] != [len(row) for row in grid]:
            continue
        blocks[r, c] = GridBlock(rows)
        kind = "zero"
        for i in groups[r]:
            for j in groups[c]:
                kind = join_kinds(kind, matrix.kinds[min(i, j), max(i, j)])
        kinds[r, c] = kind
    if matrix.blocks and not blocks:
        raise BlockNotComputedError(
            "no module has all of its blocks: they come with blocks='module', or with blocks='all'"
        )
    shapes = [(sum(matrix.numels[i] for i in group),) for group in groups]
    return matrix.derive(blocks, kinds=kinds, names=names, shapes=shapes, modules=names)


def module_members(matrix: BlockMatrix, depth: int | None = None) -> dict[str, list[int]]:
    """Positions of the parameters of each module, the module paths cut to ``depth`` components."""
    members: dict[str, list[int]] = {}
    for i, path in enumerate(matrix.modules):
        key = path if depth is None else ".".join(path.split(".")[:depth])
        members.setdefault(key or "(root)", []).append(i)
    return members


def _oriented(matrix: BlockMatrix, i: int, j: int) -> Block | None:
    """Block (i, j) in that orientation, None if it was not computed."""
    block = matrix.blocks.get((min(i, j), max(i, j)))
    return block if block is None or i <= j else block.T
