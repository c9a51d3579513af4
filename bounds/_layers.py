"""Facts about linear layers: how often weights are used, how much patches overlap, rigorous norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from dagh.errors import ReductionError, ShapeError

from ._convolution import convolution_norm_bound, per_axis
from ._logs import log, spectral
from ._spectral import check_matrix

#: A layer is written out as a dense matrix up to this many entries, and this many rows or columns.
DENSE_ENTRIES, DENSE_SIDE = 4_000_000, 1_000

PADDING_MODES = ("zeros", "circular", "reflect", "replicate")


@dataclass
class LayerFacts:
    """What is known of one linear layer z = T x before any data are seen.

    ``reuse`` is r, the largest number of output positions that use one weight (``‖∂T/∂W‖²`` where every entry of T
    is 0 or one weight); ``overlap`` is κ, the largest number of patches that one input element falls in, each use
    counted. ``positions`` is the number of output positions, each of which uses the bias once. ``frobenius`` is
    ``‖T‖_F``, ``matrix`` the spectral norm ``‖W‖₂`` of W as a matrix ``C_out × C_in·k`` (the largest over groups).

    With patches u_i, ``‖Tx‖² = Σ_i ‖W u_i‖² ≤ ‖W‖₂² Σ_i ‖u_i‖² ≤ κ ‖W‖₂² ‖x‖²``. On the other hand
    ``‖Tx‖² ≤ ‖T‖_F² ‖x‖² ≤ r ‖W‖_F² ‖x‖²``, which needs the Frobenius norm: with r < κ a patch of the image's edge
    may leave most of W unused, and ``√r ‖W‖₂`` can be below ``‖T‖`` (W = I of size 3 as three taps on one pixel
    padded by two: 1 < √3). Together
    ``‖Tx‖² ≤ min(r, κ) ‖W‖_F² ‖x‖²``: :attr:`kt` bounds the derivative in W.
    """

    weight: Tensor
    reuse: int
    overlap: int
    positions: int
    frobenius: float
    matrix: float
    sides: tuple[int, int]
    dense: Callable[[], Tensor] | None = None
    candidates: Callable[[], dict[str, float]] | None = None

    @property
    def kt(self) -> int:
        """min(r, κ)."""
        return min(self.reuse, self.overlap)

    @cached_property
    def bounds(self) -> dict[str, float]:
        """Every rigorous upper bound on ``‖T‖`` at hand, by method."""
        found = {"frobenius": self.frobenius, "patches": math.sqrt(self.overlap) * self.matrix}
        if self.affordable:
            found["dense"] = float(spectral(self.matrix_of_layer))
        elif self.candidates is not None:
            found |= self.candidates()
        return found

    @property
    def affordable(self) -> bool:
        """Whether T is small enough to be written out."""
        return self.dense is not None and prod(self.sides) <= DENSE_ENTRIES and min(self.sides) <= DENSE_SIDE

    @cached_property
    def matrix_of_layer(self) -> Tensor:
        """T itself, ``[outputs, inputs]``."""
        assert self.dense is not None
        return self.dense()

    @property
    def method(self) -> str:
        """Which of :attr:`bounds` is the smallest."""
        return min(self.bounds, key=lambda k: self.bounds[k])

    @property
    def tau(self) -> float:
        """The smallest rigorous upper bound on ``‖T‖``."""
        return self.bounds[self.method]

    @cached_property
    def spread(self) -> float | None:
        """:func:`row_spread` of T where it can be written out."""
        return row_spread(self.matrix_of_layer) if self.affordable else None


def linear_facts(weight: Tensor, positions: int = 1) -> LayerFacts:
    """Facts of a linear layer ``[out, in]`` applied at every one of ``positions``.

    Raises:
        ShapeError: not a matrix. NonFiniteError: NaN or Inf among the weights.
    """
    check_matrix(weight)
    if weight.dim() != 2:
        raise ShapeError(f"expected a matrix, got shape {tuple(weight.shape)}")
    norm = float(spectral(weight))
    out, inside = weight.shape
    facts = LayerFacts(
        weight, positions, 1, positions, math.sqrt(positions) * _norm(weight), norm, (out, inside),
        dense=(lambda: weight) if positions == 1 else None, candidates=lambda: {"dense": norm},
    )  # fmt: skip
    return facts


def convolution_facts(
    weight: Tensor,
    size: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    images: int = 1,
) -> LayerFacts:
    """Facts of a convolution of images of a given size.

    Without collisions of taps ``QᵀQ`` is diagonal with the number of positions at which each weight meets the image,
    hence r. κ is counted by folding ones. Both are exact for every padding mode, stride, dilation and number of groups;
    where taps collide (a circular kernel longer than the image, reflection, replication) ``‖T‖_F`` and r count
    the collided taps as one entry each time they are used, which only enlarges them.

    Args:
        weight: ``[C_out, C_in / groups, *kernel]``.
        size: spatial size of the input.
        stride: as in ``torch.nn.Conv2d``.
        padding: as in ``torch.nn.Conv2d``.
        dilation: as in ``torch.nn.Conv2d``.
        groups: as in ``torch.nn.Conv2d``.
        padding_mode: ``"zeros"``, ``"circular"``, ``"reflect"`` or ``"replicate"``.
        images: how many images one sample holds (coupled samples).

    Raises:
        ShapeError, ReductionError, NonFiniteError: as :func:`convolution_norm_bound`.
    """
    check_matrix(weight, axes=3)
    if padding_mode not in PADDING_MODES:
        raise ReductionError(f"padding_mode={padding_mode!r}: expected one of {', '.join(PADDING_MODES)}")
    dims = weight.dim() - 2
    if len(size) != dims:
        raise ShapeError(f"size {tuple(size)} must have {dims} numbers, one per axis of the kernel")
    step, pads, spacing = (
        per_axis(name, value, dims, least)
        for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    )
    if groups < 1 or weight.shape[0] % groups:
        raise ShapeError(f"{weight.shape[0]} output channels cannot be split into {groups} groups")
    zeros = padding_mode == "zeros"
    maps = [
        _Axis.of(n, k, s, p, d, padding_mode)
        for n, k, s, p, d in zip(size, weight.shape[2:], step, pads, spacing, strict=True)
    ]
    if any(a.out < 1 for a in maps):
        raise ShapeError(f"a kernel {tuple(weight.shape[2:])} does not fit a padded image of size {tuple(size)}")
    counts = torch.tensor(1.0, dtype=weight.dtype, device=weight.device)
    for axis in maps:
        counts = counts.unsqueeze(-1) * torch.tensor(axis.counts, dtype=weight.dtype, device=weight.device)
    positions = prod(a.out for a in maps)
    split = weight.reshape(groups, weight.shape[0] // groups, -1)
    sides = (weight.shape[0] * positions, weight.shape[1] * groups * prod(size))
    collisions = prod(a.collisions for a in maps)

    def dense() -> Tensor:
        return dense_convolution(weight, size, step, pads, spacing, groups, padding_mode)

    def candidates() -> dict[str, float]:
        if zeros:
            return {"fft": float(
                convolution_norm_bound(weight, size, stride=step, padding=pads, dilation=spacing, groups=groups)
            )}  # fmt: skip
        padded = [n + 2 * p for n, p in zip(size, pads, strict=True)]
        pad = prod(a.repeats for a in maps)
        norm = float(convolution_norm_bound(weight, padded, stride=step, dilation=spacing, groups=groups))
        return {"fft": math.sqrt(pad) * norm}

    unit = weight.abs().max() if weight.numel() else weight.new_ones(())
    unit = torch.where(unit > 0, unit, 1)
    frobenius = float(unit * ((weight / unit).square() * counts * collisions).sum().sqrt()) * math.sqrt(images)
    return LayerFacts(
        weight, prod(max(a.counts) for a in maps) * collisions * images, prod(a.overlap for a in maps),
        positions * images, frobenius, float(spectral(split).max()), sides, dense, candidates,
    )  # fmt: skip


@dataclass(frozen=True)
class _Axis:
    """One axis of a convolution: ``counts[t]`` positions at which tap t meets the image, κ, repeats of an element by
    the padding, and the most taps of one position that meet the same element.
    """

    out: int
    counts: list[int]
    overlap: int
    repeats: int
    collisions: int

    @classmethod
    def of(cls, n: int, k: int, s: int, p: int, d: int, mode: str) -> _Axis:
        out = (n + 2 * p - d * (k - 1) - 1) // s + 1
        where = [_source(j - p, n, mode) for j in range(n + 2 * p)]
        counts, met, collisions = [0] * k, [0] * n, 1
        for i, t in product(range(max(out, 0)), range(k)):
            at = where[i * s + t * d]
            if at is not None:
                counts[t] += 1
                met[at] += 1
        for i in range(max(out, 0)):
            taps = [where[i * s + t * d] for t in range(k)]
            collisions = max(collisions, *(taps.count(a) for a in set(taps) if a is not None), 1)
        inside = [a for a in where if a is not None]
        return cls(out, counts, max(met, default=0), max((inside.count(a) for a in set(inside)), default=0), collisions)


def _source(j: int, n: int, mode: str) -> int | None:
    """The element that a padded position holds."""
    if 0 <= j < n:
        return j
    if mode == "zeros":
        return None
    if mode == "circular":
        return j % n
    if mode == "replicate":
        return min(max(j, 0), n - 1)
    return -j if j < 0 else 2 * (n - 1) - j


def dense_convolution(
    weight: Tensor, size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    groups: int, padding_mode: str = "zeros",
) -> Tensor:  # fmt: skip
    """The convolution as a matrix ``[outputs, inputs]``: its values on every unit image."""
    dims, channels = len(size), weight.shape[1] * groups
    n = channels * prod(size)
    images = torch.eye(n, dtype=weight.dtype, device=weight.device).reshape(n, channels, *size)
    if padding_mode != "zeros" and any(padding):
        around = [p for p in reversed(padding) for _ in range(2)]
        images = F.pad(images, around, mode=padding_mode)
        padding = [0] * dims
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    rows = convolve(images, weight, None, tuple(stride), tuple(padding), tuple(dilation), groups)
    return rows.reshape(n, -1).T


def patches(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """The unfolded input U: ``[N, m, C, *space]`` to ``[N, groups, (C / groups)·k, m·positions]``, zero-padded."""
    n, m, channels = x.shape[:3]
    space = x.shape[3:]
    dims = len(space)
    x = F.pad(x.reshape(n * m, channels, *space), [p for p in reversed(padding) for _ in range(2)])
    outs = [(s - d * (k - 1) - 1) // st + 1 for s, d, k, st in zip(x.shape[2:], dilation, kernel, stride, strict=True)]
    strides = x.stride()
    shape = (n * m, channels, *kernel, *outs)
    steps = (
        strides[0], strides[1], *(d * s for d, s in zip(dilation, strides[2:], strict=True)),
        *(st * s for st, s in zip(stride, strides[2:], strict=True)),
    )  # fmt: skip
    windows = x.as_strided(shape, steps)
    flat = windows.reshape(n, m, groups, channels // groups * prod(kernel), prod(outs))
    assert dims == len(kernel)
    return flat.permute(0, 2, 3, 1, 4).reshape(n, groups, flat.shape[3], -1)


def schur(matrix: Tensor) -> float:
    """Schur's test: ``√(max row sum · max column sum)`` of absolute values, as a logarithm."""
    return 0.5 * (log(float(matrix.abs().sum(1).max())) + log(float(matrix.abs().sum(0).max())))


def row_spread(matrix: Tensor) -> float:
    """``max_ij ‖t_i − t_j‖ / √2`` over the rows of T: at most ``‖(I − 11ᵀ/K) T‖``, often much less.

    For ``A = diag p − ppᵀ``, ``uᵀTᵀATu`` is the variance of ``Tu`` under p, at most a quarter of its squared range
    (Popoviciu), so that ``sup_p ‖TᵀAT‖ = ½ spread²``; attained at equal weight on the two rows furthest apart.
    """
    rows = matrix.detach().double()
    return float(torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").max()) / math.sqrt(2)


def _norm(t: Tensor) -> float:
    top = t.abs().max() if t.numel() else t.new_ones(())
    top = torch.where(top > 0, top, 1)
    return float(top * torch.linalg.vector_norm(t / top))
