"""The sweeps that a plan consists of: columns, the bridges at which they may stop, and the tables of these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dagh._chunks import fitting
from dagh._footprint import NOTHING, Alive
from dagh._ir import Node
from dagh._request import Pair

Basis = Literal["parameter", "activation", "channel", "input", "strips"]


@dataclass(frozen=True)
class Gate:
    """The layer through which alone a leaf acts: a linear one, or a convolution."""

    node: Node
    argument: int
    channels: int = 0
    """Output channels of a convolution; 0 for a linear layer."""
    rows: int = 1
    """Rows per sample to which a linear layer is applied."""
    tokens: int = 1
    """Length of axis 1, along which a linear layer acts row by row."""

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs of a linear layer per row; one input for its bias."""
        return self.node.shape[-1], self.node.inputs[0].shape[-1] if self.argument == 1 else 1


@dataclass
class Column:
    """One sweep: tangents of ``leaves`` (in ``basis``), rows of the leaves that they are paired with.

    In the activation basis the leaves are the weight and bias of one layer, and the rows of another linear layer are
    taken at its output as well: ``targets`` says where.
    """

    leaves: list[int]
    basis: Basis
    gate: Gate | None
    pairs: list[Pair]
    """(leaf, row) in that order."""
    targets: dict[int, Node]
    width: int
    order: int
    """Directions come in groups of this many: the rows of a layer's output, which are summed together."""
    seed: Node
    copies: int
    """Channels or tokens that one direction stands for, as long as each stays by itself."""
    within: frozenset[Node]
    held: frozenset[Node]
    curved: frozenset[Node]
    cost: float
    """Price per sample in operations of a matrix product, passes over memory included."""
    flops: float
    moved: float
    """Arithmetic, and elements written, per sample."""
    unit: int
    """Elements held per sample and direction."""
    largest: int
    """Elements of the largest bundle per sample and direction."""
    paths: list[Node] = field(default_factory=list)
    """Inputs of the layers whose outputs are targets: nodes whose tangents are read at the end."""
    via: Node | None = None
    """Where the sweep stops, and the bridge from there on takes over."""
    spread: Node | None = None
    """``via``, where rows come back from it that do not stay in their channel."""
    after: frozenset[Node] = frozenset()
    """Targets that the bridge reaches."""
    folded: bool = False
    """What comes from beyond the bridge is multiplied by the bridge's tables, not swept back."""
    ends: tuple[tuple[int, Node], ...] = ()
    """Nodes that read no output of the layer from a number on, in ascending order of that (:mod:`dagh._own_parts`)."""
    alive: Alive = NOTHING
    square: Alive | None = None
    """What the tangents of all directions hold whose products are the leaf's block with itself: no way back."""
    one_way: bool = False
    """Diagonal entries are taken from tangents alone: no way back."""
    swept: Column | None = None
    """The same with all ways back, for samples that are kept apart."""

    def together(self, samples: int, working: float, size: int) -> int:
        """Samples of which the tangents of all directions are multiplied at once, in ``working`` bytes."""
        assert self.square is not None
        # Results of many sizes leave more of the allocator's memory unused than those of sweeps.
        return fitting(samples, 0.6 * working, self.square.elements(1, self.width), self.largest * self.width, size)

    def passed(self, output: int) -> list[Node]:
        """What need not be swept back for directions of the layer's outputs from ``output`` on: earlier ones did it."""
        return [node for end, node in self.ends if end <= output]

    @property
    def rows(self) -> list[int]:
        return list(self.targets)

    @property
    def mirrored(self) -> Node | None:
        """The kernel of a convolution if it is paired with itself: products of its tangents need be taken once."""
        if self.basis != "channel" or self.gate is None:
            return None
        own = next((self.targets[i] for i, j in self.pairs if i == j and i in self.targets), None)
        return None if own is None or own.batched else own

    def step(self, samples: int, working: float, size: int) -> int:
        """Directions swept at once, in ``working`` bytes."""
        step = fitting(self.width, working, self.alive.elements(samples, 1), self.largest * samples, size)
        groups = max(1, min(self.width, step) // self.order)
        even = 1 << groups.bit_length() - 1
        if self.width % (even * self.order) == 0:  # queries, keys and values are not swept together
            groups = even
        return min(self.width, groups * self.order)


@dataclass(frozen=True)
class Table:
    """Tangents at a bridge's node by all directions of a target before it, which take the place of a sweep back."""

    target: Node
    seed: Node
    gate: Gate | None
    """The convolution of a target that moves one output channel at a time."""
    copies: int
    width: int
    within: frozenset[Node]
    largest: int
    """Elements of the largest bundle per sample and direction."""
    alive: Alive = NOTHING

    def step(self, samples: int, working: float, size: int) -> int:
        """Directions swept at once, in ``working`` bytes."""
        return fitting(self.width, working, self.alive.elements(samples, 1), self.largest * samples, size)


@dataclass(frozen=True)
class Bridge:
    """Derivatives by the directions of one node, shared by the sweeps that stop there (:mod:`dagh._meeting`)."""

    node: Node
    copies: int
    width: int
    within: frozenset[Node]
    held: frozenset[Node]
    curved: frozenset[Node]
    targets: tuple[Node, ...]
    paths: tuple[Node, ...]
    elements: int
    """Numbers held per sample."""
    largest: int
    """Elements of the largest bundle per sample and direction, at most."""
    tables: tuple[Table, ...] = ()
    alive: Alive = NOTHING

    def step(self, samples: int, working: float, size: int) -> int:
        """Directions swept at once, in ``working`` bytes."""
        return fitting(self.width, working, self.alive.elements(samples, 1), self.largest * samples, size)
