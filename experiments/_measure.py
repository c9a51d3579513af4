"""Everything that is measured at a trained net."""

from __future__ import annotations

import copy
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

import dagh
from dagh.errors import ShapeError

from ._measure_config import MeasureConfig, Split
from ._measure_corollaries import corollaries
from ._measure_curve import curve
from ._measure_hessian import bound_scalars, hessian_scalars, kink_scalars
from ._measure_losses import gradient_norm, per_sample
from ._measure_terms import terms

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Measurement:
    """Results of :func:`measure`: nested ``scalars``, plain data for JSON, and ``arrays`` by name."""

    scalars: dict[str, Any]
    arrays: dict[str, Array] = field(default_factory=dict)


def measure(
    model: nn.Module, loss: str, data: Split, config: MeasureConfig | None = None, seed: int = 0
) -> Measurement:
    """Measure a trained net: how the mean loss changes as samples are added, and what its Hessian has to do with it.

    The losses are those of the training samples, in eval mode. Hessian, bounds and kinks are taken on the first
    ``hessian_samples`` of a fixed random choice of training samples, Taylor terms on the first ``term_samples`` of the
    same choice. Losses are compared in float64, Hessians are in the dtype of the model. The model is not changed.

    Args:
        model: the net, on the device of the data.
        loss: ``"cross_entropy"``, ``"mse"`` or another loss with a value per sample.
        data: training and test samples.
        config: what to measure; the defaults where ``None``.
        seed: of orders, directions and the choice of samples.

    Returns:
        Scalars ``train``, ``test`` (``loss``, ``accuracy``), ``gradient_norm``, ``slope``, ``level``, ``mad``,
        ``identity_residual``, ``hessian``, ``terms``, ``bounds``, ``kinks``, ``wall_s`` per part, ``peak_bytes``,
        ``environment``; arrays ``k``, ``mean``, ``q05``, ``q50``, ``q95``, ``boot_lo``, ``boot_hi``, ``smooth`` over k,
        and ``terms_*``.

    Raises:
        NonFiniteError: a loss is NaN or Inf.
        LossError: no losses by sample for this name.
        ShapeError: fewer than three training samples, or none to test on.
    """
    config = config or MeasureConfig()
    if len(data.train_x) < 3 or not len(data.test_x):
        raise ShapeError(
            f"{len(data.train_x)} training and {len(data.test_x)} test samples: at least three and one are needed"
        )
    watch = _Watch(data.train_x.device)
    scalars: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    with watch("losses"):
        losses, accuracy = per_sample(model, loss, data.train_x, data.train_y, config.batch)
        scalars["train"] = {"loss": float(losses.mean()), "accuracy": accuracy, "samples": len(losses)}
        tested, accuracy = per_sample(model, loss, data.test_x, data.test_y, config.batch)
        scalars["test"] = {"loss": float(tested.mean()), "accuracy": accuracy, "samples": len(tested)}
    with watch("gradient"):
        scalars["gradient_norm"] = gradient_norm(model, loss, data.train_x, data.train_y, config.batch)
    with watch("curve"):
        found = curve(losses, config.shuffles, config.smooth, config.bootstrap, seed)
    scalars |= found.scalars
    arrays = dict(found.arrays)
    if config.hessian or config.bounds or config.kinks or config.term_samples:
        _second_order(model, loss, data, config, seed, scalars, arrays, watch)
    scalars["wall_s"] = watch.seconds
    scalars["peak_bytes"] = watch.peak()
    scalars["environment"] = environment(data.train_x.device)
    return Measurement(scalars, arrays)


def _second_order(
    model: nn.Module,
    loss: str,
    data: Split,
    config: MeasureConfig,
    seed: int,
    scalars: dict[str, Any],
    arrays: dict[str, Array],
    watch: _Watch,
) -> None:
    """Everything that needs the graph."""
    chosen = np.random.default_rng([seed, 2]).permutation(len(data.train_x))
    some = chosen[: max(config.term_samples, config.hessian_samples)]
    rows = torch.from_numpy(some).to(data.train_x.device)
    x, y = data.train_x[rows], data.train_y[rows]
    with watch("trace"):
        graph = dagh.trace(copy.deepcopy(model).eval(), x[:4])
    few = slice(0, config.hessian_samples)
    if config.hessian:
        with watch("hessian"):
            scalars["hessian"] = hessian_scalars(graph, loss, x[few], y[few], seed)
    if config.kinks:
        with watch("kinks"):
            scalars["kinks"] = kink_scalars(graph, loss, x[few], y[few])
    if config.bounds:
        with watch("bounds"):
            scalars["bounds"] = bound_scalars(graph, loss, x[few], y[few])
    more = slice(0, config.term_samples)
    if config.term_samples:
        with watch("terms"):
            found, scalars["terms"] = terms(graph, loss, x[more], y[more], config, seed)
            arrays |= found
    if config.bounds and arrays.keys() >= {"terms_k"}:
        with watch("corollaries"):
            found, absent = corollaries(graph, loss, x[more], y[more], arrays)
            arrays |= found
            scalars["terms"]["corollaries_absent"] = absent


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, threads and the device that produced a result."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "dagh": dagh.__version__, "torch": torch.__version__, "numpy": np.__version__,
        "python": platform.python_version(), "system": platform.system(), "device": device.type, "device_name": name,
        "threads": torch.get_num_threads(),
    }  # fmt: skip


class _Watch:
    """Wall time per part, and the peak memory over all of them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[part] = time.perf_counter() - start

    def peak(self) -> int:
        """Bytes: of the device's allocator on a GPU, of the whole process since it began elsewhere."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
