"""The paper's convolutional nets by compiled kernels, where numba is installed: the same sums in another order."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dagh.architectures import ConvNet2d

from ._validate import ConfigError

Step = Callable[[Tensor], Tensor]

#: Channels up to which the compiled kernels are clearly faster than PyTorch's own.
_FEW = 24


@cache
def _kernels() -> Any:
    """The module of the compiled layers, or None where numba is absent or does not fit the other packages."""
    try:
        return importlib.import_module("dagh.experiments._stack")
    except ImportError:
        return None


def compiled() -> bool:
    """Whether there are compiled kernels."""
    return _kernels() is not None


def check_kernels(wanted: str) -> None:
    """Refuse compiled kernels where there are none.

    Raises:
        ConfigError: ``wanted`` is ``"compiled"``, and numba is absent.
    """
    if wanted == "compiled" and not compiled():
        raise ConfigError("train.kernels is 'compiled', which needs numba; pip install 'dagh[fast]'")


def arranged(model: nn.Module, x: Tensor) -> Step:
    """``model`` as a function of batches like ``x`` ``[N, …]``, differentiable once in its parameters.

    That is ``model`` itself, but for a :class:`~dagh.architectures.ConvNet2d` of few channels on a processor. A result
    is good until the next call.
    """
    plain: Step = model
    if not isinstance(model, ConvNet2d) or x.device.type != "cpu" or x.dim() != 4 or not compiled():
        return plain
    if x.dtype not in (torch.float32, torch.float64):
        return plain
    layers, convolutions, rest = _leading(list(model), (int(x.shape[1]), int(x.shape[2]), int(x.shape[3])))
    if not layers:
        return plain
    stack = _kernels().Stack(layers)
    flat = len(rest) > 1 and isinstance(rest[0], nn.Flatten) and isinstance(rest[1], nn.Linear)

    def forward(batch: Tensor) -> Tensor:
        if not len(batch) or batch.requires_grad:
            return plain(batch)
        out: Tensor = stack(batch, [(layer.weight, layer.bias) for layer in convolutions])
        later = rest
        if flat:  # as it lies in memory
            linear: Any = rest[1]
            out, later = (linear.weight @ out).T, rest[2:]
            out = out if linear.bias is None else out + linear.bias
        else:
            out = out.reshape(*stack.outputs, -1).movedim(3, 0).contiguous()
        for layer in later:
            out = layer(out)
        return out

    return forward


def _leading(modules: list[nn.Module], inputs: tuple[int, int, int]) -> tuple[list[Any], list[nn.Conv2d], list[Any]]:
    """The first layers, as far as there are kernels for them; their convolutions; and the modules that are left."""
    made, layers, convolutions, i = _kernels(), [], [], 0
    while i < len(modules):
        module = modules[i]
        if isinstance(module, nn.Conv2d):
            plain = module.stride == module.dilation == (1, 1) and module.padding == (0, 0) and module.groups == 1
            if not plain or module.out_channels > _FEW:
                break
            rectified = i + 1 < len(modules) and type(modules[i + 1]) is nn.ReLU
            layers.append(made.Convolution(inputs, module.out_channels, module.kernel_size, rectified))
            convolutions.append(module)
            i += 1 + rectified
        elif type(module) is nn.MaxPool2d and isinstance(layers[-1] if layers else None, made.Convolution):
            window = _pair(module.kernel_size)
            apart = _pair(module.stride) == window and _pair(module.padding) == (0, 0)
            if not apart or _pair(module.dilation) != (1, 1) or module.ceil_mode:
                break
            layers.append(made.MaxPool(inputs, window))
            i += 1
        else:
            break
        inputs = layers[-1].outputs
    return layers, convolutions, modules[i:]


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
