"""CIFAR-10 in its official binary and python versions, from folders or the archives as they are distributed."""

from __future__ import annotations

import gzip
import io
import pickle
import re
import tarfile
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dagh.errors import FileFormatError, ReductionError

from ._datasets import Dataset

_PIXELS = 3 * 32 * 32
_RECORD = 1 + _PIXELS
_CLASSES = 10
_MEMBER = re.compile(r"(data_batch_\d+|test_batch)(\.bin)?")

_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}

FOLDERS = ("cifar-10-batches-bin", "cifar-10-batches-py")
ARCHIVES = ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz")


def load_cifar10(root: str | Path, split: Literal["train", "test"] = "train", limit: int | None = None) -> Dataset:
    """CIFAR-10 from the folder ``root``.

    ``root`` holds the files of the binary version (``data_batch_1.bin`` …) or of the python version (``data_batch_1``
    …), or the folder or the archive that they come in. Nothing is unpacked to disk, and a pickle of the python version
    may contain numbers and arrays only: no code of it runs.

    Args:
        root: the folder.
        split: which of the two parts.
        limit: keep the first so many samples only.

    Returns:
        x ``[N, 3, 32, 32]`` in [0, 1], y ``[N]`` classes 0 … 9.

    Raises:
        FileFormatError: nothing of the kind is there, or a file is truncated, damaged or of another format.
        ReductionError: an unknown split, or a limit below 1.
    """
    if split not in ("train", "test"):
        raise ReductionError(f"split={split!r}: expected 'train' or 'test'")
    if limit is not None and limit < 1:
        raise ReductionError(f"limit={limit}: expected a positive number of samples, or None")
    batches = _batches(Path(root), "data_batch" if split == "train" else "test")
    records = [_records(name, data) for name, data in batches]
    whole = np.concatenate(records)[:limit]
    x = torch.from_numpy(whole[:, 1:].reshape(-1, 3, 32, 32)).to(torch.float32).div(255)
    return Dataset(x, torch.from_numpy(whole[:, 0]).to(torch.long))


def is_cifar10(root: Path) -> bool:
    """Whether ``root`` holds the files, their folder or their archive."""
    return any((root / name).exists() for name in (*FOLDERS, *ARCHIVES)) or bool(_members(root))


def _members(folder: Path) -> list[Path]:
    """The batches in a folder; those of the binary version where both are there."""
    found = sorted(p for p in folder.iterdir() if _MEMBER.fullmatch(p.name)) if folder.is_dir() else []
    binary = [p for p in found if p.suffix == ".bin"]
    return binary or found


def _batches(root: Path, start: str) -> list[tuple[str, bytes]]:
    """Name and content of the batches whose names begin with ``start``."""
    for folder in (root, *(root / name for name in FOLDERS)):
        paths = [p for p in _members(folder) if p.name.startswith(start)]
        if paths:
            return [(str(p), _read(p)) for p in paths]
    for name in ARCHIVES:
        if (root / name).is_file():
            found = _unpacked(root / name, start)
            if found:
                return found
            raise FileFormatError(f"{root / name} holds no {start}*; it is not a CIFAR-10 archive")
    wanted = " nor ".join([f"{start}*", *(f"{f}/" for f in FOLDERS), *ARCHIVES])
    raise FileFormatError(f"{root} has neither {wanted}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileFormatError(f"cannot read {path}: {error.strerror or error}") from error


def _unpacked(path: Path, start: str) -> list[tuple[str, bytes]]:
    found = []
    try:
        # Unpacked whole first: a tar reader takes a torn end for the end.
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(path.read_bytes()))) as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if member.isfile() and _MEMBER.fullmatch(name) and name.startswith(start):
                    stream = archive.extractfile(member)
                    assert stream is not None
                    found.append((f"{path}:{name}", stream.read()))
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise FileFormatError(f"{path} is damaged or truncated: {text}") from error
    return sorted(found)


def _records(name: str, data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """``[N, 1 + 3072]``: class and pixels."""
    if name.endswith(".bin"):
        if not data or len(data) % _RECORD:
            raise FileFormatError(f"{name} is truncated: {len(data)} bytes are not a multiple of {_RECORD}")
        found = np.frombuffer(data, np.uint8).reshape(-1, _RECORD)
    else:
        found = _from_pickle(name, data)
    if found[:, 0].max() >= _CLASSES:
        raise FileFormatError(f"{name} is not CIFAR-10: it has a class {int(found[:, 0].max())}")
    return found


class _Numbers(pickle.Unpickler):
    """Builds lists, tables, numbers and arrays, and refuses everything else before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it contains {module}.{name}")
        return super().find_class(module, name)


def _from_pickle(name: str, data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    try:
        table = _Numbers(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises what it likes
        text = " ".join(str(error).split()) or type(error).__name__
        raise FileFormatError(f"{name} is not a batch of CIFAR-10: {text}") from error
    if not isinstance(table, dict):
        raise FileFormatError(f"{name} is not a batch of CIFAR-10: it holds no table")
    pixels, labels = (_entry(table, key) for key in ("data", "labels"))
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (_PIXELS,):
        raise FileFormatError(f"{name} is not a batch of CIFAR-10: 'data' is not an array of {_PIXELS} bytes per image")
    if not isinstance(labels, list) or not all(type(c) is int and 0 <= c < 256 for c in labels):
        raise FileFormatError(f"{name} is not a batch of CIFAR-10: 'labels' is not a list of classes")
    if len(labels) != len(pixels) or not labels:
        raise FileFormatError(f"{name} is damaged: {len(pixels)} images, {len(labels)} labels")
    return np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1)


def _entry(table: dict[Any, Any], key: str) -> Any:
    return table.get(key.encode(), table.get(key))
