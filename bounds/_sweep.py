"""A reverse sweep of bundles of cotangents, handed out node by node and dropped when used up."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from dagh.errors import MemoryBudgetError

from ._logs import spectral
from ._structure import Structure

#: Largest bundle at one node, in numbers.
LIMIT = 400_000_000


def cotangents(
    structure: Structure, start: Any, rows: Tensor, wanted: Collection[Any], *, leaves: bool = False
) -> Iterator[tuple[Any, Tensor]]:
    """``(∂f_start/∂f_v)ᵀ s`` for every wanted node v on the way, outputs first: ``[N, B, *shape_v]``.

    ``rows`` are the s, ``[N, B, *shape_start]``. With ``leaves`` the sweep also enters what does not depend on the data
    and reaches parameters, kept apart by sample.

    Raises:
        MemoryBudgetError: a bundle would hold more than :data:`LIMIT` numbers.
    """
    state, program = structure.state, structure.program
    route = program.descendants(list(wanted)) & program.ancestors([start])
    if not leaves:
        route &= structure.data | set(wanted)
    widest = max((v.numel for v in route if v.dtype.is_floating_point), default=0)
    if widest * rows.shape[0] * rows.shape[1] > LIMIT:
        raise MemoryBudgetError(
            f"{rows.shape[0]} × {rows.shape[1]} cotangents of {widest:,} numbers do not fit; use fewer samples"
        )
    pending: dict[Any, Tensor] = {start: rows}
    wanted = set(wanted)
    with torch.no_grad():
        for node in reversed(program.nodes[: start.index + 1]):
            current = pending.pop(node, None)
            if current is None:
                continue
            if node in wanted:
                yield node, current
            if node.op is None:
                continue
            rule, call = state.rule(node), state.call(node)
            for i, parent in enumerate(node.inputs):
                if parent not in route or not parent.dtype.is_floating_point:
                    continue
                back = rule.vjp(call, current, i, True)
                back = back.expand(max(back.shape[0], rows.shape[0]), *back.shape[1:])
                pending[parent] = pending[parent] + back if parent in pending else back


def loss_columns(structure: Structure) -> tuple[Tensor, Tensor]:
    """A factor of the loss curvature at every sample: ``|∇²ℓ_n| = S Sᵀ``.

    Returns S's columns ``[N, K, *output]`` and the norms ``‖∇²ℓ_n‖``, ``[N]``; weights of the samples included. Where
    ℓ is not convex in the output, S factors the absolute value, and ``±H_O ≤ Jᵀ S Sᵀ J``.
    """
    output = structure.program.output
    softmax = _softmax_columns(structure)
    if softmax is not None:
        return softmax
    curvature = structure.state.node_hessian(output, output)
    values, vectors = torch.linalg.eigh(curvature)
    top = values.abs().amax(1)
    kept = values.abs() > 1e-14 * top.max()
    used = kept.any(0)
    used[:1] |= not bool(used.any())  # a loss without curvature: one column of zeros, so that no bundle is empty
    columns = (vectors * values.abs().sqrt().unsqueeze(1)).mT[:, used]
    return columns.reshape(len(columns), -1, *output.shape), top


def _softmax_columns(structure: Structure) -> tuple[Tensor, Tensor] | None:
    """The closed form for cross-entropy with class indices: ``diag p − ppᵀ = S Sᵀ``, ``S = diag √p − p √pᵀ``.

    Differences 1 − p are formed as sums of the other probabilities: a saturated softmax loses nothing.
    """
    state, program = structure.state, structure.program
    loss, output = program.loss, program.output
    if loss is None or loss.key.partition(".default")[0] != "aten.cross_entropy_loss" or loss.inputs[0] is not output:
        return None
    target = structure.value(loss.inputs[1])
    if output.shape[:1] != (1,) or len(output.shape) != 2 or target.dtype.is_floating_point or len(loss.inputs) > 2:
        return None
    p = torch.softmax(structure.value(output)[:, 0], 1)
    counted = (target.reshape(-1) != int(loss.arg("ignore_index"))) * state.weights
    rest = p @ (1 - torch.eye(p.shape[1], dtype=p.dtype, device=p.device))
    s = -p.unsqueeze(2) * p.sqrt().unsqueeze(1)
    s.diagonal(dim1=1, dim2=2).copy_(p.sqrt() * rest)
    s = s * counted.sqrt().reshape(-1, 1, 1)
    return s.mT.reshape(len(p), -1, *output.shape), spectral(s).square()
