"""The diagonal of a matrix alone: every piece of a diagonal block gives its diagonal entries and is forgotten."""

from __future__ import annotations

import torch
from torch import Tensor

from dagh._accumulate import Accumulator
from dagh._blocks import Block, DiagonalBlock
from dagh._outer import Rows
from dagh._request import Pair


class Entries(Accumulator):
    """An :class:`~dagh._accumulate.Accumulator` of ``[(N,) p]`` instead of ``[(N,) p, p]`` for each parameter."""

    def block(self, i: int, j: int) -> Tensor:
        """The (zero-initialized) entries of leaf ``i``."""
        assert i == j, "a diagonal has no entries between two parameters"
        with self._lock:
            if (i, i) not in self.blocks:
                lead = (self.samples,) if self.keep else ()
                self.blocks[i, i] = self.like.new_zeros(*lead, self.request.sizes[i])
            return self.blocks[i, i]

    def add(self, i: int, j: int, piece: Tensor, rows: slice, window: slice, columns: slice = slice(None)) -> None:
        self.add_own(i, piece[..., rows].diagonal(dim1=-2, dim2=-1), 1, rows, window)

    def add_channels(self, i: int, j: int, piece: Tensor, channels: int, part: slice, window: slice) -> None:
        grid = piece.reshape(*piece.shape[:-2], channels, part.stop - part.start, channels, -1)[..., part]
        own = grid.diagonal(dim1=-4, dim2=-2).diagonal(dim1=-3, dim2=-2)  # [(n,) C, part]
        self.add_own(i, own, channels, part, window)

    def add_mirrored(self, i: int, piece: Tensor, channels: int, part: slice) -> None:
        """Nothing: members after ``part`` against those of it lie beside the diagonal."""

    def add_layers(
        self,
        key: Pair,
        x: Tensor,
        y: Tensor,
        core: Tensor | None,
        jacobian: Tensor | None,
        adjoint: Tensor | None,
        rows: slice,
        window: slice,
    ) -> None:
        """As in the base class; with and without ``keep``, ``x`` and ``y`` are the inputs of one and the same layer."""
        if core is not None:
            own = core[..., rows].diagonal(dim1=1, dim2=2)  # [n, rows]
            self._add_products(key[0], own, x * y, rows, window)
        if jacobian is not None and adjoint is not None:
            crossed = jacobian * x.unsqueeze(1)
            if self.keep:
                self._target(key[0], x.shape[1])[window, rows] += crossed * adjoint[:, rows, None]
            else:
                self._target(key[0], x.shape[1])[rows] += torch.einsum("noi,no->oi", crossed, adjoint[:, rows])

    add_dense_layers = add_layers

    def add_rows(self, found: dict[int, Rows], signs: Tensor | None, window: slice) -> None:
        """Add ``Σ_r σ_r B_r²`` of the rows ``B`` of the loss factor, of every leaf found."""
        for i, rows in found.items():
            s = rows.cotangent if rows.dense is None else rows.dense
            assert s is not None
            squares = (s.square() if signs is None else s.square().mul_(signs.unsqueeze(2))).sum(1)
            if rows.inputs is not None:
                self._add_products(i, squares, rows.inputs.square(), slice(0, squares.shape[1]), window)
            elif self.keep:
                self.block(i, i)[window] += squares
            else:
                self.block(i, i).add_(squares.sum(0))

    def add_sum(self, i: int, piece: Tensor, rows: slice) -> None:
        """Add ``piece`` [rows, inputs], summed over samples, to the entries of a layer's weight or bias."""
        self._target(i, piece.shape[1])[rows] += piece

    def add_squares(self, i: int, outputs: Tensor, inputs: Tensor, rows: slice, window: slice) -> None:
        """Add ``outputs`` [n, rows] times the squares of a layer's ``inputs`` [n, i], to its weight or bias."""
        self._add_products(i, outputs, inputs.square(), rows, window)

    def add_own(self, i: int, piece: Tensor, channels: int, part: slice, window: slice) -> None:
        """Add ``piece`` [(n,) C · part], for the members ``part`` of each of the channels."""
        target = self.block(i, i)
        target = target[window] if self.keep else target
        lead = target.shape[:-1]
        target.view(*lead, channels, -1)[..., part] += piece.reshape(*lead, channels, -1)

    def _target(self, i: int, inputs: int) -> Tensor:
        target = self.block(i, i)
        return target.view(*target.shape[:-1], -1, inputs)

    def _add_products(self, i: int, outputs: Tensor, inputs: Tensor, rows: slice, window: slice) -> None:
        """``outputs`` [n, o] times ``inputs`` [n, i], to the entries of a layer's weight or bias."""
        target = self._target(i, inputs.shape[1])
        if self.keep:
            target[window, rows] += outputs.unsqueeze(2) * inputs.unsqueeze(1)
        else:
            target[rows] += outputs.T @ inputs

    def finished(self) -> dict[Pair, Block]:
        """A diagonal block for every parameter."""
        return {(i, i): DiagonalBlock(self.block(i, i)) for i, _ in self.request.pairs}
