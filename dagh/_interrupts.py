"""Telling an exception of the user's code from one that a signal handler raised while it ran."""

from __future__ import annotations

import signal
from types import TracebackType

import torch


def beyond(error: BaseException) -> bool:
    """Whether an error says nothing of the code that was run: memory ran out, or a signal handler raised it."""
    return isinstance(error, torch.OutOfMemoryError) or interrupted(error)


def interrupted(error: BaseException) -> bool:
    """Whether an error comes from a signal handler (a time limit of the user's): it says nothing of what was run."""
    handlers = {getattr(signal.getsignal(s), "__code__", None) for s in signal.valid_signals()} - {None}
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting and handlers:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        waiting += [one.__cause__, one.__context__]
        at: TracebackType | None = one.__traceback__
        while at is not None:
            if at.tb_frame.f_code in handlers:
                return True
            at = at.tb_next
    return False
