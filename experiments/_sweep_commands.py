"""``dagh sweep``: run a study, look at it, go on with it, report on it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Table

from ._config import StudyConfig, parse, to_toml
from ._engines import Engine, Here, Processes
from ._points import Run
from ._progress import span, watching
from ._runner import Options, Outcome, Sweep, default_workers, device_of, runs_of
from ._store import Store, StoreError
from ._studies import load_study, shipped, text_of
from ._validate import ConfigError

FAILED = 1
"""Exit code when a run failed."""


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


def _shared(command: Any) -> Any:
    """Options of ``run`` and ``resume``."""
    options = [
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change the study: --set train.epochs=2."
        ),
        click.option(
            "--data-root",
            type=click.Path(file_okay=False, path_type=Path),
            help="Folder of the data sets (default: $DAGH_DATA, else data).",
        ),
        click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"])),
        click.option(
            "--workers", type=click.IntRange(min=0), help="Processes; 0: this one. Default: one per core, or per GPU."
        ),
        click.option("--shard", type=Shard(), default=(1, 1), help="Only part I of N of the study, for job arrays."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.group()
def sweep() -> None:
    """Train networks along an axis, and measure how their loss settles."""


@sweep.command()
@click.argument("study")
@click.option("--data", help="Data set: digits, mnist, fashion-mnist, cifar10, or an .npz file.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the results (default: results/STUDY-DATA).",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and stop.")
@_shared
def run(study: str, data: str | None, out: Path | None, dry_run: bool, overrides: tuple[str, ...], **how: Any) -> None:
    """Run STUDY: a shipped one (dagh sweep list) or a .toml file. Called again, it goes on where it stopped."""
    config = load_study(study, overrides)
    if data is not None:
        config = replace(config, data=replace(config.data, name=data))
    folder = out or Path("results") / f"{config.name}-{Path(config.data.name).stem}"
    options, workers = _options(**how)
    if dry_run:
        _print_plan(config, options, folder, workers)
        return
    runs_of(config, options)  # a study that cannot work leaves no folder behind
    _go(config, Store.create(folder, config), options, workers)


@sweep.command()
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@_shared
def resume(folder: Path, overrides: tuple[str, ...], **how: Any) -> None:
    """Do what is missing in DIR, failed runs included.

    With --set the study is changed first: trained networks are kept where only [measure] changes.
    """
    store = Store(folder)
    config = store.study()
    options, workers = _options(**how)
    if overrides:
        config = parse(to_toml(config), str(store.study_file), overrides)
        runs_of(config, options)
        store.change(config)
    _go(config, store, options, workers)


@sweep.command("list")
def list_studies() -> None:
    """List the shipped studies."""
    table = Table(box=None, pad_edge=False)
    for column in ("study", "what it varies", "runs", "data"):
        table.add_column(column, justify="right" if column == "runs" else "left")
    for name in shipped():
        study = load_study(name)
        points = max(1, sum(len(v) for v in study.axes.values()))
        table.add_row(name, escape(study.title), str(points * len(study.seeds)), study.data.name)
    Console().print(table)


@sweep.command()
@click.argument("study")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change the study first.")
@click.option("--resolved", is_flag=True, help="With every default written out.")
def show(study: str, overrides: tuple[str, ...], resolved: bool) -> None:
    """Print STUDY as TOML, to copy and change."""
    config = load_study(study, overrides)
    text = to_toml(config) if resolved or overrides else text_of(study)[0]
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(Syntax(text.rstrip(), "toml", background_color="default"))
    else:
        click.echo(text.rstrip())


@sweep.command()
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--data-root", type=click.Path(file_okay=False, path_type=Path), help="Folder of the data sets.")
def status(folder: Path, data_root: Path | None) -> None:
    """What is done, failed and missing in DIR."""
    store = Store(folder)
    study = store.study()
    _print_status(store, study, runs_of(study, Options(root=data_root)))


@sweep.command()
@click.argument(
    "folders", metavar="DIR...", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the report (default: DIR/report)."
)
def report(folders: tuple[Path, ...], out: Path | None) -> None:
    """Figures, tables and claims from the results in DIR..."""
    for folder in folders:
        Store(folder).study()
    try:
        from ._report import report as write
    except ImportError as error:
        raise ConfigError("this installation has no reports") from error
    for path in write(list(folders), out or folders[0] / "report"):
        click.echo(path)


def _options(data_root: Path | None, device: str, workers: int | None, shard: tuple[int, int]) -> tuple[Options, int]:
    where = device_of(device)
    count = default_workers(where) if workers is None else workers
    threads = max(1, default_workers("cpu") // count) if count else None
    root = data_root.resolve() if data_root is not None else None
    return Options(root=root, device=where, threads=threads, shard=shard), count


def _go(study: StudyConfig, store: Store, options: Options, workers: int) -> None:
    """Run, say how it ended, and set the exit code."""
    engine: Engine = Processes(workers) if workers else Here()
    with watching() as watcher:
        going = Sweep(study, store, options, watcher)
        try:
            outcome = going.run(engine)
        except KeyboardInterrupt:
            watcher.say(f"interrupted; go on with: dagh sweep resume {store.path}")
            raise
        except StoreError as error:
            raise StoreError(f"{error}; what is finished is kept: dagh sweep resume {store.path}") from error
        finally:
            engine.close()
    click.echo(_conclusion(outcome, store))
    if outcome.failed:
        click.get_current_context().exit(FAILED)


def _conclusion(outcome: Outcome, store: Store) -> str:
    words = [f"{outcome.done} runs done"]
    if outcome.before:
        words.append(f"{outcome.before} were done before")
    if outcome.elsewhere:
        words.append(f"{outcome.elsewhere} done by another process")
    if outcome.failed:
        words.append(f"{outcome.failed} failed: dagh sweep status {store.path}")
    return f"{', '.join(words)}; results in {store.path}"


def _print_plan(study: StudyConfig, options: Options, folder: Path, workers: int) -> None:
    runs = runs_of(study, options)
    console = Console(highlight=False)
    store = Store(folder)
    done = {k for k, s in store.status().items() if s == "done"} if folder.is_dir() else set()
    table = Table(box=None, pad_edge=False)
    for column in ("run", "key", "parameters", "state"):
        table.add_column(column, justify="right" if column == "parameters" else "left")
    for one in runs:
        table.add_row(
            escape(one.label), one.key, f"{_parameters(one, options):,}", "done" if one.key in done else "to do"
        )
    console.print(table)
    first = runs[0]
    samples = f"{first.data['train']} training, {first.data['test']} test samples"
    console.print(
        f"{len(runs)} runs on {first.data['name']} ({samples}), "
        f"{first.train.epochs} epochs each; {options.device}, {max(1, workers)} at a time; results in {folder}",
        soft_wrap=True,
    )


def _parameters(run: Run, options: Options) -> int:
    import torch

    from ._nets import build
    from ._work import source

    found = source(run.source, options.root)
    with torch.device("meta"):
        return sum(p.numel() for p in build(run.net, found.shape, found.classes).parameters())


def _print_status(store: Store, study: StudyConfig, runs: Sequence[Run]) -> None:
    console = Console(highlight=False)
    states = store.status()
    lines = {line["key"]: line for line in store.manifest()}
    console.print(f"{escape(study.title or study.name)}, {study.data.name}", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for column in ("", "done", "failed", "missing", "mean time"):
        table.add_column(column, justify="left" if not column else "right")
    points = dict.fromkeys(point for one in runs for point in one.points)
    for axis, value in points:
        here = [one for one in runs if (axis, value) in one.points]
        count = Counter(states.get(one.key, "missing") for one in here)
        times = [lines[one.key].get("wall_s", 0.0) for one in here if states.get(one.key) == "done"]
        failed = f"[red]{count['failed']}[/]" if count["failed"] else "0"
        label = f"{axis}={value}" if axis else "base"
        table.add_row(
            label, str(count["done"]), failed, str(count["missing"]), span(sum(times) / len(times)) if times else ""
        )
    console.print(table)
    for one in runs:
        if states.get(one.key) == "failed":
            error = lines[one.key].get("error", "")
            where = store.path / "runs" / one.key / "error.txt"
            console.print(f"[red]failed[/] {escape(one.label)}: {escape(error)} ({where})", soft_wrap=True)
    total = Counter(states.get(one.key, "missing") for one in runs)
    rest = total["failed"] + total["missing"]
    console.print(
        f"{total['done']} of {len(runs)} runs done" + (f"; go on with: dagh sweep resume {store.path}" if rest else ""),
        soft_wrap=True,
    )
