"""The public names, loaded when first used: PyTorch takes seconds."""

from . import errors
from ._atlas import Atlas, atlas
from ._blockmatrix import BlockMatrix
from ._blocktables import NormTable
from ._clarke._limiting import Limiting, LimitingSet
from ._clarke._policy import AtKinks
from ._clarke._report import KinkReport, kinks
from ._clarke._warn import KinkWarning
from ._diagonal import diagonal
from ._gram import Gram, gram
from ._graph import Graph, trace
from ._hessian import Decomposition, decompose, functional_hessian, gauss_newton, hessian, plan
from ._operator import HessianOperator, operator
from ._plan import Plan
from ._rules import Call, Rule, register_rule
from ._spectra import Eigenpairs, Estimate, SpectralDensity
from ._state import State
from ._version import __version__
from .errors import DaghError

__all__ = [
    "AtKinks",
    "Atlas",
    "BlockMatrix",
    "Call",
    "DaghError",
    "Decomposition",
    "Eigenpairs",
    "Estimate",
    "Gram",
    "Graph",
    "HessianOperator",
    "KinkReport",
    "KinkWarning",
    "Limiting",
    "LimitingSet",
    "NormTable",
    "Plan",
    "Rule",
    "SpectralDensity",
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
