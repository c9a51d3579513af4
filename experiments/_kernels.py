"""Convolutions of few channels for a processor, compiled by numba: the batch is innermost in memory.

A layer's activations are ``[C, H, W·n]`` in a flat buffer, ``n`` a multiple of :func:`lanes`. A tap of a kernel then
multiplies a long contiguous row by one number, whatever the number of channels. The sums of a tile, some outputs times
some vectors of a row, stay in registers over all taps; compilers do not find that by themselves, so that the inner
loops are built of LLVM's own instructions. Places in buffers are counted in elements: ``row`` lies between a layer's
rows, ``plane`` between its channels, and ``offsets [T]`` are the taps of one output.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

Array = np.ndarray[Any, np.dtype[Any]]
C = TypeVar("C", bound=Callable[..., Any])

_BYTES = 32
"""Of a vector: a register of AVX2, two of NEON."""
_CHUNK = 4096
"""Bytes of a row that the next tile of weights takes again, while the first cache holds them."""
_TAPS = 3
"""Of a tile of weights."""
_FLAGS = ("contract", "reassoc", "nsz")
_OPTIONS: dict[str, Any] = {"fastmath": set(_FLAGS), "nogil": True, "error_model": "numpy"}
PLAIN, RECTIFIED, GATED = 0, 1, 2
"""What becomes of sums: nothing; negative ones are cut off; those pass for which a gate is positive."""


def lanes(dtype: np.dtype[Any]) -> int:
    """Elements of a vector."""
    return _BYTES // dtype.itemsize


def _kernel(function: C) -> C:
    """Compiled, and kept on disk where that works (no folder, a full disk, a damaged file).

    Sums may be taken in another order; NaN stays NaN.
    """
    anew = kept = numba.njit(**_OPTIONS)(function)
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


class _Code:
    """Instructions on vectors of the elements of arrays; ``args`` are the arguments, arrays by their first element."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any) -> None:
        self.builder = builder
        arrays = [isinstance(kind, types.Array) for kind in signature.args]
        self.args = [
            context.make_array(kind)(context, builder, arg).data if array else arg
            for kind, arg, array in zip(signature.args, args, arrays, strict=True)
        ]
        element = context.get_data_type(signature.args[0].dtype)
        self.size = 4 if isinstance(element, ir.FloatType) else 8
        self.lanes = _BYTES // self.size
        self.vector = ir.VectorType(element, self.lanes)
        self.zero = ir.Constant(self.vector, [0.0] * self.lanes)

    def on(self, place: Any, vectors: int, step: Any = None, count: int = 0) -> Any:
        """``place``, so many vectors and steps on."""
        if count:
            place = self.builder.add(place, self.builder.mul(step, step.type(count)))
        return self.builder.add(place, place.type(vectors * self.lanes))

    def element(self, array: Any, place: Any) -> Any:
        return self.builder.load(self.builder.gep(array, [place]))

    def _at(self, array: Any, place: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(array, [place]), self.vector.as_pointer())

    def load(self, array: Any, place: Any) -> Any:
        return self.builder.load(self._at(array, place), align=self.size)

    def store(self, vector: Any, array: Any, place: Any) -> None:
        self.builder.store(vector, self._at(array, place), align=self.size)

    def splat(self, array: Any, place: Any) -> Any:
        """One element, as often as a vector has elements."""
        none, word = ir.Constant(self.vector, ir.Undefined), ir.IntType(32)
        one = self.builder.insert_element(none, self.element(array, place), word(0))
        return self.builder.shuffle_vector(one, none, ir.Constant(ir.VectorType(word, self.lanes), [0] * self.lanes))

    def variables(self, rows: int, columns: int) -> list[list[Any]]:
        """Vectors that stay in registers."""
        variable: Any = cgutils.alloca_once
        return [[variable(self.builder, self.vector) for _ in range(columns)] for _ in range(rows)]

    def add_product(self, variable: Any, a: Any, b: Any) -> None:
        product = self.builder.fmul(a, b, flags=_FLAGS)
        self.builder.store(self.builder.fadd(product, self.builder.load(variable), flags=_FLAGS), variable)


def _product(outputs: int, vectors: int) -> Any:
    """The tile ``out[to + r·plane :] = bias[o + r] + Σ_t w[(o + r)·taps + t] x[at + offsets[t] :]``."""

    @intrinsic
    def tile(
        typing: Any, x: Any, at: Any, offsets: Any, taps: Any, w: Any, o: Any, bias: Any, out: Any, to: Any, plane: Any,
        mode: Any, gate: Any, passes: Any, gate_plane: Any,
    ) -> Any:  # fmt: skip
        i = types.intp

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            code = _Code(context, builder, signature, args)
            x, at, offsets, taps, w, o, bias, out, to, plane, mode, gate, passes, gate_plane = code.args
            sums = code.variables(outputs, vectors)
            for r, row in enumerate(sums):
                first = code.splat(bias, builder.add(o, o.type(r)))
                for s in row:
                    builder.store(first, s)
            with cgutils.for_range(builder, taps, intp=taps.type) as loop:
                from_ = builder.add(at, code.element(offsets, loop.index))
                pieces = [code.load(x, code.on(from_, k)) for k in range(vectors)]
                for r, row in enumerate(sums):
                    factor = code.splat(w, builder.add(builder.mul(builder.add(o, o.type(r)), taps), loop.index))
                    for s, piece in zip(row, pieces, strict=True):
                        code.add_product(s, factor, piece)

            def finish(change: Callable[[Any, Any], Any]) -> None:
                for r, row in enumerate(sums):
                    for k, s in enumerate(row):
                        value = change(builder.load(s), code.on(passes, k, gate_plane, r))
                        code.store(value, out, code.on(to, k, plane, r))

            def rectified(s: Any, _: Any) -> Any:
                return builder.select(builder.fcmp_ordered("<", s, code.zero), code.zero, s)

            def gated(s: Any, place: Any) -> Any:
                return builder.select(builder.fcmp_ordered(">", code.load(gate, place), code.zero), s, code.zero)

            for number, change in ((PLAIN, lambda s, _: s), (RECTIFIED, rectified), (GATED, gated)):
                with builder.if_then(builder.icmp_signed("==", mode, mode.type(number))):
                    finish(change)
            return context.get_dummy_value()

        return types.void(x, i, offsets, i, w, i, bias, out, i, i, i, gate, i, i), generate

    return tile


def _row(outputs: int, vectors: int) -> Any:
    """A whole row by tiles."""
    wide, narrow = _product(outputs, vectors), _product(outputs, 1)

    @numba.njit(**_OPTIONS)  # type: ignore[untyped-decorator]
    def row(
        x: Array, at: int, offsets: Array, w: Array, o: int, bias: Array, out: Array, to: int, plane: int, length: int,
        mode: int, gate: Array, passes: int, gate_plane: int,
    ) -> None:  # fmt: skip
        one, taps, i = _BYTES // x.itemsize, offsets.shape[0], 0
        while i + vectors * one <= length:
            wide(x, at + i, offsets, taps, w, o, bias, out, to + i, plane, mode, gate, passes + i, gate_plane)
            i += vectors * one
        while i < length:
            narrow(x, at + i, offsets, taps, w, o, bias, out, to + i, plane, mode, gate, passes + i, gate_plane)
            i += one

    return row


_four, _two, _one = _row(4, 3), _row(2, 4), _row(1, 8)  # all that 16 registers hold


@_kernel
def correlate(
    x: Array,
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
    mode: int,
    gate: Array,
    gate_row: int,
    gate_plane: int,
) -> None:
    """``out[o, h, :] = bias[o] + Σ_t w[o, t] x[h·step + offsets[t] :]``, ``length`` elements a row, then ``mode``."""
    for h in range(rows):
        at, to, passes, o = h * step, begin + h * row, h * gate_row, 0
        while o < w.shape[0]:
            left, here, gates = w.shape[0] - o, to + o * plane, passes + o * gate_plane
            if left >= 4:
                _four(x, at, offsets, w, o, bias, out, here, plane, length, mode, gate, gates, gate_plane)
                o += 4
            elif left >= 2:
                _two(x, at, offsets, w, o, bias, out, here, plane, length, mode, gate, gates, gate_plane)
                o += 2
            else:
                _one(x, at, offsets, w, o, bias, out, here, plane, length, mode, gate, gates, gate_plane)
                o += 1


def _products(outputs: int) -> Any:
    """The tile ``sums[o + r, t + k] += Σ_i d[from_ + r·plane + i] x[at + offsets[t + k] + i]``, lane by lane."""

    @intrinsic
    def tile(
        typing: Any, d: Any, from_: Any, plane: Any, x: Any, at: Any, offsets: Any, t: Any, length: Any, sums: Any,
        to: Any, row: Any,
    ) -> Any:  # fmt: skip
        i = types.intp

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            code = _Code(context, builder, signature, args)
            d, from_, plane, x, at, offsets, t, length, sums, to, row = code.args
            held = code.variables(outputs, _TAPS)
            places = [[code.on(to, k, row, r) for k in range(_TAPS)] for r in range(outputs)]
            for variables, there in zip(held, places, strict=True):
                for variable, place in zip(variables, there, strict=True):
                    builder.store(code.load(sums, place), variable)
            starts = [builder.add(at, code.element(offsets, builder.add(t, t.type(k)))) for k in range(_TAPS)]
            with cgutils.for_range_slice(builder, t.type(0), length, t.type(code.lanes), t.type) as (index, _):
                pieces = [code.load(x, builder.add(start, index)) for start in starts]
                for r, variables in enumerate(held):
                    factor = code.load(d, builder.add(code.on(from_, 0, plane, r), index))
                    for variable, piece in zip(variables, pieces, strict=True):
                        code.add_product(variable, factor, piece)
            for variables, there in zip(held, places, strict=True):
                for variable, place in zip(variables, there, strict=True):
                    code.store(builder.load(variable), sums, place)
            return context.get_dummy_value()

        return types.void(d, i, i, x, i, offsets, i, i, sums, i, i), generate

    return tile


_four_sums, _two_sums, _one_sum = _products(4), _products(2), _products(1)


@_kernel
def weight_gradient(
    x: Array,
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
    """``out[o, t] = Σ_h Σ_i d[o, h, i] x[h·step + offsets[t] + i]`` and ``bias[o] = Σ_h Σ_i d[o, h, i]``.

    There are :func:`in_tiles` of as many offsets as ``out`` has columns.
    """
    one, outputs, taps = _BYTES // x.itemsize, out.shape[0], offsets.shape[0]
    sums, chunk, across = np.zeros(outputs * taps * one, x.dtype), _CHUNK // x.itemsize, taps * one
    bias[:] = 0
    for h in range(rows):
        for i in range(0, length, chunk):
            n, at, from_ = min(chunk, length - i), h * step + i, begin + h * row + i
            o = 0
            while o < outputs:
                left, here = outputs - o, from_ + o * plane
                for t in range(0, taps, _TAPS):
                    to = (o * taps + t) * one
                    if left >= 4:
                        _four_sums(d, here, plane, x, at, offsets, t, n, sums, to, across)
                    elif left >= 2:
                        _two_sums(d, here, plane, x, at, offsets, t, n, sums, to, across)
                    else:
                        _one_sum(d, here, plane, x, at, offsets, t, n, sums, to, across)
                count = 4 if left >= 4 else 2 if left >= 2 else 1
                for j in range(o, o + count):
                    bias[j] += d[from_ + j * plane : from_ + j * plane + n].sum()
                o += count
    for o in range(outputs):
        for t in range(out.shape[1]):
            at = (o * taps + t) * one
            out[o, t] = sums[at : at + one].sum()


def in_tiles(offsets: Array) -> Array:
    """Offsets filled up to whole tiles of weights."""
    return np.concatenate([offsets, np.zeros(-len(offsets) % _TAPS, offsets.dtype)])


@_kernel
def take(x: Array, out: Array, row: int, plane: int, lane: int) -> None:
    """Write images ``x [N, C, H, W]`` into a buffer."""
    for c in range(x.shape[1]):
        for h in range(x.shape[2]):
            for w in range(x.shape[3]):
                to = c * plane + h * row + w * lane
                for i in range(x.shape[0]):
                    out[to + i] = x[i, c, h, w]


@_kernel
def spread(
    g: Array, n: int, width: int, gate: Array, gate_row: int, gate_plane: int,
    out: Array, begin: int, row: int, plane: int, lane: int,
) -> None:  # fmt: skip
    """Write ``g [planes, rows, width·n]`` into ``out``, ``lane`` for ``n``; zero where ``gate`` is not positive."""
    zero = g.dtype.type(0)
    for o in range(g.shape[0]):
        for h in range(g.shape[1]):
            for w in range(width):
                to, at = begin + o * plane + h * row + w * lane, o * gate_plane + h * gate_row + w * lane
                target, source = out[to : to + n], g[o, h, w * n : w * n + n]
                if gate.shape[0]:
                    passes = gate[at : at + n]
                    for i in range(n):
                        target[i] = source[i] if passes[i] > zero else zero
                else:
                    for i in range(n):
                        target[i] = source[i]


@_kernel
def largest(
    x: Array, row: int, plane: int, n: int, tall: int, wide: int,
    out: Array, out_row: int, out_plane: int, planes: int, rows: int, width: int,
) -> None:  # fmt: skip
    """Max-pooling over windows ``tall`` × ``wide`` side by side; NaN stays NaN, as in PyTorch."""
    for c in range(planes):
        for h in range(rows):
            for w in range(width):
                to, at = c * out_plane + h * out_row + w * n, c * plane + h * tall * row + w * wide * n
                best = out[to : to + n]
                best[:] = x[at : at + n]
                for i in range(tall):
                    for j in range(wide):
                        here = at + i * row + j * n
                        other = x[here : here + n]
                        for k in range(n):
                            if other[k] > best[k] or other[k] != other[k]:
                                best[k] = other[k]


@_kernel
def route(
    x: Array, row: int, plane: int, n: int, tall: int, wide: int,
    y: Array, g: Array, y_row: int, y_plane: int, planes: int, rows: int, width: int,
    out: Array, begin: int, out_row: int, out_plane: int, gated: bool,
) -> None:  # fmt: skip
    """Send ``g``, the gradient in ``y``, the largest of each window of ``x``, to the first entry that is as large.

    ``gated``: to positive entries alone (``x`` has been rectified). All windows of ``out`` are written.
    """
    zero = x.dtype.type(0)
    open_ = np.empty(n, np.bool_)
    for c in range(planes):
        for h in range(rows):
            for w in range(width):
                at = c * y_plane + h * y_row + w * n
                most, given = y[at : at + n], g[at : at + n]
                open_[:] = True
                for i in range(tall):
                    for j in range(wide):
                        line, column = h * tall + i, (w * wide + j) * n
                        from_, to = c * plane + line * row + column, begin + c * out_plane + line * out_row + column
                        source, target = x[from_ : from_ + n], out[to : to + n]
                        for k in range(n):
                            chosen = open_[k] and source[k] == most[k]
                            open_[k] = open_[k] and not chosen
                            target[k] = given[k] if chosen and (not gated or source[k] > zero) else zero
