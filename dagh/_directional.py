"""Derivatives of every sample's loss along directions, from one sweep of tangents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dagh import _sweep
from dagh._bundles import Tangents, matrices
from dagh._ir import Node

if TYPE_CHECKING:
    from dagh._state import State


@dataclass(frozen=True)
class Directional:
    """Every sample's loss along directions u of the parameters: made by :meth:`dagh.State.along`.

    ``loss`` is ``[N]``; ``slope`` ``∇ℓ·u``, ``curvature`` ``uᵀH u`` and ``outer`` ``uᵀH_O u`` are ``[N, B]``.
    """

    loss: Tensor
    slope: Tensor
    curvature: Tensor
    outer: Tensor

    @property
    def functional(self) -> Tensor:
        """``uᵀH_F u``: ``[N, B]``."""
        return self.curvature - self.outer


def along(state: State, seeds: Mapping[Node, Tensor]) -> Directional:
    """The derivatives of a state per sample along bundles ``[B, *shape]`` of directions of its leaves.

    With tangents ``t = J u``, ``uᵀH u = Σ_v Σ_{p,q} t_pᵀ [M_v]_{p,q} t_q`` over the curved nodes v: tangents and
    adjoints of inner nodes are enough, and nothing of the size of the parameters is held per sample.
    """
    program, loss = state.program, state.program.loss
    assert loss is not None
    with torch.no_grad():
        within = program.descendants(list(seeds)) & program.ancestors([loss])
        tangents = _sweep.push_forward(state, {n: t.unsqueeze(0) for n, t in seeds.items()}, within)
        bending = [n for n in program if n in within and n.op is not None and state.rule(n).curved(n)]
        start = state.weights.expand(state.samples).reshape(-1, 1, *([1] * len(loss.shape)))
        adjoints = _sweep.pull_back(state, {loss: start}, bending, keep=True) if bending else {}
        size = next(iter(seeds.values())).shape[0]
        zero = state.values[loss].new_zeros(state.samples, size)
        parts = {"loss": zero, "model": zero}
        for node in bending:
            if node in adjoints:
                part = "loss" if node.part == "loss" else "model"
                parts[part] = parts[part] + _form(state, node, adjoints[node].squeeze(1), tangents)
        slope = tangents[loss].flatten(1) * start.reshape(-1, 1) if loss in tangents else zero
        value = state.values[loss].reshape(-1) * start.reshape(-1)
    return Directional(value, slope.expand_as(zero), parts["loss"] + parts["model"], parts["loss"])


def _form(state: State, node: Node, delta: Tensor, tangents: Tangents) -> Tensor:
    """``Σ_{p,q} t_pᵀ M_{p,q} t_q`` at one node: ``[N or 1, B]``."""
    rule, call = state.rule(node), state.call(node)
    moving = {i: tangents[p] for i, p in enumerate(node.inputs) if p in tangents}
    pairs = rule.pairs(node)
    args, factor = list(moving), 1
    if pairs is not None:
        met = [(i, j) for i, j in pairs if i in moving and j in moving]
        args = [i for i in args if any(i in pair for pair in met)]
        batched = [i for i in args if node.inputs[i].batched]
        if all((i in batched) != (j in batched) for i, j in met):  # M is symmetric: rows of the weights can be spared
            args, factor = batched, 2
    if not args:
        return delta.new_zeros(1, 1)
    rows = rule.curvature(call, delta, moving, args, True)
    return factor * sum((matrices(rows[i] * moving[i]).sum(2) for i in rows), delta.new_zeros(1, 1))
