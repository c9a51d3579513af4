"""The outer part H_O = Σ_n J_nᵀ (∇²ℓ_n) J_n, through a factor of the loss curvature.

``∇²ℓ = Σ_r σ_r s_r s_rᵀ`` per sample; pulling the columns ``s_r`` back through the network gives rows
``B_a = Sᵀ J_{·←a}`` (``[N, r, p_a]``) and ``H_O[a, b] = Σ_n B_aᵀ diag(σ) B_b``. The rows of a linear layer are outer
products ``s ⊗ x`` and are never formed: with them the sum over r is taken first, which saves the factor r.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dagh import _sweep
from dagh._ir import Node
from dagh._plan import Plan
from dagh._plan_sweeps import Gate
from dagh._request import Request
from dagh._rules._losses import loss_factor

if TYPE_CHECKING:
    from dagh._state import State
from dagh.errors import NonFiniteError


@dataclass
class LossFactor:
    """``columns``: ``[N, r, *output]``; ``signs``: ``[N, r]`` of ±1, or ``None`` when all are +1."""

    columns: Tensor
    signs: Tensor | None


def factor_loss(state: State) -> LossFactor:
    """Factor the Hessian of the loss with respect to the model's output, weights included."""
    program = state.program
    assert program.loss is not None
    loss = program.loss
    if loss.inputs and loss.inputs[0] is program.output and loss.inputs.count(program.output) == 1:
        delta = state.weights.expand(state.samples).reshape(-1, *([1] * len(loss.shape)))
        columns = loss_factor(state.rule(loss), state.call(loss), delta)
        if columns is not None:
            return LossFactor(columns, None)
    curvature = loss_curvature(state)
    if not bool(torch.isfinite(curvature).all()):
        raise NonFiniteError(
            "the loss has no finite second derivative in the model's output: look for coinciding points, a division by "
            "zero, or NaN among the targets"
        )
    n, k = curvature.shape[:2]
    diagonal = curvature.diagonal(dim1=1, dim2=2)
    shape = program.output.shape
    if not bool((curvature - torch.diag_embed(diagonal)).any()):
        live = diagonal.ne(0).any(0)
        columns = torch.diag_embed(diagonal.abs().sqrt())[:, live]
        return LossFactor(columns.reshape(n, -1, *shape), _signs(diagonal[:, live]))
    eigenvalues, vectors = torch.linalg.eigh(curvature)
    columns = (vectors * eigenvalues.abs().sqrt().unsqueeze(1)).transpose(1, 2)
    return LossFactor(columns.reshape(n, k, *shape), _signs(eigenvalues))


def _signs(values: Tensor) -> Tensor | None:
    return None if bool((values >= 0).all()) else values.sign()


def loss_curvature(state: State) -> Tensor:
    """``∇²_out ℓ``: ``[N, K, K]``, symmetrized; zero where the loss is linear in the output."""
    program = state.program
    output = program.output
    k, like = output.numel, state.values[output]
    eye = torch.eye(k, dtype=like.dtype, device=like.device).reshape(1, k, *output.shape)
    tail = {v for v in program.descendants([output]) if v.part == "loss"} | {output}
    tangents = _sweep.push_forward(state, {output: eye}, tail)
    found = _sweep.pull_back(state, {}, [output], tangents=tangents, curved=tail - {output}, keep=True)
    if output not in found:
        return like.new_zeros(like.shape[0], k, k)
    curvature = found[output].reshape(-1, k, k)
    return 0.5 * (curvature + curvature.transpose(1, 2))


@dataclass
class Rows:
    """Rows of one leaf: dense ``[N, r, p]``, or ``cotangent [N, r, o] ⊗ inputs [N, i]`` of a linear layer."""

    dense: Tensor | None = None
    cotangent: Tensor | None = None
    inputs: Tensor | None = None

    @property
    def kronecker(self) -> bool:
        return self.dense is None


class Gathered(dict[int, Rows]):
    """Rows of several ranges of samples as those of all, each written in its place as it comes.

    Dense rows lie side by side in ``dense`` ``[N, r, sum of p]``, in the order of ``members``; those of the leaves
    ``kept`` lie where ``room(leaf, r, p)`` says.
    """

    def __init__(self, samples: int, kept: Collection[int], room: Callable[[int, int, int], Tensor]) -> None:
        super().__init__()
        self.samples, self.kept, self.room = samples, kept, room
        self.members: list[int] = []
        self.dense: Tensor | None = None

    def put(self, part: slice, piece: dict[int, Rows]) -> None:
        """The rows of the samples ``part``; every range has those of the same leaves."""
        if not self:
            self._make_room(piece)
        for i, rows in piece.items():
            for whole, some in zip(_parts(self[i]), _parts(rows), strict=True):
                whole[part] = some

    def _make_room(self, piece: dict[int, Rows]) -> None:
        dense = {i: rows.dense for i, rows in sorted(piece.items()) if rows.dense is not None}
        for i in [i for i in dense if i in self.kept]:
            self[i] = Rows(dense=self.room(i, *dense.pop(i).shape[1:]))
        self.members = list(dense)
        for i, rows in piece.items():
            if rows.cotangent is not None and rows.inputs is not None:
                room = [t.new_empty(self.samples, *t.shape[1:]) for t in (rows.cotangent, rows.inputs)]
                self[i] = Rows(cotangent=room[0], inputs=room[1])
        if not dense:
            return
        first = next(iter(dense.values()))
        widths = [t.shape[2] for t in dense.values()]
        self.dense = first.new_empty(self.samples, first.shape[1], sum(widths))
        for i, t in zip(self.members, torch.split(self.dense, widths, 2), strict=True):
            self[i] = Rows(dense=t)


def _parts(rows: Rows) -> list[Tensor]:
    return [t for t in (rows.dense, rows.cotangent, rows.inputs) if t is not None]


def pull_rows(state: State, columns: Tensor, request: Request, plan: Plan, leaves: set[int]) -> dict[int, Rows]:
    """Rows of every requested leaf that the output depends on."""
    wanted: list[Node] = []
    for i in leaves:
        gate = plan.gates.get(i)
        wanted.append(request.leaves[i] if gate is None else gate.node)
    start = {state.program.output: columns}
    found = _sweep.pull_back(state, start, wanted, keep=True)
    n, r = columns.shape[:2]
    rows: dict[int, Rows] = {}
    for i in leaves:
        gate = plan.gates.get(i)
        node = request.leaves[i] if gate is None else gate.node
        if node not in found:
            continue
        s = found[node].expand(n, r, *node.shape)
        if gate is None:
            rows[i] = Rows(dense=s.reshape(n, r, -1))
        else:
            rows[i] = Rows(cotangent=s.reshape(n, r, -1), inputs=layer_inputs(state, gate)[:, 0])
    return rows


def write_rows(rows: Rows, out: Tensor) -> None:
    """The rows of a linear layer, ``s ⊗ x``, written out: ``[N, r, o·i]``."""
    assert rows.cotangent is not None and rows.inputs is not None
    s, x = rows.cotangent.unsqueeze(3), rows.inputs[:, None, None, :]
    torch.mul(s, x, out=out.view(*out.shape[:2], s.shape[2], x.shape[3]))


def layer_inputs(state: State, gate: Gate) -> Tensor:
    """What multiplies a linear layer's output directions, row by row: ``[N, T, i]``, or ones for the bias."""
    n = state.samples
    if gate.argument == 1:
        x = state.values[gate.node.inputs[0]]
        return x.expand(n, *x.shape[1:]).reshape(n, gate.rows, -1)
    return state.weights.new_ones(1).expand(n, gate.rows, 1)


def core(first: Rows, second: Rows, signs: Tensor | None, out: Tensor | None = None) -> Tensor:
    """``Σ_r σ_r s_r s'_rᵀ`` ``[N, o, o']`` of two linear layers, written to ``out`` if it is given."""
    assert first.cotangent is not None and second.cotangent is not None
    s = first.cotangent if signs is None else first.cotangent * signs.unsqueeze(2)
    return torch.bmm(s.transpose(1, 2), second.cotangent, out=out)


def combine_dense(first: Rows, second: Rows, signs: Tensor | None) -> Tensor:
    """``H_O[a, b]`` of two leaves with dense rows: ``[p_a, p_b]``."""
    assert first.dense is not None and second.dense is not None
    left = first.dense if signs is None else first.dense * signs.unsqueeze(2)
    return left.flatten(0, 1).T @ second.dense.flatten(0, 1)


def combine_each(first: Rows, second: Rows, signs: Tensor | None) -> Tensor:
    """``H_O[a, b]`` of every sample, unless both are linear layers: ``[N, p_a, p_b]``."""
    if first.dense is None:
        assert first.cotangent is not None and first.inputs is not None and second.dense is not None
        s = first.cotangent if signs is None else first.cotangent * signs.unsqueeze(2)
        mixed = s.transpose(1, 2) @ second.dense  # [N, o, p_b]
        return torch.einsum("nop,ni->noip", mixed, first.inputs).flatten(1, 2)
    if second.dense is None:
        return combine_each(second, first, signs).transpose(-1, -2)
    left = first.dense if signs is None else first.dense * signs.unsqueeze(2)
    return left.transpose(1, 2) @ second.dense
