"""Data sets by name: found, loaded, split, limited and identified by a digest."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dagh.errors import DaghError, FileFormatError, ShapeError

from ._cifar import is_cifar10, load_cifar10
from ._config import DataConfig
from ._datasets import Array, Dataset, dataset_of, load_digits, load_mnist, read_npz
from ._measure_config import Split
from ._validate import ConfigError, nearest

DATA_ROOT = "DAGH_DATA"
"""Environment variable with the folder of the data sets."""

_TEST_SHARE = 0.2
_FEWEST = 3
"""Training samples: a curve over k has two points then, and a slope."""


@dataclass(frozen=True)
class Source:
    """A data set ready for training.

    ``train_digest`` and ``test_digest`` identify the samples: shapes, types and values.
    """

    name: str
    split: Split
    classes: int
    train_digest: str
    test_digest: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input."""
        return tuple(self.split.train_x.shape[1:])

    @property
    def note(self) -> str | None:
        """What is odd about the samples, and yet can be trained on."""
        least = int(self.split.train_y.min())
        if not least:
            return None
        return (
            f"{self.name}: the smallest class of the training samples is {least}, not 0; "
            f"the nets tell {self.classes} classes apart, some of which have no samples"
        )


def load(config: DataConfig, root: Path | None = None) -> Source:
    """The data set that ``config`` names.

    Args:
        config: the name, or the path of an ``.npz`` file with x, y and optionally x_test, y_test.
        root: the folder of the data sets; the environment variable ``DAGH_DATA``, or ``data``, when absent.

    Raises:
        ConfigError: no such data set, or more samples asked for than there are.
        FileFormatError: a file is missing or malformed; the message says where it was looked for.
    """
    train, test = _load(config.name, root)
    parts = [
        _limited(p, n, f"data.{which}") for p, n, which in ((train, config.train, "train"), (test, config.test, "test"))
    ]
    digests = [digest(p) for p in parts]
    (x, y), (x_test, y_test) = parts
    if len(x) < _FEWEST or not len(x_test):
        raise ShapeError(
            f"{config.name}: {len(x)} training and {len(x_test)} test samples; at least {_FEWEST} and 1 are needed"
        )
    if x.shape[1:] != x_test.shape[1:]:
        raise ShapeError(f"{config.name}: training inputs {list(x.shape[1:])}, test inputs {list(x_test.shape[1:])}")
    return Source(config.name, Split(x, y, x_test, y_test), _classes(config.name, train, test), *digests)


def digests_now(config: DataConfig) -> tuple[str, str] | None:
    """Digests of the training and test samples that an ``.npz`` file has now; None where that cannot be told.

    Data sets with a name have published contents, and are not read for this.
    """
    if not config.name.endswith(".npz"):
        return None
    try:
        state = Path(config.name).stat()
        return _digests(config, state.st_size, state.st_mtime_ns)
    except (OSError, FileFormatError):
        return None
    except DaghError:  # it is there, and no run can have come from it
        return "", ""


@functools.lru_cache(maxsize=64)
def _digests(config: DataConfig, size: int, changed: int) -> tuple[str, str]:
    found = load(config)
    return found.train_digest, found.test_digest


def _load(name: str, root: Path | None) -> tuple[Dataset, Dataset]:
    if name in NAMED:
        return NAMED[name](root)
    path = Path(name)
    if path.suffix == ".npz":
        return _npz(path)
    hint = nearest(name, list(NAMED))
    raise ConfigError(f"no data set {name!r}, and it is not the path of an .npz file; {hint}")


def _digits(root: Path | None) -> tuple[Dataset, Dataset]:
    return _divided(load_digits())


def _npz(path: Path) -> tuple[Dataset, Dataset]:
    arrays = read_npz(path)
    held = arrays.keys() & {"x_test", "y_test"}
    if len(held) == 1:
        absent = ({"x_test", "y_test"} - held).pop()
        raise FileFormatError(f"{path} has {held.pop()!r} and no {absent!r}; give both, or none")
    if not held:
        return _divided(_images(path, arrays, ("x", "y")))
    return _images(path, arrays, ("x", "y")), _images(path, arrays, ("x_test", "y_test"))


def _images(path: Path, arrays: dict[str, Array], names: tuple[str, str]) -> Dataset:
    """Two arrays, bytes scaled to [0, 1] as in the named data sets, and what cannot be trained on refused."""
    x, y = dataset_of(path, arrays, names)
    if arrays[names[0]].dtype == "u1":
        x = x.to(torch.float32).div(255)
    if not x.is_floating_point():
        raise ShapeError(f"{path}: {names[0]} has integer type; expected floating-point numbers, or bytes (0 to 255)")
    if not bool(torch.isfinite(x).all()):
        raise ShapeError(f"{path}: {names[0]} holds NaN or infinity")
    if y.dtype != torch.long or y.dim() != 1:
        what = f"{'numbers of floating-point type' if y.is_floating_point() else 'integers'} of shape {list(y.shape)}"
        raise ShapeError(f"{path}: {names[1]} holds {what}; expected one integer class per sample, shape [{len(x)}]")
    return Dataset(x, y)


def _idx(name: str) -> Callable[[Path | None], tuple[Dataset, Dataset]]:
    def read(root: Path | None) -> tuple[Dataset, Dataset]:
        folder = find(name, root)
        return load_mnist(folder), load_mnist(folder, "test")

    return read


def _cifar10(root: Path | None) -> tuple[Dataset, Dataset]:
    base = root_folder(root)
    folder = base if not (base / "cifar10").is_dir() and is_cifar10(base) else find("cifar10", root)
    return load_cifar10(folder), load_cifar10(folder, "test")


NAMED: dict[str, Callable[[Path | None], tuple[Dataset, Dataset]]] = {
    "digits": _digits,
    "mnist": _idx("mnist"),
    "fashion-mnist": _idx("fashion-mnist"),
    "cifar10": _cifar10,
}


def root_folder(root: Path | None) -> Path:
    """The folder of the data sets."""
    return root if root is not None else Path(os.environ.get(DATA_ROOT, "data"))


def find(name: str, root: Path | None) -> Path:
    """The folder of the data set ``name`` under ``root``.

    Raises:
        FileFormatError: it is not there.
    """
    folder = root_folder(root)
    if (folder / name).is_dir():
        return folder / name
    raise FileFormatError(
        f"{name} is not at {folder / name}; give the folder that holds {name!r} with --data-root or {DATA_ROOT}, "
        "or fetch it with --download"
    )


def _divided(data: Dataset) -> tuple[Dataset, Dataset]:
    """A fifth of the samples, always the same ones, for testing."""
    order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(0))
    n = len(order) - max(1, round(_TEST_SHARE * len(order)))
    return Dataset(data.x[order[:n]], data.y[order[:n]]), Dataset(data.x[order[n:]], data.y[order[n:]])


def _limited(data: Dataset, count: int | None, what: str) -> Dataset:
    if count is None:
        return data
    if count > len(data.x):
        raise ConfigError(f"{what}={count}, but there are only {len(data.x)} samples")
    return Dataset(data.x[:count], data.y[:count])


def _classes(name: str, train: Dataset, test: Dataset) -> int:
    """How many there are: those of the training samples, numbered from 0."""
    for part in (train, test):
        if int(part.y.min()) < 0:
            raise ShapeError(f"{name}: classes must be numbered from 0, found {int(part.y.min())}")
    seen = torch.unique(train.y)
    if len(seen) < 2:
        raise ShapeError(f"{name}: all training samples are of class {int(seen[0])}; expected at least two classes")
    count = int(seen.max()) + 1
    if count > 2 * len(train.y):
        raise ShapeError(f"{name}: class {count - 1} among {len(seen)} classes; number them from 0 without gaps")
    if int(test.y.max()) >= count:
        raise ShapeError(f"{name}: test samples of class {int(test.y.max())}, which no training sample has")
    return count


def digest(data: Dataset) -> str:
    """Sixteen hexadecimal digits that identify the samples."""
    found = hashlib.sha256()
    for tensor in data:
        found.update(f"{tensor.dtype} {list(tensor.shape)};".encode())
        found.update(tensor.contiguous().numpy().data)
    return found.hexdigest()[:16]
