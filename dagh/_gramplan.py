"""Which parameter's Gram matrix is formed in which way, and which layers share a sweep under the memory budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from dagh import _memory
from dagh._ir import Node, Program
from dagh._request import itemsize
from dagh._state import State
from dagh.errors import MemoryBudgetError

Route = Literal["product", "tied", "rows", "paired", "none"]

#: Smallest working memory that the chunking aims for.
FLOOR = 64 * 2**20
#: Operations that only move the elements of a parameter: inner products of gradients stay what they are.
_MOVES = ("reshape", "t", "transpose", "permute", "unsqueeze", "squeeze", "view")
#: Live bundles of a reverse sweep, in units of the widest node.
_LIVE = 6


@dataclass(frozen=True)
class Use:
    """A parameter, or something computed from it alone, as argument ``argument`` of a node that depends on data."""

    node: Node
    argument: int

    @property
    def source(self) -> Node:
        return self.node.inputs[self.argument]


@dataclass(frozen=True)
class Layer:
    """One parameter: where it meets the data, and how its gradients are multiplied with each other.

    ``product``: it multiplies rows of inputs; ``tied``: as a linear layer and as an embedding; ``rows``: explicit
    gradients; ``paired``: those, a few columns against a few at a time; ``none``: the output does not depend on it.
    """

    position: int
    leaf: Node
    uses: tuple[Use, ...]
    route: Route
    direct: bool = False
    """The output is computed from the parameter alone."""

    @property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(dict.fromkeys(use.node for use in self.uses))

    def stored(self) -> int:
        """Numbers kept per sample and column until all columns are there."""
        if self.route == "rows":
            return self.leaf.numel
        return sum(node.numel for node in self.nodes)


@dataclass
class Group:
    """Layers whose cotangents come from the same sweep, ``step`` columns at a time."""

    layers: list[Layer]
    step: int = 1
    kept: list[Node] = field(default_factory=list)


def data_nodes(program: Program) -> set[Node]:
    """Every node that depends on the inputs."""
    sources = [n for n in program if n.kind in ("input", "target") or (n.op is None and n.batched)]
    return program.descendants(sources)


def find_uses(program: Program, leaf: Node, data: set[Node]) -> tuple[tuple[Use, ...], set[Node]]:
    """Where ``leaf`` meets the data, and the nodes in between (itself included)."""
    own, uses = {leaf}, []
    for node in program.nodes[leaf.index + 1 :]:
        if node.op is None or node.part == "loss" or not node.dtype.is_floating_point:
            continue
        slots = [i for i, p in enumerate(node.inputs) if p in own]
        if slots and node in data:
            uses += [Use(node, i) for i in slots]
        elif slots:
            own.add(node)
    return tuple(uses), own


def family(use: Use) -> str:
    """``"linear"``, ``"matmul"``, ``"convolution"`` or ``"embedding"`` where the gradient is a sum of ``s xᵀ``."""
    node, argument = use.node, use.argument
    if node.key == "aten.linear.default" and argument == 1:
        return "linear"
    if node.operation in ("mm", "matmul") and argument == 1 and len(use.source.shape) == 2 <= len(node.inputs[0].shape):
        return "matmul"
    if node.key == "aten.embedding.default" and argument == 0:
        return "embedding"
    if node.key == "dagh.convolution" and argument == 1:
        plain = int(node.arg("groups")) == 1 and not node.arg("transposed")
        return "convolution" if plain and len(use.source.shape) <= 4 else ""
    return ""


def _moved(use: Use, leaf: Node) -> bool:
    """Whether what enters the node is the parameter itself, at most rearranged."""
    node = use.source
    while node is not leaf:
        if node.operation not in _MOVES or node.numel != leaf.numel or node.dtype != leaf.dtype:
            return False
        node = node.inputs[0]
    return True


def plan_layer(program: Program, position: int, leaf: Node, data: set[Node]) -> Layer:
    """The route of ``leaf``, whatever its size."""
    uses, own = find_uses(program, leaf, data)
    if program.output in own:
        return Layer(position, leaf, (), "rows", direct=True)
    return Layer(position, leaf, uses, _route(leaf, uses) if uses else "none")


def _route(leaf: Node, uses: Sequence[Use]) -> Route:
    families = [family(use) for use in uses]
    if all(families) and all(_moved(use, leaf) for use in uses):
        if len(set(families)) == 1 and len({use.source for use in uses}) == 1:
            return "product"
        if set(families) == {"linear", "embedding"} and {use.source for use in uses} == {leaf}:
            return "tied"
    return "rows"


def plan_groups(state: State, leaves: Sequence[Node], columns: int, budget: int) -> tuple[list[Layer], list[Group]]:
    """Layers with their routes, in groups that fit ``budget`` bytes.

    Raises :class:`~dagh.errors.MemoryBudgetError` where the Gram matrices, or one layer's cotangents, do not fit.
    """
    program, size, device = state.program, itemsize(state.weights.dtype), state.weights.device
    n = state.samples
    side = n * columns
    grams = (len(leaves) + 3) * side * side * 8
    if grams > budget:
        raise MemoryBudgetError(
            f"{len(leaves)} Gram matrices of {side:,} × {side:,} ({n:,} samples × {columns:,} columns of the loss "
            f"factor) need {_memory.human(grams)}; the budget is {_memory.human(budget)} "
            f"({_memory.human(_memory.free_bytes(device))} free). Cheaper: fewer samples, fewer outputs (the last "
            "position only, a shorter sequence, fewer classes), fewer parameters (params='conv*'); or raise "
            "memory_budget"
        )
    working = max(budget - grams, FLOOR)
    data = data_nodes(program)
    layers = []
    for i, leaf in enumerate(leaves):
        layer = plan_layer(program, i, leaf, data)
        if layer.route == "rows" and layer.uses and side * leaf.numel * size > working // 4:
            layer = replace(layer, route="paired")
            if 2 * n * leaf.numel * size > working // 2:
                raise _too_large(leaf, 4 * n * leaf.numel * size + grams, budget)
        layers.append(layer)
    useful = [v.numel for v in program.ancestors([program.output]) if v.op is not None]
    widest = max(useful, default=1)
    groups: list[Group] = []
    held = 0
    by_depth = sorted(
        (x for x in layers if x.route != "none"), key=lambda x: -min((v.index for v in x.nodes), default=0)
    )
    for layer in by_depth:
        cost = layer.stored() * side * size
        if cost > working:
            raise _too_large(layer.leaf, cost + grams, budget)
        if not groups or held + cost > working // 2:
            groups.append(Group([]))
            held = 0
        groups[-1].layers.append(layer)
        held += cost
    for group in groups:
        wanted = {node for layer in group.layers for node in layer.nodes}
        group.kept = sorted({v for x in group.layers if x.route != "rows" for v in x.nodes}, key=lambda v: v.index)
        column = n * size * (sum(v.numel for v in wanted) + _LIVE * widest)
        group.step = max(1, min(columns, working // 4 // column))
    return layers, groups


def _too_large(leaf: Node, needed: int, budget: int) -> MemoryBudgetError:
    return MemoryBudgetError(
        f"the Gram matrix of {leaf.name!r} ({leaf.numel:,} numbers) needs {_memory.human(needed)}; the budget is "
        f"{_memory.human(budget)}. Cheaper: fewer samples, fewer outputs, leaving it out (params=); or raise "
        "memory_budget"
    )
