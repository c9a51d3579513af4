"""Assembly of the requested blocks, in chunks of samples and of columns that fit the memory budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dagh import _outer, _sweep
from dagh._ir import Node
from dagh._planner import Column, Plan
from dagh._request import Pair, Request, itemsize
from dagh._rules._conv import Convolution
from dagh._state import State

#: Smallest working memory the chunking aims for.
_FLOOR = 32 * 2**20
#: Largest bundle formed at once: beyond it fresh memory costs more than the arithmetic on it.
_CACHE = 8 * 2**20


class Accumulator:
    """Dense blocks filled piece by piece."""

    def __init__(self, request: Request, state: State, keep: bool) -> None:
        self.request, self.keep = request, keep
        self.like = next(iter(state.values.values())) if not request.leaves else state.values[request.leaves[0]]
        self.samples = state.samples
        self.blocks: dict[Pair, Tensor] = {}

    def block(self, i: int, j: int) -> Tensor:
        """The (zero-initialised) storage of block ``i <= j``."""
        if (i, j) not in self.blocks:
            sizes = self.request.sizes
            lead = (self.samples,) if self.keep else ()
            self.blocks[i, j] = self.like.new_zeros(*lead, sizes[i], sizes[j])
        return self.blocks[i, j]

    def add(self, i: int, j: int, piece: Tensor, rows: slice, window: slice) -> None:
        """Add ``piece`` ``[(n,) rows of i, all of j]`` to block (i, j) or, transposed, (j, i)."""
        lead = (window,) if self.keep else ()
        if i <= j:
            self.block(i, j)[(*lead, rows)] += piece
        else:
            self.block(j, i)[(*lead, slice(None), rows)] += piece.transpose(-1, -2)

    def add_channels(self, i: int, j: int, piece: Tensor, channels: int, part: slice, window: slice) -> None:
        """As :meth:`add` for rows (channel, member) with the members of ``part``: ``[(n,) C·part, all of j]``."""
        target = self.block(min(i, j), max(i, j))
        if self.keep:
            target = target[window]
        lead, (rows, columns) = target.shape[:-2], target.shape[-2:]
        piece = piece.reshape(*lead, channels, part.stop - part.start, -1)
        if i <= j:
            target.view(*lead, channels, rows // channels, columns)[..., part, :] += piece
        else:
            target.view(*lead, rows, channels, columns // channels)[..., part] += piece.movedim(-1, -3)


def assemble(
    state: State, request: Request, plan: Plan, *, parts: tuple[str, ...], keep: bool, budget: int
) -> dict[str, Accumulator]:
    """Blocks of the outer and/or functional part. With ``keep``, one block per sample."""
    results = {part: Accumulator(request, state, keep) for part in parts}
    copies = len(parts) * (state.samples if keep else 1)
    working = max(budget - request.elements * itemsize(state.weights.dtype) * copies, _FLOOR)
    for window in _windows(state, request, plan, parts, working):
        part_state = narrow(state, window)
        if "outer" in parts:
            _add_outer(part_state, request, plan, results["outer"], window)
        if "functional" in parts:
            for column in plan.columns:
                _add_column(part_state, request, column, results["functional"], window, keep, working)
    return results


# -- chunks ----------------------------------------------------------------------------------------


def _windows(state: State, request: Request, plan: Plan, parts: tuple[str, ...], working: int) -> Iterator[slice]:
    """Ranges of samples such that one direction of the widest sweep, and the loss factor's rows, fit."""
    size = itemsize(state.weights.dtype)
    per_sample = 1
    if "outer" in parts:
        factor_columns = plan.outer_rows
        widest = max((n.numel for n in state.program), default=1)
        dense = sum(leaf.numel for i, leaf in enumerate(request.leaves) if i not in plan.gates)
        per_sample = max(per_sample, factor_columns * (4 * widest + dense))
    if "functional" in parts:
        per_sample = max(per_sample, *(3 * c.unit for c in plan.columns), 1)
    step = max(1, min(state.samples, working // (per_sample * size)))
    for start in range(0, state.samples, step):
        yield slice(start, min(start + step, state.samples))


def narrow(state: State, window: slice) -> State:
    """The same point restricted to some samples."""
    if window.start == 0 and window.stop == state.samples:
        return state
    values = {n: v[window] if v.shape[0] == state.samples and n.batched else v for n, v in state.values.items()}
    return replace(state, values=values, weights=state.weights[window], samples=window.stop - window.start)


def _width(column: Column, samples: int, working: int, size: int) -> int:
    fits = working // max(1, 3 * column.unit * samples * size)
    cached = _CACHE // max(1, column.largest * samples * size)
    return int(max(1, min(column.width, fits, cached)))


# -- the two parts ---------------------------------------------------------------------------------


def _add_outer(state: State, request: Request, plan: Plan, result: Accumulator, window: slice) -> None:
    pairs = [p for p in request.pairs if "H_O" in plan.kinds[p]]
    if not pairs:
        return
    factor = _outer.factor_loss(state)
    if factor.columns.shape[1] == 0:
        return
    leaves = {i for pair in pairs for i in pair}
    rows = _outer.pull_rows(state, factor, request, plan, leaves)
    for i, j in pairs:
        if i in rows and j in rows:
            piece = _outer.combine(rows[i], rows[j], factor.signs, result.keep)
            result.add(i, j, piece, slice(None), window)


def _add_column(
    state: State, request: Request, column: Column, result: Accumulator, window: slice, keep: bool, working: int
) -> None:
    per_sample = keep or column.basis == "activation"
    step = _width(column, state.samples, working, itemsize(state.weights.dtype))
    for start in range(0, column.width, step):
        stop = min(start + step, column.width)
        found = _sweep_column(state, request, column, start, stop, per_sample)
        for row in column.rows:
            target = request.leaves[row]
            if target not in found:
                continue
            h = found[target]
            if keep and h.shape[0] == 1:
                h = h.expand(state.samples, *h.shape[1:])
            if not per_sample and h.shape[0] > 1:
                h = h.sum(0, keepdim=True)
            h = _sweep.matrices(h)  # [N or 1, B, p_row]
            piece = h if keep else h[0]
            if column.basis == "parameter":
                result.add(column.leaf, row, piece, slice(start, stop), window)
            elif column.gate is not None and column.basis == "channel":
                result.add_channels(column.leaf, row, piece, column.gate.channels, slice(start, stop), window)
            else:
                _add_activation_piece(state, column, h, row, result, window, start, stop)


def _sweep_column(
    state: State, request: Request, column: Column, start: int, stop: int, per_sample: bool
) -> dict[Node, Tensor]:
    like = state.values[column.seed]
    channelwise = column.basis == "channel"
    if channelwise and column.gate is not None:
        seed = Convolution().seed_channels(state.call(column.gate.node), column.gate.argument)[:, start:stop]
    else:
        eye = torch.zeros(stop - start, column.seed.numel, dtype=like.dtype, device=like.device)
        eye[torch.arange(stop - start), torch.arange(start, stop)] = 1
        seed = eye.reshape(1, stop - start, *column.seed.shape)
    tangents = _sweep.push_forward(state, {column.seed: seed}, column.within, column.held, channelwise=channelwise)
    rows = [request.leaves[r] for r in column.rows]
    return _sweep.pull_back(state, {}, rows, tangents=tangents, curved=column.curved, keep=per_sample)


def _add_activation_piece(
    state: State,
    column: Column,
    h: Tensor,
    row: int,
    result: Accumulator,
    window: slice,
    start: int,
    stop: int,
) -> None:
    """Apply the layer's inputs: directions of ``z`` become directions of W (or b)."""
    assert column.gate is not None
    x = _outer.gate_inputs(state, column.gate.node, column.gate.argument)  # [N, i]
    n, i = state.samples, x.shape[1]
    h = h.expand(n, *h.shape[1:])
    rows = slice(start * i, stop * i)
    if result.keep:
        piece = torch.einsum("nbp,ni->nbip", h, x).flatten(1, 2)
    else:
        b, p = h.shape[1:]
        piece = (x.T @ h.reshape(n, b * p)).reshape(i, b, p).transpose(0, 1).reshape(b * i, p)
    result.add(column.leaf, row, piece, rows, window)
