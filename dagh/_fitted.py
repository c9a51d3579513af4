"""A table that leaves columns out where a terminal is too narrow, since a number cut short is another number."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table

_NAME = 8  # of a name, this much is shown at least


class FittedTable(Table):
    """A :class:`rich.table.Table` with columns to ``spare``, by heading, the first ones first.

    Columns with ``no_wrap`` hold numbers and are never narrower than these; others, and those with
    ``overflow="ellipsis"``, hold names and give way, down to their ``min_width`` before a column is spared.
    """

    def __init__(self, *args: Any, spare: tuple[str, ...] = (), **options: Any) -> None:
        super().__init__(*args, **options)
        self.spare = spare

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fitted = copy(self)
        fitted.columns = list(self.columns)
        for heading in self.spare:
            if fitted._least(console, options) <= options.max_width:
                break
            fitted.columns = [c for c in fitted.columns if str(c.header) != heading]
        fitted._narrow(console, options)
        yield from Table.__rich_console__(fitted, console, options)

    def _least(self, console: Console, options: ConsoleOptions) -> int:
        """The width below which numbers would be cut."""
        needed = sum(min(w, c.min_width or _NAME) if _gives_way(c) else w for c, w in self._natural(console, options))
        return needed + self._frame()

    def _narrow(self, console: Console, options: ConsoleOptions) -> None:
        """Take what the whole is too wide by from the widest names; from their least widths only if nothing is left."""
        widths = [w for _, w in self._natural(console, options)]
        names = [i for i, c in enumerate(self.columns) if _gives_way(c)]
        wanted = [c.min_width or _NAME for c in self.columns]
        for least in (wanted, [_NAME] * len(widths)):
            while sum(widths) + self._frame() > options.max_width:
                wide = [i for i in names if widths[i] > least[i]]
                if not wide:
                    break
                widths[max(wide, key=lambda i: widths[i])] -= 1
        self.columns = [replace(c, width=w, min_width=None) for c, w in zip(self.columns, widths, strict=True)]

    def _natural(self, console: Console, options: ConsoleOptions) -> list[tuple[Column, int]]:
        wide = options.update(max_width=1000)
        padding = self._get_padding_width
        return [(c, self._measure_column(console, wide, c).maximum - padding(c._index)) for c in self.columns]

    def _frame(self) -> int:
        return self._extra_width + sum(self._get_padding_width(c._index) for c in self.columns)


def _gives_way(column: Column) -> bool:
    return not column.no_wrap or column.overflow == "ellipsis"
