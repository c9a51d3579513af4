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
    steps: list[Step] = [_first(convolutions[0])]
    for layer in folded[1:]:
        fresh = type(layer) is nn.ReLU  # what a convolution has just made may be overwritten
        steps.append(_folded(layer) if isinstance(layer, nn.Conv2d) else torch.relu_ if fresh else layer)
    rest = list(model)[len(folded) :]
    if len(rest) > 1 and isinstance(rest[0], nn.Flatten) and isinstance(rest[1], nn.Linear):
        steps += [_flat(rest[1]), *rest[2:]]
    else:
        steps += [_unfold, *rest]

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


def _first(layer: nn.Conv2d) -> Step:
    """The layer from an image to a folded one: by steps of two pixels, once for every pixel of a square."""
    weight, bias = _moved(layer).flatten(0, 1), _repeated(layer)
    return lambda x: F.conv2d(_innermost(x), weight, bias, stride=2)


def _folded(layer: nn.Conv2d) -> Step:
    """The layer between folded images ``[N, 4C, H, W]``, whose channel 4c + 2r + s is pixel (r, s) of the squares."""
    moved = _moved(layer)
    weight = torch.stack([F.pixel_unshuffle(w, 2) for w in moved.unbind(1)], 1).flatten(0, 1)
    bias = _repeated(layer)
    return lambda x: F.conv2d(x, weight, bias)


def _moved(layer: nn.Conv2d) -> Tensor:
    """``[O, 4, I, k+1, k+1]``: pixel (r, s) of a square sees the kernel moved by r and s."""
    return torch.stack([F.pad(layer.weight, (s, 1 - s, r, 1 - r)) for r in (0, 1) for s in (0, 1)], 1)


def _repeated(layer: nn.Conv2d) -> Tensor | None:
    return None if layer.bias is None else layer.bias.repeat_interleave(4)


def _flat(layer: nn.Linear) -> Step:
    """The layer on a flattened image, from a folded one as it lies in memory."""

    def step(x: Tensor) -> Tensor:
        _, c, h, w = x.shape
        weight = layer.weight.reshape(-1, c // 4, h, 2, w, 2).permute(0, 2, 4, 1, 3, 5).flatten(1)
        return F.linear(x.permute(0, 2, 3, 1).flatten(1), weight, layer.bias)

    return step


def _unfold(x: Tensor) -> Tensor:
    return F.pixel_shuffle(x.contiguous(), 2)


def _innermost(x: Tensor) -> Tensor:
    """A copy with the channels innermost, also where there is one, which a mere request would leave as it is."""
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)
