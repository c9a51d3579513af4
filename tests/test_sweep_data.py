"""CIFAR-10 in all its forms, data sets by name, and downloads from a server of our own."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import os
import pickle
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sweep_helpers import sweep, write_data

from dagh.errors import DaghError, FileFormatError, ReductionError, ShapeError
from dagh.experiments import _download, load_cifar10
from dagh.experiments._config import DataConfig
from dagh.experiments._download import DownloadError, Place, Remote, download
from dagh.experiments._sources import load
from dagh.experiments._validate import ConfigError

Array = np.ndarray[Any, np.dtype[Any]]
NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def batch(seed: int, count: int = 4) -> tuple[Array, Array]:
    r = np.random.default_rng(seed)
    return r.integers(0, 10, count, dtype="u1"), r.integers(0, 256, (count, 3072), dtype="u1")


def binary(seed: int) -> bytes:
    labels, pixels = batch(seed)
    return np.concatenate([labels[:, None], pixels], axis=1).tobytes()


def python(seed: int) -> bytes:
    labels, pixels = batch(seed)
    table = {b"batch_label": b"x", b"labels": [int(c) for c in labels], b"data": pixels, b"filenames": [b"a.png"] * 4}
    return pickle.dumps(table, protocol=2)


def archive(path: Path, folder: str, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


FORMS = ["binary files", "binary folder", "binary archive", "python files", "python folder", "python archive"]


def write_cifar(root: Path, form: str) -> None:
    version, way = form.split()
    files = {
        (f"{n}.bin" if version == "binary" else n): (binary if version == "binary" else python)(i)
        for i, n in enumerate(NAMES)
    }
    folder = "cifar-10-batches-bin" if version == "binary" else "cifar-10-batches-py"
    if way == "archive":
        archive(root / f"cifar-10-{version}.tar.gz", folder, {**files, "batches.meta": b"x", "readme.html": b""})
        return
    target = root if way == "files" else root / folder
    target.mkdir(exist_ok=True)
    for name, content in files.items():
        (target / name).write_bytes(content)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same(tmp_path: Path, form: str) -> None:
    write_cifar(tmp_path, form)
    x, y = load_cifar10(tmp_path)
    assert (x.shape, x.dtype, y.dtype) == ((20, 3, 32, 32), torch.float32, torch.int64)
    labels, pixels = (np.concatenate(part) for part in zip(*(batch(i) for i in range(5)), strict=True))
    np.testing.assert_array_equal(y.numpy(), labels)
    np.testing.assert_array_equal((x * 255).round().numpy().reshape(20, 3072), pixels)
    # Red, green and blue planes of 32 × 32, rows first.
    assert x[3, 2, 5, 7].item() == pytest.approx(pixels[3, 2 * 1024 + 5 * 32 + 7] / 255)
    assert load_cifar10(tmp_path, "test").y.tolist() == batch(5)[0].tolist()
    assert len(load_cifar10(tmp_path, limit=7).x) == 7


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("data_batch_1.bin", binary(0)[:-1], "is truncated: 12291 bytes are not a multiple of 3073"),
        ("data_batch_1.bin", b"", "is truncated"),
        ("data_batch_1.bin", b"\x0a" + bytes(3072), "is not CIFAR-10: it has a class 10"),
        ("data_batch_1", python(0)[:-200], "is not a batch of CIFAR-10"),
        ("data_batch_1", b"", "is not a batch of CIFAR-10"),
        ("data_batch_1", pickle.dumps([1]), "it holds no table"),
        ("data_batch_1", pickle.dumps({b"labels": [1]}), "'data' is not an array"),
        ("data_batch_1", pickle.dumps({b"labels": [1], b"data": np.zeros((2, 3072), "u1")}), "2 images, 1 labels"),
        ("data_batch_1", pickle.dumps({b"labels": ["a"], b"data": np.zeros((1, 3072), "u1")}), "not a list of classes"),
        ("data_batch_1", pickle.dumps({b"labels": Evil()}), "it contains posix.system"),
        ("cifar-10-python.tar.gz", b"not an archive", "is damaged or truncated"),
        ("readme.txt", b"", "has neither data_batch"),
    ],
)
def test_malformed_files_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileFormatError) as caught:
        load_cifar10(tmp_path)
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


def test_truncated_archives(tmp_path: Path) -> None:
    write_cifar(tmp_path, "binary archive")
    path = tmp_path / "cifar-10-binary.tar.gz"
    whole = path.read_bytes()
    for length in (len(whole) // 2, len(whole) - 20, 30):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match="damaged or truncated"):
            load_cifar10(tmp_path)
    archive(path, "x", {"thesis.pdf": b""})
    with pytest.raises(FileFormatError, match="it is not a CIFAR-10 archive"):
        load_cifar10(tmp_path)
    with pytest.raises(ReductionError, match="split"):
        load_cifar10(tmp_path, "validation")  # type: ignore[arg-type]
    with pytest.raises(ReductionError, match="limit=0"):
        load_cifar10(tmp_path, limit=0)


def test_the_real_cifar10() -> None:
    folder = Path(os.environ.get("DAGH_DATA", Path(__file__).resolve().parents[1] / "data")) / "cifar10"
    if not folder.is_dir():
        pytest.skip("no data folder; set DAGH_DATA")
    x, y = load_cifar10(folder)
    assert x.shape[1:] == (3, 32, 32) and len(x) == len(y) >= 5000
    assert y.unique().tolist() == list(range(10))
    assert x.mean().item() == pytest.approx(0.473, abs=0.01)  # of the whole training set


# -- by name ---------------------------------------------------------------------------------------


def test_sources_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cifar10").mkdir()
    write_cifar(tmp_path / "cifar10", "python folder")
    found = load(DataConfig("cifar10", train=6), tmp_path)
    assert (len(found.split.train_x), len(found.split.test_x), found.classes) == (6, 4, 10)
    monkeypatch.setenv("DAGH_DATA", str(tmp_path))
    assert load(DataConfig("cifar10", train=6)).train_digest == found.train_digest
    assert load(DataConfig("cifar10", train=7)).train_digest != found.train_digest
    with pytest.raises(FileFormatError, match=r"mnist is not at .*--data-root or DAGH_DATA, or fetch it"):
        load(DataConfig("mnist"))
    with pytest.raises(ConfigError, match="did you mean 'fashion-mnist'"):
        load(DataConfig("fashion_mnist"))
    with pytest.raises(ConfigError, match=r"data\.train=21, but there are only 20"):
        load(DataConfig("cifar10", train=21))


def test_npz_sources(tmp_path: Path) -> None:
    path = write_data(tmp_path / "a.npz", 40)
    found = load(DataConfig(str(path)))
    assert (len(found.split.train_x), len(found.split.test_x), found.classes, found.shape) == (32, 8, 3, (1, 6, 6))
    assert load(DataConfig(str(path))).train_digest == found.train_digest
    x, y = np.zeros((4, 1, 6, 6), "f4"), np.array([0, 1, 2, 3])
    np.savez(path, x=x, y=y, x_test=x[:1], y_test=y[:1])
    assert [len(t) for t in load(DataConfig(str(path))).split] == [4, 4, 1, 1]
    np.savez(path, x=np.full((4, 1, 6, 6), 51, "u1"), y=y)
    assert load(DataConfig(str(path))).split.train_x.unique().tolist() == [pytest.approx(0.2)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"x_test": np.zeros((0, 1, 6, 6), "f4"), "y_test": np.zeros(0, "i8")},
            "a.npz: 4 training and 0 test samples; at least 3 and 1 are needed",
        ),
        ({"x": np.zeros((2, 1, 6, 6), "f4"), "y": [0, 1]}, "2 training and 1 test samples"),
        ({"x": np.zeros((0, 1, 6, 6), "f4"), "y": np.zeros(0, "i8")}, "0 training and 1 test samples"),
        ({"y": [-1, 0, 1, 2]}, "numbered from 0, found -1"),
        ({"y": [0.0, 1, 2, 3]}, "y holds numbers of floating-point type of shape"),
        ({"y": np.eye(4, dtype="i8")}, r"y holds integers of shape \[4, 4\]; expected one integer class per sample"),
        ({"y": [2, 2, 2, 2]}, "of class 2; expected at least two"),
        ({"y": [0, 1, 10**9, 2]}, "class 1000000000 among 4 classes; number them from 0"),
        ({"x": np.zeros((4, 1, 6, 6), "i8")}, "x has integer type"),
        ({"x": np.full((4, 1, 6, 6), np.nan, "f4")}, "x holds NaN or infinity"),
        ({"x_test": np.zeros((1, 1, 3, 6), "f4"), "y_test": [0]}, "test inputs"),
        ({"x_test": np.zeros((1, 1, 6, 6), "f4"), "y_test": [7]}, "test samples of class 7"),
        ({"x_test": np.zeros((1, 1, 6, 6), "f4")}, "has 'x_test' and no 'y_test'"),
    ],
)
def test_arrays_that_cannot_be_trained_on(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    path = tmp_path / "a.npz"
    held = {"x": np.zeros((4, 1, 6, 6), "f4"), "y": np.arange(4), "x_test": np.zeros((1, 1, 6, 6), "f4"), "y_test": [0]}
    if wrong.keys() == {"x_test"}:
        del held["y_test"]
    np.savez(path, **{name: np.asarray(a) for name, a in {**held, **wrong}.items()})
    with pytest.raises(DaghError, match=message) as caught:
        load(DataConfig(str(path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("count", "train"), [(0, 0), (1, 0), (3, 2)])
def test_too_few_samples_to_divide(tmp_path: Path, count: int, train: int) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=np.zeros((count, 1, 6, 6), "f4"), y=np.arange(count))
    with pytest.raises(ShapeError, match=f"a.npz: {train} training and {min(count, 1)} test samples; at least 3 and 1"):
        load(DataConfig(str(path)))


def test_a_text_is_no_npz(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_text("hello\n")
    with pytest.raises(FileFormatError, match="it is not a NumPy file"):
        load(DataConfig(str(path)))


# -- downloads -------------------------------------------------------------------------------------

FILES = {"a.gz": b"first" * 100_000, "b.gz": b"second"}


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        if self.path.endswith("broken"):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"short")
            return
        super().do_GET()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    folder = tmp_path / "served" / "mnist"
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    handler = functools.partial(Handler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{found.server_port}"
        monkeypatch.setenv("DAGH_DATA_MIRROR", url)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        remotes = tuple(Remote(n, hashlib.md5(c).hexdigest()) for n, c in FILES.items())
        monkeypatch.setitem(_download.OFFICIAL, "mnist", Place("https://unused.invalid/", remotes))
        yield url
        found.shutdown()


def refuse(monkeypatch: pytest.MonkeyPatch, root: Path, *remotes: Remote) -> str:
    monkeypatch.setitem(_download.OFFICIAL, "mnist", Place("https://unused.invalid/", remotes))
    with pytest.raises(DownloadError) as caught:
        download("mnist", root)
    assert "\n" not in str(caught.value)
    assert not (root / "mnist").exists() or not list((root / "mnist").iterdir())  # nothing half
    return str(caught.value)


def test_download(server: str, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    folder = download("mnist", tmp_path / "root", lambda *a: seen.append(a))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == FILES
    assert seen[-1] == ("b.gz", 6, 6) and seen[0][2] == 500_000
    seen.clear()
    download("mnist", tmp_path / "root", lambda *a: seen.append(a))
    assert not seen  # what is there is left alone
    (folder / "b.gz").unlink()
    download("mnist", tmp_path / "root", lambda *a: seen.append(a))
    assert [name for name, *_ in seen] == ["b.gz"]


def test_downloads_that_go_wrong(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    assert "has the MD5 sum" in refuse(monkeypatch, root, Remote("a.gz", "0" * 32))
    assert "404 File not found; or put the file into" in refuse(monkeypatch, root, Remote("absent", ""))
    assert "broke off after 5 of 1000 bytes" in refuse(monkeypatch, root, Remote("broken", ""))
    monkeypatch.setenv("DAGH_DATA_MIRROR", "http://127.0.0.1:9")
    assert "Connection refused" in refuse(monkeypatch, root, Remote("a.gz", ""))
    with pytest.raises(ConfigError, match="'digits' is not one of mnist, fashion-mnist, cifar10"):
        download("digits", root)


def test_downloads_on_the_command_line(server: str, tmp_path: Path) -> None:
    done = sweep("run", "smoke", "--data", "mnist", "--data-root", tmp_path / "root", "--download", "--dry-run")
    lines = done.output.splitlines()
    assert lines[:2] == ["fetching a.gz (0.5 MB)", "fetching b.gz (0.0 MB)"]
    assert done.exit_code == 2 and "has neither train-images-idx3-ubyte nor" in lines[2]


def test_official_places() -> None:
    assert set(_download.OFFICIAL) == {"mnist", "fashion-mnist", "cifar10"}
    for place in _download.OFFICIAL.values():
        assert place.url.startswith("http") and place.url.endswith("/")
        assert all(len(f.md5) == 32 and int(f.md5, 16) for f in place.files)
