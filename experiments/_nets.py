"""Networks of a study, by their configuration."""

from __future__ import annotations

import math

import torch
from torch import nn

from dagh.architectures import MLP, ConvNet1d, ConvNet2d

from ._config import NetConfig
from ._validate import ConfigError


def build(config: NetConfig, shape: tuple[int, ...], classes: int) -> nn.Module:
    """The network for inputs of ``shape`` (without the sample axis), with weights from torch's generator.

    Raises:
        ConfigError: the family does not take inputs of this shape.
        ShapeError: a kernel or a pooling window does not fit what is left of the input.
    """
    if config.family == "mlp":
        mlp: nn.Module = MLP(
            (config.C,) * config.L,
            inputs=math.prod(shape),
            classes=classes,
            bias=config.bias,
            activation=config.activation,
        )
        return mlp
    dims = 1 if config.family == "conv1d" else 2
    if len(shape) != dims + 1:
        axes = "length" if dims == 1 else "rows, columns"
        raise ConfigError(f"base.family={config.family!r} needs inputs [channels, {axes}]; these are {list(shape)}")
    family = ConvNet1d if dims == 1 else ConvNet2d
    net: nn.Module = family(
        config.L,
        config.C,
        config.k,
        size=shape[1] if dims == 1 else (shape[1], shape[2]),
        in_channels=shape[0],
        classes=classes,
        pool_at=config.pool_at,
        pool=config.pool,
        k_pool=config.k_pool,
        head=config.head,
        stride=config.stride,
        padding=config.padding,
        dilation=config.dilation,
        groups=config.groups,
        bias=config.bias,
        activation=config.activation,
        padding_mode=config.padding_mode,
    )
    return net


def initialized(config: NetConfig, shape: tuple[int, ...], classes: int, seed: int, dtype: torch.dtype) -> nn.Module:
    """The network with the initial weights of ``seed``: those of a fresh generator, whatever ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(config, shape, classes).to(dtype)


def flops(net: nn.Module) -> int:
    """Multiplications and additions of one forward pass of one sample: convolutions and linear layers alone."""
    found, sizes = 0, iter(getattr(net, "sizes", ()))
    for layer in net.modules():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
            found += 2 * layer.weight.numel() * math.prod(next(sizes))
        elif isinstance(layer, nn.Linear):
            found += 2 * layer.weight.numel()
    return found
