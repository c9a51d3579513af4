"""Data sets, and how the mean loss changes as samples are added."""

from ._convergence import LossDifferences, loss_differences
from ._datasets import Dataset, MissingPackageError, load_digits, load_idx, load_mnist, load_npz
from ._measure import Measurement, measure
from ._measure_config import MeasureConfig, Split
from ._report import report

__all__ = [
    "Dataset",
    "LossDifferences",
    "MeasureConfig",
    "Measurement",
    "MissingPackageError",
    "Split",
    "load_digits",
    "load_idx",
    "load_mnist",
    "load_npz",
    "loss_differences",
    "measure",
    "report",
]
