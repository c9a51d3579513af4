"""``kinks=`` beyond single slopes: one direction, averages, least norm, the whole set, or a refusal."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from dagh._kinks import KinkPolicy
from dagh.errors import KinkError, ReductionError, UnknownNameError

if TYPE_CHECKING:
    from dagh._ir import Node
    from dagh._state import State

Policy = Literal["direction", "mean", "min_norm", "min_norm_block", "box", "enumerate", "raise"]
Direction = str | Mapping[str, Tensor] | torch.optim.Optimizer


@dataclass(frozen=True)
class AtKinks:
    """What to return where the Hessian does not exist, for ``kinks=``; a bare string is one with default options.

    Args:
        policy: ``"direction"``: the Hessian just beside the point in one direction. ``"mean"``: the average over
            directions. ``"min_norm"``: the element of least Frobenius norm in the convex hull of the limiting Hessians.
            ``"min_norm_block"``: the same block by block (in general no element of that hull).
            ``"box"``: the middle of an entrywise enclosure of every limiting Hessian, with its half width as
            ``info["kinks"]["radius"]``. ``"enumerate"``: all limiting Hessians, as a :class:`~dagh.LimitingSet`.
            ``"raise"``: an error at a tie that matters.
        direction: for ``"direction"``: ``"random"`` (Gaussian, from ``seed``), ``"step"`` (steepest descent, by
            PyTorch's own gradient), ``{name: tensor}`` (what is not named stands still), or an optimizer, whose next
            step is taken, on copies, with that gradient.
        samples: look along this many random directions instead of enumerating: patterns with a small share may be
            missed, so the set is a part of the whole, and the least norm over it an upper bound.
        max_patterns: refuse to enumerate more, or to form more Hessians for a box.
        seed: of random directions.

    Raises :class:`~dagh.errors.ReductionError` for an unknown policy or option.
    """

    policy: Policy
    direction: Direction = "random"
    samples: int | None = None
    max_patterns: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if self.policy not in self.policies():
            raise ReductionError(f"AtKinks({self.policy!r}): expected one of {', '.join(map(repr, self.policies()))}")
        if isinstance(self.direction, str) and self.direction not in ("random", "step"):
            raise ReductionError(
                f"direction={self.direction!r}: expected 'random', 'step', a dict of tensors or an optimizer"
            )
        if not isinstance(self.direction, (str, Mapping, torch.optim.Optimizer)):
            raise ReductionError(f"direction: a string, a dict or an optimizer, not {type(self.direction).__name__}")
        if (self.samples is not None and self.samples < 1) or self.max_patterns < 1:
            raise ReductionError("samples and max_patterns must be positive")

    @staticmethod
    def policies() -> tuple[str, ...]:
        """Known policies."""
        return get_args(Policy)

    @classmethod
    def of(cls, kinks: Any) -> AtKinks | None:
        """``kinks`` itself, or the policy that a string stands for; ``None`` for everything else."""
        if isinstance(kinks, AtKinks):
            return kinks
        return cls(kinks) if isinstance(kinks, str) and kinks in cls.policies() else None  # type: ignore[arg-type]

    @property
    def pointwise(self) -> bool:
        """Whether the answer is one network with certain branches, as opposed to a combination of several."""
        return self.policy in ("direction", "raise")


class Deferred(KinkPolicy):
    """PyTorch's choice until values are known, then the branches that a policy picks."""

    def __init__(self, at: AtKinks) -> None:
        super().__init__(None)
        self.at = at

    def settle(self, state: State) -> State:
        """The state with its branches forced (``"direction"``), or an error at ties (``"raise"``)."""
        if not self.at.pointwise:
            raise KinkError(
                f"kinks={self.at.policy!r} combines Hessians of several branches: ask dagh.hessian or a related "
                "function for it; a state takes one branch ('direction', 'left', 'right', a slope)"
            )
        return settle(self.at, state)


def settle(at: AtKinks, state: State) -> State:
    """See :meth:`Deferred.settle`."""
    from dagh._clarke._along import along
    from dagh._clarke._sites import find_sites, forced

    leaves = [n for n in state.program if n in state.sources]
    sites = find_sites(state, leaves)
    if not sites.live:
        return state
    if at.policy == "raise":
        raise KinkError(_where(state, sites.live_ties, [s.node for s in sites.live]))
    from dagh._clarke._limiting import _refuse_jump

    branch = along(sites, direction_of(at, state, sites)).branch
    _refuse_jump(sites, [branch])
    return forced(state, sites.live, branch)


def _where(state: State, ties: int, nodes: list[Node]) -> str:
    first = nodes[0]
    place = f"{first.name!r}" + (f" ({first.module})" if first.module else "")
    more = f" and {len(nodes) - 1} more nodes" if len(nodes) > 1 else ""
    many = f"{ties} elements" if ties > 1 else "one element"
    return (
        f"the Hessian does not exist here: {many} exactly on a kink, at {place}{more}; dagh.kinks says what meets there"
    )


def direction_of(at: AtKinks, state: State, sites: Any) -> Any:
    """The direction as one vector over all leaves, in their order. Refused where it is zero or not finite."""
    import numpy as np

    found = _direction(at, state, sites)
    if not bool(np.isfinite(found).all()):
        raise ReductionError("the direction contains NaN or Inf")
    if not bool(found.any()):
        raise ReductionError(
            "the direction is zero (no step is taken at a vanishing gradient); use 'random', or name one"
        )
    return found


def _direction(at: AtKinks, state: State, sites: Any) -> Any:
    import numpy as np

    from dagh._clarke._completion import join

    wanted = at.direction
    if isinstance(wanted, str) and wanted == "random":
        return np.random.default_rng(at.seed).standard_normal(sum(leaf.numel for leaf in sites.leaves))
    if isinstance(wanted, Mapping):
        return join(sites, _named(wanted, state, sites))
    gradient = {leaf: _total(state.adjoints.get(leaf), leaf) for leaf in sites.leaves}
    if isinstance(wanted, torch.optim.Optimizer):
        return join(sites, _next_step(wanted, state, gradient))
    return -join(sites, {leaf: g for leaf, g in gradient.items() if g is not None})


def _total(delta: Tensor | None, leaf: Node) -> Tensor | None:
    return None if delta is None else delta.sum(0).reshape(leaf.shape)


def _named(wanted: Mapping[str, Tensor], state: State, sites: Any) -> dict[Node, Tensor]:
    out = {}
    for name, tensor in wanted.items():
        leaf = state.program.parameters.get(name) or state.program.by_name.get(name)
        if leaf is None or leaf not in sites.leaves:
            raise UnknownNameError.of("variable of this Hessian", name, [leaf.name for leaf in sites.leaves])
        if not isinstance(tensor, Tensor) or tensor.numel() != leaf.numel:
            raise ReductionError(f"direction[{name!r}] should be a tensor of shape {tuple(leaf.shape)}")
        out[leaf] = tensor
    return out


def _next_step(
    optimizer: torch.optim.Optimizer, state: State, gradient: Mapping[Node, Tensor | None]
) -> dict[Node, Tensor]:
    """What the optimizer would add to each leaf now; nothing of it or of the model is changed."""
    twin = copy.deepcopy(optimizer)
    pairs = [
        (mine, theirs)
        for a, b in zip(optimizer.param_groups, twin.param_groups, strict=True)
        for mine, theirs in zip(a["params"], b["params"], strict=True)
    ]
    by_address = {(mine.data_ptr(), mine.shape): theirs for mine, theirs in pairs}
    held: dict[Node, tuple[Tensor, Tensor]] = {}
    for leaf, g in gradient.items():
        value = state.values[leaf][0]
        theirs = by_address.get((state.values[leaf].data_ptr(), leaf.shape))
        if theirs is None:
            theirs = next((t for t in by_address.values() if t.shape == leaf.shape and torch.equal(t, value)), None)
        if theirs is not None:
            held[leaf] = (theirs, theirs.detach().clone())
            theirs.grad = torch.zeros_like(theirs) if g is None else g.to(theirs)
    if not held:
        raise ReductionError("the optimizer holds none of the parameters of this Hessian")
    twin.step()
    return {leaf: after.detach() - before for leaf, (after, before) in held.items()}
