"""Independent shares of one computation, side by side in threads.

A sweep is a long row of operations on tensors of a few megabytes, which PyTorch's own threads hardly speed up. Ranges
of samples do not depend on each other, so each thread takes one, and every operation runs on its share of the cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Event
from typing import TypeVar

import torch

T = TypeVar("T")

#: Samples below which a share of them is not worth a thread, and flops below which the whole is not.
FEWEST, WORTH = 8, 3e8
#: Flops below which PyTorch's own threads are not worth waking.
LITTLE = 2e7
#: More shares than this would spend their time waiting for Python.
_MOST = 4


class Stopped(Exception):
    """Another share has failed, or the user has interrupted: this one may stop."""


def shares(device: torch.device) -> int:
    """How many shares are worth while: 1 where operations are watched (a dispatch mode is on) or not on a CPU."""
    if device.type != "cpu" or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return 1
    return max(1, min(_MOST, torch.get_num_threads()))


@contextmanager
def few_threads(flops: float) -> Iterator[None]:
    """One of PyTorch's threads where there is little to do: to wake another takes up to milliseconds each time."""
    threads = torch.get_num_threads()
    if threads == 1 or flops >= LITTLE:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def divide(items: Iterable[T], size: Callable[[T], float], count: int) -> list[list[T]]:
    """The items in at most ``count`` groups of similar total size, large ones first."""
    groups: list[list[T]] = [[] for _ in range(count)]
    filled = [0.0] * count
    for item in sorted(items, key=size, reverse=True):
        least = filled.index(min(filled))
        groups[least].append(item)
        filled[least] += size(item)
    return [group for group in groups if group] or [[]]


def side_by_side(tasks: Sequence[Callable[[Event], None]]) -> None:
    """Run the tasks, each in a thread of its own, with PyTorch's threads divided among them.

    Every task gets an event: where it is set, the result is no longer wanted. The first error is raised again.
    """
    if len(tasks) == 1:
        tasks[0](Event())
        return
    threads, enough = torch.get_num_threads(), Event()
    own = max(1, threads // len(tasks))
    gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def run(task: Callable[[Event], None]) -> None:
        torch.set_num_threads(own)  # the setting belongs to the thread
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            task(enough)

    futures: list[Future[None]] = []
    try:
        with ThreadPoolExecutor(len(tasks), thread_name_prefix="dagh") as pool:
            try:
                futures += [pool.submit(run, task) for task in tasks]
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                if not all(f.done() and f.exception() is None for f in futures):
                    enough.set()
    finally:
        torch.set_num_threads(threads)
    errors = [e for f in futures if (e := f.exception()) is not None]
    for error in sorted(errors, key=lambda e: isinstance(e, Stopped)):
        raise error
