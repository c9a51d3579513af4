"""Long lists of cases: some of them with every run, all of them with the slow tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def thinned(cases: Iterable[Any], every: int, name: Callable[[Any], str] | None = None) -> list[Any]:
    """One of ``every`` cases (values, or tuples of them) as it is, the others marked as slow."""
    found = []
    for k, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        marks = [pytest.mark.slow] if k % every else []
        found.append(pytest.param(*values, marks=marks, id=None if name is None else name(case)))
    return found
