"""The paper's convolutional nets by compiled kernels, where numba is installed: the same sums in another order."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dagh.architectures import ConvNet2d
from dagh.errors import first_line

from ._config import NetConfig, TrainConfig
from ._validate import ConfigError

Step = Callable[[Tensor], Tensor]

#: Channels up to which the compiled kernels are clearly faster than PyTorch's own.
_FEW = 24


def _import() -> Any:
    return importlib.import_module("dagh.experiments._stack")


@cache
def _kernels() -> Any:
    """The module of the compiled layers, or a line that says why there is none."""
    try:
        return _import()
    except ModuleNotFoundError as error:
        if error.name != "numba":
            raise
        return "numba is not installed: pip install 'dagh[fast]'"
    except Exception as error:  # it does not fit another package, or its library does not load
        return f"numba cannot be imported: {first_line(error)}"


def compiled() -> bool:
    """Whether there are compiled kernels."""
    return not isinstance(_kernels(), str)


def why_not(nets: Iterable[tuple[NetConfig, TrainConfig]]) -> str | None:
    """Why networks that would be trained by compiled kernels are not, where that is for want of numba."""
    missing = _kernels()
    if isinstance(missing, str) and any(train.kernels == "auto" and _suits(net) for net, train in nets):
        return f"{missing}; convolutions of few channels are several times as fast with it"
    return None


def _suits(net: NetConfig) -> bool:
    plain = net.stride == net.dilation == net.groups == 1 and net.padding == 0 and net.activation == "relu"
    return net.family == "conv2d" and plain and net.C <= _FEW and (net.pool == "max" or not net.pool_at)


def check_kernels(wanted: str) -> None:
    """Refuse compiled kernels where there are none.

    Raises:
        ConfigError: ``wanted`` is ``"compiled"``, and numba is absent.
    """
    missing = _kernels()
    if wanted == "compiled" and isinstance(missing, str):
        raise ConfigError(f"train.kernels is 'compiled', and {missing}")


def arranged(model: nn.Module, x: Tensor) -> Step:
    """``model`` as a function of batches like ``x`` ``[N, …]``, differentiable once in its parameters.

    That is ``model`` itself, but for a :class:`~dagh.architectures.ConvNet2d` on a processor all of whose convolutions
    have compiled kernels. Its backward pass belongs before the next call.
    """
    plain: Step = model
    if type(model) is not ConvNet2d or x.dim() != 4 or not compiled() or any(_hooked(m) for m in model.modules()):
        return plain
    like = x.shape[1:], x.dtype, x.device
    kinds = {(t.dtype, t.device.type) for t in (x, *model.parameters())}
    if kinds not in ({(torch.float32, "cpu")}, {(torch.float64, "cpu")}):
        return plain
    layers, convolutions, rest = _leading(list(model.children()), (int(x.shape[1]), int(x.shape[2]), int(x.shape[3])))
    if not layers or any(isinstance(module, nn.Conv2d) for module in rest):
        return plain
    stack = _kernels().Stack(layers)
    flat = len(rest) > 1 and isinstance(rest[0], nn.Flatten) and isinstance(rest[1], nn.Linear)

    def forward(batch: Tensor) -> Tensor:
        if not len(batch) or batch.requires_grad or (batch.shape[1:], batch.dtype, batch.device) != like:
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
        if type(module) is nn.Conv2d:
            plain = module.stride == module.dilation == (1, 1) and module.padding == (0, 0) and module.groups == 1
            fits = module.in_channels == inputs[0] and _within(module.kernel_size, inputs)
            if not plain or not fits or module.out_channels > _FEW:
                break
            rectified = i + 1 < len(modules) and type(modules[i + 1]) is nn.ReLU
            layers.append(made.Convolution(inputs, module.out_channels, module.kernel_size, rectified))
            convolutions.append(module)
            i += 1 + rectified
        elif type(module) is nn.MaxPool2d and isinstance(layers[-1] if layers else None, made.Convolution):
            window = _pair(module.kernel_size)
            apart = _pair(module.stride) == window and _pair(module.padding) == (0, 0)
            if not apart or _pair(module.dilation) != (1, 1) or module.ceil_mode or not _within(window, inputs):
                break
            layers.append(made.MaxPool(inputs, window))
            i += 1
        else:
            break
        inputs = layers[-1].outputs
    return layers, convolutions, modules[i:]


def _within(window: tuple[int, ...], inputs: tuple[int, int, int]) -> bool:
    return all(k <= n for k, n in zip(window, inputs[1:], strict=True))


def _hooked(module: nn.Module) -> bool:
    """Whether something else happens when the module is called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
