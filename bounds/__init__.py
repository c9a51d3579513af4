"""Upper bounds that hold by proof: spectral norms of layers, curvature of losses.

Every function states what it bounds and why. "Bound" means an upper bound up to rounding in the dtype of the
argument; power iteration, which approaches a norm from below, is not used.
"""

from ._convolution import convolution_norm_bound
from ._curvature import loss_curvature_bound
from ._spectral import gram_bound, spectral_norm

__all__ = ["convolution_norm_bound", "gram_bound", "loss_curvature_bound", "spectral_norm"]
