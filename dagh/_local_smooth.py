"""Softmax, standardization and cross-entropy at one point, ready for many products."""

from __future__ import annotations

import torch
from torch import Tensor

from dagh._local import Local, Moves, Rows, Site, local_for
from dagh._rules._axes import bundle
from dagh._rules._losses import CrossEntropy
from dagh._rules._normalize import Softmax, Standardize


@local_for(Softmax)
class SoftmaxLocal(Local):
    """``p (t - ⟨p, t⟩)`` and its derivative, with the centred adjoint kept."""

    fresh = True

    def prepare(self) -> None:
        assert isinstance(self.rule, Softmax)
        self.p, self.dim = bundle(self.call.out), self.rule._dim(self.site.node, 2)
        if self.adjoint is not None:
            self.g = bundle(self.adjoint)
            self.centered = self.g - (self.p * self.g).sum(self.dim, keepdim=True)

    def _derivative(self, t: Tensor) -> Tensor:
        weighed = self.p * t
        return weighed.addcmul_(self.p, weighed.sum(self.dim, keepdim=True), value=-1)

    def push(self, t: Moves) -> Tensor:
        return self._derivative(t[0])

    def pull(self, row: Tensor | None, t: Moves, owned: bool = False) -> Rows:
        if self.adjoint is None or 0 not in t:
            return {} if row is None else {0: self._derivative(row)}
        moved = self._derivative(t[0])
        # D r + ṗ (g - ⟨p, g⟩) - p ⟨ṗ, g⟩, with both sums over the axis taken at once
        total = moved * self.centered
        inner = (moved * self.g).sum(self.dim, keepdim=True)
        if row is not None:
            weighed = self.p * row
            inner = inner + weighed.sum(self.dim, keepdim=True)
            total += weighed
        return {0: total.addcmul_(self.p, inner, value=-1)}


@local_for(Standardize)
class StandardizeLocal(Local):
    """``(P t - y ⟨y, t⟩) / s`` and its derivative, with the projected adjoint kept."""

    fresh = True

    def prepare(self) -> None:
        assert isinstance(self.rule, Standardize)
        self.y, self.inverse = bundle(self.call.out), self.rule._inverse_scale(self.call)
        self.dims, self.center = self.rule._dims(self.site.node, 2), bool(self.call.arg("center"))
        if self.adjoint is not None:
            pulled, self.mean_g = self.rule._project(self.call, bundle(self.adjoint))
            self.g, self.pulled = bundle(self.adjoint) * self.inverse, pulled * self.inverse * self.inverse
            self.mean_g = self.mean_g * self.inverse

    def _project(self, t: Tensor) -> tuple[Tensor, Tensor]:
        along = (self.y * t).mean(self.dims, keepdim=True)
        centered = t - t.mean(self.dims, keepdim=True) if self.center else t
        return torch.addcmul(centered, self.y, along, value=-1), along

    def push(self, t: Moves) -> Tensor:
        return self._project(t[0])[0].mul_(self.inverse)

    def pull(self, row: Tensor | None, t: Moves, owned: bool = False) -> Rows:
        out = None if row is None else self.push({0: row})
        if self.adjoint is None or 0 not in t:
            return {} if out is None else {0: out}
        moved, along = self._project(t[0])
        moved *= self.inverse
        # -(⟨y, t⟩ P g / s² + ẏ ⟨y, g⟩ / s + y ⟨ẏ, g⟩ / s)
        cross = (moved * self.g).mean(self.dims, keepdim=True)
        bend = torch.addcmul(moved * self.mean_g, self.pulled, along).addcmul_(self.y, cross)
        return {0: bend.neg_() if out is None else out.sub_(bend)}


@local_for(CrossEntropy)
class CrossEntropyLocal(Local):
    """``m (diag p - p pᵀ)`` with the adjoint in ``m p``."""

    fresh = True

    @staticmethod
    def suits(site: Site) -> bool:
        return site.wanted == (0,) and site.moving == (0,) and not site.has_row and site.adjoint is not None

    def prepare(self) -> None:
        assert isinstance(self.rule, CrossEntropy) and self.adjoint is not None
        p, q = self.rule._mass(self.call)
        axis = self.rule._axis(self.site.node)
        mass = q.sum(axis + 1, keepdim=True) * self.rule._weigh(self.call, self.adjoint, 1)
        self.p, self.mass, self.axis = bundle(p), bundle(mass * p), axis + 2
        self.top = bundle(p.argmax(axis + 1, keepdim=True))

    def pull(self, row: Tensor | None, t: Moves, owned: bool = False) -> Rows:
        # Counted from the likeliest class: as p saturates nothing cancels.
        moved = t[0] - torch.take_along_dim(t[0], self.top, self.axis)
        return {0: (moved - (self.p * moved).sum(self.axis, keepdim=True)) * self.mass}
