"""Losses whose kernels hide their kinks or have no second derivative, written out in simpler operations.

Each function has the signature of the ATen operation it stands for, and the same value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
F = torch.nn.functional


def _reduced(each: Tensor, reduction: int) -> Tensor:
    return each if reduction == 0 else each.mean() if reduction == 1 else each.sum()


def gaussian_nll_loss(
    input: Tensor, target: Tensor, var: Any, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> Tensor:
    """Like PyTorch's: a variance below ``eps`` counts as ``eps``, but has the derivatives of one that does not."""
    if not isinstance(var, Tensor):
        var = var * torch.ones_like(input)
    elif var.shape != input.shape and var.shape == input.shape[:-1]:
        var = var.unsqueeze(-1)
    var = var + (var.clamp_min(eps) - var).detach()
    each = 0.5 * (var.log() + (input - target).square() / var) + (0.5 * math.log(2 * math.pi) if full else 0.0)
    return _reduced(each, {"none": 0, "mean": 1, "sum": 2}[reduction])


def fill_diagonal_(self: Tensor, fill_value: float, wrap: bool = False) -> Any:
    """The tensor itself, changed in place; without strides, which PyTorch differentiates wrongly."""
    if self.dim() != 2 or wrap:
        return NotImplemented
    return self.masked_fill_(torch.eye(*self.shape, dtype=torch.bool, device=self.device), fill_value)


def one_hot(self: Tensor, num_classes: int = -1) -> Any:
    """Without a look at the numbers, where the number of classes is given."""
    if num_classes <= 0:
        return NotImplemented
    return (self.unsqueeze(-1) == torch.arange(num_classes, device=self.device)).long()


def cov(self: Tensor, *, correction: int = 1, fweights: Any = None, aweights: Any = None) -> Any:
    """Without weights, whose numbers PyTorch checks."""
    if fweights is not None or aweights is not None or self.dim() > 2 or not self.dtype.is_floating_point:
        return NotImplemented
    rows = self if self.dim() == 2 else self.reshape(1, -1)
    rows = rows - rows.mean(1, keepdim=True)
    found = rows @ rows.T / max(0, rows.shape[1] - correction)
    return found if self.dim() == 2 else found.reshape(())


def corrcoef(self: Tensor) -> Any:
    """Without the cut to [-1, 1], which takes away nothing but rounding."""
    covariance = cov(self)
    if covariance is NotImplemented or self.dim() != 2:
        return NotImplemented
    deviation = covariance.diagonal().sqrt()
    return covariance / deviation.unsqueeze(1) / deviation


#: Functions of PyTorch that read numbers or strides, with a stand-in that does not (or gives ``NotImplemented``).
def pad_sequence(
    sequences: Sequence[Tensor], batch_first: bool = False, padding_value: float = 0.0, padding_side: str = "right"
) -> Tensor:
    """Without copies into slices, which stay in a traced graph as changes in place."""
    length, rest = max(len(s) for s in sequences), [0, 0] * (sequences[0].dim() - 1)
    missing = [(0, length - len(s)) if padding_side == "right" else (length - len(s), 0) for s in sequences]
    padded = [F.pad(s, [*rest, *m], value=padding_value) for s, m in zip(sequences, missing, strict=True)]
    return torch.stack(padded, 0 if batch_first else 1)


STAND_INS: dict[Any, Callable[..., Any]] = {
    F.gaussian_nll_loss: gaussian_nll_loss,
    F.one_hot: one_hot,
    torch._C._nn.pad_sequence: pad_sequence,
    torch.cov: cov,
    Tensor.cov: cov,
    torch.corrcoef: corrcoef,
    Tensor.corrcoef: corrcoef,
    Tensor.fill_diagonal_: fill_diagonal_,
}


def l1_loss(self: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    return _reduced((self - target).abs(), reduction)


def hinge_embedding_loss(self: Tensor, target: Tensor, margin: float = 1.0, reduction: int = 1) -> Tensor:
    apart = torch.where(target != 1, (margin - self).clamp_min(0), 0.0)
    return _reduced(apart + torch.where(target != -1, self, 0.0), reduction)


def margin_ranking_loss(
    input1: Tensor, input2: Tensor, target: Tensor, margin: float = 0.0, reduction: int = 1
) -> Tensor:
    return _reduced((-target * (input1 - input2) + margin).clamp_min(0), reduction)


def cosine_embedding_loss(
    input1: Tensor, input2: Tensor, target: Tensor, margin: float = 0.0, reduction: int = 1
) -> Tensor:
    tiny = 1e-12  # PyTorch's own
    size = ((input1 * input1).sum(-1) + tiny) * ((input2 * input2).sum(-1) + tiny)
    cosine = (input1 * input2).sum(-1) / size.sqrt()
    alike = torch.where(target == 1, 1 - cosine, 0.0)
    return _reduced(alike + torch.where(target == -1, (cosine - margin).clamp_min(0), 0.0), reduction)


def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2.0,
    eps: float = 1e-6,
    swap: bool = False,
    reduction: int = 1,
) -> Tensor:
    def distance(a: Tensor, b: Tensor) -> Tensor:
        size: Tensor = torch.linalg.vector_norm(a - b + eps, p, dim=-1)
        return size

    far = distance(anchor, negative)
    if swap:
        far = torch.minimum(far, distance(positive, negative))
    return _reduced((margin + distance(anchor, positive) - far).clamp_min(0), reduction)


def multilabel_margin_loss(self: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    x, labels = (t if t.dim() > 1 else t.unsqueeze(0) for t in (self, target))
    used = (labels < 0).cumsum(-1) == 0  # labels up to the first -1
    index = labels.clamp(min=0)
    wanted = torch.zeros_like(index).scatter_add(-1, index, used.to(index.dtype)) > 0
    gap = (1 - x.gather(-1, index).unsqueeze(-1) + x.unsqueeze(-2)).clamp_min(0)
    counted = used.unsqueeze(-1) & ~wanted.unsqueeze(-2)
    each = torch.where(counted, gap, 0.0).sum((-1, -2)) / x.shape[-1]
    return _reduced(each if self.dim() > 1 else each.squeeze(0), reduction)


def table() -> dict[Any, Callable[..., Tensor]]:
    """The function to trace in place of each operation."""
    functions = (
        l1_loss, hinge_embedding_loss, margin_ranking_loss, cosine_embedding_loss, triplet_margin_loss,
        multilabel_margin_loss,
    )  # fmt: skip
    return {getattr(aten, f.__name__).default: f for f in functions}
