"""The map of the Hessian: which blocks carry which part, and their norms when asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from dagh import _memory
from dagh._atlas import frobenius
from dagh._blocktables import join_kinds
from dagh._blockview import MEANINGS, STYLES, SYMBOLS, shorten
from dagh._gram import gram_of
from dagh._graph import Graph
from dagh._hessian import decompose
from dagh._probes import Probes, probe
from dagh._request import Pair, Request, itemsize
from dagh._state import State
from dagh._structure import reach, structure

_COPIES = 4  # full, outer, functional and one at work
_STEP_BYTES = 256 << 20  # small steps keep the progress honest
_FLOOR = 64 << 20  # up to this, a block that does not fit the budget is refused, not estimated
_MAX_ENTRIES = 10**9  # beyond, forming all blocks takes longer than an atlas
_PROBES = 4
_MAX_ROWS = 24
_MAX_LISTED = 24


@dataclass(frozen=True)
class Norms:
    """Frobenius norms of one block; ``errors`` are the standard errors of ``full`` and ``functional`` as estimates."""

    full: float
    outer: float
    functional: float
    errors: tuple[float, float] | None = None

    @property
    def about(self) -> str:
        """A sign before estimates."""
        return "" if self.errors is None else "≈ "


@dataclass(frozen=True)
class BlockTable:
    """One row per parameter (or per module of ``members``); cells keyed ``i <= j``, absent if not asked.

    ``whole`` is the size and the number of blocks of the Hessian that this is a part of.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    kinds: dict[Pair, str]
    norms: dict[Pair, Norms] | None = None
    members: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()
    whole: tuple[int, int] = (0, 0)

    def counts(self) -> dict[str, int]:
        """How many blocks are of each kind, each pair of parameters counted once."""
        return dict(Counter(self.kinds.values()))

    def summary(self) -> str:
        """One line on the whole map."""
        counts = self.counts()
        parts = [f"{counts[kind]} {meaning}" for kind, meaning in MEANINGS.items() if kind in counts]
        asked = sum(counts.values())
        size, number = self.whole
        of = "" if asked == number else f" of {number:,}"
        return f"Hessian, P = {size:,}: {asked:,}{of} blocks ({', '.join(parts)})"

    def legend(self) -> str:
        """The signs in use."""
        used = [f"{SYMBOLS[k]} {m}" for k, m in MEANINGS.items() if k in self.kinds.values()]
        n = len(self.names)
        if len(self.kinds) < n * (n + 1) // 2:
            used.append("- not asked for")
        return "   ".join(used)

    def as_json(self) -> list[dict[str, Any]]:
        """One entry per block, each pair once."""
        out = []
        for (i, j), kind in sorted(self.kinds.items()):
            entry: dict[str, Any] = {"row": self.names[i], "column": self.names[j], "kind": kind}
            if self.norms is not None:
                n = self.norms[i, j]
                entry["fro"] = {"full": n.full, "outer": n.outer, "functional": n.functional}
                if n.errors is not None:
                    entry["standard_error"] = {"full": n.errors[0], "functional": n.errors[1]}
            out.append(entry)
        return out

    def compact(self, limit: int = _MAX_ROWS) -> BlockTable:
        """The same map, parameters merged by module as deep as ``limit`` rows allow."""
        if len(self.names) <= limit:
            return self
        paths = [name.rpartition(".")[0].split(".") for name in self.names]
        depth = max(map(len, paths))
        while depth > 1 and len({tuple(p[:depth]) for p in paths}) > limit:
            depth -= 1
        return self._merged([".".join(p[:depth]) or "(root)" for p in paths])

    def _merged(self, labels: Sequence[str]) -> BlockTable:
        names = list(dict.fromkeys(labels))
        at = [names.index(label) for label in labels]
        kinds: dict[Pair, str] = {}
        squares: dict[Pair, tuple[float, float, float]] = {}
        spreads: dict[Pair, tuple[float, float]] = {}
        for (i, j), kind in self.kinds.items():
            pair = min(at[i], at[j]), max(at[i], at[j])
            kinds[pair] = join_kinds(kinds.get(pair, "zero"), kind)
            if self.norms is not None:
                # Inside one module an off-diagonal block is there twice.
                twice = 2 if pair[0] == pair[1] and i != j else 1
                n, old = self.norms[i, j], squares.get(pair, (0.0, 0.0, 0.0))
                new = (n.full, n.outer, n.functional)
                squares[pair] = (
                    old[0] + twice * new[0] ** 2,
                    old[1] + twice * new[1] ** 2,
                    old[2] + twice * new[2] ** 2,
                )
                if n.errors is not None:
                    # Estimates that share directions move together: errors of the squares add up at most.
                    so_far = spreads.get(pair, (0.0, 0.0))
                    more = twice * 2 * n.full * n.errors[0], twice * 2 * n.functional * n.errors[1]
                    spreads[pair] = so_far[0] + more[0], so_far[1] + more[1]
        norms = None if self.norms is None else {p: _rooted(s, spreads.get(p)) for p, s in squares.items()}
        sizes = tuple(sum(s for s, k in zip(self.sizes, at, strict=True) if k == g) for g in range(len(names)))
        members = tuple(tuple(n for n, k in zip(self.names, at, strict=True) if k == g) for g in range(len(names)))
        note = f"{len(self.names)} parameters, merged by module"
        return BlockTable(tuple(names), sizes, kinds, norms, members, (*self.notes, note), self.whole)

    # -- console -------------------------------------------------------------------------------------

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unbounded = options.update(max_width=10_000)
        shown = self.compact()
        limit = options.max_width
        layouts: list[Callable[[], Table]] = [shown._signs, shown._dense]
        if len(shown.names) <= 10:
            layouts.insert(0, shown._words)
        for layout in layouts:
            table = layout()
            if Measurement.get(console, unbounded, table).maximum <= limit:
                break
        yield table
        words = layout == shown._words
        if not words:
            yield Text(shown.legend(), style="dim")
        elif len(shown.kinds) < len(shown.names) * (len(shown.names) + 1) // 2:
            yield Text("- not asked for", style="dim")
        elif shown.norms is not None:
            yield Text("O, F: Frobenius norms of H_O and H_F", style="dim")
        for note in shown.notes:
            yield Text(note, style="dim")
        if shown.norms is not None and not words:
            yield shown._list()

    def _frame(self, sizes: bool = True) -> Table:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("", justify="right", no_wrap=True, style="dim")
        table.add_column("", no_wrap=True)
        if sizes:
            table.add_column("size", justify="right", no_wrap=True, style="dim")
        return table

    def _words(self) -> Table:
        """Upper triangle, kinds in words, norms below them."""
        table = self._frame()
        n = len(self.names)
        for c in range(n):
            table.add_column(str(c + 1), no_wrap=True)
        for r in range(n):
            cells = [Text()] * r + [self._word(r, c) for c in range(r, n)]
            table.add_row(str(r + 1), shorten(self.names[r]), f"{self.sizes[r]:,}", *cells)
        return table

    def _word(self, r: int, c: int) -> Text:
        kind = self.kinds.get((r, c))
        if kind is None:
            return Text("-", style="dim")
        text = Text("·" if kind == "zero" else kind, style=STYLES[kind])
        if self.norms is not None and kind != "zero":
            norms = self.norms[r, c]
            if "H_O" in kind:
                text.append(f"\nO {norms.outer:.1e}", style="not bold")
            if "H_F" in kind:
                text.append(f"\nF {norms.about}{norms.functional:.1e}", style="not bold")
        return text

    def _signs(self) -> Table:
        """Upper triangle, one sign per block."""
        table = self._frame()
        for c in range(len(self.names)):
            table.add_column(str(c + 1), no_wrap=True)
        for r, name in enumerate(self.names):
            cells = [Text()] * r + [self._sign(r, c) for c in range(r, len(self.names))]
            table.add_row(str(r + 1), shorten(name), f"{self.sizes[r]:,}", *cells)
        return table

    def _dense(self) -> Table:
        """Upper triangle, two characters per block, columns numbered by their last digit."""
        table = self._frame(sizes=False)
        table.add_column("".join(f"{c % 10} " for c in range(1, len(self.names) + 1)), no_wrap=True)
        for r, name in enumerate(self.names):
            line = Text("  " * r)
            for c in range(r, len(self.names)):
                line.append_text(self._sign(r, c)).append(" ")
            table.add_row(str(r + 1), shorten(name, 20), line)
        return table

    def _sign(self, r: int, c: int) -> Text:
        kind = self.kinds.get((r, c))
        return Text("-", style="dim") if kind is None else Text(SYMBOLS[kind], style=STYLES[kind])

    def _list(self) -> Group:
        """The largest blocks by norm."""
        assert self.norms is not None
        present = [(p, n) for p, n in self.norms.items() if self.kinds[p] != "zero"]
        ranked = sorted(present, key=lambda item: -item[1].full)
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("row", overflow="fold")
        table.add_column("column", overflow="fold")
        for head in ("‖H_O‖", "‖H_F‖", "‖H‖"):
            table.add_column(head, justify="right", no_wrap=True)
        for (i, j), n in ranked[:_MAX_LISTED]:
            parts = [
                f"{v}" if part in self.kinds[i, j] else "·"
                for part, v in (("H_O", f"{n.outer:.2e}"), ("H_F", f"{n.about}{n.functional:.2e}"))
            ]
            table.add_row(self.names[i], self.names[j], *parts, f"{n.about}{n.full:.2e}")
        rest = len(ranked) - _MAX_LISTED
        more = f"; {rest} smaller ones in --format json or html" if rest > 0 else ""
        return Group(table, Text(f"Frobenius norms{more}", style="dim"))


def block_table(state: State, request: Request) -> BlockTable:
    """The kinds of the requested blocks, from the graph alone; rows are the parameters that they touch."""
    program = state.program
    found = structure(program, request, reach(program, request.leaves))
    labels = {(False, False): "zero", (True, False): "H_O", (False, True): "H_F", (True, True): "H_O+H_F"}
    rows = sorted({k for pair in found for k in pair})
    at = {k: row for row, k in enumerate(rows)}
    return BlockTable(
        tuple(request.names[k] for k in rows),
        tuple(request.sizes[k] for k in rows),
        {(at[i], at[j]): labels[kind] for (i, j), kind in found.items()},
        whole=(request.total, len(request.names) * (len(request.names) + 1) // 2),
    )


def with_norms(
    table: BlockTable,
    graph: Graph,
    state: State,
    loss: str,
    inputs: Any,
    targets: Any,
    budget: int | None,
    announce: Callable[[int], None],
    advance: Callable[[int], None],
) -> BlockTable:
    """Frobenius norms of every block of the table, a few blocks at a time.

    Where the blocks are too large to be formed, those of H_O come from an atlas, exactly, and those of H_F and H are
    estimated. ``announce`` gets the number of steps, ``advance`` how many are done. Raises ``MemoryBudgetError`` when
    neither fits.
    """
    device, width = state.weights.device, itemsize(state.weights.dtype)
    limit = min(_STEP_BYTES, _memory.budget_bytes(budget, device))
    zero = Norms(0.0, 0.0, 0.0)
    norms = {pair: zero for pair, kind in table.kinds.items() if kind == "zero"}
    wanted = [pair for pair in table.kinds if pair not in norms]
    entries = [table.sizes[i] * table.sizes[j] for i, j in wanted]
    if sum(entries) > _MAX_ENTRIES or _COPIES * width * max(entries, default=0) > max(limit, _FLOOR):
        return _from_atlas(table, state, budget, announce, advance)
    announce(len(wanted))
    for pairs in _steps(wanted, table.sizes, limit // (_COPIES * width)):
        names = [(table.names[i], table.names[j]) for i, j in pairs]
        used = sorted({k for pair in pairs for k in pair})
        parts = decompose(
            graph,
            loss,
            inputs,
            targets,
            params=[table.names[k] for k in used],
            blocks=names,
            memory_budget=budget,
        )
        for pair, (a, b) in zip(pairs, names, strict=True):
            full, outer, inner = (float(m.block(a, b).fro()) for m in (parts.full, parts.outer, parts.functional))
            norms[pair] = Norms(full, outer, inner)
        advance(len(pairs))
    return replace(table, norms=norms)


def _rooted(squares: tuple[float, float, float], spread: tuple[float, float] | None) -> Norms:
    full, outer, functional = map(sqrt, squares)
    if spread is None:
        return Norms(full, outer, functional)
    errors = [s / (2 * v) if v > 0 else 0.0 for s, v in zip(spread, (full, functional), strict=True)]
    return Norms(full, outer, functional, (errors[0], errors[1]))


def _from_atlas(
    table: BlockTable,
    state: State,
    budget: int | None,
    announce: Callable[[int], None],
    advance: Callable[[int], None],
) -> BlockTable:
    """Norms of H_O exactly, of H_F and H by random directions, without a block."""
    kinds, names = table.kinds, table.names
    parts: list[Literal["full", "functional"]] = ["full", "functional"]
    mixed = [part for part in parts if any("H_F" in kind for kind in kinds.values())]
    announce(len(names) * (1 + len(mixed)))
    outer = frobenius(gram_of(state, names, "outer", budget, advance))
    work = _memory.budget_bytes(budget, state.weights.device)
    found: dict[str, Probes] = {}
    for part in mixed:
        pairs = ((i, j) for i in range(len(names)) for j in range(i, len(names)))
        # Blocks that were not asked for, or that hold nothing unknown, are not probed.
        known = {p: outer[p] if part == "full" else 0.0 for p in pairs if "H_F" not in kinds.get(p, "zero")}
        found[part] = probe(state, names, part, known, count=_PROBES, seed=0, budget=work, advance=advance)
    norms = {}
    for pair, kind in kinds.items():
        o = outer[pair] if "H_O" in kind else 0.0
        if "H_F" not in kind:
            norms[pair] = Norms(o, o, 0.0)
            continue
        f, f_error, _ = found["functional"].norm([pair[0]], [pair[1]])
        h, h_error, _ = found["full"].norm([pair[0]], [pair[1]]) if "H_O" in kind else (f, f_error, False)
        norms[pair] = Norms(h, o, f, (h_error, f_error))
    note = f"≈ H_F and H: estimates from {_PROBES} random directions per parameter; H_O: exact"
    return replace(table, norms=norms, notes=(*table.notes, *([note] if mixed else [])))


def _steps(pairs: Sequence[Pair], sizes: Sequence[int], limit: int) -> Iterator[list[Pair]]:
    """Groups of pairs with at most ``limit`` entries (one pair may have more)."""
    largest: dict[int, int] = {}
    for i, j in pairs:
        largest[i] = max(largest.get(i, 0), sizes[i] * sizes[j])
    # Rows stay together: the blocks of one row share their sweep.
    ordered = sorted(pairs, key=lambda p: (-largest[p[0]], p[0], -sizes[p[0]] * sizes[p[1]]))
    step: list[Pair] = []
    entries = 0
    for i, j in ordered:
        if step and entries + sizes[i] * sizes[j] > limit:
            yield step
            step, entries = [], 0
        step.append((i, j))
        entries += sizes[i] * sizes[j]
    if step:
        yield step
