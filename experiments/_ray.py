"""Units of work on a Ray cluster."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

from ._datasets import MissingPackageError
from ._engines import Take
from ._sources import Source
from ._validate import ConfigError
from ._work import Failed, Message, Step, Work, execute, keep_source, source

_POLL_S = 5.0
_ANSWER_S = 10.0


class Cluster:
    """The machines of a Ray cluster. Data travel with the work; results come back to this process, which stores them.

    Ray begins a unit again on another machine when its process or machine is lost, ``retries`` times; a unit lost
    oftener counts as failed.

    Args:
        address: of the cluster (``"auto"``: the one that this machine belongs to); None starts one on this machine.
        cpus: processor cores for each unit of work.
        gpus: GPUs for each unit of work; a fraction lets several share one.
        retries: further attempts after a loss.

    Raises:
        MissingPackageError: ray is not installed.
        ConfigError: there is no cluster at the address.
    """

    several = True

    def __init__(self, address: str | None = None, cpus: float = 1, gpus: float = 0, retries: int = 3) -> None:
        try:
            import ray
        except ImportError as error:
            raise MissingPackageError("--engine ray needs Ray; pip install 'dagh[ray]'") from error
        self._ray: Any = ray
        _check(address)
        self._mine = not ray.is_initialized()
        if self._mine:
            try:
                ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
            except (ConnectionError, ValueError, RuntimeError) as error:
                text = " ".join(str(error).split())
                raise ConfigError(f"no Ray cluster at {address or 'this machine'}: {text}") from error
        self._needs = {"CPU": cpus, "GPU": gpus}
        self._do = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=retries)(_execute)
        self._data: dict[Any, Any] = {}
        self._running: dict[Any, tuple[Work, float]] = {}

    def run(self, take: Take) -> Iterator[Message]:
        """See :class:`Engine`."""
        exhausted = False
        while True:
            while not exhausted and len(self._running) < self._slots():
                work = take()
                if work is None:
                    exhausted = True
                    break
                reference = self._do.remote(work, self._put(work))
                self._running[reference] = work, time.monotonic()
                yield Step(work.label, "on the cluster", 0, 1)
            if not self._running:
                return
            ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=_POLL_S)
            for reference in ready:
                work, begun = self._running.pop(reference)
                yield from self._result(reference, work, begun)

    def _slots(self) -> int:
        """Units at once, one more than fit so that no machine waits; the cluster may grow and shrink."""
        found = self._ray.cluster_resources()
        fits = [found.get(name, 0.0) / need for name, need in self._needs.items() if need]
        return 1 + max(0, int(min(fits, default=1)))

    def _put(self, work: Work) -> Any:
        where = (work.data, work.root)
        if where not in self._data:
            self._data[where] = self._ray.put(source(work.data, work.root))
        return self._data[where]

    def _result(self, reference: Any, work: Work, begun: float) -> Iterator[Message]:
        try:
            yield from self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            text = " ".join(str(error).split())
            reason = f"lost on the cluster: {type(error).__name__}: {text}"
            for run in work.runs:
                if run.key in work.wanted:
                    yield Failed(run, reason, {"wall_s": round(time.monotonic() - begun, 3)})

    def close(self) -> None:
        """See :class:`Engine`."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        if self._mine:
            self._ray.shutdown()


def _check(address: str | None) -> None:
    """Refuse at once an address where nobody answers: Ray itself would try for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if not colon or "//" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except OSError as error:
        raise ConfigError(f"no Ray cluster at {address}: {error.strerror or error}") from error


def _execute(work: Work, data: Source) -> list[Message]:
    """On a machine of the cluster: all messages but the steps."""
    keep_source(work.data, work.root, data)
    messages: list[Message] = []
    execute(work, messages.append)
    return [m for m in messages if not isinstance(m, Step)]
