"""The ladder of bounds on ``‖H_O‖``: a1–a3 from weights, b0–b3 from data, c exact.

Every function returns natural logarithms; a parameter's share in ``per_layer`` is what its block adds to the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dagh

from ._curvature import Curvature
from ._layers import LayerFacts
from ._local_norms import input_norm
from ._logs import ZERO, Log, add, flat, log, log_tensor, spectral, times, total
from ._recursion import Recursion
from ._structure import Absent, Structure, Use
from ._sweep import cotangents, loss_columns


@dataclass
class Value:
    """A bound: its logarithm, and the logarithms of the parameters' shares where it is a sum of such."""

    log: float
    per_layer: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if math.isnan(self.log):
            raise Absent("not a number: the weights or the data are not finite")
        if self.log == math.inf:
            raise Absent("infinite: some length or Lipschitz constant on the way is unbounded")


@dataclass
class Problem:
    """What the bounds are about: a state, the loss's constants, ``log_input`` = log sup ‖x‖, a radius for balls."""

    structure: Structure
    curvature: Curvature
    log_input: float
    radius: float = 0.0
    facts: dict[Any, LayerFacts] = field(default_factory=dict)
    log_inputs: Log = ZERO
    """Logarithm of each sample's ``‖x_n‖``, where there are data."""

    def recursion(self, **options: Any) -> Recursion:
        """A recursion that shares the facts about layers."""
        return Recursion(
            self.structure,
            log_input=self.log_input,
            categorical=self.curvature.categorical,
            known=self.facts,
            **options,
        )

    def log_share(self) -> Log:
        """Logarithm of each sample's weight in the loss; uniform unless the loss weighs its samples."""
        return -log(self.structure.state.samples)


def summed(blocks: dict[str, Log], scale: Log = 0.0) -> Value:
    """``Σ_W scale · block_W²``, over samples too."""
    shares = {name: total(add(2 * np.asarray(b) + scale, ZERO)) for name, b in blocks.items()}
    return Value(total(np.array(list(shares.values()) or [ZERO])), shares)


# -- weights only ----------------------------------------------------------------------------------


def a1(problem: Problem, radius: float = 0.0) -> Value:
    """``a X² Σ_p r_p Π_{i≠p} ‖T_i‖_F² π_i²`` (Frobenius norms, every use of a weight counted)."""
    return _weights_only(problem, "frobenius", radius)


def a2(problem: Problem, radius: float = 0.0) -> Value:
    """As :func:`a1` with min(r, κ) for r, and ``κ ‖W_mat‖²`` where it is below ``‖T‖_F²``."""
    return _weights_only(problem, "matrix", radius)


def a3(problem: Problem, radius: float = 0.0) -> Value:
    """As :func:`a2` with the best rigorous bound on ``‖T_i‖``, and of differences of T_N's rows for cross-entropy."""
    return _weights_only(problem, "spectral", radius)


def _weights_only(problem: Problem, flavor: Any, radius: float) -> Value:
    blocks = problem.recursion(flavor=flavor, radius=radius).blocks()
    return summed(blocks, problem.curvature.log_sup())


# -- at the data -----------------------------------------------------------------------------------


def b0(problem: Problem) -> Value:
    """``a Σ_p (Π_{i>p} ‖T_i‖² π_i²) ‖U_p‖²``: gains from the weights, unfolded inputs from one forward pass."""
    gains = problem.recursion().gains
    scale = problem.curvature.log_sup() + problem.log_share()
    return _forward(problem, gains, scale)


def b1(problem: Problem) -> Value:
    """``Σ_p ‖Sᵀ T_N‖² ‖G_p‖² ‖U_p‖²``, ``S Sᵀ = A``: up to the last layer ``‖G_p‖`` is bounded by products of layers
    behind their activations' slopes at x.
    """
    structure = problem.structure
    columns, norms = loss_columns(structure)
    if not bool(norms.any()):  # nothing to bound, whatever stands on the way
        return summed(dict.fromkeys(structure.names, ZERO))
    recursion = problem.recursion(local=True)
    last = recursion.last
    if last.operation in ("linear", "convolution") and last.inputs[0] in structure.data:
        for _, rows in cotangents(structure, structure.program.output, columns, {last.inputs[0]}):
            scaled = spectral(flat(rows, 2).double()) / norms.sqrt()
            recursion.end = log_tensor(scaled.nan_to_num(0.0))
    return _forward(problem, recursion.gains, log_tensor(norms))


def _forward(problem: Problem, gains: dict[Any, Log], scale: Log) -> Value:
    structure = problem.structure
    norms = LocalNorms(structure)
    blocks = {}
    for name, uses in structure.uses.items():
        parts = []
        for use in uses:
            own = norms.of(use)
            if own is None:
                raise Absent(f"no formula for the derivative of {use.node.operation!r} in {name!r}")
            parts.append(times(gains[use.node], own))
        blocks[name] = np.broadcast_to(np.asarray(add(*parts)), (structure.state.samples,))
    return summed(blocks, scale)


class LocalNorms:
    """``‖D_{u←W}‖`` at the data by use, as logarithms ``[N]``, each computed once."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self._known: dict[tuple[Use, bool], Log | None] = {}

    def of(self, use: Use, bias: bool = False) -> Log | None:
        """For one use; with the bias of the same layer taken together if ``bias``."""
        if (use, bias) not in self._known:
            found = input_norm(self.structure, use, bias)
            self._known[use, bias] = None if found is None else times(log_tensor(found), use.log_lipschitz)
        return self._known[use, bias]


def b2(problem: Problem, advance: Callable[[], None] | None = None) -> Value:
    """``Σ_p ‖Sᵀ G_p‖² ‖U_p‖²`` with the true ``G_p = ∂z/∂z_p``: K backward passes, nothing as large as the parameters.

    Any graph. Weight and bias of one layer are taken together. A parameter whose derivative has no formula
    contributes its exact block instead.
    """
    structure = problem.structure
    columns, _ = loss_columns(structure)
    joint = _pairs(structure)
    norms = LocalNorms(structure)
    own: dict[tuple[str, Any, int], Log | None] = {}
    for uses in structure.uses.values():
        for use in uses:
            own[use.leaf, use.node, use.arg] = norms.of(use, use.node in joint and use.arg == 1)
    exact = {name for name, uses in structure.uses.items() if any(own[u.leaf, u.node, u.arg] is None for u in uses)}
    nodes = {use.node for name, uses in structure.uses.items() if name not in exact for use in uses}
    leaves = {structure.program.parameters[name]: name for name in exact}
    gains: dict[Any, Log] = {}
    for node, rows in cotangents(structure, structure.program.output, columns, nodes):
        gains[node] = log_tensor(spectral(flat(rows, 2).double()))
        if advance is not None:
            advance()
    blocks: dict[str, Log] = {}
    for leaf, rows in cotangents(structure, structure.program.output, columns, leaves, leaves=True) if exact else ():
        blocks[leaves[leaf]] = log_tensor(spectral(flat(rows, 2).double()))
    for name, uses in structure.uses.items():
        if name in exact:
            blocks.setdefault(name, ZERO)
        elif any(use.arg == 2 and use.node in joint for use in uses):
            continue  # counted with its weight
        else:
            blocks[name] = add(*(times(gains.get(u.node, ZERO), own[u.leaf, u.node, u.arg]) for u in uses), ZERO)
    samples = structure.state.samples
    return summed({n: np.broadcast_to(np.asarray(b), (samples,)) for n, b in blocks.items()})


def _pairs(structure: Structure) -> set[Any]:
    """Layers whose weight and bias are both parameters used nowhere else, as they are."""
    single = [uses[0] for uses in structure.uses.values() if len(uses) == 1 and uses[0].moved]
    args: dict[Any, set[int]] = {}
    for use in single:
        if use.node.operation in ("linear", "convolution") and not use.node.arg("transposed"):
            args.setdefault(use.node, set()).add(use.arg)
    return {node for node, found in args.items() if found >= {1, 2}}


# -- the dual --------------------------------------------------------------------------------------


class Dual:
    """The Gram matrix of the rows ``B = Sᵀ J`` over the whole batch: b3, its variants by sample, and the exact norm."""

    def __init__(self, gram: dagh.Gram, layers: Iterable[Iterable[str]] | None = None) -> None:
        self.gram = gram
        self.layers = [tuple(names) for names in layers] if layers is not None else [(n,) for n in gram.names]

    def b3(self) -> Value:
        """``Σ_p ‖B_p B_pᵀ‖``, weight and bias of a layer together: at most the number of layers times the truth."""
        shares = {}
        for names in self.layers:
            shares[names[0]] = log(float(spectral(self._sum(names))))
        return Value(total(np.array(list(shares.values()) or [ZERO])), shares)

    def mean(self) -> Value:
        """``Σ_n ‖B_n B_nᵀ‖``: the exact norms of single samples, averaged."""
        return Value(total(log_tensor(spectral(self._blocks().diagonal(dim1=0, dim2=1).permute(2, 0, 1)))))

    def block(self) -> Value:
        """``λ_max([‖B_i B_jᵀ‖]_ij)``: the norms of all pairs of samples."""
        norms = spectral(self._blocks())
        return Value(log(float(spectral(norms))))

    def exact(self) -> Value:
        """``‖H_O‖``."""
        values = self.gram.eigvalsh()
        each = {names[0]: self._layer(names) for names in self.layers}
        return Value(log(float(values.abs().max()) if len(values) else 0.0), each)

    def _layer(self, names: tuple[str, ...]) -> float:
        if len(names) == 1:
            values = self.gram.eigvalsh(names[0])
            return log(float(values.abs().max()) if len(values) else 0.0)
        matrix = self._sum(names)
        if self.gram.signs is not None:
            values, vectors = torch.linalg.eigh(matrix)
            root = vectors * values.clamp(min=0).sqrt()
            matrix = root.T @ (self.gram.signs[:, None] * root)
        return log(float(spectral(matrix)))

    def _sum(self, names: tuple[str, ...]) -> Tensor:
        return torch.stack([self.gram.of(n) for n in names]).sum(0)

    def _blocks(self) -> Tensor:
        n = self.gram.samples
        side = self.gram.side // max(n, 1)
        return self.gram.matrix.reshape(n, side, n, side).permute(0, 2, 1, 3)
