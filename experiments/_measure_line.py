"""How the loss of every sample bends along a line through the trained point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import dagh

Params = dict[str, Tensor]

#: Samples whose tangents are held at once.
_CHUNK = 64


class Lines(NamedTuple):
    """Loss ``[N]`` of every sample; slope, curvature by H and by H_O alone along every direction ``[N, D]``, at θ*."""

    loss: Tensor
    slope: Tensor
    curvature: Tensor
    outer: Tensor


def unit_directions(model: nn.Module, count: int, seed: int) -> list[Params]:
    """Random unit vectors in the space of the trainable parameters, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = []
    for _ in range(count):
        flat = torch.randn(sum(p.numel() for p in named.values()), generator=generator, dtype=torch.float64)
        pieces = (flat / flat.norm()).split([p.numel() for p in named.values()])
        found.append({n: t.view(p.shape).to(p) for (n, p), t in zip(named.items(), pieces, strict=True)})
    return found


def lines_along(graph: dagh.Graph, loss: str, x: Tensor, y: Tensor, directions: Sequence[Params]) -> Lines:
    """The expansions of every sample's loss along all directions at once, a few samples at a time."""
    bundle = {name: torch.stack([d[name] for d in directions]) for name in directions[0]}
    found = [
        graph.evaluate(loss, xs, ys, reduction="none").along(bundle)
        for xs, ys in zip(torch.split(x, _CHUNK), torch.split(y, _CHUNK), strict=True)
    ]
    return Lines(*(torch.cat([getattr(part, name) for part in found]) for name in Lines._fields))
