"""Results on disk: written whole or not at all, by any number of processes, readable after every accident."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import tempfile
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from dagh.errors import DaghError, FileFormatError

from ._config import StudyConfig, read, to_toml
from ._records import UNREADABLE, Array, Arrays, RunRecord, Status, read_entry, read_json
from ._wanted import Wanted

__all__ = ["RunRecord", "Store", "StoreError"]


class StoreError(DaghError):
    """Results could not be written; the message says why, and how to go on."""


class Store:
    """A folder of results.

    ``study.toml`` is the resolved study, ``manifest.jsonl`` has one line per finished or failed run, ``runs/KEY`` its
    files, ``weights/KEY.npz`` the trained weights. A run is written to a temporary folder, renamed, and only then
    entered in the manifest: what the manifest names is complete.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lines: list[dict[str, Any]] = []
        self._stamp: tuple[int, int] | None = None

    # -- the study ---------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str | Path, study: StudyConfig) -> Store:
        """A new store, or the one that holds this very study.

        Raises:
            StoreError: the folder holds another study, or something else, or cannot be written.
        """
        store = cls(path)
        wanted = to_toml(study)
        with _writing(store.path):
            store.path.mkdir(parents=True, exist_ok=True)
            with store._locked():
                if store.study_file.is_file():
                    if to_toml(store.study()) != wanted:
                        raise StoreError(
                            f"{path} holds a study with other settings; choose another --out, or change that one: "
                            f"dagh sweep resume {path} --set …"
                        )
                    return store
                strange = [p.name for p in store.path.iterdir() if p.name not in (".lock", "tmp")]
                if strange:
                    raise StoreError(f"{path} is not empty ({strange[0]}) and holds no study; choose another --out")
                store._write_study(wanted)
        return store

    def change(self, study: StudyConfig) -> None:
        """Replace the study; results that it still asks for stay valid."""
        with _writing(self.path), self._locked():
            self._write_study(to_toml(study))

    @property
    def study_file(self) -> Path:
        """The resolved study."""
        return self.path / "study.toml"

    def study(self) -> StudyConfig:
        """The study of this folder.

        Raises:
            FileFormatError: the folder holds none.
        """
        if not self.study_file.is_file():
            raise FileFormatError(f"{self.path} holds no study: there is no study.toml")
        return read(self.study_file)

    def _write_study(self, text: str) -> None:
        self._replace(self.study_file, text.encode())

    def note(self, name: str) -> dict[str, Any]:
        """A small table kept with the results (``NAME.json``), empty where there is none."""
        path = self.path / f"{name}.json"
        return read_json(path) if path.is_file() else {}

    def add_note(self, name: str, entries: Mapping[str, Any]) -> None:
        """Add entries to the table ``name``."""
        with _writing(self.path), self._locked():
            table = self.note(name) | dict(entries)
            self._replace(self.path / f"{name}.json", json.dumps(table, indent=1).encode())

    # -- reading -----------------------------------------------------------------------------------

    def manifest(self) -> list[dict[str, Any]]:
        """The lines of the manifest, the last one of every run; one that is torn or no such line is passed over."""
        path = self.path / "manifest.jsonl"
        try:
            state = path.stat()
        except FileNotFoundError:
            return []
        stamp = (state.st_size, state.st_mtime_ns)
        if stamp != self._stamp:
            found: dict[str, dict[str, Any]] = {}
            for line in path.read_bytes().splitlines():
                entry = read_entry(line)
                if entry is not None:
                    found.pop(entry["key"], None)
                    found[entry["key"]] = entry
            self._lines, self._stamp = list(found.values()), stamp
        return self._lines

    def status(self) -> dict[str, str]:
        """Key to ``"done"``, ``"failed"`` or, where a file of the run cannot be used, ``"damaged"``."""
        return {line["key"]: "damaged" if self.damage(line) else line["status"] for line in self.manifest()}

    def damage(self, line: Mapping[str, Any]) -> str | None:
        """What is wrong with the files of the run of a line of the manifest; arrays must have their checksums."""
        folder = self.path / "runs" / line["key"]
        try:
            config = read_json(folder / "config.json")
            if not {"key", "seed", "data"} <= config.keys():
                return f"{folder} lacks what a run has"
            if line["status"] != "done":
                return None
            if not isinstance(read_json(folder / "result.json").get("scalars"), dict):
                return f"{folder} lacks what a run has"
            with zipfile.ZipFile(folder / "arrays.npz") as file:
                torn = file.testzip()
            if torn is not None:
                return f"{folder / 'arrays.npz'} is damaged: {torn.removesuffix('.npy')}"
        except FileFormatError as error:
            return str(error)
        except UNREADABLE as error:
            return f"{folder / 'arrays.npz'} cannot be read: {error}"
        return None

    def finished(self) -> set[str]:
        """Keys of the runs that are done."""
        return {key for key, status in self.status().items() if status == "done"}

    def is_finished(self, key: str) -> bool:
        """Whether one run is done, without a look at the others."""
        lines = [line for line in self.manifest() if line["key"] == key and line["status"] == "done"]
        return bool(lines) and not self.damage(lines[0])

    def damaged(self) -> dict[str, str]:
        """What is wrong, by key, with the runs that the manifest names."""
        looked = {line["key"]: self.damage(line) for line in self.manifest()}
        return {key: reason for key, reason in looked.items() if reason is not None}

    def runs(self, superseded: bool = False, without: Collection[str] = ()) -> list[RunRecord]:
        """The finished and failed runs that the study asks for, the last one of every point and seed; one that stands
        for several points appears once for each. Runs of samples that an ``.npz`` file of the study no longer holds
        are not among them (see :meth:`outdated`).

        Args:
            superseded: every run instead, also those of points or settings that the study no longer has.
            without: keys to leave out, those of damaged runs for instance.

        Raises:
            FileFormatError: a file of a run that the manifest calls done is damaged.
        """
        records = self.stored(without)
        wanted = None if superseded or not self.study_file.is_file() else Wanted(self.study())
        found: dict[str, RunRecord] = {}
        for r in records:
            for axis, value in r.config.get("points", [[None, None]]) if wanted is None else wanted.points_of(r.config):
                name = json.dumps([axis, value, r.seed, r.dataset, r.key if superseded else ""])
                found.pop(name, None)
                found[name] = replace(r, axis=axis, value=value)
        return list(found.values())

    def outdated(self, without: Collection[str] = ()) -> list[RunRecord]:
        """Runs that the study would ask for if the files of its data had not changed since."""
        wanted, found = Wanted(self.study()), self.stored(without)
        return [replace(r, axis=a, value=v) for r in found for a, v in wanted.outdated_points(r.config)]

    def stored(self, without: Collection[str] = ()) -> list[RunRecord]:
        """Every finished or failed run once, as the first of its points."""
        return [self._record(line) for line in self.manifest() if line["key"] not in without]

    def _record(self, line: dict[str, Any]) -> RunRecord:
        folder = self.path / "runs" / line["key"]
        done = line["status"] == "done"
        config = read_json(folder / "config.json")
        result = read_json(folder / "result.json") if done else {"scalars": {}}
        if not {"seed", "data"} <= config.keys() or "scalars" not in result:
            raise FileFormatError(f"{folder} lacks what a run has")
        axis, value = (config.get("points") or [[None, None]])[0]
        return RunRecord(
            key=line["key"],
            config=config,
            axis=axis,
            value=value,
            seed=config["seed"],
            dataset=config["data"]["name"],
            status=line["status"],
            scalars=result["scalars"],
            arrays=Arrays(folder / "arrays.npz"),
            error=line.get("error"),
        )

    def weights(self, train_key: str) -> dict[str, Array] | None:
        """The trained weights, or None where there are none that can be read."""
        path = self.path / "weights" / f"{train_key}.npz"
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except Exception:  # absent or damaged: they are trained again
            return None

    # -- writing -----------------------------------------------------------------------------------

    def write_done(
        self, config: dict[str, Any], scalars: dict[str, Any], arrays: Mapping[str, Array], about: dict[str, Any]
    ) -> None:
        """Store a finished run.

        Args:
            config: of the run, with ``key``, ``seed``, ``points`` and ``data``.
            scalars: a nested table.
            arrays: by name.
            about: wall time, host, environment: what is not a result.
        """
        result = json.dumps({"scalars": scalars, "about": about}, indent=1, default=_plain).encode()
        self._write(config, "done", {"result.json": result}, arrays, about)

    def write_failed(self, config: dict[str, Any], error: str, about: dict[str, Any]) -> None:
        """Store the traceback of a failed run."""
        line = error.strip().splitlines()[-1] if error.strip() else "unknown"
        self._write(config, "failed", {"error.txt": error.encode()}, {}, {**about, "error": line})

    def write_weights(self, train_key: str, weights: Mapping[str, Array]) -> None:
        """Store trained weights, so that they can be measured again without training."""
        with _writing(self.path):
            folder = self.path / "weights"
            folder.mkdir(exist_ok=True)
            with self._temporary() as temporary:
                _save(temporary / "weights.npz", weights)
                os.replace(temporary / "weights.npz", folder / f"{train_key}.npz")

    def _write(
        self,
        config: dict[str, Any],
        status: Status,
        files: dict[str, bytes],
        arrays: Mapping[str, Array],
        about: dict[str, Any],
    ) -> None:
        key = config["key"]
        files = {"config.json": json.dumps(config, indent=1, default=_plain).encode(), **files}
        entry: dict[str, Any] = {
            "key": key,
            "status": status,
            "points": config["points"],
            "seed": config["seed"],
            "dataset": config["data"]["name"],
            **{k: about[k] for k in ("wall_s", "started", "host", "error") if k in about},
        }
        with _writing(self.path):
            (self.path / "runs").mkdir(exist_ok=True)
            with self._temporary() as temporary:
                ready = temporary / key
                ready.mkdir()
                for name, content in files.items():
                    _put(ready / name, content)
                if status == "done":  # even without arrays: a run without the file is damaged
                    _save(ready / "arrays.npz", arrays)
                target = self.path / "runs" / key
                with self._locked():
                    if target.exists():
                        os.rename(target, temporary / "before")
                    os.rename(ready, target)
                    _sync(target.parent)
                    self._append(entry)

    def _append(self, entry: dict[str, Any]) -> None:
        """One line at the end of the manifest; a torn line before it is closed first."""
        path = self.path / "manifest.jsonl"
        line = json.dumps(entry, default=_plain).encode() + b"\n"
        with open(path, "a+b") as stream:
            size = stream.seek(0, os.SEEK_END)
            if size:
                stream.seek(size - 1)
                if stream.read(1) != b"\n":
                    line = b"\n" + line
            try:
                stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(stream.fileno(), size)
                raise

    def _replace(self, path: Path, content: bytes) -> None:
        with self._temporary() as temporary:
            _put(temporary / path.name, content)
            os.replace(temporary / path.name, path)
            _sync(path.parent)

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[Path]:
        """A folder on the same file system, removed whatever happens."""
        base = self.path / "tmp"
        base.mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{socket.gethostname()}-{os.getpid()}-", dir=base))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _locked(self) -> FileLock:
        return FileLock(self.path / ".lock")

    # -- claims ------------------------------------------------------------------------------------

    def claim(self, key: str) -> FileLock | None:
        """The right to compute a run, or None while another process has it; it ends with the process."""
        with _writing(self.path):
            (self.path / "claims").mkdir(exist_ok=True)
            lock = FileLock(self.path / "claims" / key)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                return None
        return lock


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot write to {path}: {error.strerror or error}") from error


def _put(path: Path, content: bytes) -> None:
    with open(path, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _save(path: Path, arrays: Mapping[str, Array]) -> None:
    with open(path, "wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    """Make a rename in ``folder`` last; file systems that cannot do it are left alone."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _plain(value: Any) -> Any:
    """What json does not know: numbers and arrays of numpy and torch, paths."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a result of type {type(value).__name__} cannot be stored")
