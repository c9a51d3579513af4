"""Data sets, how the mean loss changes as samples are added, and studies of it over many trained networks."""

from ._cifar import load_cifar10
from ._config import StudyConfig
from ._convergence import LossDifferences, loss_differences
from ._datasets import Dataset, MissingPackageError, load_digits, load_idx, load_mnist, load_npz
from ._measure import Measurement, measure
from ._measure_config import MeasureConfig, Split
from ._records import RunRecord
from ._report import report
from ._store import Store, StoreError
from ._studies import load_study
from ._validate import ConfigError

__all__ = [
    "ConfigError",
    "Dataset",
    "LossDifferences",
    "MeasureConfig",
    "Measurement",
    "MissingPackageError",
    "RunRecord",
    "Split",
    "Store",
    "StoreError",
    "StudyConfig",
    "load_cifar10",
    "load_digits",
    "load_idx",
    "load_mnist",
    "load_npz",
    "load_study",
    "loss_differences",
    "measure",
    "report",
]
