"""Which stored runs a study asks for, told by their settings: the data set need not be there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ._config import DataConfig, NetConfig, StudyConfig, TrainConfig
from ._measure_config import MeasureConfig
from ._points import epochs, pairs
from ._validate import to_plain

Point = tuple[str | None, Any]


def points(study: StudyConfig) -> list[Point]:
    """Every (axis, value) of a study, values as json has them."""
    return [(axis, to_plain(value)) for axis, value in pairs(study)]


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Network, training and measurement of a ``config.json`` by dotted name, as in a study.

    What an earlier version did not have yet has its default; ``train.together`` is left out, as it is no part of keys.
    """
    data = config.get("data", {})
    tables = {
        "base": {**to_plain(NetConfig()), **config.get("net", {})},
        "train": {**to_plain(TrainConfig()), **config.get("train", {})},
        "measure": {**to_plain(MeasureConfig()), **config.get("measure", {})},
    }
    tables["train"].setdefault("epochs", epochs(TrainConfig(), str(data.get("name"))))
    del tables["train"]["together"]
    return {f"{table}.{name}": value for table, values in tables.items() for name, value in values.items()}


class Wanted:
    """The points of a study by the settings that a run must have to stand for them."""

    def __init__(self, study: StudyConfig) -> None:
        self.seeds = frozenset(study.seeds)
        self._found: dict[str, list[tuple[Point, DataConfig]]] = {}
        for axis, value in points(study):
            one = study.at(axis, value)
            train = {**to_plain(one.train), "epochs": epochs(one.train, one.data.name)}
            asked = settings({"net": to_plain(one.base), "train": train, "measure": to_plain(one.measure)})
            self._found.setdefault(_text(asked), []).append(((axis, value), one.data))

    def points_of(self, config: Mapping[str, Any]) -> list[Point]:
        """The points that a run with this ``config.json`` stands for; none where the study does not ask for it."""
        if config.get("seed") not in self.seeds:
            return []
        found = self._found.get(_text(settings(config)), [])
        return [point for point, data in found if _same_data(data, point, config)]


def _same_data(wanted: DataConfig, point: Point, config: Mapping[str, Any]) -> bool:
    held = config.get("data", {})
    if held.get("name") != wanted.dataset:
        return False
    for asked, count in ((wanted.train, held.get("train")), (wanted.test, held.get("test"))):
        if asked is not None and asked != count:
            return False
        if asked is None:  # all samples: how many that is, only the data tell; a limit may have come from an axis
            before = config.get("points", [])
            if list(point) not in before and any(str(axis).startswith("data.") for axis, _ in before):
                return False
    return True


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)
