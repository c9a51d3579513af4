"""``‖D‖`` of a layer in its parameters at the data: spectral norms of inputs and unfolded inputs, by sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._layers import patches
from ._logs import flat, spectral
from ._structure import Structure, Use


def input_norm(structure: Structure, use: Use, bias: bool = False) -> Tensor | None:
    """``‖∂ node / ∂ argument‖`` at one use of a parameter, ``[N]``; ``None`` where no formula is known.

    Linear layers and convolutions: the spectral norm of the (unfolded) input, the largest over groups. ``bias``: that
    of weight and bias together, the input with a row of ones.
    """
    node, arg = use.node, use.arg
    name = node.operation
    like = structure.value(node)
    if name in ("linear", "convolution"):
        if arg == 2:
            positions = node.numel // node.shape[1 if name == "convolution" else -1]
            return like.new_full((1,), float(positions) ** 0.5)
        rows = layer_input(structure, node) if arg == 1 else None
        if rows is None:
            return None
        if bias:
            rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1, rows.shape[3])], 2)
        return spectral(rows.double()).amax(1)
    if name == "mul" and len(node.inputs) == 2 and node.inputs[1 - arg] in structure.data:
        other = structure.value(node.inputs[1 - arg]).double().square()
        return flat(_folded(other.expand(-1, *node.shape), node.inputs[arg].shape)).amax(1).sqrt()
    if name in ("add", "sub"):
        scale = 1.0 if arg == 0 else abs(float(node.arg("alpha") or 0))
        return like.new_full((1,), scale * (node.numel / max(node.inputs[arg].numel, 1)) ** 0.5)
    if name == "embedding":
        index = flat(structure.value(node.inputs[1]))
        return torch.stack([row.unique(return_counts=True)[1].max() for row in index]).to(like.dtype).sqrt()
    return None


def layer_input(structure: Structure, node: Any) -> Tensor | None:
    """The matrix that a layer's weight multiplies: ``[N, groups, in, positions]``; ``None`` for transposed ones."""
    x = structure.value(node.inputs[0])
    if node.operation == "linear":
        return x.reshape(x.shape[0], 1, -1, x.shape[-1]).mT
    if node.arg("transposed"):
        return None
    stride, padding, dilation = options(node)
    return patches(x, node.inputs[1].shape[2:], stride, padding, dilation, int(node.arg("groups")))


def options(node: Any) -> list[list[int]]:
    """Stride, padding and dilation of a convolution, one number per axis."""
    dims = len(node.shape) - 2
    out = []
    for name in ("stride", "padding", "dilation"):
        values = [int(v) for v in node.arg(name)]
        out.append(values * dims if len(values) == 1 else values)
    return out


def cotangent_matrix(node: Any, adjoint: Tensor) -> Tensor | None:
    """The matrix whose spectral norm is that of the transposed layer in its weight, ``v ↦ V_vᵀ b``; by sample.

    Linear: the cotangents as a matrix ``[positions, out]``. Convolution: b unfolded against the kernel, ``[inputs,
    C_out·k]``; only for stride 1 and one group, otherwise ``None``.
    """
    if node.operation == "linear":
        return adjoint.reshape(adjoint.shape[0], -1, node.shape[-1])
    stride, _, dilation = options(node)
    if node.arg("transposed") or int(node.arg("groups")) != 1 or any(s != 1 for s in stride):
        return None
    kernel = node.inputs[1].shape[2:]
    full = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    rows = patches(adjoint, kernel, stride, full, dilation)  # every position that a tap of b can reach
    return rows[:, 0].mT


def _folded(values: Tensor, shape: torch.Size) -> Tensor:
    """Sum ``[N, *node]`` over the axes along which an argument of ``shape`` is broadcast."""
    lead = values.dim() - 1 - len(shape)
    axes = list(range(1, 1 + lead))
    axes += [1 + lead + i for i, n in enumerate(shape) if n == 1 and values.shape[1 + lead + i] != 1]
    return values.sum(axes, keepdim=True) if axes else values
