"""Losses with closed-form curvature."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dagh._ir import Node
from dagh._rules._axes import bundle
from dagh._rules._base import Call, DerivativeClass, Rule, Tangents, register_rule, rule_for
from dagh._rules._bilinear import Multilinear

_MEAN, _SUM = 1, 2


@register_rule("aten.cross_entropy_loss")
class CrossEntropy(Rule):
    """``ℓ = m·logsumexp(z) - qᵀz`` per position, with target mass ``q`` and ``m = Σ q``.

    Gradient ``m p - q``, Hessian ``m (diag p - p pᵀ)`` with ``p = softmax(z)``; class weights, label smoothing,
    ``ignore_index`` and probability targets all live in ``q``.
    """

    derivative = "smooth"

    def flops(self, node: Node) -> int:
        return 5 * node.inputs[0].numel

    def _axis(self, node: Node) -> int:
        return 1 if len(node.inputs[0].shape) > 1 else 0

    def value(self, node: Node, xs: list[Tensor], kink: Any = None) -> Tensor:
        call = Call(node, xs, xs[0])
        _, q = self._mass(call)
        axis = self._axis(node) + 1
        # Where nothing is expected, an impossible class (logit -inf) costs nothing.
        each = (q * -torch.log_softmax(xs[0], axis)).masked_fill(q == 0, 0.0).sum(axis)
        return each if int(node.arg("reduction")) not in (_MEAN, _SUM) else each.reshape(each.shape[0], -1).sum(1)

    def _mass(self, call: Call) -> tuple[Tensor, Tensor]:
        """``p`` and ``q``, both ``[N, *logits]``; ``q`` includes the reduction's normalizer."""

        def compute() -> tuple[Tensor, Tensor]:
            z, target = call.xs[0], call.xs[1]
            z = z.expand(max(z.shape[0], target.shape[0]), *z.shape[1:])
            target = target.expand(z.shape[0], *target.shape[1:])
            axis = self._axis(call.node) + 1
            classes = z.shape[axis]
            weight, smoothing = call.tensor("weight"), float(call.arg("label_smoothing") or 0.0)
            shape = [1] * z.dim()
            shape[axis] = classes
            w = z.new_ones(shape) if weight is None else weight.reshape(-1, *shape[1:])
            p = torch.softmax(z, axis)
            if target.dtype.is_floating_point:
                q = w * ((1 - smoothing) * target + smoothing / classes)
                count = z.numel() / z.shape[0] / classes
                norm = z.new_full([1] * z.dim(), count)
            else:
                ignored = (target == int(call.arg("ignore_index"))).unsqueeze(axis)
                hot = torch.zeros_like(z).scatter(axis, target.long().unsqueeze(axis).masked_fill(ignored, 0), 1.0)
                q = ((1 - smoothing) * w * hot + smoothing / classes * w).masked_fill(ignored, 0.0)
                used = (w * hot).sum(axis, keepdim=True).masked_fill(ignored, 0.0)
                norm = used.flatten(1).sum(1).reshape(-1, *([1] * (z.dim() - 1)))
            return p, q / norm if int(call.arg("reduction")) == _MEAN else q

        pair: tuple[Tensor, Tensor] = call.once("mass", compute)
        return pair

    def factor_rows(self, node: Node) -> int:
        """Number of columns of :meth:`factor`."""
        shape = node.inputs[0].shape
        return shape.numel() // max(1, shape[self._axis(node)]) * max(0, shape[self._axis(node)] - 1)

    def _weigh(self, call: Call, s: Tensor, lead: int) -> Tensor:
        """An adjoint or cotangent of the loss, broadcastable against logits."""
        axis, rank = self._axis(call.node) + lead, len(call.node.inputs[0].shape)
        if int(call.arg("reduction")) in (_MEAN, _SUM):
            return s.reshape(*s.shape[:lead], *([1] * rank))
        return s.unsqueeze(axis)

    def _gradient(self, call: Call) -> Tensor:
        """``m p - q``, written ``p (m - q) - q (1 - p)``: where p is nearly 1, ``1 - p`` is the sum of the others."""

        def compute() -> Tensor:
            p, q = self._mass(call)
            axis = self._axis(call.node) + 1
            likely = p > 0.5
            others = torch.where(likely, p.masked_fill(likely, 0.0).sum(axis, keepdim=True), 1 - p)
            return p * (q.sum(axis, keepdim=True) - q) - q * others

        gradient: Tensor = call.once("gradient", compute)
        return gradient

    def jvp(self, call: Call, tangents: Tangents) -> Tensor:
        g = bundle(self._gradient(call)) * tangents[0]
        if int(call.arg("reduction")) in (_MEAN, _SUM):
            return g.flatten(2).sum(2)
        return g.sum(self._axis(call.node) + 2)

    def vjp(self, call: Call, cotangent: Tensor, arg: int, keep: bool) -> Tensor:
        return bundle(self._gradient(call)) * self._weigh(call, cotangent, 2)

    def curvature(
        self, call: Call, adjoint: Tensor, tangents: Tangents, args: Iterable[int], keep: bool
    ) -> dict[int, Tensor]:
        p, q = self._mass(call)
        axis = self._axis(call.node)
        mass = bundle(q.sum(axis + 1, keepdim=True) * self._weigh(call, adjoint, 1))
        # p_k Σ_j p_j (t_k - t_j), with t counted from the likeliest class: as p saturates nothing cancels.
        top = call.once("top", lambda: p.argmax(axis + 1, keepdim=True))
        p, t = bundle(p), tangents[0]
        t = t - torch.take_along_dim(t, bundle(top), axis + 2)
        return {0: mass * p * (t - (p * t).sum(axis + 2, keepdim=True))}

    def factor(self, call: Call, adjoint: Tensor) -> Tensor | None:
        """``S`` with ``∇²ℓ = S Sᵀ``: ``[N, r, *logits]``, one column per position and class but the likeliest.

        With the classes in ascending order of p and ``t_c = Σ_{j>c} p_j``, the columns are
        ``√(m p_c t_c / t_{c-1}) (e_c - Σ_{j>c} (p_j / t_c) e_j)``: the triangular factor of ``diag p - p pᵀ`` in closed
        form (K. Tanabe and M. Sagae, 1992). As the last p is at least 1/C no quotient loses digits.
        """
        p, q = self._mass(call)
        axis = self._axis(call.node) + 1
        mass = q.sum(axis, keepdim=True) * self._weigh(call, adjoint, 1)
        if bool((mass < 0).any()):
            return None
        n, classes = p.shape[0], p.shape[axis]
        p, order = p.movedim(axis, 1).reshape(n, classes, -1).sort(1)  # [N, C, T]
        tails = p.flip(1).cumsum(1).flip(1)  # [N, C, T], p_c included
        after = tails[:, 1:].unsqueeze(2)
        later = torch.ones(classes - 1, classes, dtype=p.dtype, device=p.device).triu(1)
        here = torch.eye(classes - 1, classes, dtype=p.dtype, device=p.device)
        columns = here[None, :, :, None] - later[None, :, :, None] * p.unsqueeze(1) / after  # [N, c, C, T]
        size = mass.movedim(axis, 1).reshape(mass.shape[0], 1, -1) * p[:, :-1] * tails[:, 1:] / tails[:, :-1]
        columns = size.sqrt().unsqueeze(2) * columns
        columns = columns.gather(2, order.argsort(1).unsqueeze(1).expand_as(columns))
        positions = p.shape[2]
        if positions > 1:
            columns = torch.diag_embed(columns).movedim(3, 1).flatten(1, 2)  # [N, T·c, C, T]
        shape = call.node.inputs[0].shape
        rest = [s for i, s in enumerate(shape) if i != axis - 1]
        return columns.reshape(n, -1, classes, *rest).movedim(2, axis + 1)


@register_rule("aten.nll_loss", "aten.nll_loss_nd", "aten.nll_loss2d")
class NegativeLogLikelihood(Multilinear):
    """Linear in the log-probabilities (class weights are constants)."""

    derivative: DerivativeClass = "linear"

    def curved(self, node: Node) -> bool:
        return False


def factor_rows(node: Node, otherwise: int) -> int:
    """Columns of the closed-form factor of a loss node's curvature; ``otherwise`` where there is none."""
    rows: Any = getattr(rule_for(node), "factor_rows", None)
    return otherwise if rows is None else int(rows(node))


def loss_factor(rule: Rule, call: Call, adjoint: Tensor) -> Tensor | None:
    """Closed-form factor of a loss node's curvature, where its rule knows one."""
    factor: Any = getattr(rule, "factor", None)
    if factor is None:
        return None
    result: Tensor | None = factor(call, adjoint)
    return result
