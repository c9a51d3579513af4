"""Statements of other packages: the bounds that architecture plug-ins bring along."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from dagh.errors import DaghError

from ._ladder import Value
from ._rows import Work
from ._statements import Statement
from ._structure import Absent


def foreign_statements(matches: Iterable[Any]) -> dict[str, tuple[Statement, tuple[Any, ...]]]:
    """Statements with a bound of their own that the matches attach, by id, each with its matches."""
    found: dict[str, tuple[Statement, tuple[Any, ...]]] = {}
    for match in matches:
        for statement in match.statements:
            if isinstance(statement, Statement) and statement.bound is not None:
                _, before = found.get(statement.id, (statement, ()))
                found[statement.id] = (statement, (*before, match))
    return found


def foreign_value(work: Work, statement: Statement, matches: Sequence[Any]) -> Value:
    """The least of the bounds that a statement gives for its matches; raises :class:`Absent`."""
    assert statement.bound is not None
    if statement.needs != "weights":
        work.need_data()
    state = work.problem.structure.state
    try:
        return Value(min(float(statement.bound(state, match)) for match in matches))
    except Absent:
        raise
    except DaghError as error:
        raise Absent(" ".join(str(error).split())) from error
    except Exception as error:  # foreign code can fail in any way
        raise Absent(" ".join(f"{type(error).__name__}: {error}".split())) from error
