"""Where the output goes: consoles, progress, files written whole or not at all."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from dagh._cli._group import Failure

_FILE_WIDTH = 120


def console() -> Console:
    """A console on the standard output that never fails on a character the terminal does not know."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    return Console(file=sys.stdout, highlight=False, soft_wrap=False)


def plain(renderable: RenderableType) -> str:
    """The text of a renderable, without colors."""
    out = Console(file=io.StringIO(), width=_FILE_WIDTH, highlight=False, no_color=True, force_terminal=False)
    out.print(renderable)
    assert isinstance(out.file, io.StringIO)
    return "\n".join(line.rstrip() for line in out.file.getvalue().splitlines()) + "\n"


def write(path: Path, text: str) -> None:
    """Write ``text`` whole or not at all; devices and pipes are written directly."""
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            with target.open("w", encoding="utf-8") as stream:
                stream.write(text)
            return
        _replace(target, text)
    except OSError as error:
        raise Failure(f"cannot write {path}: {error.strerror or error}") from None


def _replace(target: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with open(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(name, _mode(target))
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _mode(target: Path) -> int:
    """Permissions of the file that is replaced, else those of a new file."""
    if target.exists():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


class Steps:
    """What is going on, shown on a terminal's stderr alone and wiped at the end."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def start(self, what: str, total: int | None = None) -> None:
        """Begin a step of ``total`` parts (None: unknown)."""
        if self._progress is None:
            return
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(what, total=total)

    def advance(self, by: int = 1) -> None:
        """Count ``by`` parts as done."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, by)


@contextlib.contextmanager
def steps() -> Iterator[Steps]:
    """A progress display, empty when stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield Steps(None)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as progress:
        yield Steps(progress)


def emit(text: str) -> None:
    """Text to the standard output."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    click.echo(text, nl=not text.endswith("\n"))


def deliver(out: Path | None, text: str | None, shown: Callable[[], RenderableType]) -> None:
    """A result to the standard output or into a file: ``text`` where there is one, else what ``shown`` makes.

    On the standard output that is laid out for the width of the terminal.
    """
    if text is None and out is None:
        console().print(shown())
    elif out is None:
        emit(text or "")
    else:
        write(out, plain(shown()) if text is None else text)
