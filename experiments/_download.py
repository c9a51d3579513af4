"""Data sets from their official places, verified, and only when asked for."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dagh.errors import DaghError

from ._validate import ConfigError

MIRROR = "DAGH_DATA_MIRROR"
"""Environment variable: the address of a folder with the same files, asked instead of the official places."""

_BLOCK = 1 << 18
_TIMEOUT_S = 30

Progress = Callable[[str, int, int | None], None]
"""Told the file's name, the bytes received, and the bytes in all where the server says."""


class DownloadError(DaghError):
    """A data set could not be fetched, or is not what it should be."""


class Remote(NamedTuple):
    """A file: its name and the MD5 sum that its authors (or, for MNIST, every mirror) publish."""

    name: str
    md5: str


class Place(NamedTuple):
    """Where the files of a data set lie."""

    url: str
    files: tuple[Remote, ...]


OFFICIAL = {
    "mnist": Place(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        (
            Remote("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
            Remote("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
            Remote("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
            Remote("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
        ),
    ),
    "fashion-mnist": Place(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        (
            Remote("train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
            Remote("train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
            Remote("t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
            Remote("t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
        ),
    ),
    "cifar10": Place(
        "https://www.cs.toronto.edu/~kriz/",
        (Remote("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),),
    ),
}


def download(name: str, root: Path, progress: Progress = lambda *_: None) -> Path:
    """Fetch the files of a data set that are not yet there.

    Args:
        name: a key of ``OFFICIAL``.
        root: the folder of the data sets; the files go to ``root/name``.
        progress: told about every block.

    Returns:
        ``root/name``. A file appears there only when its checksum is right.

    Raises:
        ConfigError: there is nothing to fetch under this name.
        DownloadError: no connection, a broken one, a wrong checksum, or no room.
    """
    if name not in OFFICIAL:
        raise ConfigError(f"--download: {name!r} is not one of {', '.join(OFFICIAL)}")
    place, folder = OFFICIAL[name], root / name
    base = os.environ.get(MIRROR)
    url = f"{base.rstrip('/')}/{name}/" if base else place.url
    for remote in place.files:
        if not (folder / remote.name).is_file():
            _fetch(url + remote.name, folder, remote, progress)
    return folder


def _fetch(url: str, folder: Path, remote: Remote, progress: Progress) -> None:
    part = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=f".{remote.name}.", dir=folder)
        with open(handle, "wb") as target:
            found = _receive(url, remote.name, target.write, progress)
            target.flush()
            os.fsync(target.fileno())
        if found != remote.md5:
            raise DownloadError(f"{url} has the MD5 sum {found}, expected {remote.md5}; nothing was kept")
        os.chmod(part, 0o644)
        os.replace(part, folder / remote.name)
        part = None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        reason = f"{error.code} {reason}" if isinstance(error, urllib.error.HTTPError) else reason
        raise DownloadError(f"cannot fetch {url}: {reason}; or put the file into {folder} yourself") from error
    finally:
        if part is not None:
            with contextlib.suppress(OSError):
                os.unlink(part)


def _receive(url: str, name: str, write: Callable[[bytes], object], progress: Progress) -> str:
    """The MD5 sum of what came; MD5 tells damage, not malice, and is what is published."""
    found = hashlib.md5(usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
        length = answer.headers.get("Content-Length")
        total, received = int(length) if length else None, 0
        while block := answer.read(_BLOCK):
            write(block)
            found.update(block)
            received += len(block)
            progress(name, received, total)
    if total is not None and received < total:
        raise DownloadError(f"{url} broke off after {received} of {total} bytes; nothing was kept")
    return found.hexdigest()
