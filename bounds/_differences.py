"""The difference of two successive mean losses, L_{k+1} − L_k: the corollaries as printed, corrected, and rigorous.

Exactly, at every θ: ``L_{k+1} − L_k = (ℓ_{k+1} − L_k)/(k + 1)``. All bounds are natural logarithms of bounds on
``|L_{k+1}(θ) − L_k(θ)|``; ``log_B`` is that of a bound on ``‖H_O‖``, ``W`` one on the losses.
"""

from __future__ import annotations

import math

from ._logs import add, log


def corollary_printed(k: int, radius: float, W: float, log_B: float) -> float:
    """Corollaries 1 and 2 as printed: ``2W/(k+1) + 2R²B/(k+1)``, B by the printed Theorem 1 or 2.

    Not a theorem: false where W bounds the losses at θ* only (z = w₂ relu(w₁x), ½ MSE, θ* = 0, L_k ≡ 0: the right-hand
    side is 0, the left-hand side R⁴/(8(k+1))).
    """
    return float(add(log(2 * W), math.log(2) + 2 * log(radius) + log_B)) - math.log(k + 1)


def corollary_corrected(k: int, radius: float, W: float, log_B: float) -> float:
    """The same with the constants that the quadratic model with H_O gives: ``W/(k+1) + R²B/(2(k+1))``.

    ``|ℓ_{k+1} − L_k| ≤ W`` for non-negative losses, ``‖ΔH_O‖ ≤ B`` for positive semidefinite matrices, 1/2 by Taylor.
    It holds where that model does: quadratic loss differences with equal gradients.
    """
    return float(add(log(W), 2 * log(radius) + log_B - math.log(2))) - math.log(k + 1)


def identity_bound(k: int, W: float) -> float:
    """``W/(k+1)``, a theorem where 0 ≤ ℓ_i(θ) ≤ W for all θ in the ball."""
    return log(W) - math.log(k + 1)


def loss_bound(log_output: float, classes: int) -> float:
    """Bound on cross-entropy from one on ‖z‖: ``ln K + √2 ‖z‖`` (not a logarithm; infinite where that overflows)."""
    return math.log(classes) + (math.exp(0.5 * math.log(2) + log_output) if log_output < 700 else math.inf)


def lipschitz_bound(k: int, radius: float, start: float, log_J: float, slope: float = math.sqrt(2)) -> float:
    """``(|ℓ_{k+1} − L_k|(θ*) + 2 g R sup‖J_i‖)/(k+1)``: rigorous for every network, kinks included.

    ``start`` is ``|ℓ_{k+1} − L_k|`` at θ*, ``slope`` g ≥ ‖∂ℓ/∂z‖ (√2 for cross-entropy), ``log_J`` a bound on ‖J_i‖
    over the ball and all samples: half the logarithm of row ``a3.ball`` with curvature 1, for instance.
    """
    return float(add(log(start), math.log(2) + log(slope) + log(radius) + log_J)) - math.log(k + 1)


def taylor_bound(
    k: int, radius: float, start: float, gradient: float, log_H: float, log_M3: float | None = None
) -> float:
    """``(|ℓ_{k+1} − L_k|(θ*) + R‖Δ∇‖ + R²/2 ‖ΔH‖ [+ R³/6 M₃])/(k+1)``, rigorous for twice differentiable networks.

    Without ``log_M3``, ``log_H`` must bound ``‖H_{k+1} − mean H_i‖`` over the whole ball; with it, at θ* only, and M₃
    bounds the third derivative on the ball. ``gradient`` is ``‖∇ℓ_{k+1} − ∇L_k‖`` at θ*. At kinks the gradient jumps:
    use :func:`lipschitz_bound` unless no sample changes its pattern.
    """
    parts = [log(start), log(radius) + log(gradient), 2 * log(radius) + log_H - math.log(2)]
    if log_M3 is not None:
        parts.append(3 * log(radius) + log_M3 - math.log(6))
    return float(add(*parts)) - math.log(k + 1)


def hessian_difference(log_B: float, *, psd: bool) -> float:
    """``‖H_{k+1} − mean H_i‖``: at most 2B in general, B for positive semidefinite matrices such as H_O."""
    return log_B if psd else math.log(2) + log_B
