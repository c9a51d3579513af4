"""The plan as an object: what will be swept, in which basis, and what it costs.

Two kinds of work make up a Hessian. The outer part H_O is formed from the factor S of the loss curvature, pulled back
once (K columns). The functional part H_F is formed column by column: the tangents of one leaf are pushed forward to the
curved nodes that matter, and the rows pulled back to the other leaf of the pair.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from rich.console import RenderableType

from dagh import _workers
from dagh._block_pairs import multiply_adds
from dagh._chunks import CACHE, fitting
from dagh._costs import BEGINNING, PASS, SUSTAINED, WRITING, product_rate
from dagh._footprint import APART, BASE, RESIDENT, RESIDENT_MOST, RESIDENT_ROWS, Alive
from dagh._ir import Node, Program
from dagh._memory import human
from dagh._notebook import Shown
from dagh._outer_plan import dense_rows, gathered_elements, gathered_rows, kept_rows, largest_product
from dagh._plan_sweeps import Bridge, Column, Gate, Table
from dagh._request import Pair, itemsize

if TYPE_CHECKING:
    from dagh._strips import Strip

#: Matrices of the size of a sample's loss curvature that are held while it is factored.
_FACTORS = 4
#: Directions that should go together, samples that at least do, and the share of the price that makes a sweep notable.
_TOGETHER, _FEWEST, _NOTABLE = 4, 16, 0.1
#: Smallest working memory the chunking aims for.
FLOOR = 4 * 2**20


@dataclass(repr=False)
class Plan(Shown):
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
        seconds: Predicted time until the blocks are formed, good to a factor of two or three.
        result_bytes, peak_memory: Bytes held at the end, and predicted at most (without model and data).
        dense_bytes, dense_flops, dense_seconds: What ``H.dense()``, or ``H[a, b]`` for each of the blocks where not all
            are asked for, takes beyond that: memory freed on the way is not given back before.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    pairs: tuple[Pair, ...]
    kinds: dict[Pair, str]
    columns: list[Column]
    layers: dict[int, Gate]
    fallbacks: list[str]
    outer_rows: int
    samples: int
    routes: dict[Pair, str]
    alternatives: dict[Pair, dict[str, float]]
    forward: tuple[float, float, float]
    state: tuple[float, float]
    outer_alive: Alive
    widest: int
    dtype: torch.dtype
    program: Program
    functional: bool
    bridges: dict[Node, Bridge] = field(default_factory=dict)
    strips: list[Strip] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    device: str = "cpu"
    keep: bool = False
    entries: bool = False
    parts: tuple[str, ...] = ("outer", "functional")
    budget: int | None = None

    def __post_init__(self) -> None:
        if self.keep:
            self.columns = [c.swept or c for c in self.columns]
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
        if self.entries or first is None or second is None or self.kinds[min(i, j), max(i, j)] == "zero":
            return False
        if (min(i, j), max(i, j)) in self.stripped:
            return False
        return self._per_sample(i, j, samples) < self.sizes[i] * self.sizes[j]

    def _per_sample(self, i: int, j: int, samples: int) -> int:
        (o_a, i_a), (o_b, i_b) = self.gates[i].shape, self.gates[j].shape
        crossed = (i, j) in self._swept and self.gates[i].node is not self.gates[j].node
        return samples * (o_a * o_b + i_a + i_b + (o_a * i_b + o_b if crossed else 0))

    @cached_property
    def kept_rows(self) -> frozenset[int]:
        """Leaves whose rows of the loss factor are kept for the low-rank blocks between them."""
        return kept_rows(self)

    def low_rank(self, i: int, j: int) -> bool:
        """Whether the block is kept as rows of the loss factor, which it shares with others."""
        if i not in self.kept_rows or j not in self.kept_rows or (i in self.gates and j in self.gates):
            return False
        return self.kinds[i, j] != "zero" and (i, j) not in self.stripped

    @property
    def kept_elements(self) -> int:
        """Numbers in the rows that are kept, and their signs."""
        widths = [self.sizes[i] for i in self.kept_rows]
        return self.samples * self.outer_rows * (sum(widths) + bool(widths))

    def held_elements(self, i: int, j: int) -> int:
        """Numbers that the block of a pair holds, in the structure it is kept in; its rows if it is of low rank."""
        dense = self.sizes[i] if self.entries else self.sizes[i] * self.sizes[j]
        if self.keep:
            return self.samples * dense
        if self.low_rank(i, j):
            return self.samples * self.outer_rows * sum(self.sizes[k] for k in {i, j})
        if self.structured(i, j, self.samples):
            return self._per_sample(*self.oriented(i, j), self.samples)
        return 0 if self.kinds[i, j] == "zero" else dense

    @property
    def result_elements(self) -> int:
        """Numbers that all blocks of one part hold; rows of the loss factor that they share count once."""
        return self.kept_elements + sum(self.held_elements(*p) for p in self.pairs if not self.low_rank(*p))

    # -- totals ------------------------------------------------------------------------------------

    def outer_product(self, i: int, j: int) -> float:
        """Arithmetic per sample of the products of the rows of H_O for a pair (half of it spared by symmetry)."""
        if self.low_rank(i, j):
            return 0.0
        if self.entries:
            own = self.gates.get(i)
            return 2.0 * (self.outer_rows * (own.shape[0] if own else self.sizes[i]) + (self.sizes[i] if own else 0))
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
        return BEGINNING + self.price / (SUSTAINED * product_rate(self.dtype, self.device, torch.get_num_threads()))

    @property
    def result_bytes(self) -> int:
        return self.result_elements * itemsize(self.dtype)

    def _written(self) -> list[Pair]:
        """Pairs whose entries are not held, but computed when asked for."""
        if self.entries or self.keep:
            return []
        return [p for p in self.pairs if self.low_rank(*p) or self.structured(*p, self.samples)]

    @property
    def dense_bytes(self) -> int:
        size, p = itemsize(self.dtype), sum(self.sizes)
        if len(self.pairs) == len(self.names) * (len(self.names) + 1) // 2 > 1 and not self.entries:
            return p * p * size * (self.samples if self.keep else 1)
        return size * sum(self.sizes[i] * self.sizes[j] for i, j in self._written())

    @property
    def dense_flops(self) -> float:
        total = 0.0
        for i, j in self._written():
            if self.low_rank(i, j):
                terms = self.samples * self.outer_rows
                total += (1.0 if i == j else 2.0) * terms * self.sizes[i] * self.sizes[j]
            else:
                first, second = self.gates[i].shape, self.gates[j].shape
                total += 2.0 * multiply_adds(self.samples, first, second, symmetric=i == j)
        return total

    @property
    def dense_seconds(self) -> float:
        passes = PASS * self.dense_bytes / itemsize(self.dtype)
        return (self.dense_flops / WRITING + passes) / product_rate(self.dtype, self.device, torch.get_num_threads())

    @property
    def peak_memory(self) -> int:
        size, n = itemsize(self.dtype), self.samples
        copies = len(set(self.parts)) if self.keep else 1
        window, working = self.chunks(self.budget or 1 << 62)
        values, local = self.state
        results = self.result_elements * copies * size
        work, rows = [0.0], 0.0
        if self.has_outer:
            step = self.outer_step(window, working)
            gathered = window * gathered_elements(self) / RESIDENT_ROWS  # in one piece: the allocator loses nothing
            # In the first window there are no blocks but kept rows yet while the rows are pulled back.
            early = (results / size - self.kept_elements) / RESIDENT_ROWS if window == n else 0.0
            pulled = gathered + step * (self.outer_rows * self.outer_alive.each + local)
            product = gathered + largest_product(self, window)
            rows = n * values + max(pulled - early, product, _FACTORS * self.outer_rows**2)
        if "functional" in self.parts and self.columns:
            count = self.shares(working, self.summed_bytes)
            tile = self.tile(-(-window // count))
            kept = window * local + count * tile * sum(b.elements for b in self.bridges.values())
            moving = [s.alive.elements(tile, s.step(tile, working / count, size)) for s in self._sweeps()]
            moving += [
                c.square.elements(c.together(tile, working / count, size), c.width) for c in self.columns if c.square
            ]
            work.append(kept + count * max(moving) * (APART if count > 1 else 1.0))
        for s in self.strips:
            at_once = 1 if self.keep else s.window(n, self.room, size)
            strip = s.step(at_once, self.room, size) * (at_once * s.unit + s.result)
            # What is linearized was evaluated before: values and adjoints count once.
            work.append(strip + max(0.0, at_once * s.fixed - n * values))
        # Every share but the first has sums of its own.
        results += (self.shares(working, self.summed_bytes) - 1) * self.summed_bytes
        return int(results + BASE + size * max(RESIDENT_ROWS * rows, RESIDENT * (n * values + max(work))))

    def _sweeps(self) -> list[Column | Bridge | Table]:
        bridges = self.bridges.values()
        return [*(c for c in self.columns if not c.square), *bridges, *(t for b in bridges for t in b.tables)]

    def chunks(self, budget: float) -> tuple[int, float]:
        """Samples taken at once within a budget, and the bytes that are left for the bundles of their sweeps."""
        size, copies = itemsize(self.dtype), len(set(self.parts)) if self.keep else 1
        values, local = self.state
        free = (budget - BASE - self.result_elements * copies * size) / RESIDENT_MOST - self.samples * values * size
        free = max(free, FLOOR)
        each, least = 0.0, 1.0
        if self.has_outer:
            each = max(each, gathered_elements(self))
            least = max(least, each + self.outer_rows * self.outer_alive.each + local)
        if "functional" in self.parts:
            kept = local + sum(b.elements for b in self.bridges.values())
            each = max(each, kept)
            least = max([least, *(kept + s.alive.elements(1, 1) for s in self._sweeps())])
            least = max([least, *(kept + c.square.elements(1, c.width) for c in self.columns if c.square)])
        window = max(1, min(self.samples, int(free / (least * size))))
        return window, max(free - window * each * size, 1.0)

    @property
    def summed_bytes(self) -> int:
        """Bytes of the blocks of one part that are sums over samples."""
        if self.keep:
            return 0
        dense = [p for p in self.pairs if self.kinds[p] != "zero" and not self.structured(*p, self.samples)]
        dense = [p for p in dense if not self.low_rank(*p)]
        return sum(self.held_elements(*p) for p in dense) * itemsize(self.dtype)

    def shares(self, working: float, dense: int) -> int:
        """Into how many shares the samples are divided: one per thread, where sums of each have room."""
        most = min(_workers.shares(torch.device(self.device)), self.samples // _workers.FEWEST)
        if most < 2 or not self.columns or self.parts == ("outer",) or self.flops < _workers.WORTH:
            return 1  # the outer part alone is a few large operations
        return max(1, min(most, 1 + int(working / (4 * max(1, dense)))))

    def tile(self, samples: int) -> int:
        """Samples that the sweeps take at a time: where a bundle of a few directions would not fit the cache, fewer."""
        size, most, total = itemsize(self.dtype), samples, sum(c.cost for c in self.columns)
        for column in self.columns:
            if column.cost > _NOTABLE * total:
                together = min(column.width, max(column.order, _TOGETHER))
                most = min(most, CACHE // max(1, column.largest * together * size))
        return -(-samples // -(-samples // max(most, _FEWEST)))

    def outer_step(self, window: int, working: float) -> int:
        """Samples whose rows of H_O are pulled back at once."""
        held = self.outer_rows * self.outer_alive.each + self.state[1]
        return fitting(window, working, held, self.outer_rows * self.widest, itemsize(self.dtype))

    @property
    def room(self) -> int:
        """Bytes that the budget leaves for work."""
        return (self.budget or 1 << 62) - self.result_bytes

    @property
    def least_outer(self) -> int:
        """Elements that H_O takes at least: the factor of the loss of one sample, and its rows."""
        if not self.has_outer:
            return 0
        return self.outer_rows * (_FACTORS * self.outer_rows + 4 * self.widest + dense_rows(self) + gathered_rows(self))

    @property
    def least_memory(self) -> int:
        """Bytes of work that the pieces of the plan take at least, results not included."""
        work = [self.least_outer, *(3 * c.unit * c.order for c in self.columns), *(s.least for s in self.strips)]
        return (max(work) + sum(b.elements for b in self.bridges.values())) * itemsize(self.dtype)

    # -- presentation ------------------------------------------------------------------------------

    def __rich__(self) -> RenderableType:
        from dagh._planview import render

        return render(self)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: nodes in their order first, as they refer to those before them."""
        return {"program": self.program, **self.__dict__}

    def __repr__(self) -> str:
        return (
            f"Plan({len(self.names)} parameters, P={sum(self.sizes)}, {len(self.pairs)} blocks, "
            f"{self.samples} samples, {self.flops:.3g} flops, peak {human(self.peak_memory)})"
        )

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=118, force_terminal=False, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()
