"""``dagh sweep``: run a study, look at it, go on with it, report on it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.syntax import Syntax

from ._config import StudyConfig, parse, to_toml
from ._progress import watching
from ._runner import Options, Sweep, runs_of
from ._store import Store, StoreError
from ._studies import load_study, text_of
from ._sweep_options import FOLDER, How, remembered_root, shared
from ._sweep_views import conclusion, print_plan, print_status, print_studies
from ._validate import ConfigError

FAILED, INTERRUPTED = 1, 130
"""Exit codes when a run failed, and when the sweep was interrupted."""

_EXISTING = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group()
def sweep() -> None:
    """Train networks along an axis, and measure how their loss settles."""


@sweep.command()
@click.argument("study")
@click.option("--data", help="Data set: digits, mnist, fashion-mnist, cifar10, or an .npz file.")
@click.option("--out", type=FOLDER, help="Folder of the results (default: results/STUDY-DATA).")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and stop.")
@shared
def run(study: str, data: str | None, out: Path | None, dry_run: bool, overrides: tuple[str, ...], **how: Any) -> None:
    """Run STUDY: a shipped one (dagh sweep list) or a .toml file. Called again, it goes on where it stopped."""
    config = load_study(study, overrides)
    if data is not None:
        config = replace(config, data=replace(config.data, name=data))
    if config.data.name.endswith(".npz"):
        config = replace(config, data=replace(config.data, name=str(Path(config.data.name).resolve())))
    folder = out or Path("results") / f"{config.name}-{Path(config.data.name).stem}"
    chosen = How(**how)
    options = chosen.options(config)
    if dry_run:
        at_once = "on Ray" if chosen.engine == "ray" else f"{max(1, chosen.count(options.device))} at a time"
        print_plan(config, options, folder, at_once)
        return
    runs_of(config, options)  # a study that cannot work leaves no folder behind
    _go(config, Store.create(folder, config), options, chosen)


@sweep.command()
@click.argument("folder", metavar="DIR", type=_EXISTING)
@shared
def resume(folder: Path, overrides: tuple[str, ...], **how: Any) -> None:
    """Do what is missing in DIR, failed runs included.

    With --set the study is changed first: trained networks are kept where only [measure] changes.
    """
    store = Store(folder)
    config = store.study()
    if overrides:
        config = parse(to_toml(config), str(store.study_file), overrides)
    chosen = How(**how)
    options = chosen.options(config, store)
    if overrides:
        runs_of(config, options)
        store.change(config)
    _go(config, store, options, chosen)


@sweep.command("list")
def list_studies() -> None:
    """List the shipped studies."""
    print_studies()


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
@click.argument("folder", metavar="DIR", type=_EXISTING)
@click.option("--data-root", type=FOLDER, help="Folder of the data sets (default: that of the last run).")
def status(folder: Path, data_root: Path | None) -> None:
    """What is done, failed and missing in DIR."""
    store = Store(folder)
    study = store.study()
    print_status(store, study, runs_of(study, Options(root=data_root or remembered_root(store))))


@sweep.command()
@click.argument("folders", metavar="DIR...", nargs=-1, required=True, type=_EXISTING)
@click.option("--out", type=FOLDER, help="Folder of the report (default: DIR/report).")
def report(folders: tuple[Path, ...], out: Path | None) -> None:
    """Figures, tables and claims from the results in DIR..."""
    for folder in folders:
        Store(folder).study()
    try:
        from ._report import report as write
    except ImportError as error:
        raise ConfigError(f"reports are not usable here: {error}") from error
    for path in write(list(folders), out or folders[0] / "report"):
        click.echo(path)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM, which job schedulers send, ends a sweep as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _go(study: StudyConfig, store: Store, options: Options, how: How) -> None:
    """Run, say how it ended, and set the exit code."""
    if options.root is not None and remembered_root(store) != options.root:
        store.add_note("local", {"data_root": str(options.root)})
    engine = how.start(options)
    try:
        with stoppable(), watching() as watcher:
            going = Sweep(study, store, options, watcher)
            try:
                outcome = going.run(engine)
            except KeyboardInterrupt:
                watcher.say(f"interrupted; go on with: dagh sweep resume {store.path}")
                click.get_current_context().exit(INTERRUPTED)
    except StoreError as error:
        raise StoreError(f"{error}; what is finished is kept: dagh sweep resume {store.path}") from error
    finally:
        engine.close()
    click.echo(conclusion(outcome, store))
    if outcome.failed:
        click.get_current_context().exit(FAILED)
