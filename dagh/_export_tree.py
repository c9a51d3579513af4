"""The operations as a tree of modules, in the order in which they run, cut and folded for display."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from dagh._export import Dim, NodeRow


@dataclass
class Group:
    """A run of consecutive operations inside one module."""

    label: str
    items: list[Group | NodeRow] = field(default_factory=list)

    def rows(self) -> Iterator[NodeRow]:
        """Every operation inside."""
        for item in self.items:
            if isinstance(item, NodeRow):
                yield item
            else:
                yield from item.rows()


@dataclass(frozen=True)
class Line:
    """One line of the display.

    ``row`` is None for a module; ``ops`` is None for an operation and for a module whose operations follow,
    else how many operations the line stands for. With ``times`` identical siblings in a row, the numbers are
    their sums.
    """

    depth: int
    label: str
    row: NodeRow | None
    ops: int | None
    times: int
    shape: tuple[Dim, ...] | None
    scalars: int
    shared: bool
    ties: int | None
    margin: float | None
    derivatives: tuple[str, ...]
    flops: int
    coupled: bool
    generic: bool


def lines(
    rows: Sequence[NodeRow], *, depth: int | None = None, collapse: bool = False, hide: Sequence[str] = ()
) -> list[Line]:
    """Inputs, then operations by module, then the loss.

    ``depth`` is how many levels of modules are shown, the last of them closed; ``collapse`` folds
    repeated siblings, ``hide`` drops operations whose operation, name or module matches a glob.
    """
    shown = [row for row in rows if row.op_like and not _hidden(row, hide)]
    model = _grouped([row for row in shown if row.part == "model"])
    out = [_leaf_line(row) for row in rows if row.kind in ("input", "target")]
    out += _walk(model.items, 0, depth, collapse)
    tail = [row for row in shown if row.part == "loss"]
    if len(tail) == 1:
        known = tail[0].operation != "unspecified"
        out.append(_line(f"loss · {tail[0].operation}" if known else "loss", tail, 0, row=tail[0]))
    elif tail:
        out += _walk([Group("loss", list(tail))], 0, depth, collapse)
    return out


def _hidden(row: NodeRow, hide: Sequence[str]) -> bool:
    labels = (row.operation, row.name, row.module)
    return any(fnmatchcase(label, pattern) for pattern in hide for label in labels if label)


def _grouped(rows: Sequence[NodeRow]) -> Group:
    """Runs of consecutive operations nested by module path; a module used twice appears twice."""
    root = Group("")
    stack = [root]
    for row in rows:
        path = row.module.split(".") if row.module else []
        keep = 0
        while keep < min(len(path), len(stack) - 1) and stack[keep + 1].label == path[keep]:
            keep += 1
        del stack[keep + 1 :]
        for label in path[keep:]:
            group = Group(label)
            stack[-1].items.append(group)
            stack.append(group)
        stack[-1].items.append(row)
    _shorten(root)
    return root


def _shorten(group: Group) -> None:
    """Join a module that holds nothing but one module with it: ``encoder.layers``."""
    for item in group.items:
        if isinstance(item, Group):
            while len(item.items) == 1 and isinstance(item.items[0], Group):
                inner = item.items[0]
                item.label, item.items = f"{item.label}.{inner.label}", inner.items
            _shorten(item)


def _walk(items: Sequence[Group | NodeRow], level: int, depth: int | None, collapse: bool) -> list[Line]:
    out: list[Line] = []
    at = 0
    while at < len(items):
        item = items[at]
        if isinstance(item, NodeRow):
            out.append(_line(item.operation, [item], level, row=item))
            at += 1
            continue
        same = 1
        if collapse:
            signature = _signature(item)
            while at + same < len(items) and _signature(items[at + same]) == signature:
                same += 1
        copies = [i for i in items[at : at + same] if isinstance(i, Group)]
        at += same
        label = item.label if same == 1 else f"{item.label} … {copies[-1].label}"
        merged = _merged(copies)
        inside = list(merged.rows())
        if len(inside) == 1:
            out.append(_line(f"{label} · {inside[0].operation}", inside, level, row=inside[0], times=same))
        elif depth is not None and level + 1 >= depth:
            out.append(_line(label, inside, level, ops=len(inside) * same, times=same))
        else:
            out.append(_line(label, inside, level, times=same, heading=True))
            out += _walk(merged.items, level + 1, depth, collapse)
    return out


def _merged(copies: Sequence[Group]) -> Group:
    """Identical modules as one, with their numbers summed."""
    first = copies[0]
    if len(copies) == 1:
        return first
    items: list[Group | NodeRow] = []
    for k, item in enumerate(first.items):
        same = [c.items[k] for c in copies]
        if isinstance(item, Group):
            items.append(_merged([i for i in same if isinstance(i, Group)]))
        else:
            items.append(_summed([i for i in same if isinstance(i, NodeRow)]))
    return Group(first.label, items)


def _summed(rows: Sequence[NodeRow]) -> NodeRow:
    kinked = [r.kinks for r in rows if r.kinks is not None]
    kinks = None
    if kinked:
        kinks = replace(
            kinked[0],
            elements=sum(k.elements for k in kinked),
            exact=sum(k.exact for k in kinked),
            near=sum(k.near for k in kinked),
            margin=min(k.margin for k in kinked),
        )
    return replace(
        rows[0],
        scalars=sum(r.scalars for r in rows),
        flops=sum(r.flops for r in rows),
        couples_samples=any(r.couples_samples for r in rows),
        kinks=kinks,
    )


def _signature(item: Group | NodeRow) -> object:
    if isinstance(item, Group):
        return tuple(_signature(i) for i in item.items)
    kept = [p.rpartition(".")[2] for p in item.parameters]
    return item.operation, item.shape, item.scalars, item.shared, tuple(kept), item.derivative


def _leaf_line(row: NodeRow) -> Line:
    label = f"{row.name} · {row.kind}" if row.name != row.kind else row.name
    return _line(label, [row], 0, row=row)


def _line(
    label: str,
    rows: Sequence[NodeRow],
    depth: int,
    *,
    row: NodeRow | None = None,
    ops: int | None = None,
    times: int = 1,
    heading: bool = False,
) -> Line:
    kinked = [r.kinks for r in rows if r.kinks is not None]
    quiet = heading
    return Line(
        depth,
        label,
        row,
        ops,
        times,
        None if quiet else rows[-1].shape,
        0 if quiet else sum(r.scalars for r in rows if r.kind != "parameter"),
        not quiet and any(r.shared for r in rows),
        None if quiet or not kinked else sum(k.exact for k in kinked),
        None if quiet or not kinked else min(k.margin for k in kinked),
        () if quiet else tuple(dict.fromkeys(r.derivative for r in rows if r.derivative)),
        0 if quiet else sum(r.flops for r in rows),
        any(r.couples_samples for r in rows) and not quiet,
        any(r.closed_form is False for r in rows) and not quiet,
    )
