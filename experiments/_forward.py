"""The forward pass of the paper's convolutional nets, arranged for a processor: the same sums in another order.

Convolutions of few channels leave most of a processor's vector units idle. Two arrangements help (``docs/sweep.md``):

* few channels: squares of 2 × 2 neighboring pixels become four channels. A convolution with an odd kernel k is then one
  with four times the channels and the kernel (k + 1)/2, zeros among its weights; what comes next stays in this form.
* more channels: they are kept innermost in memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dagh.architectures import ConvNet2d

F = nn.functional

Step = Callable[[Tensor], Tensor]

#: Output channels up to which pixels are folded into channels, and from which on channels are innermost.
_FEW, _MANY = 6, 8
#: Layers, activations among them, from which on folding pays for itself.
_RUN = 6
_ELEMENTWISE = (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, nn.Softplus, nn.ELU)


def arranged(model: nn.Module, x: Tensor) -> Step:
    """``model`` as a function of batches like ``x`` ``[N, …]``, differentiable in its parameters.

    That is ``model`` itself, but for a :class:`~dagh.architectures.ConvNet2d` on a processor, whose convolutions are
    arranged as above. Weights are read now: call this again after they have changed.
    """
    plain: Step = model
    if not isinstance(model, ConvNet2d) or x.device.type != "cpu" or x.dim() != 4:
        return plain
    convolutions = [layer for layer in model if isinstance(layer, nn.Conv2d)]
    if min(layer.out_channels for layer in convolutions) >= _MANY:
        return lambda batch: model(_innermost(batch))
    folded = _leading(list(model), (x.shape[2], x.shape[3]))
    if len(folded) < _RUN:
        return plain
    steps: list[Step] = [_fold]
    for layer in folded:
        steps.append(_folded(layer) if isinstance(layer, nn.Conv2d) else layer)
    steps += [_unfold, *list(model)[len(folded) :]]

    def forward(batch: Tensor) -> Tensor:
        for step in steps:
            batch = step(batch)
        return batch

    return forward


def _leading(layers: list[nn.Module], size: tuple[int, int]) -> list[nn.Module]:
    """The first layers, as far as they can be folded: plain convolutions of even images, elementwise activations."""
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.Conv2d):
            plain = layer.stride == layer.dilation == (1, 1) and layer.padding == (0, 0) and layer.groups == 1
            odd = all(k % 2 and k > 1 for k in layer.kernel_size) and not any(n % 2 for n in size)
            if not plain or not odd or layer.out_channels > _FEW:
                return layers[:i]
            size = (size[0] - layer.kernel_size[0] + 1, size[1] - layer.kernel_size[1] + 1)
        elif type(layer) not in _ELEMENTWISE:
            return layers[:i]
    return layers


def _fold(x: Tensor) -> Tensor:
    return _innermost(F.pixel_unshuffle(x, 2))


def _unfold(x: Tensor) -> Tensor:
    return F.pixel_shuffle(x, 2)


def _folded(layer: nn.Conv2d) -> Step:
    """The layer between folded images: output pixel (r, s) of a square sees the kernel moved by r and s."""
    moved = [F.pixel_unshuffle(F.pad(layer.weight, (s, 1 - s, r, 1 - r)), 2) for r in (0, 1) for s in (0, 1)]
    weight = torch.stack(moved, 1).flatten(0, 1)
    bias = None if layer.bias is None else layer.bias.repeat_interleave(4)
    return lambda x: F.conv2d(x, weight, bias)


def _innermost(x: Tensor) -> Tensor:
    """A copy with the channels innermost, also where there is one, which a mere request would leave as it is."""
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)
