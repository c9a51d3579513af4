"""Exact second derivatives of neural networks, block by block."""

from dagh import errors
from dagh._atlas import Atlas, atlas
from dagh._blockmatrix import BlockMatrix
from dagh._clarke._limiting import Limiting, LimitingSet
from dagh._clarke._policy import AtKinks
from dagh._clarke._report import KinkReport, kinks
from dagh._clarke._warn import KinkWarning
from dagh._diagonal import diagonal
from dagh._gram import Gram, gram
from dagh._graph import Graph, trace
from dagh._hessian import Decomposition, decompose, functional_hessian, gauss_newton, hessian, plan
from dagh._operator import HessianOperator, operator
from dagh._plan import Plan
from dagh._rules import Call, Rule, register_rule
from dagh._state import State
from dagh._version import __version__
from dagh.errors import DaghError

__all__ = [
    "AtKinks",
    "Atlas",
    "BlockMatrix",
    "Call",
    "DaghError",
    "Decomposition",
    "Gram",
    "Graph",
    "HessianOperator",
    "KinkReport",
    "KinkWarning",
    "Limiting",
    "LimitingSet",
    "Plan",
    "Rule",
    "State",
    "__version__",
    "atlas",
    "decompose",
    "diagonal",
    "errors",
    "functional_hessian",
    "gauss_newton",
    "gram",
    "hessian",
    "kinks",
    "operator",
    "plan",
    "register_rule",
    "trace",
]
