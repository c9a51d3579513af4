"""Statements of other packages: the bounds that architecture plug-ins bring along."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from dagh.errors import DaghError

from ._ladder import Value
from ._rows import Work
from ._statements import STATEMENTS, Needs, Origin, Part, Statement
from ._structure import Absent


def foreign_statements(matches: Iterable[Any]) -> dict[str, tuple[Statement, tuple[Any, ...]]]:
    """Statements with a bound of their own that the matches attach, by id, each with its matches."""
    found: dict[str, tuple[Statement, tuple[Any, ...]]] = {}
    for match in matches:
        for statement in match.statements:
            if not isinstance(statement, Statement) or statement.bound is None:
                continue
            known, before = found.get(statement.id, (statement, ())) if isinstance(statement.id, str) else (None, ())
            fault = _fault(statement)
            if fault is None and known != statement:
                fault = "the id is taken by another statement of a plug-in"
            if fault is None:
                found[statement.id] = (statement, (*before, match))
            else:
                skipped = f"statement {statement.id!r} of the architecture plug-in {match.architecture!r} is skipped"
                warnings.warn(f"{skipped}: {fault}", UserWarning, stacklevel=2)
    return found


def _fault(statement: Statement) -> str | None:
    """Why a foreign statement cannot be a row of a report."""
    for field in ("id", "name", "source", "verdict", "text"):
        if not isinstance(getattr(statement, field), str):
            return f"{field} is a {type(getattr(statement, field)).__name__}, not a text"
    if statement.id in STATEMENTS:
        return f"the library has a statement {statement.id!r} of its own"
    for field, known in (("needs", Needs), ("origin", Origin), ("part", Part)):
        if getattr(statement, field) not in get_args(known):
            return f"{field} = {getattr(statement, field)!r} is none of {', '.join(map(repr, get_args(known)))}"
    return None if callable(statement.bound) else f"bound is a {type(statement.bound).__name__}, not a function"


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
    except (Exception, SystemExit) as error:  # foreign code can fail in any way
        raise Absent(" ".join(f"{type(error).__name__}: {error}".split())) from error
