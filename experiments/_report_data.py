"""Results of one or several folders as points of their axes, with what is missing and what failed."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dagh.errors import FileFormatError

from ._records import read_json
from ._store import RunRecord, Store
from ._validate import ConfigError
from ._wanted import Wanted, net_of, points, settings

Array = np.ndarray[Any, np.dtype[Any]]
Name = tuple[str | None, str, int, str]
"""Axis, label of the value, seed and data set of a run: what a study asks for."""

#: Names of the axes for people, and the figure of the paper that shows each.
AXES = {
    "L": ("hidden convolutional layers L", "Fig. 1"),
    "k": ("kernel size k", "Fig. 2"),
    "C": ("channels C", "Fig. 3"),
    "pool_at": ("position of pooling l", "Fig. 4"),
}


#: Kinds of runs that a report does without, as said after their number.
LACKING = ("failed", "damaged", "of other data", "missing")


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
    damaged: list[str] = field(default_factory=list)
    outdated: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)

    @property
    def datasets(self) -> list[str]:
        """Data sets in the order in which they appear; an axis over the data is none."""
        return list(dict.fromkeys(p.dataset for p in self._on_one))

    @property
    def lacking(self) -> list[tuple[str, list[str]]]:
        """What the report had to do without, by kind."""
        lists = (self.failed, self.damaged, self.outdated, self.missing)
        return list(zip(LACKING, lists, strict=True))

    def distinct(self, dataset: str) -> list[RunRecord]:
        """Finished runs on a data set, each once, whatever axes it belongs to."""
        return list({r.key: r for p in self._on_one if p.dataset == dataset for r in p}.values())

    @property
    def _on_one(self) -> list[Panel]:
        """Panels whose runs share their training samples."""
        return [p for p in self.panels if p.axis not in ("data.train", "data.name")]


def nets_in(runs: Iterable[RunRecord]) -> list[str]:
    """The network of every run: the same for seeds of one, trained alike on the same samples."""
    return [net_of(run.config) for run in runs]


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
    """Read results; unfinished runs are left out and named, where no other folder has them.

    Raises:
        FileFormatError: no folder holds a finished run.
        ConfigError: two folders hold a point of an axis with different settings.
    """
    stores = [Store(folder) for folder in folders]
    studies = [store.study() for store in stores]
    broken = [store.damaged() for store in stores]
    held = [(r, str(s.path)) for s, bad in zip(stores, broken, strict=True) for r in s.runs(without=bad.keys())]
    done = {(r.key, r.axis, label_of(r.value)): (r, where) for r, where in held if r.status == "done"}
    records = [r for r, _ in done.values()]
    present = {_name(r) for r in records}
    failed = {_name(r): _failure(r) for r, _ in held if r.status != "done" and _name(r) not in present}
    damaged = {n: f"{key}: {bad[key]}" for s, bad in zip(stores, broken, strict=True) for key, n in _named(s, bad)}
    old = {n: text for s, bad in zip(stores, broken, strict=True) for n, text in _outdated(s, bad) if n not in present}
    missing: dict[str, None] = {}
    order: dict[str, list[str]] = {}
    for study in studies:
        for varied, values in study.axes.items():
            order[varied] = merged(order.get(varied, []), [label_of(v) for v in values])
        for axis, value in points(study):
            point = "" if axis is None else f"{axis}={label_of(value)}, "
            dataset = study.at(axis, value).data.dataset
            for seed in study.seeds:
                if (axis, label_of(value), seed, dataset) not in present | failed.keys() | damaged.keys():
                    missing[f"{point}seed {seed} ({study.name})"] = None
    if not records:
        why = f"; {len(old)} of other data ({next(iter(old.values()))}), done anew by dagh sweep resume" if old else ""
        raise FileFormatError(f"{', '.join(map(str, folders))}: no finished run to report on{why}")
    refuse_contradictions(list(done.values()))
    runs = list({r.key: r for r in records}.values())
    unread = list(dict.fromkeys(reason for name, reason in damaged.items() if name not in present))
    titles = list(dict.fromkeys(study.title or study.name for study in studies))
    return Results(
        _panels(records, order), runs, list(failed.values()), unread, list(old.values()), list(missing), titles
    )


def _named(store: Store, keys: Collection[str]) -> Iterator[tuple[str, Name]]:
    """Damaged runs that the study asks for; by the manifest, which knows less, where their settings are lost."""
    wanted = Wanted(store.study())
    for line in store.manifest():
        if line["key"] in keys:
            points = line.get("points") or [[None, None]]
            with contextlib.suppress(FileFormatError):
                config = read_json(store.path / "runs" / line["key"] / "config.json")
                points = wanted.points_of(config) if {"seed", "data"} <= config.keys() else points
            for axis, value in points:
                yield line["key"], (axis, label_of(value), line.get("seed", 0), line.get("dataset", ""))


def _outdated(store: Store, damaged: Collection[str]) -> Iterator[tuple[Name, str]]:
    """Finished runs of samples that the study's file does not hold any more, and what to say of each."""
    study = store.study()
    for r in store.outdated(without=damaged):
        if r.status == "done":
            file = study.at(r.axis, r.value).data.name
            yield _name(r), f"{_place(r)}seed {r.seed} ({study.name}): {file} has other samples now"


def _name(record: RunRecord) -> Name:
    return record.axis, label_of(record.value), record.seed, record.dataset


def _place(record: RunRecord) -> str:
    return "" if record.axis is None else f"{record.axis}={label_of(record.value)}, "


def merged(first: list[str], second: list[str]) -> list[str]:
    """Both orders in one: what only the second has comes after what precedes it there."""
    found, position = list(first), 0
    for label in second:
        if label in found:
            position = max(position, found.index(label) + 1)
        else:
            found.insert(position, label)
            position += 1
    return found


def refuse_contradictions(held: list[tuple[RunRecord, str]]) -> None:
    """Runs of one point and one data set must agree in all settings but the seed.

    Raises:
        ConfigError: naming the first setting that differs, and where.
    """
    first: dict[tuple[Any, ...], tuple[RunRecord, str]] = {}
    seeds: dict[tuple[Any, ...], tuple[RunRecord, str]] = {}
    for r, where in held:
        point: tuple[Any, ...] = (r.axis, label_of(r.value), r.dataset, r.config.get("data", {}).get("train_digest"))
        if r.axis == "data.train":  # the data are the value: others of that size do not belong here
            point = point[:3]
        for table, key, names in ((first, point, _settings), (seeds, (*point, r.seed), _versions)):
            before, there = table.setdefault(key, (r, where))
            old, new = names(before), names(r)
            differs = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            if before.key != r.key and differs:
                name = differs[0]
                at = "the base" if r.axis is None else f"{r.axis}={label_of(r.value)}"
                raise ConfigError(
                    f"{at}, {r.dataset}: {name} is {old.get(name)} in {there} and {new.get(name)} in {where}; "
                    "report on them one by one"
                )


def _settings(record: RunRecord) -> dict[str, Any]:
    data = record.config.get("data", {})
    samples = {f"data.{n}": data[n] for n in ("train", "test", "train_digest", "test_digest") if n in data}
    return {**settings(record.config), **samples}


def _versions(record: RunRecord) -> dict[str, Any]:
    return {f"versions.{name}": value for name, value in record.config.get("versions", {}).items()}


def _panels(records: list[RunRecord], order: dict[str, list[str]]) -> list[Panel]:
    names = _dataset_names(records)
    groups: dict[tuple[str, str], dict[str, list[RunRecord]]] = {}
    for r in records:
        group = groups.setdefault((r.axis or "none", names[_data(r)]), {})
        group.setdefault(label_of(r.value), []).append(r)
    panels = []
    for (axis, dataset), runs in groups.items():
        known = order.get(axis, [])
        numeric = all(math.isfinite(_size(v)) for v in runs)
        values = sorted(runs, key=_size if numeric else lambda v, known=known: known.index(v) if v in known else 0)
        panels.append(Panel(axis, dataset, {v: sorted(runs[v], key=lambda r: r.seed) for v in values}))
    rank = {a: i for i, a in enumerate([*AXES, *order])}
    return sorted(panels, key=lambda p: (rank.get(p.axis, len(rank)), p.dataset))


def _data(record: RunRecord) -> tuple[Any, ...]:
    """The same for runs that belong on one panel; an axis over the data keeps its values together."""
    if record.axis == "data.name":
        return ("all data sets",)
    if record.axis == "data.train":
        return (record.dataset,)
    digest = record.config.get("data", {}).get("train_digest")
    return record.dataset, number(record.scalars, "train.samples"), digest


def _dataset_names(records: list[RunRecord]) -> dict[tuple[Any, ...], str]:
    """Data sets for people: their size is added where a name stands for several, a digest where size does not tell."""
    found = dict.fromkeys(_data(r) for r in records)
    names = {}
    for data in found:
        alike = [other for other in found if len(other) == len(data) > 1 and other[0] == data[0]]
        about = []
        if len({size for _, size, _ in alike}) > 1:
            about.append(f"{data[1] or 0:,.0f} samples")
        if sum(other[1] == data[1] for other in alike) > 1:
            about.append(str(data[2])[:6])
        names[data] = f"{data[0]} ({', '.join(about)})" if about else str(data[0])
    return names


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
    return f"{_place(record)}seed {record.seed}, {record.dataset}: {record.error or 'unknown error'}"
