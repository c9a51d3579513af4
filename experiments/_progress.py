"""What a running sweep shows: nested bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ._points import Run
from ._runner import Watcher
from ._work import Step


class Lines:
    """One line per finished run."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._total = self._count = 0
        self._fresh = self._left = 0.0
        self._start = time.monotonic()

    def begin(self, total: int, done: int, cost: float) -> None:
        """See :class:`Watcher`."""
        self._total, self._count, self._left, self._start = total, done, cost, time.monotonic()
        self.say(f"{total} runs, {done} of them done before" if done else f"{total} runs")

    def step(self, step: Step) -> None:
        """Steps are not shown."""

    def end(self, run: Run, status: str, note: str, wall_s: float) -> None:
        """See :class:`Watcher`."""
        self._count += 1
        self._fresh += run.cost
        self._left = max(0.0, self._left - run.cost)
        left = (time.monotonic() - self._start) / self._fresh * self._left
        eta = f", about {span(left)} left" if left > 1 else ""
        self.say(f"[{self._count}/{self._total}] {run.label}: {status} in {span(wall_s)}{eta}; {note}")

    def say(self, text: str) -> None:
        """See :class:`Watcher`."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()


class Bars:
    """The whole study, and under it what is in flight."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._whole: TaskID | None = None
        self._total = self._count = 0
        self._tasks: dict[str, TaskID] = {}

    def begin(self, total: int, done: int, cost: float) -> None:
        """See :class:`Watcher`. The bar's length is cost, so that the time left is told by it."""
        self._total, self._count = total, done
        self._whole = self._progress.add_task("[bold]runs", total=cost, count=f"{done}/{total}")

    def step(self, step: Step) -> None:
        """See :class:`Watcher`."""
        text = f"  {escape(step.label)}  [dim]{step.phase}"
        if step.label not in self._tasks:
            self._tasks[step.label] = self._progress.add_task(text, total=None, count="")
        total = step.total if step.phase == "training" else None
        count = "" if total is None else f"{step.done}/{total}"
        self._progress.update(self._tasks[step.label], description=text, total=total, completed=step.done, count=count)

    def end(self, run: Run, status: str, note: str, wall_s: float) -> None:
        """See :class:`Watcher`."""
        for label in [
            run.label,
            *[x for x in self._tasks if x.startswith(run.label.rpartition(" ")[0] + " ") and "…" in x],
        ]:
            task = self._tasks.pop(label, None)
            if task is not None:
                self._progress.remove_task(task)
        if self._whole is not None:
            self._count += 1
            self._progress.update(self._whole, advance=run.cost, count=f"{self._count}/{self._total}")
        mark = {"done": "[green]done[/]", "failed": "[red]failed[/]"}.get(status, status)
        self._progress.console.print(f"{escape(run.label)}: {mark} in {span(wall_s)}; {escape(note)}", highlight=False)

    def say(self, text: str) -> None:
        """See :class:`Watcher`."""
        self._progress.console.print(escape(text), highlight=False)


@contextlib.contextmanager
def watching() -> Iterator[Watcher]:
    """Bars where stderr is a terminal, else lines; on stderr, so that stdout holds results alone."""
    console = Console(stderr=True)
    if not sys.stderr.isatty():
        yield Lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TextColumn("[dim]left"),
        TimeRemainingColumn(),
    )
    # The speed is that since the start: runs may take longer than the half minute that Progress looks back.
    with Progress(*columns, console=console, transient=True, speed_estimate_period=math.inf) as progress:
        yield Bars(progress)


def span(seconds: float) -> str:
    """A time for people: ``0.8 s``, ``42 s``, ``3 min 5 s``, ``2 h 10 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextlib.contextmanager
def downloading() -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar per file where stderr is a terminal, else a line per file."""
    console = Console(stderr=True)
    if not sys.stderr.isatty():
        seen: set[str] = set()

        def line(name: str, received: int, total: int | None) -> None:
            if name not in seen:
                seen.add(name)
                size = f" ({total / 1e6:.1f} MB)" if total else ""
                console.print(f"fetching {name}{size}", markup=False, highlight=False, soft_wrap=True)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def bar(name: str, received: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(escape(name), total=total)
            progress.update(tasks[name], completed=received)

        yield bar
