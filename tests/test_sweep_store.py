"""Results survive what happens to long jobs."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sweep_helpers import CONTEXT

from dagh.errors import FileFormatError
from dagh.experiments import _store
from dagh.experiments._config import DataConfig, NetConfig, StudyConfig, TrainConfig
from dagh.experiments._store import Store, StoreError

BASE = NetConfig(C=2, L=1)
STUDY = StudyConfig(name="s", axes={"C": (2,)}, seeds=(0, 3), base=BASE)


def config(key: str, seed: int = 0, points: list[Any] | None = None) -> dict[str, Any]:
    points = points or [["C", 2]]
    net = {"C": 2, "L": 1, **dict(points)}
    return {"key": key, "seed": seed, "points": points, "net": net, "data": {"name": "digits"}}


def put(store: Store, key: str, value: float = 1.0) -> None:
    store.write_done(config(key), {"train": {"loss": value}}, {"mean": np.full(500, value)}, {"wall_s": 0.5})


def test_round_trip(tmp_path: Path) -> None:
    study = replace(STUDY, axes={"C": (2,), "L": (1,)})
    store = Store.create(tmp_path / "a", study)
    scalars = {"train": {"loss": np.float64(0.5), "list": [1, None]}, "nan": float("nan"), "inf": float("inf")}
    store.write_done(config("k1", 3, [["C", 2], ["L", 1]]), scalars, {"k": np.arange(3), "b": np.eye(2)}, {"host": "h"})
    store.write_failed(config("k2"), "Traceback …\nValueError: no", {})
    first, second, failed, _ = Store(tmp_path / "a").runs()
    assert [(r.axis, r.value) for r in (first, second)] == [("C", 2), ("L", 1)]
    assert (first.key, first.seed, first.dataset, first.status) == ("k1", 3, "digits", "done")
    assert first.scalars["train"] == {"loss": 0.5, "list": [1, None]}
    assert np.isnan(first.scalars["nan"]) and first.scalars["inf"] == float("inf")
    assert sorted(first.arrays) == ["b", "k"] and len(first.arrays) == 2
    np.testing.assert_array_equal(first.arrays["b"], np.eye(2))
    with pytest.raises(KeyError):
        first.arrays["absent"]
    assert (failed.status, failed.error, dict(failed.arrays), failed.scalars) == ("failed", "ValueError: no", {}, {})
    assert (tmp_path / "a/runs/k2/error.txt").read_text() == "Traceback …\nValueError: no"
    assert store.study() == study


def test_the_last_word_on_a_run_counts(tmp_path: Path) -> None:
    store = Store.create(tmp_path, STUDY)
    store.write_failed(config("k"), "ValueError: no", {})
    put(store, "k", 2.0)
    (run,) = store.runs()
    assert (run.status, run.scalars["train"]["loss"]) == ("done", 2.0)
    assert not (tmp_path / "runs/k/error.txt").exists()


def test_what_the_study_asks_for(tmp_path: Path) -> None:
    """After a change of the study, or of the code, old results are kept and not shown."""
    store = Store.create(tmp_path, STUDY)
    for key, seed, point in (("a", 0, ["C", 2]), ("b", 0, ["C", 4]), ("c", 1, ["C", 2]), ("d", 0, ["C", 2])):
        store.write_done(config(key, seed, [point]), {}, {}, {})
    assert [r.key for r in store.runs()] == ["d"]
    assert [r.key for r in store.runs(superseded=True)] == ["a", "b", "c", "d"]
    store.change(StudyConfig(name="s", axes={"C": (4, 2)}, seeds=(0, 1), base=BASE))
    assert [r.key for r in Store(tmp_path).runs()] == ["b", "c", "d"]


def test_weights(tmp_path: Path) -> None:
    store = Store.create(tmp_path, STUDY)
    assert store.weights("w") is None
    store.write_weights("w", {"conv1.weight": np.ones((2, 1, 3, 3), "f4")})
    found = store.weights("w")
    assert found is not None and found["conv1.weight"].dtype == np.float32
    path = tmp_path / "weights/w.npz"
    path.write_bytes(path.read_bytes()[:-30])
    assert store.weights("w") is None  # trained again


def test_a_torn_last_line_is_passed_over_and_closed(tmp_path: Path) -> None:
    store = Store.create(tmp_path, STUDY)
    put(store, "a")
    with open(tmp_path / "manifest.jsonl", "ab") as stream:
        stream.write(b'{"key": "b", "stat')
    assert Store(tmp_path).finished() == {"a"}
    put(Store(tmp_path), "c")
    assert Store(tmp_path).finished() == {"a", "c"}
    with open(tmp_path / "manifest.jsonl", "ab") as stream:
        stream.write(b'\xff\xfe\n[1]\n{"key": "d"}\n')
    assert Store(tmp_path).finished() == {"a", "c"}


def test_lines_that_no_sweep_wrote_are_passed_over(tmp_path: Path) -> None:
    store = Store.create(tmp_path, STUDY)
    put(store, "a")
    strange = [
        {"key": 3, "status": "done"}, {"key": [1], "status": "done"}, {"key": "b", "status": 1}, {"key": "b"}, [1], "x",
        {"key": "b", "status": "done", "points": 3}, {"key": "b", "status": "done", "points": [[1]]},
    ]  # fmt: skip
    with open(tmp_path / "manifest.jsonl", "a") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in strange)
    again = Store(tmp_path)
    assert again.finished() == {"a"} and not again.damaged() and [r.key for r in again.runs()] == ["a"]


def write_forever(folder: Path, name: str, ready: Any) -> None:
    store = Store(folder)
    for i in range(10**6):
        about = config(f"{name}{i}", points=[["C", i]])
        store.write_done(about, {"i": i}, {"a": np.full(2000, i)}, {})
        ready.set()


def whole(store: Store) -> int:
    """The number of runs, every one of them read to its last byte."""
    runs = store.runs(superseded=True)
    for run in runs:
        assert run.scalars["i"] == run.value
        np.testing.assert_array_equal(run.arrays["a"], np.full(2000, run.value))
    return len(runs)


def test_two_writers_killed_in_the_middle(tmp_path: Path) -> None:
    Store.create(tmp_path, STUDY)
    counts = [0]
    for attempt in range(4):
        writers = []
        for name in "xy":
            ready = CONTEXT.Event()
            writers.append(CONTEXT.Process(target=write_forever, args=(tmp_path, f"{attempt}{name}", ready)))
            writers[-1].start()
            assert ready.wait(60)
        time.sleep(0.1 + 0.03 * attempt)
        for writer in writers:
            writer.kill()
            writer.join()
        counts.append(whole(Store(tmp_path)))
        assert counts[-1] > counts[-2] + 2
    put(Store(tmp_path), "after")
    assert len((tmp_path / "manifest.jsonl").read_bytes().splitlines()) >= counts[-1]


@pytest.mark.parametrize("where", ["_put", "_save", "fsync"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    store = Store.create(tmp_path, STUDY)
    put(store, "a")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os if where == "fsync" else _store, where, full)
        with pytest.raises(StoreError, match="No space left on device"):
            put(store, "b")
    assert Store(tmp_path).finished() == {"a"}
    assert list((tmp_path / "tmp").iterdir()) == []
    put(store, "b")
    assert Store(tmp_path).finished() == {"a", "b"}


def test_a_line_that_does_not_fit_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.create(tmp_path, STUDY)
    put(store, "a")
    before = (tmp_path / "manifest.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match="full"):
            store._append({"key": "b", "status": "done"})
    assert (tmp_path / "manifest.jsonl").read_bytes() == before


def test_folders_that_hold_something_else(tmp_path: Path) -> None:
    Store.create(tmp_path / "a", STUDY)
    Store.create(tmp_path / "a", STUDY)  # the same study again
    with pytest.raises(StoreError, match="holds a study with other settings"):
        Store.create(tmp_path / "a", StudyConfig(name="other"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("")
    with pytest.raises(StoreError, match=r"is not empty \(thesis.tex\)"):
        Store.create(tmp_path / "b", STUDY)
    with pytest.raises(FileFormatError, match="holds no study"):
        Store(tmp_path / "b").study()
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        Store.create(tmp_path / "file", STUDY)


def test_a_claim_is_exclusive_and_ends(tmp_path: Path) -> None:
    one, two = Store.create(tmp_path, STUDY), Store(tmp_path)
    claim = one.claim("k")
    assert claim is not None and two.claim("k") is None and two.claim("other") is not None
    claim.release()
    assert two.claim("k") is not None


def test_notes_of_many_writers(tmp_path: Path) -> None:
    store = Store.create(tmp_path, STUDY)
    threads = [threading.Thread(target=Store(tmp_path).add_note, args=("n", {str(i): i})) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.note("n") == {str(i): i for i in range(8)}
    assert store.note("absent") == {}


def test_damaged_files_are_named(tmp_path: Path) -> None:
    store = Store.create(tmp_path, STUDY)
    put(store, "a")
    (tmp_path / "runs/a/result.json").write_text("{")
    with pytest.raises(FileFormatError, match=r"result\.json cannot be read"):
        store.runs()
    (tmp_path / "runs/a/result.json").write_text(json.dumps([1]))
    with pytest.raises(FileFormatError, match="is not a table"):
        store.runs()
    (tmp_path / "runs/a/result.json").write_text("{}")
    with pytest.raises(FileFormatError, match="runs/a lacks what a run has"):
        store.runs()


def test_runs_with_other_settings_are_not_shown(tmp_path: Path) -> None:
    store = Store.create(tmp_path, STUDY)
    put(store, "a")
    store.change(replace(STUDY, train=TrainConfig(epochs=3)))
    assert store.runs() == []
    store.write_done({**config("b"), "train": {"epochs": 3}}, {}, {}, {})
    assert [r.key for r in store.runs()] == ["b"]
    store.change(STUDY)  # and back: the first one again, though the other was written later
    assert [r.key for r in store.runs()] == ["a"]
    for other in (replace(STUDY, base=replace(BASE, k=5)), replace(STUDY, data=DataConfig("mnist"))):
        store.change(other)
        assert store.runs() == []
    store.change(replace(STUDY, axes={"L": (1,)}))  # the same network by another name
    assert [(r.axis, r.value) for r in store.runs()] == [("L", 1)]


def test_a_limit_on_the_data_is_a_setting(tmp_path: Path) -> None:
    study = replace(STUDY, axes={"C": (2,), "data.train": (20, 30)})
    store = Store.create(tmp_path, study)
    for count in (20, 30):
        data = {"name": "digits", "train": count, "test": 9}
        store.write_done({**config(f"k{count}"), "points": [["data.train", count]], "data": data}, {}, {}, {})
    assert [(r.axis, r.value, r.key) for r in store.runs()] == [("data.train", 20, "k20"), ("data.train", 30, "k30")]
