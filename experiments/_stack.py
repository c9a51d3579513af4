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

#: Samples of a part: rows of this many times the width of an image, which a core's cache holds.
PART = 64
#: Elements summed at once.
_ROW = 2048
#: Numbers of samples for which buffers are kept.
_SIZES = 3
#: Flops of a pass below which threads cost more than they save.
_WORTH = 1e7


def _offsets(channels: int, kernel: tuple[int, int], rows: int, width: int, samples: int) -> Array:
    """Places of a kernel's taps relative to the output's, filled up to a multiple of three."""
    c, i, j = np.meshgrid(np.arange(channels), np.arange(kernel[0]), np.arange(kernel[1]), indexing="ij")
    places = (((c * rows + i) * width + j) * samples).ravel()
    return np.concatenate([places, np.zeros(-len(places) % 3, np.int64)]).astype(np.int64)


def _filled(weight: Array) -> Array:
    """``[O, …]`` as ``[O, T]``, T a multiple of three."""
    flat = weight.reshape(len(weight), -1)
    if flat.shape[1] % 3 == 0:
        return np.ascontiguousarray(flat)
    filled = np.zeros((len(flat), flat.shape[1] + -flat.shape[1] % 3), flat.dtype)
    filled[:, : flat.shape[1]] = flat
    return filled


class _Convolved:
    """A convolution at ``n`` samples: where its output and the gradient in it lie."""

    def __init__(self, layer: Convolution, n: int, dtype: np.dtype[Any]) -> None:
        self.layer, self.n = layer, n
        (c, h, w), (o, rows, width), (tall, wide) = layer.inputs, layer.outputs, layer.kernel
        self.rows, self.length, self.step = rows, width * n, w * n
        self.out = np.empty(o * rows * width * n, dtype)
        self.offsets = _offsets(c, layer.kernel, h, w, n)
        # The gradient has a border of zeros, so that what it sends back is a convolution, too.
        self.padded = (rows + 2 * (tall - 1), width + 2 * (wide - 1))
        self.gradient = np.zeros(o * self.padded[0] * self.padded[1] * n, dtype)
        self.row, self.plane = self.padded[1] * n, self.padded[0] * self.padded[1] * n
        self.begin = (tall - 1) * self.row + (wide - 1) * n
        self.back = _offsets(o, layer.kernel, *self.padded, n)
        self.gate = self.out if layer.rectified else np.empty(0, dtype)

    def forward(self, x: Array, w: Array, bias: Array) -> None:
        none = self.out[:0]
        rows, length = self.rows, self.length
        kernels.correlate(
            x, 0, self.step, self.offsets, w, bias, self.out, 0, length, rows * length, rows, length,
            self.layer.rectified, none, _ROW,
        )  # fmt: skip

    def receive(self, g: Array) -> None:
        """Take the gradient in the output, rows without a border."""
        kernels.spread(g, self.gate, self.gradient, self.begin, self.row, self.plane, self.layer.channels, self.rows)

    def interior(self) -> Array:
        """Where the gradient in the output lies, ``[O, rows, width, n]``."""
        top, left = (k - 1 for k in self.layer.kernel)
        _, rows, width = self.layer.outputs
        whole = self.gradient.reshape(-1, *self.padded, self.n)
        return whole[:, top : top + rows, left : left + width]

    def weights(self, x: Array, w: Array, bias: Array) -> None:
        """The gradients in kernel and bias."""
        kernels.weight_gradient(
            x, 0, self.step, self.offsets, self.gradient, self.begin, self.row, self.plane, self.rows, self.length,
            w, bias,
        )  # fmt: skip

    def send(self, turned: Array, before: _Convolved | None, out: Array) -> None:
        """Pass the gradient on to the convolution ``before``, or to ``out``, the gradient in what a pool has made."""
        c, rows, width = self.layer.inputs
        length = width * self.n
        if before is None:
            place, gate = (0, length, rows * length), out[:0]
        else:
            place, out, gate = (before.begin, before.row, before.plane), before.gradient, before.gate
        nothing = np.zeros(c, out.dtype)
        kernels.correlate(
            self.gradient, 0, self.row, self.back, turned, nothing, out, *place, rows, length, False, gate, _ROW
        )


class _Pooled:
    """A max-pool at ``n`` samples."""

    def __init__(self, layer: MaxPool, n: int, dtype: np.dtype[Any]) -> None:
        self.layer, self.n = layer, n
        self.out = np.empty(math.prod(layer.outputs) * n, dtype)
        self.gradient = np.empty_like(self.out)

    def forward(self, x: Array) -> None:
        shape = (*self.layer.inputs, self.n)
        kernels.largest(x.reshape(shape), self.out.reshape(*self.layer.outputs, self.n), *self.layer.window)

    def receive(self, g: Array) -> None:
        self.gradient[:] = g

    def send(self, x: Array, before: _Convolved) -> None:
        """Pass the gradient on to the convolution whose output ``x`` is."""
        large, small = (*self.layer.inputs, self.n), (*self.layer.outputs, self.n)
        y, g, gated = self.out.reshape(small), self.gradient.reshape(small), before.layer.rectified
        kernels.route(x.reshape(large), y, g, before.interior(), *self.layer.window, gated)


class _Part:
    """The layers at some samples, with their buffers."""

    def __init__(self, layers: Sequence[Layer], n: int, dtype: np.dtype[Any]) -> None:
        self.n = n
        self.input = np.empty((*layers[0].inputs, n), dtype)
        self.at = [_Convolved(v, n, dtype) if isinstance(v, Convolution) else _Pooled(v, n, dtype) for v in layers]
        found = [a for a in self.at if isinstance(a, _Convolved)]
        self.grads = [
            (np.empty((a.layer.channels, len(a.offsets)), dtype), np.empty(a.layer.channels, dtype)) for a in found
        ]

    def forward(self, x: Tensor, weights: Sequence[tuple[Array, Array]]) -> None:
        torch.from_numpy(self.input).copy_(x.permute(1, 2, 3, 0))
        flat, left = self.input.reshape(-1), iter(weights)
        for at in self.at:
            if isinstance(at, _Convolved):
                at.forward(flat, *next(left))
            else:
                at.forward(flat)
            flat = at.out

    def backward(self, g: Array, turned: Sequence[Array]) -> None:
        self.at[-1].receive(g)
        p = len(self.grads) - 1
        for i in reversed(range(len(self.at))):
            at, before = self.at[i], self.at[i - 1] if i else None
            x = self.input.reshape(-1) if before is None else before.out
            if isinstance(at, _Convolved):
                at.weights(x, *self.grads[p])
                if before is not None:
                    at.send(turned[p], before if isinstance(before, _Convolved) else None, before.gradient)
                p -= 1
            elif isinstance(before, _Convolved):
                at.send(x, before)


class Stack:
    """Layers for batches of any size: the first is a convolution, and one comes before every pool.

    Calls are made one at a time. Samples are divided among PyTorch's threads.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self.calls = 0
        self._parts: dict[tuple[int, torch.dtype, int], list[_Part]] = {}
        self._now: list[_Part] = []
        self._pool: ThreadPoolExecutor | None = None
        self._flops = sum(_flops(layer) for layer in layers)

    @property
    def outputs(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of what comes out."""
        return self.layers[-1].outputs

    def __call__(self, x: Tensor, weights: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
        """``[C·H·W, N]`` of images ``[N, C, H, W]``, differentiable once in the ``weights``: kernels and biases."""
        found: Tensor = _Run.apply(self, x, *[t for pair in weights for t in pair])  # type: ignore[no-untyped-call]
        return found

    def forward(self, x: Tensor, weights: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
        self.calls += 1
        self._now = self._divided(len(x), x.dtype)
        arrays = [(_filled(w.detach().numpy()), _bias(w, b)) for w, b in weights]
        pieces = torch.split(x, [part.n for part in self._now])
        self._each(lambda i: self._now[i].forward(pieces[i], arrays))
        outs = [torch.from_numpy(part.at[-1].out).view(-1, part.n) for part in self._now]
        return torch.cat(outs, 1) if len(outs) > 1 else outs[0].clone()

    def backward(self, g: Tensor, weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        turned = [_filled(w.detach().numpy()[:, :, ::-1, ::-1].swapaxes(0, 1)) for w in weights]
        pieces = [p.contiguous().view(-1).numpy() for p in torch.split(g, [part.n for part in self._now], 1)]
        self._each(lambda i: self._now[i].backward(pieces[i], turned))
        found = []
        for p, w in enumerate(weights):
            kernel, bias = self._now[0].grads[p]
            kernel, bias = kernel[:, : w[0].numel()].copy(), bias.copy()
            for part in self._now[1:]:
                kernel += part.grads[p][0][:, : w[0].numel()]
                bias += part.grads[p][1]
            found.append((torch.from_numpy(kernel).view_as(w), torch.from_numpy(bias)))
        return found

    def _threads(self, samples: int) -> int:
        return torch.get_num_threads() if samples * self._flops > _WORTH else 1

    def _divided(self, samples: int, dtype: torch.dtype) -> list[_Part]:
        threads = self._threads(samples)
        key = samples, dtype, threads
        if key not in self._parts:
            if len(self._parts) >= _SIZES:
                del self._parts[next(iter(self._parts))]
            count = max(-(-samples // PART), min(threads, samples))
            count = min(samples, -(-count // threads) * threads)
            ends = [samples * i // count for i in range(count + 1)]
            kind = np.dtype(str(dtype).removeprefix("torch."))
            self._parts[key] = [_Part(self.layers, b - a, kind) for a, b in pairwise(ends)]
        return self._parts[key]

    def _each(self, do: Callable[[int], None]) -> None:
        """Do something with every part, in threads where that pays."""
        parts = range(len(self._now))
        threads = min(self._threads(sum(part.n for part in self._now)), len(parts))
        if threads < 2:
            for i in parts:
                do(i)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="dagh")
        list(self._pool.map(do, parts))


def _flops(layer: Layer) -> int:
    """Of one sample, forward."""
    taps = layer.inputs[0] * math.prod(layer.kernel) if isinstance(layer, Convolution) else 1
    return 2 * taps * math.prod(layer.outputs)


def _bias(weight: Tensor, bias: Tensor | None) -> Array:
    return (weight.new_zeros(len(weight)) if bias is None else bias).detach().numpy()


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
