"""Operations that are linear in all their floating-point arguments jointly: views, gathers, sums, pads, averages."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dagh._ir import Node
from dagh._rules._axes import align, unbroadcast
from dagh._rules._base import Call, Rule, Tangents, register_rule, same_channels
from dagh._rules._over_samples import agrees, one_by_one, over_samples, telling, vmap


class LinearMap(Rule):
    """A linear operation: the tangent map is the operation itself."""

    derivative = "linear"

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        node, k, moving = call.node, len(call.xs), list(tangents)

        def pushed(*tensors: Tensor, at_once: bool) -> Tensor:
            xs, ts = tensors[:k], tensors[k:]
            base = [torch.zeros_like(x) if x.dtype.is_floating_point else x for x in xs]

            def f(*some: Tensor) -> Tensor:
                full = list(base)
                for i, t in zip(moving, some, strict=True):
                    full[i] = t
                return node.call(full)

            if at_once:
                return vmap(f)(*ts)  # type: ignore[no-any-return]
            return torch.stack([f(*(t[b] for t in ts)) for b in range(len(ts[0]))])

        everything = [*call.xs, *(tangents[i] for i in moving)]
        result = over_samples(partial(pushed, at_once=True), everything)
        assert isinstance(result, Tensor)
        some = telling(tangents)

        def alone() -> bool:
            """Whether ``vmap`` does to a few directions of one sample what the operation does to each alone."""
            few = [*(x[:1] for x in call.xs), *(tangents[i][:1, some] for i in moving)]
            return agrees(result[:1, some], one_by_one(partial(pushed, at_once=False), few))

        if call.once(f"vmap agrees {moving} {len(some)}", alone):
            return result
        return one_by_one(partial(pushed, at_once=False), everything)  # type: ignore[no-any-return]

    def curvature(
        self, call: Call, adjoint: Tensor, tangents: Tangents, args: Iterable[int], keep: bool
    ) -> dict[int, Tensor]:
        return {}


_GENERIC = """
sum mean cumsum flip roll index index_select gather pixel_shuffle pixel_unshuffle channel_shuffle
reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
im2col col2im unfold unfold_copy tril triu diagonal diag_embed trace repeat repeat_interleave stack
slice_scatter select_scatter index_put scatter_add index_add movedim swapaxes rot90 narrow
take_along_dim expand_as broadcast_to _to_copy to
"""
for _name in _GENERIC.split():
    register_rule(f"aten.{_name}")(LinearMap())


class AffineMap(LinearMap):
    """A linear operation plus a constant (fills, pads with a value): the constant drops out of the derivative."""

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        from dagh._rules import _generic

        return _generic.jvp(call, tangents)


for _name in ("where", "constant_pad_nd", "pad", "index_fill", "scatter", "masked_scatter", "fill"):
    register_rule(f"aten.{_name}")(AffineMap())


@register_rule("aten.masked_fill")
class MaskedFill(LinearMap):
    """Elements under a mask replaced by one number."""

    def _rest(self, call: Call, t: Tensor) -> Tensor:
        rank = len(call.node.shape)
        return align(t, 2, rank).masked_fill(align(call.xs[1], 1, rank).unsqueeze(1), 0.0)

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        if set(tangents) != {0}:
            from dagh._rules import _generic

            return _generic.jvp(call, tangents)
        t = self._rest(call, tangents[0])
        return t.expand(*t.shape[:2], *call.node.shape)

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        if arg != 0:
            return super().vjp(call, cotangent, arg, keep)
        return unbroadcast(self._rest(call, cotangent), 2, call.node.inputs[0].shape)


class PerChannel(LinearMap):
    """Spatial operations that treat every channel (axis 1) alike."""

    acts_per = "channel"

    def keeps_channels(self, node: Node) -> bool:
        return len(node.shape) >= 3 and node.inputs[0].shape[:2] == node.shape[:2]


for _name in ("avg_pool3d", "adaptive_avg_pool3d", "_adaptive_avg_pool3d"):
    register_rule(f"aten.{_name}")(PerChannel())


@register_rule(
    "aten.view", "aten.reshape", "aten.flatten", "aten.unflatten", "aten.unsqueeze", "aten.squeeze", "aten._unsafe_view"
)
class Reshape(LinearMap):
    """Any change of shape that keeps the row-major order of elements."""

    def keeps_channels(self, node: Node) -> bool:
        return len(node.shape) >= 2 and node.inputs[0].shape[:2] == node.shape[:2]

    def value(self, node: Node, xs: list[Tensor], kink: Any = None) -> Tensor:
        return xs[0].reshape(xs[0].shape[0], *node.shape)

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        t = tangents[0]
        return t.reshape(*t.shape[:2], *call.node.shape)

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        return cotangent.reshape(*cotangent.shape[:2], *call.node.inputs[0].shape)


@register_rule("aten.permute", "aten.transpose", "aten.t", "aten.numpy_T", "aten.mT")
class Permute(LinearMap):
    """Reordering of axes."""

    def _order(self, node: Node) -> list[int]:
        rank = len(node.shape)
        if node.operation == "permute":
            return [int(d) % rank for d in node.arg("dims")]
        order = list(range(rank))
        if node.operation == "transpose":
            a, b = int(node.arg("dim0")) % rank, int(node.arg("dim1")) % rank
            order[a], order[b] = order[b], order[a]
        elif node.operation == "mT":
            order[-1], order[-2] = order[-2], order[-1]
        else:
            order.reverse()
        return order

    def keeps_channels(self, node: Node) -> bool:
        return len(node.shape) >= 2 and self._order(node)[:2] == [0, 1]

    def value(self, node: Node, xs: list[Tensor], kink: Any = None) -> Tensor:
        return xs[0].permute(0, *(d + 1 for d in self._order(node)))

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        return tangents[0].permute(0, 1, *(d + 2 for d in self._order(call.node)))

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        order = self._order(call.node)
        inverse = [order.index(i) for i in range(len(order))]
        return cotangent.permute(0, 1, *(d + 2 for d in inverse))


@register_rule("aten.expand")
class Expand(LinearMap):
    """Broadcasting to a larger shape."""

    def value(self, node: Node, xs: list[Tensor], kink: Any = None) -> Tensor:
        x = align(xs[0], 1, len(node.shape))
        return x.expand(x.shape[0], *node.shape)

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        t = align(tangents[0], 2, len(call.node.shape))
        return t.expand(*t.shape[:2], *call.node.shape)

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        return unbroadcast(cotangent, 2, call.node.inputs[0].shape)


@register_rule("aten.select", "aten.slice")
class Narrow(LinearMap):
    """One index, or a strided range of indices, along one axis."""

    copies_part = True

    def keeps_channels(self, node: Node) -> bool:
        rank = len(node.inputs[0].shape)
        return len(node.shape) >= 2 and int(node.arg("dim")) % rank >= 2

    def _take(self, node: Node, t: Tensor, lead: int) -> Tensor:
        size = node.inputs[0].shape
        dim = int(node.arg("dim")) % len(size)
        if node.operation == "select":
            return t.select(dim + lead, int(node.arg("index")))
        start, stop, step = slice(node.arg("start"), node.arg("end"), node.arg("step")).indices(size[dim])
        return t[(slice(None),) * (dim + lead) + (slice(start, stop, step),)]

    def value(self, node: Node, xs: list[Tensor], kink: Any = None) -> Tensor:
        return self._take(node, xs[0], 1)

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        return self._take(call.node, tangents[0], 2)

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        full = cotangent.new_zeros(*cotangent.shape[:2], *call.node.inputs[0].shape)
        self._take(call.node, full, 2).copy_(cotangent)
        return full

    def place(self, call: Call, bundle: Tensor) -> Tensor:
        return self._take(call.node, bundle, 2)


@register_rule("aten.cat")
class Concatenate(LinearMap):
    """Tensors joined along one axis."""

    def _dim(self, node: Node) -> int:
        return int(node.arg("dim")) % len(node.shape)

    def keeps_channels(self, node: Node) -> bool:
        return self._dim(node) >= 2 and same_channels(node)

    def value(self, node: Node, xs: list[Tensor], kink: Any = None) -> Tensor:
        n = max(x.shape[0] for x in xs)
        return torch.cat([x.expand(n, *x.shape[1:]) for x in xs], self._dim(node) + 1)

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        n = max(t.shape[0] for t in tangents.values())
        width = next(iter(tangents.values())).shape[1]
        parts = []
        for i, parent in enumerate(call.node.inputs):
            t = tangents.get(i)
            if t is None:
                t = call.out.new_zeros(()).expand(n, width, *parent.shape)
            parts.append(t.expand(n, *t.shape[1:]))
        return torch.cat(parts, self._dim(call.node) + 2)

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        dim = self._dim(call.node)
        offset = sum(p.shape[dim] for p in call.node.inputs[:arg])
        return cotangent.narrow(dim + 2, offset, call.node.inputs[arg].shape[dim])


@register_rule("aten.sum.dim_IntList", "aten.mean.dim")
class Reduce(LinearMap):
    """Sum or mean over axes."""

    def keeps_channels(self, node: Node) -> bool:
        return len(node.shape) >= 2 and all(d > 1 for d in self._axes(node))

    def _axes(self, node: Node) -> list[int]:
        rank = len(node.inputs[0].shape)
        dims = node.arg("dim")
        return sorted({int(d) % rank for d in dims}) if dims else list(range(rank))

    def _reduce(self, node: Node, t: Tensor, lead: int) -> Tensor:
        axes = [d + lead for d in self._axes(node)]
        if not axes:
            return t
        keepdim = bool(node.arg("keepdim"))
        return t.sum(axes, keepdim) if node.operation == "sum" else t.mean(axes, keepdim)

    def value(self, node: Node, xs: list[Tensor], kink: Any = None) -> Tensor:
        return self._reduce(node, xs[0], 1)

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        return self._reduce(call.node, tangents[0], 2)

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        shape = call.node.inputs[0].shape
        axes = self._axes(call.node)
        kept = [1 if d in axes else s for d, s in enumerate(shape)]
        out = cotangent.reshape(*cotangent.shape[:2], *kept).expand(*cotangent.shape[:2], *shape)
        count = 1
        for d in axes:
            count *= shape[d]
        return out / count if call.node.operation == "mean" else out


@register_rule("aten.embedding")
class Embedding(LinearMap):
    """Rows of a table by integer index; as in PyTorch no derivative flows to the row ``padding_idx``."""

    def _mask(self, call: Call, t: Tensor, lead: int) -> Tensor:
        padding = call.arg("padding_idx")
        if padding is None or int(padding) < 0:
            return t
        t = t.clone()
        t.select(lead, int(padding)).zero_()
        return t

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        (t,) = tangents.values()
        table, index = self._mask(call, t, 2), call.xs[1]
        if table.shape[0] == 1:
            rows = table[0][:, index]
            return rows.movedim(1, 0)
        return over_samples(lambda tab, idx: tab[:, idx], [table, index])  # type: ignore[no-any-return]

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        shape = call.node.inputs[0].shape
        index = call.xs[1]
        n = max(cotangent.shape[0], index.shape[0])
        flat_index = index.reshape(index.shape[0], -1).expand(n, -1)
        rows = cotangent.flatten(2, -2).expand(n, -1, -1, -1)
        shared = call.xs[0].shape[0] == 1 and not keep
        out = cotangent.new_zeros(1 if shared else n, cotangent.shape[1], *shape)
        if shared:
            out[0].index_add_(1, flat_index.flatten(), rows.transpose(0, 1).flatten(1, 2))
        else:
            for i in range(n):
                out[i].index_add_(1, flat_index[i], rows[i])
        return self._mask(call, out, 2)


@register_rule("dagh.fixed_dropout")
class FixedDropout(LinearMap):
    """Dropout whose mask was drawn from a seed, independently for every sample."""

    acts_per = "element"

    def value(self, node: Node, xs: list[Tensor], kink: Any = None) -> Tensor:
        return xs[0] * xs[1]

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        if 0 not in tangents:  # the mask is a constant
            return torch.zeros_like(tangents[1])
        return tangents[0] * call.xs[1].unsqueeze(1)

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        return torch.zeros_like(cotangent) if arg else cotangent * call.xs[1].unsqueeze(1)


@register_rule("dagh.stop_gradient")
class StopGradient(LinearMap):
    """``Tensor.detach``: the value passes, no derivative does."""

    def value(self, node: Node, xs: list[Tensor], kink: Any = None) -> Tensor:
        return xs[0]

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        return torch.zeros_like(tangents[0])

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        return torch.zeros_like(cotangent)


@register_rule("aten.copy")
class Copy(LinearMap):
    """``src`` in the shape of what it overwrites (which itself drops out)."""

    def value(self, node: Node, xs: list[Tensor], kink: Any = None) -> Tensor:
        src = align(xs[1], 1, len(node.shape)).to(node.dtype)
        return src.expand(src.shape[0], *node.shape)

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        if 1 not in tangents:
            return torch.zeros_like(tangents[0])
        t = align(tangents[1], 2, len(call.node.shape)).to(call.node.dtype)
        return t.expand(*t.shape[:2], *call.node.shape)

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        if arg == 0:
            return torch.zeros_like(cotangent)
        return unbroadcast(cotangent, 2, call.node.inputs[1].shape).to(call.node.inputs[1].dtype)
