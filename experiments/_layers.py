"""The layers for which there are compiled kernels, and where a network consists of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dagh.architectures import ConvNet2d

#: Channels up to which the compiled kernels are clearly faster than PyTorch's own.
FEW = 24


@dataclass(frozen=True)
class Convolution:
    """A convolution by one pixel, without padding; ``rectified``: a ReLU follows. ``inputs`` is ``(C, H, W)``."""

    inputs: tuple[int, int, int]
    channels: int
    kernel: tuple[int, int]
    rectified: bool

    @property
    def outputs(self) -> tuple[int, int, int]:
        """``(C, H, W)``."""
        _, h, w = self.inputs
        return self.channels, h - self.kernel[0] + 1, w - self.kernel[1] + 1


@dataclass(frozen=True)
class MaxPool:
    """Max-pooling over windows side by side; what is left over at the edges is dropped."""

    inputs: tuple[int, int, int]
    window: tuple[int, int]

    @property
    def outputs(self) -> tuple[int, int, int]:
        """``(C, H, W)``."""
        c, h, w = self.inputs
        return c, h // self.window[0], w // self.window[1]


Layer = Convolution | MaxPool


@dataclass(frozen=True)
class Arrangement:
    """A network's first layers, their convolutions, and the modules that are left."""

    layers: Sequence[Layer]
    convolutions: Sequence[nn.Conv2d]
    rest: Sequence[Any]


def arrangement(model: nn.Module, x: Tensor) -> Arrangement | None:
    """How compiled kernels would take a network on batches like ``x``; ``None``: not all of its convolutions."""
    if type(model) is not ConvNet2d or x.dim() != 4 or any(_hooked(m) for m in model.modules()):
        return None
    kinds = {(t.dtype, t.device.type) for t in (x, *model.parameters())}
    if kinds not in ({(torch.float32, "cpu")}, {(torch.float64, "cpu")}):
        return None
    found = _leading(list(model.children()), (int(x.shape[1]), int(x.shape[2]), int(x.shape[3])))
    whole = found.layers and not any(isinstance(module, nn.Conv2d) for module in found.rest)
    return found if whole else None


def _leading(modules: list[nn.Module], inputs: tuple[int, int, int]) -> Arrangement:
    """The first layers, as far as there are kernels for them."""
    layers: list[Layer] = []
    convolutions: list[nn.Conv2d] = []
    i = 0
    while i < len(modules):
        module = modules[i]
        if type(module) is nn.Conv2d:
            plain = module.stride == module.dilation == (1, 1) and module.padding == (0, 0) and module.groups == 1
            fits = module.in_channels == inputs[0] and _within(module.kernel_size, inputs)
            if not plain or not fits or module.out_channels > FEW:
                break
            rectified = i + 1 < len(modules) and type(modules[i + 1]) is nn.ReLU
            layers.append(Convolution(inputs, module.out_channels, _pair(module.kernel_size), rectified))
            convolutions.append(module)
            i += 1 + rectified
        elif type(module) is nn.MaxPool2d and layers and isinstance(layers[-1], Convolution):
            window = _pair(module.kernel_size)
            apart = _pair(module.stride) == window and _pair(module.padding) == (0, 0)
            if not apart or _pair(module.dilation) != (1, 1) or module.ceil_mode or not _within(window, inputs):
                break
            layers.append(MaxPool(inputs, window))
            i += 1
        else:
            break
        inputs = layers[-1].outputs
    return Arrangement(layers, convolutions, modules[i:])


def _within(window: tuple[int, ...], inputs: tuple[int, int, int]) -> bool:
    return all(k <= n for k, n in zip(window, inputs[1:], strict=True))


def _hooked(module: nn.Module) -> bool:
    """Whether something else happens when the module is called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
