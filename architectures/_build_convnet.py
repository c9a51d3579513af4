"""Convolutional networks in the conventions of the convolutional paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from dagh.errors import ReductionError, ShapeError

from ._layers import Activation, PerAxis, PerLayer, axes, make_activation, per_layer, positive, shown, window_sizes

_PADDING_MODES = ("zeros", "circular", "reflect", "replicate")


class _ConvNet(nn.Sequential):
    """Layers ``conv1``, ``act1``, ``pool1``, …, ``flatten``, ``fc1``, … in the order of the computation."""

    _dims: ClassVar[int]
    _convolution: ClassVar[type[nn.Module]]
    _pools: ClassVar[dict[str, type[nn.Module]]]

    def __init__(
        self,
        L: int,
        C: int | Sequence[int],
        k: PerLayer,
        *,
        size: PerAxis = 28,
        in_channels: int = 1,
        classes: int = 10,
        pool_at: int | Sequence[int] = (),
        pool: str = "max",
        k_pool: PerAxis = 2,
        pool_stride: PerAxis | None = None,
        head: Sequence[int] | None = (),
        stride: PerLayer = 1,
        padding: PerLayer = 0,
        dilation: PerLayer = 1,
        groups: int | Sequence[int] = 1,
        bias: bool = False,
        activation: Activation = "relu",
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        dims, count = self._dims, positive("L", L, 0) + 1
        self.L = L
        self.channels = (positive("in_channels", in_channels), *(c for (c,) in per_layer("C", C, count, 1)))
        self.kernels = per_layer("k", k, count, dims)
        strides = per_layer("stride", stride, count, dims)
        paddings = per_layer("padding", padding, count, dims, 0)
        dilations = per_layer("dilation", dilation, count, dims)
        group_counts = [g for (g,) in per_layer("groups", groups, count, 1)]
        self.pool_at = _pool_positions(pool_at, L, head)
        self.pool, self.k_pool = pool, axes("k_pool", k_pool, dims)
        pool_steps = self.k_pool if pool_stride is None else axes("pool_stride", pool_stride, dims)
        if pool not in self._pools:
            raise ReductionError(f"pool={pool!r}: expected 'max' or 'avg'")
        if padding_mode not in _PADDING_MODES:
            raise ReductionError(f"padding_mode={padding_mode!r}: expected one of {', '.join(_PADDING_MODES)}")
        now = axes("size", size, dims)
        self.size = now
        self.sizes: list[tuple[int, ...]] = []
        for p in range(1, count + 1):
            kernel, step, pad, spacing = self.kernels[p - 1], strides[p - 1], paddings[p - 1], dilations[p - 1]
            _check_padding(p, padding_mode, pad, now)
            now = window_sizes(f"layer {p}: a kernel", now, kernel, step, pad, spacing)
            self.sizes.append(now)
            c_in, c_out, g = self.channels[p - 1], self.channels[p], group_counts[p - 1]
            if c_in % g or c_out % g:
                raise ShapeError(f"layer {p}: {c_in} and {c_out} channels cannot be split into {g} groups")
            layer = self._convolution(c_in, c_out, kernel, step, pad, spacing, g, bias=bias, padding_mode=padding_mode)
            self.add_module(f"conv{p}", layer)
            if p < count or head is not None:
                self.add_module(f"act{p}", make_activation(activation))
            if p in self.pool_at:
                now = window_sizes(f"pooling after layer {p}: a window", now, self.k_pool, pool_steps)
                self.add_module(f"pool{p}", self._pools[pool](self.k_pool, pool_steps))
        self.add_module("flatten", nn.Flatten())
        width = self.channels[-1]
        for n in now:
            width *= n
        self.widths: tuple[int, ...] = (width,)
        if head is not None:
            self.widths += (*(positive("head", h) for h in head), positive("classes", classes))
        for i, (before, after) in enumerate(zip(self.widths, self.widths[1:], strict=False), start=1):
            self.add_module(f"fc{i}", nn.Linear(before, after, bias=bias))
            if i < self.P:
                self.add_module(f"act{count + i}", make_activation(activation))

    @property
    def P(self) -> int:
        """Number of fully connected layers."""
        return len(self.widths) - 1

    @property
    def outputs(self) -> int:
        """Length K of the output z."""
        return self.widths[-1]

    def describe(self) -> dict[str, Any]:
        """The dimensions by the paper's names.

        ``L`` (hidden convolutional layers), ``C`` and ``k`` (the largest number of channels, the input's among them,
        and the largest kernel), ``d`` or ``m``, ``n`` (the output size of layer 1), ``l`` (positions of pooling),
        ``pool`` and ``k_pool`` where there is pooling, ``P`` and ``h`` (fully connected layers, and the widest of
        them) where there is a head, ``K`` outputs and the number of ``parameters``.
        """
        dims: dict[str, Any] = {"L": self.L, "C": max(self.channels), "k": max(max(k) for k in self.kernels)}
        dims.update(zip(("d",) if self._dims == 1 else ("m", "n"), self.sizes[0], strict=True))
        if self.pool_at:
            dims |= {"l": self.pool_at, "pool": self.pool, "k_pool": max(self.k_pool)}
        if self.P:
            dims |= {"P": self.P, "h": max(self.widths)}
        return dims | {"K": self.outputs, "parameters": sum(p.numel() for p in self.parameters())}

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, K]`` of images ``[N, in_channels, *size]``."""
        for layer in self:
            x = layer(x)
        return x

    def extra_repr(self) -> str:
        """The paper's dimensions."""
        return ", ".join(f"{k}={v}" for k, v in self.describe().items())


class ConvNet1d(_ConvNet):
    """The one-dimensional family of the convolutional paper (section V-A): L + 1 convolutions.

    See :class:`ConvNet2d`, which has the same arguments; here ``size`` and the entries of ``k``, ``stride``,
    ``padding``, ``dilation`` and ``k_pool`` are numbers, and inputs are ``[N, in_channels, size]``.
    """

    _dims = 1
    _convolution = nn.Conv1d
    _pools: ClassVar[dict[str, type[nn.Module]]] = {"max": nn.MaxPool1d, "avg": nn.AvgPool1d}


class ConvNet2d(_ConvNet):
    """The two-dimensional family of the convolutional paper (section V-B to V-D).

    Layers 1 … L + 1 are convolutions, an activation after each; pooling follows the activation of the layers in
    ``pool_at``; then come P = len(head) + 1 fully connected layers, activations between them. With ``head=None``
    there is no head: the output z is that of the last convolution, flattened, without an activation. Inputs are
    ``[N, in_channels, *size]``, outputs ``[N, K]``. By default there is neither bias nor padding and the stride is 1,
    as in Theorems 1 and 2. Weights are initialized as PyTorch does.

    Args:
        L: number of hidden convolutional layers, L + 1 convolutions in all.
        C: output channels of every convolution, or a sequence of L + 1.
        k: kernel size, or a sequence of L + 1; an entry may have one number per axis.
        size: of the input images, one number or one per axis.
        in_channels: channels of the input.
        classes: outputs K of the last linear layer; ignored without a head.
        pool_at: layers (from 1) after which to pool; layer L + 1 only where a head follows.
        pool: ``"max"`` or ``"avg"``.
        k_pool: window of the pooling.
        pool_stride: stride of the pooling (default: ``k_pool``, windows side by side).
        head: widths of the hidden fully connected layers; ``None`` for no head.
        stride: as ``k``.
        padding: as ``k``.
        dilation: as ``k``.
        groups: number of groups, or a sequence of L + 1.
        bias: whether every layer has one.
        activation: a name such as ``"relu"`` or ``"tanh"``, or a callable that makes a module.
        padding_mode: ``"zeros"``, ``"circular"``, ``"reflect"`` or ``"replicate"``.

    Raises:
        ShapeError: a kernel or window larger than what is left for it, or groups that do not divide the channels.
        ReductionError: a number out of range, a sequence of the wrong length, an unknown pooling or padding.
        UnknownNameError: an unknown activation.
    """

    _dims = 2
    _convolution = nn.Conv2d
    _pools: ClassVar[dict[str, type[nn.Module]]] = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}


def _pool_positions(pool_at: int | Sequence[int], L: int, head: Sequence[int] | None) -> tuple[int, ...]:
    positions = (pool_at,) if isinstance(pool_at, int) else tuple(pool_at)
    last = L + 1 if head is not None else L
    for p in positions:
        if positive("pool_at", p) > last:
            why = f"there are {L + 1} convolutions" if p > L + 1 else "without a head the last layer is the output"
            raise ReductionError(f"pool_at={p}: {why}, so pooling may follow layers 1 to {last}")
    if len(set(positions)) != len(positions):
        raise ReductionError(f"pool_at={positions}: a layer is named twice")
    return tuple(sorted(positions))


def _check_padding(layer: int, mode: str, padding: tuple[int, ...], size: tuple[int, ...]) -> None:
    """Padding by copies cannot take more of the image than there is."""
    limit = {"circular": 0, "reflect": 1}
    if mode in limit and any(p > n - limit[mode] for p, n in zip(padding, size, strict=True)):
        raise ShapeError(f"layer {layer}: {mode} padding by {shown(padding)} is too much for an input of {shown(size)}")
