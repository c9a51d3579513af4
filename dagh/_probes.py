"""Frobenius norms of blocks by random probes: an estimate, with its standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import hypot, sqrt
from typing import Any, Literal

import numpy as np
import torch
from rich.table import Table
from rich.text import Text

from dagh._blocktables import NormTable, Pair, find_name
from dagh._chunks import directions
from dagh._estimates import student
from dagh._request import itemsize
from dagh._state import State

#: Bundles that a product holds at once, in units of all tangents.
_BUNDLES = 3


@dataclass
class Probes:
    """``‖H_{ab} v‖²`` for Rademacher directions v of b, by ordered pair (a, b): ``[m]`` each.

    Their mean is an unbiased estimate of ``‖H_{ab}‖_F²`` (Hutchinson 1990). Pairs in ``exact`` hold the same known
    number m times.
    """

    squares: dict[Pair, np.ndarray[Any, Any]]
    exact: frozenset[Pair]
    count: int
    #: whether errors are widened by Student's t, so that two of them hold 95.4 % however few directions there are
    widened: bool = False

    def norm(self, rows: Sequence[int], columns: Sequence[int]) -> tuple[float, float, bool]:
        """Frobenius norm of the block of these rows and columns, its standard error, and whether it is exact.

        Both orientations are used where they are independent. Rows of one column share their directions; they are
        added before the variance is taken.
        """
        pairs = {(a, b) for a in rows for b in columns}
        ways = [self._square(rows, columns)]
        if not set(rows) & set(columns):
            ways.append(self._square(columns, rows))
        mean = sum(m for m, _, _ in ways) / len(ways)
        variances = [v for _, each, _ in ways for v in each]
        total = sum(variances)
        norm, exact, error = sqrt(max(mean, 0.0)), pairs <= self.exact, sqrt(total) / len(ways)
        if not exact and self.widened:
            # Degrees of freedom of a sum of variances (Welch and Satterthwaite).
            freedom = (self.count - 1) * total**2 / sum(v**2 for v in variances) if total else 1.0
            error = hypot(student(freedom) * error, sqrt(sum(u for _, _, u in ways)) / len(ways))
        return norm, (error / (2 * norm) if norm > 0 else sqrt(error)), exact

    def _unseen(self, mean: float) -> float:
        """The error of a mean of squares that were all the same.

        ``‖H v‖²`` is a polynomial of degree two in signs: where it is not constant, at most 3/4 of all directions give
        one value, at most 1/2 where that is zero. What has a probability below 1e-3 is not counted.
        """
        chance = 0.75 ** (self.count - 1) if mean > 0 else 0.5**self.count
        if chance < 1e-3:
            return 0.0
        return mean * sqrt(chance) if mean > 0 else chance * max(float(s.mean()) for s in self.squares.values())

    def _square(self, rows: Sequence[int], columns: Sequence[int]) -> tuple[float, list[float], float]:
        """Mean of the squared norm, the variances of its terms, one for each column, and the variance not seen."""
        total, variances, unseen = 0.0, [], 0.0
        for b in columns:
            samples = np.sum([self.squares[a, b] for a in rows], axis=0)
            mean, variance = float(samples.mean()), float(samples.var(ddof=1)) / self.count
            total += mean
            if variance > (1e-12 * mean) ** 2 or all((a, b) in self.exact for a in rows):
                variances.append(variance)
            else:
                unseen += self._unseen(mean) ** 2
        return total, variances, unseen


def probe(
    state: State,
    names: Sequence[str],
    part: Literal["full", "functional"],
    known: Mapping[Pair, float],
    *,
    count: int,
    seed: int,
    budget: int,
    advance: Callable[[int], None] | None = None,
) -> Probes:
    """Probe every block ``(i, j)`` of ``names`` that is not in ``known`` (norms by pair ``i <= j``).

    ``count`` directions per parameter, in bundles that fit ``budget`` bytes.
    """
    n = len(names)
    squares: dict[Pair, np.ndarray[Any, Any]] = {}
    exact = set()
    for i in range(n):
        for j in range(n):
            pair = min(i, j), max(i, j)
            if pair in known:
                squares[i, j] = np.full(count, known[pair] ** 2)
                exact.add((i, j))
    generator = torch.Generator().manual_seed(seed)
    moved = sum(v.numel for v in state.program if v.op is not None and v.batched) * state.samples
    each = _BUNDLES * (moved + sum(v.numel for v in state.program.parameters.values())) * itemsize(state.weights.dtype)
    step = max(1, min(count, budget // max(1, each)))
    widest = max((v.numel for v in state.program if v.op is not None and v.batched), default=1) * state.samples
    step = directions(step, widest * itemsize(state.weights.dtype), state.weights.device)
    for j, name in enumerate(names):
        rows = [i for i in range(n) if (i, j) not in squares]
        if rows:
            found = torch.cat(list(_products(state, names, name, rows, part, count, step, generator)), 1)
            squares.update({(i, j): found[k].numpy() for k, i in enumerate(rows)})
        if advance is not None:
            advance(1)
    return Probes(squares, frozenset(exact), count, widened=True)


def _products(
    state: State,
    names: Sequence[str],
    column: str,
    rows: Sequence[int],
    part: Literal["full", "functional"],
    count: int,
    step: int,
    generator: torch.Generator,
) -> Iterator[torch.Tensor]:
    """``‖H_{ab} v‖²``: ``[rows, B]`` in float64 for one bundle of directions after the other."""
    leaf = state.program.parameters[column]
    like = state.values[leaf]
    for start in range(0, count, step):
        b = min(step, count - start)
        v = torch.randint(2, (b, *leaf.shape), generator=generator, device="cpu").to(like) * 2 - 1
        with torch.no_grad():
            product = state.hessian_product({column: v}, part)
        yield torch.stack([product[names[i]].reshape(b, -1).double().square().sum(1) for i in rows]).cpu()


class EstimatedNorms(NormTable):
    """Frobenius norms of which some are estimates; ``stderr[a, b]`` is the standard error, 0 where exact.

    With few directions it is wider than their spread (Student's t): two of them hold the norm in 95 %.
    """

    def __init__(
        self, kind: str, names: Sequence[str], values: dict[Pair, Any], errors: dict[Pair, float], exact: set[Pair]
    ) -> None:
        super().__init__(kind, names, values, None)
        self.stderr = NormTable("standard error of fro", names, dict(errors), None)
        self._exact = exact

    def is_exact(self, a: str, b: str) -> bool:
        """Whether the norm of this block is exact rather than an estimate."""
        i, j = (find_name(self._index, name, "parameter") for name in (a, b))
        return (min(i, j), max(i, j)) in self._exact

    def __str__(self) -> str:
        return "\n".join(f"{a} × {b}: {self.text(a, b)}" for a, b in self)

    def text(self, a: str, b: str) -> str:
        """``1.234`` or ``≈ 1.234 ± 0.05``."""
        if self.is_exact(a, b):
            return f"{self[a, b]:.4g}"
        return f"≈ {self[a, b]:.4g} ± {self.stderr[a, b]:.1g}"

    def __repr__(self) -> str:
        estimates = len(self) - len(self._exact)
        return f"EstimatedNorms({self.kind!r}, {len(self.names)} parameters, {len(self)} blocks, {estimates} estimates)"

    def __rich__(self) -> Table:
        table = Table(title=f"{self.kind} norms of the blocks (≈: estimates with their standard errors)")
        for column in ("rows", "columns", "norm"):
            table.add_column(column, justify="right" if column == "norm" else "left")
        for a, b in self:
            table.add_row(Text(a), Text(b), Text(self.text(a, b)))
        return table
