"""Residuals of the robust losses: quadratic near zero, linear beyond. Their gradient is Lipschitz."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dagh._ir import Node
from dagh._rules._base import Call, register_rule
from dagh._rules._elementwise import Derivative, Unary

F = torch.nn.functional


def huber(residual: Tensor, delta: float) -> Tensor:
    """``r²/2`` where ``|r| ≤ delta``, ``delta (|r| - delta/2)`` beyond."""
    return F.huber_loss(residual, torch.zeros_like(residual), reduction="none", delta=delta)


def smooth_l1(residual: Tensor, beta: float) -> Tensor:
    """``r²/(2 beta)`` where ``|r| < beta``, ``|r| - beta/2`` beyond."""
    return F.smooth_l1_loss(residual, torch.zeros_like(residual), reduction="none", beta=beta)


def _width(node: Node) -> float:
    return float(node.arg("delta") if node.arg("delta") is not None else node.arg("beta"))


def _derivative(order: int) -> Derivative:
    def derivative(call: Call, x: Tensor) -> Tensor:
        width = _width(call.node)
        slope = 1.0 if call.arg("delta") is not None else 1.0 / width
        return slope * (x.clamp(-width, width) if order == 1 else (x.abs() < width).to(x.dtype))

    return derivative


def _ends(node: Node) -> Sequence[float]:
    width = _width(node)
    return [-width, width]


for _function in (huber, smooth_l1):
    register_rule(f"dagh.{_function.__name__}")(Unary(_derivative(1), _derivative(2), points=_ends))
