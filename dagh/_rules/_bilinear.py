"""Products of two tensors: linear layers, matrix products, einsum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dagh._ir import Node
from dagh._rules._axes import bundle, unbroadcast
from dagh._rules._base import Call, DerivativeClass, Rule, Tangents, register_rule, same_channels
from dagh._rules._over_samples import over_samples, vmap


class Multilinear(Rule):
    """An operation linear in each floating-point argument separately (``einsum``, transposed convolution, bilinear)."""

    derivative: DerivativeClass = "bilinear"

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        terms = [self._replace(call, i, t) for i, t in tangents.items()]
        return sum(terms[1:], start=terms[0])

    def _replace(self, call: Call, arg: int, t: Tensor) -> Tensor:
        """The operation with argument ``arg`` replaced by each tangent of a bundle."""
        k = len(call.xs)

        def per_sample(*tensors: Tensor) -> Tensor:
            xs = tensors[:k]

            def f(one: Tensor) -> Tensor:
                return call.node.call([one if i == arg else x for i, x in enumerate(xs)])

            moved: Tensor = vmap(f)(tensors[k])
            return moved

        result = over_samples(per_sample, [*call.xs, t])
        assert isinstance(result, Tensor)
        return result

    def curvature(
        self, call: Call, adjoint: Tensor, tangents: Tangents, args: Iterable[int], keep: bool
    ) -> dict[int, Tensor]:
        out: dict[int, Tensor] = {}
        k = len(call.xs)
        for arg in args:
            for j, t in tangents.items():
                if j == arg:
                    continue

                def per_sample(*tensors: Tensor, arg: int = arg, j: int = j) -> Tensor:
                    xs, delta, ts = tensors[:k], tensors[k], tensors[k + 1]

                    def pull(one: Tensor) -> Tensor:
                        def f(x: Tensor) -> Tensor:
                            return call.node.call([one if i == j else x if i == arg else v for i, v in enumerate(xs)])

                        grad: Tensor = torch.func.vjp(f, xs[arg])[1](delta)[0]
                        return grad

                    rows: Tensor = vmap(pull)(ts)
                    return rows

                term = over_samples(per_sample, [*call.xs, adjoint, t])
                out[arg] = out[arg] + term if arg in out else term
        return out


register_rule("aten.einsum", "aten.dot", "aten.mv", "aten.outer", "aten.ger")(Multilinear())


@register_rule("aten.bilinear")
class Bilinear(Rule):
    """``x₁ᵀ W x₂ + b``: linear in each of x₁, W, x₂, with an additive bias."""

    derivative = "bilinear"


def _rows(x: Tensor, lead: int) -> Tensor:
    """``[*lead, *positions, features]`` with the positions flattened: ``[*lead, T, features]``."""
    return x.reshape(*x.shape[:lead], x.shape[lead:-1].numel(), x.shape[-1])


@register_rule("aten.linear")
class Linear(Rule):
    """``y = x Wᵀ + b`` on the last axis."""

    derivative = "bilinear"
    fresh = True

    def flops(self, node: Node) -> int:
        return 2 * node.numel * node.inputs[0].shape[-1]

    def value(self, node: Node, xs: list[Tensor], kink: Any = None) -> Tensor:
        if all(x.shape[0] == 1 for x in xs[1:]):
            return torch.nn.functional.linear(xs[0], xs[1][0], xs[2][0] if len(xs) > 2 else None)
        return super().value(node, xs)

    def pairs(self, node: Node) -> set[tuple[int, int]]:
        return {(0, 1), (1, 0)}

    def keeps_channels(self, node: Node) -> bool:
        return len(node.shape) >= 3 and same_channels(node)

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        x, w = call.xs[0], call.xs[1]
        lead = (max(t.shape[0] for t in [*call.xs, *tangents.values()]), next(iter(tangents.values())).shape[1])
        total: Tensor | None = None
        if 0 in tangents:
            t = _rows(tangents[0], 2)
            total = t @ w[0].T if w.shape[0] == 1 else t @ w.transpose(1, 2).unsqueeze(1)
        if 1 in tangents:
            tw, rows = tangents[1], _rows(x, 1)
            if tw.shape[0] == 1:
                b, o, i = tw.shape[1:]
                term = (rows @ tw[0].reshape(b * o, i).T).reshape(*rows.shape[:2], b, o).transpose(1, 2)
            else:
                term = rows.unsqueeze(1) @ tw.transpose(2, 3)
            total = term if total is None else total + term
        if 2 in tangents:
            term = tangents[2].unsqueeze(2)
            total = term if total is None else total + term
        assert total is not None
        t_count = call.node.numel // call.node.shape[-1] if call.node.numel else 0
        total = total.expand(*lead, t_count, call.node.shape[-1])
        return total.reshape(*lead, *call.node.shape)

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        w = call.xs[1]
        s = _rows(cotangent, 2)
        if arg == 0:
            out = s @ w[0] if w.shape[0] == 1 else s @ w.unsqueeze(1)
            return out.reshape(*cotangent.shape[:2], *call.node.inputs[0].shape)
        if arg == 2:
            return s.sum(2)
        return _outer(s, bundle(_rows(call.xs[0], 1)), keep or w.shape[0] > 1)

    def curvature(
        self, call: Call, adjoint: Tensor, tangents: Tangents, args: Iterable[int], keep: bool
    ) -> dict[int, Tensor]:
        out = {}
        delta = _rows(adjoint, 1)
        for arg in args:
            if arg == 0 and 1 in tangents:
                tw = tangents[1]
                if tw.shape[0] == 1:
                    b, o, i = tw.shape[1:]
                    flat = tw[0].permute(1, 0, 2).reshape(o, b * i)
                    term = (delta @ flat).reshape(*delta.shape[:2], b, i).transpose(1, 2)
                else:
                    term = delta.unsqueeze(1) @ tw
                out[0] = term.reshape(*term.shape[:2], *call.node.inputs[0].shape)
            if arg == 1 and 0 in tangents:
                t = _rows(tangents[0], 2)
                out[1] = _outer(bundle(delta), t, keep or call.xs[1].shape[0] > 1)
        return out


def _outer(s: Tensor, x: Tensor, keep: bool) -> Tensor:
    """``Σ_t s_t x_tᵀ`` for every sample and bundle member: ``[N, B, o, i]``, or summed over samples ``[1, B, o, i]``.

    ``s``: ``[N, B or 1, T, o]``, ``x``: ``[N, B or 1, T, i]``.
    """
    if keep:
        return s.transpose(2, 3) @ x
    n = max(s.shape[0], x.shape[0])
    s, x = s.expand(n, *s.shape[1:]), x.expand(n, *x.shape[1:])
    o, i, bs, bx = s.shape[-1], x.shape[-1], s.shape[1], x.shape[1]
    if bs > 1 and bx == 1:
        flat = s.permute(1, 3, 0, 2).reshape(bs * o, -1) @ x[:, 0].reshape(-1, i)
        return flat.reshape(1, bs, o, i)
    if bx > 1 and bs == 1:
        flat = s[:, 0].reshape(-1, o).T @ x.permute(0, 2, 1, 3).reshape(-1, bx * i)
        return flat.reshape(o, bx, i).transpose(0, 1).unsqueeze(0)
    return (s.permute(1, 3, 0, 2).flatten(2) @ x.permute(1, 0, 2, 3).flatten(1, 2)).unsqueeze(0)


#: Bundles at least this wide are laid out with their members side by side, element by element.
_SIDE_BY_SIDE = 8


def _times_bundle(fixed: Tensor, t: Tensor) -> Tensor:
    """``fixed @ t`` for ``fixed`` ``[N, *lead, m, k]`` and every member of a bundle ``[N, B, *lead, k, p]``.

    The members stand side by side in one product per sample: many small products are slow. In a wide bundle they stand
    side by side for every element, ``[N, *lead, m, p, B]`` in memory: whatever is transposed, summed or added
    afterwards goes by whole runs of B numbers.
    """
    if t.shape[1] == 1 or fixed.shape[1:-2] != t.shape[2:-2]:
        return bundle(fixed) @ t
    place = -1 if t.shape[1] >= _SIDE_BY_SIDE else -2
    t = t.movedim(1, place)
    out = fixed @ t.flatten(-2)
    return out.reshape(*out.shape[:-1], *t.shape[-2:]).movedim(place, 1)


@register_rule("aten.matmul", "aten.mm", "aten.bmm")
class MatMul(Rule):
    """Matrix product with broadcasting over leading axes (both arguments of rank two or more)."""

    derivative = "bilinear"
    fresh = True

    def flops(self, node: Node) -> int:
        return 2 * node.numel * node.inputs[0].shape[-1]

    def pairs(self, node: Node) -> set[tuple[int, int]]:
        return {(0, 1), (1, 0)}

    def keeps_channels(self, node: Node) -> bool:
        return len(node.shape) >= 4 and same_channels(node)

    def _plain(self, node: Node) -> bool:
        return all(len(p.shape) >= 2 for p in node.inputs)

    def _align(self, node: Node, t: Tensor, lead: int) -> Tensor:
        own, rank = t.dim() - lead, len(node.shape)
        return t.reshape(*t.shape[:lead], *([1] * (rank - own)), *t.shape[lead:])

    def value(self, node: Node, xs: list[Tensor], kink: Any = None) -> Tensor:
        if not self._plain(node):
            return super().value(node, xs)
        return torch.matmul(self._align(node, xs[0], 1), self._align(node, xs[1], 1))

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        node = call.node
        if not self._plain(node):
            return _MULTILINEAR.jvp(call, tangents)
        terms = []
        if 0 in tangents:
            fixed = self._align(node, call.xs[1], 1).mT
            terms.append(_times_bundle(fixed, self._align(node, tangents[0], 2).mT).mT)
        if 1 in tangents:
            terms.append(_times_bundle(self._align(node, call.xs[0], 1), self._align(node, tangents[1], 2)))
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        if not self._plain(call.node):
            return super().vjp(call, cotangent, arg, keep)
        other = self._align(call.node, call.xs[1 - arg], 1)
        out = _times_bundle(other, cotangent.mT).mT if arg == 0 else _times_bundle(other.mT, cotangent)
        return unbroadcast(out, 2, call.node.inputs[arg].shape)

    def curvature(
        self, call: Call, adjoint: Tensor, tangents: Tangents, args: Iterable[int], keep: bool
    ) -> dict[int, Tensor]:
        if not self._plain(call.node):
            return _MULTILINEAR.curvature(call, adjoint, tangents, args, keep)
        out = {}
        for arg in args:
            if 1 - arg in tangents:
                t = self._align(call.node, tangents[1 - arg], 2)
                row = _times_bundle(adjoint, t.mT) if arg == 0 else _times_bundle(adjoint.mT, t).mT
                out[arg] = unbroadcast(row, 2, call.node.inputs[arg].shape)
        return out


_MULTILINEAR = Multilinear()
