"""Small families beside the convolutional ones: dense, residual, attention, recurrent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from dagh.errors import ReductionError, ShapeError

from ._layers import Activation, PerAxis, axes, make_activation, positive, window_sizes


class MLP(nn.Sequential):
    """A multilayer perceptron in the conventions of the papers: P linear layers, an activation between any two.

    Inputs ``[N, …]`` are flattened to ``[N, inputs]``; outputs are ``[N, classes]``.

    Args:
        head: widths of the hidden layers.
        inputs: elements of one sample.
        classes: outputs.
        bias: whether every layer has one.
        activation: a name such as ``"relu"``, or a callable that makes a module.

    Raises:
        ReductionError: a width below 1.
        UnknownNameError: an unknown activation.
    """

    def __init__(
        self,
        head: Sequence[int] = (32,),
        *,
        inputs: int = 784,
        classes: int = 10,
        bias: bool = False,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        hidden = [positive("head", h) for h in head]
        self.widths = (positive("inputs", inputs), *hidden, positive("classes", classes))
        self.add_module("flatten", nn.Flatten())
        for p in range(1, len(self.widths)):
            self.add_module(f"fc{p}", nn.Linear(self.widths[p - 1], self.widths[p], bias=bias))
            if p < len(self.widths) - 1:
                self.add_module(f"act{p}", make_activation(activation))

    def describe(self) -> dict[str, Any]:
        """``P`` layers, the largest width ``h``, ``K`` outputs, number of ``parameters``."""
        return {"P": len(self.widths) - 1, "h": max(self.widths), "K": self.widths[-1], "parameters": _count(self)}


class ResidualBlock2d(nn.Module):
    """``act(s(x) + f(x))``: f has ``depth`` convolutions; s is the identity, or a 1×1 convolution if sizes change."""

    def __init__(
        self,
        before: int,
        after: int,
        k: int,
        *,
        stride: int,
        depth: int,
        norm: bool,
        bias: bool,
        activation: Activation,
    ) -> None:
        super().__init__()
        self.branch = nn.Sequential()
        for i in range(1, depth + 1):
            c, s = (before, stride) if i == 1 else (after, 1)
            self.branch.add_module(f"conv{i}", nn.Conv2d(c, after, k, s, k // 2, bias=bias))
            if norm:
                self.branch.add_module(f"norm{i}", nn.BatchNorm2d(after))
            if i < depth:
                self.branch.add_module(f"act{i}", make_activation(activation))
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or before != after:
            self.shortcut = nn.Conv2d(before, after, 1, stride, bias=bias)
        self.act = make_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, before, m, n]`` to ``[N, after, ⌈m/stride⌉, ⌈n/stride⌉]``."""
        result: Tensor = self.act(self.shortcut(x) + self.branch(x))
        return result


class ResidualNet2d(nn.Sequential):
    """A small residual network: a convolution, L blocks, the mean over all positions, a linear layer.

    Args:
        L: number of blocks.
        C: channels.
        k: kernel size, odd.
        size: of the images.
        in_channels: channels of the images ``[N, in_channels, *size]``.
        classes: outputs.
        depth: convolutions in a block.
        halve_at: blocks (from 1) that halve the sizes and double the channels.
        norm: whether batch normalization follows every convolution of a branch.
        bias: whether convolutions and the linear layer have one.
        activation: a name such as ``"relu"``, or a callable that makes a module.

    Raises:
        ReductionError: a number out of range, an even kernel.
        UnknownNameError: an unknown activation.
    """

    def __init__(
        self,
        L: int,
        C: int,
        k: int = 3,
        *,
        size: PerAxis = 28,
        in_channels: int = 1,
        classes: int = 10,
        depth: int = 2,
        halve_at: Sequence[int] = (),
        norm: bool = False,
        bias: bool = False,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        positive("L", L)
        if positive("k", k) % 2 == 0:
            raise ReductionError(f"k={k}: a residual branch keeps the size of its input, so its kernels are odd")
        for b in halve_at:
            if positive("halve_at", b) > L:
                raise ReductionError(f"halve_at={b}: there are {L} blocks")
        self.L, self.k, self.depth = L, k, positive("depth", depth)
        now = axes("size", size, 2)
        self.add_module(
            "stem", nn.Conv2d(positive("in_channels", in_channels), positive("C", C), k, 1, k // 2, bias=bias)
        )
        self.add_module("act", make_activation(activation))
        channels = C
        for b in range(1, L + 1):
            stride, after = (2, 2 * channels) if b in halve_at else (1, channels)
            now = window_sizes(f"block {b}: a kernel", now, (k, k), (stride, stride), (k // 2, k // 2))
            options = {"stride": stride, "depth": depth, "norm": norm, "bias": bias, "activation": activation}
            self.add_module(f"block{b}", ResidualBlock2d(channels, after, k, **options))  # type: ignore[arg-type]
            channels = after
        self.channels, self.outputs = channels, positive("classes", classes)
        self.add_module("pool", nn.AdaptiveAvgPool2d(1))
        self.add_module("flatten", nn.Flatten())
        self.add_module("fc", nn.Linear(channels, classes, bias=bias))

    def describe(self) -> dict[str, Any]:
        """``L`` blocks of ``depth`` convolutions, most channels ``C``, kernel ``k``, ``K`` outputs, ``parameters``."""
        return {
            "L": self.L, "depth": self.depth, "C": self.channels, "k": self.k, "K": self.outputs,
            "parameters": _count(self),
        }  # fmt: skip


class SelfAttention(nn.Module):
    """``softmax(QKᵀ/√(d/heads)) V`` for each head, and a linear layer; causal attention sees no later token."""

    def __init__(self, d: int, heads: int, *, bias: bool, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query, self.key, self.value, self.out = (nn.Linear(d, d, bias=bias) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, tokens, d]`` to the same."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


class _AttentionBlock(nn.Module):
    def __init__(
        self, d: int, heads: int, h: int, *, norm: bool, bias: bool, causal: bool, activation: Activation
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(d) if norm else nn.Identity() for _ in range(2))
        self.attention = SelfAttention(d, heads, bias=bias, causal=causal)
        self.fc1, self.act, self.fc2 = (
            nn.Linear(d, h, bias=bias),
            make_activation(activation),
            nn.Linear(h, d, bias=bias),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        result: Tensor = x + self.fc2(self.act(self.fc1(self.norm2(x))))
        return result


class AttentionNet(nn.Module):
    """A small transformer encoder: a linear embedding with positions, L blocks, the mean over tokens, a linear layer.

    Inputs are ``[N, tokens, inputs]``, or of any shape with as many elements: the rows of an image are its tokens.

    Args:
        L: number of blocks, each attention and a dense layer with residual sums.
        d: width of a token.
        heads: number of heads; must divide d.
        tokens: length of the sequence.
        inputs: numbers per token.
        classes: outputs.
        h: width of the dense layer (default 2d).
        norm: whether layer normalization precedes both parts of a block.
        causal: whether a token sees the ones before it only.
        bias: whether linear layers have one.
        activation: of the dense layer.

    Raises:
        ShapeError: ``heads`` does not divide ``d``.
        ReductionError: a number below 1.
        UnknownNameError: an unknown activation.
    """

    def __init__(
        self,
        L: int,
        d: int,
        heads: int = 2,
        *,
        tokens: int = 28,
        inputs: int = 28,
        classes: int = 10,
        h: int | None = None,
        norm: bool = True,
        causal: bool = False,
        bias: bool = False,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__()
        if positive("d", d) % positive("heads", heads):
            raise ShapeError(f"{heads} heads do not divide a width of {d}")
        self.L, self.d, self.heads, self.outputs = positive("L", L), d, heads, positive("classes", classes)
        self.tokens, self.inputs = positive("tokens", tokens), positive("inputs", inputs)
        width = 2 * d if h is None else positive("h", h)
        self.embed = nn.Linear(inputs, d, bias=bias)
        self.position = nn.Parameter(nn.init.normal_(self.embed.weight.new_empty(tokens, d), std=0.02))
        options = {"norm": norm, "bias": bias, "causal": causal, "activation": activation}
        self.blocks = nn.Sequential(*(_AttentionBlock(d, heads, width, **options) for _ in range(L)))  # type: ignore[arg-type]
        self.fc = nn.Linear(d, classes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, classes]``."""
        x = self.embed(x.reshape(x.shape[0], self.tokens, self.inputs)) + self.position
        result: Tensor = self.fc(self.blocks(x).mean(1))
        return result

    def describe(self) -> dict[str, Any]:
        """``L`` blocks, width ``d``, ``heads``, ``tokens``, ``K`` outputs, number of ``parameters``."""
        return {
            "L": self.L, "d": self.d, "heads": self.heads, "tokens": self.tokens, "K": self.outputs,
            "parameters": _count(self),
        }  # fmt: skip


class RecurrentNet(nn.Module):
    """A recurrent network that reads a sequence and classifies its last state.

    Inputs are ``[N, steps, inputs]``, or of any shape with as many elements: the rows of an image are its steps.

    Args:
        h: length of the state.
        cell: ``"rnn"`` (tanh), ``"gru"`` or ``"lstm"``.
        layers: recurrent layers on top of each other.
        steps: length of the sequence.
        inputs: numbers per step.
        classes: outputs.
        bias: whether cells and the linear layer have one.

    Raises:
        ReductionError: a number below 1, or an unknown cell.
    """

    def __init__(
        self,
        h: int,
        *,
        cell: str = "rnn",
        layers: int = 1,
        steps: int = 28,
        inputs: int = 28,
        classes: int = 10,
        bias: bool = True,
    ) -> None:
        super().__init__()
        cells: dict[str, Callable[..., nn.RNNBase]] = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
        if cell not in cells:
            raise ReductionError(f"cell={cell!r}: expected 'rnn', 'gru' or 'lstm'")
        self.h, self.cell, self.layers = positive("h", h), cell, positive("layers", layers)
        self.steps, self.inputs, self.outputs = (
            positive("steps", steps),
            positive("inputs", inputs),
            positive("classes", classes),
        )
        self.recurrent = cells[cell](inputs, h, num_layers=layers, bias=bias, batch_first=True)
        self.fc = nn.Linear(h, classes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, classes]``."""
        states, _ = self.recurrent(x.reshape(x.shape[0], self.steps, self.inputs))
        result: Tensor = self.fc(states[:, -1])
        return result

    def describe(self) -> dict[str, Any]:
        """``T`` steps, state ``h``, ``cell``, ``layers``, ``K`` outputs, number of ``parameters``."""
        return {
            "T": self.steps, "h": self.h, "cell": self.cell, "layers": self.layers, "K": self.outputs,
            "parameters": _count(self),
        }  # fmt: skip


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
