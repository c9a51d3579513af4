"""Standardisation over axes (the core of Layer-, Group-, Instance- and Batch-Norm) and softmax."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dagh._ir import Node
from dagh._rules._axes import bundle, members_last
from dagh._rules._base import Call, Rule, Tangents, register_rule


def standardize(input: Tensor, dims: Sequence[int], eps: float, center: bool = True) -> Tensor:
    """``(x - mean) / sqrt(var + eps)`` over ``dims`` (biased variance); without ``center``, ``x / rms``."""
    dims = list(dims)
    if center:
        input = input - input.mean(dims, keepdim=True)
    return input * torch.rsqrt((input * input).mean(dims, keepdim=True) + eps)


@register_rule("dagh.standardize")
class Standardize(Rule):
    """With output ``y``, scale ``s`` and centring ``P``: ``D t = (P t - y ⟨y, t⟩) / s`` (⟨⟩ is the mean)."""

    derivative = "smooth"

    def flops(self, node: Node) -> int:
        return 6 * node.numel

    def _dims(self, node: Node, lead: int) -> list[int]:
        return [d % len(node.shape) + lead for d in node.arg("dims")]

    def keeps_channels(self, node: Node) -> bool:
        return min(self._dims(node, 0), default=0) >= 2

    def value(self, node: Node, xs: list[Tensor], kink: Any = None) -> Tensor:
        return standardize(xs[0], self._dims(node, 1), float(node.arg("eps")), bool(node.arg("center")))

    def _inverse_scale(self, call: Call) -> Tensor:
        def compute() -> Tensor:
            dims = self._dims(call.node, 1)
            x = call.xs[0]
            if call.arg("center"):
                x = x - x.mean(dims, keepdim=True)
            return bundle(torch.rsqrt((x * x).mean(dims, keepdim=True) + float(call.arg("eps"))))

        result: Tensor = call.once("inverse_scale", compute)
        return result

    def _project(self, call: Call, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(P t - y ⟨y, t⟩, ⟨y, t⟩)``."""
        dims, y = self._dims(call.node, 2), bundle(call.out)
        along = (y * t).mean(dims, keepdim=True)
        centred = t - t.mean(dims, keepdim=True) if call.arg("center") else t
        return centred - y * along, along

    def _derivative(self, call: Call, t: Tensor) -> Tensor:
        return self._project(call, t)[0] * self._inverse_scale(call)

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        return self._derivative(call, tangents[0])

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        return self._derivative(call, cotangent)

    def curvature(
        self, call: Call, adjoint: Tensor, tangents: Tangents, args: Iterable[int], keep: bool
    ) -> dict[int, Tensor]:
        dims, y, r = self._dims(call.node, 2), bundle(call.out), self._inverse_scale(call)
        pulled, mean_g = self._project(call, bundle(adjoint))
        moved, mean_t = self._project(call, tangents[0])
        y_dot = moved * r
        cross = (y_dot * bundle(adjoint)).mean(dims, keepdim=True)
        return {0: -r * (mean_t * r * pulled + y_dot * mean_g + y * cross)}


def standardize_fixed(input: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Batch-Norm with running statistics, without its affine part: channels on axis 1."""
    shape = [1, -1, *([1] * (input.dim() - 2))]
    return (input - mean.reshape(shape)) * torch.rsqrt(var.reshape(shape) + eps)


@register_rule("dagh.standardize_fixed")
class StandardizeFixed(Rule):
    """A fixed scale and shift per channel; the statistics are constants."""

    derivative = "linear"
    acts_per = "channel"

    def _scale(self, call: Call) -> Tensor:
        def compute() -> Tensor:
            var = call.xs[2]
            scale = torch.rsqrt(var + float(call.arg("eps")))
            return scale.reshape(var.shape[0], 1, 1, -1, *([1] * (len(call.node.shape) - 2)))

        result: Tensor = call.once("scale", compute)
        return result

    def scaling(self, call: Call, arg: int) -> Tensor | None:
        return self._scale(call)

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        return tangents[0] * self._scale(call)

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        return cotangent * self._scale(call)


@register_rule("aten.softmax", "aten._softmax")
class Softmax(Rule):
    """``D = diag p - p pᵀ`` along one axis."""

    fresh = True

    def flops(self, node: Node) -> int:
        return 4 * node.numel

    def _dim(self, node: Node, lead: int) -> int:
        return int(node.arg("dim")) % len(node.shape) + lead

    def keeps_channels(self, node: Node) -> bool:
        return self._dim(node, 0) >= 2

    def value(self, node: Node, xs: list[Tensor], kink: Any = None) -> Tensor:
        return torch.softmax(xs[0], self._dim(node, 1))

    def _derivative(self, call: Call, t: Tensor) -> Tensor:
        """``p (t - ⟨p, t⟩)``."""
        last = members_last(t)
        return _back(self._project(call, _forth(t, last) * _forth(bundle(call.out), last), last), last)

    def _project(self, call: Call, u: Tensor, last: bool) -> Tensor:
        """``u - p ⟨1, u⟩``, in the memory of ``u``."""
        p, dim = _forth(bundle(call.out), last), self._dim(call.node, 1 if last else 2)
        return u.addcmul_(u.sum(dim, keepdim=True), p, value=-1)

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        return self._derivative(call, tangents[0])

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        return self._derivative(call, cotangent)

    def curvature(
        self, call: Call, adjoint: Tensor, tangents: Tangents, args: Iterable[int], keep: bool
    ) -> dict[int, Tensor]:
        dim, t, last = self._dim(call.node, 1), tangents[0], members_last(tangents[0])
        # The columns of D sum to zero: ⟨D t, g⟩ = ⟨D t, g - ⟨p, g⟩⟩.
        centred = adjoint - (call.out * adjoint).sum(dim, keepdim=True)
        p_dot, centred = _forth(self._derivative(call, t), last), _forth(bundle(centred), last)
        # In place, unless p is one and the same for samples that the adjoint tells apart.
        weighted = p_dot.mul_(centred) if p_dot.shape[0] >= centred.shape[0] else p_dot * centred
        return {0: _back(self._project(call, weighted, last), last)}


def _forth(t: Tensor, last: bool) -> Tensor:
    """The bundle as it lies in memory, ``[N, *shape, B]`` with its members ``last``."""
    return t.movedim(1, -1) if last else t


def _back(t: Tensor, last: bool) -> Tensor:
    return t.movedim(-1, 1) if last else t


@register_rule("aten.log_softmax", "aten._log_softmax")
class LogSoftmax(Softmax):
    """``D = I - 1 pᵀ`` along one axis."""

    def value(self, node: Node, xs: list[Tensor], kink: Any = None) -> Tensor:
        return torch.log_softmax(xs[0], self._dim(node, 1))

    def _p(self, call: Call) -> Tensor:
        result: Tensor = call.once("p", lambda: bundle(call.out.exp()))
        return result

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        t = tangents[0]
        return t - (self._p(call) * t).sum(self._dim(call.node, 2), keepdim=True)

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        return cotangent - self._p(call) * cotangent.sum(self._dim(call.node, 2), keepdim=True)

    def curvature(
        self, call: Call, adjoint: Tensor, tangents: Tangents, args: Iterable[int], keep: bool
    ) -> dict[int, Tensor]:
        dim, p, t = self._dim(call.node, 2), self._p(call), tangents[0]
        total = bundle(adjoint).sum(dim, keepdim=True)
        return {0: -total * p * (t - (p * t).sum(dim, keepdim=True))}


@register_rule("aten.logsumexp")
class LogSumExp(Rule):
    """Gradient ``softmax``, Hessian ``diag p - p pᵀ`` along the reduced axes."""

    def _dims(self, node: Node, lead: int) -> list[int]:
        rank = len(node.inputs[0].shape)
        dims = node.arg("dim")
        dims = [dims] if isinstance(dims, int) else list(dims)
        return [int(d) % rank + lead for d in dims]

    def _spread(self, call: Call, s: Tensor) -> Tensor:
        rank = len(call.node.inputs[0].shape)
        if call.arg("keepdim"):
            return s
        for d in sorted(d - 2 for d in self._dims(call.node, 2)):
            s = s.unsqueeze(d + 2)
        assert s.dim() == rank + 2
        return s

    def _p(self, call: Call) -> Tensor:
        def compute() -> Tensor:
            x, dims = call.xs[0], self._dims(call.node, 1)
            return bundle(torch.exp(x - torch.logsumexp(x, dims, keepdim=True)))

        result: Tensor = call.once("p", compute)
        return result

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        dims = self._dims(call.node, 2)
        return (self._p(call) * tangents[0]).sum(dims, keepdim=bool(call.arg("keepdim")))

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        return self._p(call) * self._spread(call, cotangent)

    def curvature(
        self, call: Call, adjoint: Tensor, tangents: Tangents, args: Iterable[int], keep: bool
    ) -> dict[int, Tensor]:
        p, t, dims = self._p(call), tangents[0], self._dims(call.node, 2)
        centred = t - (p * t).sum(dims, keepdim=True)
        return {0: self._spread(call, bundle(adjoint)) * p * centred}
