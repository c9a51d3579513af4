"""Row a4: products of layers with activations in between, bounded jointly from the weights.

An activation with slopes in [0, 1] has, at every point, a Jacobian D = (I + E)/2 with ``‖E‖ ≤ 1``. Expanding

    T_q D_{q-1} T_{q-1} ⋯ D_p T_p = 2^{p-q} Σ over subsets of gaps (products of E and contiguous blocks T_b ⋯ T_a)

gives ``‖T_q D ⋯ D T_p‖ ≤ 2^{p-q} Σ_cuts Π_blocks ‖T_b ⋯ T_a‖``, at most the product of the norms and often far less
(P. L. Combettes and J.-C. Pesquet, "Lipschitz certificates for layered network structures driven by averaged activation
operators", 2020). The sum over cuts is a recursion over where the last block begins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from ._activations import activation
from ._chain import Chain, ChainLayer, jacobian_of_step
from ._ladder import Problem, Value, summed
from ._layers import DENSE_ENTRIES, row_spread
from ._logs import add, log, spectral
from ._structure import MOVES, Absent

#: Work (multiplications) that forming the products of all contiguous layers may cost.
_WORK = 2e10

#: Activations whose slopes lie in [0, 1] everywhere, with σ(0) = 0.
AVERAGED = frozenset(("relu", "tanh", "atan", "relu6", "hardtanh", "clamp", "clamp_min"))

#: Changes of shape that keep the order of elements.
_RESHAPES = frozenset(("reshape", "view", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"))


@dataclass
class _Segment:
    """The linear steps between two activations as one matrix; norms of what stands before and behind its layer."""

    layer: ChainLayer
    matrix: Tensor
    before: float
    after: float


def a4(problem: Problem, chain: Chain) -> Value:
    """As :func:`a3`, with products of layers bounded jointly; for chains that are small enough to be written out.

    Raises :class:`Absent` where a layer is too large, or something other than an activation with slopes in [0, 1] and
    σ(0) = 0, or average pooling, stands between layers.
    """
    segments = _segments(chain)
    count = len(segments)
    matrices = [s.matrix for s in segments]
    work = sum(
        matrices[j].shape[0] * matrices[j].shape[1] * matrices[i].shape[1]
        for i in range(count)
        for j in range(i, count)
    )
    if work > _WORK:
        raise Absent(f"the products of all contiguous layers take {work:.1e} multiplications")

    @cache
    def block(first: int, last: int) -> Tensor:
        if first < last:
            return matrices[last] @ block(first, last - 1)
        return matrices[last]

    @cache
    def norm(first: int, last: int, spread: bool) -> float:
        found = block(first, last)
        return log(row_spread(found) if spread else float(spectral(found)))

    @cache
    def joint(first: int, last: int, spread: bool = False) -> float:
        """Logarithm of the bound on ``‖T_last D ⋯ T_first‖``, the smaller one of sum over cuts and product."""
        if first > last:
            return 0.0
        parts = [norm(first, last, spread) - (last - first) * math.log(2)]
        for cut in range(first, last):  # the last block begins behind ``cut``
            parts.append(joint(first, cut) + norm(cut + 1, last, spread) - (last - cut) * math.log(2))
        each = [norm(i, i, spread and i == last) for i in range(first, last + 1)]
        return float(min(add(*parts), sum(each)))

    blocks: dict[str, float] = {}
    names = {(use.node, use.arg): name for name, uses in chain.structure.uses.items() for use in uses}
    shifts = [0.5 * log(s.layer.facts.positions) + _bias(s.layer, chain) + s.after for s in segments]
    for p, segment in enumerate(segments):
        length = joint(0, p - 1) + problem.log_input
        for j in range(p):
            length = float(add(length, joint(j + 1, p - 1) + shifts[j]))
        gain = joint(p + 1, count - 1, problem.curvature.categorical) + segment.after
        facts = segment.layer.facts
        if (segment.layer.node, 1) in names:
            blocks[names[segment.layer.node, 1]] = gain + 0.5 * log(facts.kt) + length + segment.before
        if (segment.layer.node, 2) in names:
            blocks[names[segment.layer.node, 2]] = gain + 0.5 * log(facts.positions)
    return summed(blocks, problem.curvature.log_sup())


def _bias(layer: ChainLayer, chain: Chain) -> float:
    return log(float(chain.structure.value(layer.node.inputs[2]).norm())) if layer.bias else -math.inf


def _segments(chain: Chain) -> list[_Segment]:
    for one in chain.layers:
        _check(one, last=one is chain.layers[-1])
    layers = {layer.node: layer for layer in chain.layers}
    out: list[_Segment] = []
    layer: ChainLayer | None = None
    own: Tensor | None = None
    before: Tensor | None = None
    after: Tensor | None = None
    for step in (*chain.steps, None):
        if step is None or activation(step) is not None:
            if layer is None or own is None:
                raise Absent("no layer stands between two activations")
            matrix = own if before is None else own @ before
            matrix = matrix if after is None else after @ matrix
            norms = [0.0 if m is None else log(float(spectral(m))) for m in (before, after)]
            out.append(_Segment(layer, matrix, norms[0], norms[1]))
            layer = own = before = after = None
            continue
        if step.operation in _RESHAPES:
            continue
        if step.operation in MOVES:
            raise Absent(f"{step.name!r} ({step.operation}) reorders elements")
        matrix = _matrix(chain, step)
        if step in layers:
            if layer is not None:
                raise Absent("two layers follow each other without an activation")
            layer, own = layers[step], matrix
        elif layer is None:
            before = matrix if before is None else matrix @ before
        else:
            after = matrix if after is None else matrix @ after
    return out


def _matrix(chain: Chain, step: object) -> Tensor:
    numel, name = step.numel, step.name  # type: ignore[attr-defined]
    source = next(p for p in step.inputs if p in chain.structure.data)  # type: ignore[attr-defined]
    if numel * source.numel > DENSE_ENTRIES:
        raise Absent(f"{name!r} is a matrix of {numel:,} × {source.numel:,}, too large to be written out")
    return jacobian_of_step(chain.structure, step)


def _check(layer: ChainLayer, last: bool) -> None:
    names = [node.operation for node in layer.activations]
    if any(pool.kind != "avg" for pool in layer.pools):
        raise Absent("max-pooling stands between the layers")
    if last and names:
        raise Absent("an activation follows the last layer")
    if not last and len(names) != 1:
        raise Absent(f"{len(names)} activations follow {layer.node.name!r}; one is needed")
    for node in layer.activations:
        known = activation(node)
        if node.operation not in AVERAGED or known is None or known.offset or known.slope > 1:
            raise Absent(f"{node.operation} is not known to have slopes in [0, 1] and σ(0) = 0")
