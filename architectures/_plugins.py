"""The plug-in interface, and finding the installed plug-ins."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, runtime_checkable

from dagh import Graph

GROUP = "dagh.architectures"


class PluginWarning(UserWarning):
    """An installed architecture plug-in cannot be used."""


@dataclass(frozen=True)
class Match:
    """One occurrence of an architecture in a graph.

    ``layers`` come in the order of the computation, each with the plug-in's ``fields`` as attributes;
    ``source`` is the node that feeds the first layer, ``sink`` the last node that belongs to the match.
    ``dims`` are the dimensions by the names of the literature (``L``, ``C``, ``k``, …). ``statements`` are the
    bounds whose assumptions on the structure the match meets: keys of ``dagh.bounds.STATEMENTS``, or
    ``dagh.bounds.Statement`` objects of the plug-in's own.
    """

    architecture: str
    layers: tuple[Any, ...]
    source: str
    sink: str
    dims: Mapping[str, Any] = field(default_factory=dict)
    statements: tuple[Any, ...] = ()


@runtime_checkable
class Architecture(Protocol):
    """What a plug-in provides."""

    @property
    def name(self) -> str:
        """Short identifier, e.g. ``conv2d``."""

    @property
    def description(self) -> str:
        """One line for listings."""

    @property
    def fields(self) -> Sequence[str]:
        """Attributes that each of a match's layers has."""

    def match(self, graph: Graph) -> list[Match]:
        """Every occurrence in ``graph``, in the order of the computation."""


@dataclass(frozen=True)
class Plugin:
    """An entry point of the group: the architecture, or the reason why it could not be loaded."""

    name: str
    provider: str
    architecture: Architecture | None
    error: str | None = None


def installed() -> list[Plugin]:
    """Every plug-in of the group ``dagh.architectures``, loadable or not, sorted by name."""
    return sorted((_load(e) for e in entry_points(group=GROUP)), key=lambda p: (p.name, p.provider))


def recognize(graph: Graph) -> list[Match]:
    """Every occurrence of an installed architecture in ``graph``.

    A plug-in that cannot be loaded or raises an exception is reported by a :class:`PluginWarning` and
    skipped.
    """
    found: list[Match] = []
    for plugin in installed():
        error = plugin.error
        if plugin.architecture is not None:
            try:
                matches = plugin.architecture.match(graph)
                error = _fault(matches)
                if error is None:
                    found.extend(matches)
            except (Exception, SystemExit) as failure:  # a plug-in's bug must not hide what the others found
                error = _one_line(failure)
        if error is not None:
            message = f"architecture plug-in {plugin.name!r} of {plugin.provider} is skipped: {error}"
            warnings.warn(message, PluginWarning, stacklevel=2)
    return found


def _load(entry: EntryPoint) -> Plugin:
    provider = f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.value
    try:
        loaded = entry.load()
    except (Exception, SystemExit) as failure:  # importing foreign code can fail in any way
        return Plugin(entry.name, provider, None, _one_line(failure))
    if not isinstance(loaded, Architecture) or isinstance(loaded, type):
        kind = f"the class {loaded.__name__}" if isinstance(loaded, type) else f"a {type(loaded).__name__}"
        return Plugin(
            entry.name,
            provider,
            None,
            f"{entry.value} is {kind}, not an object with name, description, fields, match",
        )
    return Plugin(entry.name, provider, loaded)


def _fault(matches: Any) -> str | None:
    """Why what a plug-in returned cannot be used."""
    if not isinstance(matches, (list, tuple)):
        return f"match returned a {type(matches).__name__}, not a list"
    for match in matches:
        if not isinstance(match, Match):
            return f"match returned a list with a {type(match).__name__}, not a Match, in it"
        kinds = {"architecture": str, "layers": Sequence, "dims": Mapping, "statements": Sequence}
        for name, kind in kinds.items():
            value = getattr(match, name)
            if not isinstance(value, kind) or (kind is Sequence and isinstance(value, str)):
                return f"a match has {name} of type {type(value).__name__}"
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
