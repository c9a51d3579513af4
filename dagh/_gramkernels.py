"""Gram matrices of per-sample gradients of one weight, without all of the gradients.

A weight that multiplies rows of inputs (a linear layer, a convolution, an embedding) has, for sample n and factor
column r, the gradient ``B_{nr} = Σ_t s_{nrt} x_{nt}ᵀ`` over the T positions where it is used: cotangents
``s [N, r, T, o]``, inputs ``x [N, T, i]``. Three ways lead to ``⟨B_{nr}, B_{mq}⟩``; the cheapest is taken.

- one position: ``(s sᵀ) ∘ (x xᵀ)``;
- position by position: ``Σ_{t,u} ⟨s_{nrt}, s_{mqu}⟩ ⟨x_{nt}, x_{mu}⟩``, no gradient at all ("ghost" products; Li,
  Tramèr, Liang & Hashimoto 2022, for norms);
- the gradients themselves, a few output channels at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dagh._chunks import ranges

Way = Literal["rows", "positions", "one position"]


@dataclass
class Inputs:
    """What a weight multiplies: ``count`` rows per sample, ``width`` numbers each.

    ``of(n)`` forms the rows ``[T, i]`` of one sample; ``index`` ``[N, T]`` stands for rows of an identity matrix (an
    embedding), with ``-1`` where no derivative flows.
    """

    samples: int
    count: int
    width: int
    of: Callable[[int], Tensor] | None = None
    index: Tensor | None = None
    held: list[Tensor] | None = None

    def gram(self, n: int, window: slice) -> Tensor:
        """``⟨x_{nt}, x_{mu}⟩`` for the samples m of the window: ``[M, T, T]``, Boolean for an embedding."""
        if self.index is not None:
            mine = self.index[n]
            return (mine[None, :, None] == self.index[window][:, None, :]) & (mine >= 0)[None, :, None]
        mine, others = self.rows(n), [self.rows(m) for m in range(window.start, window.stop)]
        return (mine @ torch.cat(others).T).reshape(len(mine), len(others), -1).transpose(0, 1)

    def rows(self, n: int) -> Tensor:
        """``x_n``: ``[T, i]``, formed once where all samples' rows are held."""
        if self.held is not None:
            return self.held[n]
        assert self.of is not None
        return self.of(n)

    def hold(self, limit: int) -> None:
        """Keep the rows of all samples if these are at most ``limit`` numbers."""
        if self.of is not None and self.samples * self.count * self.width <= limit:
            self.held = [self.of(n) for n in range(self.samples)]


def choose_way(samples: int, columns: int, positions: int, outputs: int, width: int, indexed: bool = False) -> Way:
    """The cheapest way, by multiplications; ``indexed``: the inputs are rows of an identity matrix."""
    if positions == 1:
        return "one position"
    n, r, t, o = samples, columns, positions, outputs
    by_rows = n * r * t * o * width + (n * r) ** 2 * o * width
    same = t * t * (1 if indexed else width)
    by_positions = n * (n + 1) // 2 * (same + t * t * r * o + r * r * t * o)
    return "positions" if by_positions < by_rows else "rows"


def crossed_gram(cotangent: Tensor, inputs: Inputs, rows: Tensor, index: Tensor) -> Tensor:
    """``⟨B_{nr}, E_{mq}⟩`` of a table used twice, as a linear layer (B) and as an embedding (E): ``[N·r, N·r]``.

    ``cotangent [N, r, T, V]`` and ``inputs`` belong to the layer, ``rows [N, r, U, d]`` and ``index [N, U]`` (``-1``
    where no derivative flows) to the embedding: ``Σ_{t,u} s_{nrt}[index_{mu}] ⟨x_{nt}, e_{mqu}⟩``.
    """
    n, r = cotangent.shape[:2]
    out = torch.zeros(n, r, n, r, dtype=torch.float64, device=cotangent.device)
    for k in range(n):
        x = inputs.rows(k)
        for m in range(n):
            used = index[m] >= 0
            met = cotangent[k][..., index[m][used]].flatten(1)  # [r, T·U]
            moved = (x @ rows[m][:, used].flatten(0, 1).T).reshape(x.shape[0], r, -1)
            out[k, :, m] = (met @ moved.transpose(1, 2).flatten(0, 1)).double()
    return out.reshape(n * r, n * r)


def weight_gram(cotangent: Tensor, inputs: Inputs, way: Way, limit: int) -> Tensor:
    """``⟨B_{nr}, B_{mq}⟩``: ``[N·r, N·r]`` in float64, from ``cotangent [N, r, T, o]``.

    ``limit`` bounds the numbers held at once beside the arguments.
    """
    inputs.hold(limit)
    if way == "one position":
        return _one_position(cotangent, inputs)
    if way == "positions":
        return _by_positions(cotangent, inputs, limit)
    return _by_rows(cotangent, inputs, limit)


def rows_gram(rows: Tensor) -> Tensor:
    """``[N·r, N·r]`` in float64 from explicit gradients ``[N, r, p]``."""
    flat = rows.flatten(0, 1)
    return (flat @ flat.T).double()


def _one_position(s: Tensor, inputs: Inputs) -> Tensor:
    n, r = s.shape[:2]
    flat = s.reshape(n * r, -1)
    if inputs.index is not None:
        same = torch.cat([inputs.gram(m, slice(0, n)) for m in range(n)])
    else:
        x = torch.cat([inputs.rows(m) for m in range(n)])
        same = x @ x.T
    core = (flat @ flat.T).double().reshape(n, r, n, r)
    return (core * same.reshape(n, 1, n, 1)).reshape(n * r, n * r)


def _by_positions(s: Tensor, inputs: Inputs, limit: int) -> Tensor:
    n, r, t, o = s.shape
    last = s.permute(0, 2, 3, 1).reshape(n, t, o * r)  # r innermost: the product below is then a matrix as it is
    out = torch.zeros(n, r, n, r, dtype=torch.float64, device=s.device)
    step = max(1, limit // (t * (t + o * r)))
    for k in range(n):
        mine = s[k].reshape(r, t * o)
        for window in ranges(n, step, k):
            same = inputs.gram(k, window).to(s.dtype)
            moved = torch.bmm(same, last[window]).reshape(-1, t * o, r)
            block = (mine @ moved).double()  # [M, r, r]
            out[k, :, window] = block.transpose(0, 1)
            out[window, :, k] = block.transpose(1, 2)
    return out.reshape(n * r, n * r)


def _by_rows(s: Tensor, inputs: Inputs, limit: int) -> Tensor:
    n, r, _, o = s.shape
    out = torch.zeros(n * r, n * r, dtype=torch.float64, device=s.device)
    step = max(1, min(o, limit // (n * r * inputs.width)))
    for start in range(0, o, step):
        some = s[..., start : start + step].transpose(2, 3).flatten(1, 2)  # [N, r·o, T]
        rows = torch.stack([some[k] @ _dense(inputs, k, s) for k in range(n)])
        rows = rows.reshape(n * r, -1)
        out += rows @ rows.T
    return out


def _dense(inputs: Inputs, n: int, like: Tensor) -> Tensor:
    if inputs.index is None:
        return inputs.rows(n)
    index = inputs.index[n]
    out = like.new_zeros(index.shape[0], inputs.width)
    used = index >= 0
    out[used, index[used]] = 1
    return out
