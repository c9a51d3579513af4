"""Results of one or several folders as points of their axes, with what is missing and what failed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dagh.errors import FileFormatError

from ._store import RunRecord, Store

Array = np.ndarray[Any, np.dtype[Any]]

#: Names of the axes for people, and the figure of the paper that shows each.
AXES = {
    "L": ("hidden convolutional layers L", "Fig. 1"),
    "k": ("kernel size k", "Fig. 2"),
    "C": ("channels C", "Fig. 3"),
    "pool_at": ("position of pooling l", "Fig. 4"),
}


@dataclass(frozen=True)
class Panel:
    """One axis on one data set: finished runs by value, in the order of the axis."""

    axis: str
    dataset: str
    runs: dict[str, list[RunRecord]]

    @property
    def label(self) -> str:
        """The axis for people."""
        return AXES.get(self.axis, (self.axis, ""))[0]

    @property
    def name(self) -> str:
        """For file names."""
        return "".join(c if c.isalnum() or c in "-_" else "-" for c in f"{self.axis}-{self.dataset}")

    @property
    def values(self) -> list[str]:
        """Labels of the values, in order."""
        return list(self.runs)

    @property
    def positions(self) -> Array:
        """Where the values lie on the axis: themselves where they are numbers, else 1, 2, …."""
        try:
            numbers = np.array([float(v) for v in self.values])
        except ValueError:
            return np.arange(1.0, len(self.values) + 1)
        return numbers if np.isfinite(numbers).all() else np.arange(1.0, len(self.values) + 1)

    def scalar(self, path: str) -> list[Array]:
        """One number of every run, per value; runs without it are left out."""
        return [np.array([x for r in rs if (x := number(r.scalars, path)) is not None]) for rs in self.runs.values()]

    def __iter__(self) -> Iterator[RunRecord]:
        return (r for rs in self.runs.values() for r in rs)


@dataclass
class Results:
    """Everything that a report shows."""

    panels: list[Panel]
    runs: list[RunRecord]
    failed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)

    @property
    def datasets(self) -> list[str]:
        """Data sets in the order in which they appear."""
        return list(dict.fromkeys(p.dataset for p in self.panels))

    def distinct(self, dataset: str) -> list[RunRecord]:
        """Finished runs on a data set, each once, whatever axes it belongs to."""
        return list({r.key: r for p in self.panels if p.dataset == dataset for r in p}.values())


def number(scalars: Mapping[str, Any], path: str) -> float | None:
    """``scalars["a"]["b"]`` for ``"a.b"``; ``None`` where it is absent or no finite number."""
    found: Any = scalars
    if path.startswith("bounds."):  # ids of bounds contain points
        found = scalars.get("bounds", {})
        row, _, last = path.removeprefix("bounds.").rpartition(".")
        found = found.get(row, {}).get(last) if isinstance(found, Mapping) else None
    else:
        for part in path.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        return None
    return float(found) if math.isfinite(found) else None


def load(folders: Sequence[str | Path]) -> Results:
    """Read results; damaged or unfinished runs are left out and named.

    Raises:
        FileFormatError: no folder holds a finished run.
    """
    records: list[RunRecord] = []
    failed: list[str] = []
    missing: list[str] = []
    titles: list[str] = []
    order: dict[str, list[str]] = {}
    for folder in folders:
        store = Store(folder)
        study = store.study()
        found = store.runs()
        titles.append(study.title or study.name)
        done = {(r.axis, label_of(r.value), r.seed) for r in found if r.status == "done"}
        failed += [_failure(r) for r in found if r.status != "done"]
        broken = {(r.axis, label_of(r.value), r.seed) for r in found if r.status != "done"}
        for axis, values in study.axes.items():
            order.setdefault(axis, []).extend(label_of(v) for v in values)
            wanted = [(axis, label_of(v), s) for v in values for s in study.seeds]
            missing += [f"{a}={v}, seed {s} ({study.name})" for a, v, s in wanted if (a, v, s) not in done | broken]
        records += [r for r in found if r.status == "done"]
    records = list({(r.key, r.axis, label_of(r.value)): r for r in records}.values())
    if not records:
        raise FileFormatError(f"{', '.join(map(str, folders))}: no finished run to report on")
    panels = _panels(records, order)
    return Results(panels, list({r.key: r for r in records}.values()), failed, missing, list(dict.fromkeys(titles)))


def _panels(records: list[RunRecord], order: dict[str, list[str]]) -> list[Panel]:
    names = _dataset_names(records)
    groups: dict[tuple[str, str], dict[str, list[RunRecord]]] = {}
    for r in records:
        group = groups.setdefault((r.axis or "none", names[r.key]), {})
        group.setdefault(label_of(r.value), []).append(r)
    panels = []
    for (axis, dataset), runs in groups.items():
        known = list(dict.fromkeys(order.get(axis, [])))
        values = sorted(runs, key=lambda v: (_size(v), known.index(v) if v in known else len(known)))
        panels.append(Panel(axis, dataset, {v: sorted(runs[v], key=lambda r: r.seed) for v in values}))
    rank = {a: i for i, a in enumerate([*AXES, *order])}
    return sorted(panels, key=lambda p: (rank.get(p.axis, len(rank)), p.dataset))


def _dataset_names(records: list[RunRecord]) -> dict[str, str]:
    """Data sets by run; the number of samples is added where a name stands for several sizes."""
    sizes: dict[str, set[float | None]] = {}
    for r in records:
        sizes.setdefault(r.dataset, set()).add(number(r.scalars, "train.samples"))
    return {
        r.key: r.dataset
        if len(sizes[r.dataset]) == 1
        else f"{r.dataset} ({number(r.scalars, 'train.samples') or 0:,.0f} samples)"
        for r in records
    }


def term_points(record: RunRecord) -> Iterator[tuple[int, int, int, float]]:
    """``(i, k, j, R)`` for every entry [i, j] of a run's Taylor terms; nothing where it has none."""
    if "terms_k" in record.arrays:
        for i, k in enumerate(record.arrays["terms_k"].tolist()):
            for j, radius in enumerate(record.arrays["terms_radius"].tolist()):
                yield i, k, j, radius


def plain(value: float, digits: int) -> str:
    """A number to some significant digits, without an exponent where it is between 1e-4 and 1e6: 30, not 3e+01."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:.0f}" if 10 ** (digits - 1) <= abs(rounded) < 1e6 else f"{rounded:.{digits}g}"


def label_of(value: Any) -> str:
    """A value of an axis for people: ``[2]`` is 2."""
    if isinstance(value, (list, tuple)):
        return label_of(value[0]) if len(value) == 1 else ", ".join(label_of(v) for v in value) or "none"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value if isinstance(value, str) else json.dumps(value)


def _size(label: str) -> float:
    try:
        return float(label)
    except ValueError:
        return math.inf


def _failure(record: RunRecord) -> str:
    point = "" if record.axis is None else f"{record.axis}={label_of(record.value)}, "
    return f"{point}seed {record.seed}, {record.dataset}: {record.error or 'unknown error'}"
