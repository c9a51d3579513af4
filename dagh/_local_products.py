"""Matrix products, numbers and slices at one point, ready for many products."""

from __future__ import annotations

import torch
from torch import Tensor

from dagh._local import Local, Moves, Rows, Site, local_for
from dagh._rules._bilinear import MatMul
from dagh._rules._binary import Div, Mul
from dagh._rules._linear_maps import Narrow


@local_for(MatMul)
class MatMulLocal(Local):
    """Batched products without broadcasting, straight into one another for a single direction."""

    fresh = True

    @staticmethod
    def suits(site: Site) -> bool:
        shapes = [p.shape for p in site.node.inputs]
        batch = site.node.shape[:-2]
        same = all(len(s) >= 2 and s[:-2] == batch for s in shapes)
        return same and len({x.shape[0] for x in site.call.xs}) == 1

    def prepare(self) -> None:
        self.flat = tuple(x.reshape(-1, *x.shape[-2:]) for x in self.call.xs)
        self.delta = None if self.adjoint is None else self.adjoint.reshape(-1, *self.adjoint.shape[-2:])

    def push(self, t: Moves) -> Tensor:
        if next(iter(t.values())).shape[1] > 1:
            return super().push(t)
        room = self.room("push", (self.flat[0].shape[0], *self.site.node.shape[-2:]))
        first = True
        for i, moved in t.items():
            own = moved.reshape(-1, *moved.shape[-2:])
            a, b = (own, self.flat[1]) if i == 0 else (self.flat[0], own)
            room.baddbmm_(a, b, beta=0 if first else 1)
            first = False
        return room.view(-1, 1, *self.site.node.shape)

    def pull(self, row: Tensor | None, t: Moves, owned: bool = False) -> Rows:
        some = row if row is not None else next(iter(t.values()), None)
        if some is None:
            return {}
        if some.shape[1] > 1:
            return super().pull(row, t, owned)
        out: Rows = {}
        flat = None if row is None else row.reshape(-1, *row.shape[-2:])
        for i in self.wanted:
            room = self.room(f"pull {i}", self.flat[i].shape)
            terms = [] if flat is None else [(flat, self.flat[1 - i])]
            if self.delta is not None and 1 - i in t:
                terms.append((self.delta, t[1 - i].reshape(-1, *t[1 - i].shape[-2:])))
            for k, (s, other) in enumerate(terms):
                a, b = (s, other.mT) if i == 0 else (other.mT, s)
                room.baddbmm_(a, b, beta=0 if k == 0 else 1)
            if terms:
                out[i] = room.view(-1, 1, *self.site.node.inputs[i].shape)
        return out


@local_for(Mul, Div)
class NumberLocal(Local):
    """Multiplication or division by a number."""

    fresh = True

    @staticmethod
    def suits(site: Site) -> bool:
        node = site.node
        return (
            len(node.inputs) == 1 and isinstance(node.arg("other"), (int, float)) and node.inputs[0].shape == node.shape
        )

    def prepare(self) -> None:
        number = float(self.call.arg("other"))
        self.number = 1 / number if isinstance(self.rule, Div) else number

    def push(self, t: Moves) -> Tensor:
        return torch.mul(t[0], self.number, out=self.room("push", self.like(t[0])))

    def pull(self, row: Tensor | None, t: Moves, owned: bool = False) -> Rows:
        if row is None:
            return {}
        return {0: row.mul_(self.number) if owned else torch.mul(row, self.number, out=self.room("pull", row.shape))}


@local_for(Narrow)
class NarrowLocal(Local):
    """A slice: its row is added where it was cut."""

    def into(self, parent_row: Tensor | None, row: Tensor) -> Tensor:
        """The argument's row with this one added; a ``parent_row`` given is overwritten."""
        assert isinstance(self.rule, Narrow)
        if parent_row is None:
            shape = (row.shape[0], row.shape[1], *self.site.node.inputs[0].shape)
            parent_row = self.room("pull", shape).zero_()
        self.rule._take(self.site.node, parent_row, 2).add_(row)
        return parent_row
