"""What one run left behind."""

from __future__ import annotations

import contextlib
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dagh.errors import FileFormatError

Array = np.ndarray[Any, np.dtype[Any]]
Status = Literal["done", "failed"]

#: What a damaged ``.npz`` file raises.
UNREADABLE = (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class RunRecord:
    """One run at one point of its study.

    ``axis`` and ``value`` are what the study varied; ``scalars`` is a nested table of numbers, empty for a failed run;
    ``arrays`` are read from disk when one is first asked for.
    """

    key: str
    config: dict[str, Any]
    axis: str | None
    value: Any
    seed: int
    dataset: str
    status: Status
    scalars: dict[str, Any]
    arrays: Mapping[str, Array]
    error: str | None = None


class Arrays(Mapping[str, Array]):
    """The arrays of an ``.npz`` file, read one by one when asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: dict[str, Array] = {}

    def _names(self) -> list[str]:
        if not self._path.is_file():
            return []
        with self._open() as file:
            return list(file.files)

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with np.load(self._path, allow_pickle=False) as file:
                yield file
        except UNREADABLE as error:
            raise FileFormatError(f"{self._path} cannot be read: {error}") from error

    def __getitem__(self, name: str) -> Array:
        if name not in self._held:
            if not self._path.is_file():
                raise KeyError(name)
            with self._open() as file:
                self._held[name] = file[name]
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"{path} is not a table")
    return value


def read_entry(line: bytes) -> dict[str, Any] | None:
    """A line of the manifest, or None for one that is torn, or that no sweep wrote."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("key"), str):
        return None
    if entry.get("status") not in ("done", "failed"):
        return None
    points = entry.get("points", [])
    good = isinstance(points, list) and all(isinstance(point, list) and len(point) == 2 for point in points)
    return entry if good else None
