"""Upper bounds that hold by proof: norms of layers, curvature of losses, norms of Hessians.

:func:`report` gives every bound that applies to a model: the published ones as printed and as corrected, and a ladder
from weights alone down to the exact norm. Every function states what it bounds and why; "bound" means an upper bound
up to rounding. What approaches a norm from below (power iteration) is called a lower bound.
"""

from ._convolution import convolution_norm_bound
from ._curvature import Curvature, curvature_of, loss_curvature_bound
from ._differences import (
    corollary_corrected,
    corollary_printed,
    hessian_difference,
    identity_bound,
    lipschitz_bound,
    loss_bound,
    taylor_bound,
)
from ._layers import LayerFacts, convolution_facts, linear_facts
from ._lipschitz import register_lipschitz
from ._lower import norm_lower_bound
from ._matricize import Matricized, matricize
from ._published import Dims, composite, lemma2, lemma3, lemma4, lemma5, theorem1, theorem2
from ._report import BoundReport, BoundRow, report
from ._spectral import gram_bound, spectral_norm
from ._statements import STATEMENTS, Statement

__all__ = [
    "STATEMENTS",
    "BoundReport",
    "BoundRow",
    "Curvature",
    "Dims",
    "LayerFacts",
    "Matricized",
    "Statement",
    "composite",
    "convolution_facts",
    "convolution_norm_bound",
    "corollary_corrected",
    "corollary_printed",
    "curvature_of",
    "gram_bound",
    "hessian_difference",
    "identity_bound",
    "lemma2",
    "lemma3",
    "lemma4",
    "lemma5",
    "linear_facts",
    "lipschitz_bound",
    "loss_bound",
    "loss_curvature_bound",
    "matricize",
    "norm_lower_bound",
    "register_lipschitz",
    "report",
    "spectral_norm",
    "taylor_bound",
    "theorem1",
    "theorem2",
]
