"""How far the elements of a node are from their kinks: in pre-activation, in the parameters, in the input.

The distance of an element with pre-activation ``z`` to its kink is ``|z|`` there, and to first order ``|z| / ‖∇z‖`` in
the parameters or in the sample's input; that is exact where ``z`` is affine in them (the first layer). For maxima,
``z`` is the difference of the two largest candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dagh._clarke._rows import element_rows
from dagh._clarke._sites import Site
from dagh._ir import Node
from dagh._rules._axes import align, flat
from dagh._rules._binary import Extremum
from dagh._rules._extrema import Extreme
from dagh._rules._select import MaxPool
from dagh._rules._switches import Switch
from dagh._state import State

#: Elements per node whose gradients are formed: the nearest ones.
_NEAREST = 64
#: Upper ends of the histogram's bins; the first is for exact ties.
EDGES = (0.0, 1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, float("inf"))


@dataclass(frozen=True)
class Margins:
    """One node: ``margin`` ``[N, elements]``, and the smallest distances in the parameters and in the input.

    Distances are over the elements of smallest margin; infinite where none of those can move.
    """

    margin: Tensor
    parameters: float
    inputs: float


def margins(
    state: State, node: Node, leaves: Sequence[Node], inputs: Sequence[Node], site: Site | None
) -> Margins | None:
    """Distances of one node to its kinks; ``None`` for an operation without kinks.

    Ties of ``site`` that do not matter are left out of the distances in parameters and input.
    """
    found = state.rule(node).kinks(state.call(node))
    if found is None or found.margin.numel() == 0:
        return None
    margin = found.margin.nan_to_num(nan=float("inf"))
    eligible = margin
    if site is not None:
        idle = ~site.live
        eligible = margin.clone()
        eligible[site.ties.sample[idle], site.ties.element[idle]] = float("inf")
    nearest = eligible.flatten().topk(min(_NEAREST, margin.numel()), largest=False).indices
    sample, element = nearest // margin.shape[1], nearest % margin.shape[1]
    sides = _sides(state, node, sample, element)
    if sides is None:
        return Margins(margin, float("nan"), float("nan"))
    z = eligible[sample, element]
    return Margins(margin, _distance(state, z, sides, sample, leaves), _distance(state, z, sides, sample, inputs))


_Sides = list[tuple[Node, Tensor, Tensor]]


def _sides(state: State, node: Node, sample: Tensor, element: Tensor) -> _Sides | None:
    """The margin as a signed sum of elements: ``(argument, places [K, c], weights [K, c])``."""
    rule, call = state.rule(node), state.call(node)
    if isinstance(rule, Extremum) or (isinstance(rule, Switch) and len(node.inputs) == 2):
        places = []
        for parent in node.inputs:
            grid = torch.arange(parent.numel, device=element.device).reshape(parent.shape)
            places.append(align(grid, 0, len(node.shape)).expand(node.shape).flatten()[element].unsqueeze(1))
        one = torch.ones_like(places[0])
        return [(node.inputs[0], places[0], one), (node.inputs[1], places[1], -one)]
    if isinstance(rule, MaxPool):
        values, where = rule._windows(call)
        n, _, _, k, count = values.shape
        rows = values.transpose(3, 4).reshape(n, -1, k)[sample, element]
        space = call.xs[0].shape[3:].numel()
        top = rows.topk(2, dim=1).indices
        return _pair(node, where[top, (element % count).unsqueeze(1)] + (element // count).unsqueeze(1) * space)
    if isinstance(rule, Extreme):
        x = rule._grouped(node, call.xs[0], 1) * rule._sign(node)
        top = x[sample, element].topk(2, dim=1).indices
        return _pair(node, rule._places(call)[element].gather(1, top))
    if flat(call.xs[0]).shape[1] != node.numel:
        return None
    return [(node.inputs[0], element.unsqueeze(1), torch.ones_like(element).unsqueeze(1))]


def _pair(node: Node, places: Tensor) -> _Sides:
    return [(node.inputs[0], places, torch.tensor([1, -1], device=places.device).expand(len(places), 2))]


def _distance(state: State, z: Tensor, sides: _Sides, sample: Tensor, leaves: Sequence[Node]) -> float:
    if not leaves:
        return float("nan")
    total: Tensor | float = 0.0
    for parent, places, weights in sides:
        total = total + element_rows(state, parent, sample, places, leaves, weights)
    assert isinstance(total, Tensor)
    slope = total.norm(dim=1)
    # Nothing that varies moves an element whose gradient vanishes.
    distance = torch.where((slope > 0) & z.isfinite(), z / slope, torch.full_like(z, float("inf")))
    return float(distance.min())


def histogram(all_margins: Sequence[Tensor]) -> tuple[int, ...]:
    """Elements per bin of :data:`EDGES`: on a kink, then up to each edge."""
    if not all_margins:
        return (0,) * len(EDGES)
    joined = torch.cat([m.flatten() for m in all_margins])
    counts = [int((joined <= edge).sum()) for edge in EDGES]
    return tuple(b - a for a, b in zip([0, *counts[:-1]], counts, strict=True))
