"""Whether a loss couples its samples, judged by its derivatives: in its value another term may be far larger."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dagh import _elsewhere
from dagh._interrupts import beyond
from dagh._objectives import Objective, part_of, pieces

#: Entries of outputs that are looked at.
_NUMBERS = 1 << 20


def interacts(objective: Objective, output: Tensor, targets: Any, n: int, scale: float) -> bool:
    """Whether the loss of a batch, ``scale`` times the sum over its samples by value, is none by its derivatives.

    Looked at at the output and a little away from it, of a large batch on its first samples; where a derivative does
    not exist nothing is said.
    """
    some = max(2, min(n, _NUMBERS * n // max(1, output.numel())))
    if some < n:
        (output, targets), n = part_of(output, targets, slice(0, some)), some
    return n > 1 and any(_at(objective, point, targets, n, scale) for point in (output, _elsewhere.moved(output)))


def _at(objective: Objective, output: Tensor, targets: Any, n: int, scale: float) -> bool:
    tolerance = 1e-10 if output.dtype == torch.float64 else 1e-5
    try:
        with torch.inference_mode(False), torch.enable_grad():
            targets = pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, targets)
            point = output.detach().clone().requires_grad_()
            slope = _gradient(objective.summed(point, targets), point, create=True)
            if slope is None or not bool(torch.isfinite(slope).all()):
                return False
            return _slopes_differ(objective, point, targets, n, scale, slope.detach(), 10 * tolerance) or (
                slope.requires_grad and _curves_across(slope, point, n, tolerance)
            )
    except Exception as error:  # not twice differentiable, or outside its domain: the user's code may raise anything
        if beyond(error):
            raise
        return False


def _gradient(total: Tensor, point: Tensor, create: bool = False) -> Tensor | None:
    if not total.requires_grad:
        return None
    found: Tensor | None = torch.autograd.grad(total.sum(), point, create_graph=create, allow_unused=True)[0]
    return found


def _slopes_differ(
    objective: Objective, point: Tensor, targets: Any, n: int, scale: float, slope: Tensor, tolerance: float
) -> bool:
    """Whether a part of the batch has another gradient alone than within it."""
    for window in pieces(n):
        count = window.stop - window.start
        some, theirs = part_of(point.detach(), targets, window)
        some = some.clone().requires_grad_()
        alone = _gradient(objective.summed(some, theirs), some)
        if alone is None:
            alone = torch.zeros_like(some)
        within = slope[window] if scale == 1.0 else slope[window] * (n / count)
        size = max(float(alone.abs().max()), float(within.abs().max()))
        if not float((alone - within).abs().max()) <= tolerance * size:
            return True
    return False


def _curves_across(slope: Tensor, point: Tensor, n: int, tolerance: float) -> bool:
    """Whether the gradient of some samples changes with the output of others.

    Any two samples differ in a bit of their numbers: one product with the Hessian for each bit.
    """
    numbers = torch.arange(n, device=point.device)
    direction = _elsewhere.random_like(point.shape, point)
    for bit in range((n - 1).bit_length()):
        moving = (numbers >> bit & 1).bool()
        mask = moving.reshape(n, *([1] * (point.dim() - 1))).to(point)
        product = torch.autograd.grad((slope * direction * mask).sum(), point, retain_graph=True, allow_unused=True)[0]
        if product is None:
            continue
        across = float(product[~moving].abs().max())
        if across > tolerance * float(product.abs().max()):
            return True
    return False
