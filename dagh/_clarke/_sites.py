"""Ties of a whole network: where they are, which of them matter, and the network with their branches forced."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from dagh._clarke._reach import Reach
from dagh._ir import Node
from dagh._rules import Call, Ties
from dagh._rules._axes import flat
from dagh._state import State

#: A branch for every tie of some nodes: node -> candidate, ``[K]``.
Pattern = Mapping[Node, Tensor]


@dataclass(eq=False)
class Site:
    """A node with ties. ``live`` (``[K]``) marks those that something can move and the loss can feel."""

    node: Node
    ties: Ties
    live: Tensor
    merged: Tensor
    """``[K, C]``: candidates that remain when constants equal to one another count once"""

    @cached_property
    def count(self) -> int:
        return int(self.live.sum())

    @cached_property
    def smooth(self) -> Tensor:
        """``[K]``: ties across which the gradient is continuous, by the operation or by how its value is used."""
        return self.ties.smooth


@dataclass(eq=False)
class Sites:
    """All ties between the leaves and the loss, in topological order."""

    state: State
    leaves: tuple[Node, ...]
    reach: Reach | None
    """``None`` where there is no tie at all"""
    all: tuple[Site, ...]

    @property
    def live(self) -> tuple[Site, ...]:
        return tuple(s for s in self.all if s.count)

    @property
    def ties(self) -> int:
        """Exact ties, whether they matter or not."""
        return sum(len(s.ties) for s in self.all)

    @property
    def live_ties(self) -> int:
        return sum(s.count for s in self.all)


def find_sites(state: State, leaves: Collection[Node]) -> Sites:
    """Every exact tie of nodes between ``leaves`` and the loss."""
    assert state.program.loss is not None
    within = state.program.descendants(list(leaves)) & state.program.ancestors([state.program.loss])
    tied = []
    for node in state.program:
        if node.op is not None and node in within:
            ties = state.rule(node).ties(state.call(node))
            if ties is not None:
                tied.append((node, ties))
    reach = Reach(state, leaves) if tied else None
    found = [_site(state, reach, node, ties) for node, ties in tied] if reach is not None else []
    return Sites(state, tuple(leaves), reach, tuple(found))


def _site(state: State, reach: Reach, node: Node, ties: Ties) -> Site:
    moving = torch.zeros_like(ties.valid)
    for c, arg in enumerate(ties.arg):
        if arg >= 0 and node.inputs[arg] in reach.moving:
            mask = reach.moving[node.inputs[arg]]
            moving[:, c] = flat(mask)[rows_of(mask, ties.sample), ties.place[:, c]]
    moving &= ties.valid
    still = ties.valid & ~moving
    merged = moving | (still & (still.cumsum(1) == 1))
    felt = reach.felt.get(node)
    live = (merged.sum(1) > 1) & (felt is not None)
    if felt is not None:
        live &= flat(felt)[rows_of(felt, ties.sample), ties.element]
    ties = replace(ties, smooth=ties.smooth | _smoothly_used(state, node))
    return Site(node, ties, live, merged)


def _smoothly_used(state: State, node: Node) -> bool:
    """Whether ``r = relu(z)`` is only used as ``r^p`` (p ≥ 2), ``r·r`` or ``z·r``, whose gradients are Lipschitz."""
    users = state.program.users[node]
    if node.operation not in ("relu", "abs", "clamp_min", "threshold") or not users:
        return False
    for user in users:
        power = user.key == "aten.pow.Tensor_Scalar" and float(user.arg("exponent")) >= 2
        product = user.key == "aten.mul.Tensor" and all(p is node or p is node.inputs[0] for p in user.inputs)
        if not (power or (product and len(user.inputs) == 2)):
            return False
    point = {"clamp_min": "min", "threshold": "threshold"}.get(node.operation)
    return point is None or float(node.arg(point)) == 0


def rows_of(t: Tensor, sample: Tensor) -> Tensor:
    """Sample indices into ``t``, all 0 where it does not depend on the sample."""
    return torch.zeros_like(sample) if t.shape[0] == 1 else sample


def forced(state: State, sites: Collection[Site], pattern: Pattern) -> State:
    """The same point with these branches taken at the ties; PyTorch's choice at nodes without an entry.

    The branches lie among the values, under a stand-in node each: whatever cuts the samples cuts them too. A node that
    jumps (a comparison) gets the values of its branches, and what is computed from it is computed anew.
    """
    values, branches = dict(state.values), dict(state.branches)
    jumps: dict[Node, tuple[Site, Tensor]] = {}
    for site in sites:
        branch = pattern.get(site.node)
        if branch is None:
            continue
        if site.ties.levels is not None:
            jumps[site.node] = site, site.ties.levels.gather(1, branch.unsqueeze(1)).squeeze(1)
            continue
        plain = Call(site.node, [state.values[p] for p in site.node.inputs], state.values[site.node])
        kink = state.rule(site.node).force(plain, site.ties, branch)
        stand_in = Node(
            f"{site.node.name}·branch", "constant", site.node.shape, kink.dtype, batched=kink.shape[0] == state.samples
        )
        values[stand_in] = kink
        branches[site.node] = stand_in
    if jumps:
        _recompute(state, values, jumps)
    return replace(state, values=values, branches=branches)


def _recompute(state: State, values: dict[Node, Tensor], jumps: Mapping[Node, tuple[Site, Tensor]]) -> None:
    """Put the values of the branches in place, and follow them to the loss."""
    changed: set[Node] = set()
    with torch.no_grad():
        for node in state.program:
            if node.op is not None and any(p in changed for p in node.inputs):
                value = state.rule(node).value(node, [values[p] for p in node.inputs])
                if not torch.equal(value, values[node]):
                    values[node] = value
                    changed.add(node)
            if node in jumps:
                site, level = jumps[node]
                value = flat(values[node]).clone()
                value[site.ties.sample, site.ties.element] = level.to(value.dtype)
                values[node] = value.reshape(values[node].shape)
                changed.add(node)


def loss_jump(state: State, made: Iterable[State]) -> float:
    """How far the loss of a forced state is from that of the point: 0 but where the loss itself jumps."""
    here = state.loss
    most = max((abs(s.loss - here) for s in made), default=0.0)
    each = state.values[state.program.loss].reshape(-1) * state.weights if state.program.loss is not None else None
    size = 0.0 if each is None else float(each.abs().sum())
    return most if most > 1e3 * torch.finfo(state.weights.dtype).eps * max(size, 1e-30) else 0.0


def candidates(state: State, site: Site, values: Mapping[Node, Tensor]) -> Tensor:
    """Candidate values ``[K, C]`` of every tie, ``sign`` included and -inf where there is no candidate."""
    ties = site.ties
    out = torch.empty(len(ties), len(ties.arg), dtype=state.weights.dtype, device=ties.place.device)
    for c, arg in enumerate(ties.arg):
        if arg < 0:
            out[:, c] = ties.level
        else:
            x = values[site.node.inputs[arg]]
            out[:, c] = flat(x)[rows_of(x, ties.sample), ties.place[:, c]]
    return (ties.sign * out).masked_fill(~ties.valid, float("-inf"))
