"""Norms of convolutions as linear maps of images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dagh.errors import ReductionError, ShapeError

from ._spectral import check_matrix, spectral_norm


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
    where the kernel would wrap around are rows that T lacks, and so are those that a stride skips. A
    submatrix has no larger norm. C is block-diagonal in the Fourier basis, which is unitary: one block
    ``Ŵ(f)`` of ``C_out × C_in`` per frequency and group. Hence ``‖T‖ ≤ ‖C‖ = max_f ‖Ŵ(f)‖``, the value
    returned.

    Args:
        weight: ``[C_out, C_in / groups, *kernel]``, the layout of ``torch.nn.Conv1d`` to ``Conv3d``.
        size: spatial size of the input, one number per axis of the kernel.
        stride: at least 1. The bound does not depend on it; strided layers lie further below their bound.
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
    _per_axis("stride", stride, dims, 1)
    pads, spacing = _per_axis("padding", padding, dims, 0), _per_axis("dilation", dilation, dims, 1)
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
    spread = weight.new_zeros(*weight.shape[:2], *grid)
    taps: tuple[slice, ...] = tuple(slice(0, k, d) for k, d in zip(kernel, spacing, strict=True))
    spread[(slice(None), slice(None), *taps)] = weight
    # Convolution or correlation, and the kernel's offset, change phases and conjugates only, not singular
    # values.
    symbol = torch.fft.fftn(spread, dim=tuple(range(2, 2 + dims)))
    blocks = symbol.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).permute(0, 3, 1, 2)
    return spectral_norm(blocks).max()


def _per_axis(name: str, value: int | Sequence[int], dims: int, least: int) -> tuple[int, ...]:
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) != dims:
        raise ShapeError(f"{name} {values} must be one number, or {dims}")
    if any(v < least for v in values):
        raise ReductionError(f"{name}={value}: expected at least {least}")
    return values
