"""Strips: blocks column by column, from products of the linearized loss with unit vectors (forward over reverse).

The last resort: twice as many sweeps as the leaf has entries, whatever the graph looks like. They need neither the
factor of the loss, which has as many entries per sample as the output has pairs of elements, nor one row per output; a
loss over thousands of outputs with few parameters is where they win.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dagh._bridge import unit_vectors
from dagh._chunks import fitting, ranges
from dagh._linearize import Linearization, Part
from dagh._request import Pair, Request, itemsize

if TYPE_CHECKING:
    from dagh._accumulate import Accumulator
    from dagh._plan import Plan
    from dagh._state import State


@dataclass(frozen=True)
class Strip:
    """Products of the linearized loss with unit vectors of one leaf, a strip of them at a time.

    One product gives all parts that are asked for, H_O without the factor of the loss.
    """

    leaf: int
    pairs: tuple[Pair, ...]
    """(leaf, row) in that order."""
    width: int
    cost: float
    flops: float
    moved: float
    """Price, arithmetic and elements written, per sample."""
    unit: int
    """Elements held per sample and direction."""
    fixed: int
    """Elements held per sample: values, adjoints and local derivatives."""
    largest: int
    """Elements of the largest bundle per sample and direction."""
    result: int
    """Elements per direction that do not grow with the samples: the direction and its products."""

    @property
    def least(self) -> int:
        """Elements held for one direction and one sample."""
        return self.unit + self.fixed + self.result

    def window(self, samples: int, room: int, size: int) -> int:
        """Samples that are linearized at once, with ``room`` bytes for numbers of ``size`` bytes."""
        return max(1, min(samples, (room // size - self.result) // max(1, self.unit + self.fixed)))

    def step(self, samples: int, room: int, size: int) -> int:
        """Directions at once."""
        working, held = room - samples * self.fixed * size, samples * self.unit + self.result
        return fitting(self.width, working, held, max(samples * self.largest, self.result), size)


def add_strip(
    state: State,
    request: Request,
    plan: Plan,
    strip: Strip,
    parts: Mapping[str, Accumulator],
    window: slice,
    room: int,
) -> None:
    """Add the strip's blocks over the samples of ``state``, the ``window`` of the batch, to each part."""
    leaf, size = request.leaves[strip.leaf], itemsize(state.weights.dtype)
    step = strip.step(state.samples, room, size)
    for part, result, pairs in _passes(plan, strip, parts):
        targets = list(dict.fromkeys(request.leaves[row] for _, row in pairs))
        linear = Linearization(state, [leaf], targets, part)
        for columns in ranges(strip.width, step):
            chosen = torch.arange(columns.start, columns.stop, device="cpu")
            found = linear.product({leaf: unit_vectors(leaf, 1, chosen, state.weights)[0]})
            for _, row in pairs:
                if request.leaves[row] in found:
                    piece = found[request.leaves[row]].reshape(len(chosen), -1)
                    result.add(strip.leaf, row, piece.unsqueeze(0) if result.keep else piece, columns, window)


def _passes(plan: Plan, strip: Strip, parts: Mapping[str, Accumulator]) -> list[tuple[Part, Accumulator, list[Pair]]]:
    """What is multiplied out: all of H at once where its parts are added up anyway, else one part after the other."""
    if len(parts) == 2 and parts["outer"] is parts["functional"]:
        return [("full", parts["outer"], list(strip.pairs))]
    named: list[tuple[Part, str]] = [("outer", "H_O"), ("functional", "H_F")]
    passes = []
    for part, kind in named:
        pairs = [p for p in strip.pairs if kind in plan.kinds[min(p), max(p)]]
        if part in parts and pairs:
            passes.append((part, parts[part], pairs))
    return passes
