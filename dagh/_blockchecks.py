"""What a block matrix is made of, checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dagh._blocks import Block, ZeroBlock
from dagh._blocktables import KINDS, PARTS, Pair
from dagh.errors import DtypeError, ReductionError, ShapeError

if TYPE_CHECKING:
    from dagh._blockmatrix import BlockMatrix


def check_options(part: str, reduction: str, samples: int | None) -> None:
    """``ReductionError`` for an unknown part or reduction, or one that does not go with the samples."""
    if part not in PARTS:
        raise ReductionError(f"part is one of {', '.join(PARTS)}, not {part!r}")
    if reduction not in ("mean", "sum", "none"):
        raise ReductionError(f"reduction is 'mean', 'sum' or 'none', not {reduction!r}")
    if (reduction == "none") != (samples is not None):
        raise ReductionError("reduction='none', and it alone, comes with a number of samples")


def stored(matrix: BlockMatrix, pair: Pair, block: Block, kind: str | None) -> tuple[Pair, Block, str]:
    """The block as the matrix keeps it, above the diagonal, with its class; an error where it does not fit."""
    i, j = pair
    names, numels = matrix.names, matrix.numels
    if not 0 <= max(i, j) < len(names) or min(i, j) < 0:
        raise ShapeError(f"block {pair} is outside the {len(names)} parameters")
    expected = (numels[i], numels[j])
    if block.shape != expected or block.samples != matrix.samples:
        raise ShapeError(
            f"block ({names[i]!r}, {names[j]!r}) should be {expected[0]} x {expected[1]} "
            f"with samples={matrix.samples}, not {block!r}"
        )
    if block.dtype != matrix.dtype:
        raise DtypeError(f"block ({names[i]!r}, {names[j]!r}) is {block.dtype}, not {matrix.dtype}")
    if i > j:
        (i, j), block = (j, i), block.T
    if (i, j) in matrix.blocks:
        raise ShapeError(f"block ({names[i]!r}, {names[j]!r}) was given twice")
    if kind is None:
        whole = {"outer": "H_O", "functional": "H_F"}.get(matrix.part, "H_O+H_F")
        kind = "zero" if isinstance(block, ZeroBlock) else whole
    if kind not in KINDS:
        raise ReductionError(f"the class of a block is one of {', '.join(KINDS)}, not {kind!r}")
    return (i, j), block, kind
