"""A symmetric matrix written out from its blocks, by several threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from threading import Event

from torch import Tensor

from dagh._block_base import Block, copy_transposed, writers
from dagh._blocktables import Pair
from dagh._workers import Stopped, divide, side_by_side


def write_out(blocks: Mapping[Pair, Block], slices: Sequence[slice], out: Tensor) -> None:
    """Fill ``out`` [(N,) P, P] with the blocks ``i <= j`` and their mirror images; ``slices``: each parameter's rows.

    A block that is more than its share of the whole is written by all threads together, the others by one each.
    """
    count = writers(out)
    entries = {pair: block.dense_numel * (1 if pair[0] == pair[1] else 2) for pair, block in blocks.items()}
    large = [pair for pair, size in entries.items() if count > 1 and 2 * count * size > out.numel()]
    groups = divide([pair for pair in blocks if pair not in large], lambda pair: entries[pair], count)
    groups += [[]] * (count - len(groups))

    def write(share: int, pairs: Sequence[Pair], enough: Event) -> None:
        for i, j in large:
            target, mirror = out[..., slices[i], slices[j]], out[..., slices[j], slices[i]]
            for rows in blocks[i, j].write_share(target, share, count):
                if i != j:
                    copy_transposed(mirror[..., rows], target[..., rows, :])
                if enough.is_set():
                    raise Stopped
        for i, j in pairs:
            if enough.is_set():
                raise Stopped
            target = out[..., slices[i], slices[j]]
            blocks[i, j].write_into(target)
            if i != j:
                copy_transposed(out[..., slices[j], slices[i]], target)

    side_by_side([partial(write, share, group) for share, group in enumerate(groups)])
