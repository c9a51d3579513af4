"""A leaf's block with itself from its tangents alone: ``H = Σ_u T_uᵀ M_u T_u`` over the curved nodes u.

Where a leaf has few entries (the kernel of a first convolution), these products cost less than the way back from every
curved node, and they are matrix products. ``M_u`` acts on each argument's tangents as in a sweep back; at a bridge it
is the bridge's own rows.
"""

from __future__ import annotations

from torch import Tensor

from dagh import _memory, _sweep
from dagh._bridge import Crossing, cross, seeds
from dagh._bundles import Scaled, Tangents
from dagh._chunks import ranges
from dagh._ir import Node
from dagh._plan_sweeps import Column
from dagh._state import State

#: Directions whose products with all later ones are taken at once: the rest of the square is the mirror image.
_PANEL = 64
#: Elements of an intermediate result that stays in the cache.
_PIECE = 1 << 19
#: Numbers per sample from which the products of single samples are large enough.
_LARGE = 1 << 15


def add_square(
    total: Tensor, state: State, column: Column, crossing: Crossing | None, at_once: int, tight: bool
) -> None:
    """Add the block of the column's leaf with itself to ``total`` ``[D, D]``, which is symmetric.

    Summed over samples, of which ``at_once`` are looked at together; ``tight``: freed memory is given back in between.
    """
    found = _Square(column, total)
    if crossing is not None and crossing.node not in crossing.rows:  # nothing comes back from there
        crossing = None
    within = column.within
    if column.folded:  # no further than to the curved nodes
        within = within & state.program.ancestors([p for u in column.curved for p in u.inputs])
    for part in ranges(state.samples, at_once):
        some = state.narrow(part)
        start = {column.seed: seeds(some, column, slice(0, column.width))}
        tangents = _sweep.push_forward(some, start, within, column.held, channelwise=column.copies > 1)
        del start
        for u in column.curved:
            delta = _some(state.adjoints[u], part) if u.batched and u in state.adjoints else some.adjoints.get(u)
            args = [i for i, p in enumerate(u.inputs) if p in tangents]
            if delta is None or not args:
                continue
            for i, row, packed in _sweep.curve(some, u, delta, tangents, args, True):
                row = row.in_order() if isinstance(row, Scaled) else row
                found.add(tangents, u.inputs[i], row, packed, some.samples)
        if crossing is not None and not column.folded:
            v = crossing.node
            rows = Tangents({v: _some(crossing.rows[v], part)}, crossing.rows.channelwise & {v})
            beyond = cross(some, column, Crossing(v, rows, Tangents({}), {}), tangents, True)
            if v in beyond:
                found.add(tangents, v, beyond[v], v in beyond.channelwise, some.samples)
        if tight:
            _memory.give_back()
    if crossing is not None and column.folded:
        _at_bridge(total, crossing, next(iter(column.targets.values())))
    found.finish()


def _at_bridge(total: Tensor, crossing: Crossing, target: Node) -> None:
    """Add ``Tᵀ M T`` to ``total``: with a target's table of tangents at a bridge, and the bridge's rows there."""
    table, v = crossing.tables[target], crossing.node
    channels, n, length, width = table.shape  # [C or 1, N, m·rest, d]
    rows = crossing.rows[v].expand(n, *crossing.rows[v].shape[1:])
    axes = (v.shape[0], channels, -1) if channels > 1 else (1, 1, -1)
    m, rest = axes[0], length // axes[0]
    rows = rows.reshape(n, m, channels, rest, m, channels, rest)
    blocks = total.view(channels, width, channels, width)
    for part in ranges(n, max(1, _PIECE // (length * width))):
        for a in range(channels):
            left = table[a, part].flatten(0, 1)
            for b in range(a, channels):  # the mirror image is as good
                between = rows[part, :, a, :, :, b].reshape(-1, length, length)
                product = left.T @ (between @ table[b, part]).flatten(0, 1)
                blocks[a, :, b] += product
                if a != b:
                    blocks[b, :, a] += product.T


def _some(t: Tensor, part: slice) -> Tensor:
    return t[part] if t.shape[0] > 1 else t


class _Square:
    """Products of tangents with rows, added up: of all directions, or of those of each channel by itself."""

    def __init__(self, column: Column, total: Tensor) -> None:
        self.copies, self.total = column.copies, total
        self.panels: dict[int, list[tuple[slice, Tensor]]] = {}

    def _panels(self, groups: int) -> list[tuple[slice, Tensor]]:
        """Upper rows of the products of all directions, or of those of each of several channels."""
        if groups not in self.panels:
            size, new = len(self.total) // groups, self.total.new_zeros
            self.panels[groups] = [(p, new(groups, p.stop - p.start, size - p.start)) for p in ranges(size, _PANEL)]
        return self.panels[groups]

    def add(self, tangents: Tangents, node: Node, rows: Tensor, packed: bool, samples: int) -> None:
        """``T_nodeᵀ rows``; ``packed``: rows are channel-diagonal."""
        rows = rows.to(self.total.dtype)  # of a part in single precision
        if not node.batched:
            samples = max(tangents[node].shape[0], rows.shape[0])
        groups = self.copies if node in tangents.channelwise else 1
        left, right = _by_channel(tangents[node].to(rows.dtype), rows, groups)
        if groups > 1 and not packed:  # each channel's tangents meet its own part of the rows
            product = left.new_zeros(self.copies, left.shape[2], right.shape[2])
            _add_products(product, left, right, samples)
            self.total += product.flatten(0, 1)
            return
        for p, panel in self._panels(groups):
            _add_products(panel, left[:, :, p], right[:, :, p.start :], samples)

    def finish(self) -> None:
        """Add the products to the total, with their mirror images."""
        total = self.total
        for groups, panels in sorted(self.panels.items()):
            size = len(total) // groups
            for p, panel in panels:
                for k in range(groups):
                    rows, later = slice(k * size + p.start, k * size + p.stop), slice(k * size + p.stop, (k + 1) * size)
                    total[rows, rows] += panel[k, :, : p.stop - p.start]
                    total[rows, later] += panel[k, :, p.stop - p.start :]
                    if groups == 1:
                        total[later, rows] = total[rows, later].T
                    else:
                        total[later, rows] += panel[k, :, p.stop - p.start :].T


def _by_channel(left: Tensor, right: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Bundles ``[N, B, m, C, …]`` (any shape, for one group) as ``[N, C, B, K]``, in the order of the second."""
    if groups == 1:
        left, right = left.unsqueeze(1), right.unsqueeze(1)
    else:
        left, right = left.movedim(3, 1), right.movedim(3, 1)
    strides = right.stride()
    order = sorted(range(3, right.dim()), key=lambda d: -strides[d])
    left, right = (t.permute(0, 1, 2, *order).unsqueeze(-1).flatten(3) for t in (left, right))
    return left, right


def _add_products(total: Tensor, left: Tensor, right: Tensor, samples: int) -> None:
    """Add ``Σ_n left_n right_nᵀ`` of ``[N, G, b, K]`` and ``[N, G, d, K]`` to ``total`` ``[G, b, d]``."""
    left, right = (t.expand(samples, *t.shape[1:]) for t in (left, right))
    if left.device.type == "cpu" and left[0].numel() + right[0].numel() >= _LARGE:
        for a, b in zip(left, right, strict=True):
            total.baddbmm_(a, b.mT)
        return
    left, right = (t.permute(1, 2, 0, 3).flatten(2) for t in (left, right))
    total.baddbmm_(left, right.mT)
