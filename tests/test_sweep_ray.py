"""Sweeps on a Ray cluster of two machines, simulated on this one; a machine is lost in the middle."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sweep_helpers import sweep, write_study

from dagh.errors import DaghError
from dagh.experiments._runner import Options, Sweep
from dagh.experiments._store import Store
from dagh.experiments._studies import load_study
from dagh.experiments._work import Step


class Watching:
    """Remembers how runs ended, and calls ``first`` when the first one does."""

    def __init__(self, first: Any = None) -> None:
        self.ended: list[str] = []
        self._first = first

    def begin(self, total: int, done: int, cost: float) -> None: ...
    def step(self, step: Step) -> None: ...
    def say(self, text: str) -> None: ...

    def end(self, run: object, status: str, note: str, wall_s: float) -> None:
        self.ended.append(status)
        if self._first is not None and len(self.ended) == 1:
            self._first()


@pytest.fixture(scope="module")
def machines() -> Iterator[Any]:
    """A head without processors, and two machines with one each."""
    pytest.importorskip("ray")
    import ray
    from ray.cluster_utils import Cluster as Simulated

    options = {"object_store_memory": 100_000_000}
    cluster = Simulated(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **options})
    nodes = [cluster.add_node(num_cpus=1, **options) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    yield cluster, nodes
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.ray
def test_a_machine_is_lost_in_the_middle(machines: Any, tmp_path: Path) -> None:
    from dagh.experiments._ray import Cluster

    cluster, nodes = machines
    path = write_study(tmp_path, a="epochs = 2->epochs = 300", b="C = [1, 2]->C = [1, 2, 3]")
    study = load_study(str(path))
    watcher = Watching(first=lambda: cluster.remove_node(nodes.pop(), allow_graceful=False))
    engine = Cluster()
    try:
        store = Store.create(tmp_path / "cluster", study)
        outcome = Sweep(study, store, Options(threads=1), watcher).run(engine)
    finally:
        engine.close()
    assert (outcome.done, outcome.failed, watcher.ended) == (6, 0, ["done"] * 6)
    # The same numbers as on this machine alone.
    assert sweep("run", path, "--out", tmp_path / "here").exit_code == 0
    here = {r.key: r for r in Store(tmp_path / "here").runs()}
    for run in store.runs():
        assert run.scalars["train"] == here[run.key].scalars["train"]
        np.testing.assert_array_equal(run.arrays["mean"], here[run.key].arrays["mean"])


@pytest.mark.ray
def test_failures_on_the_cluster(machines: Any, tmp_path: Path) -> None:
    path = write_study(tmp_path, a="C = [1, 2]->'train.lr' = [1e-3, 1e38]")
    done = sweep("run", path, "--out", tmp_path / "out", "--engine", "ray", "--workers", 0)
    assert done.exit_code == 2 and "--workers is for --engine local" in done.output
    engine_options = ["--engine", "ray", "--address", "auto", "--retries", "1"]
    from click.testing import CliRunner

    from dagh._cli import cli

    done = CliRunner().invoke(cli, ["sweep", "run", str(path), "--out", str(tmp_path / "out"), *engine_options])
    assert done.exit_code == 1, done.output
    assert "2 runs done, 2 failed" in done.output
    assert {r.status for r in Store(tmp_path / "out").runs() if r.value == 1e38} == {"failed"}


@pytest.mark.ray
def test_no_cluster() -> None:
    from dagh.experiments._ray import Cluster

    with pytest.raises(DaghError, match=r"no Ray cluster at 127\.0\.0\.1:1: Connection refused"):
        Cluster("127.0.0.1:1")


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from dagh.experiments._datasets import MissingPackageError
    from dagh.experiments._ray import Cluster

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'dagh\[ray\]'"):
        Cluster()
    for option in ("--address=auto", "--gpus=0.5", "--retries=1"):
        done = sweep("run", "smoke", option, "--out", tmp_path / "out")
        assert done.exit_code == 2 and "needs --engine ray" in done.output
