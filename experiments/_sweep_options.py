"""The options that ``dagh sweep run`` and ``resume`` share, and what they ask for."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ._config import StudyConfig
from ._download import download
from ._engines import Engine, Here, Processes
from ._forward import check_kernels
from ._progress import downloading
from ._runner import Options, default_workers, device_of
from ._sources import root_folder
from ._store import Store
from ._validate import ConfigError


class Shard(click.ParamType):  # type: ignore[type-arg]  # generic in the stubs of some versions
    """``i/n`` with 1 ≤ i ≤ n."""

    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """See click."""
        if isinstance(value, tuple):
            return value
        with contextlib.suppress(ValueError):
            i, n = (int(part) for part in str(value).split("/"))
            if 1 <= i <= n:
                return i, n
        self.fail(f"{value!r} is not a shard such as 1/4", param, ctx)


FOLDER = click.Path(file_okay=False, path_type=Path)
"""A folder that need not exist."""

_OPTIONS = [
    click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change the study: train.epochs=2."),
    click.option("--data-root", type=FOLDER, help="Folder of the data sets (default: $DAGH_DATA, else data)."),
    click.option("--download", is_flag=True, help="Fetch the data set first, where it is not there."),
    click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"])),
    click.option("--workers", type=click.IntRange(min=0), help="Processes; 0: just this one. Default: one per core."),
    click.option("--shard", type=Shard(), default=(1, 1), help="Only part I of N of the study, for job arrays."),
    click.option("--engine", default="local", show_default=True, type=click.Choice(["local", "ray"])),
    click.option("--address", help="Ray: the cluster; auto: the one of this machine. Default: a new one, here."),
    click.option("--cpus", type=click.FloatRange(min=0), help="Ray: processor cores per run.  [default: 1]"),
    click.option("--gpus", type=click.FloatRange(min=0), help="Ray: GPUs per run, such as 0.25."),
    click.option("--retries", type=click.IntRange(min=0), help="Ray: attempts after a machine is lost.  [default: 3]"),
]


def shared(command: Any) -> Any:
    """Give a command these options."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True)
class How:
    """How a sweep is to be run."""

    data_root: Path | None
    download: bool
    device: str
    workers: int | None
    shard: tuple[int, int]
    engine: str
    address: str | None
    cpus: float | None
    gpus: float | None
    retries: int | None

    def options(self, study: StudyConfig, store: Store | None = None) -> Options:
        """Where the data are and on what to compute; data are fetched here, where that is asked for.

        Raises:
            ConfigError: options that do not go together, or a device that is not here.
            DownloadError: the data set could not be fetched.
        """
        cluster = {"address": self.address, "cpus": self.cpus, "gpus": self.gpus, "retries": self.retries}
        given = [f"--{name}" for name, value in cluster.items() if value is not None]
        if self.engine != "ray" and given:
            raise ConfigError(f"{given[0]} needs --engine ray")
        if self.engine == "ray" and self.workers is not None:
            raise ConfigError("--workers is for --engine local; on a cluster give --cpus, or --gpus, per run")
        root = self.data_root or remembered_root(store)
        if self.download:
            with downloading() as progress:
                download(study.data.name, root_folder(root), progress)
        if self.engine != "ray":
            check_kernels(study.train.kernels)
        device = self._device()
        return Options(root.resolve() if root else None, device, self._threads(device), self.shard)

    def count(self, device: str) -> int:
        """Worker processes; 0: none but this one."""
        return default_workers(device) if self.workers is None else self.workers

    def start(self, options: Options) -> Engine:
        """The engine.

        Raises:
            MissingPackageError: Ray is asked for and not installed.
            ConfigError: there is no cluster at the address.
        """
        if self.engine == "ray":
            from ._ray import Cluster

            gpus = float(options.device == "cuda") if self.gpus is None else self.gpus
            cpus = 1.0 if self.cpus is None else self.cpus
            return Cluster(self.address, cpus, gpus, 3 if self.retries is None else self.retries)
        count = self.count(options.device)
        return Processes(count) if count else Here()

    def _device(self) -> str:
        if self.engine != "ray":
            return device_of(self.device)
        if self.device == "auto":
            return "cuda" if self.gpus else "cpu"
        return self.device  # of the machines of the cluster, not of this one

    def _threads(self, device: str) -> int | None:
        if self.engine == "ray":
            return max(1, int(self.cpus or 1))
        count = self.count(device)
        if not count:
            return None
        share = default_workers("cpu") // count
        allowed = os.environ.get("OMP_NUM_THREADS", "")
        return max(1, min(share, int(allowed)) if allowed.isdecimal() else share)


def remembered_root(store: Store | None) -> Path | None:
    """The folder of the data sets that a sweep was begun with."""
    found = store.note("local").get("data_root") if store is not None else None
    return Path(found) if isinstance(found, str) else None
