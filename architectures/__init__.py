"""Architecture plug-ins: which well-known shapes a traced model contains, and their dimensions.

A plug-in is an object with a ``name``, a ``description``, the ``fields`` of its layers and a method
``match(graph) -> list[Match]``, installed under the entry-point group ``dagh.architectures``::

    [project.entry-points."dagh.architectures"]
    my_block = "my_package.blocks:MY_BLOCK"

:func:`recognize` asks all of them; one that cannot be imported, or fails, is reported and skipped.
"""

from ._build_convnet import ConvNet1d, ConvNet2d
from ._convolution import ConvolutionChain, ConvolutionLayer, Pooling
from ._dense import DenseHead, DenseLayer
from ._plugins import GROUP, Architecture, Match, Plugin, PluginWarning, installed, recognize

__all__ = [
    "GROUP",
    "Architecture",
    "ConvNet1d",
    "ConvNet2d",
    "ConvolutionChain",
    "ConvolutionLayer",
    "DenseHead",
    "DenseLayer",
    "Match",
    "Plugin",
    "PluginWarning",
    "Pooling",
    "installed",
    "recognize",
]
