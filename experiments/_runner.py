"""The sweep itself: what is missing is claimed, done, and stored as it ends."""

from __future__ import annotations

import os
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from ._config import StudyConfig
from ._engines import Engine
from ._forward import missing as without_kernels
from ._layers import arrangement
from ._nets import initialized
from ._points import Run, expand
from ._store import Store
from ._trial import Trial, trial
from ._validate import ConfigError
from ._work import Done, Failed, Message, Step, Trained, Work, source, split_for

_POLL_S = 1.0


class Watcher(Protocol):
    """Sees a sweep go by."""

    def begin(self, total: int, done: int, cost: float) -> None:
        """So many runs in all, so many of them done before; the cost of the others."""

    def step(self, step: Step) -> None:
        """Progress inside a unit of work."""

    def end(self, run: Run, status: str, note: str, wall_s: float) -> None:
        """A run ended; ``note`` is its error, or a line about its result."""

    def say(self, text: str) -> None:
        """Something worth a line."""


@dataclass
class Outcome:
    """How a sweep ended, in runs."""

    done: int = 0
    failed: int = 0
    before: int = 0
    elsewhere: int = 0
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Options:
    """How, not what: nothing here changes a result but by rounding."""

    root: Path | None = None
    device: str = "cpu"
    threads: int | None = None
    shard: tuple[int, int] = (1, 1)


def device_of(name: str) -> str:
    """The device of ``auto``, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: CUDA is asked for and absent.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no CUDA device here")
    return name


def runs_of(study: StudyConfig, options: Options) -> list[Run]:
    """The runs of a study, or of the shard of it that this process is to do."""
    runs = expand(study, lambda config: source(config, options.root))
    i, n = options.shard
    groups = list(dict.fromkeys(run.group for run in runs))
    mine = set(groups[i - 1 :: n])
    return [run for run in runs if run.group in mine]


class Sweep:
    """A study on its way into a store.

    Whole groups of runs that differ in the seed alone are trained together where ``together`` says so; otherwise
    every run is a unit of its own. Every unit is claimed first, so that several sweeps of one folder share the work.
    """

    def __init__(self, study: StudyConfig, store: Store, options: Options, watcher: Watcher) -> None:
        self.study, self.store, self.options, self.watcher = study, store, options, watcher
        self.outcome = Outcome()
        self._claims: dict[str, Any] = {}
        self._queue: deque[tuple[Run, ...]] = deque()
        self._later: list[tuple[Run, ...]] = []
        self._done_before: set[str] = set()
        self._stacked: set[str] = set()

    def run(self, engine: Engine) -> Outcome:
        """Do what is missing.

        Raises:
            StoreError: results cannot be written; what is stored stays, the rest can be resumed.
        """
        runs = runs_of(self.study, self.options)
        done = self.store.finished()
        self._done_before = {run.key for run in runs} & done
        self.outcome.before = len(self._done_before)
        missing = [run for run in runs if run.key not in done]
        self.watcher.begin(len(runs), self.outcome.before, sum(run.cost for run in missing))
        for config in dict.fromkeys(run.source for run in runs):
            note = source(config, self.options.root).note
            if note is not None:
                self.watcher.say(note)
        why = without_kernels()
        if why is not None and any(self._suits_kernels(run) for run in {r.group: r for r in missing}.values()):
            self.watcher.say(f"{why}; convolutions of few channels are several times as fast with it")
        units = list(self._units(missing, runs))
        if engine.several:  # the longest first, so that no process waits long for another's last
            units.sort(key=lambda unit: -sum(run.cost for run in unit))
        self._queue.extend(units)
        try:
            while True:
                for message in engine.run(self._take):
                    self._handle(message)
                if not self._later:
                    return self.outcome
                self._wait()
        finally:
            for claim in self._claims.values():
                claim.release()

    def _units(self, missing: list[Run], runs: list[Run]) -> Iterator[tuple[Run, ...]]:
        groups: defaultdict[str, list[Run]] = defaultdict(list)
        for run in runs:
            groups[run.group].append(run)
        for group in dict.fromkeys(run.group for run in missing):
            asked = [run for run in missing if run.group == group]
            stack = self._untrained(groups[group], asked)
            if self._stacks(stack):
                self._stacked.add(group)
                yield stack
                asked = [run for run in asked if run not in stack]
            yield from ((run,) for run in asked)

    def _untrained(self, group: list[Run], asked: list[Run]) -> tuple[Run, ...]:
        """What could be trained together: the nets asked for that have no weights.

        Where no net of the group has any it is the whole group, so that a run that was lost gets its numbers back.
        """
        if len(group) < 2 or group[0].train.together == "never":
            return ()
        bare = [run for run in group if self.store.weights(run.train_key) is None]
        return tuple(bare if len(bare) == len(group) else [run for run in bare if run in asked])

    def _stacks(self, group: tuple[Run, ...]) -> bool:
        """Whether these runs are trained together; what a trial found is kept with the results."""
        if len(group) < 2:
            return False
        way, first = group[0].train.together, group[0]
        if way != "auto" or not first.train.epochs:
            return way == "always"
        name = f"{first.group} {self.options.device} {len(group)}"
        known = self.store.note("trials").get(name)
        if known is None and without_kernels() is None and self._suits_kernels(first):
            return False  # stacking would give the compiled kernels up
        if known is None:
            found = self._trial(group)
            self.watcher.say(f"{first.label.rpartition(', seed')[0] or first.label}: {found}")
            known = {"together": found.together, "alone_s": found.alone_s, "stacked_s": found.stacked_s}
            self.store.add_note("trials", {name: known})
        return bool(known["together"])

    def _network(self, run: Run, seed: int) -> torch.nn.Module:
        found, dtype = source(run.source, self.options.root), getattr(torch, run.train.dtype)
        return initialized(run.net, found.shape, found.classes, seed, dtype).to(self.options.device)

    def _suits_kernels(self, run: Run) -> bool:
        """Whether compiled kernels would train this network on its own."""
        if self.options.device != "cpu" or run.train.kernels == "torch":
            return False
        x = source(run.source, self.options.root).split.train_x[:1].to(getattr(torch, run.train.dtype))
        return arrangement(self._network(run, run.seed), x) is not None

    def _trial(self, group: tuple[Run, ...]) -> Trial:
        first = group[0]
        found = source(first.source, self.options.root)
        data = split_for(found, first.train.loss, first.train.dtype, self.options.device)
        before = torch.get_num_threads()
        torch.set_num_threads(self.options.threads or before)
        try:
            return trial(partial(self._network, first), [run.seed for run in group], first.train, data)
        finally:
            torch.set_num_threads(before)

    def _take(self) -> Work | None:
        """The next unit that no other process has."""
        while self._queue:
            unit = self._queue.popleft()
            wanted = []
            busy = False
            for run in unit:
                if run.key in self._done_before:
                    continue
                claim = self.store.claim(run.key)
                if claim is None:
                    busy = True
                    continue
                if self.store.is_finished(run.key):
                    claim.release()
                    self._elsewhere(run)
                    continue
                self._claims[run.key] = claim
                wanted.append(run)
            if busy:
                self._later.append(tuple(run for run in unit if run not in wanted))
            if wanted:
                weights = {run.seed: w for run in unit if (w := self.store.weights(run.train_key)) is not None}
                return Work(
                    unit,
                    frozenset(run.key for run in wanted),
                    unit[0].source,
                    self.options.root,
                    self.options.device,
                    self.options.threads,
                    unit[0].group in self._stacked,
                    weights,
                )
        return None

    def _elsewhere(self, run: Run) -> None:
        self._done_before.add(run.key)
        self.outcome.elsewhere += 1
        self.watcher.end(run, "elsewhere", "done by another process", 0.0)

    def _wait(self) -> None:
        """Other processes have the rest: see whether they finish it, or leave it to us."""
        time.sleep(_POLL_S)
        self._queue.extend(self._later)
        self._later = []

    def _handle(self, message: Message) -> None:
        if isinstance(message, Step):
            self.watcher.step(message)
        elif isinstance(message, Trained):
            self._keep(message.run.train_key, message.weights)
        elif isinstance(message, Done):
            self.store.write_done(message.run.config(), message.scalars, message.arrays, message.about)
            self.outcome.done += 1
            self._end(message.run, "done", summary(message.scalars), message.about)
        elif isinstance(message, Failed):
            self.store.write_failed(message.run.config(), message.error, message.about)
            self.outcome.failed += 1
            self._end(message.run, "failed", message.error.strip().splitlines()[-1], message.about)

    def _keep(self, train_key: str, weights: dict[str, Any]) -> None:
        """Store trained weights unless there are such: results may have been measured at those."""
        held = self.store.weights(train_key)
        if held is None or {n: a.shape for n, a in held.items()} != {n: a.shape for n, a in weights.items()}:
            self.store.write_weights(train_key, weights)

    def _end(self, run: Run, status: str, note: str, about: dict[str, Any]) -> None:
        claim = self._claims.pop(run.key, None)
        if claim is not None:
            claim.release()
        self.watcher.end(run, status, note, about.get("wall_s", 0.0))


def summary(scalars: dict[str, Any]) -> str:
    """A few words on a finished run."""
    words = []
    for part in ("train", "test"):
        found = scalars.get(part)
        if isinstance(found, dict) and isinstance(found.get("loss"), float):
            words.append(f"{part} loss {found['loss']:.3g}")
        if part == "test" and isinstance(found, dict) and isinstance(found.get("accuracy"), float):
            words.append(f"accuracy {found['accuracy']:.1%}")
    return ", ".join(words)


def default_workers(device: str) -> int:
    """One process per processor core, or per GPU."""
    if device.startswith("cuda"):
        return max(1, torch.cuda.device_count())
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
