"""Convolutions of one, two and three dimensions: strided, padded, dilated, grouped, transposed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dagh._bundles import Picked
from dagh._ir import Node
from dagh._rules import _conv_kernels as kernels
from dagh._rules._axes import bundle
from dagh._rules._base import Call, Rule, Tangents, register_rule

_aten = torch.ops.aten
#: Numbers of windows at the maxima that are kept for the next sweep.
_KEPT = 1 << 21


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    transposed: bool = False,
    output_padding: Sequence[int] = (0,),
    groups: int = 1,
) -> Tensor:
    """Every convolution of a traced model, with symmetric zero padding made explicit: ``[M, C, *space]`` in and out."""
    return _aten.convolution(  # type: ignore[no-any-return]
        input, weight, bias, stride, padding, dilation, transposed, output_padding, groups
    )


def _merge(t: Tensor, lead: int) -> Tensor:
    """Fold the ``lead`` leading axes into the batch axis of a convolution."""
    return t.reshape(-1, *t.shape[lead + 1 :])


def _times(t: Tensor, factor: Tensor | float, axis: int) -> Tensor:
    """``t`` times one number, or one for each of the channels on ``axis``."""
    return t * (factor if isinstance(factor, float) else factor.reshape(-1, *[1] * (t.dim() - axis - 1)))


@register_rule("dagh.convolution")
class Convolution(Rule):
    """``y = x * W + b``; bilinear in ``(x, W)``, linear in ``b``."""

    derivative = "bilinear"
    fresh = True

    def flops(self, node: Node) -> int:
        w = node.inputs[1].shape
        if node.arg("transposed"):
            return 2 * node.inputs[0].numel * w[1:].numel()
        return 2 * node.numel * w[1:].numel()

    def pairs(self, node: Node) -> set[tuple[int, int]]:
        return {(0, 1), (1, 0)}

    def _settings(self, node: Node) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
        arg = node.arg
        return (
            list(arg("stride")),
            list(arg("padding")),
            list(arg("dilation")),
            bool(arg("transposed")),
            list(arg("output_padding")),
            int(arg("groups")),
        )

    def _apply(self, node: Node, x: Tensor, w: Tensor, b: Tensor | None, groups: int | None = None) -> Tensor:
        stride, padding, dilation, transposed, output_padding, own = self._settings(node)
        if transposed:
            return convolution(x, w, b, stride, padding, dilation, transposed, output_padding, groups or own)
        return kernels.convolve(x, w, b, stride, padding, dilation, groups or own)

    def _input_gradient(self, node: Node, s: Tensor, w: Tensor, space: Sequence[int], channels: int) -> Tensor:
        """``D_xᵀ s`` for merged cotangents ``s``: ``[M, channels, *space]``."""
        stride, padding, dilation, transposed, output_padding, groups = self._settings(node)
        if not transposed:
            return kernels.input_gradient(s, w, space, stride, padding, dilation, groups)
        like = s.new_empty(()).expand(s.shape[0], channels, *space)
        grads = _aten.convolution_backward(
            s, like, w, None, stride, padding, dilation, True, output_padding, groups, [True, False, False]
        )
        result = grads[0]
        assert isinstance(result, Tensor)
        return result

    def value(self, node: Node, xs: list[Tensor], kink: Any = None) -> Tensor:
        if any(x.shape[0] > 1 for x in xs[1:]):
            return super().value(node, xs)
        out = self._apply(node, _merge(xs[0], 1), xs[1][0], xs[2][0] if len(xs) > 2 else None)
        return out.reshape(xs[0].shape[0], *node.shape)

    # A bundle of B weights is one convolution with B times the output channels, group by group.

    def _stack(self, w: Tensor, out_axis: int, groups: int) -> Tensor:
        """``[B, *W]`` to one weight whose channels on ``out_axis`` are ordered (group, B, own)."""
        b = w.shape[0]
        w = w.movedim(out_axis + 1, 1)
        if out_axis == 0:
            w = w.reshape(b, groups, -1, *w.shape[2:]).transpose(0, 1)
            return w.reshape(-1, *w.shape[3:])
        # Weights [C_in, C_out / groups, …] of a transposed convolution (or input channels of a plain one).
        return w.reshape(-1, *w.shape[2:]).movedim(0, 1)

    def _unstack(self, y: Tensor, n: int, b: int, groups: int, shape: torch.Size) -> Tensor:
        """Undo :meth:`_stack` on the channel axis of a result ``[N·m, groups·B·c, *space]``."""
        m, space = shape[0], y.shape[2:]
        y = y.reshape(n, m, groups, b, -1, *space)
        return y.movedim(3, 1).reshape(n, b, *shape)

    def _weight_tangent(self, call: Call, x: Tensor, tw: Tensor) -> Tensor:
        """``Σ`` over nothing: the convolution of values ``x`` ``[N, *]`` with each weight of ``tw`` ``[1, B, *W]``."""
        node, groups = call.node, self._settings(call.node)[5]
        weight = self._stack(tw[0], 1 if node.arg("transposed") else 0, groups)
        y = self._apply(node, _merge(x, 1), weight, None)
        return self._unstack(y, x.shape[0], tw.shape[1], groups, node.shape)

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        node = call.node
        if call.xs[1].shape[0] > 1 or (1 in tangents and tangents[1].shape[0] > 1):
            return super().jvp(call, tangents)
        total: Tensor | None = None
        if 0 in tangents:
            t = tangents[0]
            y = self._apply(node, _merge(t, 2), call.xs[1][0], None)
            total = y.reshape(*t.shape[:2], *node.shape)
        if 1 in tangents:
            term = self._weight_tangent(call, call.xs[0], tangents[1])
            total = term if total is None else total + term
        if 2 in tangents:
            t = tangents[2]
            term = t.reshape(*t.shape[:2], 1, -1, *([1] * (len(node.shape) - 2)))
            lead = max(call.xs[0].shape[0], t.shape[0])
            total = term.expand(lead, t.shape[1], *node.shape) if total is None else total + term
        assert total is not None
        return total

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        node = call.node
        if arg == 2:
            return cotangent.movedim(3, 2).flatten(3).sum(3)
        if call.xs[1].shape[0] > 1:
            return super().vjp(call, cotangent, arg, keep)
        if arg == 0:
            shape = node.inputs[0].shape
            s = _merge(cotangent, 2)
            grad = self._input_gradient(node, s, call.xs[1][0], shape[2:], shape[1])
            return grad.reshape(*cotangent.shape[:2], *shape)
        return self._weight_gradient(call, cotangent, bundle(call.xs[0]), keep)

    # A factor per channel, as of normalization with running statistics, goes to the weights, or to their few rows.

    def absorbs(self, call: Call, factor: Tensor | float) -> bool:
        if call.xs[1].shape[0] > 1 or call.node.arg("transposed"):
            return False
        _, channels, *space = call.node.shape
        return isinstance(factor, float) or factor.shape == (1, 1, 1, channels, *[1] * len(space))

    def vjp_scaled(self, call: Call, base: Tensor, factor: Tensor | float, arg: int, keep: bool) -> Tensor:
        if arg > 0:  # [N, B, *W], or [N, B, C] of a bias: channels of the output on axis 2
            return _times(self.vjp(call, base, arg, keep), factor, 2)
        return self.vjp(replace(call, xs=[call.xs[0], _times(call.xs[1], factor, 1)]), base, 0, keep)

    # Where max-pooling picked elements, the windows at these places are all that the weights of each channel meet.

    def vjp_picked(self, call: Call, cotangent: Picked, arg: int, keep: bool) -> Tensor | None:
        (n, b, _, c, places), space = cotangent.base.shape, cotangent.space.numel()
        if arg == 2:
            return cotangent.in_order(0, 1, 3, 2, 4).flatten(3).sum(3)
        x, w = call.xs[:2]
        rows = w[0, 0].numel()
        if arg == 0 or w.shape[0] > 1 or call.node.arg("transposed") or not n == x.shape[0] == len(cotangent.index):
            return None
        if 2 * places > space or places * rows > b * space:
            return None  # neither fewer operations nor less memory than spread out
        kept = call.memo.get("picked")
        if kept is None or kept[0] is not cotangent.index or kept[1] is not keep:
            stride, padding, dilation, _, _, groups = self._settings(call.node)
            windows = kernels.picked_windows(
                _merge(x, 1), cotangent.index[:, 0], w.shape[3:], stride, padding, dilation, groups, keep
            )
            kept = (cotangent.index, keep, windows.transpose(1, 2))
            if windows.numel() <= _KEPT:
                call.memo["picked"] = kept
        if keep:
            grad = cotangent.in_order(0, 3, 1, 2, 4).reshape(n * c, b, -1) @ kept[2]  # [N·C, B, rows]
            return grad.reshape(n, c, b, -1).transpose(1, 2).reshape(n, b, *w.shape[1:])
        grad = cotangent.in_order(3, 1, 0, 2, 4).reshape(c, b, -1) @ kept[2]  # [C, B, rows]
        return grad.transpose(0, 1).reshape(1, b, *w.shape[1:])

    def curvature(
        self, call: Call, adjoint: Tensor, tangents: Tangents, args: Iterable[int], keep: bool
    ) -> dict[int, Tensor]:
        if call.xs[1].shape[0] > 1 or (1 in tangents and tangents[1].shape[0] > 1):
            return super().curvature(call, adjoint, tangents, args, keep)
        out = {}
        for arg in args:
            if arg == 0 and 1 in tangents:
                out[0] = self._input_curvature(call, adjoint, tangents[1])
            if arg == 1 and 0 in tangents:
                out[1] = self._curvature_gradient(call, adjoint, tangents[0], keep)
        return out

    # A bundle that lives in one channel each: only that channel's weights are read, or written.

    def _channelwise(self, node: Node) -> bool:
        return int(node.arg("groups")) == 1 and not node.arg("transposed")

    def jvp_channels(self, call: Call, tangent: Tensor) -> Tensor | None:
        node, w = call.node, call.xs[1]
        if not self._channelwise(node) or w.shape[0] > 1:
            return None
        n, b, m, c = tangent.shape[:4]
        out_channels, rest = w.shape[1], w.shape[3:]
        each = w[0].transpose(0, 1).reshape(c * out_channels, 1, *rest)
        y = self._apply(node, tangent.reshape(n * b * m, *tangent.shape[3:]), each, None, groups=c)
        y = y.reshape(n, b, m, c, out_channels, *y.shape[2:]).movedim(3, 1)
        # One copy, into the order that the next convolution wants: channels last.
        y = y.movedim(4, -1).reshape(n, c * b, m, *y.shape[5:], out_channels)
        return y.movedim(-1, 3)

    def curvature_channels(self, call: Call, adjoint: Tensor, tangent: Tensor, keep: bool) -> dict[int, Tensor] | None:
        if not self._channelwise(call.node) or call.xs[1].shape[0] > 1:
            return None
        grad = self._curvature_gradient(call, adjoint, tangent, keep)  # [N, b, out, C, *k]
        n, b, _, c = grad.shape[:4]
        rows = grad.new_zeros(n, c, *grad.shape[1:])
        rows.diagonal(dim1=1, dim2=4).copy_(grad.movedim(3, -1))
        return {1: rows.reshape(n, c * b, *grad.shape[2:])}

    def vjp_channels(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor | None:
        if not self._channelwise(call.node) or call.xs[1].shape[0] > 1 or arg == 0:
            return None
        own = self.vjp(call, cotangent, arg, keep)  # [N or 1, b, C, …]: each direction's own channel
        n, b, c = own.shape[:3]
        rows = own.new_zeros(n, c, *own.shape[1:])
        rows.diagonal(dim1=1, dim2=3).copy_(own.movedim(2, -1))
        return rows.reshape(n, c * b, *own.shape[2:])

    def seed_channels(self, call: Call, argument: int) -> Tensor:
        """Tangents of the output along the weight (or bias), channel-diagonal: ``[N, b, m, C_out, *space]``."""
        node = call.node
        shape = node.shape
        if argument == 2:
            return call.xs[0].new_ones(1, 1, *shape)
        stride, padding, dilation, _, _, _ = self._settings(node)
        x, kernel = call.xs[0], node.inputs[1].shape[2:]
        view = kernels.padded_windows(_merge(x, 1), kernel, stride, padding, dilation)
        cols = view.reshape(x.shape[0], shape[0], -1, *shape[2:]).transpose(1, 2)  # [N, c·k, m, *space]
        return cols.unsqueeze(3).expand(-1, -1, -1, shape[1], *shape[2:])

    def _input_curvature(self, call: Call, adjoint: Tensor, tw: Tensor) -> Tensor:
        """Input gradients at weights ``tw`` ``[1, B, *W]`` instead of W: ``[N, B, *x]``."""
        node, groups, b = call.node, self._settings(call.node)[5], tw.shape[1]
        shape = node.inputs[0].shape
        n, s = adjoint.shape[0], _merge(adjoint, 1)
        w = tw[0]
        if node.arg("transposed"):  # W: [C_in, C_out/g, *k]; input channels ordered (group, B, own)
            w = w.reshape(b, groups, -1, *w.shape[2:]).transpose(0, 1).reshape(-1, *w.shape[2:])
        else:  # W: [C_out, C_in/g, *k]; per group the input channels become (B, own)
            w = w.transpose(0, 1).reshape(w.shape[1], b * w.shape[2], *w.shape[3:])
        grad = self._input_gradient(node, s, w, shape[2:], b * shape[1])
        return self._unstack(grad, n, b, groups, shape)

    def _weight_gradient(self, call: Call, s: Tensor, x: Tensor, keep: bool) -> Tensor:
        """Weight gradients for cotangents ``s`` ``[N, B or 1, *y]`` and inputs ``x`` ``[N, B or 1, *x]``.

        Returns ``[N, B, *W]`` when ``keep``, else the sum over samples ``[1, B, *W]``.
        """
        stride, padding, dilation, transposed, _, groups = self._settings(call.node)
        still, moving = (x, s) if transposed else (s, x)
        kernel = call.node.inputs[1].shape[2:]
        return kernels.correlate(still, moving, kernel, stride, padding, dilation, groups, keep)

    def _curvature_gradient(self, call: Call, adjoint: Tensor, t: Tensor, keep: bool) -> Tensor:
        """Weight gradients for the adjoint and a bundle of tangents of the input; shapes as above."""
        stride, padding, dilation, transposed, _, groups = self._settings(call.node)
        if transposed or t.shape[1] == 1 or any(st != 1 for st in stride):
            return self._weight_gradient(call, bundle(adjoint), t, keep)
        kernel, n = call.node.inputs[1].shape[2:], max(t.shape[0], adjoint.shape[0])
        kept = call.memo.get("shifts")
        if kept is None or kept[0] is not adjoint or kept[1:3] != (keep, n):
            still = bundle(adjoint).expand(n, 1, *adjoint.shape[1:])
            space = call.node.inputs[0].shape[2:]
            kept = (adjoint, keep, n, kernels.shifts(still, space, kernel, padding, dilation, groups, keep))
            call.memo["shifts"] = kept
        t = t.expand(n, *t.shape[1:])
        return kernels.correlate_shifted(kept[3], t, kernel, groups, keep)
