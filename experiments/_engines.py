"""Where units of work are done: in this process, or in processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from ._work import Done, Failed, Message, Work, execute

ATTEMPTS = 2
"""A unit of work whose process died is begun so often in all."""

Take = Callable[[], Work | None]
"""The next unit of work, or None when there is none left."""


class Engine(Protocol):
    """Does units of work, ``several`` at once."""

    several: bool

    def run(self, take: Take) -> Iterator[Message]:
        """Messages of all units that ``take`` gives, as they come, until it gives None and all are done."""

    def close(self) -> None:
        """Stop, giving up what is in flight."""


class Here:
    """One unit after the other, in this process; messages come at the end of each unit, steps do not come."""

    several = False

    def run(self, take: Take) -> Iterator[Message]:
        """See :class:`Engine`."""
        while (work := take()) is not None:
            held: list[Message] = []
            execute(work, held.append)
            yield from held

    def close(self) -> None:
        """Nothing to stop."""


class _Worker:
    """A process, its pipe, and what it is doing."""

    def __init__(self, number: int, method: str) -> None:
        context: Any = multiprocessing.get_context(method)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, os.getpid()), name=f"sweep-{number}", daemon=True)
        with _interrupts_held_back():
            self.process.start()
        theirs.close()
        self.work: Work | None = None
        self.attempt = 1
        self.open: dict[str, Any] = {}
        self.begun = time.monotonic()

    def give(self, work: Work, attempt: int) -> None:
        self.work, self.attempt, self.begun = work, attempt, time.monotonic()
        self.open = {run.key: run for run in work.runs if run.key in work.wanted}
        self.pipe.send(work)

    def stop(self) -> None:
        if self.work is None:  # it ends by itself, and cleans up
            with contextlib.suppress(OSError):
                self.pipe.send(None)
            self.process.join(5)
        self.pipe.close()
        self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """A process started here is deaf to Ctrl-C from its first instruction on; here it arrives a little later."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    multiprocessing.resource_tracker.ensure_running()  # it lets them through again when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Processes:
    """Processes of this machine. One that dies costs its unit of work a second attempt, and nothing else.

    Args:
        count: processes.
        method: how they are started; ``"fork"`` is quicker than the default and not safe everywhere.
    """

    def __init__(self, count: int, method: str = "spawn") -> None:
        self._count, self._method, self.several = count, method, count > 1
        self._workers: list[_Worker] = []
        self._again: deque[tuple[Work, int]] = deque()

    def run(self, take: Take) -> Iterator[Message]:
        """See :class:`Engine`."""
        exhausted = False
        while True:
            while not exhausted or self._again:
                idle = next((w for w in self._workers if w.work is None), None)
                if idle is None and len(self._workers) >= self._count:
                    break
                work, attempt = self._again.popleft() if self._again else (take(), 1)
                if work is None:
                    exhausted = True
                    continue
                if idle is None:
                    idle = _Worker(len(self._workers), self._method)
                    self._workers.append(idle)
                try:
                    idle.give(work, attempt)
                except OSError:
                    yield from self._lost(idle)
            busy = [w for w in self._workers if w.work is not None]
            if not busy:
                return
            ready = wait([w.pipe for w in busy])
            for worker in busy:
                if worker.pipe in ready:
                    yield from self._receive(worker)

    def _receive(self, worker: _Worker) -> Iterator[Message]:
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            yield from self._lost(worker)
            return
        if message is None:
            worker.work = None
            return
        if isinstance(message, (Done, Failed)):
            worker.open.pop(message.run.key, None)
        yield message

    def _lost(self, worker: _Worker) -> Iterator[Message]:
        """The process is gone: its unit of work is begun again, or counted as failed."""
        self._workers.remove(worker)
        worker.process.join(5)
        work, code = worker.work, worker.process.exitcode
        worker.stop()
        if work is None:
            return
        if worker.attempt < ATTEMPTS:
            from dataclasses import replace

            self._again.append((replace(work, wanted=frozenset(worker.open)), worker.attempt + 1))
            return
        reason = f"the worker process died {ATTEMPTS} times, the last time with {_exit(code)}"
        about = {"wall_s": round(time.monotonic() - worker.begun, 3)}
        for run in worker.open.values():
            yield Failed(run, reason, about)

    def close(self) -> None:
        """See :class:`Engine`."""
        for worker in self._workers:
            worker.stop()
        self._workers.clear()


def _exit(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            return f"{name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
    return f"exit code {code}"


def _serve(pipe: Connection, parent: int) -> None:
    """A worker process: units of work from the pipe until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            work = pipe.recv()
            if work is None:
                return
            try:
                execute(work, pipe.send)
            except OSError:
                return
            except Exception:
                for run in work.runs:
                    if run.key in work.wanted:
                        pipe.send(Failed(run, traceback.format_exc(), {}))
            pipe.send(None)


def _watch(parent: int) -> None:
    """End this process when its parent is gone, in the middle of work if need be."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
