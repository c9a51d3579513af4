"""Bounds by one sweep over the graph: lengths forward, gains backward, and their combination into ``‖H_O‖``.

``H_O = Jᵀ A J`` and ``J_W = Σ_u G_u D_{u←W}`` over the nodes u where W meets the data, ``G_u = ∂z/∂f_u``. Hence

    ‖H_O‖ ≤ a Σ_W (Σ_u ‖G_u‖ ‖D_{u←W}‖)²,    a ≥ ‖A‖,

with ``‖G_v‖ ≤ Σ_u ‖G_u‖ ‖D_{u←v}‖`` over the users u of v: sums over paths where the graph branches, sums over uses
where a parameter is shared. On a chain this is ``a X² Σ_p r_p Π_{i≠p} ‖T_i‖² π_i²``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from . import _lipschitz
from ._layers import LayerFacts, convolution_facts, linear_facts
from ._lipschitz import Site
from ._logs import ZERO, Log, add, add_all, flat, log, log_tensor, spectral, times
from ._structure import MOVES, Absent, Structure, Use

Flavor = Literal["frobenius", "matrix", "spectral"]

#: Largest ``N · side³`` at which the norms of layers behind their masks are computed sample by sample.
_MASKED_WORK = 3e10


@dataclass
class Recursion:
    """One way of bounding: ``flavor`` of the layers' norms, ``local`` at the data or for every ‖x‖ ≤ X.

    ``log_input`` is log X for every input; ``radius`` moves every parameter within a ball; ``categorical``: the loss's
    curvature is a multiple of ``diag p − ppᵀ``, so that gains of differences of outputs, ``(z_i − z_j)/√2``, are
    enough. ``end``: logarithm, by sample, of what stands for the norm of the last layer at the data.
    """

    structure: Structure
    flavor: Flavor = "spectral"
    local: bool = False
    log_input: float = 0.0
    radius: float = 0.0
    categorical: bool = False
    end: Log | None = None
    known: dict[Any, LayerFacts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lengths: dict[Any, Log] = {}
        self._gains: dict[Any, Log] | None = None
        self._stretches: dict[tuple[Any, int], Log] = {}

    # -- what the rules of _lipschitz ask ----------------------------------------------------------

    def length(self, node: Any) -> Log:
        """Logarithm of a bound on ``‖f_node‖``; at the data, the norm itself."""
        if node not in self._lengths:
            self._lengths[node] = self._length(node)
        return self._lengths[node]

    def _length(self, node: Any) -> Log:
        structure = self.structure
        if node not in structure.data:
            size = flat(structure.value(node).double()).norm(dim=1).max()
            return add(log(float(size)), self.reach(node))
        if self.local:
            return log_tensor(flat(structure.value(node).double()).norm(dim=1))
        if not structure.floating(node):
            return self._integers(node)
        if node.kind == "input":
            return self.log_input
        return _lipschitz.length(Site(self, node))

    @property
    def device(self) -> torch.device:
        """Where the weights and data are."""
        return self.structure.state.weights.device

    def _integers(self, node: Any) -> Log:
        """The same of integers or truth values."""
        if node.dtype == torch.bool:
            return 0.5 * log(node.numel)
        if node.dtype == torch.uint8:
            return log(255) + 0.5 * log(node.numel)
        if node.operation in MOVES | {"to", "_to_copy"}:  # a cast to integers makes no number larger
            return self.length(node.inputs[0])
        raise Absent(f"nothing bounds the integers {node.name!r}")

    def peak(self, node: Any) -> Log:
        """Logarithm of a bound on the largest entry."""
        structure = self.structure
        if node in structure.data and not self.local:
            return self.length(node)
        top = log_tensor(flat(structure.value(node).double().abs()).amax(1))
        if node in structure.data:
            return top
        return add(float(top.max()), self.reach(node))

    def matrix_norm(self, node: Any, user: Any) -> Log:
        """Logarithm of a bound on the spectral norm of the matrices that ``node`` holds on its last two axes."""
        structure = self.structure
        if node in structure.data:
            return self.length(node)
        return add(log(float(spectral(structure.value(node)).max())), self.reach(node))

    def reach(self, node: Any) -> float:
        """Logarithm of how far a node of parameters alone can move within the ball."""
        structure = self.structure
        if self.radius == 0 or structure.fixed(node):
            return ZERO
        source = node
        while source.operation in MOVES:
            source = source.inputs[0]
        if source.kind != "parameter":
            raise Absent(f"a parametrization ({node.operation}) over a ball of parameters")
        return log(self.radius)

    def slopes(self, node: Any) -> Log | None:
        """Largest slope of an element-wise node at the data, by sample."""
        diagonal = self.structure.scalings(node)
        return None if diagonal is None else log_tensor(flat(diagonal.abs()).amax(1))

    def facts(self, node: Any) -> LayerFacts:
        """Facts of a linear layer or convolution whose weight does not depend on the data."""
        if node not in self.known:
            self.known[node] = layer_facts(self.structure, node)
        return self.known[node]

    def layer_norm(self, node: Any, plain: bool = False) -> Log:
        """Logarithm of the norm of a layer in this flavor, over the ball."""
        facts = self.facts(node)
        if not plain and self.end is not None and node is self.last:
            return self.end
        if self.flavor == "frobenius":
            norm, spread = facts.frobenius, facts.reuse
        elif self.flavor == "matrix":
            norm, spread = min(facts.bounds["patches"], facts.frobenius), facts.kt
        else:
            norm, spread = facts.tau, facts.kt
            if not plain and self.categorical and node is self.last and facts.spread is not None:
                norm = facts.spread
        return float(add(log(norm), 0.5 * log(spread) + self.reach(node.inputs[1])))

    @property
    def last(self) -> Any:
        """The operation that makes the output, changes of shape left aside."""
        node = self.structure.program.output
        while node.operation in MOVES and node.inputs:
            node = node.inputs[0]
        return node

    # -- sweeps ------------------------------------------------------------------------------------

    def stretch(self, node: Any, arg: int) -> Log:
        """Logarithm of a bound on ``‖∂ node / ∂ argument‖``."""
        if not (self.structure.floating(node) and self.structure.floating(node.inputs[arg])):
            return ZERO  # integers and truth values do not change where there are derivatives
        if (node, arg) not in self._stretches:
            self._stretches[node, arg] = _lipschitz.stretch(Site(self, node), arg)
        return self._stretches[node, arg]

    @property
    def gains(self) -> dict[Any, Log]:
        """Logarithms of bounds on ``‖∂z/∂f_v‖`` for every data node v."""
        if self._gains is None:
            self._gains = {}
            output = self.structure.program.output
            for node in reversed(self.structure.order):
                found: Log = 0.0 if node is output else ZERO
                for user in self.structure.users[node]:
                    for arg in (i for i, p in enumerate(user.inputs) if p is node):
                        found = add(found, self._through(user, arg))
                self._gains[node] = found
        return self._gains

    def _through(self, user: Any, arg: int) -> Log:
        assert self._gains is not None
        masked = self._masked(user) if self.local and arg == 0 else None
        if masked is not None:
            after, norm = masked
            return times(self._gains[after], norm)
        return times(self._gains[user], self.stretch(user, arg))

    def _masked(self, node: Any) -> tuple[Any, Log] | None:
        """The activation that alone follows a layer, and the norm of the layer behind its slopes, by sample."""
        if node.operation not in ("linear", "convolution") or node is self.structure.program.output:
            return None
        users = self.structure.users[node]
        if len(users) != 1 or self.structure.program.users[node] != users or self.radius:
            return None
        (after,) = users
        if not self.structure.rule_is_elementwise(after):
            return None
        diagonal = self.structure.scalings(after)
        facts = self.facts(node)
        if diagonal is None or not facts.affordable:
            return None
        if diagonal.shape[0] * min(facts.sides) ** 2 * max(facts.sides) > _MASKED_WORK:
            return None
        matrix = facts.matrix_of_layer
        # Coupled samples are several images, each behind the same matrix.
        norms = [
            max(float(spectral(_live(matrix, slopes))) for slopes in d.reshape(-1, facts.sides[0])) for d in diagonal
        ]
        return after, np.array([log(n) for n in norms])

    # -- parameters --------------------------------------------------------------------------------

    def weight_stretch(self, use: Use) -> Log:
        """Logarithm of a bound on ``‖∂ node / ∂ leaf‖`` at one use."""
        if self.radius and not use.moved:
            raise Absent(f"a parametrization of {use.leaf!r} over a ball of parameters")
        return times(self._weight_stretch(use.node, use.arg), use.log_lipschitz)

    def _weight_stretch(self, node: Any, arg: int) -> Log:
        site, name = Site(self, node), node.operation
        if name in ("linear", "convolution"):
            facts = self.facts(node)
            if arg == 2:
                return 0.5 * log(facts.positions)
            spread = facts.reuse if self.flavor == "frobenius" else facts.kt
            return 0.5 * log(spread) + site.length(0)
        if name in ("mul", "matmul", "mm", "bmm", "add", "sub"):
            return self.stretch(node, arg)
        if name == "embedding":
            return 0.5 * log(node.shape[:-1].numel())
        raise Absent(f"no bound for the derivative of {name!r} (node {node.name!r}) in its parameter")

    def blocks(self) -> dict[str, Log]:
        """Logarithms of bounds on ``‖J_W‖`` of every parameter."""
        return {
            name: add_all(times(self.gains[use.node], self.weight_stretch(use)) for use in uses)
            for name, uses in self.structure.uses.items()
        }


def layer_facts(structure: Structure, node: Any) -> LayerFacts:
    """:class:`LayerFacts` of a traced linear layer or convolution."""
    weight_node = node.inputs[1]
    if weight_node in structure.data:
        raise Absent(f"a weight that depends on the data (node {node.name!r})")
    weight = structure.value(weight_node)[0].detach()
    if node.operation == "linear":
        return linear_facts(weight, node.shape[:-1].numel())
    images, size = node.inputs[0].shape[0], node.inputs[0].shape[2:]
    arg = node.arg
    if not arg("transposed"):
        return convolution_facts(
            weight, tuple(size), stride=_list(arg("stride"), size), padding=_list(arg("padding"), size),
            dilation=_list(arg("dilation"), size), groups=int(arg("groups")), images=images,
        )  # fmt: skip
    # A transposed convolution is a part of the adjoint of the convolution from its output to its input.
    facts = convolution_facts(
        weight, tuple(node.shape[2:]), stride=_list(arg("stride"), size), padding=_list(arg("padding"), size),
        dilation=_list(arg("dilation"), size), groups=int(arg("groups")), images=images,
    )  # fmt: skip
    facts.positions, facts.dense = node.numel // node.shape[1], None
    return facts


def _list(values: Sequence[int], size: Sequence[int]) -> list[int]:
    values = [int(v) for v in values]
    return values * len(size) if len(values) == 1 else values


def _live(matrix: Tensor, slopes: Tensor) -> Tensor:
    rows = slopes != 0
    return slopes[rows, None] * matrix[rows]
