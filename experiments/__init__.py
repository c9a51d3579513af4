"""Data sets, and how the mean loss changes as samples are added."""

from ._cifar import load_cifar10
from ._convergence import LossDifferences, loss_differences
from ._datasets import Dataset, MissingPackageError, load_digits, load_idx, load_mnist, load_npz

__all__ = [
    "Dataset",
    "LossDifferences",
    "MissingPackageError",
    "load_cifar10",
    "load_digits",
    "load_idx",
    "load_mnist",
    "load_npz",
    "loss_differences",
]
