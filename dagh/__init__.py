"""Exact second derivatives of neural networks, block by block."""

from dagh import errors
from dagh._blockmatrix import BlockMatrix
from dagh._graph import Graph, trace
from dagh._hessian import Decomposition, decompose, functional_hessian, gauss_newton, hessian, plan
from dagh._operator import HessianOperator, operator
from dagh._plan import Plan
from dagh._rules import Call, Rule, register_rule
from dagh._state import State
from dagh._version import __version__
from dagh.errors import DaghError

__all__ = [
    "BlockMatrix",
    "Call",
    "DaghError",
    "Decomposition",
    "Graph",
    "HessianOperator",
    "Plan",
    "Rule",
    "State",
    "__version__",
    "decompose",
    "errors",
    "functional_hessian",
    "gauss_newton",
    "hessian",
    "operator",
    "plan",
    "register_rule",
    "trace",
]
