"""What the loss of several batches is divided by, found batch by batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dagh import _objectives
from dagh._interactions import interacts
from dagh._state import State
from dagh.errors import DataError

#: Samples of every batch that meet as many of those before it.
_MEETING = 4
#: Meetings in which derivatives are looked at, too.
_LOOKED_AT = 8


class Normalizer:
    """Collects the batches' shares of a normalizer, and how the loss averages.

    A callable is asked on some samples of every batch together with some of those before: on a single sample a mean
    is a sum, and a loss may couple samples only where batches meet (a mean over all tokens that are not masked).
    """

    def __init__(self, loss: Any) -> None:
        self._loss = loss
        self._share, self._kinds, self._meetings = 0.0, set[str](), 0
        self._before: tuple[Tensor, list[Tensor]] | None = None

    def add(self, state: State, targets: Any, n: int) -> bool:
        """Take a batch of ``n`` samples into account; whether the loss couples samples."""
        objective = _objectives.resolve(self._loss)
        output = state.values[state.program.output].flatten(0, 1)
        objective = _objectives.separable(objective, output, targets, n)
        if objective.weigh is not None:
            share = float(_objectives._share(objective, output, targets).sum()) if objective.averages else 0.0
            self._take(share, "weighted" if objective.averages else "sum")
            return False
        flat, spec = _objectives.target_tensors(targets)
        some = output[:_MEETING], [t[:_MEETING] for t in flat]
        if self._before is not None:
            some = (
                torch.cat([self._before[0], some[0]]),
                [torch.cat(pair) for pair in zip(self._before[1], some[1], strict=True)],
            )
        self._before = some[0][-_MEETING:].clone(), [t[-_MEETING:].clone() for t in some[1]]
        joined = None if spec is None else pytree.tree_unflatten(some[1], spec)
        count = some[0].shape[0]
        if count == 1:
            self._take(float(n), "unknown")
            return False
        scale = _objectives.scale_of(objective, some[0], joined, count)
        if scale is None:
            return True
        self._take(float(n), "sum" if scale == 1.0 else "mean")
        self._meetings += 1
        return self._meetings <= _LOOKED_AT and interacts(objective, some[0], joined, count, scale)

    def _take(self, share: float, kind: str) -> None:
        self._share += share
        self._kinds.add(kind)

    def factor(self) -> float:
        """What the sum over batches is multiplied by for the mean over all of their samples."""
        known = self._kinds - {"unknown"}
        if known == {"sum"}:
            return 1.0
        if len(known) > 1 or self._share == 0:
            raise DataError("the loss averages over some batches and sums over others; batches must be alike")
        return 1.0 / self._share
