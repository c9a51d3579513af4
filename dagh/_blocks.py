"""Structured blocks of a Hessian, gathered, and the addition of any two."""

from __future__ import annotations

from dagh._block_base import Block, check_same_kind
from dagh._block_composite import GridBlock, SumBlock, TransposedBlock
from dagh._block_factored import KroneckerSumBlock, LowRankBlock
from dagh._block_layers import LayerPairBlock
from dagh._block_simple import DenseBlock, DiagonalBlock, ZeroBlock

__all__ = [
    "Block",
    "DenseBlock",
    "DiagonalBlock",
    "GridBlock",
    "KroneckerSumBlock",
    "LayerPairBlock",
    "LowRankBlock",
    "SumBlock",
    "TransposedBlock",
    "ZeroBlock",
    "add_blocks",
]


def add_blocks(first: Block, second: Block) -> Block:
    """The sum, merged term by term where structures agree, dense once that takes no more memory."""
    check_same_kind(first, second)
    if isinstance(first, ZeroBlock):
        return second
    if isinstance(second, ZeroBlock):
        return first
    if isinstance(first, DenseBlock) or isinstance(second, DenseBlock):
        return DenseBlock(first.dense() + second.dense())
    terms = list(first.terms) if isinstance(first, SumBlock) else [first]
    for term in second.terms if isinstance(second, SumBlock) else (second,):
        for i, held in enumerate(terms):
            merged = held.merge(term)
            if merged is not None:
                terms[i] = merged
                break
        else:
            terms.append(term)
    total = terms[0] if len(terms) == 1 else SumBlock(terms)
    return DenseBlock(total.dense()) if total.nbytes >= total.dense_nbytes else total
