"""One unit of work: networks of equal shape, trained and measured, in whatever process."""

from __future__ import annotations

import platform
import resource
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dagh import __version__

from ._config import DataConfig
from ._measure import measure
from ._measure_config import Split
from ._nets import initialized
from ._points import Run
from ._sources import Source, load
from ._train import check_finite, train, train_together

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Work:
    """Runs that differ in the seed alone.

    ``wanted`` are the keys to measure and report. ``weights`` holds trained weights by seed where there are some; these
    nets are not trained again. Where there are none and the runs are trained ``together``, all of them are, so that
    the numbers do not depend on what is missing.
    """

    runs: tuple[Run, ...]
    wanted: frozenset[str]
    data: DataConfig
    root: Path | None
    device: str
    threads: int | None
    together: bool
    weights: Mapping[int, Mapping[str, Array]]

    @property
    def label(self) -> str:
        """For people."""
        return self.runs[0].label if len(self.runs) == 1 else f"{self.runs[0].label} … {self.runs[-1].seed}"


@dataclass(frozen=True)
class Step:
    """Progress of a unit of work: what is being done, and how far."""

    label: str
    phase: str
    done: int
    total: int


@dataclass(frozen=True)
class Trained:
    """Trained weights of a run, sent before they are measured."""

    run: Run
    weights: dict[str, Array]


@dataclass(frozen=True)
class Done:
    """A measured run."""

    run: Run
    scalars: dict[str, Any]
    arrays: dict[str, Array]
    about: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """A run that raised, or whose process died."""

    run: Run
    error: str
    about: dict[str, Any]


Message = Step | Trained | Done | Failed

_EVERY_S = 0.25
_sources: dict[tuple[DataConfig, Path | None], Source] = {}
_splits: dict[tuple[str, str, str, str, str], Split] = {}


def source(config: DataConfig, root: Path | None) -> Source:
    """The data set, loaded once per process."""
    if (config, root) not in _sources:
        _sources[config, root] = load(config, root)
    return _sources[config, root]


def keep_source(config: DataConfig, root: Path | None, found: Source) -> None:
    """Have :func:`source` give what another process has loaded."""
    _sources[config, root] = found


def split_for(found: Source, loss: str, dtype: str, device: str) -> Split:
    """The samples in the type and on the device of the training, targets as its loss takes them."""
    where = (found.train_digest, found.test_digest, loss, dtype, device)
    if where not in _splits:
        x, y, x_test, y_test = found.split
        targets = [_targets(t, found.classes, loss, getattr(torch, dtype)) for t in (y, y_test)]
        inputs = [t.to(getattr(torch, dtype)) for t in (x, x_test)]
        _splits.clear()
        _splits[where] = Split(inputs[0].to(device), targets[0].to(device), inputs[1].to(device), targets[1].to(device))
    return _splits[where]


def _targets(y: Tensor, classes: int, loss: str, dtype: torch.dtype) -> Tensor:
    return nn.functional.one_hot(y, classes).to(dtype) if loss == "mse" else y


def execute(work: Work, send: Callable[[Message], None]) -> None:
    """Train and measure; every run ends in one ``Done`` or ``Failed`` message."""
    begun, started = time.perf_counter(), datetime.now(UTC)
    open_runs = [run for run in work.runs if run.key in work.wanted]
    try:
        if work.threads is not None:
            torch.set_num_threads(work.threads)
        found = source(work.data, work.root)
        begun = time.perf_counter()
        first = work.runs[0]
        split = split_for(found, first.train.loss, first.train.dtype, work.device)
        for run, model, how in _trained(work, found, split, send):
            trained = time.perf_counter()
            try:
                check_finite(model)
                send(Step(work.label, "measuring", 0, 1))
                result = measure(model, run.train.loss, split, run.measure, run.seed)
                done = time.perf_counter()
                wall = {"train_s": trained - begun, "measure_s": done - trained}
                about = _about(work, started, done - begun, wall, how)
                send(Done(run, result.scalars, dict(result.arrays), about))
            except Exception:
                about = _about(work, started, time.perf_counter() - begun, {}, how)
                send(Failed(run, traceback.format_exc(), about))
            open_runs.remove(run)
            begun, started = time.perf_counter(), datetime.now(UTC)
    except Exception:
        about = _about(work, started, time.perf_counter() - begun, {})
        for run in open_runs:
            send(Failed(run, traceback.format_exc(), about))


def _trained(work: Work, found: Source, split: Split, send: Callable[[Message], None]) -> Any:
    """Every run, its trained model, how many were trained as one with it, and whether by compiled kernels."""
    models = {}
    for run in work.runs:
        dtype = getattr(torch, run.train.dtype)
        models[run] = initialized(run.net, found.shape, found.classes, run.seed, dtype).to(work.device)
    todo = [run for run in work.runs if not _restore(models[run], work.weights.get(run.seed))]
    if len(todo) < len(work.runs):  # the numbers of a whole group are out of reach: what is not asked for can stay away
        todo = [run for run in todo if run.key in work.wanted]
    together = todo if work.together and len(todo) > 1 else []
    if together:
        tick = _throttled(work.label, send)
        train_together([models[r] for r in together], together[0].train, split, [r.seed for r in together], tick)
        for run in together:
            send(Trained(run, _weights(models[run])))
    for run in work.runs:
        if run.key not in work.wanted:
            continue
        how: dict[str, Any] = {"together": len(together) if run in together else 1}
        if run in todo and run not in together:
            how["compiled"] = train(models[run], run.train, split, run.seed, _throttled(run.label, send))
            send(Trained(run, _weights(models[run])))
        models[run].eval()
        yield run, models[run], how


def _restore(model: nn.Module, weights: Mapping[str, Array] | None) -> bool:
    """Put stored weights into ``model``; False where there are none that fit."""
    if weights is None:
        return False
    try:
        model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    except (RuntimeError, TypeError):
        return False
    return True


def _weights(model: nn.Module) -> dict[str, Array]:
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in model.state_dict().items()}


def _throttled(label: str, send: Callable[[Message], None]) -> Callable[[int, int], None]:
    last = 0.0

    def tick(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _EVERY_S or done == total:
            last = now
            send(Step(label, "training", done, total))

    return tick


def _about(
    work: Work, started: datetime, wall_s: float, parts: dict[str, float], how: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What is not a result: when, where, how long, with what."""
    about: dict[str, Any] = {
        "started": started.isoformat(timespec="seconds"),
        "wall_s": round(wall_s, 3),
        **{name: round(value, 3) for name, value in parts.items()},
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name() if work.device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        **(how or {"together": 1}),
        "peak_rss_MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "versions": {"dagh": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    if work.device.startswith("cuda"):
        about["peak_device_MiB"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return about
