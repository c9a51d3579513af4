"""What the builders share: arguments given once or per layer, activations, sizes of sliding windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from dagh.errors import ReductionError, ShapeError, UnknownNameError

PerAxis = int | tuple[int, ...]
PerLayer = PerAxis | Sequence[PerAxis]
Activation = str | Callable[[], nn.Module]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "mish": nn.Mish,
    "softsign": nn.Softsign,
    "identity": nn.Identity,
}


def make_activation(activation: Activation) -> nn.Module:
    """A new module of this activation.

    Raises:
        UnknownNameError: a name that is not in the table of activations.
    """
    if not isinstance(activation, str):
        return activation()
    if activation not in _ACTIVATIONS:
        raise UnknownNameError.of("activation", activation, _ACTIVATIONS)
    return _ACTIVATIONS[activation]()


def positive(name: str, value: object, least: int = 1) -> int:
    """``value`` if it is an integer of at least ``least``.

    Raises:
        ReductionError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ReductionError(f"{name}={value!r}: expected an integer of at least {least}")
    return value


def axes(name: str, value: PerAxis, dims: int, least: int = 1) -> tuple[int, ...]:
    """One number per axis, from one for all or one for each.

    Raises:
        ReductionError: another count, or a number below ``least``.
    """
    numbers = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(numbers) != dims:
        raise ReductionError(f"{name}={value!r}: expected one number, or one for each of {dims} axes")
    return tuple(positive(name, n, least) for n in numbers)


def per_layer(name: str, value: PerLayer, count: int, dims: int, least: int = 1) -> list[tuple[int, ...]]:
    """Numbers per axis for each of ``count`` layers, from one setting for all or a sequence with one per layer.

    Raises:
        ReductionError: a sequence of another length, or a number below ``least``.
    """
    if isinstance(value, int):
        return [axes(name, value, dims, least)] * count
    if len(value) != count:
        raise ReductionError(f"{name}={value!r}: expected one number, or a sequence of {count}, one per layer")
    return [axes(name, v, dims, least) for v in value]


def window_sizes(
    what: str,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
) -> tuple[int, ...]:
    """Sizes that a sliding window leaves: ``⌊(n + 2P − (k−1)·dilation − 1) / stride⌋ + 1`` per axis.

    Raises:
        ShapeError: the window is larger than the padded input; ``what`` names the layer.
    """
    left = []
    for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=False):
        room = n + 2 * p - (k - 1) * d - 1
        if room < 0:
            given = shown(size)
            pad = f" padded by {shown(padding[: len(size)])}" if any(padding[: len(size)]) else ""
            wide = f" with dilation {shown(dilation[: len(size)])}" if any(e > 1 for e in dilation) else ""
            raise ShapeError(f"{what} of {shown(kernel)}{wide} does not fit its input of {given}{pad}")
        left.append(room // s + 1)
    return tuple(left)


def shown(sizes: Sequence[int]) -> str:
    """Sizes as a person writes them: ``28×28``."""
    return "×".join(map(str, sizes))
