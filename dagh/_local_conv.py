"""Convolutions, average pooling and fixed scales at one point, ready for many products."""

from __future__ import annotations

import torch
from torch import Tensor

from dagh._local import Local, Moves, Rows, Site, local_for, settle
from dagh._rules._conv import Convolution
from dagh._rules._conv_kernels import padded_windows
from dagh._rules._linear_maps import PerChannel
from dagh._rules._normalize import StandardizeFixed

_aten = torch.ops.aten

#: Columns of a still input are kept where they are at most this many times the output.
_COLUMNS = 8


def _fold(t: Tensor) -> Tensor:
    """A bundle of one ``[N, 1, m, …]`` as the batch of a convolution ``[N·m, …]``."""
    return t.reshape(-1, *t.shape[3:])


@local_for(Convolution)
class ConvolutionLocal(Local):
    """A convolution whose input, weights or both move; bundles of several directions go through the rule."""

    fresh = True

    @staticmethod
    def suits(site: Site) -> bool:
        return all(x.shape[0] == 1 for x in site.call.xs[1:])

    def prepare(self) -> None:
        assert isinstance(self.rule, Convolution)
        self.settings = self.rule._settings(self.site.node)
        self.x, self.w = self.call.xs[0].flatten(0, 1), self.call.xs[1][0]
        self.delta = None if self.adjoint is None else self.adjoint.flatten(0, 1)
        plain = not self.settings[3] and self.settings[5] == 1
        # On a CPU, NHWC is faster throughout, except for input gradients of few or odd numbers of channels.
        self.last = self.x.dim() == 4 and plain and self.x.device.type == "cpu"
        self.last_back = self.last and self.x.shape[1] % 8 == 0
        bends = self.delta is not None
        self.joint = plain and {0, 1} <= {*self.site.moving}
        self.joint_back = plain and bends and self.site.has_row and 0 in self.wanted and 1 in self.site.moving
        self.joint_weight = bends and self.site.has_row and 1 in self.wanted and 0 in self.site.moving
        if self.joint:
            self.inputs = self._beside(self.x, 1, self.last)
        if self.joint_back and self.delta is not None:
            self.outputs = self._beside(self.delta, 1, self.last_back)
        if self.joint_weight and self.delta is not None:
            self.pairs = self._beside(self.x, 0, self.last), self._beside(self.delta, 0, self.last)
        elif 1 in self.wanted:
            self.x = self._layout(self.x, self.last)
            self.delta = None if self.delta is None else self._layout(self.delta, self.last)

    def _beside(self, still: Tensor, axis: int, last: bool) -> Tensor:
        """``still`` in one half along ``axis`` of a tensor whose other half is filled in every product."""
        both = torch.cat([still, still], axis)
        return self._layout(both, last)

    def _layout(self, t: Tensor, last: bool) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last) if last else t

    def _ordinary(self, t: Tensor, name: str) -> Tensor:
        """``t`` in row-major order, as element-wise neighbours like it."""
        return t if t.is_contiguous() else self.room(name, t.shape).copy_(t)

    def _apply(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        stride, padding, dilation, transposed, output_padding, groups = self.settings
        y: Tensor = _aten.convolution(x, w, b, stride, padding, dilation, transposed, output_padding, groups)
        return y

    def _gradient(self, s: Tensor, x: Tensor, w: Tensor, wrt: int) -> Tensor:
        stride, padding, dilation, transposed, output_padding, groups = self.settings
        mask = [wrt == 0, wrt == 1, False]
        found: Tensor = _aten.convolution_backward(
            s, x, w, None, stride, padding, dilation, transposed, output_padding, groups, mask
        )[wrt]
        return found

    def push(self, t: Moves) -> Tensor:
        if next(iter(t.values())).shape[1] > 1 or not (0 in t or 1 in t):
            return super().push(t)
        bias = t[2][0, 0] if 2 in t else None
        if self.joint and 0 in t and 1 in t:
            # x * t_W + t_x * W is one convolution of twice the channels.
            self.inputs[:, self.x.shape[1] :] = _fold(t[0])
            weights = self._layout(torch.cat([t[1][0, 0], self.w], 1), self.last)
            out = self._apply(self.inputs, weights, bias)
        elif 0 in t:
            out = self._apply(_fold(t[0]), self.w, bias)
            if 1 in t:
                out += self._by_weight(t[1][0, 0], None)
        else:
            out = self._by_weight(t[1][0, 0], bias)
        return self._ordinary(out, "push").view(self.call.out.shape[0], 1, *self.site.node.shape)

    def _by_weight(self, tw: Tensor, bias: Tensor | None) -> Tensor:
        return self._apply(self.x, tw, bias)

    def pull(self, row: Tensor | None, t: Moves, owned: bool = False) -> Rows:
        some = row if row is not None else next(iter(t.values()), None)
        if some is None:
            return {}
        if some.shape[1] > 1:
            return super().pull(row, t, owned)
        flat = None if row is None else _fold(row)
        out: Rows = {}
        if 2 in self.wanted and flat is not None:
            out[2] = flat.flatten(2).sum((0, 2)).view(1, 1, -1)
        for i, term in ((0, self._to_input(flat, t)), (1, self._to_weight(flat, t))):
            if term is not None:
                out[i] = term.reshape(self.call.xs[i].shape[0], 1, *self.site.node.inputs[i].shape)
        return out

    def _to_input(self, row: Tensor | None, t: Moves) -> Tensor | None:
        if 0 not in self.wanted:
            return None
        bends = self.delta is not None and 1 in t
        if row is not None and bends and self.joint_back:
            # W backwards from the row plus t_W backwards from δ, likewise.
            self.outputs[:, row.shape[1] :] = row
            weights = self._layout(torch.cat([t[1][0, 0], self.w], 0), self.last_back)
            return self._ordinary(self._gradient(self.outputs, self.x, weights, 0), "pull")
        term = None if row is None else self._gradient(row, self.x, self.w, 0)
        bend = self._gradient(self.delta, self.x, t[1][0, 0], 0) if bends and self.delta is not None else None
        total = settle(term, bend, owned=True)
        return None if total is None else self._ordinary(total, "pull")

    def _to_weight(self, row: Tensor | None, t: Moves) -> Tensor | None:
        if 1 not in self.wanted:
            return None
        bends = self.delta is not None and 0 in t
        if row is not None and bends and self.joint_weight:
            # row ⊗ x + δ ⊗ t_x is the gradient of a batch of twice the samples.
            inputs, outputs = self.pairs
            n = row.shape[0]
            inputs[n:], outputs[:n] = _fold(t[0]), row
            return self._gradient(outputs, inputs, self.w, 1)
        term = None if row is None else self._by_row(row)
        if not bends or self.delta is None:
            return term
        return settle(term, self._gradient(self.delta, self._layout(_fold(t[0]), self.last), self.w, 1), owned=True)

    def _by_row(self, row: Tensor) -> Tensor:
        return self._gradient(self._layout(row, self.last), self.x, self.w, 1)


@local_for(Convolution)
class StillInputLocal(ConvolutionLocal):
    """A convolution of something that does not move: its columns are formed once, products are matrix products."""

    @staticmethod
    def suits(site: Site) -> bool:
        node = site.node
        size = node.inputs[1].shape[1:].numel()
        positions = node.shape[2:].numel()
        return (
            ConvolutionLocal.suits(site)
            and 0 not in site.moving
            and 0 not in site.wanted
            and not node.arg("transposed")
            and int(node.arg("groups")) == 1
            and node.shape[1] <= positions
            and size <= _COLUMNS * node.shape[1]
        )

    def prepare(self) -> None:
        super().prepare()
        stride, padding, dilation = self.settings[:3]
        x, w = self.call.xs[0].flatten(0, 1), self.call.xs[1][0]
        view = padded_windows(x, w.shape[2:], stride, padding, dilation)
        self.columns = view.reshape(x.shape[0], w.shape[1:].numel(), -1)

    def _by_weight(self, tw: Tensor, bias: Tensor | None) -> Tensor:
        n, size, positions = self.columns.shape
        flat = tw.reshape(1, -1, size).expand(n, -1, size)
        room = self.room("push", (n, tw.shape[0], positions))
        if bias is None:
            return torch.bmm(flat, self.columns, out=room).view(n, -1, *self.site.node.shape[2:])
        return torch.baddbmm(bias[:, None], flat, self.columns, out=room).view(n, -1, *self.site.node.shape[2:])

    def _by_row(self, row: Tensor) -> Tensor:
        n, size, _ = self.columns.shape
        room = self.room("pull", (n, row.shape[1], size))
        return torch.bmm(row.flatten(2), self.columns.transpose(1, 2), out=room).sum(0)


@local_for(PerChannel)
class AveragePoolLocal(Local):
    """Averages over windows side by side: sums of strided slices, and a small product to spread them again."""

    fresh = True

    @staticmethod
    def suits(site: Site) -> bool:
        node = site.node
        return _side_by_side(node.inputs[0].shape, node.shape) is not None and _averages(site)

    def prepare(self) -> None:
        source, shape = self.site.node.inputs[0].shape, self.site.node.shape
        found = _side_by_side(source, shape)
        assert found is not None
        self.kernel = found
        count = 1
        for k in found:
            count *= k
        eye = torch.eye(shape[-1], dtype=self.call.out.dtype, device=self.call.out.device)
        self.spread = eye.repeat_interleave(found[-1], 1) / count
        self.count = count

    def push(self, t: Moves) -> Tensor:
        source, shape = self.site.node.inputs[0].shape, self.site.node.shape
        lead = t[0].shape[:2]
        out = t[0]
        if shape[2:].numel() == 1:
            return out.reshape(*lead, *source[:2], -1).mean(-1).reshape(*lead, *shape)
        for axis, k in enumerate(self.kernel):
            if k > 1:
                rest = out.shape[axis + 4 :]
                parts = out.reshape(*out.shape[: axis + 4], shape[axis + 2], k, *rest[1:])
                first = parts.select(axis + 5, 0)
                total = torch.add(first, parts.select(axis + 5, 1), out=self.room(f"push {axis}", first.shape))
                for j in range(2, k):
                    total += parts.select(axis + 5, j)
                out = total
        return out.mul_(1 / self.count)

    def pull(self, row: Tensor | None, t: Moves, owned: bool = False) -> Rows:
        if row is None:
            return {}
        source, shape = self.site.node.inputs[0].shape, self.site.node.shape
        lead = row.shape[:2]
        if shape[2:].numel() == 1:
            out = row.reshape(*lead, *shape) / self.count
            out = out.expand(*lead, *source)
            return {0: self.room("pull", out.shape).copy_(out)}
        flat = row.reshape(-1, shape[-1])
        out = torch.mm(flat, self.spread, out=self.room("rows", (flat.shape[0], source[-1])))
        fine, size = [], []
        for n, k in zip(shape[2:-1], self.kernel[:-1], strict=True):
            fine += [n, 1]
            size += [n, k]
        out = out.reshape(*lead, *shape[:2], *fine, source[-1])
        room = self.room("pull", (*lead, *shape[:2], *size, source[-1]))
        return {0: room.copy_(out).view(*lead, *source)}


def _side_by_side(source: torch.Size, shape: torch.Size) -> list[int] | None:
    """Window lengths where the windows tile the input exactly."""
    space = list(zip(source[2:], shape[2:], strict=True))
    if not space or any(o == 0 or s % o for s, o in space):
        return None
    return [s // o for s, o in space]


def _averages(site: Site) -> bool:
    """Whether the node averages over such windows, whatever it is called: tried on one random sample."""
    node = site.node
    kernel = _side_by_side(node.inputs[0].shape, node.shape)
    if kernel is None or "pool" not in node.operation:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(node.inputs[0].shape, generator=generator, dtype=torch.float64, device="cpu")
    shape: list[int] = []
    for n, k in zip(node.shape[2:], kernel, strict=True):
        shape += [n, k]
    expected = x.reshape(*node.shape[:2], *shape).mean(tuple(range(3, 3 + 2 * len(kernel), 2)))
    return bool(torch.allclose(node.call([x]), expected))


@local_for(StandardizeFixed)
class FixedScaleLocal(Local):
    """A constant factor per channel."""

    fresh = True

    def prepare(self) -> None:
        assert isinstance(self.rule, StandardizeFixed)
        self.scale = self.rule._scale(self.call)

    def push(self, t: Moves) -> Tensor:
        return torch.mul(t[0], self.scale, out=self.room("push", self.like(t[0])))

    def pull(self, row: Tensor | None, t: Moves, owned: bool = False) -> Rows:
        if row is None or self.wanted != (0,):
            return super().pull(row, t, owned)
        return {0: torch.mul(row, self.scale, out=row if owned else self.room("pull", row.shape))}
