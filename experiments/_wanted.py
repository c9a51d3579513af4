"""Which stored runs a study asks for, told by their settings; by their samples, too, where its files are there."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ._config import NOT_IN_KEYS, DataConfig, NetConfig, StudyConfig, TrainConfig
from ._measure_config import MeasureConfig
from ._points import epochs, pairs
from ._sources import digests_now
from ._validate import to_plain

Point = tuple[str | None, Any]


def points(study: StudyConfig) -> list[Point]:
    """Every (axis, value) of a study, values as json has them."""
    return [(axis, to_plain(value)) for axis, value in pairs(study)]


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Network, training and measurement of a ``config.json`` by dotted name, as in a study.

    What an earlier version did not have yet has its default; what is no part of keys is left out.
    """
    data = config.get("data", {})
    tables = {
        "base": {**to_plain(NetConfig()), **config.get("net", {})},
        "train": {**to_plain(TrainConfig()), **config.get("train", {})},
        "measure": {**to_plain(MeasureConfig()), **config.get("measure", {})},
    }
    tables["train"].setdefault("epochs", epochs(TrainConfig(), str(data.get("name"))))
    found = {f"{table}.{name}": value for table, values in tables.items() for name, value in values.items()}
    return {name: value for name, value in found.items() if name not in NOT_IN_KEYS}


def net_of(config: Mapping[str, Any]) -> str:
    """The same for seeds of one network, trained alike on the same samples: what keys are made of, seed apart."""
    data = config.get("data", {})
    samples = data.get("train_digest", [data.get("name"), data.get("train")])
    known = {name: value for name, value in settings(config).items() if not name.startswith("measure.")}
    return _text({**known, "data": samples})


@dataclass(frozen=True)
class _Asked:
    """A point of a study and its data: their digests where they are known now, and whether several have this name."""

    point: Point
    data: DataConfig
    digests: tuple[str, str] | None
    shared: bool


class Wanted:
    """The points of a study by the settings, and the samples, that a run must have to stand for them."""

    def __init__(self, study: StudyConfig) -> None:
        self.seeds = frozenset(study.seeds)
        self._found: dict[str, list[_Asked]] = {}
        files = {study.at(axis, value).data.name: study.at(axis, value).data for axis, value in points(study)}
        names = Counter(data.dataset for data in files.values())
        for axis, value in points(study):
            one = study.at(axis, value)
            train = {**to_plain(one.train), "epochs": epochs(one.train, one.data.name)}
            asked = settings({"net": to_plain(one.base), "train": train, "measure": to_plain(one.measure)})
            point = _Asked((axis, value), one.data, digests_now(one.data), names[one.data.dataset] > 1)
            self._found.setdefault(_text(asked), []).append(point)

    def points_of(self, config: Mapping[str, Any]) -> list[Point]:
        """The points that a run with this ``config.json`` stands for; none where the study does not ask for it."""
        return [asked.point for asked in self._alike(config) if _is_current(asked, config)]

    def outdated_points(self, config: Mapping[str, Any]) -> list[Point]:
        """The points that it would stand for if the file of their data still held the samples of the run."""
        found = self._alike(config)
        if any(_is_current(asked, config) for asked in found):
            return []
        return [asked.point for asked in found if not asked.shared or _was_at(asked.point, config)]

    def _alike(self, config: Mapping[str, Any]) -> list[_Asked]:
        if config.get("seed") not in self.seeds:
            return []
        found = self._found.get(_text(settings(config)), [])
        return [asked for asked in found if _same_data(asked.data, asked.point, config)]


def _is_current(asked: _Asked, config: Mapping[str, Any]) -> bool:
    """Whether the run is of these samples; where that cannot be told, a name that stands for one data set is enough."""
    held = config.get("data", {})
    if asked.digests is not None and {"train_digest", "test_digest"} <= held.keys():
        return asked.digests == (held["train_digest"], held["test_digest"])
    return not asked.shared or _was_at(asked.point, config)


def _was_at(point: Point, config: Mapping[str, Any]) -> bool:
    """Whether the run was done for this point, whatever it stands for since."""
    return list(point) in config.get("points", [])


def _same_data(wanted: DataConfig, point: Point, config: Mapping[str, Any]) -> bool:
    held = config.get("data", {})
    if held.get("name") != wanted.dataset:
        return False
    for asked, count in ((wanted.train, held.get("train")), (wanted.test, held.get("test"))):
        if asked is not None and asked != count:
            return False
        if asked is None:  # all samples: how many that is, only the data tell; a limit may have come from an axis
            before = config.get("points", [])
            if not _was_at(point, config) and any(str(axis).startswith("data.") for axis, _ in before):
                return False
    return True


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)
