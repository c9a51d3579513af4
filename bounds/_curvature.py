"""How curved a loss can be in the model's output."""

from __future__ import annotations

import math
from collections.abc import Callable
from difflib import get_close_matches

from dagh.errors import LossError, ReductionError

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
