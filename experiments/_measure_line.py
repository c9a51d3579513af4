"""How the loss of every sample bends along a line through the trained point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

import dagh
from dagh.errors import DaghError

from ._measure_losses import evaluating, plain_attention, sample_loss

Params = dict[str, Tensor]

#: Samples on which forward differentiation is compared with dagh's products, and the agreement asked for.
_CHECKED, _AGREE = 32, {torch.float32: 1e-3, torch.float64: 1e-8}
#: Samples per call of the exact Hessian along the lines.
_CHUNK = 64


@dataclass(frozen=True)
class Line:
    """Per sample ``[N]``, along θ* + t u: loss, slope, curvature by H and by H_O alone at t = 0."""

    loss: Tensor
    slope: Tensor
    curvature: Tensor
    outer: Tensor


def along(model: nn.Module, loss: str, x: Tensor, y: Tensor, direction: Params) -> Line:
    """The expansion of every sample's loss along one direction, by forward differentiation of the model.

    ``z(t)`` is differentiated twice; then ``uᵀH_O u = żᵀ A ż`` and ``uᵀH u = żᵀ A ż + ∇ℓ·z̈``.
    """
    each = sample_loss(loss)
    params = {n: p.detach() for n, p in model.named_parameters() if n in direction}
    tangent = {n: direction[n] for n in params}

    def velocity(p: Params) -> Any:
        return _jvp(lambda q: functional_call(model, q, (x,)), p, tangent)

    def objective(z: Tensor) -> Tensor:
        return each(z, y)

    with evaluating(model), torch.no_grad(), plain_attention():
        (z, first), (_, second) = _jvp(velocity, params, tangent)
        values, slope = _jvp(objective, z, first)
        _, outer = _jvp(lambda v: _jvp(objective, v, first)[1], z, first)
        _, bend = _jvp(objective, z, second)
    return Line(values, slope, outer + bend, outer)


def _jvp(f: Callable[[Any], Any], at: Any, tangent: Any) -> Any:
    """``f(at)`` and its derivative along ``tangent``, for one argument."""
    return jvp(f, (at,), (tangent,))


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


def lines_along(
    graph: dagh.Graph, loss: str, x: Tensor, y: Tensor, directions: Sequence[Params]
) -> tuple[list[Line], str, float]:
    """The expansions along all directions; how they were made; and how well they agree with ``uᵀ H u`` of dagh.

    Forward differentiation twice over is fast, and wrong where PyTorch's own rules are (LayerNorm, for one) or absent.
    So it is compared with products of :func:`dagh.operator` on some samples first; where they differ, everything comes
    from :func:`dagh.decompose` of the net as a function of the coefficients of the directions.
    """
    try:
        error = _disagreement(graph, loss, x[:_CHECKED], y[:_CHECKED], directions)
    except (NotImplementedError, RuntimeError) as problem:
        if isinstance(problem, DaghError):
            raise
        error = float("inf")
    if error <= _AGREE[next(iter(directions[0].values())).dtype]:
        return [along(graph.model, loss, x, y, d) for d in directions], "forward", error
    return _exact(graph.model, loss, x, y, directions), "dagh", 0.0


def _disagreement(graph: dagh.Graph, loss: str, x: Tensor, y: Tensor, directions: Sequence[Params]) -> float:
    """Largest relative difference of the mean curvatures along the directions."""
    found = [along(graph.model, loss, x, y, d) for d in directions]
    worst = 0.0
    full = dagh.operator(graph, loss, x, y)
    outer = dagh.operator(graph, loss, x, y, part="outer")
    flat = torch.stack([torch.cat([d[n].flatten() for n in full.names]) for d in directions], 1)
    size = torch.stack([v.curvature.abs().mean() for v in found]).clamp(min=1e-30)
    for op, got in ((full, [v.curvature for v in found]), (outer, [v.outer for v in found])):
        error = (torch.stack([v.mean() for v in got]) - (flat * (op @ flat)).sum(0)).abs()
        worst = max(worst, float((error / size).max()))
    return worst


class _Coefficients(nn.Module):
    """The net at θ* + Σ t_j u_j, as a function of t."""

    def __init__(self, model: nn.Module, directions: Sequence[Params]) -> None:
        super().__init__()
        self._model = [model]  # in a list: its parameters are not this module's
        self._names = list(directions[0])
        like = directions[0][self._names[0]]
        self.t = nn.Parameter(torch.zeros(len(directions), dtype=like.dtype, device=like.device))
        start = dict(model.named_parameters())
        for i, name in enumerate(self._names):
            self.register_buffer(f"start{i}", start[name].detach().clone())
            self.register_buffer(f"basis{i}", torch.stack([d[name] for d in directions]))

    def forward(self, x: Tensor) -> Tensor:
        moved = {
            name: self.get_buffer(f"start{i}") + torch.tensordot(self.t, self.get_buffer(f"basis{i}"), 1)
            for i, name in enumerate(self._names)
        }
        return cast(Tensor, functional_call(self._model[0], moved, (x,)))


def _exact(model: nn.Module, loss: str, x: Tensor, y: Tensor, directions: Sequence[Params]) -> list[Line]:
    """All directions from exact blocks per sample of the ``D × D`` Hessian in the coefficients."""
    with evaluating(model):
        graph = dagh.trace(_Coefficients(model, directions).eval(), x[:2])
        full, outer, slope = [], [], []
        for xs, ys in zip(torch.split(x, _CHUNK), torch.split(y, _CHUNK), strict=True):
            parts = dagh.decompose(graph, loss, xs, ys, reduction="none")
            full.append(parts.full["t", "t"].diagonal(dim1=1, dim2=2))
            outer.append(parts.outer["t", "t"].diagonal(dim1=1, dim2=2))
            slope.append(graph.evaluate(loss, xs, ys, reduction="none").adjoint("t"))
        with torch.no_grad():
            losses = sample_loss(loss)(model(x), y)
    c, o, s = torch.cat(full), torch.cat(outer), torch.cat(slope)
    return [Line(losses, s[:, j], c[:, j], o[:, j]) for j in range(len(directions))]
