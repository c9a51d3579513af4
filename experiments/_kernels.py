"""Convolutions of few channels for a processor, compiled by numba: the batch is innermost in memory.

A layer's activations are ``[C, H, W·N]``. One tap of a kernel then multiplies a long contiguous row by one number,
whatever the number of channels; each pass takes three taps for four output channels, so that what is loaded is used
several times before anything is stored. Arrays are flat, places in them are counted in elements: ``first`` is where a
layer's first row begins, ``step`` lies between its rows, ``plane`` between its channels, and ``offsets [T]`` are the
taps of one output, T a multiple of three (taps of weight zero fill it up, so that an
infinite input may give NaN).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
C = TypeVar("C", bound=Callable[..., Any])


_OPTIONS: dict[str, Any] = {"fastmath": {"contract", "reassoc", "nsz"}, "nogil": True, "error_model": "numpy"}


def _compiled(function: C) -> C:
    """Part of a kernel. Sums may be taken in another order; NaN stays NaN."""
    return cast(C, numba.njit(**_OPTIONS)(function))


def _kernel(function: C) -> C:
    """A function to be called from Python, kept on disk where that works (no folder, a full disk, a damaged file)."""
    anew = kept = _compiled(function)
    with contextlib.suppress(RuntimeError):
        kept = numba.njit(cache=True, **_OPTIONS)(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        nonlocal kept
        try:
            return kept(*args)
        except Exception:
            if kept is anew:
                raise
            kept = anew
            return anew(*args)

    return cast(C, call)


@_compiled
def _four(sums: Array, x: Array, at: int, n: int, w: Array, o: int, offsets: Array) -> None:
    s0, s1, s2, s3 = sums[0, :n], sums[1, :n], sums[2, :n], sums[3, :n]
    for t in range(0, w.shape[1], 3):
        a, b, c = at + offsets[t], at + offsets[t + 1], at + offsets[t + 2]
        p, q, r = x[a : a + n], x[b : b + n], x[c : c + n]
        a0, a1, a2 = w[o, t], w[o, t + 1], w[o, t + 2]
        b0, b1, b2 = w[o + 1, t], w[o + 1, t + 1], w[o + 1, t + 2]
        c0, c1, c2 = w[o + 2, t], w[o + 2, t + 1], w[o + 2, t + 2]
        d0, d1, d2 = w[o + 3, t], w[o + 3, t + 1], w[o + 3, t + 2]
        for i in range(n):
            u, v, z = p[i], q[i], r[i]
            s0[i] += a0 * u + a1 * v + a2 * z
            s1[i] += b0 * u + b1 * v + b2 * z
            s2[i] += c0 * u + c1 * v + c2 * z
            s3[i] += d0 * u + d1 * v + d2 * z


@_compiled
def _two(sums: Array, x: Array, at: int, n: int, w: Array, o: int, offsets: Array) -> None:
    s0, s1 = sums[0, :n], sums[1, :n]
    for t in range(0, w.shape[1], 3):
        a, b, c = at + offsets[t], at + offsets[t + 1], at + offsets[t + 2]
        p, q, r = x[a : a + n], x[b : b + n], x[c : c + n]
        a0, a1, a2 = w[o, t], w[o, t + 1], w[o, t + 2]
        b0, b1, b2 = w[o + 1, t], w[o + 1, t + 1], w[o + 1, t + 2]
        for i in range(n):
            u, v, z = p[i], q[i], r[i]
            s0[i] += a0 * u + a1 * v + a2 * z
            s1[i] += b0 * u + b1 * v + b2 * z


@_compiled
def _one(sums: Array, x: Array, at: int, n: int, w: Array, o: int, offsets: Array) -> None:
    s0 = sums[0, :n]
    for t in range(0, w.shape[1], 3):
        a, b, c = at + offsets[t], at + offsets[t + 1], at + offsets[t + 2]
        p, q, r = x[a : a + n], x[b : b + n], x[c : c + n]
        a0, a1, a2 = w[o, t], w[o, t + 1], w[o, t + 2]
        for i in range(n):
            s0[i] += a0 * p[i] + a1 * q[i] + a2 * r[i]


@_kernel
def correlate(
    x: Array,
    first: int,
    step: int,
    offsets: Array,
    w: Array,
    bias: Array,
    out: Array,
    begin: int,
    row: int,
    plane: int,
    rows: int,
    length: int,
    rectify: bool,
    gate: Array,
    part: int,
) -> None:
    """``out[o, h, :] = bias[o] + Σ_t w[o, t] x[h, offsets[t] :]``, ``length`` elements a row.

    ``rectify`` cuts negative values off. With a ``gate`` (contiguous, or empty), only what is positive there passes.
    ``part`` elements are summed at once, in the cache.
    """
    zero = x.dtype.type(0)
    sums = np.empty((4, min(part, length)), x.dtype)
    for h in range(rows):
        for start in range(0, length, part):
            n = min(part, length - start)
            at = first + h * step + start
            o = 0
            while o < w.shape[0]:
                left = w.shape[0] - o
                count = 4 if left >= 4 else 2 if left >= 2 else 1
                for j in range(count):
                    sums[j, :n] = bias[o + j]
                if count == 4:
                    _four(sums, x, at, n, w, o, offsets)
                elif count == 2:
                    _two(sums, x, at, n, w, o, offsets)
                else:
                    _one(sums, x, at, n, w, o, offsets)
                for j in range(count):
                    to = begin + (o + j) * plane + h * row + start
                    target, source = out[to : to + n], sums[j, :n]
                    if rectify:
                        for i in range(n):
                            target[i] = zero if source[i] < zero else source[i]
                    elif gate.shape[0]:
                        at_gate = ((o + j) * rows + h) * length + start
                        passes = gate[at_gate : at_gate + n]
                        for i in range(n):
                            target[i] = source[i] if passes[i] > zero else zero
                    else:
                        for i in range(n):
                            target[i] = source[i]
                o += count


@_compiled
def _four_sums(
    d: Array, at: int, plane: int, x: Array, p: int, q: int, r: int, n: int, w: Array, o: int, t: int
) -> None:
    d0, d1 = d[at : at + n], d[at + plane : at + plane + n]
    d2, d3 = d[at + 2 * plane : at + 2 * plane + n], d[at + 3 * plane : at + 3 * plane + n]
    x0, x1, x2 = x[p : p + n], x[q : q + n], x[r : r + n]
    a0 = a1 = a2 = b0 = b1 = b2 = c0 = c1 = c2 = e0 = e1 = e2 = x.dtype.type(0)
    for i in range(n):
        u, v, z = x0[i], x1[i], x2[i]
        a0 += d0[i] * u
        a1 += d0[i] * v
        a2 += d0[i] * z
        b0 += d1[i] * u
        b1 += d1[i] * v
        b2 += d1[i] * z
        c0 += d2[i] * u
        c1 += d2[i] * v
        c2 += d2[i] * z
        e0 += d3[i] * u
        e1 += d3[i] * v
        e2 += d3[i] * z
    for row, sums in enumerate(((a0, a1, a2), (b0, b1, b2), (c0, c1, c2), (e0, e1, e2))):
        for k, value in enumerate(sums):
            w[o + row, t + k] += value


@_compiled
def _two_sums(
    d: Array, at: int, plane: int, x: Array, p: int, q: int, r: int, n: int, w: Array, o: int, t: int
) -> None:
    d0, d1 = d[at : at + n], d[at + plane : at + plane + n]
    x0, x1, x2 = x[p : p + n], x[q : q + n], x[r : r + n]
    a0 = a1 = a2 = b0 = b1 = b2 = x.dtype.type(0)
    for i in range(n):
        u, v, z = x0[i], x1[i], x2[i]
        a0 += d0[i] * u
        a1 += d0[i] * v
        a2 += d0[i] * z
        b0 += d1[i] * u
        b1 += d1[i] * v
        b2 += d1[i] * z
    for row, sums in enumerate(((a0, a1, a2), (b0, b1, b2))):
        for k, value in enumerate(sums):
            w[o + row, t + k] += value


@_compiled
def _one_sum(d: Array, at: int, x: Array, p: int, q: int, r: int, n: int, w: Array, o: int, t: int) -> None:
    d0, x0, x1, x2 = d[at : at + n], x[p : p + n], x[q : q + n], x[r : r + n]
    a0 = a1 = a2 = x.dtype.type(0)
    for i in range(n):
        a0 += d0[i] * x0[i]
        a1 += d0[i] * x1[i]
        a2 += d0[i] * x2[i]
    w[o, t] += a0
    w[o, t + 1] += a1
    w[o, t + 2] += a2


@_kernel
def weight_gradient(
    x: Array,
    first: int,
    step: int,
    offsets: Array,
    d: Array,
    begin: int,
    row: int,
    plane: int,
    rows: int,
    length: int,
    out: Array,
    bias: Array,
) -> None:
    """``out[o, t] = Σ_h Σ_i d[o, h, i] x[h, offsets[t] + i]`` and ``bias[o] = Σ_h Σ_i d[o, h, i]``."""
    out[:] = 0
    bias[:] = 0
    for h in range(rows):
        at = first + h * step
        o = 0
        while o < out.shape[0]:
            left = out.shape[0] - o
            count = 4 if left >= 4 else 2 if left >= 2 else 1
            here = begin + o * plane + h * row
            for t in range(0, out.shape[1], 3):
                p, q, r = at + offsets[t], at + offsets[t + 1], at + offsets[t + 2]
                if count == 4:
                    _four_sums(d, here, plane, x, p, q, r, length, out, o, t)
                elif count == 2:
                    _two_sums(d, here, plane, x, p, q, r, length, out, o, t)
                else:
                    _one_sum(d, here, x, p, q, r, length, out, o, t)
            for j in range(count):
                bias[o + j] += d[here + j * plane : here + j * plane + length].sum()
            o += count


@_kernel
def spread(g: Array, gate: Array, out: Array, begin: int, row: int, plane: int, planes: int, rows: int) -> None:
    """Write ``g`` (contiguous ``[planes, rows, …]``) into its place in ``out``, zero where ``gate`` is not positive."""
    zero, length = g.dtype.type(0), g.shape[0] // (planes * rows)
    for o in range(planes):
        for h in range(rows):
            to, at = begin + o * plane + h * row, (o * rows + h) * length
            target, source = out[to : to + length], g[at : at + length]
            if gate.shape[0]:
                passes = gate[at : at + length]
                for i in range(length):
                    target[i] = source[i] if passes[i] > zero else zero
            else:
                for i in range(length):
                    target[i] = source[i]


@_kernel
def largest(x: Array, out: Array, tall: int, wide: int) -> None:
    """Max-pooling of ``x [C, H, W, N]`` over windows ``tall`` × ``wide`` side by side; NaN stays NaN, as in PyTorch."""
    for c in range(out.shape[0]):
        for h in range(out.shape[1]):
            for w in range(out.shape[2]):
                best = out[c, h, w]
                best[:] = x[c, h * tall, w * wide]
                for i in range(tall):
                    for j in range(wide):
                        other = x[c, h * tall + i, w * wide + j]
                        for n in range(best.shape[0]):
                            if other[n] > best[n] or other[n] != other[n]:
                                best[n] = other[n]


@_kernel
def route(x: Array, y: Array, g: Array, out: Array, tall: int, wide: int, gated: bool) -> None:
    """Send ``g``, the gradient in ``y = largest(x)``, to the first largest entry of each window.

    ``gated``: to positive entries alone (``x`` has been rectified). ``out`` is ``[C, H, W, N]``, all of it written.
    """
    zero = x.dtype.type(0)
    open_ = np.empty(x.shape[3], np.bool_)
    out[:] = zero
    for c in range(y.shape[0]):
        for h in range(y.shape[1]):
            for w in range(y.shape[2]):
                open_[:] = True
                for i in range(tall):
                    for j in range(wide):
                        source, target = x[c, h * tall + i, w * wide + j], out[c, h * tall + i, w * wide + j]
                        for n in range(x.shape[3]):
                            if open_[n] and source[n] == y[c, h, w, n]:
                                open_[n] = False
                                if not gated or source[n] > zero:
                                    target[n] = g[c, h, w, n]
