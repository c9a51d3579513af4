"""From a study to its runs, each with the key that its results are stored under."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import dagh
from dagh.errors import first_line

from ._config import NOT_IN_KEYS, DataConfig, NetConfig, StudyConfig, TrainConfig
from ._measure_config import MeasureConfig
from ._nets import build, flops
from ._sources import Source
from ._validate import ConfigError, to_plain

TRAIN_VERSION = 1
"""Raised when training gives other numbers for the same configuration."""
MEASURE_VERSION = 5
"""Raised when measuring gives other numbers for the same weights."""
#: In flops as processors do them in training: a step of the optimizer, and the measuring of any network.
_STEP, _RUN = 3e7, 3e10


@dataclass(frozen=True)
class Run:
    """One trained and measured network.

    ``points`` are the (axis, value) pairs of the study that it stands for: a value may be that of ``base``. ``key``
    identifies configuration, data and code; ``train_key`` the part of them that the trained weights depend on. ``cost``
    tells long runs from short ones: the flops of training and of the losses after it, and what takes time whatever the
    network.
    """

    net: NetConfig
    train: TrainConfig
    measure: MeasureConfig
    source: DataConfig
    data: dict[str, Any] = field(compare=False)
    seed: int
    key: str
    train_key: str
    points: tuple[tuple[str | None, Any], ...] = field(compare=False, default=())
    cost: float = field(compare=False, default=1.0)

    @property
    def group(self) -> str:
        """The same for runs that differ in the seed alone."""
        train = {name: value for name, value in to_plain(self.train).items() if name != "kernels"}
        return _hash({"net": to_plain(self.net), "train": train, "data": self.data})

    @property
    def label(self) -> str:
        """For people: ``C=6 seed 1``."""
        points = ", ".join(f"{axis}={value}" for axis, value in self.points if axis is not None)
        return f"{points + ', ' if points else ''}seed {self.seed}"

    def config(self) -> dict[str, Any]:
        """Everything that ``config.json`` holds."""
        axis, value = self.points[0] if self.points else (None, None)
        return {
            "key": self.key,
            "train_key": self.train_key,
            "axis": axis,
            "value": value,
            "points": [list(p) for p in self.points],
            "seed": self.seed,
            "net": to_plain(self.net),
            "train": to_plain(self.train),
            "measure": to_plain(self.measure),
            "data": self.data,
            "versions": _versions(),
        }


def pairs(study: StudyConfig) -> list[tuple[str | None, Any]]:
    """Every (axis, value) of a study; (None, None) for one without axes."""
    return [(axis, value) for axis, values in study.axes.items() for value in values] or [(None, None)]


def expand(study: StudyConfig, sources: Callable[[DataConfig], Source]) -> list[Run]:
    """All runs of a study, in the order of its axes, values and seeds, without repeats.

    Raises:
        DaghError: a data set cannot be loaded, or a network does not fit it.
    """
    found: dict[str, Run] = {}
    for axis, value in pairs(study):
        point = study.at(axis, value)
        source = sources(point.data)
        net = _check(point.base, source)
        for run in _runs(point, source, flops(net)):
            before = found.get(run.key)
            points = (*(before.points if before else ()), (axis, value))
            found[run.key] = Run(**{**_fields(run), "points": points})
    return list(found.values())


def _check(net: NetConfig, source: Source) -> nn.Module:
    """Build the network without memory for its weights, to refuse a study before it is begun."""
    try:
        with torch.device("meta"):
            return build(net, source.shape, source.classes)
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes that no tensor has
        raise ConfigError(
            f"a network with L={net.L}, C={net.C}, k={net.k} cannot be built: {first_line(error)}"
        ) from error


def epochs(train: TrainConfig, data: str) -> int:
    """Epochs of training: those asked for, else the paper's."""
    if train.epochs is not None:
        return train.epochs
    return 15 if data == "cifar10" else 10


def _runs(point: StudyConfig, source: Source, forward: int) -> Iterable[Run]:
    samples = {"train": len(source.split.train_x), "test": len(source.split.test_x)}
    data = {
        "name": point.data.dataset,
        **samples,
        "train_digest": source.train_digest,
        "test_digest": source.test_digest,
    }
    train = TrainConfig(**{**_fields(point.train), "epochs": epochs(point.train, point.data.name)})
    settings = {k: v for k, v in to_plain(train).items() if f"train.{k}" not in NOT_IN_KEYS}
    batches = (train.epochs or 0) * -(-samples["train"] // train.batch)
    passes = 3 * samples["train"] * (1 + (train.epochs or 0)) + samples["test"]
    cost = float(forward * passes + _STEP * batches + _RUN)
    for seed in point.seeds:
        weights = {
            "net": to_plain(point.base),
            "train": settings,
            "data": source.train_digest,
            "classes": source.classes,
            "seed": seed,
            "version": TRAIN_VERSION,
        }
        whole = {**weights, "measure": to_plain(point.measure), "test": source.test_digest, "versions": _versions()}
        keys = _hash(whole), _hash(weights)
        yield Run(point.base, train, point.measure, point.data, data, seed, *keys, cost=cost)


def _versions() -> dict[str, Any]:
    return {"dagh": dagh.__version__, "train": TRAIN_VERSION, "measure": MEASURE_VERSION}


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}
