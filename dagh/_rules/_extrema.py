"""Maxima and minima over axes, sorting, top-k, medians: operations that copy elements of one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dagh._ir import Item, Node, fill
from dagh._rules._axes import bundle, flat
from dagh._rules._base import Call, KinkSites, Rule, Tangents, Ties, register_rule
from dagh._rules._select import copied, share_ties, tied_groups


def _flat2(t: Tensor) -> Tensor:
    """A bundle ``[N, B, *shape]`` as ``[N, B, elements]``."""
    return t.reshape(*t.shape[:2], t.shape[2:].numel())


class Selection(Rule):
    """Piecewise linear: each output copies one input, PyTorch's choice among equals."""

    derivative = "kinked"

    def curved(self, node: Node) -> bool:
        return False

    def curvature(
        self, call: Call, adjoint: Tensor, tangents: Tangents, args: Iterable[int], keep: bool
    ) -> dict[int, Tensor]:
        return {}

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        if call.kink is None:
            return super().jvp(call, tangents)
        t = _flat2(tangents[0])
        index = self._copied(call)
        n = max(t.shape[0], index.shape[0])
        picked = t.expand(n, *t.shape[1:]).gather(2, index.unsqueeze(1).expand(n, t.shape[1], -1))
        return picked.reshape(n, t.shape[1], *call.node.shape)

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        if call.kink is None:
            return super().vjp(call, cotangent, arg, keep)
        s, index = _flat2(cotangent), self._copied(call)
        n = max(s.shape[0], index.shape[0])
        out = s.new_zeros(n, s.shape[1], call.node.inputs[0].numel)
        out.scatter_add_(2, index.unsqueeze(1).expand(n, s.shape[1], -1), s.expand(n, *s.shape[1:]))
        return out.reshape(n, s.shape[1], *call.node.inputs[0].shape)

    def _copied(self, call: Call) -> Tensor:
        """Place that each element copies under the forced branches, ``[N, elements]``."""
        own, forced = self.picks(call), flat(call.kink)
        assert own is not None
        return torch.where(forced < 0, own, forced)

    def force(self, call: Call, ties: Ties, branch: Tensor) -> Tensor:
        return copied(call, ties, branch)


class Extreme(Selection):
    """The largest or smallest element over some axes; equal ones share as PyTorch does unless told otherwise."""

    takes_choice = True

    def _sign(self, node: Node) -> float:
        return -1.0 if node.operation.startswith(("amin", "min")) else 1.0

    def _axes(self, node: Node) -> list[int]:
        rank = len(node.inputs[0].shape)
        dims = node.arg("dim")
        if dims is None or dims == []:
            return list(range(rank))
        return [int(d) % rank for d in ([dims] if isinstance(dims, int) else dims)]

    def _grouped(self, node: Node, t: Tensor, lead: int) -> Tensor:
        """``t`` with the axes it is reduced over moved to the end and flattened: ``[…, rows, C]``."""
        axes = self._axes(node)
        kept = [d for d in range(len(node.inputs[0].shape)) if d not in axes]
        order = [*range(lead), *(d + lead for d in kept), *(d + lead for d in axes)]
        return t.permute(order).reshape(*t.shape[:lead], node.numel, -1)

    def _places(self, call: Call) -> Tensor:
        parent = call.node.inputs[0]
        grid = torch.arange(parent.numel, device=call.out.device).reshape(parent.shape)
        return self._grouped(call.node, grid, 0)

    def _tied(self, call: Call) -> Tensor:
        x = self._grouped(call.node, call.xs[0], 1) * self._sign(call.node)
        return x == x.amax(-1, keepdim=True)

    def _weights(self, call: Call) -> Tensor:
        def compute() -> Tensor:
            tied = self._tied(call).to(call.out.dtype)
            if not isinstance(call.kink, Tensor):
                return share_ties(tied, 2, call.kink)
            forced = flat(call.kink).unsqueeze(2)
            own = share_ties(tied, 2, _convention(call.node.op, call.node.operation))
            return torch.where(forced < 0, own, (self._places(call) == forced).to(own.dtype))

        result: Tensor = call.once("weights", compute)
        return result

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        if call.kink is None:
            return super().jvp(call, tangents)
        t = (self._grouped(call.node, tangents[0], 2) * bundle(self._weights(call))).sum(-1)
        return t.reshape(*t.shape[:2], *call.node.shape)

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        if call.kink is None:
            return super().vjp(call, cotangent, arg, keep)
        spread = (_flat2(cotangent).unsqueeze(3) * bundle(self._weights(call))).flatten(2)
        out = torch.zeros_like(spread)
        out[..., self._places(call).flatten()] = spread
        return out.reshape(*out.shape[:2], *call.node.inputs[0].shape)

    def ties(self, call: Call) -> Ties | None:
        found = tied_groups(self._tied(call), self._places(call))
        if found is None:
            return None
        sample, element, place, valid = found
        none = torch.zeros_like(element)
        level, smooth = none.to(call.out.dtype), none.bool()
        return Ties(sample, element, (0,) * place.shape[1], place, valid, level, smooth, self._sign(call.node))

    def kinks(self, call: Call) -> KinkSites | None:
        x = self._grouped(call.node, call.xs[0], 1) * self._sign(call.node)
        if x.shape[-1] < 2:
            return None
        top = x.topk(2, dim=-1).values
        return KinkSites(top[..., 0] - top[..., 1])


@cache
def _convention(op: Any, operation: str) -> str:
    """How PyTorch shares the derivative among equal elements: asked of it on three equal numbers."""
    with torch.enable_grad():
        x = torch.ones(3, requires_grad=True, device="cpu")
        dims = {"amax": ([0],), "amin": ([0],)}.get(operation, (0,) if isinstance(op, Item) else ())
        (slope,) = torch.autograd.grad(op(x, *dims).sum(), x)
    if slope[0] == 1:
        return "first"
    return "last" if slope[2] == 1 else "split"


#: Numbers that comparing every element with every other may fill, for the distances alone.
_LARGEST = 2**24


class Ordered(Selection):
    """Elements by rank or running extreme: PyTorch's choice among equals, and branches read off perturbed inputs."""

    note = "ties resolved by sampling"

    def _axis(self, node: Node) -> int:
        dim = node.arg("dim")
        return int(dim if dim is not None else -1) % max(len(node.inputs[0].shape), 1)

    def _lines(self, node: Node, t: Tensor) -> Tensor:
        """``[N, …]`` with the axis of comparison last (one flat axis for the median of everything)."""
        if node.operation in ("median", "nanmedian") and node.arg("dim") is None:
            return t.reshape(t.shape[0], -1)
        return t.movedim(1 + self._axis(node), -1) if t.dim() > 1 else t.unsqueeze(-1)

    def _own(self, call: Call) -> Tensor:
        """PyTorch's index along the axis, in the shape of the value."""
        node = call.node
        if not isinstance(node.op, Item):
            return (call.xs[0].reshape(call.out.shape[0], -1) == call.out.reshape(-1, 1)).to(torch.uint8).argmax(1)
        # One sample at a time: the axis argument counts within a sample.
        each = [
            node.op.op(*fill(node.args, [x]), **fill(dict(node.kwargs), [x]))[1] for x in call.xs[0]
        ]  # fmt: skip
        return torch.stack(each)

    def picks(self, call: Call) -> Tensor:
        node, parent = call.node, call.node.inputs[0]
        grid = torch.arange(parent.numel, device=call.out.device).reshape(1, *parent.shape)
        lines, own = self._lines(node, grid), self._own(call)
        if own.dim() == 1:
            return lines.expand(len(own), -1).gather(1, own.unsqueeze(1))
        kept = own.dim() == call.xs[0].dim()
        index = own.movedim(1 + self._axis(node), -1) if kept else own.unsqueeze(-1)
        place = lines.expand(*index.shape[:-1], lines.shape[-1]).gather(-1, index)
        place = place.movedim(-1, 1 + self._axis(node)) if kept else place.squeeze(-1)
        return place.reshape(len(own), -1)

    def _mates(self, call: Call) -> tuple[Tensor, Tensor]:
        """Elements of the argument on the same line as each element of the value, ``[N, elements, D]``; their gap."""
        node, parent = call.node, call.node.inputs[0]
        grid = torch.arange(parent.numel, device=call.out.device)
        picks, n = self.picks(call), call.out.shape[0]
        line = self._lines(node, grid.reshape(1, *parent.shape))
        number = torch.empty_like(grid)
        number[line.flatten()] = grid // line.shape[-1]
        gap = (flat(call.xs[0]).unsqueeze(1) - call.out.reshape(n, -1, 1)).abs()
        return number[picks].unsqueeze(2) == number, gap

    def kinks(self, call: Call) -> KinkSites | None:
        if call.node.numel * call.node.inputs[0].numel * call.out.shape[0] > _LARGEST:
            return None
        mates, gap = self._mates(call)
        itself = torch.zeros_like(mates).scatter_(2, self.picks(call).unsqueeze(2), True)
        return KinkSites(gap.masked_fill(~mates | itself, float("inf")).amin(2))

    def ties(self, call: Call) -> Ties | None:
        ordered = self._lines(call.node, call.xs[0]).sort(-1).values
        if not bool((ordered.diff(dim=-1) == 0).any()):
            return None
        mates, gap = self._mates(call)
        places = torch.arange(mates.shape[2], device=gap.device).expand(mates.shape[1:])
        found = tied_groups(mates & (gap == 0), places)
        if found is None:
            return None
        sample, element, place, valid = found
        none = torch.zeros_like(element)
        level, smooth = none.to(call.out.dtype), none.bool()
        return Ties(sample, element, (0,) * place.shape[1], place, valid, level, smooth, opaque=True)


def _names(*groups: tuple[str, Sequence[str]]) -> list[str]:
    return [f"aten.{name}{suffix}" for suffix, names in groups for name in names]


for _name in ("aten.amax", "aten.amin", "aten.max.default", "aten.min.default", "aten.max.dim[0]", "aten.min.dim[0]"):
    register_rule(_name)(Extreme())
for _name in (
    "aten.sort.default[0]",
    "aten.sort.stable[0]",
    "aten.topk.default[0]",
    "aten.median.dim[0]",
    "aten.median.default",
    "aten.nanmedian.default",
    "aten.nanmedian.dim[0]",
    "aten.kthvalue.default[0]",
    "aten.cummax.default[0]",
    "aten.cummin.default[0]",
):
    register_rule(_name)(Ordered())
