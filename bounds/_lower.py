"""Spectral norms approached from below."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dagh.errors import ReductionError, ShapeError


def norm_lower_bound(
    linear: Callable[[Tensor], Tensor],
    shape: Sequence[int],
    *,
    steps: int = 30,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> float:
    """**Lower** bound on the spectral norm of a linear map, by power iteration.

    Each step replaces v by ``TᵀT v`` (normalized); the value is the Rayleigh quotient ``‖T v‖ / ‖v‖`` of the last v,
    which no choice of v makes larger than ``‖T‖``. It grows with the steps and tends to ``‖T‖`` unless the start,
    drawn from ``seed``, has no part along the leading singular vector. It is *not* an upper bound, however many steps
    are taken: compare it with :func:`convolution_norm_bound` or :func:`gram_bound` to see how tight these are.

    Args:
        linear: A linear function of one tensor (no bias), differentiable by PyTorch, e.g.
            ``lambda x: F.conv2d(x, weight, padding=1)``.
        shape: Shape of its argument, batch axis included.
        steps: Power steps, at least 0.
        seed: Of the start.
        dtype: Of the argument; give that of the weights.
        device: Of the argument.

    Raises:
        ReductionError: ``steps`` is negative.
        ShapeError: the argument has no elements.
    """
    if steps < 0:
        raise ReductionError(f"steps={steps}: expected a non-negative number of power steps")
    if 0 in tuple(shape):
        raise ShapeError(f"shape {tuple(shape)} has no elements")
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype=dtype, device=device)
    value = 0.0
    for step in range(steps + 1):
        v = v / torch.linalg.vector_norm(v)
        image, pull = torch.func.vjp(linear, v)[:2]
        value = float(torch.linalg.vector_norm(image))
        if value == 0.0 or step == steps:
            break
        v = pull(image / value)[0]
    return value
