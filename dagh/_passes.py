"""Passes over the data of an operator: the loss linearized batch by batch, kept where it fits the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dagh import _memory
from dagh._batches import Batches
from dagh._capture import batch_size
from dagh._chunks import directions
from dagh._graph import Graph
from dagh._inputs import normalize_inputs
from dagh._linearize import Linearization, Part
from dagh._normalizer import Normalizer
from dagh._objectives import Reduction
from dagh._request import itemsize
from dagh._state import State
from dagh.errors import CoupledSamplesError, DataError, LossError

#: Numbers held per number of a sample's values: values, adjoints, what nodes keep, results held between products.
_HELD = 8
#: Numbers that one more direction needs per number of a sample's values.
_MOVING = 4


@dataclass(frozen=True)
class Linearized:
    """What one pass over all data leaves: everything that an operator has at a point."""

    batches: Batches
    point: dict[str, Tensor]
    buffers: dict[str, Tensor]
    #: the linearizations, ``None`` where they are not kept
    pieces: list[Linearization] | None
    factor: float
    loss: float
    gradient: Tensor
    samples: int
    count: int
    #: directions moved at once
    width: int


@dataclass(frozen=True)
class Passes:
    """A loss of a graph, in the parameters ``names``, ready to be linearized over batches."""

    graph: Graph
    loss: Any
    names: Sequence[str]
    part: Part
    budget: int | str | None
    options: Mapping[str, Any]

    def linearized(self, before: Batches) -> Linearized:
        """Linearize at the present parameters, on the data of ``before`` as they are now. Changes nothing else."""
        first = next(iter(self.graph.parameters.values()), None)
        allowed = _memory.budget_bytes(self.budget, torch.device("cpu") if first is None else first.device)
        per_sample = self._sample_bytes(torch.get_default_dtype() if first is None else first.dtype)
        batches = before.renewed(self.graph)
        masked = self.graph.dropout_seed is not None and self.graph.mode == "train"  # of the rows of a batch
        batches.limit = None if self.graph.coupled or masked else max(1, allowed // (2 * _HELD * per_sample))
        try:
            return self._run(batches, allowed, per_sample)
        except (CoupledSamplesError, LossError):
            if not batches.single or batches.limit is None:
                raise
            batches = before.renewed(self.graph)
            batches.limit = None  # one batch that cannot be cut
            return self._run(batches, allowed, per_sample)

    def _run(self, batches: Batches, allowed: int, per_sample: int) -> Linearized:
        point = {n: p.detach().clone() for n, p in self.graph.parameters.items()}
        buffers = {n: b.detach().clone() for n, b in self.graph.model.named_buffers()}
        pieces: list[Linearization] = []
        kept, samples, largest, count, loss, factor = True, 0, 0, 0, 0.0, 1.0
        gradient: Tensor | None = None
        normalizer: Normalizer | None = None
        for count, (inputs, targets) in enumerate(self.shown(batches, "linearizing"), 1):  # noqa: B007
            n = batch_size(*normalize_inputs(inputs, self.graph.model))
            state = self._evaluate(batches, inputs, targets)
            if not batches.whole:
                normalizer = normalizer or Normalizer(self.loss)
                if normalizer.add(state, targets, n):
                    raise _coupled("the loss couples the samples of a batch")
            samples, largest = samples + n, max(largest, n)
            kept = kept and (
                self.options["cache"] is True
                or (self.options["cache"] == "auto" and samples * per_sample * _HELD <= allowed)
            )
            piece = self._piece(state)
            loss += state.loss
            found = torch.cat([state.adjoint(leaf)[0].reshape(-1) for leaf in piece.targets])
            gradient = found if gradient is None else gradient + found
            pieces = [*pieces, piece] if kept else []
        assert gradient is not None  # there is a batch, or the pass is refused
        if normalizer is not None and self.options["reduction"] == "mean":
            factor = normalizer.factor()
        width = max(1, allowed // (2 * _MOVING * per_sample * max(1, largest)))
        width = directions(width, max(1, largest) * self._sample_bytes(gradient.dtype, max), gradient.device)
        kept_pieces = pieces if kept else None
        return Linearized(
            batches, point, buffers, kept_pieces, factor, factor * loss, factor * gradient, samples, count, width
        )

    def fresh(self, held: Linearized) -> Iterator[Linearization]:
        """The pieces made again, one at a time. Refused where parameters, buffers or data have changed since."""
        now = {**self.graph.parameters, **dict(self.graph.model.named_buffers())}
        for name, before in {**held.point, **held.buffers}.items():
            if name not in now or not torch.equal(now[name].detach(), before):
                kind = "buffer" if name in held.buffers else "parameter"
                kept = (
                    "are not kept (cache=False)" if self.options["cache"] is False else "do not fit the memory budget"
                )
                raise DataError(
                    f"{kind} {name!r} has changed since the operator was made, and its linearizations {kept}; "
                    "call op.update()"
                )
        for inputs, targets in self.shown(held.batches, "a product over", held.count):
            yield self._piece(self._evaluate(held.batches, inputs, targets))

    def _piece(self, state: State) -> Linearization:
        leaves = [state.program.parameters[name] for name in self.names]
        return Linearization(state, leaves, leaves, self.part)

    def _evaluate(self, batches: Batches, inputs: Any, targets: Any) -> State:
        lone = batches.whole
        reduction: Reduction = self.options["reduction"] if lone else "sum"
        try:
            state = self.graph.evaluate(
                self.loss, inputs, targets, reduction=reduction, kinks=self.options["kinks"], wrt=self.names
            )
        except CoupledSamplesError as error:
            if lone:
                raise
            raise _coupled(str(error)) from None
        if state.coupled and not lone:
            raise _coupled(self.graph.coupling or "the loss couples the samples of a batch")
        return state

    def shown(self, batches: Batches, what: str, total: int | None = None) -> Iterator[Any]:
        """One pass, on the terminal where progress is shown."""
        if not self.options["progress"]:
            return iter(batches)
        from rich.progress import track

        return iter(track(batches, f"{what} batches", total=total, transient=True))

    def _sample_bytes(self, dtype: torch.dtype, of: Callable[[Iterator[int]], int] = sum) -> int:
        """Bytes of all values of one sample, or of the widest ones."""
        graph = self.graph
        numbers = of(n.numel for n in graph.program if n.dtype.is_floating_point and (n.batched or n.op is not None))
        samples = batch_size(*graph._example) if graph.coupled else 1
        return max(1, numbers * itemsize(dtype) // samples)


def _coupled(reason: str) -> CoupledSamplesError:
    why = reason.removeprefix("per-sample blocks do not exist: ").partition("; use reduction")[0]
    return CoupledSamplesError(
        f"samples of a batch interact ({why}), so that the loss of several batches is not a sum over samples; "
        "give one batch"
    )
