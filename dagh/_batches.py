"""Data in batches: one batch, or anything that can be iterated over again and again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dagh._capture import batch_size, some_samples
from dagh._inputs import normalize_inputs
from dagh._layout import cut
from dagh.errors import DataError

if TYPE_CHECKING:
    from dagh._graph import Graph

Pair = tuple[Any, Any]

#: Directions that samples are projected on, and numbers projected at once.
_PROJECTIONS, _CHUNK = 3, 4096


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

    Every pass must see the same samples, in any order and any batches. That is checked by their number and by sums over
    samples of functions of all numbers of a sample, inputs and targets together (:class:`Mark`).
    """

    def __init__(self, source: Iterable[Any], device: torch.device, *, single: bool) -> None:
        self._source, self._device, self.single = source, device, single
        self.limit: int | None = None
        #: knows which inputs carry samples; of those given by ``renewed``
        self._graph: Graph | None = None
        #: whether the piece last given out is the whole of the data, as it was given
        self.whole = False
        self._seen: tuple[int, Mark] | None = None
        self._begun: Iterator[Any] | None = None

    def first(self) -> Pair:
        """The first batch, e.g. to trace with. Raises :class:`~dagh.errors.DataError` where there is none.

        The next pass goes on from there, so that an iterable that gives its data only once does not lose a batch.
        """
        rest = iter(self._source)
        for batch in rest:
            self._begun = chain([batch], rest)
            return self._pair(batch)
        raise DataError("the loader gives no batch")

    def __iter__(self) -> Iterator[Pair]:
        """One pass. Raises :class:`~dagh.errors.DataError` where it is not the same data as the last one."""
        assert self._graph is not None  # passes go over what ``renewed`` gave
        count, mark = 0, Mark()
        begun, self._begun = self._begun, None
        for batch in self._source if begun is None else begun:
            inputs, targets = self._pair(batch)
            args, kwargs = normalize_inputs(inputs, self._graph.model)
            n = batch_size(args, kwargs)
            count += n
            mark.add((inputs, targets), n)
            step = n if self.limit is None else max(1, min(self.limit, n))
            self.whole = self.single and step >= n
            for start in range(0, max(n, 1), max(step, 1)):
                if step >= n:
                    yield inputs, targets
                    continue
                # What belongs to all samples stays whole, also where it happens to be as long.
                window = slice(start, start + step)
                some, named = cut(args, kwargs, self._graph._rows, window)
                yield named or some, some_samples(targets, n, window)
        self._compare(count, mark)

    def renewed(self, graph: Graph) -> Batches:
        """The same source, for a graph: one batch as it is now, a loader that must go on giving the same data."""
        made = Batches(self._source, self._device, single=self.single)
        made._begun, self._begun = self._begun, None
        made._seen, made._graph = None if self.single else self._seen, graph
        return made

    def _pair(self, batch: Any) -> Pair:
        if self.single:
            inputs, targets = batch
            return inputs, targets
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise DataError(f"every batch of a loader must be a pair (inputs, targets), not {_describe(batch)}")
        inputs, targets = pytree.tree_map(lambda t: t.to(self._device) if isinstance(t, Tensor) else t, tuple(batch))
        return inputs, targets

    def _compare(self, count: int, mark: Mark) -> None:
        if count == 0 and self._seen is None:
            raise DataError("the loader gives no samples")
        if self._seen is None:
            self._seen = count, mark
            return
        before, other = self._seen
        if count == 0:
            raise DataError(f"the loader gave {before} samples in its first pass and none in this one")
        if before != count:
            raise DataError(f"the loader gave {before} samples in its first pass and {count} in this one")
        if not mark.agrees(other):
            if self.single:
                raise DataError("the batch has changed since the operator was made; call op.update()")
            raise DataError(
                "the loader gives other data on every pass (random augmentation, or a sampler with replacement?); "
                "an operator needs the same samples each time, in any order"
            )


class Mark:
    """Sums over samples that tell sets of samples apart, whatever their order and their batches.

    Each sample is projected on fixed random directions, its inputs and targets together, and the projections and their
    squares are added up. Numbers enter as ``arsinh x``, so that small ones are seen beside large ones.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(3, _PROJECTIONS, dtype=torch.float64, device="cpu")
        #: relative: sums over samples depend on their order, and single precision may on the batch
        self.tolerance = 1e-9

    def add(self, batch: Any, n: int) -> None:
        """The ``n`` samples of a batch. A tensor that has not ``n`` rows belongs to each of them."""
        total = torch.ones(max(n, 1), _PROJECTIONS, dtype=torch.float64, device="cpu")
        for k, t in enumerate(pytree.tree_leaves(batch)):
            if not isinstance(t, Tensor) or not t.numel():
                continue
            x = t.detach()
            if x.is_floating_point() and x.dtype != torch.float64:
                self.tolerance = 1e-7
            x = torch.view_as_real(x) if x.is_complex() else x
            x = x.reshape(n, -1) if x.dim() and x.shape[0] == n else x.reshape(1, -1)
            for start in range(0, x.shape[1], _CHUNK):
                part = x[:, start : start + _CHUNK].double().nan_to_num(nan=math.pi, posinf=1e300, neginf=-1e300)
                directions = _directions(k, start // _CHUNK)[: part.shape[1]].to(part.device)
                total = total + (torch.asinh(part) @ directions).cpu()
        self.sums += torch.stack([total.sum(0), total.square().sum(0), total.abs().sum(0)])

    def agrees(self, other: Mark) -> bool:
        """Whether both are of the same samples."""
        tolerance = max(self.tolerance, other.tolerance)
        allowed = tolerance * torch.stack([self.sums[2], self.sums[1]])
        return bool(((self.sums[:2] - other.sums[:2]).abs() <= allowed).all())


@lru_cache(maxsize=64)
def _directions(leaf: int, chunk: int) -> Tensor:
    """A fixed random matrix for some numbers of one tensor of a batch."""
    generator = torch.Generator().manual_seed(1_000_003 * leaf + chunk)
    return torch.randn(_CHUNK, _PROJECTIONS, generator=generator, dtype=torch.float64, device="cpu")


def _describe(batch: Any) -> str:
    size = f" of {len(batch)}" if isinstance(batch, (tuple, list, dict)) else ""
    return f"a {type(batch).__name__}{size}"
