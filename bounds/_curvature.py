"""How curved a loss can be in the model's output."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dagh.errors import LossError, ReductionError

from ._structure import Absent

_BOUNDS: dict[str, Callable[[int], float]] = {
    "cross_entropy": lambda k: 0.5 if k > 1 else 0.0,
    "nll": lambda k: 0.0,
    "mse": lambda k: 2 / k,
    "huber": lambda k: 1 / k,
    "smooth_l1": lambda k: 1 / k,
    "bce_with_logits": lambda k: 0.25 / k,
    "squared_hinge": lambda k: 2 / k,
    "hinge": lambda k: 0.0,
    "l1": lambda k: 0.0,
    "bce": lambda k: math.inf,
}


def loss_curvature_bound(loss: str, outputs: int) -> float:
    """Supremum of ``‖∂²ℓ/∂z²‖`` (spectral norm) over all outputs z and targets of one sample.

    ``loss`` is one of the names that :func:`dagh.hessian` takes, with PyTorch's defaults: elementwise losses
    average over the K = ``outputs`` elements of a sample, hence their factor 1/K; their Hessian is diagonal.
    At kinks (``hinge``, ``l1``, ``huber``, ``smooth_l1``, ``squared_hinge``) the statement is about the
    points where ℓ is twice differentiable, which are almost all.

    ========================  =======  ==================================================================
    loss                      value    proof
    ========================  =======  ==================================================================
    ``cross_entropy``         1/2      ``vᵀ(diag p − ppᵀ)v`` is the variance of v under p, at most
                                       ``(max v − min v)²/4`` (Popoviciu), at most ``‖v‖²/2`` because
                                       ``(s − t)² ≤ 2(s² + t²)``; attained at p = (½, ½, 0, …). The target
                                       enters linearly, so soft labels that sum to one change nothing.
                                       With one class the loss is constant: 0.
    ``mse``                   2/K      ``(z − y)²`` has second derivative 2
    ``huber``, ``smooth_l1``  1/K      1 inside the quadratic zone (δ = β = 1), 0 outside
    ``squared_hinge``         2/K      2y² = 2 where the margin is violated (y = ±1), 0 elsewhere
    ``bce_with_logits``       1/(4K)   ``σ(z)(1 − σ(z)) ≤ 1/4``, attained at z = 0
    ``nll``, ``hinge``,       0        linear, or piecewise linear, in z
    ``l1``
    ``bce``                   ∞        ``y/z² + (1 − y)/(1 − z)²`` is unbounded on (0, 1)
    ========================  =======  ==================================================================

    Raises:
        LossError: ``loss`` is not in the table.
        ReductionError: ``outputs`` is below 1.
    """
    if loss not in _BOUNDS:
        close = get_close_matches(loss, _BOUNDS, n=2)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(sorted(_BOUNDS))}"
        raise LossError(f"no curvature bound for the loss {loss!r}; {hint}")
    if outputs < 1:
        raise ReductionError(f"outputs={outputs}: expected a positive number")
    return _BOUNDS[loss](outputs)


@dataclass(frozen=True)
class Curvature:
    """Constants of a loss on one sample, as it enters a batch mean.

    ``sup`` ≥ ‖∂²ℓ/∂z²‖ and ``slope`` ≥ ‖∂ℓ/∂z‖ over all outputs and targets (``None``: unknown or infinite, with
    ``reason``); ``categorical``: the curvature is a multiple of ``diag p − ppᵀ`` and the gradient one of p − q, with
    probabilities p and q.
    """

    sup: float | None
    slope: float | None = None
    categorical: bool = False
    reason: str = ""

    def log_sup(self) -> float:
        """Logarithm of ``sup``; raises where there is none."""
        if self.sup is None or math.isinf(self.sup):
            raise Absent(self.reason or "no bound on the loss's curvature")
        return math.log(self.sup) if self.sup > 0 else -math.inf

    def log_slope(self) -> float:
        """Logarithm of ``slope``; raises where there is none."""
        if self.slope is None or math.isinf(self.slope):
            unknown = "no bound on the loss's gradient holds for all targets"
            raise Absent(unknown if self.sup is not None else self.reason or unknown)
        return math.log(self.slope) if self.slope > 0 else -math.inf


#: Bound on the gradient of the loss in one output element (of one position, for ``cross_entropy``).
_SLOPES = {"cross_entropy": math.sqrt(2), "bce_with_logits": 1.0, "huber": 1.0, "smooth_l1": 1.0, "l1": 1.0}


def curvature_of(loss: Any, output: Sequence[int], weight: float | None = None) -> Curvature:
    """Constants of a loss by name or ``torch.nn`` module.

    Args:
        loss: as in :func:`dagh.hessian`.
        output: shape of a sample's output, the model's own batch axis first.
        weight: what the sum over the elements (positions) of one sample is multiplied by, times the number of samples;
            default: one over their number, as in a mean, or 1 for modules that sum
            (one sample: give the number of samples for more).
    """
    name = loss if isinstance(loss, str) else _module_name(loss)
    if name is None:
        what = getattr(loss, "__name__", type(loss).__name__)
        return Curvature(None, reason=f"no curvature bound is known for the loss {what!r}; pass curvature=")
    classes = output[1] if len(output) > 1 else 1
    parts = math.prod(output) // (classes if name in ("cross_entropy", "nll") else 1)
    if weight is None:
        weight = 1.0 if getattr(loss, "reduction", "mean") == "sum" else 1 / max(parts, 1)
    sup = loss_curvature_bound(name, classes if name == "cross_entropy" else 1) * weight
    slope = _SLOPES.get(name)
    reason = "the curvature of the loss is unbounded" if math.isinf(sup) else ""
    categorical = name == "cross_entropy" and parts == 1 and classes > 1
    return Curvature(sup, None if slope is None else slope * math.sqrt(parts) * weight, categorical, reason)


def for_targets(known: Curvature, loss: Any, targets: Any) -> Curvature:
    """The constants for targets outside the range that the suprema assume.

    Cross-entropy with target masses Σq scales with the largest of them, and its gradient is bounded for q ≥ 0 only;
    that of binary cross-entropy for targets in [0, 1]; hinge losses scale with the size of their targets.
    """
    name = loss if isinstance(loss, str) else _module_name(loss)
    if known.sup is None or not isinstance(targets, Tensor) or not targets.dtype.is_floating_point:
        return known
    low, high = float(targets.min()), float(targets.abs().max())
    if name == "cross_entropy":
        mass = max(1.0, float(targets.sum(min(1, targets.dim() - 1)).abs().max()))
        slope = known.slope * mass if known.slope is not None and low >= 0 else None
        return replace(known, sup=known.sup * mass, slope=slope)
    if name == "squared_hinge":
        return replace(known, sup=known.sup * max(1.0, high) ** 2)
    if name == "bce_with_logits" and (low < 0 or high > 1):
        return replace(known, slope=None)
    return known


def _module_name(loss: Any) -> str | None:
    """The name of a ``torch.nn`` loss without options, or a forward of its own, that change its curvature."""
    if _is(loss, nn.CrossEntropyLoss):
        return "cross_entropy" if loss.weight is None else None
    if _is(loss, nn.BCEWithLogitsLoss):
        return "bce_with_logits" if loss.weight is None and loss.pos_weight is None else None
    if _is(loss, nn.MSELoss):
        return "mse"
    if _is(loss, nn.L1Loss):
        return "l1"
    if _is(loss, nn.NLLLoss):
        return "nll" if loss.weight is None else None
    return None


def _is(loss: Any, kind: type[nn.Module]) -> bool:
    """Whether a call of ``loss`` is that of ``kind``: a subclass may compute something else, and so may hooks."""
    return (
        isinstance(loss, kind)
        and type(loss).forward is kind.forward
        and type(loss).__call__ is kind.__call__
        and not {"forward", "__call__"} & set(vars(loss))
        and not loss._forward_hooks
        and not loss._forward_pre_hooks
    )


def largest_share(loss: Any, output: Tensor, targets: Any) -> float | None:
    """The largest s_n of a loss of a batch that is ``Σ_n s_n ℓ(z_n)``, ℓ the loss of a batch of one; else ``None``.

    Found from gradients in the output, at the output itself and next to it (a fitted sample has no gradient); a sample
    without any is taken to weigh 1 at least, as in a sum.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(output.shape, generator=generator, dtype=torch.float64, device="cpu").to(output)
    count = len(output)
    found: dict[int, float] = {}
    try:
        for z in (output, output + 0.1 * (output.abs().mean() + 1) * noise):
            whole = _gradient(loss, z, targets)
            if not bool(whole.isfinite().all()):
                continue  # next to the output the loss may not be defined
            for n in range(count):
                inside = whole[n : n + 1]
                alone = _gradient(loss, z[n : n + 1], pytree.tree_map(partial(_only, n), targets))
                if not bool(inside.any()) and not bool(alone.isfinite().all()):
                    found.setdefault(n, 0.0)  # a mean over no targets
                elif float(inside.norm()) > 1e-12 * float(whole.norm()):
                    share = float((alone * inside).sum() / alone.square().sum())
                    if not float((inside - share * alone).norm()) <= 1e-4 * float(inside.norm()):
                        return None
                    found[n] = max(abs(share), found.get(n, 0.0))
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None  # it does not take a single sample
    largest = max([*found.values(), 0.0 if len(found) == count else 1.0])
    return next((exact for exact in (1.0, 1 / count) if math.isclose(largest, exact, rel_tol=1e-4)), largest)


def _only(n: int, targets: Tensor) -> Tensor:
    return targets[n : n + 1]


def _gradient(loss: Any, z: Tensor, targets: Any) -> Tensor:
    point = z.detach().clone().requires_grad_()
    value = loss(point) if targets is None else loss(point, targets)
    (found,) = torch.autograd.grad(value, point)
    return found
