"""Choices at kinks, and reports of how close the data come to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from rich.table import Table

from dagh._ir import Node
from dagh._notebook import Shown
from dagh._rules import rule_for
from dagh._rules._switches import Switch
from dagh.errors import ReductionError, UnknownNameError

if TYPE_CHECKING:
    from dagh._state import State


class KinkPolicy:
    """Which derivative to take at a kink.

    ``choices`` is ``None`` (PyTorch's own); ``"left"``, ``"right"`` or a slope for all nodes; a dict from operation
    names, node names, module paths or globs of them to a choice; or a function ``NodeInfo -> choice | None``. A choice
    is a number λ in [0, 1] for element-wise kinks (the derivative is (1-λ)·left + λ·right, so λ = σ'(0) for ReLU); or
    ``"first"``, ``"last"``, ``"split"`` for maxima over axes or windows, where max-pool also takes a sequence of
    weights per window position.
    """

    def __init__(self, choices: Any = None) -> None:
        self.choices = choices
        self._found: dict[Node, Any] = {}

    def settle(self, state: State) -> State:
        """The state to hand out once values are known."""
        return state

    def check(self, nodes: Iterable[Node]) -> None:
        """Refuse keys of a dict that match no node with a kink of its own to choose."""
        if not isinstance(self.choices, dict):
            return
        kinked = [n for n in nodes if n.op is not None and rule_for(n).takes_choice]
        labels = sorted({label for n in kinked for label in (n.operation, n.name, n.module) if label})
        for key in self.choices:
            if not any(fnmatchcase(label, key) for label in labels):
                raise UnknownNameError.of("node or operation with a choice at its kinks", str(key), labels)

    def choice(self, node: Node) -> Any:
        """The choice for ``node``; ``None`` for PyTorch's own."""
        if self.choices is None or node.op is None or not rule_for(node).takes_choice:
            return None
        if node not in self._found:
            self._found[node] = _validated(node, self._look_up(node))
        return self._found[node]

    def _look_up(self, node: Node) -> Any:
        if isinstance(self.choices, (str, float)):
            return _everywhere(node, self.choices)
        if callable(self.choices):
            return self.choices(NodeInfo(node.name, node.operation, node.module))
        for key, value in self.choices.items():
            if any(fnmatchcase(label, key) for label in (node.name, node.operation, node.module) if label):
                return value
        return None


def _everywhere(node: Node, choice: str | float) -> Any:
    """``"left"``, ``"right"`` or one slope for all nodes; among equal elements 0 is the first, 1 the last, ½ split."""
    if isinstance(choice, str) or not _copies(node):
        return choice
    return {0.0: "first", 1.0: "last"}.get(choice, "split")


@dataclass(frozen=True)
class NodeInfo:
    """What a ``kinks`` function gets to see."""

    name: str
    operation: str
    module: str


#: Operations that copy one of several elements: a choice is a rule among equals.
_COPYING = ("max_pool", "adaptive_max_pool", "amax", "amin", "max", "min")


def _copies(node: Node) -> bool:
    return node.operation.partition("[")[0] in _COPYING


def _validated(node: Node, choice: Any) -> Any:
    if choice is None or choice == "torch":
        return None
    if choice in ("left", "right"):
        return {"left": "first", "right": "last"}[choice] if _copies(node) else float(choice == "right")
    number = isinstance(choice, (int, float)) and 0 <= choice <= 1
    if _copies(node):
        if choice in ("first", "last", "split"):
            return choice
        if node.operation == "max_pool" and not isinstance(choice, (int, float, str)):
            return tuple(float(c) for c in choice)
        raise ReductionError(
            f"kinks[{node.name!r}] = {choice!r}: {node.operation} takes 'first', 'last', 'split'"
            + (" or weights per window position" if node.operation == "max_pool" else "")
        )
    if number:
        return float(choice)
    raise ReductionError(f"kinks[{node.name!r}] = {choice!r}: {node.operation} takes a number between 0 and 1")


@dataclass(frozen=True)
class KinkRow:
    """One node's standing: counts over samples and elements, and the smallest distance to a kink."""

    node: str
    operation: str
    module: str
    elements: int
    exact: int
    near: int
    margin: float


@dataclass(frozen=True)
class KinkTable(Shown):
    """Result of :meth:`dagh.State.kinks`, one :class:`KinkRow` per node with kinks."""

    rows: tuple[KinkRow, ...]
    tol: float

    @classmethod
    def of(cls, state: State, tol: float) -> KinkTable:
        rows = []
        for node in state.program:
            if node.op is None:
                continue
            rule = state.rule(node)
            if isinstance(rule, Switch) and not state.active(node):
                continue  # a mask made of the data alone
            sites = rule.kinks(state.call(node))
            if sites is None or sites.margin.numel() == 0:
                continue
            margin = sites.margin.nan_to_num(nan=float("inf"))
            rows.append(
                KinkRow(
                    node.name, node.operation, node.module, margin.numel(), int((margin == 0).sum()),
                    int((margin <= tol).sum()), float(margin.min()),
                )
            )  # fmt: skip
        return cls(tuple(rows), tol)

    @property
    def ties(self) -> int:
        """Elements exactly on a kink."""
        return sum(r.exact for r in self.rows)

    @property
    def margin(self) -> float:
        """Smallest distance to a kink (infinite without kinks)."""
        return min((r.margin for r in self.rows), default=float("inf"))

    def __iter__(self) -> Iterator[KinkRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, node: str) -> KinkRow:
        for row in self.rows:
            if row.node == node:
                return row
        raise KeyError(node)

    def __rich__(self) -> Table:
        table = Table(title=f"Kinks: {self.ties} exact ties, smallest margin {self.margin:.3g}")
        for column in ("node", "operation", "module"):
            table.add_column(column)
        for column in ("elements", "on a kink", f"within {self.tol:g}", "margin"):
            table.add_column(column, justify="right")
        for r in self.rows:
            table.add_row(r.node, r.operation, r.module, str(r.elements), str(r.exact), str(r.near), f"{r.margin:.3g}")
        return table
