"""Where the parameters of a traced model meet the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from dagh import State

from ._logs import log, spectral

#: Operations that move elements without changing, dropping or repeating any.
_MOVES = """
reshape view _unsafe_view flatten unflatten squeeze unsqueeze permute transpose t mT numpy_T movedim swapaxes flip roll
channel_shuffle pixel_shuffle pixel_unshuffle rot90
"""
MOVES = frozenset(_MOVES.split())

#: Largest Jacobian of a parametrization (entries) that is formed.
_DENSE = 4_000_000


class Absent(Exception):
    """A bound does not exist here; the message says why."""


@dataclass(frozen=True)
class Use:
    """A parameter meeting the data: ``leaf`` enters ``node`` as argument ``arg``, through ``node.inputs[arg]``.

    ``log_lipschitz`` is the logarithm of the norm of ``∂ node.inputs[arg] / ∂ leaf``; ``moved`` says that the
    argument is the parameter itself, at most rearranged, ``straight`` that it is linear in all parameters.
    """

    leaf: str
    node: Any
    arg: int
    log_lipschitz: float
    moved: bool
    straight: bool = True


@dataclass
class Structure:
    """A state seen as a path of data with parameters hanging off it; ``names`` are the parameters that count."""

    state: State
    names: tuple[str, ...]
    _dense: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def program(self) -> Any:
        return self.state.program

    @cached_property
    def data(self) -> set[Any]:
        """Nodes of the model that depend on its inputs and that the output depends on."""
        program = self.program
        sources = [n for n in program if n.kind == "input"]
        return {n for n in program.descendants(sources) & program.ancestors([program.output]) if n.part == "model"}

    @cached_property
    def order(self) -> list[Any]:
        """Data nodes, arguments before users."""
        return [n for n in self.program if n in self.data]

    @cached_property
    def users(self) -> Mapping[Any, list[Any]]:
        """Data nodes that use each data node."""
        return {n: [u for u in self.program.users[n] if u in self.data] for n in self.data}

    def value(self, node: Any) -> Tensor:
        """``[N, *shape]`` (``[1, …]`` for what does not depend on the sample)."""
        return self.state.value(node).detach()

    def floating(self, node: Any) -> bool:
        return bool(node.dtype.is_floating_point)

    def arguments(self, node: Any) -> Iterator[int]:
        """Positions of the floating-point data arguments of a node."""
        return (i for i, p in enumerate(node.inputs) if p in self.data and self.floating(p))

    @cached_property
    def uses(self) -> dict[str, list[Use]]:
        """Every meeting of each parameter with the data, in the order of the computation.

        Raises :class:`Absent` where a parametrization is too large to differentiate.
        """
        return {name: list(self._uses_of(name)) for name in self.names}

    def _uses_of(self, name: str) -> Iterator[Use]:
        leaf = self.program.parameters[name]
        if self.program.output is leaf or self.program.output not in self.data:
            raise Absent("the output does not depend on the input")
        own = {leaf}
        for node in self.program.nodes[leaf.index + 1 :]:
            if node.op is None or node.part == "loss" or not self.floating(node):
                continue
            slots = [i for i, p in enumerate(node.inputs) if p in own]
            if not slots:
                continue
            if node not in self.data:
                own.add(node)
                continue
            for slot in slots:
                yield Use(name, node, slot, *self._route(leaf, node.inputs[slot]))

    def _route(self, leaf: Any, source: Any) -> tuple[float, bool, bool]:
        node = source
        while node is not leaf and node.operation in MOVES:
            node = node.inputs[0]
        if node is leaf:
            return 0.0, True, True
        if source.numel * leaf.numel > _DENSE:
            raise Absent(f"the parametrization of {leaf.name!r} ({source.operation}) is too large to differentiate")
        norm = log(float(spectral(self.state.total_jacobian(source, leaf)[0])))
        return norm, False, self._straight(source)

    def _straight(self, source: Any) -> bool:
        moving = self.program.descendants([self.program.parameters[n] for n in self.names])
        for node in self.program.ancestors([source]) & moving:
            if node.op is not None and self.state.rule(node).curved(node):
                bilinear = self.state.rule(node).derivative == "bilinear"
                if not bilinear or sum(p in moving for p in node.inputs[:2]) > 1:
                    return False
        return True

    @cached_property
    def shared(self) -> dict[str, int]:
        """Parameters that meet the data more than once, and how often."""
        return {name: len(uses) for name, uses in self.uses.items() if len(uses) > 1}

    def fixed(self, node: Any) -> bool:
        """Whether the node depends on none of the parameters that count."""
        leaves = [self.program.parameters[n] for n in self.names]
        return node not in self.program.descendants(leaves)

    def scalings(self, node: Any) -> Tensor | None:
        """The diagonal of an element-wise node's Jacobian at the data, ``[N, *shape]``."""
        diagonal = self.state.rule(node).scaling(self.state.call(node), 0)
        if diagonal is None or not isinstance(diagonal, Tensor):
            return None
        return diagonal[:, 0].expand(-1, *node.shape) if diagonal.dim() == len(node.shape) + 2 else None

    def rule_is_elementwise(self, node: Any) -> bool:
        """Whether the node is a function of each element of one argument."""
        rule = self.state.rule(node)
        return rule.acts_per == "element" and rule.derivative in ("elementwise", "kinked") and len(node.inputs) == 1

    # -- linear maps of the data -------------------------------------------------------------------

    def nonnegative_norm(self, node: Any, arg: int) -> float:
        """Schur's test for a linear node with non-negative entries: ``√(max row sum · max column sum)``, log."""
        key = (node, arg)
        if key not in self._dense:
            like = self.value(node)
            ones = like.new_ones(1, 1, *node.inputs[arg].shape)
            rule, call = self.state.rule(node), self.state.call(node)
            samples = max(x.shape[0] for x in call.xs)
            rows = rule.jvp(call, {arg: ones.expand(samples, *ones.shape[1:])})
            columns = rule.vjp(call, like.new_ones(samples, 1, *node.shape), arg, True)
            self._dense[key] = 0.5 * (log(float(rows.max().clamp(min=0))) + log(float(columns.max().clamp(min=0))))
        return float(self._dense[key])
