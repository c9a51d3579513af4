"""What is measured at a trained net, and on which data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dagh.errors import ReductionError


class Split(NamedTuple):
    """Training and test data with the samples along axis 0, on the device of the model."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True)
class MeasureConfig:
    """What :func:`measure` measures; every field has a default.

    Attributes:
        shuffles: random orders of the training samples over which |L_{k+1} − L_k| is averaged.
        smooth: coefficient of the exponential smoothing of the mean over k, as in the paper; 0 switches it off.
        at_k: where Taylor terms are compared with the measured difference; values ≥ the samples used are dropped.
        radii: distances ‖θ − θ*‖ = R at which it is compared, in units of the parameters.
        directions: random unit directions of θ − θ*, the same for all k and R.
        term_samples: training samples used for Taylor terms; 0 leaves the terms out.
        hessian: eigenvalues, norms and traces of H, H_O and H_F.
        bounds: the ladder of bounds on them; with ``term_samples``, the paper's corollaries at every k and R.
        kinks: counts of elements on and near kinks.
        hessian_samples: training samples of the Hessian, of its bounds and of the kinks.
        bootstrap: resamplings of the orders for the confidence band of the mean; 0 leaves the band out.
        batch: samples evaluated at once.
    """

    shuffles: int = 100
    smooth: float = 0.995
    at_k: tuple[int, ...] = (8, 32, 128)
    radii: tuple[float, ...] = (0.01, 0.1, 1.0)
    directions: int = 4
    term_samples: int = 256
    hessian: bool = True
    bounds: bool = True
    kinks: bool = True
    hessian_samples: int = 64
    bootstrap: int = 200
    batch: int = 1024

    def __post_init__(self) -> None:
        least = {"shuffles": 1, "directions": 1, "term_samples": 0, "hessian_samples": 1, "bootstrap": 0, "batch": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ReductionError(f"measure.{name}={getattr(self, name)}: expected at least {low}")
        if not 0 <= self.smooth < 1:
            raise ReductionError(f"measure.smooth={self.smooth}: expected a coefficient in [0, 1)")
        if any(k < 1 for k in self.at_k):
            raise ReductionError(f"measure.at_k={self.at_k}: expected numbers of samples, at least 1 each")
        if any(not 0 < r < float("inf") for r in self.radii):
            raise ReductionError(f"measure.radii={self.radii}: expected positive distances")
