"""Networks as data: one description, from which the torch module and the plain jax function are both built.

Parameters are in the order of ``named_parameters()`` everywhere, each flattened row-major.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Conv:
    inputs: int
    outputs: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    bias: bool = True


@dataclass(frozen=True)
class Linear:
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Act:
    name: str


@dataclass(frozen=True)
class Pool:
    """Windows of ``size`` × ``size`` side by side; rows and columns left over are dropped."""

    kind: str
    size: int = 2


@dataclass(frozen=True)
class BatchNorm:
    """In eval mode, with fresh statistics (mean 0, variance 1)."""

    channels: int


@dataclass(frozen=True)
class Flatten:
    pass


@dataclass(frozen=True)
class SpatialMean:
    """Global average pooling: ``[N, C, H, W]`` to ``[N, C]``."""


@dataclass(frozen=True)
class TokenMean:
    """``[N, T, d]`` to ``[N, d]``."""


@dataclass(frozen=True)
class Residual:
    body: tuple[Any, ...]
    act: str


@dataclass(frozen=True)
class Encoder:
    """A post-norm transformer encoder layer with softmax attention written out."""

    width: int
    heads: int
    hidden: int
    act: str = "gelu"


Layer: TypeAlias = Conv | Linear | Act | Pool | BatchNorm | Flatten | SpatialMean | TokenMean | Residual | Encoder
EPS = 1e-5

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "elu": nn.ELU,
}


class ResidualModule(nn.Module):
    """``act(x + body(x))``."""

    def __init__(self, layer: Residual) -> None:
        super().__init__()
        self.body = to_torch(layer.body)
        self.act = ACTIVATIONS[layer.act]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.body(x))


class EncoderModule(nn.Module):
    """:class:`Encoder` in torch."""

    def __init__(self, layer: Encoder) -> None:
        super().__init__()
        width = layer.width
        self.heads = layer.heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.up = nn.Linear(width, layer.hidden)
        self.down = nn.Linear(layer.hidden, width)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.act = ACTIVATIONS[layer.act]()

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        size = d // self.heads
        q, k, v = self.in_proj(x).reshape(n, t, 3, self.heads, size).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(size), -1) @ v
        x = self.norm1(x + self.out_proj(mixed.permute(0, 2, 1, 3).reshape(n, t, d)))
        return self.norm2(x + self.down(self.act(self.up(x))))


class TokenMeanModule(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def _module(layer: Layer) -> tuple[str, nn.Module]:
    """A short name and the torch module of one layer."""
    match layer:
        case Conv(i, o, kernel, stride, padding, groups, bias):
            return "conv", nn.Conv2d(i, o, kernel, stride=stride, padding=padding, groups=groups, bias=bias)
        case Linear(i, o):
            return "fc", nn.Linear(i, o)
        case Act(name):
            return name, ACTIVATIONS[name]()
        case Pool(kind, size):
            return "pool", nn.MaxPool2d(size) if kind == "max" else nn.AvgPool2d(size)
        case BatchNorm(channels):
            return "norm", nn.BatchNorm2d(channels, eps=EPS)
        case Flatten():
            return "flatten", nn.Flatten()
        case SpatialMean():
            return "mean", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        case TokenMean():
            return "mean", TokenMeanModule()
        case Residual():
            return "block", ResidualModule(layer)
        case Encoder():
            return "encoder", EncoderModule(layer)


def to_torch(layers: Sequence[Layer]) -> nn.Sequential:
    """The module: ``conv1``, ``relu1``, ``fc1``, … in order, in eval mode."""
    seen: Counter[str] = Counter()
    named: OrderedDict[str, nn.Module] = OrderedDict()
    for layer in layers:
        name, module = _module(layer)
        seen[name] += 1
        named[f"{name}{seen[name]}"] = module
    return nn.Sequential(named).eval()


def to_jax(layers: Sequence[Layer], shapes: Sequence[Sequence[int]]) -> Callable[[Any, Any], Any]:
    """``f(theta, x) -> logits`` in plain jax, for flat parameters ``theta`` [P] with tensors of these ``shapes``."""
    sizes = [math.prod(s) for s in shapes]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]

    def forward(theta: Any, x: Any) -> Any:
        parameters = iter([theta[a : a + n].reshape(s) for a, n, s in zip(starts, sizes, shapes, strict=True)])
        out = _apply(layers, parameters, x)
        if next(parameters, None) is not None:
            raise ValueError("the description uses fewer parameters than the torch module has")
        return out

    return forward


def _apply(layers: Sequence[Layer], parameters: Iterator[Any], x: Any) -> Any:
    for layer in layers:
        x = _layer(layer, parameters, x)
    return x


def _layer(layer: Layer, parameters: Iterator[Any], x: Any) -> Any:
    import jax
    from jax import numpy as jnp

    match layer:
        case Conv():
            weight = next(parameters)
            pad = [(layer.padding, layer.padding)] * 2
            out = jax.lax.conv_general_dilated(
                x,
                weight,
                (layer.stride, layer.stride),
                pad,
                dimension_numbers=("NCHW", "OIHW", "NCHW"),
                feature_group_count=layer.groups,
            )
            return out + next(parameters)[None, :, None, None] if layer.bias else out
        case Linear():
            return _linear(x, parameters)
        case Act(name):
            return _activation(name)(x)
        case Pool(kind, size):
            n, c, h, w = x.shape
            rows, columns = h // size, w // size
            cut = x[:, :, : rows * size, : columns * size].reshape(n, c, rows, size, columns, size)
            return cut.max((3, 5)) if kind == "max" else cut.mean((3, 5))
        case BatchNorm():
            scale = next(parameters) / math.sqrt(1 + EPS)
            return x * scale[None, :, None, None] + next(parameters)[None, :, None, None]
        case Flatten():
            return x.reshape(x.shape[0], -1)
        case SpatialMean():
            return x.mean((2, 3))
        case TokenMean():
            return x.mean(1)
        case Residual():
            return _activation(layer.act)(x + _apply(layer.body, parameters, x))
        case Encoder():
            n, t, d = x.shape
            size = d // layer.heads
            qkv = _linear(x, parameters).reshape(n, t, 3, layer.heads, size).transpose(2, 0, 3, 1, 4)
            weights = jax.nn.softmax(qkv[0] @ jnp.swapaxes(qkv[1], -1, -2) / math.sqrt(size), -1)
            mixed = (weights @ qkv[2]).transpose(0, 2, 1, 3).reshape(n, t, d)
            x = _layer_norm(x + _linear(mixed, parameters), parameters)
            hidden = _activation(layer.act)(_linear(x, parameters))
            return _layer_norm(x + _linear(hidden, parameters), parameters)


def _linear(x: Any, parameters: Iterator[Any]) -> Any:
    weight = next(parameters)
    return x @ weight.T + next(parameters)


def _layer_norm(x: Any, parameters: Iterator[Any]) -> Any:
    centered = x - x.mean(-1, keepdims=True)
    scaled = centered / ((centered**2).mean(-1, keepdims=True) + EPS) ** 0.5
    return scaled * next(parameters) + next(parameters)


def _activation(name: str) -> Callable[[Any], Any]:
    import jax
    from jax import numpy as jnp

    if name == "gelu":
        return lambda x: jax.nn.gelu(x, approximate=False)
    return jnp.tanh if name == "tanh" else getattr(jax.nn, name)


def activation_floats(layers: Sequence[Layer], shape: Sequence[int]) -> int:
    """Numbers that one sample's forward pass leaves behind, for an estimate of a peer's memory."""
    model, total = to_torch(layers), 0

    def count(_: nn.Module, __: Any, output: Tensor) -> None:
        nonlocal total
        total += output.numel()

    handles = [m.register_forward_hook(count) for m in model.modules() if not list(m.children())]
    with torch.no_grad():
        model(torch.zeros(1, *shape))
    for handle in handles:
        handle.remove()
    return total


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets)
