"""Blocks of two linear layers, kept per sample: cores of the size of the layers' outputs instead of their weights.

With ``z_a = W_a x_a`` and ``z_b = W_b x_b`` (one row per sample), the block of ``W_a`` against ``W_b`` is

    Σ_n x_a[i] ( C[o, o'] x_b[i'] + J[o, i'] δ_b[o'] )        at row (o, i), column (o', i'),

``C = H_{z_a, z_b}`` the second derivative between the two outputs, ``J`` the derivative of ``x_b`` by ``z_a`` and
``δ_b`` the adjoint of ``z_b``. Without the second term it is a :class:`~dagh._block_factored.KroneckerSumBlock`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dagh._block_base import Block
from dagh._block_composite import TransposedBlock
from dagh._block_pairs import ALIVE, Pairs, split

#: Entries of the right-hand factor formed at once: it should stay in the cache between its two uses.
_PANEL = 1 << 18


class LayerPairBlock(Block):
    """The sum above: ``core`` [N, o_a, o_b], ``left`` [N, i_a], ``right`` [N, i_b],
    ``jacobian`` [N, o_a, i_b], ``adjoint`` [N, o_b].
    """

    structure = "layer pair"
    fields = ("core", "left", "right", "jacobian", "adjoint")

    def __init__(self, core: Tensor, left: Tensor, right: Tensor, jacobian: Tensor, adjoint: Tensor) -> None:
        shape = (core.shape[1] * left.shape[1], core.shape[2] * right.shape[1])
        super().__init__(shape, None, core.dtype, core.device)
        self.core, self.left, self.right, self.jacobian, self.adjoint = core, left, right, jacobian, adjoint

    def row_numel(self) -> int:
        return max(self.shape[1] * 2, self.core.shape[0] * self.shape[1] // max(1, self.left.shape[1]))

    def rows(self, start: int, stop: int) -> Tensor:
        i_a = self.left.shape[1]
        first, last = start // i_a, -(-stop // i_a)
        out = self.core.new_empty((last - first) * i_a, self.shape[1])
        part = slice(first, last)
        write_layers(out, self.core[:, part], self.left, self.right, self.jacobian[:, part], self.adjoint)
        return out[start - first * i_a : stop - first * i_a]

    def write_into(self, out: Tensor) -> None:
        write_layers(out, self.core, self.left, self.right, self.jacobian, self.adjoint)

    def write_share(self, out: Tensor, share: int, count: int) -> Iterator[slice]:
        factors = self.core, self.left, self.right, self.jacobian, self.adjoint
        return layers_share(out, share, count, *factors)

    def dense_flops(self) -> int:
        return self.dense_numel * self.core.shape[0]

    def matmat(self, v: Tensor) -> Tensor:
        v = v.reshape(self.core.shape[2], self.right.shape[1], -1)
        middle = self.core @ torch.einsum("ni,oik->nok", self.right, v)
        middle = middle + self.jacobian @ torch.einsum("no,oik->nik", self.adjoint, v)
        return torch.einsum("ni,nok->oik", self.left, middle).flatten(0, 1)

    def rmatmat(self, v: Tensor) -> Tensor:
        v = v.reshape(self.core.shape[1], self.left.shape[1], -1)
        middle = torch.einsum("ni,oik->nok", self.left, v)
        by_core = torch.einsum("nok,ni->oik", self.core.mT @ middle, self.right)
        by_path = torch.einsum("nik,no->oik", self.jacobian.mT @ middle, self.adjoint)
        return (by_core + by_path).flatten(0, 1)

    def diagonal(self) -> Tensor:
        return torch.cat([rows.diagonal(start) for start, _, rows in self.strips()])[: min(self.shape)]

    @property
    def T(self) -> Block:
        return TransposedBlock(self)

    def scale(self, c: float) -> Block:
        return LayerPairBlock(self.core * c, self.left, self.right, self.jacobian * c, self.adjoint)


def write_layers(
    out: Tensor,
    core: Tensor,
    left: Tensor,
    right: Tensor,
    jacobian: Tensor | None = None,
    adjoint: Tensor | None = None,
    *,
    symmetric: bool = False,
    add: bool = False,
) -> None:
    """Fill (or ``add`` to) ``out`` [p_a, p_b], any strides, by matrix products over the samples.

    ``symmetric``: the block is that of one weight against itself (``left`` is ``right``, ``core`` symmetric); part of
    the products are then copies (and ``add`` does not go with it).
    """
    if left.shape[1] == 1 or right.shape[1] == 1:
        _write_bias(out, core, left, right, jacobian, adjoint, add)
        return
    for _ in _written(out, range(core.shape[1]), core, left, right, jacobian, adjoint, symmetric=symmetric, add=add):
        pass


def _written(
    out: Tensor,
    outputs: Sequence[int],
    core: Tensor,
    left: Tensor,
    right: Tensor,
    jacobian: Tensor | None = None,
    adjoint: Tensor | None = None,
    *,
    symmetric: bool,
    add: bool,
) -> Iterator[list[int]]:
    """Write what belongs to some outputs of the first layer, with the mirror images; yields those that are done."""
    assert not (symmetric and add)
    if jacobian is None and Pairs.pay(core, left, right, symmetric=symmetric):
        yield from Pairs(core, left, right, symmetric=symmetric).write(out, outputs, add)
        return
    o_a, o_b, i_a, i_b = core.shape[1], core.shape[2], left.shape[1], right.shape[1]
    for o in outputs:
        rows = out[o * i_a : (o + 1) * i_a]
        row = _Row(core[:, o], left, right, None if jacobian is None else jacobian[:, o], adjoint).alive()
        transposed, step = row.left.T, max(1, _PANEL // (max(1, row.core.shape[0]) * i_b))
        for start in range(o if symmetric else 0, o_b, step):
            stop = min(start + step, o_b)
            panel = row.core[:, start:stop, None] * row.right[:, None, :]
            if row.jacobian is not None and row.adjoint is not None:
                panel.addcmul_(row.adjoint[:, start:stop, None], row.jacobian[:, None, :])
            _product(rows[:, start * i_b : stop * i_b], transposed, panel.flatten(1), add)
        if symmetric:
            _mirror(out, o, o_a, i_a)
        yield [o]


class _Row(NamedTuple):
    """What belongs to one output of the first layer: ``core`` [N, o_b], ``left`` [N, i_a], ``right`` [N, i_b],
    ``jacobian`` [N, i_b], ``adjoint`` [N, o_b].
    """

    core: Tensor
    left: Tensor
    right: Tensor
    jacobian: Tensor | None
    adjoint: Tensor | None

    def alive(self) -> _Row:
        """Without the samples that contribute nothing (a ReLU switches the output off), if there are enough of them."""
        live = self.core.ne(0).any(1)
        if self.jacobian is not None:
            live |= self.jacobian.ne(0).any(1)
        index = live.nonzero()[:, 0]
        if index.numel() > ALIVE * live.numel():
            return self
        jacobian, adjoint = (None if t is None else t[index] for t in (self.jacobian, self.adjoint))
        return _Row(self.core[index], self.left[index], self.right[index], jacobian, adjoint)


def layers_share(
    out: Tensor,
    share: int,
    count: int,
    core: Tensor,
    left: Tensor,
    right: Tensor,
    *path: Tensor,
    symmetric: bool = False,
) -> Iterator[slice]:
    """One of ``count`` shares of :func:`write_layers`: some outputs of the first layer; yields the rows written."""
    o, i = core.shape[1], left.shape[1]
    if i == 1 or right.shape[1] == 1:
        if share == 0:
            write_layers(out, core, left, right, *path, symmetric=symmetric)
            yield slice(0, o * i)
        return
    # Later outputs of a symmetric block have less to do; others lie side by side, for who copies the rows elsewhere.
    mine = range(share, o, count) if symmetric else range(o * share // count, o * (share + 1) // count)
    for group in _written(out, mine, core, left, right, *path, symmetric=symmetric, add=False):
        if symmetric:
            yield from (slice(k * i, (k + 1) * i) for k in group)
        else:
            yield slice(group[0] * i, (group[-1] + 1) * i)


def _write_bias(
    out: Tensor, core: Tensor, left: Tensor, right: Tensor, jacobian: Tensor | None, adjoint: Tensor | None, add: bool
) -> None:
    """A bias on either side: its input is a one, and each term is a single product."""
    n, o_a, o_b = core.shape
    i_a, i_b = left.shape[1], right.shape[1]
    if i_a == 1:
        flat, each = core.reshape(n, -1), right * left
        product = each.T @ flat if i_b == 1 else flat.T @ each  # a single row reads the cores where they lie
        block = product.reshape(o_a, o_b, i_b)
        if jacobian is not None and adjoint is not None:
            path = jacobian.reshape(n, -1).T @ (adjoint * left)  # [(o, i'), o']
            block = block + path.reshape(o_a, i_b, o_b).transpose(1, 2)
        block = block.reshape(o_a, o_b * i_b)
    else:
        weights = left * right
        if jacobian is not None and adjoint is not None:
            core, weights = core * right.unsqueeze(2) + jacobian * adjoint.unsqueeze(1), left
        block = (weights.T @ core.reshape(n, -1)).reshape(i_a, o_a, o_b).transpose(0, 1).reshape(o_a * i_a, o_b)
    if add:
        out += block
    else:
        out.copy_(block)


def _product(target: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    if add:
        target.addmm_(a, b)
    else:
        torch.mm(a, b, out=target)


def _mirror(out: Tensor, k: int, o: int, i: int) -> None:
    """Copy the sub-blocks (k, o') with o' > k to (o', k): each is symmetric, so no transpose is needed."""
    grid = split(out, (o, i), (o, i))
    grid[k + 1 :, :, k] = grid[k, :, k + 1 :].transpose(0, 1)
