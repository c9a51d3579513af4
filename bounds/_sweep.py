"""A reverse sweep of bundles of cotangents, handed out node by node and dropped when used up."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from dagh.errors import MemoryBudgetError

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
    curvature = structure.state.node_hessian(output, output)
    values, vectors = torch.linalg.eigh(curvature)
    top = values.abs().amax(1)
    kept = values.abs() > 1e-14 * top.max()
    used = kept.any(0)
    columns = (vectors * values.abs().sqrt().unsqueeze(1)).mT[:, used]
    return columns.reshape(len(columns), -1, *output.shape), top
