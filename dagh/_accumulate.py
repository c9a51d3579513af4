"""Where the pieces of the requested blocks are gathered, each pair in the structure that takes less memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from dagh._block_layers import LayerPairBlock, write_layers
from dagh._blocks import Block, DenseBlock, KroneckerSumBlock, ZeroBlock
from dagh._low_rank import LossRows
from dagh._memory import zeros
from dagh._plan import Plan
from dagh._request import Pair, Request
from dagh._state import State

#: Entries symmetrized at once.
_PART = 1 << 18


@dataclass
class Layers:
    """A pair of linear layers kept per sample, ``row``s first: see :class:`~dagh._block_layers.LayerPairBlock`.

    ``key`` is the pair in the order in which it is held: the leaf whose tangents were swept first.
    """

    key: Pair
    core: Tensor
    left: Tensor
    right: Tensor
    jacobian: Tensor | None = None
    adjoint: Tensor | None = None

    def block(self) -> Block:
        """The block of ``key``."""
        if self.jacobian is None or self.adjoint is None:
            if self.key[0] == self.key[1]:
                for part in torch.split(self.core, max(1, _PART // max(1, self.core[:1].numel()))):
                    part.copy_(0.5 * (part + part.mT))
                return KroneckerSumBlock(self.core, self.left, self.right, symmetric=True)
            return KroneckerSumBlock(self.core, self.left, self.right)
        return LayerPairBlock(self.core, self.left, self.right, self.jacobian, self.adjoint)


class Accumulator:
    """The blocks of one part (or of the sum of both), filled piece by piece."""

    def __init__(self, request: Request, state: State, plan: Plan) -> None:
        self.request, self.plan, self.keep = request, plan, plan.keep
        self.like = next(iter(state.values.values())) if not request.leaves else state.values[request.leaves[0]]
        self.samples = state.samples
        self.blocks: dict[Pair, Tensor] = {}
        self.layers: dict[Pair, Layers] = {}
        self.rows = LossRows(self.samples, self.like)
        self._lock = Lock()

    def fork(self) -> Accumulator:
        """One to fill with other samples at the same time: what is kept per sample is shared, sums are its own."""
        other = copy.copy(self)
        if not self.keep:
            other.blocks = {}
        return other

    def merge(self, other: Accumulator) -> None:
        """Take over the sums of a fork, which is empty afterwards: to merge it again changes nothing."""
        if other.blocks is self.blocks:
            return
        while other.blocks:
            pair, block = other.blocks.popitem()
            if pair in self.blocks:
                self.blocks[pair] += block
            else:
                self.blocks[pair] = block

    def block(self, i: int, j: int) -> Tensor:
        """The (zero-initialized) storage of block ``i <= j``."""
        with self._lock:
            if (i, j) not in self.blocks:
                sizes = self.request.sizes
                lead = (self.samples,) if self.keep else ()
                shape = (*lead, sizes[i], sizes[j])
                self.blocks[i, j] = zeros(shape, dtype=self.like.dtype, device=self.like.device)
            return self.blocks[i, j]

    def add(self, i: int, j: int, piece: Tensor, rows: slice, window: slice, columns: slice = slice(None)) -> None:
        """Add ``piece`` ``[(n,) rows of i, columns of j]`` to block (i, j) or, transposed, (j, i)."""
        lead = (window,) if self.keep else ()
        if i <= j:
            self.block(i, j)[(*lead, rows, columns)] += piece
        else:
            self.block(j, i)[(*lead, columns, rows)] += piece.transpose(-1, -2)

    def add_channels(self, i: int, j: int, piece: Tensor, channels: int, part: slice, window: slice) -> None:
        """As :meth:`add` for rows (channel, member) with the members of ``part``: ``[(n,) C·part, all of j]``."""
        target = self.block(min(i, j), max(i, j))
        if self.keep:
            target = target[window]
        lead, (rows, columns) = target.shape[:-2], target.shape[-2:]
        piece = piece.reshape(*lead, channels, part.stop - part.start, -1)
        if i <= j:
            target.view(*lead, channels, rows // channels, columns)[..., part, :] += piece
        else:
            target.view(*lead, rows, channels, columns // channels)[..., part] += piece.movedim(-1, -3)

    def add_mirrored(self, i: int, piece: Tensor, channels: int, part: slice) -> None:
        """Add to block (i, i) the mirror image of ``piece`` ``[C·part, all]`` at the members after ``part``."""
        target = self.block(i, i)
        members = target.shape[0] // channels
        later = piece.reshape(channels, part.stop - part.start, channels, members)[..., part.stop :]
        target.view(channels, members, channels, members)[:, part.stop :, :, part] += later.permute(2, 3, 0, 1)

    def structured(self, i: int, j: int) -> bool:
        """Whether the pair is kept per sample."""
        return not self.keep and self.plan.structured(i, j, self.samples)

    def _held(self, key: Pair, x: Tensor, y: Tensor, *, crossed: bool = False) -> Layers:
        """The (zero-initialized) factors of a pair of layers; with those of its second term if it is ``crossed``."""
        sizes, n, fresh = self.request.sizes, self.samples, self.like.new_zeros
        o_a, o_b = sizes[key[0]] // x.shape[1], sizes[key[1]] // y.shape[1]
        with self._lock:
            held = self.layers.get(key)
            if held is None:
                held = Layers(key, fresh(n, o_a, o_b), fresh(n, x.shape[1]), fresh(n, y.shape[1]))
                self.layers[key] = held
            if crossed and held.jacobian is None:
                held.adjoint, held.jacobian = fresh(n, o_b), fresh(n, o_a, y.shape[1])
        return held

    def core(self, key: Pair, x: Tensor, y: Tensor, window: slice) -> Tensor:
        """Where the cores of some samples are added up, ``[n, o_a, o_b]``, for a pair that is kept per sample."""
        held = self._held(key, x, y)
        held.left[window], held.right[window] = x, y
        return held.core[window]

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
        """Add the outputs ``rows`` of layer ``key[0]`` against all of layer ``key[1]``.

        ``x`` [n, i_a], ``y`` [n, i_b], ``core`` [n, rows, o_b], ``jacobian`` [n, rows, i_b], ``adjoint`` [n, o_b].
        """
        if not self.structured(*key):
            self.add_dense_layers(key, x, y, core, jacobian, adjoint, rows, window)
            return
        held = self._held(key, x, y, crossed=jacobian is not None and adjoint is not None)
        held.left[window], held.right[window] = x, y
        if core is not None:
            held.core[window, rows] += core
        if jacobian is not None and adjoint is not None:
            assert held.jacobian is not None and held.adjoint is not None
            held.jacobian[window, rows] += jacobian
            held.adjoint[window] = adjoint

    def add_dense_layers(
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
        """As :meth:`add_layers`, written out; without ``keep``, ``n`` may count anything that is summed over."""
        given = core if core is not None else jacobian
        assert given is not None
        n, b, i = given.shape[0], given.shape[1], x.shape[1]
        if core is None:
            core = x.new_zeros(n, b, self.request.sizes[key[1]] // y.shape[1])
        where = slice(rows.start * i, rows.stop * i)
        if self.keep:
            piece = torch.einsum("nab,ni,nj->naibj", core, x, y)
            if jacobian is not None and adjoint is not None:
                piece = piece + torch.einsum("naj,ni,nb->naibj", jacobian, x, adjoint)
            self.add(*key, piece.reshape(n, b * i, -1), where, window)
            return
        if key[0] <= key[1]:
            target = self.block(*key)[where]
            write_layers(target, core, x, y, jacobian, adjoint, add=True)
            return
        piece = x.new_empty(b * i, self.request.sizes[key[1]])
        write_layers(piece, core, x, y, jacobian, adjoint)
        self.add(*key, piece, where, window)

    def finished(self) -> dict[Pair, Block]:
        """One block for every requested pair, ``i <= j``."""
        sizes, like = self.request.sizes, self.like
        out: dict[Pair, Block] = {}
        for i, j in self.request.pairs:
            held = self.layers.pop((i, j), None) or self.layers.pop((j, i), None)
            dense = self.blocks.get((i, j))
            shared = self.rows.block((i, j)) if self.plan.low_rank(i, j) else None
            if shared is not None:
                out[i, j] = shared
            elif held is not None:
                block = held.block()
                block = block if held.key == (i, j) else block.T
                out[i, j] = block if dense is None else DenseBlock(dense + block.dense())
            elif dense is not None:
                out[i, j] = DenseBlock(dense)
            else:
                samples = self.samples if self.keep else None
                out[i, j] = ZeroBlock((sizes[i], sizes[j]), dtype=like.dtype, device=like.device, samples=samples)
        return out
