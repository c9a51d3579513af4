"""Exact second derivatives of neural networks, block by block."""

from dagh import errors
from dagh._blockmatrix import BlockMatrix
from dagh._clarke._limiting import Limiting, LimitingSet
from dagh._clarke._policy import AtKinks
from dagh._clarke._report import KinkReport, kinks
from dagh._clarke._warn import KinkWarning
from dagh._graph import Graph, trace
from dagh._hessian import Decomposition, decompose, functional_hessian, gauss_newton, hessian
from dagh._rules import Call, Rule, register_rule
from dagh._state import State
from dagh._version import __version__
from dagh.errors import DaghError

__all__ = [
    "AtKinks",
    "BlockMatrix",
    "Call",
    "DaghError",
    "Decomposition",
    "Graph",
    "KinkReport",
    "KinkWarning",
    "Limiting",
    "LimitingSet",
    "Rule",
    "State",
    "__version__",
    "decompose",
    "errors",
    "functional_hessian",
    "gauss_newton",
    "hessian",
    "kinks",
    "register_rule",
    "trace",
]
