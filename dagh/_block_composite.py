"""Blocks made of blocks: sums, transposes and grids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dagh._block_base import Block, cancels, check_same_kind, small, streamed_fro, vector_norm
from dagh.errors import ShapeError


class SumBlock(Block):
    """A sum of blocks of one shape, kept apart because their structures do not merge cheaply."""

    structure = "sum"

    def __init__(self, terms: Sequence[Block]) -> None:
        if not terms:
            raise ShapeError("a sum of blocks needs at least one term")
        for term in terms[1:]:
            check_same_kind(terms[0], term)
        super().__init__(terms[0].shape, terms[0].samples, terms[0].dtype, terms[0].device)
        self.terms = tuple(terms)

    def _sum(self, values: Sequence[Tensor]) -> Tensor:
        total = values[0]
        for value in values[1:]:
            total = total + value
        return total

    def row_numel(self) -> int:
        return max(term.row_numel() for term in self.terms)

    def rows(self, start: int, stop: int) -> Tensor:
        return self._sum([t.rows(start, stop) for t in self.terms])

    def dense_flops(self) -> int:
        return sum(t.dense_flops() for t in self.terms)

    def matmat(self, v: Tensor) -> Tensor:
        return self._sum([t.matmat(v) for t in self.terms])

    def rmatmat(self, v: Tensor) -> Tensor:
        return self._sum([t.rmatmat(v) for t in self.terms])

    def diagonal(self) -> Tensor:
        return self._sum([t.diagonal() for t in self.terms])

    @property
    def T(self) -> Block:
        return SumBlock([t.T for t in self.terms])

    def scale(self, c: float) -> Block:
        return SumBlock([t.scale(c) for t in self.terms])

    def to(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Block:
        return SumBlock([t.to(dtype, device) for t in self.terms])

    def sample(self, n: int) -> Block:
        return SumBlock([t.sample(n) for t in self.terms])

    def held(self) -> tuple[Tensor, ...]:
        return tuple(tensor for t in self.terms for tensor in t.held())

    def inner(self, other: Block) -> Tensor:
        check_same_kind(self, other)
        return self._sum([t.inner(other) for t in self.terms])

    def fro(self) -> Tensor:
        if small(self):
            return streamed_fro(self)
        total = magnitude = torch.zeros(self.lead, dtype=self.dtype, device=self.device)
        for i, term in enumerate(self.terms):
            for j, other in enumerate(self.terms[: i + 1]):
                part = term.fro() ** 2 if i == j else 2 * term.inner(other)
                total, magnitude = total + part, magnitude + part.abs()
        return streamed_fro(self) if cancels(total, magnitude) else total.sqrt()

    def fro_flops(self) -> int:
        return self.dense_numel * len(self.terms) + sum(t.fro_flops() for t in self.terms)


class TransposedBlock(Block):
    """The transpose of a block whose structure has no transpose of its own."""

    structure = "transpose"

    def __init__(self, base: Block) -> None:
        super().__init__((base.shape[1], base.shape[0]), base.samples, base.dtype, base.device)
        self.base = base

    def rows(self, start: int, stop: int) -> Tensor:
        columns = torch.zeros(*self.lead, self.shape[0], stop - start, dtype=self.dtype, device=self.device)
        columns[..., start:stop, :] = torch.eye(stop - start, dtype=self.dtype, device=self.device)
        return self.base.matmat(columns).mT

    def write_into(self, out: Tensor) -> None:
        self.base.write_into(out.mT)

    def dense(self) -> Tensor:
        return self.base.dense().mT

    def dense_flops(self) -> int:
        return self.base.dense_flops()

    def matmat(self, v: Tensor) -> Tensor:
        return self.base.rmatmat(v)

    def rmatmat(self, v: Tensor) -> Tensor:
        return self.base.matmat(v)

    def diagonal(self) -> Tensor:
        return self.base.diagonal()

    @property
    def T(self) -> Block:
        return self.base

    def scale(self, c: float) -> Block:
        return TransposedBlock(self.base.scale(c))

    def to(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Block:
        return TransposedBlock(self.base.to(dtype, device))

    def sample(self, n: int) -> Block:
        return TransposedBlock(self.base.sample(n))

    def held(self) -> tuple[Tensor, ...]:
        return self.base.held()

    def fro(self) -> Tensor:
        return self.base.fro()

    def fro_flops(self) -> int:
        return self.base.fro_flops()

    def spectral(self) -> Tensor:
        return self.base.spectral()


class GridBlock(Block):
    """Blocks laid out in a grid, ``grid[r][c]``: the block of a group of parameters against another."""

    structure = "grid"

    def __init__(self, grid: Sequence[Sequence[Block]]) -> None:
        first = grid[0][0]
        heights = [row[0].shape[0] for row in grid]
        widths = [block.shape[1] for block in grid[0]]
        for height, row in zip(heights, grid, strict=True):
            if [b.shape for b in row] != [(height, w) for w in widths] or any(b.samples != first.samples for b in row):
                raise ShapeError("the blocks of a grid do not line up")
        super().__init__((sum(heights), sum(widths)), first.samples, first.dtype, first.device)
        self.grid = tuple(tuple(row) for row in grid)
        self.heights = heights
        self.widths = widths

    def _map(self, function: str, *args: object) -> GridBlock:
        return GridBlock([[getattr(b, function)(*args) for b in row] for row in self.grid])

    def rows(self, start: int, stop: int) -> Tensor:
        parts, offset = [], 0
        for height, row in zip(self.heights, self.grid, strict=True):
            lo, hi = max(start - offset, 0), min(stop - offset, height)
            if lo < hi:
                parts.append(torch.cat([b.rows(lo, hi) for b in row], -1))
            offset += height
        return torch.cat(parts, -2)

    def row_numel(self) -> int:
        return max(super().row_numel(), *(b.row_numel() for row in self.grid for b in row))

    def dense_flops(self) -> int:
        return sum(b.dense_flops() for row in self.grid for b in row)

    def matmat(self, v: Tensor) -> Tensor:
        pieces = torch.split(v, self.widths, -2)
        rows = []
        for row in self.grid:
            out = row[0].matmat(pieces[0])
            for block, piece in zip(row[1:], pieces[1:], strict=True):
                out = out + block.matmat(piece)
            rows.append(out)
        return torch.cat(rows, -2)

    def rmatmat(self, v: Tensor) -> Tensor:
        return self.T.matmat(v)

    def diagonal(self) -> Tensor:
        if self.heights == self.widths:
            return torch.cat([row[i].diagonal() for i, row in enumerate(self.grid)], -1)
        return self.dense().diagonal(dim1=-2, dim2=-1)

    @property
    def T(self) -> Block:
        return GridBlock([[row[c].T for row in self.grid] for c in range(len(self.widths))])

    def scale(self, c: float) -> Block:
        return self._map("scale", c)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Block:
        return self._map("to", dtype, device)

    def sample(self, n: int) -> Block:
        return self._map("sample", n)

    def held(self) -> tuple[Tensor, ...]:
        return tuple(tensor for row in self.grid for b in row for tensor in b.held())

    def merge(self, other: Block) -> Block | None:
        if not isinstance(other, GridBlock) or (other.heights, other.widths) != (self.heights, self.widths):
            return None
        rows = zip(self.grid, other.grid, strict=True)
        return GridBlock([[a.add(b) for a, b in zip(r, s, strict=True)] for r, s in rows])

    def fro(self) -> Tensor:
        return vector_norm(torch.stack([b.fro() for row in self.grid for b in row]), 0)

    def fro_flops(self) -> int:
        return sum(b.fro_flops() for row in self.grid for b in row)
