"""Whether seeds are trained faster together: a short trial of both ways."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from dagh.errors import DaghError

from ._config import TrainConfig
from ._measure_config import Split
from ._train import train, train_together

_STEPS = 3
_REPEATS = 2
_GAIN = 1.3
"""Together only where it is faster by this factor: a tie is decided for the simpler way."""


@dataclass(frozen=True)
class Trial:
    """Seconds per optimizer step of one network: alone, and as a share of the stacked step of ``count``."""

    count: int
    alone_s: float
    stacked_s: float

    @property
    def together(self) -> bool:
        """Whether stacking wins."""
        return self.alone_s > _GAIN * self.stacked_s

    def __str__(self) -> str:
        if self.stacked_s == float("inf"):
            return "cannot be stacked"
        return f"{1e3 * self.alone_s:.1f} ms a step alone, {1e3 * self.stacked_s:.1f} ms of {self.count} stacked"


def trial(make: Callable[[int], nn.Module], seeds: Sequence[int], config: TrainConfig, data: Split) -> Trial:
    """Time a few steps of both ways on the real data, networks and device; the best of two, after warming up.

    A network that cannot be stacked (an operation without a batching rule) is trained alone.
    """
    few = data.train_x.shape[0] and min(len(data.train_x), _STEPS * config.batch)
    part = Split(data.train_x[:few], data.train_y[:few], data.test_x[:1], data.test_y[:1])
    once = replace(config, epochs=1)
    batches = max(1, -(-few // config.batch))
    models = [make(seed) for seed in seeds]
    alone = _best(lambda: train(models[0], once, part, seeds[0]), data)
    try:
        stacked = _best(lambda: train_together(models, once, part, seeds), data)
    except (RuntimeError, DaghError):
        stacked = float("inf")
    return Trial(len(seeds), alone / batches, stacked / batches / len(seeds))


def _best(call: Callable[[], object], data: Split) -> float:
    times = []
    for _ in range(1 + _REPEATS):
        start = time.perf_counter()
        call()
        if data.train_x.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])
