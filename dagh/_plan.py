"""The plan as an object: what will be swept, in which basis, and what it costs.

Two kinds of work make up a Hessian. The outer part H_O is formed from the factor S of the loss curvature, pulled back
once (K columns). The functional part H_F is formed column by column: the tangents of one leaf are pushed forward to the
curved nodes that matter, and the rows pulled back to the other leaf of the pair.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from rich.console import RenderableType

from dagh._costs import PASS, product_rate
from dagh._ir import Node, Program
from dagh._request import Pair, itemsize

if TYPE_CHECKING:
    from dagh._strips import Strip

Basis = Literal["parameter", "activation", "channel", "input", "strips"]

#: Largest bundle formed at once: beyond it fresh memory costs more than the arithmetic on it.
CACHE = 8 * 2**20
#: Matrices of the size of a sample's loss curvature that are held while it is factored.
_FACTORS = 4


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
    after: frozenset[Node] = frozenset()
    """Targets that the bridge reaches."""

    @property
    def rows(self) -> list[int]:
        return list(self.targets)

    def step(self, samples: int, working: int, size: int) -> int:
        """Directions swept at once."""
        fits = working // max(1, 3 * self.unit * samples * size)
        cached = CACHE // max(1, self.largest * samples * size)
        step = max(1, min(self.width, fits, cached))
        return min(self.width, max(self.order, step // self.order * self.order))


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

    def step(self, samples: int, size: int) -> int:
        """Directions swept at once."""
        return max(1, min(self.width, CACHE // max(1, self.largest * samples * size)))


@dataclass
class Plan:
    """How the requested blocks will be formed, and at what price; ``print(plan)`` explains it.

    Attributes:
        routes: For every pair that is not zero, how it is formed: with an H_F part, the sweep that forms that, e.g.
            ``"channel columns of conv1.weight"``; with H_O alone, ``"loss factor"``; or ``"strips of conv1.weight"``.
        alternatives: For the same pairs, the price of every route in operations per sample. Strips give H_O and H_F.
        notes: What fell back to strips, and why.
        kinds: Which parts each pair has: ``"zero"``, ``"H_O"``, ``"H_F"``, ``"H_O+H_F"``.
        fallbacks: Operations without a rule, differentiated by ``torch.func`` on their own.
        samples: The batch size that totals refer to (1 where samples are coupled).
        flops: Arithmetic of the whole batch.
        bytes: Memory traffic of the whole batch, results included.
        seconds: Predicted time.
        result_bytes, peak_memory: Bytes held at the end, and predicted at most (without model and data).
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    pairs: tuple[Pair, ...]
    kinds: dict[Pair, str]
    columns: list[Column] = field(repr=False)
    layers: dict[int, Gate] = field(repr=False)
    fallbacks: list[str]
    outer_rows: int
    samples: int
    routes: dict[Pair, str]
    alternatives: dict[Pair, dict[str, float]] = field(repr=False)
    forward: tuple[float, float, float]
    forward_elements: int
    widest: int
    dtype: torch.dtype
    program: Program = field(repr=False)
    functional: bool
    bridges: dict[Node, Bridge] = field(default_factory=dict, repr=False)
    strips: list[Strip] = field(default_factory=list, repr=False)
    notes: tuple[str, ...] = ()
    device: str = "cpu"
    keep: bool = False
    parts: tuple[str, ...] = ("outer", "functional")
    budget: int | None = None

    def __post_init__(self) -> None:
        self._swept = {pair for c in self.columns for pair in c.pairs}
        self.stripped = {(min(p), max(p)) for s in self.strips for p in s.pairs}
        self.gates = {i: g for i, g in self.layers.items() if g.rows == 1}

    # -- what the assembly asks --------------------------------------------------------------------

    def oriented(self, i: int, j: int) -> Pair:
        """The pair in the order in which its sweep forms it."""
        return (j, i) if (j, i) in self._swept and (i, j) not in self._swept else (i, j)

    def structured(self, i: int, j: int, samples: int) -> bool:
        """Whether the block of two linear layers takes less memory kept per sample."""
        i, j = self.oriented(i, j)
        first, second = self.gates.get(i), self.gates.get(j)
        if first is None or second is None or self.kinds[min(i, j), max(i, j)] == "zero":
            return False
        if (min(i, j), max(i, j)) in self.stripped:
            return False
        return self._per_sample(i, j, samples) < self.sizes[i] * self.sizes[j]

    def _per_sample(self, i: int, j: int, samples: int) -> int:
        (o_a, i_a), (o_b, i_b) = self.gates[i].shape, self.gates[j].shape
        crossed = (i, j) in self._swept and self.gates[i].node is not self.gates[j].node
        return samples * (o_a * o_b + i_a + i_b + (o_a * i_b + o_b if crossed else 0))

    def held_elements(self, i: int, j: int) -> int:
        """Numbers that the block of a pair holds, in the structure it is kept in."""
        dense = self.sizes[i] * self.sizes[j]
        if self.keep:
            return self.samples * dense
        if self.structured(i, j, self.samples):
            return self._per_sample(*self.oriented(i, j), self.samples)
        return 0 if self.kinds[i, j] == "zero" else dense

    @property
    def result_elements(self) -> int:
        """Numbers that all blocks of one part hold."""
        return sum(self.held_elements(i, j) for i, j in self.pairs)

    # -- totals ------------------------------------------------------------------------------------

    def outer_product(self, i: int, j: int) -> float:
        """Arithmetic per sample of the products of the rows of H_O for a pair (half of it spared by symmetry)."""
        if i in self.gates and j in self.gates:
            core = 2.0 * self.outer_rows * self.gates[i].shape[0] * self.gates[j].shape[0]
            return core + (0.0 if self.structured(i, j, self.samples) else 2.0 * self.sizes[i] * self.sizes[j])
        if i in self.gates or j in self.gates:
            layer, other = (i, j) if i in self.gates else (j, i)
            return 2.0 * self.sizes[other] * (self.outer_rows * self.gates[layer].shape[0] + self.sizes[layer])
        return (1.0 if i == j else 2.0) * self.outer_rows * self.sizes[i] * self.sizes[j]

    @property
    def factored(self) -> list[Pair]:
        """The pairs whose H_O comes from the factor of the loss."""
        return [p for p in self.pairs if "H_O" in self.kinds[p] and p not in self.stripped]

    @property
    def has_outer(self) -> bool:
        """Whether any block has an H_O part that is asked for and comes from the factor of the loss."""
        return "outer" in self.parts and bool(self.factored)

    def _total(self, figure: int) -> float:
        """Price (0), arithmetic (1) or elements written (2) of the whole batch."""
        per_sample = 2 * self.forward[figure]
        if self.has_outer:
            per_sample += self.outer_rows * self.forward[figure]
            per_sample += sum(self.outer_product(*p) for p in self.factored) if figure < 2 else 0.0
        if "functional" in self.parts:
            per_sample += sum((c.cost, c.flops, c.moved)[figure] for c in self.columns)
        per_sample += sum((s.cost, s.flops, s.moved)[figure] for s in self.strips)
        results = self.result_elements * (PASS, 0.0, 1.0)[figure]
        return per_sample * self.samples + results

    @property
    def price(self) -> float:
        """What it costs, in operations of a matrix product, passes over memory included."""
        return self._total(0)

    @property
    def flops(self) -> float:
        return self._total(1)

    @property
    def bytes(self) -> float:
        return 2.0 * self._total(2) * itemsize(self.dtype)

    @property
    def seconds(self) -> float:
        return self.price / product_rate(self.dtype, self.device, torch.get_num_threads())

    @property
    def result_bytes(self) -> int:
        return self.result_elements * itemsize(self.dtype)

    @property
    def peak_memory(self) -> int:
        size, n = itemsize(self.dtype), self.samples
        copies = len(set(self.parts)) if self.keep else 1
        total = self.result_elements * copies + 3 * n * self.forward_elements
        work = [0]
        if self.has_outer:
            dense = self._dense_rows
            pulled = min(CACHE, n * self.outer_rows * self.widest * size)
            work.append(max(n * self.outer_rows * 2 * dense * size + 4 * pulled, _FACTORS * self.outer_rows**2 * size))
        total += n * sum(b.elements for b in self.bridges.values())
        for s in self.strips:
            room = self.room
            window = 1 if self.keep else s.window(n, room, size)
            moving = s.step(window, room, size) * (window * s.unit + s.result)
            # What is linearized was evaluated before: values and adjoints count once.
            work.append((moving + max(0, window * s.fixed - 3 * n * self.forward_elements)) * size)
        for c in self.columns:
            step = c.step(n, self.budget or 1 << 62, size)
            work.append(step * n * (c.unit + 2 * c.largest) * size)
        return total * size + max(work)

    @property
    def room(self) -> int:
        """Bytes that the budget leaves for work."""
        return (self.budget or 1 << 62) - self.result_bytes

    @property
    def _dense_rows(self) -> int:
        """Entries of one row of H_O's factor that are written out."""
        return sum(self.sizes[i] for i in {i for p in self.factored for i in p} if i not in self.gates)

    @property
    def least_outer(self) -> int:
        """Elements that H_O takes at least: the factor of the loss of one sample, and its rows."""
        if not self.has_outer:
            return 0
        return self.outer_rows * (_FACTORS * self.outer_rows + 4 * self.widest + 2 * self._dense_rows)

    @property
    def least_memory(self) -> int:
        """Bytes of work that the pieces of the plan take at least, results not included."""
        work = [self.least_outer, *(3 * c.unit * c.order for c in self.columns), *(s.least for s in self.strips)]
        return (max(work) + sum(b.elements for b in self.bridges.values())) * itemsize(self.dtype)

    # -- presentation ------------------------------------------------------------------------------

    def __rich__(self) -> RenderableType:
        from dagh._planview import render

        return render(self)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=118, force_terminal=False, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()
