"""What is measured at a trained net."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ._convergence import loss_differences
from ._measure_config import MeasureConfig, Split


class Measurement(NamedTuple):
    """Nested scalars, and arrays by name."""

    scalars: dict[str, Any]
    arrays: dict[str, np.ndarray[Any, np.dtype[Any]]]


def measure(model: nn.Module, loss: str, data: Split, config: MeasureConfig, seed: int) -> Measurement:
    """Losses and accuracies, and the differences of the mean loss as samples are added."""
    start = time.perf_counter()
    train = _losses(model, loss, data.train_x, data.train_y)
    test = _losses(model, loss, data.test_x, data.test_y)
    found = loss_differences(train[0], config.shuffles, seed)
    arrays = {"k": found.k, "mean": found.mean}
    arrays |= {f"q{round(100 * q):02d}": v for q, v in found.quantiles.items()}
    scalars = {n: {"loss": float(np.mean(x)), "accuracy": a} for n, (x, a) in {"train": train, "test": test}.items()}
    return Measurement({**scalars, "wall_s": {"measure": time.perf_counter() - start}}, arrays)


@torch.no_grad()
def _losses(model: nn.Module, loss: str, x: Tensor, y: Tensor) -> tuple[np.ndarray[Any, Any], float]:
    found, right = [], 0
    for i in range(0, len(x), 256):
        z, t = model(x[i : i + 256]), y[i : i + 256]
        if loss == "mse":
            found.append(nn.functional.mse_loss(z, t, reduction="none").flatten(1).mean(1))
            right += int((z.argmax(1) == t.argmax(1)).sum())
        else:
            found.append(nn.functional.cross_entropy(z, t, reduction="none"))
            right += int((z.argmax(1) == t).sum())
    return torch.cat(found).double().cpu().numpy(), right / len(x)
