"""Comparisons, signs and roundings: steps, constant except at thresholds, through which no derivative flows.

A kink may be written with them (``torch.where(x > 0, x, 0.1 * x)``, ``x * (x > 0)``, ``x * x.sign()``), and so may a
jump. A *tie* is an element at its threshold; forcing a branch there puts the value of that side in its place, and
everything computed from it is computed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dagh._ir import Node
from dagh._rules._axes import align, flat
from dagh._rules._base import Call, KinkSites, Rule, Tangents, Ties, register_rule, two_sided

#: Value on the left and on the right of a threshold, where the argument stands at one.
Levels = Callable[[Tensor], tuple[Tensor, Tensor]]


class Switch(Rule):
    """A step: piecewise constant, its thresholds seen as ties."""

    derivative = "kinked"
    acts_per = "element"

    def curved(self, node: Node) -> bool:
        return False

    def pairs(self, node: Node) -> set[tuple[int, int]]:
        return set()

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        t = next(iter(tangents.values()))
        n = max(t.shape[0], call.out.shape[0])
        return t.new_zeros(n, t.shape[1], *call.node.shape)

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        return cotangent.new_zeros(*cotangent.shape[:2], *call.node.inputs[arg].shape)

    def curvature(
        self, call: Call, adjoint: Tensor, tangents: Tangents, args: Iterable[int], keep: bool
    ) -> dict[int, Tensor]:
        return {}

    def tied(self, call: Call) -> Tensor:
        """``[N, *shape]``: elements at a threshold."""
        raise NotImplementedError

    def settled(self, call: Call) -> Tensor:
        return ~self.tied(call)


def _right(operation: str, right: bool) -> bool:
    """Value of a comparison where its first argument is the larger (``right``) or the smaller one."""
    return {"gt": right, "ge": right, "lt": not right, "le": not right, "eq": False, "ne": True}[operation]


class Comparison(Switch):
    """A comparison: a tie where both sides are equal, between the first argument above and below the second."""

    def value(self, node: Node, xs: list[Tensor], kink: Any = None) -> Tensor:
        return node.call([align(x, 1, len(node.shape)) for x in xs])

    def _sides(self, call: Call) -> tuple[Tensor, Tensor | float]:
        a = align(call.xs[0], 1, len(call.node.shape))
        return a, align(call.xs[1], 1, len(call.node.shape)) if len(call.xs) > 1 else call.arg("other")

    def _gap(self, call: Call) -> Tensor | None:
        if not any(p.dtype.is_floating_point for p in call.node.inputs):
            return None
        if len(call.xs) > 1 and call.node.inputs[0] is call.node.inputs[1]:
            return None
        a, b = self._sides(call)
        return (a - b).expand(call.out.shape)

    def tied(self, call: Call) -> Tensor:
        gap = self._gap(call)
        return torch.zeros_like(call.out, dtype=torch.bool) if gap is None else gap == 0

    def kinks(self, call: Call) -> KinkSites | None:
        gap = self._gap(call)
        return None if gap is None else KinkSites(flat(gap.abs()))

    def ties(self, call: Call) -> Ties | None:
        node, at = call.node, self.tied(call)
        left, right = (_right(node.operation, side) for side in (False, True))
        where = flat(at).nonzero()
        if len(where) == 0:
            return None
        element = where[:, 1]
        levels = call.xs[0].new_tensor([left, right], dtype=torch.float64).expand(len(element), 2)
        if len(call.xs) == 1:
            ties = two_sided(at, float(call.arg("other")), False)
            assert ties is not None
            ties.levels = levels
            return ties
        places = []
        for parent in (node.inputs[1], node.inputs[0]):
            grid = torch.arange(parent.numel, device=element.device).reshape(parent.shape)
            places.append(align(grid, 0, len(node.shape)).expand(node.shape).flatten()[element])
        place, none = torch.stack(places, 1), torch.zeros_like(element)
        return Ties(
            where[:, 0], element, (1, 0), place, torch.ones_like(place, dtype=torch.bool), none.double(), none.bool(),
            levels=levels,
        )  # fmt: skip


class Step(Switch):
    """A function of one tensor that jumps: ``kind`` of thresholds and the values beside them."""

    def __init__(self, threshold: Callable[[Tensor], Tensor], levels: Levels) -> None:
        self.threshold, self.levels = threshold, levels

    def value(self, node: Node, xs: list[Tensor], kink: Any = None) -> Tensor:
        return node.call(xs)

    def _plain(self, call: Call) -> bool:
        return call.arg("rounding_mode") is None and not call.arg("decimals")

    def tied(self, call: Call) -> Tensor:
        x = call.xs[0]
        return (self.threshold(x) == x) if self._plain(call) else torch.zeros_like(x, dtype=torch.bool)

    def kinks(self, call: Call) -> KinkSites | None:
        x = call.xs[0]
        return KinkSites(flat((x - self.threshold(x)).abs())) if self._plain(call) else None

    def ties(self, call: Call) -> Ties | None:
        x = call.xs[0]
        ties = two_sided(self.tied(call), x, False)
        if ties is not None:
            at = flat(x)[ties.sample, ties.element]
            ties.levels = torch.stack(self.levels(at), 1).double()
        return ties


def _zero(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def _nonzero_integer(x: Tensor) -> Tensor:
    """The integer but 0 that is nearest to x (truncation does nothing at 0)."""
    return torch.where(x.abs() < 0.5, torch.where(x < 0, -1.0, 1.0).to(x), x.round())


for _name in ("gt", "ge", "lt", "le", "eq", "ne"):
    register_rule(f"aten.{_name}.Scalar", f"aten.{_name}.Tensor")(Comparison())
register_rule("aten.sign", "aten.sgn")(Step(_zero, lambda x: (x - 1, x + 1)))
register_rule("aten.floor")(Step(torch.round, lambda x: (x - 1, x)))
register_rule("aten.ceil")(Step(torch.round, lambda x: (x, x + 1)))
register_rule("aten.round")(Step(lambda x: x.floor() + 0.5, lambda x: (x.floor(), x.ceil())))
register_rule("aten.trunc", "aten.fix")(
    Step(_nonzero_integer, lambda x: (torch.where(x > 0, x - 1, x), torch.where(x > 0, x, x + 1)))
)
