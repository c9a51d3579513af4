"""Lemma 1: the network as a product of matrices, and its outer-product Hessian as five factors.

In the notation of the convolutional paper, with G_p that includes Λ_p, x^{(p-1)} in the rows of F, and one order of
parameters throughout (that of the computation): ``z = T_N Λ_{N-1} ⋯ Λ_1 T_1 x`` and ``H_O = Qᵀ Fᵀ A F Q`` with

    Q = diag(Q_1, …, Q_N),  Q_p = ∂T_p/∂W_p,      F = (G_1 ⊗ x^{(0)ᵀ}, …, G_N ⊗ x^{(N-1)ᵀ}),
    G_p = T_N Λ_{N-1} ⋯ T_{p+1} Λ_p,  G_N = I,    x^{(p)} = R_p x,  R_p = Λ_p T_p ⋯ Λ_1 T_1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import dagh
from dagh.errors import CaptureError, MemoryBudgetError, ShapeError

from ._chain import Chain, chain_of, jacobian_of_step
from ._layers import dense_convolution
from ._structure import MOVES, Absent, Structure

#: Largest matrix (entries) that is written out.
_ENTRIES = 20_000_000


@dataclass
class Matricized:
    """A chain at one input x as matrices; index p - 1 holds the paper's p.

    ``T``: ``[n_p, n_{p-1}]``; ``Lambda``: the step behind each layer but the last, activation and pooling together;
    ``names``: the weight of each layer; ``A``: ∇²ℓ in the output, where a loss was given.
    """

    names: tuple[str, ...]
    T: list[Tensor]
    Lambda: list[Tensor]
    Q: list[Tensor]
    x: Tensor
    A: Tensor | None = None

    @property
    def depth(self) -> int:
        """N, the number of layers."""
        return len(self.T)

    @cached_property
    def G(self) -> list[Tensor]:
        """``G_p = ∂z/∂z_p``: ``[K, n_p]``."""
        out = [torch.eye(self.T[-1].shape[0], dtype=self.x.dtype, device=self.x.device)]
        for t, step in zip(reversed(self.T[1:]), reversed(self.Lambda), strict=True):
            out.append(out[-1] @ t @ step)
        return out[::-1]

    @cached_property
    def R(self) -> list[Tensor]:
        """``R_0 = I, …, R_{N-1}``: ``x^{(p)} = R_p x``."""
        out = [torch.eye(len(self.x), dtype=self.x.dtype, device=self.x.device)]
        for t, step in zip(self.T, self.Lambda, strict=False):
            out.append(step @ t @ out[-1])
        return out

    @cached_property
    def activations(self) -> list[Tensor]:
        """``x^{(0)}, …, x^{(N-1)}``."""
        return [r @ self.x for r in self.R]

    @property
    def z(self) -> Tensor:
        """The output."""
        return self.T[-1] @ self.activations[-1]

    def F_block(self, p: int) -> Tensor:
        """``G_p ⊗ x^{(p-1)ᵀ}`` of layer p (from 0): ``[K, n_p n_{p-1}]``."""
        return torch.kron(self.G[p], self.activations[p].unsqueeze(0))

    @property
    def F(self) -> Tensor:
        """``[K, Σ n_p n_{p-1}]``. Raises ``MemoryBudgetError`` where that is too large."""
        _afford("F", self.G[0].shape[0], sum(t.numel() for t in self.T))
        return torch.cat([self.F_block(p) for p in range(self.depth)], 1)

    @property
    def Q_matrix(self) -> Tensor:
        """``diag(Q_1, …, Q_N)`` as a sparse tensor."""
        rows, columns, at, over = [], [], 0, 0
        for q in self.Q:
            index = q.coalesce().indices()
            rows.append(index[0] + at)
            columns.append(index[1] + over)
            at, over = at + q.shape[0], over + q.shape[1]
        index = torch.stack([torch.cat(rows), torch.cat(columns)])
        return torch.sparse_coo_tensor(
            index, self.x.new_ones(index.shape[1]), (at, over), is_coalesced=True, check_invariants=False
        )

    def J_block(self, p: int) -> Tensor:
        """``F_p Q_p``, the Jacobian of the output in the weight of layer p (from 0): ``[K, n_weights]``."""
        _afford("F", self.G[p].shape[0], self.T[p].numel())
        found: Tensor = torch.sparse.mm(self.Q[p].t(), self.F_block(p).T).T
        return found

    @property
    def J(self) -> Tensor:
        """``F Q``: ``[K, P]``, weights in the order of :attr:`names`."""
        return torch.cat([self.J_block(p) for p in range(self.depth)], 1)

    def outer(self) -> Tensor:
        """``Qᵀ Fᵀ A F Q``: ``[P, P]``. Raises ``ShapeError`` without a loss."""
        if self.A is None:
            raise ShapeError("no loss was given to matricize, so there is no A")
        jacobian = self.J
        return jacobian.T @ self.A @ jacobian


def matricize(model: Any, x: Tensor, loss: Any = None, target: Tensor | None = None) -> Matricized:
    """The matrices of Lemma 1 at one sample.

    Args:
        model: a module or traced graph that is a chain of bias-free convolutions and linear layers, with activations of
            the form x = Λ z (ReLU, leaky ReLU) and poolings in between.
        x: one sample, with its batch axis: ``[1, …]``.
        loss: for ``A``; as in :func:`dagh.hessian`.
        target: with its batch axis.

    Raises:
        CaptureError: the model is not such a chain; the message says where.
        ShapeError: more than one sample. MemoryBudgetError: a matrix would be too large.
    """
    if x.shape[0] != 1:
        raise ShapeError(f"matricize takes one sample, x has {x.shape[0]}")
    graph = model if isinstance(model, dagh.Graph) else dagh.trace(model, x)
    state = graph.evaluate(_total, x) if loss is None else graph.evaluate(loss, x, target)
    structure = Structure(state, tuple(graph.trainable))
    try:
        chain = chain_of(structure)
        return _matricized(structure, chain, x, loss is not None)
    except Absent as reason:
        raise CaptureError(f"the model is not a product of matrices in the sense of Lemma 1: {reason}") from None


def _total(output: Tensor) -> Tensor:
    return output.sum()


def _matricized(structure: Structure, chain: Chain, x: Tensor, curved: bool) -> Matricized:
    if not chain.homogeneous():
        raise Absent("an activation is not of the form x = Λ z")
    names = {use.node: name for name, uses in structure.uses.items() for use in uses if use.arg == 1}
    layers = {layer.node: layer for layer in chain.layers}
    for layer in chain.layers:
        if layer.bias:
            raise Absent(f"{layer.node.name!r} has a bias")
        if layer.node not in names:
            raise Absent(f"the weight of {layer.node.name!r} is not among the parameters")
    matrices: list[Tensor] = []
    steps: list[Tensor] = []
    sources: list[Tensor] = []
    current: Tensor | None = None
    for step in chain.steps:
        if step in layers:
            source = next(p for p in step.inputs if p in structure.data)
            _afford(f"T of {step.name}", step.numel, source.numel)
            if matrices:
                steps.append(_eye(source.numel, x) if current is None else current)
            elif current is not None:
                raise Absent("a padding or pooling comes before the first layer")
            matrices.append(_layer_matrix(structure, step))
            sources.append(_weight_matrix(structure, layers[step]))
            current = None
            continue
        if step.operation in MOVES and step.operation not in _REORDERS:
            continue
        _afford(f"Λ of {step.name}", step.numel, step.inputs[0].numel)
        matrix = jacobian_of_step(structure, step)
        current = matrix if current is None else matrix @ current
    if current is not None:
        raise Absent("an activation or pooling follows the last layer")
    output = structure.program.output
    curvature = structure.state.node_hessian(output, output)[0] if curved else None
    return Matricized(
        tuple(names[layer.node] for layer in chain.layers), matrices, steps, sources, x.detach().reshape(-1), curvature
    )


_REORDERS = ("permute", "transpose", "t", "mT", "numpy_T", "movedim", "swapaxes", "flip", "roll", "rot90",
             "channel_shuffle", "pixel_shuffle", "pixel_unshuffle")  # fmt: skip


def _eye(n: int, like: Tensor) -> Tensor:
    return torch.eye(n, dtype=like.dtype, device=like.device)


def _layer_matrix(structure: Structure, node: Any) -> Tensor:
    return jacobian_of_step(structure, node)


def _weight_matrix(structure: Structure, layer: Any) -> Tensor:
    """``Q_p = ∂ vec_r T_p / ∂ vec_r W_p``, sparse: every entry of T is 0 or one weight."""
    weight = layer.weight
    labels = torch.arange(1, weight.numel() + 1, dtype=torch.float64, device=weight.device).reshape(weight.shape)
    where = labels if not layer.convolution else _labels(labels, layer)
    flat = where.reshape(-1).round().long()
    entries = flat.nonzero()[:, 0]
    index = torch.stack([entries, flat[entries] - 1])
    return torch.sparse_coo_tensor(
        index, weight.new_ones(index.shape[1]), (flat.numel(), weight.numel()), is_coalesced=True,
        check_invariants=False,
    )  # fmt: skip


def _labels(labels: Tensor, layer: Any) -> Tensor:
    return dense_convolution(labels, layer.size_in, layer.stride, layer.padding, layer.dilation, layer.groups)


def _afford(what: str, *sides: int) -> None:
    entries = 1
    for side in sides:
        entries *= side
    if entries > _ENTRIES:
        raise MemoryBudgetError(f"{what} has {entries:,} entries, more than the {_ENTRIES:,} that are written out")
