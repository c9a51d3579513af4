"""The terms of the second-order expansion of L_{k+1} − L_k around the trained point, and the difference itself.

With ``d = R u``, ``‖u‖ = 1``, and ``Δv = v_{k+1} − (v_1 + … + v_k)/k`` for any quantity v of the samples,

    (k+1) (L_{k+1} − L_k)(θ* + d) = Δℓ + R Δ(∇ℓ·u) + R²/2 Δ(uᵀ H u) + remainder,

exactly, with remainder 0 in the limit. Everything on the right is one number per sample and direction, so that orders
and k are cumulative sums. H is the Hessian where it exists: where a sample changes its pattern of active units between
θ* and θ, the gradient jumps and the remainder contains the jump.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import dagh

from ._measure_config import MeasureConfig
from ._measure_line import Params, lines_along, unit_directions
from ._measure_losses import as_double, sample_loss
from ._measure_patterns import patterns

Array = np.ndarray[Any, np.dtype[Any]]

#: Single pairs (order, direction) kept for a scatter plot, per k and R.
_SHOWN = 64


def terms(
    graph: dagh.Graph, loss: str, x: Tensor, y: Tensor, config: MeasureConfig, seed: int
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Terms, prediction and measured difference at every k of ``config.at_k`` and R of ``config.radii``.

    Losses are evaluated in float64, as their differences cancel; slopes and curvatures in the dtype of the graph's
    model. Arrays ``[K, R]``, means of absolute values over orders and directions: ``terms_measured``,
    ``terms_zeroth``, ``terms_first``, ``terms_second``, ``terms_second_outer``, ``terms_predicted``,
    ``terms_predicted_outer``, ``terms_remainder``, ``terms_remainder_outer``; ``terms_measured_max`` is the largest of
    the measured differences, ``terms_level`` the largest loss seen among the samples, over k + 1. Arrays ``[R]``:
    ``terms_changed_samples`` (share of samples with another pattern) and ``terms_changed_units`` (share of units).
    Arrays ``[K, R, S]`` of single pairs, signed: ``terms_pairs_measured`` and ``terms_pairs_predicted``. The axes are
    ``terms_k`` and ``terms_radius``.
    """
    model, n = graph.model, len(x)
    at = np.array([k for k in config.at_k if k < n], dtype=np.int64)
    radii = np.array(config.radii, dtype=np.float64)
    if not len(at) or not len(radii):
        return {}, {"reason": f"no k below the {n} samples used"}
    directions = unit_directions(model, config.directions, seed)
    lines = lines_along(graph, loss, x, y, directions)
    start, moved, changed = _moved(model, loss, x, y, directions, radii)
    orders = _orders(n, config.shuffles, seed, x.device)

    def difference(v: Tensor) -> Tensor:
        """``Δv / (k + 1)``: ``[N, D] -> [K, S, D]`` over orders S."""
        rows = v[orders]  # [S, N, D]
        means = rows.cumsum(1)
        return torch.stack([(rows[:, k] - means[:, k - 1] / k) / (k + 1) for k in at.tolist()])

    r = torch.from_numpy(radii).to(x.device)[None, :, None, None]
    zeroth = difference(start[:, None].expand(-1, len(directions)))[:, None].expand(-1, len(radii), -1, -1)
    first = r * difference(lines.slope.double())[:, None]
    second = r**2 / 2 * difference(lines.curvature.double())[:, None]
    outer = r**2 / 2 * difference(lines.outer.double())[:, None]
    measured = torch.stack([difference(m) for m in moved], 1)
    predicted, by_outer = zeroth + first + second, zeroth + first + outer
    means = {
        "measured": measured, "zeroth": zeroth, "first": first, "second": second, "second_outer": outer,
        "predicted": predicted, "predicted_outer": by_outer, "remainder": measured - predicted,
        "remainder_outer": measured - by_outer,
    }  # fmt: skip
    arrays = {f"terms_{name}": v.abs().mean((2, 3)).cpu().numpy() for name, v in means.items()}
    worst = torch.stack([m.max() for m in moved]).clamp(min=float(start.max())).cpu().numpy()
    arrays |= {
        "terms_k": at,
        "terms_radius": radii,
        "terms_measured_max": measured.abs().amax((2, 3)).cpu().numpy(),
        "terms_level": worst[None] / (at[:, None] + 1),
        "terms_changed_samples": changed[0],
        "terms_changed_units": changed[1],
        "terms_pairs_measured": _pairs(measured),
        "terms_pairs_predicted": _pairs(predicted),
    }
    scalars = {
        "samples": n,
        "curvature": float(lines.curvature.mean()),
        "outer_curvature": float(lines.outer.mean()),
        "largest_term": _largest(arrays),
    }
    return arrays, scalars


def _moved(
    model: nn.Module, loss: str, x: Tensor, y: Tensor, directions: list[Params], radii: Array
) -> tuple[Tensor, list[Tensor], tuple[Array, Array]]:
    """Losses at θ* ``[N]``, at each R ``[N, D]``, and the shares of samples and of units with another pattern."""
    each = sample_loss(loss)
    samples, units = np.zeros(len(radii)), np.zeros(len(radii))
    model, x, y = copy.deepcopy(model).double(), as_double(x), as_double(y)
    output, here = patterns(model, x)
    first = each(output, y)
    start = {n: p.detach() for n, p in model.named_parameters()}
    losses: list[Tensor] = []
    for i, radius in enumerate(radii.tolist()):
        columns = []
        for direction in directions:
            there = {n: p + radius * direction[n].double() if n in direction else p for n, p in start.items()}
            output, mask = patterns(model, x, there)
            columns.append(each(output, y))
            other = _compare(here, mask)
            samples[i] += float((other > 0).double().mean()) / len(directions)
            units[i] += float(other.mean()) / len(directions)
        losses.append(torch.stack(columns, 1))
    return first, losses, (samples, units)


def _compare(one: list[Tensor], two: list[Tensor]) -> Tensor:
    """Share of units that differ, per sample ``[N]``."""
    if not one:  # a smooth net has one piece
        return torch.zeros(1)
    return (torch.cat(one, 1) != torch.cat(two, 1)).double().mean(1)


def _orders(n: int, shuffles: int, seed: int, device: torch.device) -> Tensor:
    rng = np.random.default_rng([seed, 1])
    return torch.from_numpy(np.stack([rng.permutation(n) for _ in range(shuffles)])).to(device)


def _pairs(v: Tensor) -> Array:
    flat = v.flatten(2)
    step = max(1, flat.shape[2] // _SHOWN)
    return np.asarray(flat[:, :, ::step][:, :, :_SHOWN].cpu().numpy())


def _largest(arrays: dict[str, Array]) -> list[list[str]]:
    """Which term is the largest, at every k and R."""
    names = ("zeroth", "first", "second")
    stacked = np.stack([arrays[f"terms_{n}"] for n in names])
    return [[names[j] for j in row] for row in stacked.argmax(0)]
