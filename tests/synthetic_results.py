"""Folders of results with known dependences, written the way a sweep writes them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dagh.experiments._config import StudyConfig
from dagh.experiments._measure_curve import curve
from dagh.experiments._store import Store

LADDER = {"P0": 40.0, "P1": 30.0, "a3": 9.0, "b0": 6.0, "b2": 2.0, "b3": 0.2}


def write_results(
    folder: Path,
    axis: str = "C",
    values: tuple[Any, ...] = (2, 4, 6, 8),
    seeds: tuple[int, ...] = (0, 1, 2),
    level: Callable[[float], float] = lambda v: 1 / v,
    *,
    dataset: str = "mnist",
    samples: int = 400,
    failed: frozenset[tuple[Any, int]] = frozenset(),
    missing: frozenset[tuple[Any, int]] = frozenset(),
    noise: float = 0.02,
    bare: bool = False,
    corollaries: bool = True,
) -> Store:
    """A study whose loss differences have the level ``level(position)``, and ‖H_O‖ the square of its inverse.

    ``failed`` and ``missing`` name runs by value and seed; ``bare`` leaves out everything but the curve,
    ``corollaries=False`` what results of earlier versions lack.
    """
    study = StudyConfig(name=f"{axis}-study", title=f"A synthetic study of {axis}", axes={axis: values}, seeds=seeds)
    store = Store.create(folder, study)
    for position, value in enumerate(values, 1):
        for seed in seeds:
            if (value, seed) in missing:
                continue
            config = {
                "key": hashlib.sha256(f"{dataset} {samples} {axis} {value} {seed}".encode()).hexdigest()[:16],
                "points": [[axis, value]], "seed": seed, "net": {axis: value}, "data": {"name": dataset},
            }  # fmt: skip
            if (value, seed) in failed:
                store.write_failed(config, "Traceback\nNonFiniteError: the loss of sample 0 is NaN", {"wall_s": 1.0})
                continue
            scalars, arrays = _result(level(position), samples, seed + 100 * position, noise, bare)
            if not corollaries:
                arrays = {n: v for n, v in arrays.items() if n != "terms_measured_max" and "_log_" not in n}
            store.write_done(config, scalars, arrays, {"wall_s": 1.0})
    return store


def _result(level: float, samples: int, seed: int, noise: float, bare: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    rng = np.random.default_rng(seed)
    level *= float(np.exp(noise * rng.standard_normal()))
    found = curve(torch.from_numpy(rng.exponential(level, samples)), 20, 0.995, 50, seed)
    norm = level**-2
    scalars: dict[str, Any] = {
        **found.scalars, "level": level, "train": {"loss": level, "accuracy": 0.9, "samples": samples},
        "test": {"loss": 1.2 * level, "accuracy": 0.88, "samples": 100},
    }  # fmt: skip
    if bare:
        return scalars, found.arrays
    scalars |= {
        "gradient_norm": 0.1,
        "hessian": {"outer_max": norm, "max": norm, "min": -0.1 * norm, "norm": norm, "functional_norm": 0.3 * norm},
        "bounds": {row: {"log": float(np.log(norm)) + excess} for row, excess in LADDER.items()},
        "wall_s": {"losses": 1.0, "hessian": 2.0},
        "environment": {"dagh": "0", "torch": "2", "device_name": "a machine"},
    }
    scalars["bounds"]["b1"] = {"reason": "not for this net"}
    k, radii = np.array([8, 32]), np.array([0.1, 10.0])
    zeroth = level / (k[:, None] + 1) * np.ones(2)
    first, second = 0.02 * zeroth * radii, 0.1 * zeroth * radii**2
    pairs = rng.standard_normal((2, 2, 16)) * zeroth[..., None]
    terms = {
        "k": k, "radius": radii, "zeroth": zeroth, "first": first, "second": second, "second_outer": second,
        "measured": zeroth + first + second, "predicted": zeroth + first + second, "remainder": 0.01 * second,
        "predicted_outer": zeroth, "remainder_outer": second, "level": 3 * zeroth, "pairs_measured": pairs,
        "pairs_predicted": 1.01 * pairs, "changed_samples": np.array([0.2, 1.0]), "changed_units": np.array([0.0, 0.1]),
        "measured_max": 2 * (zeroth + first + second), "log_printed": np.log(zeroth + first + second) + 20,
        "log_corrected": np.log(zeroth + first + second) + 0.5,  # between the mean and the largest
    }  # fmt: skip
    return scalars, {**found.arrays, **{f"terms_{n}": v for n, v in terms.items()}}
