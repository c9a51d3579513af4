"""Loaders for image data; every malformed file is refused in one line."""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dagh.errors import DaghError, FileFormatError, ReductionError, ShapeError

Array = np.ndarray[Any, np.dtype[Any]]

_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MNIST_PREFIX = {"train": "train", "test": "t10k"}


class MissingPackageError(DaghError):
    """An optional package is needed and not installed."""


class Dataset(NamedTuple):
    """Inputs ``x`` and targets ``y`` with the samples along axis 0."""

    x: Tensor
    y: Tensor


def load_digits() -> Dataset:
    """The handwritten digits that scikit-learn ships: x ``[1797, 1, 8, 8]`` in [0, 1], y ``[1797]`` classes.

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise MissingPackageError("load_digits needs scikit-learn; pip install 'dagh[data]'") from error
    digits = load()
    x = torch.as_tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    return Dataset(x, torch.as_tensor(digits.target, dtype=torch.long))


def load_idx(path: str | Path) -> Array:
    """One array from an IDX file, the format of MNIST and its relatives, gzipped or not.

    Returns:
        The array in the machine's byte order, with the shape and type that the file states.

    Raises:
        FileFormatError: the file cannot be read, is no IDX file, or is shorter or longer than its header
        says.
    """
    path = Path(path)
    data = _read(path)
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _IDX_TYPES:
        raise FileFormatError(f"{path} is not an IDX file: it starts with {data[:4].hex(' ') or 'nothing'}")
    dtype, axes = np.dtype(_IDX_TYPES[data[2]]), data[3]
    start = 4 + 4 * axes
    if len(data) < start:
        raise FileFormatError(f"{path} is truncated: {len(data)} bytes, the header alone takes {start}")
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4))
    wanted = math.prod(shape) * dtype.itemsize
    if len(data) - start != wanted:
        problem = "truncated" if len(data) - start < wanted else "too long"
        raise FileFormatError(
            f"{path} is {problem}: shape {shape} takes {wanted} bytes, the file holds {len(data) - start}"
        )
    return np.frombuffer(data, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def load_mnist(root: str | Path, split: Literal["train", "test"] = "train", limit: int | None = None) -> Dataset:
    """MNIST, or a data set in its format, from the four IDX files in the folder ``root`` (gzipped or not).

    Args:
        root: the folder with ``train-images-idx3-ubyte.gz`` and the other three.
        split: which of the two parts.
        limit: keep the first so many samples only.

    Returns:
        x ``[N, 1, rows, columns]`` in [0, 1], y ``[N]`` classes.

    Raises:
        FileFormatError: a file is missing or malformed.
        ShapeError: images and labels do not belong together.
        ReductionError: an unknown split, or a limit below 1.
    """
    if split not in _MNIST_PREFIX:
        raise ReductionError(f"split={split!r}: expected 'train' or 'test'")
    if limit is not None and limit < 1:
        raise ReductionError(f"limit={limit}: expected a positive number of samples, or None")
    prefix = _MNIST_PREFIX[split]
    images = load_idx(_present(Path(root), f"{prefix}-images-idx3-ubyte"))
    labels = load_idx(_present(Path(root), f"{prefix}-labels-idx1-ubyte"))
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise ShapeError(f"{root}: images of shape {images.shape} do not fit labels of shape {labels.shape}")
    x = torch.from_numpy(images[:limit]).to(torch.float32).div(255).unsqueeze(1)
    return Dataset(x, torch.from_numpy(labels[:limit]).to(torch.long))


def load_npz(path: str | Path, names: tuple[str, str] = ("x", "y")) -> Dataset:
    """The arrays ``x`` and ``y`` of an ``.npz`` file, or those of other names; pickled objects are refused.

    Returns:
        x and y: double precision where stored so, other floating-point types in single precision, integer
        types as 64-bit integers.

    Raises:
        FileFormatError: the file cannot be read, lacks an array, or an array is not numeric.
        ShapeError: x and y have different numbers of samples.
    """
    return dataset_of(Path(path), read_npz(Path(path)), names)


def dataset_of(path: Path, arrays: dict[str, Array], names: tuple[str, str]) -> Dataset:
    """Two of the arrays that :func:`read_npz` found at ``path``; see :func:`load_npz`."""
    absent = [name for name in names if name not in arrays]
    if absent:
        held = ", ".join(sorted(arrays)) or "nothing"
        raise FileFormatError(f"{path} has no array named {absent[0]!r}; it holds {held}")
    x, y = (_tensor(arrays[name], f"{path}: array {name!r}") for name in names)
    if not x.dim() or not y.dim() or len(x) != len(y):
        raise ShapeError(f"{path}: x of shape {tuple(x.shape)} and y of shape {tuple(y.shape)} differ in axis 0")
    return Dataset(x, y)


def read_npz(path: Path) -> dict[str, Array]:
    """Every array of an ``.npz`` file, or the one of an ``.npy`` file under the name ``""``."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"": loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise FileFormatError(f"cannot read {path}: {_reason(error)}") from error


def _tensor(array: Array, what: str) -> Tensor:
    if array.dtype.kind == "f":
        return torch.from_numpy(array.astype("f8" if array.dtype.itemsize == 8 else "f4"))
    if array.dtype.kind in "iub":
        return torch.from_numpy(array.astype("i8"))
    raise FileFormatError(f"{what} has type {array.dtype}, not real numbers")


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise FileFormatError(f"cannot read {path}: {_reason(error)}") from error


def _present(root: Path, name: str) -> Path:
    for candidate in (root / name, root / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise FileFormatError(f"{root} has neither {name} nor {name}.gz")


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if "pickle" in text:
        return "it is not a NumPy file, or holds Python objects"
    return " ".join(text.split()) or type(error).__name__
