"""Element-wise operations of two arguments, with broadcasting."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dagh._bundles import Picked
from dagh._ir import Node
from dagh._rules._axes import align, bundle, flat, product_onto, unbroadcast
from dagh._rules._base import Call, KinkSites, Rule, Tangents, Ties, register_rule, two_sided


def _times(t: Tensor, factor: Tensor | float) -> Tensor:
    return t if isinstance(factor, float) and factor == 1.0 else t * factor


class _Binary(Rule):
    """Two broadcast tensors, or a tensor and a number."""

    acts_per = "element"

    def value(self, node: Node, xs: list[Tensor], kink: Any = None) -> Tensor:
        return node.call([align(x, 1, len(node.shape)) for x in xs])

    def _operands(self, call: Call) -> tuple[Tensor | float, Tensor | float]:
        rank = len(call.node.shape)

        def one(name: str) -> Tensor | float:
            t = call.tensor(name)
            return float(call.arg(name)) if t is None else bundle(align(t, 1, rank))

        first = next(iter(call.node.bound))
        return one(first), one("other")

    def _positions(self, node: Node) -> tuple[int | None, int | None]:
        return node.slot(next(iter(node.bound))), node.slot("other")

    def _tangents(self, call: Call, tangents: Tangents) -> tuple[Tensor | None, Tensor | None]:
        rank = len(call.node.shape)
        a, b = self._positions(call.node)

        def one(slot: int | None) -> Tensor | None:
            t = None if slot is None else tangents.get(slot)
            return None if t is None else align(t, 2, rank)

        return one(a), one(b)

    def partials(self, call: Call) -> tuple[Tensor | float, Tensor | float]:
        """``∂f/∂first`` and ``∂f/∂other``, broadcastable against bundles."""
        raise NotImplementedError

    def seconds(self, call: Call) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
        """``f_aa``, ``f_ab``, ``f_bb``, broadcastable against bundles."""
        return 0.0, 0.0, 0.0

    def scaling(self, call: Call, arg: int) -> Tensor | float | None:
        node = call.node
        if node.inputs[arg].shape != node.shape:
            return None
        return self.partials(call)[0 if arg == self._positions(node)[0] else 1]

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        ta, tb = self._tangents(call, tangents)
        da, db = self.partials(call)
        terms = [_times(t, d) for t, d in ((ta, da), (tb, db)) if t is not None]
        total = terms[0] if len(terms) == 1 else terms[0] + terms[1]
        lead = total.shape[:2]
        return total.expand(*lead, *call.node.shape)

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        partial = self.partials(call)[0 if arg == self._positions(call.node)[0] else 1]
        return product_onto(cotangent, partial, call.node.inputs[arg].shape)

    def vjp_picked(self, call: Call, cotangent: Picked, arg: int, keep: bool) -> Tensor | None:
        shape, rank = call.node.inputs[arg].shape, len(call.node.shape)
        aligned = torch.Size([1] * (rank - len(shape)) + list(shape))
        if aligned[2:].numel() > 1:
            return None
        row = cotangent.by(self.partials(call)[0 if arg == self._positions(call.node)[0] else 1])
        found = product_onto(row.base, row.factor, torch.Size([*aligned[:2], 1]))
        return found.reshape(*found.shape[:2], *shape)

    def curvature(
        self, call: Call, adjoint: Tensor, tangents: Tangents, args: Iterable[int], keep: bool
    ) -> dict[int, Tensor]:
        aa, ab, bb = self.seconds(call)
        ta, tb = self._tangents(call, tangents)
        a, b = self._positions(call.node)
        delta = bundle(adjoint)
        out: dict[int, Tensor] = {}
        for arg in args:
            own, cross = (aa, ab) if arg == a else (bb, ab)
            mine, other = (ta, tb) if arg == a else (tb, ta)
            terms = [
                delta * _times(t, c)
                for t, c in ((mine, own), (other, cross))
                if t is not None and not (isinstance(c, float) and c == 0.0)
            ]
            if terms:
                total = terms[0] if len(terms) == 1 else terms[0] + terms[1]
                out[arg] = unbroadcast(total, 2, call.node.inputs[arg].shape)
        assert a is not None or b is not None
        return out


@register_rule("aten.add", "aten.sub")
class Add(_Binary):
    """Sum or difference, ``alpha`` included."""

    derivative = "linear"

    def partials(self, call: Call) -> tuple[Tensor | float, Tensor | float]:
        alpha = float(call.arg("alpha") if call.arg("alpha") is not None else 1)
        return 1.0, -alpha if call.node.operation.startswith("sub") else alpha


@register_rule("aten.mul")
class Mul(_Binary):
    """Element-wise product."""

    derivative = "bilinear"

    def curved(self, node: Node) -> bool:
        return len(node.inputs) == 2

    def pairs(self, node: Node) -> set[tuple[int, int]]:
        return {(0, 1), (1, 0)} if len(node.inputs) == 2 else set()

    def partials(self, call: Call) -> tuple[Tensor | float, Tensor | float]:
        a, b = self._operands(call)
        return b, a

    def seconds(self, call: Call) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
        return 0.0, 1.0, 0.0


@register_rule("aten.div.Tensor", "aten.div.Scalar")
class Div(_Binary):
    """Element-wise quotient (true division)."""

    derivative = "elementwise"

    def curved(self, node: Node) -> bool:
        return node.slot("other") is not None

    def partials(self, call: Call) -> tuple[Tensor | float, Tensor | float]:
        a, b = self._operands(call)
        return 1 / b, -a / (b * b)

    def seconds(self, call: Call) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
        a, b = self._operands(call)
        return 0.0, -1 / (b * b), 2 * a / (b * b * b)


@cache
def _share(op: Any) -> float:
    """Weight that PyTorch gives to the second of two equal arguments: asked of it."""
    with torch.enable_grad():
        other = torch.ones(1, requires_grad=True, device="cpu")
        (slope,) = torch.autograd.grad(op(torch.ones(1, device="cpu"), other).sum(), other)
    return float(slope)


def at_least(input: Tensor, other: Tensor) -> Tensor:
    """``clamp_min`` between tensors: at a tie PyTorch does not share as ``maximum`` does."""
    return torch.clamp_min(input, other)


def at_most(input: Tensor, other: Tensor) -> Tensor:
    """``clamp_max`` between tensors."""
    return torch.clamp_max(input, other)


@register_rule("aten.maximum", "aten.minimum", "aten.fmax", "aten.fmin", "dagh.at_least", "dagh.at_most")
class Extremum(_Binary):
    """Larger or smaller of two tensors; on ties λ gives the weight of ``other``."""

    derivative = "kinked"
    takes_choice = True

    def curved(self, node: Node) -> bool:
        return False

    def _sign(self, node: Node) -> float:
        return 1.0 if "max" in node.operation or node.operation == "at_least" else -1.0

    def _weight(self, call: Call) -> Tensor:
        a, b = (align(x, 1, len(call.node.shape)) for x in call.xs)
        sign = self._sign(call.node)
        other = ((b - a) * sign > 0).to(call.out.dtype)
        if isinstance(call.kink, Tensor):
            share = call.kink.masked_fill(call.kink.isnan(), _share(call.node.op))
            return torch.where(a == b, share, other)
        lam = _share(call.node.op) if call.kink is None else float(call.kink)
        return other.masked_fill(a == b, lam)

    def partials(self, call: Call) -> tuple[Tensor | float, Tensor | float]:
        w = bundle(self._weight(call))
        return 1 - w, w

    def kinks(self, call: Call) -> KinkSites | None:
        a, b = (align(x, 1, len(call.node.shape)) for x in call.xs)
        return KinkSites(flat((a - b).abs()))

    def ties(self, call: Call) -> Ties | None:
        node = call.node
        if len(call.xs) < 2 or node.inputs[0] is node.inputs[1]:
            return None
        a, b = (align(x, 1, len(node.shape)) for x in call.xs)
        where = flat((a == b).expand(call.out.shape)).nonzero()
        if len(where) == 0:
            return None
        sample, element = where[:, 0], where[:, 1]
        places = []
        for parent in node.inputs:
            grid = torch.arange(parent.numel, device=element.device).reshape(parent.shape)
            places.append(align(grid, 0, len(node.shape)).expand(node.shape).flatten()[element])
        none, place = torch.zeros_like(element), torch.stack(places, 1)
        return Ties(
            sample, element, (0, 1), place, torch.ones_like(place, dtype=torch.bool),
            none.to(call.out.dtype), none.bool(), self._sign(node),
        )  # fmt: skip


@register_rule("aten.prelu")
class PReLU(Rule):
    """``x`` where positive, ``w x`` elsewhere; ``w`` is one number or one per channel (axis 1)."""

    derivative = "kinked"
    takes_choice = True
    acts_per = "channel"

    def _weight(self, call: Call) -> Tensor:
        w, rank = call.xs[1], len(call.node.shape)
        if w.shape[-1] == 1 or rank < 2:
            return w.reshape(w.shape[0], *([1] * rank))
        return w.reshape(w.shape[0], 1, -1, *([1] * (rank - 2)))

    def _spread(self, call: Call, t: Tensor) -> Tensor:
        """A bundle of weight tangents, broadcastable against bundles of the output."""
        rank = len(call.node.shape)
        if t.shape[-1] == 1 or rank < 2:
            return t.reshape(*t.shape[:2], *([1] * rank))
        return t.reshape(*t.shape[:2], 1, -1, *([1] * (rank - 2)))

    def _collect(self, call: Call, t: Tensor) -> Tensor:
        """Sum a bundle of the output's shape onto the weight's shape."""
        if call.node.inputs[1].numel == 1 or len(call.node.shape) < 2:
            return t.flatten(2).sum(2, keepdim=True)
        return t.movedim(3, 2).flatten(3).sum(3)

    def _slope(self, call: Call) -> tuple[Tensor, Tensor]:
        """Derivatives of ``x ↦ prelu(x)`` and of that slope with respect to ``w``."""

        def compute() -> tuple[Tensor, Tensor]:
            x, w = call.xs[0], self._weight(call)
            right = (x > 0).to(x.dtype)
            if isinstance(call.kink, Tensor):
                right = torch.where((x == 0) & ~call.kink.isnan(), call.kink, right)
            elif call.kink is not None:
                right = right.masked_fill(x == 0, float(call.kink))
            return right + (1 - right) * w, 1 - right

        pair: tuple[Tensor, Tensor] = call.once("slope", compute)
        return pair

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        terms = []
        if 0 in tangents:
            terms.append(tangents[0] * bundle(self._slope(call)[0]))
        if 1 in tangents:
            terms.append(self._spread(call, tangents[1]) * bundle(call.xs[0].clamp(max=0)))
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        if arg == 0:
            return cotangent * bundle(self._slope(call)[0])
        return self._collect(call, cotangent * bundle(call.xs[0].clamp(max=0)))

    def curvature(
        self, call: Call, adjoint: Tensor, tangents: Tangents, args: Iterable[int], keep: bool
    ) -> dict[int, Tensor]:
        factor, out = bundle(adjoint * self._slope(call)[1]), {}
        for arg in args:
            if arg == 0 and 1 in tangents:
                out[0] = factor * self._spread(call, tangents[1])
            if arg == 1 and 0 in tangents:
                out[1] = self._collect(call, factor * tangents[0])
        return out

    def kinks(self, call: Call) -> KinkSites | None:
        return KinkSites(flat(call.xs[0].abs()))

    def ties(self, call: Call) -> Ties | None:
        return two_sided(call.xs[0] == 0, 0.0, self._weight(call).expand(call.xs[0].shape) == 1)
