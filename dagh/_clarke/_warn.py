"""One warning per graph where PyTorch's choice of derivative decides."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from dagh._chunks import ranges
from dagh._clarke._completion import split
from dagh._clarke._nearby import branches_at, steps, values_at
from dagh._clarke._sites import Sites, find_sites
from dagh._state import State
from dagh.errors import user_level

if TYPE_CHECKING:
    from dagh._graph import Graph

#: Calls seen per graph; -1 once it has warned.
_SEEN: WeakKeyDictionary[Graph, int] = WeakKeyDictionary()


#: Elements of one node that are looked at together.
_ENTRIES = 1 << 18


class KinkWarning(UserWarning):
    """The point is on a kink that matters, and the Hessian returned is the one of PyTorch's choice there."""


def _parts(sites: Sites) -> bool:
    """Whether some tie that matters comes apart at one of four points nearby; equal functions never do."""
    rng = np.random.default_rng(0)
    size = sum(leaf.numel for leaf in sites.leaves)
    step = steps(sites.state.weights.dtype)[0]
    for d in rng.standard_normal((2, size)):
        for sign in (step, -step):
            values = values_at(sites.state, split(sites, sign * d), sites.live[-1].node)
            read = branches_at(sites.state, sites.live, values)
            if any(bool(((read[s.node] >= 0) & s.live).any()) for s in sites.live):
                return True
    return False


def warn_at_ties(graph: Graph, state: State) -> None:
    """Warn once per graph, and only of ties that something can move and the loss can feel.

    Looks on calls 1, 4, 16, 64, … of a graph: a look costs a few forward passes.
    """
    calls = _SEEN.get(graph, 0)
    if calls < 0:
        return
    _SEEN[graph] = calls + 1
    if (calls + 1) & calls or calls.bit_length() % 2:  # not a power of four
        return
    sources = [n for n in state.program if n in state.sources]
    # Some samples at a time: the candidates of every element take several times the memory of the values.
    widest = max((v.numel for v in state.program), default=1)
    step = max(1, _ENTRIES // max(1, widest))
    count, node = 0, None
    for window in ranges(state.samples, step):
        sites = find_sites(state.narrow(window), sources)
        count += sites.live_ties if sites.live else 0
        if node is None and sites.live and _parts(sites):
            node = sites.live[0].node
    if node is None:
        return
    _SEEN[graph] = -1
    many = f"{count} elements are" if count > 1 else "one element is"
    warnings.warn(
        f"{many} exactly on a kink (first: {node.name!r}), where the Hessian does not exist; PyTorch's choice of "
        "derivative is taken. dagh.kinks reports what meets there; kinks= takes another choice",
        KinkWarning,
        stacklevel=user_level(),
    )
