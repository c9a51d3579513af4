"""Architecture plug-ins: which well-known shapes a traced model contains, and their dimensions.

A plug-in is an object with a ``name``, a ``description``, the ``fields`` of its layers and a method
``match(graph) -> list[Match]``, installed under the entry-point group ``dagh.architectures``::

    [project.entry-points."dagh.architectures"]
    my_block = "my_package.blocks:MY_BLOCK"

:func:`recognize` asks all of them; one that cannot be imported, or fails, is reported and skipped. The classes in
:data:`FAMILIES` build what the plug-ins recognize.
"""

from ._attention import Attention, AttentionLayer
from ._build_convnet import ConvNet1d, ConvNet2d
from ._build_others import MLP, AttentionNet, RecurrentNet, ResidualNet2d
from ._convolution import ConvolutionChain, ConvolutionLayer, Pooling
from ._dense import DenseHead, DenseLayer
from ._fact import architecture_line
from ._plugins import GROUP, Architecture, Match, Plugin, PluginWarning, installed, recognize
from ._pooling import PoolingLayer, Poolings
from ._recurrent import Recurrent, RecurrentLayer
from ._residual import Residual, ResidualBlock

#: The classes that build models, by name.
FAMILIES = {c.__name__: c for c in (ConvNet1d, ConvNet2d, MLP, ResidualNet2d, AttentionNet, RecurrentNet)}

__all__ = [
    "FAMILIES",
    "GROUP",
    "MLP",
    "Architecture",
    "Attention",
    "AttentionLayer",
    "AttentionNet",
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
    "PoolingLayer",
    "Poolings",
    "Recurrent",
    "RecurrentLayer",
    "RecurrentNet",
    "Residual",
    "ResidualBlock",
    "ResidualNet2d",
    "architecture_line",
    "installed",
    "recognize",
]
