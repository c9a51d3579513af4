"""A study that takes a fraction of a second, and ways to run it."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from dagh._cli import cli
from dagh.experiments import _measure, _work

METHOD = "fork" if hasattr(os, "fork") and not torch.cuda.is_available() else "spawn"
CONTEXT = multiprocessing.get_context(METHOD)

STUDY = """
name = "tiny"
title = "A tiny study"
seeds = [0, 1]

[axes]
C = [1, 2]

[base]
L = 1

[train]
epochs = 2
batch = 8
together = "never"

[data]
name = "{data}"

[measure]
shuffles = 3
at_k = [4]
term_samples = 0
hessian = false
bounds = false
kinks = false
bootstrap = 0
"""


def write_data(path: Path, samples: int = 40, size: int = 6) -> Path:
    """An .npz file with separable images of three classes."""
    r = np.random.default_rng(0)
    y = np.arange(samples) % 3
    x = r.random((samples, 1, size, size)).astype("f4")
    x[np.arange(samples), 0, y] += 1
    np.savez(path, x=x, y=y)
    return path


def write_study(folder: Path, **changes: str) -> Path:
    """``tiny.toml`` beside its data."""
    text = STUDY.format(data=write_data(folder / "data.npz"))
    for old, new in changes.items():
        text = text.replace(*new.split("->")) if "->" in new else text + f"\n{old} = {new}"
    path = folder / "tiny.toml"
    path.write_text(text)
    return path


def sweep(*arguments: object) -> Result:
    """``dagh sweep …`` in this process, with runs in this process."""
    words = [str(a) for a in arguments]
    if words[0] in ("run", "resume") and "--workers" not in words:
        words += ["--workers", "0"]
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli, ["sweep", *words])


class Started:
    """``dagh sweep …`` in a process of its own: a fork of this one where that is safe, which saves seconds."""

    def __init__(self, log: Path, *arguments: object) -> None:
        self.log = log
        log.touch()
        self.process = CONTEXT.Process(target=_run, args=(log, ["sweep", *map(str, arguments)]))
        self.process.start()

    def wait_for(self, text: str) -> None:
        """Until the log holds ``text``."""
        while text not in self.log.read_text():
            assert self.process.is_alive(), self.log.read_text()
            time.sleep(0.01)

    def end(self, seconds: float = 200) -> int:
        """The exit code."""
        self.process.join(seconds)
        assert self.process.exitcode is not None
        return self.process.exitcode


def _run(log: Path, arguments: list[str]) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    code: object = 1
    try:
        cli.main(arguments)
    except SystemExit as done:
        code = done.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def count_work(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts trainings and measurements from now on."""
    counts = {"train": 0, "measure": 0}
    train, measure = _work.train, _measure.measure

    def counted_train(*args: object, **kw: object) -> bool:
        counts["train"] += 1
        return train(*args, **kw)  # type: ignore[arg-type]

    def counted_measure(*args: object, **kw: object) -> object:
        counts["measure"] += 1
        return measure(*args, **kw)  # type: ignore[arg-type]

    monkeypatch.setattr(_work, "train", counted_train)
    monkeypatch.setattr(_work, "measure", counted_measure)
    return counts
