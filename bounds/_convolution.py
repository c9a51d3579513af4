"""Norms of convolutions as linear maps of images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dagh.errors import ReductionError, ShapeError

from ._logs import spectral
from ._spectral import check_matrix


def convolution_norm_bound(
    weight: Tensor,
    size: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Upper bound on the spectral norm of a zero-padded convolution.

    The convolution T of an image of size n, padded with P zeros on each side, is a submatrix of the circular
    convolution C of size n + 2P: the padded positions are columns that only ever meet zeros, the positions
    where the kernel would wrap around are rows that T lacks. A submatrix has no larger norm. C is
    block-diagonal in the Fourier basis, which is unitary: one block ``Ŵ(f)`` of ``C_out × C_in`` per
    frequency and group. Hence ``‖T‖ ≤ ‖C‖ = max_f ‖Ŵ(f)‖``, the value returned.

    A stride s is taken exactly, not as a subset of rows: the image splits into s phases per axis, which become
    channels, and the convolution into one of stride 1 over ``⌈(n + 2P) / s⌉`` positions whose kernel has one
    slice of W per phase.

    Args:
        weight: ``[C_out, C_in / groups, *kernel]``, the layout of ``torch.nn.Conv1d`` to ``Conv3d``.
        size: spatial size of the input, one number per axis of the kernel.
        stride: at least 1.
        padding: zeros on each side.
        dilation: spacing of the kernel's taps.
        groups: number of groups; the norm is the largest of theirs.

    Returns:
        A scalar tensor.

    Raises:
        ShapeError: the kernel does not fit the padded image, or the numbers of axes or groups do not match.
        DtypeError: neither floating point nor complex, or half precision.
        NonFiniteError: NaN or Inf among the weights.
        ReductionError: a stride, dilation or number of groups below 1, or a negative padding.
    """
    check_matrix(weight, axes=3)
    dims = weight.dim() - 2
    if len(size) != dims:
        raise ShapeError(f"size {tuple(size)} must have {dims} numbers, one per axis of the kernel")
    steps = per_axis("stride", stride, dims, 1)
    pads, spacing = per_axis("padding", padding, dims, 0), per_axis("dilation", dilation, dims, 1)
    if groups < 1:
        raise ReductionError(f"groups={groups}: expected a positive number")
    if weight.shape[0] % groups:
        raise ShapeError(f"{weight.shape[0]} output channels cannot be split into {groups} groups")
    grid = [n + 2 * p for n, p in zip(size, pads, strict=True)]
    kernel = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], spacing, strict=True)]
    if any(k > n for k, n in zip(kernel, grid, strict=True)):
        raise ShapeError(f"a kernel of extent {tuple(kernel)} does not fit a padded image of size {tuple(grid)}")
    if weight.numel() == 0:
        return weight.abs().new_zeros(())
    coarse = [-(-n // s) for n, s in zip(grid, steps, strict=True)]
    spread = weight.new_zeros(*weight.shape[:2], *(c * s for c, s in zip(coarse, steps, strict=True)))
    taps: tuple[slice, ...] = tuple(slice(0, k, d) for k, d in zip(kernel, spacing, strict=True))
    spread[(slice(None), slice(None), *taps)] = weight
    if any(s > 1 for s in steps):
        split = [n for c, s in zip(coarse, steps, strict=True) for n in (c, s)]
        phases = [2 + 2 * i + 1 for i in range(dims)]
        spread = spread.reshape(*weight.shape[:2], *split).permute(0, 1, *phases, *(p - 1 for p in phases))
        spread = spread.reshape(weight.shape[0], -1, *coarse)
    # Convolution or correlation, and the kernel's offset, change phases and conjugates only, not singular
    # values.
    transform = torch.fft.fftn if spread.is_complex() else torch.fft.rfftn  # real: conjugate pairs once
    symbol = transform(spread, dim=tuple(range(2, 2 + dims)))
    blocks = symbol.reshape(groups, weight.shape[0] // groups, spread.shape[1], -1).permute(0, 3, 1, 2)
    return spectral(blocks).max()


def per_axis(name: str, value: int | Sequence[int], dims: int, least: int) -> tuple[int, ...]:
    """An option of a convolution as one number per axis; raises where there are too few or they are too small."""
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) != dims:
        raise ShapeError(f"{name} {values} must be one number, or {dims}")
    if any(v < least for v in values):
        raise ReductionError(f"{name}={value}: expected at least {least}")
    return values
