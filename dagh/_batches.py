"""Data in batches: one batch, or anything that can be iterated over again and again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dagh._capture import batch_size, some_samples
from dagh._inputs import normalize_inputs
from dagh.errors import DataError

Pair = tuple[Any, Any]


def as_batches(inputs: Any, targets: Any, device: torch.device) -> Batches:
    """One batch, or a loader of ``(inputs, targets)`` pairs.

    A tensor, a dict, or a tuple or list of tensors is one batch; every other iterable is a loader.

    Raises :class:`~dagh.errors.DataError` for iterators that can be used only once.
    """
    tensors = isinstance(inputs, (tuple, list)) and any(isinstance(x, Tensor) for x in inputs)
    if targets is not None or tensors or isinstance(inputs, (Tensor, Mapping)) or not isinstance(inputs, Iterable):
        return Batches([(inputs, targets)], device, single=True)
    if isinstance(inputs, Iterator):
        raise DataError(
            f"a {type(inputs).__name__} can be iterated over once only; every product needs another pass: "
            "give a list of batches or a DataLoader"
        )
    return Batches(inputs, device, single=False)


class Batches:
    """Batches to be read any number of times, cut into pieces of at most ``limit`` samples.

    Every pass must see the same samples, in any order. That is checked by their number and by sums over all numbers in
    them, which random augmentation does not preserve.
    """

    def __init__(self, source: Iterable[Any], device: torch.device, *, single: bool) -> None:
        self._source, self._device, self.single = source, device, single
        self.limit: int | None = None
        #: whether the piece last given out is the whole of the data, as it was given
        self.whole = False
        self._seen: tuple[int, float] | None = None

    @property
    def samples(self) -> int:
        """Samples of a whole pass (0 before the first)."""
        return self._seen[0] if self._seen else 0

    def first(self) -> Pair:
        """The first batch, e.g. to trace with. Raises :class:`~dagh.errors.DataError` where there is none."""
        for batch in self._source:
            return self._pair(batch)
        raise DataError("the loader gives no batch")

    def __iter__(self) -> Iterator[Pair]:
        """One pass. Raises :class:`~dagh.errors.DataError` where it is not the same data as the last one."""
        count, mark = 0, 0.0
        for batch in self._source:
            inputs, targets = self._pair(batch)
            args, kwargs = normalize_inputs(inputs)
            n = batch_size(args, kwargs)
            count += n
            mark += _mark((inputs, targets))
            step = n if self.limit is None else max(1, min(self.limit, n))
            self.whole = self.single and step >= n
            for start in range(0, max(n, 1), max(step, 1)):
                window = slice(start, start + step)
                yield (inputs, targets) if step >= n else some_samples((inputs, targets), n, window)
        self._compare(count, mark)

    def renew(self) -> None:
        """Take one batch as it is now; a loader must go on giving the same data."""
        if self.single:
            self._seen = None

    def _pair(self, batch: Any) -> Pair:
        if self.single:
            inputs, targets = batch
            return inputs, targets
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise DataError(f"every batch of a loader must be a pair (inputs, targets), not {_describe(batch)}")
        inputs, targets = pytree.tree_map(lambda t: t.to(self._device) if isinstance(t, Tensor) else t, tuple(batch))
        return inputs, targets

    def _compare(self, count: int, mark: float) -> None:
        if count == 0:
            raise DataError("the loader gives no samples")
        if self._seen is None:
            self._seen = count, mark
            return
        before, other = self._seen
        if before != count:
            raise DataError(f"the loader gave {before} samples in its first pass and {count} in this one")
        if not math.isclose(mark, other, rel_tol=1e-9, abs_tol=1e-9):
            if self.single:
                raise DataError("the batch has changed since the operator was made; call op.update()")
            raise DataError(
                "the loader gives other data on every pass (random augmentation, or a sampler with replacement?); "
                "an operator needs the same samples each time, in any order"
            )


def _mark(batch: Any) -> float:
    """A sum over all numbers of a batch that does not depend on the order of the samples."""
    total = 0.0
    for k, t in enumerate(pytree.tree_leaves(batch)):
        if isinstance(t, Tensor) and t.numel() and not t.dtype.is_complex:
            x = t.detach().double()
            total += (k + 1) * float((x.abs() + x.square()).sum())
    return total


def _describe(batch: Any) -> str:
    size = f" of {len(batch)}" if isinstance(batch, (tuple, list, dict)) else ""
    return f"a {type(batch).__name__}{size}"
