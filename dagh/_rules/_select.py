"""Max-pooling, and what it shares with every other operation that copies elements."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dagh._bundles import Picked
from dagh._ir import Node
from dagh._rules._axes import bundle
from dagh._rules._base import Call, KinkSites, Rule, Tangents, Ties, register_rule
from dagh._rules._conv_kernels import windows
from dagh.errors import ReductionError

#: Positions of a window up to which comparing them one after another is faster than PyTorch's kernel for the CPU.
_FEW = 9

_POOL = {1: torch.nn.functional.max_pool1d, 2: torch.nn.functional.max_pool2d, 3: torch.nn.functional.max_pool3d}

_ADAPTIVE: dict[int, Any] = {
    1: torch.nn.functional.adaptive_max_pool1d,
    2: torch.nn.functional.adaptive_max_pool2d,
    3: torch.nn.functional.adaptive_max_pool3d,
}


def max_pool(
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool = False,
) -> Tensor:
    """Max-pooling of ``[M, C, *space]`` over one, two or three spatial axes."""
    pool: Any = _POOL[len(kernel)]
    result: Tensor = pool(input, kernel, stride, padding, dilation, ceil_mode)
    return result


def tied_groups(equal: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Rows of ``equal`` (``[N, rows, C]``) with two or more true entries: sample, row, their places and validity.

    ``places`` is ``[rows, C]``; the candidates of each row are moved to the front and the rest cut off.
    """
    count = equal.sum(2)
    where = (count > 1).nonzero()
    if len(where) == 0:
        return None
    sample, row = where[:, 0], where[:, 1]
    width = int(count.max())
    order = equal[sample, row].to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :width]
    valid = equal[sample, row].gather(1, order)
    return sample, row, places[row].gather(1, order), valid


def copied(call: Call, ties: Ties, branch: Tensor) -> Tensor:
    """Places of argument 0 to copy, ``[N, *shape]``: those of the branches, -1 where there is no tie."""
    place = torch.full((call.out.shape[0], call.node.numel), -1, device=call.out.device)
    place[ties.sample, ties.element] = ties.place.gather(1, branch.unsqueeze(1)).squeeze(1)
    return place.reshape(call.out.shape)


def share_ties(tied: Tensor, axis: int, kink: str) -> Tensor:
    """Weights along ``axis`` of tied candidates (``tied`` is 0 or 1): ``"first"``, ``"last"`` or ``"split"``."""
    if kink == "first":
        return tied * (tied.cumsum(axis) == 1)
    if kink == "last":
        return tied * (tied.flip(axis).cumsum(axis).flip(axis) == 1)
    return tied / tied.sum(axis, keepdim=True)


@register_rule("dagh.max_pool")
class MaxPool(Rule):
    """Each output copies one input; on a tie PyTorch copies one index, ``split`` or weights share."""

    derivative = "kinked"
    fresh = True
    takes_choice = True
    acts_per = "channel"

    def flops(self, node: Node) -> int:
        size = 1
        for k in node.arg("kernel"):
            size *= k
        return node.numel * size

    def curved(self, node: Node) -> bool:
        return False

    def _settings(self, node: Node) -> tuple[list[int], list[int], list[int], list[int]]:
        arg = node.arg
        return list(arg("kernel")), list(arg("stride")), list(arg("padding")), list(arg("dilation"))

    def value(self, node: Node, xs: list[Tensor], kink: Any = None) -> Tensor:
        x = xs[0]
        taps = self._taps(node, x)
        if taps:
            return functools.reduce(torch.maximum, taps)
        out = node.call([x.reshape(-1, *x.shape[2:])])
        return out.reshape(x.shape[0], *node.shape)

    def _taps(self, node: Node, x: Tensor) -> list[Tensor]:
        """What stands at each position of the windows, ``[N, m, C, *out]``, in the order in which PyTorch compares.

        Empty on a GPU and for windows that are large or leave the space: there PyTorch's kernels are the faster.
        """
        kernel, stride, padding, dilation = self._settings(node)
        out = node.shape[2:]
        last = [(o - 1) * st + d * (k - 1) for o, st, k, d in zip(out, stride, kernel, dilation, strict=True)]
        inside = all(at < size for at, size in zip(last, x.shape[3:], strict=True)) and not any(padding)
        if x.device.type != "cpu" or not inside or not 2 <= math.prod(kernel) <= _FEW:
            return []
        cuts = [
            [slice(k * d, k * d + (o - 1) * st + 1, st) for k in range(size)]
            for o, st, size, d in zip(out, stride, kernel, dilation, strict=True)
        ]
        return [x[(slice(None),) * 3 + cut] for cut in itertools.product(*cuts)]

    def _windows(self, call: Call) -> tuple[Tensor, Tensor]:
        """Values ``[N, m, C, K, L]`` (−inf where padded) and flat input positions ``[K, L]`` of every window."""
        kernel, stride, padding, dilation = self._settings(call.node)
        x = call.xs[0]
        space, out = x.shape[3:], call.node.shape[2:]
        widths: list[int] = []
        for s, k, st, p, d, o in reversed(list(zip(space, kernel, stride, padding, dilation, out, strict=True))):
            need = (o - 1) * st + d * (k - 1) + 1
            widths += [p, max(0, need - s - p)]
        flat = x.reshape(-1, *x.shape[2:])
        padded = torch.nn.functional.pad(flat, widths, value=float("-inf"))
        grid = torch.arange(space.numel(), device=x.device).reshape(1, 1, *space)
        places = torch.nn.functional.pad(grid, widths, value=0)
        rank = len(kernel)

        def cut(t: Tensor) -> Tensor:
            view = windows(t, kernel, stride, dilation)
            for axis, count in enumerate(out):
                view = view.narrow(2 + rank + axis, 0, count)
            return view.flatten(2 + rank).flatten(2, 1 + rank)

        return cut(padded).reshape(*x.shape[:3], -1, out.numel()), cut(places)[0, 0]

    def _weights(self, call: Call) -> tuple[Tensor, Tensor]:
        """Weight of every window position ``[N, m, C, K, L]`` under the chosen tie rule, and the positions."""

        def compute() -> tuple[Tensor, Tensor]:
            values, places = self._windows(call)
            tied = (values == values.amax(3, keepdim=True)).to(values.dtype)
            if isinstance(call.kink, str):
                return share_ties(tied, 3, call.kink), places
            weights = torch.as_tensor(call.kink, dtype=values.dtype, device=values.device).flatten()
            if weights.numel() != values.shape[3] or bool((weights < 0).any()):
                raise ReductionError(
                    f"max-pool tie weights of {call.node.name!r} need {values.shape[3]} non-negative numbers, "
                    f"one per window position; got {call.kink!r}"
                )
            weighted = tied * weights[:, None]
            tied = torch.where(weighted.sum(3, keepdim=True) > 0, weighted, tied)
            return tied / tied.sum(3, keepdim=True), places

        pair: tuple[Tensor, Tensor] = call.once("weights", compute)
        return pair

    def _index(self, call: Call) -> Tensor:
        def compute() -> Tensor:
            x = call.xs[0]
            index = self._pooled(call, x.reshape(-1, *x.shape[2:]))
            index = index.reshape(x.shape[0], 1, *call.node.shape[:2], -1)
            if isinstance(call.kink, Tensor):
                forced = call.kink.reshape(index.shape)
                index = torch.where(forced < 0, index, forced % x.shape[3:].numel())
            return index

        result: Tensor = call.once("index", compute)
        return result

    def _pooled(self, call: Call, x: Tensor) -> Tensor:
        """PyTorch's index within the space of each window's maximum."""
        kernel, stride, padding, dilation = self._settings(call.node)
        taps = self._taps(call.node, call.xs[0])
        if taps:
            space = call.xs[0].shape[3:]
            places = self._taps(call.node, torch.arange(space.numel(), device="cpu").reshape(1, 1, 1, *space))
            missed = taps[0] != call.out
            number = missed.to(torch.uint8)  # positions before the first of equals
            for tap in taps[1:-1]:
                missed &= tap != call.out
                number += missed.view(torch.uint8)
            distance = torch.stack([p.flatten()[0] for p in places])
            return distance.index_select(0, number.flatten().int()).reshape(number.shape) + places[0]
        settings = (kernel, stride, padding, dilation, bool(call.arg("ceil_mode")))
        index: Tensor = _POOL[len(kernel)](x, *settings, return_indices=True)[1]
        return index

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        t = tangents[0].flatten(4)
        n = max(t.shape[0], call.xs[0].shape[0])
        t = t.expand(n, *t.shape[1:])
        if call.kink is None or isinstance(call.kink, Tensor):
            index = self._index(call)
            out = t.gather(4, index.expand(n, t.shape[1], *index.shape[2:]))
        else:
            weights, places = self._weights(call)
            out = (t[..., places] * bundle(weights)).sum(4)
        return out.reshape(n, t.shape[1], *call.node.shape)

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        picked = self.picked(call, cotangent)
        if picked is not None:
            return picked.value()
        shape = call.node.inputs[0].shape
        weights, places = self._weights(call)
        spread = (cotangent.flatten(4).unsqueeze(4) * bundle(weights)).flatten(4)
        out = spread.new_zeros(*spread.shape[:4], shape[2:].numel())
        out.index_add_(4, places.flatten(), spread)
        return out.reshape(*spread.shape[:2], *shape)

    def picked(self, call: Call, cotangent: Tensor) -> Picked | None:
        if call.kink is not None and not isinstance(call.kink, Tensor):
            return None
        s, index = cotangent.flatten(4), self._index(call)
        n = max(s.shape[0], index.shape[0])
        return Picked(s.expand(n, *s.shape[1:]), index, call.node.inputs[0].shape[2:])

    def kinks(self, call: Call) -> KinkSites | None:
        values, _ = self._windows(call)
        if values.shape[3] < 2:
            return None
        top = values.topk(2, dim=3).values
        return KinkSites((top[..., 0, :] - top[..., 1, :]).flatten(1))

    def ties(self, call: Call) -> Ties | None:
        values, places = self._windows(call)
        n, m, c, k, windows_ = values.shape
        best = values == values.amax(3, keepdim=True)
        space = call.xs[0].shape[3:].numel()
        channel = torch.arange(m * c, device=values.device)[:, None, None] * space
        everywhere = (channel + places.mT).reshape(-1, k)
        found = tied_groups(best.transpose(3, 4).reshape(n, m * c * windows_, k), everywhere)
        if found is None:
            return None
        sample, element, place, valid = found
        none = torch.zeros_like(element)
        return Ties(
            sample, element, (0,) * place.shape[1], place, valid, none.to(values.dtype), none.bool()
        )  # fmt: skip

    def force(self, call: Call, ties: Ties, branch: Tensor) -> Tensor:
        return copied(call, ties, branch)


def adaptive_max_pool(input: Tensor, output_size: Sequence[int]) -> Tensor:
    """Max-pooling of ``[M, C, *space]`` over windows that cover the space, of sizes that may differ by one."""
    result: Tensor = _ADAPTIVE[len(output_size)](input, output_size)
    return result


@register_rule("dagh.adaptive_max_pool")
class AdaptiveMaxPool(MaxPool):
    """Max-pooling over windows of unequal size; ties as in max-pooling, without weights per window position."""

    def flops(self, node: Node) -> int:
        return node.inputs[0].numel

    def _taps(self, node: Node, x: Tensor) -> list[Tensor]:
        return []

    def _windows(self, call: Call) -> tuple[Tensor, Tensor]:
        x = call.xs[0]
        space, out = x.shape[3:], list(call.arg("output_size"))
        axes = [
            [torch.arange(i * s // o, -(-(i + 1) * s // o), device=x.device) for i in range(o)]
            for s, o in zip(space, out, strict=True)
        ]
        grid = torch.arange(space.numel(), device=x.device).reshape(space)
        rows = []
        for cell in torch.cartesian_prod(*(torch.arange(o, device="cpu") for o in out)).reshape(-1, len(out)).tolist():
            part = grid
            for axis, i in enumerate(cell):
                part = part.index_select(axis, axes[axis][i])
            rows.append(part.flatten())
        places = torch.nn.utils.rnn.pad_sequence(rows, padding_value=-1)
        values = x.flatten(3)[..., places.clamp(min=0)].masked_fill(places < 0, float("-inf"))
        return values, places.clamp(min=0)

    def _pooled(self, call: Call, x: Tensor) -> Tensor:
        out = list(call.arg("output_size"))
        index: Tensor = _ADAPTIVE[len(out)](x, out, return_indices=True)[1]
        return index
