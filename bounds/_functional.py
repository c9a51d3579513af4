"""Bounds on the functional Hessian H_F = Σ_k (∂ℓ/∂z_k) ∇²z_k, block by block over pairs of parameters.

``H_F = Σ_u J_{in(u)}ᵀ M_u J_{in(u)}`` over the nodes u that are not linear, M_u the curvature of f_u weighted with the
adjoint b_u. Each term is bounded by ``‖b_u‖``, a constant of the operation, and ``‖∂ in(u)/∂W‖`` of two parameters;
``‖H_F‖ ≤ λ_max(N)`` for the matrix N of these bounds. On a chain of ReLU layers this is
``N_pq = ‖g‖ X √(kt_p kt_q) Π_{i≠p,q} ‖T_i‖`` with zeros on the diagonal.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ._activations import activation
from ._ladder import LocalNorms, Problem, Value
from ._lipschitz import Site, inverse_scale
from ._local_norms import cotangent_matrix
from ._logs import ZERO, Log, add, flat, largest_eigenvalue, log, log_tensor, spectral, times, total
from ._recursion import Recursion
from ._structure import Absent, Structure
from ._sweep import LIMIT, cotangents

#: ``sup ‖D²y‖ √n s²`` of ``y = Px/s``, n entries per group: √(4/3) = 1.1547, the maximum over ‖y‖ ≤ √n of a polynomial
#: in two variables, rounded up.
_STANDARDIZE = 1.16


def F_a(problem: Problem, radius: float = 0.0) -> Value:
    """Weights only: ``‖b_u‖ ≤ sup‖∂ℓ/∂z‖ · gain``; over a ball of parameters with ``radius``."""
    context = problem.recursion(radius=radius)
    slope = problem.curvature.log_slope()
    pairs = _Pairs(problem.structure, context)
    return Value(largest_eigenvalue(pairs.matrix(lambda node: slope + context.gains[node])))


def F_b(problem: Problem) -> Value:
    """At the data: true adjoints b_u, true norms ``‖∂ in(u)/∂z_p‖`` where they are affordable, unfolded inputs."""
    structure = problem.structure
    context = problem.recursion(local=True)

    def adjoint(node: Any) -> Log:
        return log_tensor(flat(structure.state.adjoint(node)).norm(dim=1))

    matrices = _Pairs(structure, context, exact=True).matrix(adjoint)
    if matrices.ndim == 2:
        matrices = np.broadcast_to(matrices[..., None], (*matrices.shape, structure.state.samples))
    return Value(total(np.array([largest_eigenvalue(matrices[..., n]) for n in range(matrices.shape[-1])])))


class _Pairs:
    """The matrix N for one choice of norms."""

    def __init__(self, structure: Structure, context: Recursion, exact: bool = False) -> None:
        self.structure, self.context, self.exact = structure, context, exact
        self.names = structure.names
        self.norms = LocalNorms(structure) if exact else None
        self._tangents: dict[str, dict[Any, Log]] = {}
        self._found: dict[Any, dict[str, Log]] = {}

    def matrix(self, adjoint: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
        for uses in self.structure.uses.values():
            for use in uses:
                if not use.moved:
                    raise Absent(
                        f"{use.node.name!r} uses a function of {use.leaf!r}, whose own curvature is not bounded"
                    )
        size = len(self.names)
        entries: dict[tuple[int, int], Log] = {}

        def put(i: int, j: int, value: Log) -> None:
            for pair in {(i, j), (j, i)} if i != j else [(i, i)]:
                entries[pair] = add(entries.get(pair, ZERO), value)

        for node in self.structure.order:
            if node.op is None or not self.structure.state.rule(node).curved(node):
                continue
            for i, j, value in self._terms(node, adjoint):
                put(i, j, value)
        shape = np.broadcast_shapes(*(np.shape(v) for v in entries.values())) if entries else ()
        out = np.full((size, size, *shape), ZERO)
        for (i, j), value in entries.items():
            out[i, j] = value
        return out

    def _terms(self, node: Any, adjoint: Any) -> list[tuple[int, int, Log]]:
        """Pairs (i ≤ j counted once) and what the curvature of ``node`` adds to their bound."""
        data = list(self.structure.arguments(node))
        mine = {i: use for name in self.names for use in self.structure.uses[name] if use.node is node
                for i in (use.arg,)}  # fmt: skip
        name = node.operation
        site = Site(self.context, node)
        index = {n: i for i, n in enumerate(self.names)}
        out: list[tuple[int, int, Log]] = []
        if name in ("linear", "convolution", "mul", "matmul", "mm", "bmm"):
            if len(node.inputs) < 2:
                return out
            if data == [0, 1]:
                first, second = self._of(node.inputs[0]), self._of(node.inputs[1])
                beta = adjoint(node)
                if name == "mul":
                    beta = beta + 0.5 * (site.repeats(0) + site.repeats(1))
                for p, left in first.items():
                    for q, right in second.items():
                        value = times(times(beta, left), right)
                        out.append((index[p], index[q], value if p != q else value + math.log(2)))
                return out
            for arg, use in mine.items():
                if arg == 2 or not data:
                    continue
                strength = self._bilinear(node, arg, adjoint) + use.log_lipschitz
                for p, left in self._of(node.inputs[data[0]]).items():
                    value = times(strength, left)
                    out.append((index[p], index[use.leaf], value if p != use.leaf else value + math.log(2)))
            return out
        strength = self._bend(site, adjoint)
        moving = list(self._of(node.inputs[0]).items())
        for a, (p, left) in enumerate(moving):
            for q, right in moving[a:]:
                out.append((index[p], index[q], times(times(strength, left), right)))
        return out

    def _bilinear(self, node: Any, arg: int, adjoint: Any) -> Log:
        """Bound on ``(V, t) ↦ ⟨b, V t⟩`` for unit V."""
        if node.operation in ("linear", "convolution") and arg == 1:
            if self.exact:
                rows = cotangent_matrix(node, self.structure.state.adjoint(node))
                if rows is not None:
                    return log_tensor(spectral(rows.double()))
            return adjoint(node) + 0.5 * log(self.context.facts(node).kt)
        return adjoint(node)

    def _bend(self, site: Site, adjoint: Any) -> Log:
        """Bound on ``t ↦ ⟨b, D²f[t, t]⟩`` for unit t."""
        node = site.node
        known = activation(node)
        if known is not None:
            if self.exact:
                weighted = self._second(node)
                if weighted is not None:
                    return weighted
            return times(adjoint(node), log(known.bend))
        if node.operation in ("softmax", "_softmax"):
            return adjoint(node)  # ‖D²p[t, t]‖ ≤ 2 Var_p(t) ≤ ‖t‖²
        if node.operation == "standardize":
            count = math.prod(node.shape[d % len(node.shape)] for d in node.arg("dims"))
            eps = float(node.arg("eps"))
            size = flat(inverse_scale(site)).amax(1) if self.context.local else None
            scale = log_tensor(size) if size is not None else (-0.5 * log(eps) if eps > 0 else math.inf)
            return times(adjoint(node), math.log(_STANDARDIZE / math.sqrt(count)) + 2 * scale)
        raise Absent(f"no bound on the second derivative of {node.operation!r} (node {node.name!r})")

    def _second(self, node: Any) -> Log | None:
        """``max_i |b_i σ''(z_i)|`` of an element-wise node at the data."""
        structure = self.structure
        ones = structure.value(node).new_ones(1, 1, *node.shape)
        delta = structure.state.adjoint(node)
        rows = structure.state.rule(node).curvature(structure.state.call(node), delta, {0: ones}, [0], True)
        if 0 not in rows:
            return ZERO
        return log_tensor(flat(rows[0].abs()).amax(1))

    # -- ‖∂ f_v / ∂ W‖ -----------------------------------------------------------------------------

    def _of(self, node: Any) -> dict[str, Log]:
        """Bounds on ``‖∂f_node/∂W‖`` of every parameter that moves the node."""
        if node not in self._found:
            found = self._sharp(node) if self.exact else None
            if found is None:
                moved = {name: self._tangent(name).get(node, ZERO) for name in self.names}
                found = {name: value for name, value in moved.items() if np.any(np.asarray(value) > ZERO)}
            self._found[node] = found
        return self._found[node]

    def _tangent(self, name: str) -> dict[Any, Log]:
        if name not in self._tangents:
            uses = self.structure.uses[name]
            moved: dict[Any, Log] = {}
            for node in self.structure.order:
                value: Log = ZERO
                for use in uses:
                    if use.node is node:
                        value = add(value, self._own(use))
                for arg in self.structure.arguments(node):
                    if node.inputs[arg] in moved:
                        value = add(value, times(moved[node.inputs[arg]], self.context.stretch(node, arg)))
                if np.any(np.asarray(value) > ZERO):
                    moved[node] = value
            self._tangents[name] = moved
        return self._tangents[name]

    def _own(self, use: Any) -> Log:
        found = self.norms.of(use) if self.norms is not None else None
        return self.context.weight_stretch(use) if found is None else found

    def _sharp(self, node: Any) -> dict[str, Log] | None:
        """The same with the true Jacobians from each layer to ``node``; ``None`` where that is too dear."""
        structure = self.structure
        samples = structure.state.samples
        above = structure.program.ancestors([node])
        meets = {use.node for uses in structure.uses.values() for use in uses if use.node in above}
        if not meets:
            return {}
        widest = max(v.numel for v in above if v in structure.data)
        if samples * node.numel * widest > LIMIT // 8 or samples * node.numel**3 > 2e10:
            return None
        value = structure.value(node)
        rows = value.new_zeros(samples, node.numel, node.numel)
        rows.diagonal(dim1=1, dim2=2).fill_(1)
        norms = {
            at: log_tensor(spectral(flat(piece, 2)))
            for at, piece in cotangents(structure, node, rows.reshape(samples, node.numel, *node.shape), meets)
        }
        found: dict[str, Log] = {}
        for name, uses in structure.uses.items():
            parts = [times(norms[use.node], self._own(use)) for use in uses if use.node in norms]
            if parts:
                found[name] = add(*parts)
        return found
