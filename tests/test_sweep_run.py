"""Sweeps from the first run to the last, through every accident."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from sweep_helpers import METHOD, Started, count_work, sweep, write_data, write_study

from dagh.experiments import _engines, _points, _work
from dagh.experiments._engines import Processes
from dagh.experiments._progress import Lines, span
from dagh.experiments._runner import Options, Sweep, runs_of
from dagh.experiments._store import Store
from dagh.experiments._studies import load_study
from dagh.experiments._work import Done, Failed, Step, Trained, Work


class Nobody:
    """A watcher that remembers how runs ended."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    def begin(self, total: int, done: int, cost: float) -> None: ...
    def step(self, step: Step) -> None: ...
    def end(self, run: object, status: str, note: str, wall_s: float) -> None:
        self.ended.append(status)

    def say(self, text: str) -> None: ...


def works(study: Path) -> list[Work]:
    """Units of work of one run each."""
    config = load_study(str(study))
    return [
        Work((run,), frozenset({run.key}), run.source, None, "cpu", 1, False, {}) for run in runs_of(config, Options())
    ]


def test_a_study_from_start_to_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = sweep("run", write_study(tmp_path), "--out", out)
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[0] == "4 runs"
    assert done.output.splitlines()[-1] == f"4 runs done; results in {out}"
    runs = Store(out).runs()
    assert [(r.axis, r.value, r.seed, r.status) for r in runs] == [("C", c, s, "done") for c in (1, 2) for s in (0, 1)]
    for run in runs:
        assert run.config["key"] == run.key and run.dataset == "data"
        assert 0 <= run.scalars["test"]["accuracy"] <= 1
        assert run.arrays["mean"].shape == run.arrays["k"].shape
        about = json.loads((out / "runs" / run.key / "result.json").read_text())["about"]
        assert about["wall_s"] > 0 and about["versions"]["torch"] == torch.__version__
    told = sweep("status", out).output
    assert "4 of 4 runs done" in told
    again = sweep("run", tmp_path / "tiny.toml", "--out", out)
    assert again.output.splitlines()[-1] == f"0 runs done, 4 were done before; results in {out}"


def test_same_seed_same_numbers(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    for out in ("a", "b"):
        torch.rand(7)  # whatever was drawn before
        assert sweep("run", study, "--out", tmp_path / out).exit_code == 0
    first, second = (Store(tmp_path / out).runs() for out in ("a", "b"))
    assert [r.key for r in first] == [r.key for r in second]
    for one, two in zip(first, second, strict=True):
        assert one.scalars["train"] == two.scalars["train"]
        np.testing.assert_array_equal(one.arrays["mean"], two.arrays["mean"])
    assert first[0].scalars["train"] != first[1].scalars["train"]


def test_resume_does_exactly_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert sweep("run", write_study(tmp_path), "--out", out).exit_code == 0
    lines = (out / "manifest.jsonl").read_text().splitlines(keepends=True)
    (out / "manifest.jsonl").write_text("".join([lines[0], lines[2]]))
    missing = {json.loads(line)["key"] for line in (lines[1], lines[3])}
    (out / "weights" / f"{Store(out).runs()[0].config['train_key']}.npz").unlink()  # of a run that is done
    for key in missing:
        train_key = json.loads((out / "runs" / key / "config.json").read_text())["train_key"]
        (out / "weights" / f"{train_key}.npz").unlink()
    counts = count_work(monkeypatch)
    before = {r.key: r.scalars["train"] for r in Store(out).runs()}
    done = sweep("resume", out)
    assert done.output.splitlines()[-1].startswith("2 runs done, 2 were done before")
    assert counts == {"train": 2, "measure": 2}
    after = {r.key: r.scalars["train"] for r in Store(out).runs()}
    assert after.keys() - before.keys() == missing
    assert {k: after[k] for k in before} == before


def test_measuring_anew_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert sweep("run", write_study(tmp_path), "--out", out).exit_code == 0
    losses = sorted(r.scalars["train"]["loss"] for r in Store(out).runs())
    counts = count_work(monkeypatch)
    assert sweep("resume", out, "--set", "measure.shuffles=5").exit_code == 0
    assert counts == {"train": 0, "measure": 4}
    assert Store(out).study().measure.shuffles == 5
    fresh = Store(out).runs()
    assert len(fresh) == 4 and len(Store(out).runs(superseded=True)) == 8
    assert {r.config["measure"]["shuffles"] for r in fresh} == {5}
    assert sorted(r.scalars["train"]["loss"] for r in fresh) == losses
    refused = sweep("run", tmp_path / "tiny.toml", "--out", out)
    assert refused.exit_code == 2 and "holds a study with other settings" in refused.output


def test_a_part_measured_with_other_settings_stands_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert sweep("run", write_study(tmp_path, a="C = [1, 2]->C = [1, 2, 3]"), "--out", out).exit_code == 0
    assert sweep("resume", out, "--set", "train.epochs=3", "--shard", "1/3").exit_code == 0
    assert sweep("report", out).exit_code == 0
    text = (out / "report/report.md").read_text()
    assert "2 finished runs" in text and "**4 runs missing:**" in text and "C=3, seed 1 (tiny)" in text


def test_failed_runs_are_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    out, study = tmp_path / "out", write_study(tmp_path, a="C = [1, 2]->'train.lr' = [1e-3, 1e38]")
    done = sweep("run", study, "--out", out)
    assert done.exit_code == 1
    assert "2 runs done, 2 failed" in done.output
    failed = [r for r in Store(out).runs() if r.status == "failed"]
    assert [(r.axis, r.value) for r in failed] == [("train.lr", 1e38)] * 2
    assert "TrainingError" in (failed[0].error or "")
    assert "Traceback" in (out / "runs" / failed[0].key / "error.txt").read_text()
    told = sweep("status", out).output
    assert "2 of 4 runs done" in told and "TrainingError" in told
    assert sweep("resume", out).exit_code == 1  # tried again


def test_shards_are_a_partition(tmp_path: Path) -> None:
    study = write_study(tmp_path, a="C = [1, 2]->C = [1, 2, 3, 4, 5]")
    whole = {r.key for r in runs_of(load_study(str(study)), Options())}
    parts = [{r.key for r in runs_of(load_study(str(study)), Options(shard=(i, 3)))} for i in (1, 2, 3)]
    assert set().union(*parts) == whole and sum(map(len, parts)) == len(whole) == 10
    for i in (1, 2, 3):
        assert sweep("run", study, "--out", tmp_path / "out", "--shard", f"{i}/3").exit_code == 0
    assert Store(tmp_path / "out").finished() == whole
    for wrong in ("0/3", "4/3", "1", "a/b"):
        assert sweep("run", study, "--shard", wrong).exit_code == 2


def test_seeds_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = write_study(tmp_path, a="epochs = 2->epochs = 2\ndtype = 'float64'")
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert sweep("run", study, "--out", alone).exit_code == 0
    assert sweep("run", study, "--out", together, "--set", "train.together=always").exit_code == 0
    one, two = Store(alone).runs(), Store(together).runs()
    assert [r.key for r in one] == [r.key for r in two]
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a.arrays["mean"], b.arrays["mean"], rtol=1e-9)
    # What is missing of a group is trained with the whole group: the same bits.
    before = {r.key: r.scalars["train"] for r in two}
    lines = (together / "manifest.jsonl").read_text().splitlines(keepends=True)
    (together / "manifest.jsonl").write_text("".join(lines[1:]))
    for path in (together / "weights").iterdir():
        path.unlink()
    monkeypatch.setattr(_work, "train", None)
    done = sweep("resume", together)
    assert "1 runs done, 3 were done before" in done.output
    assert {r.key: r.scalars["train"] for r in Store(together).runs()} == before


def test_what_is_trained_is_never_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed added to a stack, then weights lost: the other nets and their numbers stay as they are."""
    study, out = write_study(tmp_path, a='"never"->"always"'), tmp_path / "out"
    stacks: list[int] = []
    train_together = _work.train_together

    def counted(models: list[object], *rest: object) -> None:
        stacks.append(len(models))
        train_together(models, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(_work, "train_together", counted)
    counts = count_work(monkeypatch)
    assert sweep("run", study, "--out", out).exit_code == 0
    assert (stacks, counts["train"]) == ([2, 2], 0)
    before = {path.name: path.read_bytes() for path in (out / "weights").iterdir()}
    losses = {r.config["train_key"]: r.scalars["train"] for r in Store(out).runs()}
    assert sweep("resume", out, "--set", "seeds=[0, 1, 2]").exit_code == 0
    assert (stacks, counts["train"]) == ([2, 2], 2)  # alone, as there is nothing to stack
    assert {name: (out / "weights" / name).read_bytes() for name in before} == before
    assert sweep("resume", out, "--set", "measure.shuffles=6").exit_code == 0
    assert (stacks, counts["train"]) == ([2, 2], 2)
    now = {r.config["train_key"]: r.scalars["train"] for r in Store(out).runs()}
    assert len(now) == 6 and {key: now[key] for key in losses} == losses
    lost = sorted({r.config["train_key"] for r in Store(out).runs() if r.value == 1})[:2]
    for train_key in lost:
        (out / "weights" / f"{train_key}.npz").unlink()
    assert sweep("resume", out, "--set", "measure.shuffles=7").exit_code == 0
    assert (stacks, counts["train"]) == ([2, 2, 2], 2)  # the two that were lost
    again = {r.config["train_key"]: r.scalars["train"] for r in Store(out).runs()}
    for train_key, found in now.items():
        assert again[train_key]["loss"] == pytest.approx(found["loss"], rel=1e-5)
        assert train_key in lost or again[train_key] == found
    abouts = [json.loads((out / "runs" / r.key / "result.json").read_text())["about"] for r in Store(out).runs()]
    assert sorted(about["together"] for about in abouts) == [1, 1, 1, 1, 2, 2]


def test_stored_weights_are_not_overwritten(tmp_path: Path) -> None:
    """Two sweeps of one folder may train the same net; results were measured at the weights that came first."""
    study = load_study(str(write_study(tmp_path)))
    store = Store.create(tmp_path / "out", study)
    going = Sweep(study, store, Options(), Nobody())
    run = runs_of(study, Options())[0]
    for value in (1.0, 2.0):
        going._handle(Trained(run, {"w": np.full(3, value)}))
    held = store.weights(run.train_key)
    assert held is not None and held["w"].tolist() == [1, 1, 1]
    going._handle(Trained(run, {"w": np.full(4, 3.0)}))  # what was there did not fit the net
    held = store.weights(run.train_key)
    assert held is not None and held["w"].tolist() == [3, 3, 3, 3]


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """Where their data are there, and where they are not."""
    study = write_study(tmp_path)
    files = []
    for name, samples in (("a", 30), ("b", 31)):
        (tmp_path / name).mkdir()
        files.append(write_data(tmp_path / name / "set.npz", samples))
    axes = f"axes={{'data.name' = ['{files[0]}', '{files[1]}']}}"
    limits = ("--set", "data.train=20", "--set", "data.test=5")
    assert sweep("run", study, "--set", axes, *limits, "--set", "seeds=[0]", "--out", tmp_path / "out").exit_code == 0
    store = Store(tmp_path / "out")
    for _ in range(2):
        first, second = store.runs()
        assert [r.value for r in (first, second)] == [str(f) for f in files]
        assert first.key != second.key and first.scalars["train"]["loss"] != second.scalars["train"]["loss"]
        for r in (first, second):
            assert r.config["points"] == [["data.name", r.value]]
        for file in files:
            file.unlink(missing_ok=True)


def test_other_data_in_the_same_file(tmp_path: Path) -> None:
    """A report says what ``status`` says: old runs are named and left out, and theirs are missing."""
    pytest.importorskip("matplotlib")
    study, out, text = write_study(tmp_path), tmp_path / "out", tmp_path / "out/report/report.md"
    assert sweep("run", study, "--out", out).exit_code == 0
    old = {r.key for r in Store(out).runs()}
    file = tmp_path / "data.npz"
    with np.load(file) as held:
        np.savez(file, x=held["x"][::-1], y=held["y"][::-1])
    _work._sources.clear()  # of this process, which a command has of its own
    assert "0 of 4 runs done" in sweep("status", out).output
    refused = sweep("report", out)
    assert refused.exit_code == 2 and len(refused.output.splitlines()) == 1
    assert f"no finished run to report on; 4 of other data (C=1, seed 0 (tiny): {file} has other samples now)" in (
        refused.output
    )
    assert sweep("resume", out, "--shard", "1/2").exit_code == 0
    assert sweep("report", out).exit_code == 0
    told = text.read_text()
    assert "2 finished runs" in told and "**2 runs of other data:**" in told and "**2 runs missing:**" in told
    assert f"- C=2, seed 1 (tiny): {file} has other samples now" in told
    assert told.count("## Channels") == 1  # one panel
    assert not old & {r.key for r in Store(out).runs()}
    damaged = Store(out).path / "runs" / sorted(old)[0] / "result.json"
    damaged.write_text("{}")  # of no interest any more
    assert sweep("resume", out).exit_code == 0
    assert sweep("report", out).exit_code == 0
    assert "of other data" not in text.read_text() and "missing" not in text.read_text()
    file.unlink()  # nobody can tell any more
    bad = Store(out).damaged()
    assert len(Store(out).runs(without=bad)) == 4 and Store(out).outdated(without=bad) == []


def test_classes_that_do_not_begin_at_0_are_pointed_out(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    with np.load(tmp_path / "data.npz") as held:
        np.savez(tmp_path / "data.npz", x=held["x"], y=held["y"] + 1)
    lines = sweep("run", study, "--out", tmp_path / "out").output.splitlines()
    found = [line for line in lines if "the smallest class of the training samples is 1, not 0" in line]
    assert len(found) == 1 and found[0].endswith("the nets tell 4 classes apart, some of which have no samples")


def test_the_trial_is_remembered(tmp_path: Path) -> None:
    study = write_study(tmp_path, a='"never"->"auto"\nkernels = "torch"')
    out = tmp_path / "out"
    first = sweep("run", study, "--out", out)
    assert first.exit_code == 0 and first.output.count("ms a step alone") == 2
    trials = Store(out).note("trials")
    assert len(trials) == 2
    (out / "manifest.jsonl").unlink()
    again = sweep("resume", out)
    assert "4 runs done" in again.output and "ms a step alone" not in again.output
    assert Store(out).note("trials") == trials


def test_compiled_kernels_need_no_trial(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    done = sweep("run", write_study(tmp_path, a='"never"->"auto"'), "--out", tmp_path / "out")
    assert done.exit_code == 0 and "ms a step alone" not in done.output
    abouts = [json.loads(path.read_text())["about"] for path in (tmp_path / "out" / "runs").glob("*/result.json")]
    assert [(about["together"], about["compiled"]) for about in abouts] == [(1, True)] * 4


def test_a_dry_run_does_nothing(tmp_path: Path) -> None:
    done = sweep("run", write_study(tmp_path), "--out", tmp_path / "out", "--dry-run")
    assert done.exit_code == 0
    assert "4 of 4 runs to do, on data (32 training, 8 test samples), 2 epochs each" in done.output
    assert not (tmp_path / "out").exists()


def test_an_empty_shard_is_said_to_be_empty(tmp_path: Path) -> None:
    done = sweep("run", write_study(tmp_path), "--out", tmp_path / "out", "--shard", "9/9", "--dry-run")
    assert (done.exit_code, done.output.splitlines()[0][:22]) == (0, "shard 9/9 is empty: th")


@pytest.mark.parametrize("name", ["result.json", "arrays.npz", "", "inside"])
def test_a_damaged_run_is_named_left_out_and_done_again(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert sweep("run", write_study(tmp_path), "--out", out).exit_code == 0
    folder = out / "runs" / Store(out).runs()[0].key
    if name == "inside":  # readable as an archive, and one of the arrays is not what was written
        whole = bytearray((folder / "arrays.npz").read_bytes())
        with zipfile.ZipFile(folder / "arrays.npz") as file:
            start = file.infolist()[0].header_offset
        whole[start + 60] ^= 255
        (folder / "arrays.npz").write_bytes(whole)
    elif name:
        (folder / name).write_text("{}")
    else:
        shutil.rmtree(folder)
    told = sweep("status", out).output
    assert "3 of 4 runs done" in told and "damaged C=1, seed 0" in told
    assert sweep("report", out).exit_code == 0
    text = (out / "report/report.md").read_text()
    assert f"- {folder.name}: " in text and "1 run damaged" in text and "missing" not in text
    assert "1 runs done, 3 were done before" in sweep("resume", out).output
    assert len(Store(out).runs()) == 4


def test_a_failed_run_without_its_folder_does_not_stop_the_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert sweep("run", write_study(tmp_path), "--out", out).exit_code == 0
    run = Store(out).runs()[0]
    Store(out).write_failed(run.config, "ValueError: no", {})
    shutil.rmtree(out / "runs" / run.key)
    assert "damaged C=1, seed 0" in sweep("status", out).output
    assert sweep("report", out).exit_code == 0
    assert "1 run damaged" in (out / "report/report.md").read_text()
    assert "1 runs done, 3 were done before" in sweep("resume", out).output


# -- processes -------------------------------------------------------------------------------------


def test_a_worker_that_dies_gets_a_second_chance(tmp_path: Path) -> None:
    engine, pending = Processes(1, METHOD), iter(works(write_study(tmp_path))[:2])
    messages, deaths = [], 0
    try:
        for message in engine.run(lambda: next(pending, None)):
            messages.append(message)
            if isinstance(message, Step) and deaths < 1:
                deaths += 1
                os.kill(engine._workers[0].process.pid or 0, signal.SIGKILL)
    finally:
        engine.close()
    assert deaths == 1
    assert [type(m) for m in messages if not isinstance(m, Step)].count(Done) == 2
    assert not any(isinstance(m, Failed) for m in messages)


def test_a_worker_that_always_dies_costs_its_run_alone(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    pending = iter(works(study)[:2])
    engine, first, ended = Processes(1, METHOD), works(study)[0], []
    try:
        for message in engine.run(lambda: next(pending, None)):
            if isinstance(message, Step) and message.label == first.label and engine._workers:
                os.kill(engine._workers[0].process.pid or 0, signal.SIGKILL)
            elif isinstance(message, (Done, Failed)):
                ended.append(message)
    finally:
        engine.close()
    assert [type(m) for m in ended] == [Failed, Done]
    assert isinstance(ended[0], Failed) and "died 2 times, the last time with SIGKILL" in ended[0].error


def test_killed_and_begun_twice_at_once(tmp_path: Path) -> None:
    """kill -9 in the middle, then two sweeps of the same folder: every run is done once, nothing is left behind."""
    out = tmp_path / "out"
    study = write_study(tmp_path, a="C = [1, 2]->C = [1, 2, 3, 4]", b="epochs = 2->epochs = 30")
    first = Started(tmp_path / "log", "run", study, "--out", out, "--workers", 0)
    first.wait_for("[1/8]")
    first.process.kill()
    first.process.join()
    done = Store(out).finished()
    assert 1 <= len(done) < 8
    both = [Started(tmp_path / f"log{i}", "resume", out, "--workers", 0) for i in (1, 2)]
    assert [s.end() for s in both] == [0, 0]
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert len(lines) == len({line["key"] for line in lines}) == 8
    assert {line["status"] for line in lines} == {"done"}
    fresh = [int(s.log.read_text().splitlines()[-1].split(" runs done")[0]) for s in both]
    assert sum(fresh) == 8 - len(done)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(tmp_path: Path, how: signal.Signals) -> None:
    out = tmp_path / "out"
    study = write_study(tmp_path, a="epochs = 2->epochs = 100000")
    going = Started(tmp_path / "log", "run", study, "--out", out, "--workers", 0)
    going.wait_for("4 runs")
    time.sleep(0.3)
    os.kill(going.process.pid or 0, how)
    assert going.end() == 130
    told = going.log.read_text()
    assert f"interrupted; go on with: dagh sweep resume {out}" in told and "Traceback" not in told
    assert sum(line.startswith("interrupted") for line in told.splitlines()) == 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_worker_is_deaf_to_interrupts_while_it_starts() -> None:
    worker = _engines._Worker(0, "spawn")
    try:
        held = {}
        for line in Path(f"/proc/{worker.process.pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            held[name] = value
        deaf = int(held["SigBlk"], 16) | int(held["SigIgn"], 16)
        assert deaf & 1 << (signal.SIGINT - 1)
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        worker.stop()


# -- one unit --------------------------------------------------------------------------------------


def test_messages_of_a_unit(tmp_path: Path) -> None:
    (work, *_) = works(write_study(tmp_path))
    messages: list[object] = []
    _work.execute(work, messages.append)
    kinds = [type(m) for m in messages]
    assert kinds[-1] is Done and kinds.count(Trained) == 1 and kinds[0] is Step


def test_a_sweep_without_a_watcher_that_sees_it(tmp_path: Path) -> None:
    study = load_study(str(write_study(tmp_path)))
    watcher = Nobody()
    engine = Processes(2, METHOD)
    try:
        outcome = Sweep(study, Store.create(tmp_path / "out", study), Options(threads=1), watcher).run(engine)
    finally:
        engine.close()
    assert (outcome.done, outcome.failed, watcher.ended) == (4, 0, ["done"] * 4)


def test_the_longest_runs_come_first_where_there_are_several_at_once(tmp_path: Path) -> None:
    study = load_study(str(write_study(tmp_path, C="C = [1, 2]->C = [1, 3, 2]")))

    class Listed:
        """Takes everything, does nothing."""

        def __init__(self, several: bool) -> None:
            self.several = several
            self.taken: list[int] = []

        def run(self, take: Any) -> Iterator[Any]:
            while (work := take()) is not None:
                self.taken += [run.net.C for run in work.runs]
            yield from ()

        def close(self) -> None: ...

    for several, expected in ((False, [1, 3, 2]), (True, [3, 2, 1])):
        engine = Listed(several)
        Sweep(study, Store.create(tmp_path / str(several), study), Options(), Nobody()).run(engine)
        assert list(dict.fromkeys(engine.taken)) == expected


def test_the_time_left_is_told_by_the_cost_of_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for constant in ("_STEP", "_RUN"):  # what these small networks mostly cost
        monkeypatch.setattr(_points, constant, 0.0)
    runs = runs_of(
        load_study(str(write_study(tmp_path, C="C = [1, 2]->C = [1, 8]", seeds="seeds = [0, 1]->seeds = [0]"))),
        Options(),
    )
    short, long = runs
    assert long.cost > 4 * short.cost
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    out = io.StringIO()
    lines = Lines(Console(file=out, width=200))
    lines.begin(2, 0, short.cost + long.cost)
    now[0] = 1000.0
    lines.end(long, "done", "", 1000.0)
    seconds = 1000 * short.cost / long.cost
    assert f"about {span(seconds)} left" in out.getvalue()
