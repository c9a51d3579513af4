"""Sums of Kronecker products written out by products over the samples, for many pairs of outputs at once.

The products ``x_a[i] x_b[i']`` of a sample's inputs are formed once; the block is then a matrix product of the cores
and those, ``[pairs of outputs, N] · [N, pairs of inputs]``, interleaved while it is copied. On the diagonal both kinds
of pairs are symmetric: a quarter of the products is enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from dagh._chunks import ranges

#: Entries of a product, which should stay in the cache until they are copied, and its rows at least and at most.
_PRODUCT, _ROWS = 1 << 20, (64, 256)
#: Entries gathered from packed pairs at once.
_GATHERED = 1 << 18
#: Pairs of outputs below which forming the pairs of inputs costs more than it saves.
_FEWEST = 256
#: Entries that pairs of inputs may take in each thread: so many, or this share of the block, but not more than that.
_SMALL, _SHARE, _LARGEST = 1 << 20, 1 / 48, 1 << 24
#: Inputs of a layer above which gathering from packed pairs costs more than the products that it saves.
_WIDEST = 256
#: With a smaller share of (sample, output) that contributes, going through the samples output by output is cheaper.
ALIVE = 0.85


def fit(n: int, left: tuple[int, int], right: tuple[int, int], *, symmetric: bool) -> bool:
    """Whether a block of these sizes (``n`` terms, outputs and inputs on both sides) is better written by pairs."""
    pairs = left[1] * (left[1] + 1) // 2 if symmetric else left[1] * right[1]
    room = min(_LARGEST, max(_SMALL, int(_SHARE * left[0] * left[1] * right[0] * right[1])))
    return left[0] * right[0] >= _FEWEST and n * pairs <= room and not (symmetric and left[1] > _WIDEST)


def multiply_adds(n: int, left: tuple[int, int], right: tuple[int, int], *, symmetric: bool) -> int:
    """What writing out such a block takes if all terms contribute."""
    (o, i), whole = left, n * left[0] * left[1] * right[0] * right[1]
    if not symmetric:
        return whole
    return n * (o * (o + 1) // 2) * (i * (i + 1) // 2) if fit(n, left, right, symmetric=True) else whole // 2


def split(out: Tensor, left: tuple[int, int], right: tuple[int, int]) -> Tensor:
    """A view ``[o_a, i_a, o_b, i_b]`` of a block ``[p_a, p_b]`` with any strides."""
    row, column = out.stride()
    strides = left[1] * row, row, right[1] * column, column
    return out.as_strided((*left, *right), strides, out.storage_offset())


class Pairs:
    """``core`` [N, o_a, o_b], ``left`` [N, i_a], ``right`` [N, i_b].

    ``symmetric``: ``left`` is ``right``, and every core is symmetric.
    """

    def __init__(self, core: Tensor, left: Tensor, right: Tensor, *, symmetric: bool) -> None:
        self.core, self.symmetric = core, symmetric
        (n, i), j = left.shape, right.shape[1]
        self.inputs = i, j
        if not symmetric:
            self.products = (left[:, :, None] * right[:, None, :]).flatten(1)
            return
        self.products = left.new_empty(n, i * (i + 1) // 2)
        self.places = torch.empty(i, i, dtype=torch.long, device=core.device)
        at = 0
        for k in range(i):  # (k, k), (k, k + 1), …
            mine = slice(at, at + i - k)
            torch.mul(left[:, k:], left[:, k, None], out=self.products[:, mine])
            self.places[k, k:] = self.places[k:, k] = torch.arange(mine.start, mine.stop, device=core.device)
            at = mine.stop

    @staticmethod
    def pay(core: Tensor, left: Tensor, right: Tensor, *, symmetric: bool) -> bool:
        """Whether this is the faster way to write a block."""
        n, o_a, o_b = core.shape
        if not fit(n, (o_a, left.shape[1]), (o_b, right.shape[1]), symmetric=symmetric):
            return False
        return float(core.ne(0).any(2).float().mean()) > ALIVE

    def write(self, out: Tensor, outputs: Iterable[int], add: bool) -> Iterator[list[int]]:
        """Fill (or ``add`` to) the rows of some ``outputs`` of the first layer; yields those that are done.

        Where the block is symmetric, only columns from the same output on, and their mirror images.
        """
        (o_a, o_b), (i_a, i_b) = self.core.shape[1:], self.inputs
        grid = split(out, (o_a, i_a), (o_b, i_b))
        # Fresh memory once, not for every group.
        product = self.products.new_empty(self._rows() + o_b, self.products.shape[1])
        room = self.products.new_empty(max(1, _GATHERED // (i_a * i_b)) if self.symmetric else 0, i_a * i_b)
        for group in self._groups(outputs):
            cores = torch.cat([self.core[:, o, self._first(o) :] for o in group], 1)
            torch.mm(cores.T, self.products, out=product[: cores.shape[1]])
            at = 0
            for o in group:
                first = self._first(o)
                rows = product[at : at + o_b - first]
                at += len(rows)
                if not self.symmetric:
                    block = rows.view(o_b, i_a, i_b).transpose(0, 1)
                    if add:
                        grid[o] += block
                    else:
                        grid[o] = block
                    continue
                for part in ranges(len(rows), len(room)):
                    found = room[: part.stop - part.start]
                    torch.index_select(rows[part], 1, self.places.flatten(), out=found)
                    squares, others = found.view(-1, i_a, i_b), slice(first + part.start, first + part.stop)
                    grid[o, :, others] = squares.transpose(0, 1)
                    grid[others, :, o] = squares
            yield group

    def _first(self, o: int) -> int:
        """The first output of the second layer that is multiplied with output ``o``."""
        return o if self.symmetric else 0

    def _rows(self) -> int:
        """Of a product, unless one output has more."""
        least, most = _ROWS
        return min(most, max(least, _PRODUCT // self.products.shape[1]))

    def _groups(self, outputs: Iterable[int]) -> Iterator[list[int]]:
        """Outputs with about as many pairs as belong into one product."""
        group, rows = list[int](), 0
        for o in outputs:
            group.append(o)
            rows += self.core.shape[2] - self._first(o)
            if rows >= self._rows():
                yield group
                group, rows = [], 0
        if group:
            yield group
