"""One node at one point, ready for many products: everything that does not depend on the directions is done once.

A :class:`Local` maps tangents of a node's arguments to the node's tangent, and the node's row back to rows of its
arguments, curvature included. The base class asks the node's rule each time; the subclasses registered here and in the
modules named ``_local_*`` keep what the rule would compute again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dagh._ir import Node
from dagh._rules import Call, Rule
from dagh._rules._axes import align, bundle
from dagh._rules._bilinear import Linear
from dagh._rules._binary import Add, Mul
from dagh._rules._elementwise import Unary
from dagh._rules._linear_maps import Reshape

Moves = Mapping[int, Tensor]
Rows = dict[int, Tensor]


@dataclass
class Site:
    """Where a node stands in a schedule.

    ``moving`` are the arguments that have tangents, ``wanted`` those that need rows; ``adjoint`` (``[N, *shape]``) is
    ``None`` where the node's curvature does not count, ``has_row`` false where no row arrives at the node.
    """

    node: Node
    rule: Rule
    call: Call
    adjoint: Tensor | None
    moving: tuple[int, ...]
    wanted: tuple[int, ...]
    has_row: bool


class Local:
    """A node's derivatives at a point; tangents and rows are bundles ``[N or 1, B, *shape]``."""

    #: rows given back are new tensors, which whoever receives them may overwrite
    fresh = False
    #: a single row given back shares memory with the row received
    passes = False

    def __init__(self, site: Site) -> None:
        self.site = site
        self.rule, self.call, self.adjoint = site.rule, site.call, site.adjoint
        self.wanted = site.wanted
        self._rooms: dict[str, Tensor] = {}
        #: results are not to be held from one product to the next (bundles of several directions)
        self.transient = False
        self.prepare()

    def prepare(self) -> None:
        """Compute what does not depend on the directions."""

    @staticmethod
    def suits(site: Site) -> bool:
        """Whether this class can take the node's place in this schedule."""
        return True

    def push(self, t: Moves) -> Tensor:
        """``Σ_i D_i t_i``: ``[N, B, *shape]``."""
        return self.rule.jvp(self.call, t)

    def pull(self, row: Tensor | None, t: Moves, owned: bool = False) -> Rows:
        """``D_iᵀ row + Σ_j M_ij t_j`` for every wanted argument i, absent where zero; an ``owned`` row may be lost."""
        out: Rows = {}
        if row is not None:
            out = {i: self.rule.vjp(self.call, row, i, False) for i in self.wanted}
        if self.adjoint is not None and t:
            for i, term in self.rule.curvature(self.call, self.adjoint, t, self.wanted, False).items():
                if i in self.wanted:
                    out[i] = _add(out[i], self._fit(i, term)) if i in out else term
        return {i: self._fit(i, r) for i, r in out.items()}

    def _fit(self, arg: int, row: Tensor) -> Tensor:
        """Sum over samples what belongs to a tensor that all samples share, and conversely."""
        samples = self.call.xs[arg].shape[0]
        if samples == 1 and row.shape[0] > 1:
            return row.sum(0, keepdim=True)
        return row.expand(samples, *row.shape[1:]) if row.shape[0] < samples else row

    def room(self, name: str, shape: Sequence[int]) -> Tensor:
        """Memory for a result, the same in every product: fresh pages cost more than the arithmetic that fills them."""
        if self.transient:
            return self.call.out.new_empty(shape)
        held = self._rooms.get(name)
        if held is None or held.shape != torch.Size(shape):
            held = self._rooms[name] = self.call.out.new_empty(shape)
        return held

    def like(self, t: Tensor, samples: int = 0) -> list[int]:
        """Shape of the node's own bundle with as many directions as ``t`` has."""
        return [samples or self.call.out.shape[0], t.shape[1], *self.site.node.shape]

    def tensors(self) -> list[Tensor]:
        """What is kept from one product to the next, apart from values and adjoints."""
        held = list(self._rooms.values())
        for owner in (vars(self), self.call.memo):
            for kept in owner.values():
                held += [x for x in (kept if isinstance(kept, tuple) else (kept,)) if isinstance(x, Tensor)]
        return held


def _add(a: Tensor, b: Tensor) -> Tensor:
    """``a + b`` where the two may differ in whether the samples have been summed already."""
    if a.shape[0] > 1 and b.shape[0] == 1:
        a = a.sum(0, keepdim=True)
    return a + b


LOCALS: dict[type[Rule], list[type[Local]]] = {}


def local_for(*rules: type[Rule]) -> Callable[[type[Local]], type[Local]]:
    """Register a :class:`Local` for exactly these classes of rules (a user's subclass keeps its own methods)."""

    def decorate(cls: type[Local]) -> type[Local]:
        for rule in rules:
            LOCALS.setdefault(rule, []).append(cls)
        return cls

    return decorate


def make_local(site: Site) -> Local:
    """The :class:`Local` for a node: the last one registered for its rule that suits, else the rule itself."""
    for cls in reversed(LOCALS.get(type(site.rule), [])):
        if cls.suits(site):
            return cls(site)
    return Local(site)


def settle(row: Tensor | None, term: Tensor | None, *, owned: bool) -> Tensor | None:
    """``row + term``, in place where the row may be overwritten."""
    if row is None or term is None:
        return term if row is None else row
    return row.add_(term) if owned else row + term


@local_for(Unary)
class UnaryLocal(Local):
    """``t σ'``, and back ``r σ' + t δ σ''``."""

    fresh = True

    def prepare(self) -> None:
        assert isinstance(self.rule, Unary)
        first, second = self.rule._derivatives(self.call)
        self.slope = bundle(first)
        self.bend = None if self.adjoint is None else bundle(self.adjoint * second)
        self.call.memo.pop("derivatives", None)

    def push(self, t: Moves) -> Tensor:
        return torch.mul(t[0], self.slope, out=self.room("push", self.like(t[0])))

    def pull(self, row: Tensor | None, t: Moves, owned: bool = False) -> Rows:
        if row is None:
            return {} if self.bend is None else {0: t[0] * self.bend}
        out = row.mul_(self.slope) if owned and row.shape[0] == self.slope.shape[0] else row * self.slope
        if self.bend is not None and 0 in t:
            out.addcmul_(t[0], self.bend)
        return {0: out}


@local_for(Reshape)
class ReshapeLocal(Local):
    """Nothing but a view."""

    passes = True


@local_for(Add)
class AddLocal(Local):
    """Plain sums: nothing is multiplied by one."""

    @staticmethod
    def suits(site: Site) -> bool:
        node = site.node
        return (
            node.operation.startswith("add")
            and node.arg("alpha") in (None, 1)
            and all(len(p.shape) == len(node.shape) or p.shape == node.shape[-len(p.shape) :] for p in node.inputs)
        )

    def prepare(self) -> None:
        node = self.site.node
        self.passes = len(self.wanted) == 1
        self.over = [broadcast_axes(x.shape[0], p, self.call) for x, p in zip(self.call.xs, node.inputs, strict=True)]
        self.aligned = [[1] * (len(node.shape) - len(p.shape)) for p in node.inputs]

    def push(self, t: Moves) -> Tensor:
        moved = [x.reshape(*x.shape[:2], *self.aligned[i], *x.shape[2:]) for i, x in t.items()]
        if len(moved) == 1:
            return moved[0].expand(self.like(moved[0]))
        return torch.add(*moved, out=self.room("push", self.like(moved[0])))

    def pull(self, row: Tensor | None, t: Moves, owned: bool = False) -> Rows:
        if row is None:
            return {}
        out: Rows = {}
        for i in self.wanted:
            parent = self.site.node.inputs[i]
            out[i] = row.sum(self.over[i]).reshape(-1, row.shape[1], *parent.shape) if self.over[i] else row
        return out


def broadcast_axes(samples: int, parent: Node, call: Call) -> list[int]:
    """Axes of a bundle of the node over which the row of an argument is summed."""
    shape = call.node.shape
    missing = len(shape) - len(parent.shape)
    own = [1] * missing + list(parent.shape)
    lead = [0] if samples < call.out.shape[0] else []
    return lead + [d + 2 for d, s in enumerate(own) if s < shape[d] or d < missing]


@local_for(Mul)
class MulLocal(Local):
    """Products of two broadcast tensors."""

    fresh = True

    @staticmethod
    def suits(site: Site) -> bool:
        return len(site.node.inputs) == 2

    def prepare(self) -> None:
        node, rank = self.site.node, len(self.site.node.shape)
        self.factors = tuple(bundle(align(x, 1, rank)) for x in self.call.xs)
        self.delta = None if self.adjoint is None else bundle(self.adjoint)
        self.over = [broadcast_axes(x.shape[0], p, self.call) for x, p in zip(self.call.xs, node.inputs, strict=True)]

    def push(self, t: Moves) -> Tensor:
        rank = len(self.site.node.shape)
        moved = {i: align(x, 2, rank) for i, x in t.items()}
        i = next(iter(moved))
        out = torch.mul(moved[i], self.factors[1 - i], out=self.room("push", self.like(t[i])))
        return out.addcmul_(moved[1 - i], self.factors[i]) if len(moved) == 2 else out

    def pull(self, row: Tensor | None, t: Moves, owned: bool = False) -> Rows:
        out: Rows = {}
        for i in self.wanted:
            other = align(t[1 - i], 2, len(self.site.node.shape)) if self.delta is not None and 1 - i in t else None
            some = row if row is not None else other
            if some is None:
                continue
            room = self.room(f"pull {i}", self.like(some))
            if row is not None:
                torch.mul(row, self.factors[1 - i], out=room)
                if other is not None and self.delta is not None:
                    room.addcmul_(other, self.delta)
            elif other is not None and self.delta is not None:
                torch.mul(other, self.delta, out=room)
            shape = self.site.node.inputs[i].shape
            out[i] = room.sum(self.over[i]).reshape(-1, some.shape[1], *shape) if self.over[i] else room
        return out


@local_for(Linear)
class LinearLocal(Local):
    """Two matrix products forward, up to four back, straight into one another for a single direction."""

    fresh = True

    @staticmethod
    def suits(site: Site) -> bool:
        return all(x.shape[0] == 1 for x in site.call.xs[1:])

    def prepare(self) -> None:
        x, w = self.call.xs[:2]
        self.x, self.w = x.reshape(-1, x.shape[-1]), w[0]
        self.delta = None if self.adjoint is None else self.adjoint.reshape(-1, w.shape[1])

    def push(self, t: Moves) -> Tensor:
        if next(iter(t.values())).shape[1] > 1:
            return super().push(t)
        tw, tb = t.get(1), t.get(2)
        room = self.room("push", (self.x.shape[0], self.w.shape[0]))
        if 0 in t:
            self._multiply(room, t[0].reshape(-1, self.w.shape[1]), self.w.T, None if tb is None else tb[0, 0])
            if tw is not None:
                room.addmm_(self.x, tw[0, 0].T)
        elif tw is not None:
            self._multiply(room, self.x, tw[0, 0].T, None if tb is None else tb[0, 0])
        else:
            return super().push(t)
        return room.view(self.call.xs[0].shape[0], 1, *self.site.node.shape)

    @staticmethod
    def _multiply(room: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
        if bias is None:
            torch.mm(a, b, out=room)
        else:
            torch.addmm(bias, a, b, out=room)

    def pull(self, row: Tensor | None, t: Moves, owned: bool = False) -> Rows:
        some = row if row is not None else next(iter(t.values()), None)
        if some is None:
            return {}
        if some.shape[1] > 1:
            return super().pull(row, t, owned)
        out: Rows = {}
        flat = None if row is None else row.reshape(-1, self.w.shape[0])
        for i in self.wanted:
            if i == 2:
                if flat is not None:
                    out[2] = flat.sum(0).view(1, 1, -1)
                continue
            bends = self.delta is not None and 1 - i in t
            if flat is None and not bends:
                continue
            term = self.room(f"pull {i}", self.x.shape if i == 0 else self.w.shape)
            if flat is not None:
                torch.mm(flat if i == 0 else flat.T, self.w if i == 0 else self.x, out=term)
            if bends and self.delta is not None:
                left = self.delta if i == 0 else self.delta.T
                right = t[1][0, 0] if i == 0 else t[0].reshape(-1, self.w.shape[1])
                term.addmm_(left, right, beta=0 if flat is None else 1)
            out[i] = term.view(self.call.xs[i].shape[0], 1, *self.site.node.inputs[i].shape)
        return out
