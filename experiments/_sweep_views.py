"""What ``dagh sweep`` prints: the plan of a sweep, and how far one has come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ._config import StudyConfig
from ._nets import build
from ._points import Run
from ._progress import span
from ._runner import Options, Outcome, runs_of
from ._store import Store
from ._studies import load_study, shipped
from ._work import source


def print_studies() -> None:
    """The shipped studies."""
    table = Table(box=None, pad_edge=False)
    for column in ("study", "what it varies", "runs", "data"):
        table.add_column(column, justify="right" if column == "runs" else "left")
    for name in shipped():
        study = load_study(name)
        points = max(1, sum(len(v) for v in study.axes.values()))
        table.add_row(name, escape(study.title), str(points * len(study.seeds)), study.data.name)
    Console(highlight=False).print(table)


def print_plan(study: StudyConfig, options: Options, folder: Path, at_once: str) -> None:
    """Every run that a sweep would do, and where."""
    runs = runs_of(study, options)
    console = Console(highlight=False)
    if not runs:
        console.print(f"shard {options.shard[0]}/{options.shard[1]} is empty: the study has fewer networks than shards")
        return
    done = Store(folder).finished() if folder.is_dir() else set()
    table = Table(box=None, pad_edge=False)
    for column in ("run", "key", "parameters", "state"):
        table.add_column(column, justify="right" if column == "parameters" else "left")
    for run in runs:
        state = "done" if run.key in done else "to do"
        table.add_row(escape(run.label), run.key, f"{_parameters(run, options):,}", state)
    console.print(table)
    data, count = runs[0].data, sum(run.key not in done for run in runs)
    samples = f"{data['train']} training, {data['test']} test samples"
    console.print(
        f"{count} of {len(runs)} runs to do, on {data['name']} ({samples}), "
        f"{runs[0].train.epochs} epochs each; {options.device}, {at_once}; results in {folder}",
        soft_wrap=True,
    )


def _parameters(run: Run, options: Options) -> int:
    found = source(run.source, options.root)
    with torch.device("meta"):
        return sum(p.numel() for p in build(run.net, found.shape, found.classes).parameters())


def print_status(store: Store, study: StudyConfig, runs: Sequence[Run]) -> None:
    """What is done, failed and missing, by point of the study, and why runs failed."""
    console = Console(highlight=False)
    lines = {line["key"]: line for line in store.manifest()}
    known = store.status()
    states = {run.key: known.get(run.key, "missing") for run in runs}
    console.print(f"{escape(study.title or study.name)}, on {escape(study.data.name)}", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for column in ("", "done", "failed", "missing", "mean time"):
        table.add_column(column, justify="right" if column else "left")
    for axis, value in dict.fromkeys(_hashable(point) for run in runs for point in run.points):
        here = [run.key for run in runs if (axis, value) in {_hashable(p) for p in run.points}]
        count = Counter(states[key] for key in here)
        times = [lines[key].get("wall_s", 0.0) for key in here if states[key] == "done"]
        failed = f"[red]{count['failed']}[/]" if count["failed"] else "0"
        mean = span(sum(times) / len(times)) if times else ""
        label = "base" if axis is None else f"{axis}={value}"
        table.add_row(escape(label), str(count["done"]), failed, str(count["missing"] + count["damaged"]), mean)
    console.print(table)
    for run in runs:
        if states[run.key] == "failed":
            where = store.path / "runs" / run.key / "error.txt"
            error = escape(str(lines[run.key].get("error", "")))
            console.print(f"[red]failed[/] {escape(run.label)}: {error} ({where})", soft_wrap=True)
        if states[run.key] == "damaged":
            console.print(
                f"[red]damaged[/] {escape(run.label)}: {escape(store.damage(lines[run.key]) or '')}", soft_wrap=True
            )
    rest = sum(state != "done" for state in states.values())
    more = f"; go on with: dagh sweep resume {store.path}" if rest else ""
    console.print(f"{len(runs) - rest} of {len(runs)} runs done{more}", soft_wrap=True)


def _hashable(point: tuple[str | None, object]) -> tuple[str | None, object]:
    axis, value = point
    return axis, tuple(value) if isinstance(value, list) else value


def conclusion(outcome: Outcome, store: Store) -> str:
    """How a sweep ended, in one line."""
    words = [f"{outcome.done} runs done"]
    if outcome.before:
        words.append(f"{outcome.before} were done before")
    if outcome.elsewhere:
        words.append(f"{outcome.elsewhere} done by another process")
    if outcome.failed:
        words.append(f"{outcome.failed} failed (dagh sweep status {store.path})")
    return f"{', '.join(words)}; results in {store.path}"
