"""Loaders and the differences of the mean loss."""

from __future__ import annotations

import gzip
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from dagh import DaghError
from dagh._cli import cli
from dagh.errors import FileFormatError, NonFiniteError, ReductionError, ShapeError
from dagh.experiments import (
    MissingPackageError,
    load_digits,
    load_idx,
    load_mnist,
    load_npz,
    loss_differences,
)

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx_bytes(array: np.ndarray) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, CODES[array.dtype.str[1:]], array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.fixture
def data() -> Path:
    """The folder of real data sets: ``DAGH_DATA``, or ``data`` in the repository."""
    folder = Path(os.environ.get("DAGH_DATA", Path(__file__).resolve().parents[1] / "data"))
    if not folder.is_dir():
        pytest.skip("no data folder; set DAGH_DATA")
    return folder


# -- IDX -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", sorted(CODES))
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4), (0, 2)])
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_round_trip(tmp_path: Path, dtype: str, shape: tuple[int, ...], zipped: bool) -> None:
    array = (np.arange(np.prod(shape)) * 37 - 20).astype(dtype).reshape(shape)
    path = tmp_path / "array"
    raw = idx_bytes(array)
    path.write_bytes(gzip.compress(raw, mtime=0) if zipped else raw)
    loaded = load_idx(path)
    assert loaded.dtype == array.dtype
    assert loaded.flags.writeable
    np.testing.assert_array_equal(loaded, array)


GOOD = idx_bytes(np.arange(6, dtype="u1").reshape(2, 3))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an IDX file"),
        (b"\x00\x00", "not an IDX file"),
        (b"PK\x03\x04 something else", "not an IDX file: it starts with 50 4b 03 04"),
        (b"\x00\x00\x07\x01" + GOOD[4:], "not an IDX file"),
        (GOOD[:7], "truncated: 7 bytes, the header alone takes 12"),
        (GOOD[:-1], "truncated: shape (2, 3) takes 6 bytes, the file holds 5"),
        (GOOD + b"!", "too long: shape (2, 3) takes 6 bytes, the file holds 7"),
        (gzip.compress(GOOD, mtime=0)[:-9], "cannot read"),
        (gzip.compress(GOOD, mtime=0)[:20] + b"\xff" * 20, "cannot read"),
        (b"\x00\x00\x08\x03" + b"\xff" * 12, "truncated"),
    ],
)
def test_malformed_idx_files_are_refused_in_one_line(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(FileFormatError) as caught:
        load_idx(path)
    message = str(caught.value)
    assert reason in message
    assert str(path) in message
    assert "\n" not in message


def test_absent_idx_file(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="No such file"):
        load_idx(tmp_path / "absent")


# -- MNIST and its relatives -----------------------------------------------------------------------


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    images = np.arange(4 * 2 * 3, dtype="u1").reshape(4, 2, 3) * 10
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(images))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.arange(4, dtype="u1"))))
    return tmp_path


def test_mnist_format(mnist: Path) -> None:
    x, y = load_mnist(mnist)
    assert (x.shape, x.dtype, y.dtype) == ((4, 1, 2, 3), torch.float32, torch.int64)
    assert y.tolist() == [0, 1, 2, 3]
    assert x[3, 0, 1, 2].item() == pytest.approx(230 / 255)
    assert load_mnist(mnist, limit=2).x.shape == (2, 1, 2, 3)


def test_mnist_mistakes(mnist: Path) -> None:
    with pytest.raises(FileFormatError, match="has neither t10k-images-idx3-ubyte nor"):
        load_mnist(mnist, "test")
    with pytest.raises(ReductionError, match="split='validation'"):
        load_mnist(mnist, "validation")  # type: ignore[arg-type]
    with pytest.raises(ReductionError, match="limit=0"):
        load_mnist(mnist, limit=0)
    (mnist / "train-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((3, 2, 3), dtype="u1")))
    with pytest.raises(ShapeError, match="do not fit"):
        load_mnist(mnist)


@pytest.mark.parametrize(("split", "samples"), [("train", 60000), ("test", 10000)])
def test_the_real_mnist(data: Path, split: str, samples: int) -> None:
    x, y = load_mnist(data / "mnist", split)  # type: ignore[arg-type]
    assert x.shape == (samples, 1, 28, 28)
    assert y.unique().tolist() == list(range(10))
    if split == "train":
        assert x.double().mean().item() * 255 == pytest.approx(33.318, abs=1e-3)


# -- digits ----------------------------------------------------------------------------------------


def test_digits() -> None:
    pytest.importorskip("sklearn")
    x, y = load_digits()
    assert (x.shape, x.dtype) == ((1797, 1, 8, 8), torch.float32)
    assert (x.min().item(), x.max().item()) == (0, 1)
    assert y.unique().tolist() == list(range(10))


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'dagh\[data\]'"):
        load_digits()


# -- npz -------------------------------------------------------------------------------------------


def test_npz(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, x=np.ones((2, 3), dtype="f8"), y=np.array([1, 2], dtype=">u2"))
    x, y = load_npz(path)
    assert (x.dtype, y.dtype, y.tolist()) == (torch.float64, torch.int64, [1, 2])
    np.savez(path, x=np.ones((2, 3), dtype="f2"), y=np.ones(2, dtype="f4"))
    assert load_npz(path).x.dtype == torch.float32


def test_malformed_npz_files_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"

    def refused(error: type[DaghError], reason: str) -> None:
        with pytest.raises(error) as caught:
            load_npz(path)
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)

    refused(FileFormatError, "No such file")
    path.write_text("not an archive")
    refused(FileFormatError, "cannot read")
    np.savez(path, x=np.ones(2), z=np.ones(2))
    refused(FileFormatError, "has no array named 'y'; it holds x, z")
    np.savez(path, x=np.ones(2), y=np.ones(3))
    refused(ShapeError, "differ in axis 0")
    np.savez(path, x=np.ones(2), y=np.float64(1))
    refused(ShapeError, "differ in axis 0")
    np.savez(path, x=np.ones(2), y=np.array(["a", "b"]))
    refused(FileFormatError, "not real numbers")
    np.savez(path, x=np.ones(2), y=np.array([{}, {}]))
    refused(FileFormatError, "cannot read")
    np.savez_compressed(path, x=np.ones(2000), y=np.ones(2000))
    path.write_bytes(path.read_bytes()[:200])
    refused(FileFormatError, "cannot read")


# -- differences of the mean loss ------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.integers(1, 5), st.integers(0, 100))
def test_differences_are_those_of_the_mean_losses(n: int, shuffles: int, seed: int) -> None:
    losses = np.random.default_rng(n).exponential(size=n)
    result = loss_differences(losses, shuffles, seed, quantiles=(0.0, 0.5, 1.0))
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(shuffles):
        order = generator.permutation(losses)
        means = [order[:k].mean() for k in range(1, n + 1)]
        rows.append(np.abs(np.diff(means)))
    assert result.k.tolist() == list(range(1, n))
    np.testing.assert_allclose(result.mean, np.mean(rows, axis=0), rtol=1e-9, atol=1e-14)
    for level, wanted in ((0.0, np.min), (0.5, np.median), (1.0, np.max)):
        np.testing.assert_allclose(result.quantiles[level], wanted(rows, axis=0), rtol=1e-9, atol=1e-14)


def test_differences_depend_on_the_seed_alone() -> None:
    losses = np.arange(20.0)
    first, again, other = (loss_differences(losses, 3, seed).mean for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(loss_differences(torch.arange(20.0), 3).mean, first)


def test_equal_losses_never_move_the_mean() -> None:
    assert loss_differences(np.full(10, 0.1), 4).mean.max() < 1e-17


@pytest.mark.parametrize(
    ("losses", "options", "error"),
    [
        ([1.0], {}, ShapeError),
        ([[1.0, 2.0]], {}, ShapeError),
        (["a", "b"], {}, ShapeError),
        ([1.0, np.nan], {}, NonFiniteError),
        ([1.0, 2.0], {"shuffles": 0}, ReductionError),
        ([1.0, 2.0], {"quantiles": (0.5, 2.0)}, ReductionError),
    ],
)
def test_bad_losses_are_refused(losses: object, options: dict[str, object], error: type[DaghError]) -> None:
    with pytest.raises(error) as caught:
        loss_differences(losses, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


# -- dagh convergence ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["named.npz", "only.npz", "plain.npy"])
def test_the_command_prints_the_table(tmp_path: Path, name: str) -> None:
    losses, path = np.random.default_rng(0).exponential(size=60), tmp_path / name
    if name == "plain.npy":
        np.save(path, losses)
    else:
        arrays = {"losses": losses, "other": losses[:3]} if name == "named.npz" else {"anything": losses}
        np.savez(path, **arrays)
    command = ["convergence", str(path), "--shuffles", "7", "--seed", "3"]
    done = CliRunner(env={"COLUMNS": "120"}).invoke(cli, command)
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.output.splitlines() if line.strip()]
    wanted = loss_differences(losses, 7, 3)
    assert "over 7 orders of 60 samples" in done.output
    assert [row[0] for row in lines[2:]] == ["1", "2", "5", "10", "20", "50", "59"]
    assert lines[-1][1:] == [f"{v[-1]:.3e}" for v in (wanted.mean, *wanted.quantiles.values())]


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "losses.npz"
    np.savez(path, a=np.ones(3), b=np.ones(3))
    for arguments in ([str(path)], [str(tmp_path / "absent.npz")], [str(path), "--shuffles", "0"]):
        done = CliRunner().invoke(cli, ["convergence", *arguments])
        assert done.exit_code == 2, done.output
    done = CliRunner().invoke(cli, ["convergence", str(path)])
    assert done.output.strip().splitlines() == [f"error: {path} has no array named 'losses'; it holds a, b"]
