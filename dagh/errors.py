"""Exceptions raised by dagh; every one derives from :class:`DaghError` and carries a one-line message."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "BlockNotComputedError",
    "CaptureError",
    "ConvergenceError",
    "CoupledSamplesError",
    "DaghError",
    "DataError",
    "DtypeError",
    "FileFormatError",
    "KinkError",
    "LossError",
    "MemoryBudgetError",
    "NoParametersError",
    "NonDeterministicError",
    "NonFiniteError",
    "OutputError",
    "RandomnessError",
    "ReductionError",
    "RuleError",
    "ShapeError",
    "SingularError",
    "UnknownNameError",
]


class DaghError(Exception):
    """Base class of every error raised on purpose by dagh."""


class CaptureError(DaghError):
    """The model could not be turned into a graph."""


class OutputError(DaghError):
    """The model returns several tensors, or none, and the one to differentiate is not named."""


class RandomnessError(DaghError):
    """The model draws random numbers (dropout in training mode) and no fixed seed was given."""


class NonDeterministicError(DaghError):
    """Two evaluations of the model on the same inputs differ."""


class NonFiniteError(DaghError):
    """NaN or Inf appeared in the forward pass; the message names the first node."""


class CoupledSamplesError(DaghError):
    """Per-sample quantities were asked of a model or loss whose samples interact."""


class ConvergenceError(DaghError):
    """An iterative method did not reach its tolerance."""


class DataError(DaghError):
    """Batches that cannot be iterated over again, or that change from one pass to the next."""


class LossError(DaghError):
    """The loss is unknown, not scalar, or does not fit the output and targets."""


class ShapeError(DaghError):
    """Tensors whose shapes do not fit together."""


class SingularError(DaghError):
    """A linear system or a determinant of a matrix that is singular, or not positive definite, to rounding."""


class DtypeError(DaghError):
    """A dtype the engine refuses (half precision, complex) or a mixture of dtypes or devices."""


class NoParametersError(DaghError):
    """Nothing to differentiate with respect to."""


class ReductionError(DaghError):
    """An unknown value of ``reduction``, ``blocks``, ``kinks`` or a similar option."""


class RuleError(DaghError):
    """A derivative rule is missing, invalid or was registered twice."""


class MemoryBudgetError(DaghError):
    """The request does not fit the memory budget; the message lists cheaper ways."""


class BlockNotComputedError(DaghError):
    """A block outside the request was asked for."""


class KinkError(DaghError):
    """At a kink the question has no answer, or more answers than can be enumerated."""


class FileFormatError(DaghError):
    """A file is not what it should be."""


class UnknownNameError(DaghError):
    """A parameter, node or module name that does not exist."""

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
        """Build the error for ``name`` with close matches among ``known`` suggested."""
        known = list(known)
        close = get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(repr(c) for c in close)}?" if close else f"known: {_shorten(known)}"
        return cls(f"no {kind} named {name!r}; {hint}")


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error that says something, cut to ``limit`` characters; without one, its type."""
    return next((line.strip()[:limit] for line in str(error).splitlines() if line.strip()), type(error).__name__)


def user_level() -> int:
    """The ``stacklevel`` of the user's own line, for a warning that the caller of this function gives."""
    package = os.path.dirname(os.path.abspath(__file__))
    frame, level = inspect.currentframe(), 0
    while frame is not None and os.path.abspath(frame.f_code.co_filename).startswith(package):
        frame, level = frame.f_back, level + 1
    return level


def _shorten(names: list[str], limit: int = 8) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, … ({len(names)} in all)"
