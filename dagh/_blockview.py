"""The map of a block matrix: which blocks are zero, which carry curvature of loss, model or both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from html import escape
from math import log10
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from dagh._blockcombine import module_members
from dagh._blocktables import PARTS, join_kinds

if TYPE_CHECKING:
    from torch import Tensor

    from dagh._blockmatrix import BlockMatrix

MAX_ROWS = 24  # more parameters than this are shown module by module
DETAIL_ROWS = 12  # up to this many rows, a cell has room for more than a symbol
WORD_ROWS = 4  # up to this many, for the class in words
CHEAP_FLOPS = 200_000_000
LABEL_WIDTH = 32

SYMBOLS = {"zero": "·", "H_O": "O", "H_F": "F", "H_O+H_F": "B"}
MEANINGS = {"zero": "zero", "H_O": "H_O only", "H_F": "H_F only", "H_O+H_F": "both H_O and H_F"}
STYLES = {"zero": "dim", "H_O": "cyan", "H_F": "magenta", "H_O+H_F": "bold yellow"}
SHORT = {"kronecker": "kron", "diagonal": "diag", "low-rank": "low", "transpose": "trans"}
KIND_COLOURS = {"H_O": (126, 200, 227), "H_F": (214, 143, 214), "H_O+H_F": (246, 200, 95)}
HEAT = ((255, 247, 205), (253, 160, 60), (130, 20, 70))


@dataclass(frozen=True)
class Cell:
    """One cell of the map; ``kind`` is None where nothing was computed."""

    kind: str | None
    partial: bool
    structure: str
    norm: float | None


def shorten(name: str, width: int = LABEL_WIDTH) -> str:
    """``name`` cut in the middle to ``width`` characters."""
    if len(name) <= width:
        return name
    tail = (width - 2) // 2
    return f"{name[: width - 2 - tail]}..{name[-tail:]}"


class BlockMap:
    """Labelled map of a :class:`BlockMatrix`, for a rich console and as HTML."""

    def __init__(self, matrix: BlockMatrix) -> None:
        self.matrix = matrix
        self.notes: list[str] = []
        self.rows = self._rows()

    def _rows(self) -> list[tuple[str, str, list[int]]]:
        """(label, shape, positions) of each row of the map."""
        matrix = self.matrix
        if len(matrix.names) <= MAX_ROWS:
            shapes = ["x".join(map(str, shape)) or "1" for shape in matrix.shapes]
            return [(name, shapes[i], [i]) for i, name in enumerate(matrix.names)]
        deepest = max(path.count(".") + 1 for path in matrix.modules)
        members = module_members(matrix)
        depth = deepest
        while len(members) > MAX_ROWS and depth > 1:
            depth -= 1
            members = module_members(matrix, depth)
        cut = "" if depth == deepest else f" at depth {depth}"
        self.notes.append(f"{len(matrix.names)} parameters, grouped by module{cut}")
        rows = [(name, f"{len(held)} tensors", held) for name, held in members.items()]
        if len(rows) > MAX_ROWS:
            self.notes.append(f"the first {MAX_ROWS} of {len(rows)} modules are shown")
        return rows[:MAX_ROWS]

    @cached_property
    def _norms(self) -> dict[tuple[int, int], Tensor] | None:
        """Frobenius norm of each block, [] or [N], None when that would take long."""
        blocks = self.matrix.blocks
        if sum(block.fro_flops() for block in blocks.values()) > CHEAP_FLOPS:
            return None
        memo: dict[int, Tensor] = {}
        return {pair: block.norm("fro", memo) for pair, block in blocks.items()}

    @cached_property
    def cells(self) -> list[list[Cell]]:
        """The cells, symmetric."""
        return [[self._cell(r, c) for _, _, c in self.rows] for _, _, r in self.rows]

    def _cell(self, row: list[int], column: list[int]) -> Cell:
        pairs = [(min(i, j), max(i, j)) for i in row for j in column]
        held = [pair for pair in pairs if pair in self.matrix.blocks]
        if not held:
            return Cell(None, False, "", None)
        kind = "zero"
        for pair in held:
            kind = join_kinds(kind, self.matrix.kinds[pair])
        structures = {self.matrix.blocks[pair].structure for pair in held} - {"zero"}
        structure = structures.pop() if len(structures) == 1 else "mixed" if structures else "zero"
        norms = self._norms
        norm = None
        if norms is not None:
            norm = float(sum((norms[pair].square() for pair in held[1:]), norms[held[0]].square()).sqrt().mean())
        return Cell(kind, len(held) < len(pairs), structure, norm)

    def _flat(self) -> Iterator[Cell]:
        return (cell for row in self.cells for cell in row)

    def legend(self) -> list[str]:
        """What the symbols in use mean."""
        used = {cell.kind for cell in self._flat()}
        parts = [f"{SYMBOLS[kind]} {meaning}" for kind, meaning in MEANINGS.items() if kind in used]
        if None in used:
            parts.append("- not computed")
        if any(cell.partial for cell in self._flat()):
            parts.append("* partly computed")
        return parts

    def title(self) -> str:
        """One line on the whole matrix."""
        matrix = self.matrix
        samples = "" if matrix.samples is None else f", {matrix.samples} samples"
        name = PARTS[matrix.part]
        return f"{name[0].upper()}{name[1:]}, P={matrix.size}, reduction={matrix.reduction}{samples}"

    def caption(self, norms: bool) -> list[str]:
        """Lines under the map."""
        lines = ["   ".join(self.legend())]
        if norms:
            mean = "" if self.matrix.samples is None else ", mean over samples"
            lines.append(f"numbers: Frobenius norm{mean}")
        return lines + self.notes

    # -- console -----------------------------------------------------------------------------------
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unbounded = options.update(max_width=10_000)
        for layout in (self.detailed, self.plain):
            table = layout(options.ascii_only)
            if Measurement.get(console, unbounded, table).maximum <= options.max_width:
                yield table
                return
        yield self.compact(options.ascii_only)

    def detailed(self, ascii_only: bool = False) -> Table:
        """The upper triangle with norms, or structures when norms are dear; plain when the rows are many."""
        if len(self.rows) > DETAIL_ROWS:
            return self.plain(ascii_only)
        return self._table(ascii_only, detail=True)

    def plain(self, ascii_only: bool = False) -> Table:
        """The upper triangle in symbols."""
        return self._table(ascii_only, detail=False)

    def compact(self, ascii_only: bool = False) -> Table:
        """The upper triangle in two characters a cell, columns numbered by their last digit, no shapes."""
        table = self._frame(ascii_only, norms=False)
        table.add_column("".join(f"{c % 10} " for c in range(1, len(self.rows) + 1)), no_wrap=True)
        for r, (label, _, _) in enumerate(self.rows):
            line = Text("  " * r)
            for cell in self.cells[r][r:]:
                text = self._text(cell, False, ascii_only)
                text.pad_right(2 - len(text))
                line.append_text(text)
            table.add_row(str(r + 1), Text(shorten(label, LABEL_WIDTH // 2)), line)
        return table

    def _table(self, ascii_only: bool, detail: bool) -> Table:
        table = self._frame(ascii_only, norms=detail and self._norms is not None)
        table.add_column("shape", no_wrap=True, style="dim")
        for number in range(1, len(self.rows) + 1):
            table.add_column(str(number), no_wrap=True)
        for r, (label, shape, _) in enumerate(self.rows):
            cells = [Text("")] * r + [self._text(cell, detail, ascii_only) for cell in self.cells[r][r:]]
            table.add_row(str(r + 1), Text(shorten(label)), Text(shape), *cells)
        return table

    def _frame(self, ascii_only: bool, norms: bool) -> Table:
        """An empty table with its title, legend and the columns of numbers and labels."""
        caption = "\n".join(self.caption(norms))
        table = Table(
            title=Text(self.title()),
            caption=Text(caption.replace("·", ".") if ascii_only else caption),
            title_justify="left",
            caption_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        table.add_column("", justify="right", no_wrap=True, style="dim")
        table.add_column("", no_wrap=True)
        return table

    def _text(self, cell: Cell, detail: bool, ascii_only: bool) -> Text:
        if cell.kind is None:
            return Text("-", style="dim")
        symbol = cell.kind if detail and len(self.rows) <= WORD_ROWS else SYMBOLS[cell.kind]
        if ascii_only:
            symbol = symbol.replace("·", ".")
        text = symbol + ("*" if cell.partial else "")
        if detail and cell.kind != "zero":
            extra = SHORT.get(cell.structure, cell.structure) if cell.norm is None else f"{cell.norm:.1e}"
            text = f"{text} {extra}"
        return Text(text, style=STYLES[cell.kind])

    # -- HTML --------------------------------------------------------------------------------------
    def to_html(self) -> str:
        """A self-contained ``<div>``: the whole symmetric table, heat-colored by the log of the norm."""
        positive = [c.norm for c in self._flat() if c.norm]
        low, high = (log10(min(positive)), log10(max(positive))) if positive else (0.0, 0.0)
        heads = "".join(
            f'<th title="{escape(label)}" style="{_PLAIN}font-weight:600">{i}</th>'
            for i, (label, _, _) in enumerate(self.rows, 1)
        )
        body = []
        for r, (label, shape, _) in enumerate(self.rows):
            cells = "".join(self._td(r, c, low, high) for c in range(len(self.rows)))
            name = f'<th title="{escape(label)}" style="{_PLAIN}text-align:left">{r + 1} '
            name += f'{escape(shorten(label))} <span style="opacity:.6">{escape(shape)}</span></th>'
            body.append(f"<tr>{name}{cells}</tr>")
        lines = self.caption(False)
        if positive:
            mean = " (mean over samples)" if self.matrix.lead else ""
            lines.append(f"color: Frobenius norm{mean}, log scale, {10**low:.2e} (light) to {10**high:.2e} (dark)")
        notes = "<br>".join(escape(line) for line in lines)
        return (
            '<div style="font-family:ui-monospace,monospace;font-size:12px;color:inherit;overflow-x:auto">'
            f'<div style="font-weight:600;margin-bottom:4px">{escape(self.title())}</div>'
            '<table style="border-collapse:separate;border-spacing:1px;background:transparent;color:inherit">'
            f'<thead><tr><th style="{_PLAIN}"></th>{heads}</tr></thead><tbody>{"".join(body)}</tbody></table>'
            f'<div style="opacity:.75;margin-top:4px">{notes}</div></div>'
        )

    def _td(self, r: int, c: int, low: float, high: float) -> str:
        cell = self.cells[r][c]
        tip = f"{self.rows[r][0]} x {self.rows[c][0]}: "
        if cell.kind is None:
            return f'<td title="{escape(tip)}not computed" style="{_PLAIN}opacity:.4">-</td>'
        tip += MEANINGS[cell.kind] + (", partly computed" if cell.partial else "")
        if cell.norm is not None:
            tip += f", Frobenius norm {cell.norm:.9e}" + (" (mean over samples)" if self.matrix.lead else "")
        if cell.structure not in ("zero", ""):
            tip += f", held as {cell.structure}"
        color: Color | None
        if cell.norm:
            color = _heat((log10(cell.norm) - low) / (high - low) if high > low else 1.0)
        else:
            color = KIND_COLOURS.get(cell.kind) if cell.norm is None else None
        style = "opacity:.5" if color is None else _paint(color)
        symbol = SYMBOLS[cell.kind] + ("*" if cell.partial else "")
        return f'<td title="{escape(tip)}" style="{_PLAIN}{style}">{symbol}</td>'


_PLAIN = "padding:2px 7px;text-align:center;"

Color = tuple[int, int, int]


def _heat(t: float) -> Color:
    """Light yellow to dark red for ``t`` from 0 to 1."""
    position = min(max(t, 0.0), 1.0) * (len(HEAT) - 1)
    i = min(int(position), len(HEAT) - 2)
    mixed = [round(a + (b - a) * (position - i)) for a, b in zip(HEAT[i], HEAT[i + 1], strict=True)]
    return mixed[0], mixed[1], mixed[2]


def _paint(color: Color) -> str:
    """Background and a text color that reads on it, whatever the theme of the page."""
    red, green, blue = color
    ink = "#111" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#fff"
    return f"background:rgb({red},{green},{blue});color:{ink}"
