"""Convolutions, rectifiers and max-pools in a row as one operation of PyTorch's autograd, run by compiled kernels.

Buffers are made once for a number of samples and used again by every call: fresh memory would cost as much as the
convolutions. Gradients are therefore those of the last call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _kernels as kernels
from ._layers import Convolution, Layer, MaxPool

Array = np.ndarray[Any, np.dtype[Any]]

#: Samples of a part at most, and bytes of what one row of outputs is computed from: a core's second cache holds it.
_PART, _ROWS = 256, 192 * 1024
#: Bytes that the first cache takes at once.
_LINE = 64
#: Numbers of samples for which buffers are kept.
_SIZES = 3
#: Flops of a pass below which threads cost more than they save.
_WORTH = 1e7


Weights = tuple[Tensor, Tensor | None]
"""A kernel and its bias."""


class _Planes:
    """``[C, H, W, n]`` inside a border of zeros, in a flat buffer; ``n`` is filled up to whole vectors.

    Rows and planes are an odd number of cache lines apart: others would meet in the same few sets of the cache.
    """

    def __init__(
        self, shape: tuple[int, int, int], n: int, dtype: np.dtype[Any], border: tuple[int, int] = (0, 0)
    ) -> None:
        self.shape, self.n = shape, n
        c, h, w = shape
        lanes, line = kernels.lanes(dtype), _LINE // dtype.itemsize
        self.lane = -(-n // lanes) * lanes
        self.row = (-(-(w + 2 * border[1]) * self.lane // line) | 1) * line
        self.plane = ((h + 2 * border[0]) * self.row // line | 1) * line
        self.flat = np.zeros(c * self.plane, dtype)
        self.begin = border[0] * self.row + border[1] * self.lane
        self.length = w * self.lane
        strides = self.plane, self.row, self.lane, 1
        self.samples = torch.from_numpy(self.flat).as_strided((*shape, n), strides, self.begin)

    def offsets(self, kernel: tuple[int, int]) -> Array:
        """Places of a kernel's taps relative to the first, in the order of its weights."""
        c, i, j = np.meshgrid(np.arange(self.shape[0]), np.arange(kernel[0]), np.arange(kernel[1]), indexing="ij")
        return (c * self.plane + i * self.row + j * self.lane).ravel().astype(np.int64)


class _Convolved:
    """A convolution at ``n`` samples: where its output and the gradient in it lie."""

    def __init__(self, layer: Convolution, before: _Planes, n: int, dtype: np.dtype[Any]) -> None:
        self.layer, self.input, kernel = layer, before, layer.kernel
        self.out = _Planes(layer.outputs, n, dtype)
        # The border makes what is sent back a convolution, too.
        self.gradient = _Planes(layer.outputs, n, dtype, (kernel[0] - 1, kernel[1] - 1))
        self.offsets, self.back = before.offsets(kernel), self.gradient.offsets(kernel)
        self.tiled = kernels.in_tiles(self.offsets)
        self.grads = np.empty((layer.channels, len(self.offsets)), dtype), np.empty(layer.channels, dtype)
        self.nothing = np.zeros(layer.inputs[0], dtype)

    @property
    def gate(self) -> Array:
        """What has to be positive for a gradient to pass; empty without a rectifier."""
        return self.out.flat if self.layer.rectified else self.out.flat[:0]

    def forward(self, w: Array, bias: Array) -> None:
        x, out = self.input, self.out
        mode = kernels.RECTIFIED if self.layer.rectified else kernels.PLAIN
        kernels.correlate(
            x.flat, x.row, self.offsets, w, bias, out.flat, 0, out.row, out.plane, out.shape[1], out.length, mode,
            out.flat, 0, 0,
        )  # fmt: skip

    def receive(self, g: Tensor) -> None:
        """Take the gradient in the output, ``[C·H·W, n]``."""
        _spread(g, self.gate, self.out, self.gradient)

    def weights(self) -> None:
        """Find the gradients in kernel and bias."""
        x, d = self.input, self.gradient
        kernels.weight_gradient(
            x.flat, x.row, self.tiled, d.flat, d.begin, d.row, d.plane, d.shape[1], d.length, *self.grads
        )

    def send(self, turned: Array, before: _Convolved | _Pooled) -> None:
        """Pass the gradient on to the layer whose output is the input."""
        d, to, of = self.gradient, before.gradient, before.out
        mode = kernels.GATED if len(before.gate) else kernels.PLAIN
        kernels.correlate(
            d.flat, d.row, self.back, turned, self.nothing, to.flat, to.begin, to.row, to.plane, to.shape[1], to.length,
            mode, of.flat, of.row, of.plane,
        )  # fmt: skip


class _Pooled:
    """A max-pool at ``n`` samples."""

    def __init__(self, layer: MaxPool, before: _Planes, n: int, dtype: np.dtype[Any]) -> None:
        self.layer, self.input = layer, before
        self.out, self.gradient = _Planes(layer.outputs, n, dtype), _Planes(layer.outputs, n, dtype)
        self.gate = self.out.flat[:0]

    def forward(self) -> None:
        x, out = self.input, self.out
        kernels.largest(x.flat, x.row, x.plane, x.lane, *self.layer.window, out.flat, out.row, out.plane, *out.shape)

    def receive(self, g: Tensor) -> None:
        """Take the gradient in the output, ``[C·H·W, n]``."""
        _spread(g, self.gate, self.out, self.gradient)

    def send(self, before: _Convolved) -> None:
        """Pass the gradient on to the convolution whose output is the input."""
        x, y, to = self.input, self.out, before.gradient
        kernels.route(
            x.flat, x.row, x.plane, x.lane, *self.layer.window, y.flat, self.gradient.flat, y.row, y.plane, *y.shape,
            to.flat, to.begin, to.row, to.plane, before.layer.rectified,
        )  # fmt: skip


def _spread(g: Tensor, gate: Array, of: _Planes, to: _Planes) -> None:
    c, h, w = to.shape
    source = g.contiguous().view(c, h, -1).numpy()
    kernels.spread(source, to.n, w, gate, of.row, of.plane, to.flat, to.begin, to.row, to.plane, to.lane)


class _Part:
    """The layers at up to ``n`` samples, with their buffers."""

    def __init__(self, layers: Sequence[Layer], n: int, dtype: np.dtype[Any]) -> None:
        self.n = n
        self.input = before = _Planes(layers[0].inputs, n, dtype)
        self.at: list[_Convolved | _Pooled] = []
        for layer in layers:
            made = _Convolved if isinstance(layer, Convolution) else _Pooled
            self.at.append(made(layer, before, n, dtype))  # type: ignore[arg-type]
            before = self.at[-1].out

    @property
    def grads(self) -> list[tuple[Array, Array]]:
        """The gradients in kernels and biases."""
        return [at.grads for at in self.at if isinstance(at, _Convolved)]

    def forward(self, x: Tensor, weights: Sequence[tuple[Array, Array]]) -> None:
        to = self.input
        kernels.take(x.detach().contiguous().numpy(), to.flat, to.row, to.plane, to.lane)
        left = iter(weights)
        for at in self.at:
            if isinstance(at, _Convolved):
                at.forward(*next(left))
            else:
                at.forward()

    def result(self, linear: tuple[Array, Array] | None) -> Array:
        """``[K, …]``: what comes out, flat, or a linear layer of it."""
        out = self.at[-1].out
        if linear is None:
            return out.samples.flatten(0, 2).numpy()
        kernel, bias = linear
        found = np.empty((len(kernel), out.lane), kernel.dtype)
        flat, offsets = found.reshape(-1), out.offsets((out.shape[1], out.shape[2]))
        kernels.correlate(
            out.flat, 0, offsets, kernel, bias, flat, 0, 0, out.lane, 1, out.lane, kernels.PLAIN, flat, 0, 0
        )
        return found

    def backward(self, g: Tensor, turned: Sequence[Array]) -> None:
        self.at[-1].receive(g)
        left = list(turned)
        for i in reversed(range(len(self.at))):
            at, before = self.at[i], self.at[i - 1] if i else None
            if isinstance(at, _Convolved):
                at.weights()
                kernel = left.pop()
                if before is not None:
                    at.send(kernel, before)
            elif isinstance(before, _Convolved):
                at.send(before)


class Stack:
    """Layers for batches of any size: the first is a convolution, and one comes before every pool.

    Calls are made one at a time. Samples are divided among PyTorch's threads.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self.calls = 0
        self._parts: dict[tuple[int, torch.dtype, int], list[_Part]] = {}
        self._now: list[_Part] = []
        self._spare: dict[tuple[torch.dtype, int], list[_Part]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._flops = sum(_flops(layer) for layer in layers)

    @property
    def outputs(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of what comes out."""
        return self.layers[-1].outputs

    def __call__(self, x: Tensor, weights: Sequence[Weights]) -> Tensor:
        """``[C·H·W, N]`` of images ``[N, C, H, W]``, differentiable once in the ``weights``: kernels and biases."""
        found: Tensor = _Run.apply(self, x, *[t for pair in weights for t in pair])  # type: ignore[no-untyped-call]
        return found

    def values(self, x: Tensor, weights: Sequence[Weights], last: Weights | None) -> Tensor:
        """``[K, N]``: a linear layer of what comes out, or that itself, part after part in the same buffers."""
        arrays = [(_flat(w), _bias(w, b)) for w, b in weights]
        linear = None if last is None else (_flat(last[0]), _bias(*last))
        size, threads, kind = self._part(x.dtype), self._threads(len(x)), _kind(x.dtype)
        key = x.dtype, threads
        if key not in self._spare:
            self._spare = {key: [_Part(self.layers, size, kind) for _ in range(threads)]}
        # Not PyTorch's own memory: inference mode belongs to a thread.
        out = np.empty((math.prod(self.outputs) if linear is None else len(linear[0]), len(x)), kind)

        def do(thread: int) -> None:
            part = self._spare[key][thread]
            for at in range(thread * size, len(x), threads * size):
                piece = x[at : at + size]
                part.forward(piece, arrays)
                out[:, at : at + size] = part.result(linear)[:, : len(piece)]

        self._each(do, threads, threads)
        return torch.from_numpy(out)

    def forward(self, x: Tensor, weights: Sequence[Weights]) -> Tensor:
        self.calls += 1
        self._now = self._divided(len(x), x.dtype)
        arrays = [(_flat(w), _bias(w, b)) for w, b in weights]
        pieces = torch.split(x, [part.n for part in self._now])
        self._each(lambda i: self._now[i].forward(pieces[i], arrays), len(self._now), self._threads(len(x)))
        return torch.cat([part.at[-1].out.samples for part in self._now], 3).flatten(0, 2)

    def backward(self, g: Tensor, weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        turned = [_flat(w.flip(2, 3).transpose(0, 1)) for w in weights]
        pieces = torch.split(g, [part.n for part in self._now], 1)
        self._each(lambda i: self._now[i].backward(pieces[i], turned), len(self._now), self._threads(g.shape[1]))
        found = []
        for p, w in enumerate(weights):
            kernel, bias = self._now[0].grads[p]
            kernel, bias = kernel.copy(), bias.copy()
            for part in self._now[1:]:
                kernel += part.grads[p][0]
                bias += part.grads[p][1]
            found.append((torch.from_numpy(kernel).view_as(w), torch.from_numpy(bias)))
        return found

    def _part(self, dtype: torch.dtype) -> int:
        """Samples that are done at once."""
        rows = [math.prod(v.inputs) // v.inputs[1] * v.kernel[0] for v in self.layers if isinstance(v, Convolution)]
        return min(_PART, max(_ROWS // (max(rows) * dtype.itemsize) // 8 * 8, 8))

    def _threads(self, samples: int) -> int:
        return torch.get_num_threads() if samples * self._flops > _WORTH else 1

    def _divided(self, samples: int, dtype: torch.dtype) -> list[_Part]:
        threads = self._threads(samples)
        key = samples, dtype, threads
        if key not in self._parts:
            if len(self._parts) >= _SIZES:
                del self._parts[next(iter(self._parts))]
            count = max(-(-samples // self._part(dtype)), min(threads, samples))
            count = min(samples, -(-count // threads) * threads)
            ends = [samples * i // count for i in range(count + 1)]
            self._parts[key] = [_Part(self.layers, b - a, _kind(dtype)) for a, b in pairwise(ends)]
        return self._parts[key]

    def _each(self, do: Callable[[int], None], count: int, threads: int) -> None:
        """Do something so many times, in threads."""
        if min(threads, count) < 2:
            for i in range(count):
                do(i)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="dagh")
        list(self._pool.map(do, range(count)))


def _kind(dtype: torch.dtype) -> np.dtype[Any]:
    return np.dtype(str(dtype).removeprefix("torch."))


def _flops(layer: Layer) -> int:
    """Of one sample, forward."""
    taps = layer.inputs[0] * math.prod(layer.kernel) if isinstance(layer, Convolution) else 1
    return 2 * taps * math.prod(layer.outputs)


def _flat(weight: Tensor) -> Array:
    """``[O, T]``."""
    return np.ascontiguousarray(weight.detach().numpy().reshape(len(weight), -1))


def _bias(weight: Tensor, bias: Tensor | None) -> Array:
    return np.ascontiguousarray((weight.new_zeros(len(weight)) if bias is None else bias).detach().numpy())


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stack: Stack, x: Tensor, *flat: Tensor | None) -> Tensor:
        kernels, biases = flat[::2], flat[1::2]
        pairs = [(w, b) for w, b in zip(kernels, biases, strict=True) if w is not None]
        found = stack.forward(x, pairs)
        ctx.stack, ctx.call = stack, stack.calls
        ctx.biased = [b is not None for b in biases]
        ctx.save_for_backward(*[w for w, _ in pairs])
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.call != ctx.stack.calls:
            raise RuntimeError("the buffers of this call have been used by another one; backward belongs before it")
        found = ctx.stack.backward(g, ctx.saved_tensors)
        pairs = [(w, b if biased else None) for (w, b), biased in zip(found, ctx.biased, strict=True)]
        return (None, None, *[t for pair in pairs for t in pair])
