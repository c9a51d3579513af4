"""Axes of values ``[N, *shape]`` and of bundles ``[N, B, *shape]``: what several rules do with them."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def align(t: Tensor, lead: int, rank: int) -> Tensor:
    """Insert size-1 axes after the ``lead`` leading ones so that broadcasting works against ``rank`` own axes."""
    own = t.dim() - lead
    if own >= rank:
        return t
    return t.reshape(*t.shape[:lead], *([1] * (rank - own)), *t.shape[lead:])


#: Elements of a product that is summed at once.
_PIECE = 1 << 17


def unbroadcast(t: Tensor, lead: int, shape: torch.Size) -> Tensor:
    """Sum ``t`` (``lead`` leading axes) over the axes along which ``shape`` was broadcast."""
    extra = t.dim() - lead - len(shape)
    axes = list(range(lead, lead + extra))
    axes += [lead + extra + i for i, s in enumerate(shape) if s == 1 and t.shape[lead + extra + i] != 1]
    if axes:
        t = t.sum(axes, keepdim=True)
    return t.reshape(*t.shape[:lead], *shape)


def product_onto(t: Tensor, factor: Tensor | float, shape: torch.Size) -> Tensor:
    """:func:`unbroadcast` of ``t · factor`` (two leading axes), in pieces that stay in the cache where it sums."""
    if isinstance(factor, float):
        return unbroadcast(t if factor == 1.0 else t * factor, 2, shape)
    n, numel = max(t.shape[0], factor.shape[0]), t.shape[1:].numel()
    if n == 1 or numel <= t.shape[1] * shape.numel() or n * numel <= _PIECE:
        return unbroadcast(t * factor, 2, shape)
    step = max(1, _PIECE // numel)
    sides = [torch.split(x, step) if x.shape[0] == n else itertools.repeat(x) for x in (t, factor)]
    return torch.cat([unbroadcast(a * b, 2, shape) for a, b in zip(*sides, strict=False)])


def bundle(x: Tensor) -> Tensor:
    """A value ``[N, *shape]`` as something that broadcasts against bundles ``[N, B, *shape]``."""
    return x.unsqueeze(1)


def members_last(t: Tensor) -> bool:
    """Whether the members of a bundle ``[N, B, *shape]`` stand side by side for every element, last in memory."""
    return t.shape[1] > 1 and t.stride(1) == 1 and t.dim() > 2


def room_in_order(like: Tensor, shape: tuple[int, ...], value: Tensor) -> Tensor:
    """Memory for a bundle ``[N, B, *shape]`` in the order in memory of ``value`` ``[N, *shape]``.

    What reads parts of the value undid a change of order, which then costs nothing on the way back.
    """
    order = [0, *sorted(range(2, len(shape)), key=lambda d: -value.stride(d - 1))]
    order.insert(len(order) if members_last(like) else 1, 1)
    return like.new_empty([shape[d] for d in order]).permute([order.index(d) for d in range(len(shape))])


def flat(t: Tensor) -> Tensor:
    """``[N, *shape]`` as ``[N, elements]``, numbers included."""
    return t.reshape(t.shape[0], t.shape[1:].numel())
