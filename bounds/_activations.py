"""Suprema of the first and second derivatives of activations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Activation:
    """``slope = sup |σ'|``, ``bend = sup |σ''|`` where σ'' exists, ``offset = |σ(0)|``.

    ``smooth``: σ' is continuous, so that ``bend`` bounds every second difference. ``homogeneous``: σ(t) = σ'(t)·t, the
    form x = Λ z that the published statements assume.
    """

    slope: float
    bend: float
    offset: float = 0.0
    smooth: bool = True
    homogeneous: bool = False


def _gelu(t: float) -> float:
    return 0.5 * (1 + math.erf(t / math.sqrt(2))) + t * math.exp(-t * t / 2) / math.sqrt(2 * math.pi)


_PIECEWISE = Activation(1.0, 0.0, smooth=False, homogeneous=True)

#: By operation. Closed forms where there are any; the rest are maxima of smooth functions of one variable, found to
#: 1e-6 and rounded up in the fourth decimal.
_TABLE: dict[str, Activation] = {
    "relu": _PIECEWISE,
    "abs": _PIECEWISE,
    "neg": Activation(1.0, 0.0, homogeneous=True),
    "relu6": Activation(1.0, 0.0, smooth=False),
    # PyTorch divides by 6 in single precision.
    "hardsigmoid": Activation(0.16666668, 0.0, 0.5, smooth=False),
    "hardswish": Activation(1.5, 1 / 3, smooth=False),
    "tanh": Activation(1.0, 4 / (3 * math.sqrt(3))),
    "sigmoid": Activation(0.25, 1 / (6 * math.sqrt(3)), 0.5),
    "log_sigmoid": Activation(1.0, 0.25, math.log(2)),
    "silu": Activation(1.0999, 0.5),
    "mish": Activation(1.0885, 0.6443),
    "atan": Activation(1.0, 3 * math.sqrt(3) / 8),
    "erf": Activation(2 / math.sqrt(math.pi), 2 * math.sqrt(2 / (math.pi * math.e))),
    "sin": Activation(1.0, 1.0),
    "cos": Activation(1.0, 1.0, 1.0),
    "selu": Activation(1.7581, 1.7581, smooth=False),
}


def activation(node: Any) -> Activation | None:
    """Constants of an element-wise node with its options, or ``None`` where they are not known or infinite."""
    name = node.operation
    if name == "gelu":
        if node.arg("approximate") == "tanh":
            return Activation(1.1291, 0.7980)
        return Activation(_gelu(math.sqrt(2)), 2 / math.sqrt(2 * math.pi))
    if name == "leaky_relu":
        return Activation(max(1.0, abs(float(node.arg("negative_slope")))), 0.0, smooth=False, homogeneous=True)
    if name in ("elu", "celu"):
        alpha = float(node.arg("alpha"))
        scale, inner = (
            (float(node.arg(k) or 1) for k in ("scale", "input_scale")) if name == "elu" else (1.0, 1 / alpha)
        )
        left = abs(alpha * inner)  # the slope just below 0, over scale
        return Activation(abs(scale) * max(1.0, left), abs(scale) * left * abs(inner), smooth=math.isclose(left, 1.0))
    if name == "softplus":
        beta = float(node.arg("beta"))
        # Beyond the threshold PyTorch returns x itself; the jump of the slope there is below e^-threshold.
        return Activation(1.0, beta / 4, math.log(2) / beta)
    if name in ("hardtanh", "clamp", "clamp_min", "clamp_max"):
        low, high = ("min_val", "max_val") if name == "hardtanh" else ("min", "max")
        least, most = node.arg(low), node.arg(high)
        if any(not isinstance(v, (int, float, type(None))) for v in (least, most)):
            return None
        at_zero = max(0.0, float(least or 0)) if least is not None else 0.0
        at_zero = min(at_zero, float(most)) if most is not None else at_zero
        homogeneous = least == 0 and most is None
        return Activation(1.0, 0.0, abs(at_zero), smooth=False, homogeneous=homogeneous)
    return _TABLE.get(name)
