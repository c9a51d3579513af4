"""Row a5: products of layers with activations in between, bounded jointly by quadratic forms.

Let ``w = D u`` with D diagonal, ``0 ≤ d_i ≤ 1``: the Jacobian of an activation with slopes in [0, 1], wherever it is
taken. Then ``w_i (u_i − w_i) = d_i (1 − d_i) u_i² ≥ 0``, so for any symmetric M and diagonal Λ with ``2Λ ≻ M``

    wᵀMw ≤ wᵀMw + 2 Σ_i λ_i w_i (u_i − w_i) = 2 wᵀΛu − wᵀ(2Λ − M)w ≤ uᵀ Λ (2Λ − M)⁻¹ Λ u,

the last step being the maximum over all w. With ``u = T x`` the form goes on as ``M' = Tᵀ Λ (2Λ − M)⁻¹ Λ T`` through
the layer before, and at the end ``‖T_q D ⋯ D T_p‖² ≤ λ_max(M')``. Every feasible Λ gives a bound: ``Λ = λ_max(M) I``
at most the product of the norms, and a few steps of gradient descent a smaller one. Where max-pooling keeps one
element per window, ``w_j² ≤ Σ_{i in window j} u_i²`` and any diagonal ``Λ ⪰ M`` serve instead.

The inequalities are those of M. Fazlyab, A. Robey, H. Hassani, M. Morari and G. J. Pappas, "Efficient and Accurate
Estimation of Lipschitz Constants for Deep Neural Networks", 2019 (there one semidefinite program); eliminated layer by
layer they need linear algebra only, and stopping early costs tightness, not validity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._activations import activation
from ._averaged import AVERAGED
from ._chain import Chain, ChainLayer, Pool, jacobian_of_step
from ._ladder import Problem, Value, summed
from ._logs import add, log
from ._structure import MOVES, Absent

#: Steps of gradient descent, and the sum of cubed widths (of all products) up to which they are taken.
_STEPS, _WORK = 12, 4e8

#: Pairs of outputs whose difference gets a bound of its own.
_PAIRS = 100

#: Room for rounding in the eigenvalue at the end, relative.
_ROUNDING = 1e-10


@dataclass
class Step:
    """A linear map ``[outputs, inputs]``; or an activation (no ``matrix``, no ``windows``) of ``width`` elements; or
    max-pooling, with ``windows`` ``[outputs, inputs]`` one where an element belongs to a window.
    """

    width: int
    matrix: Tensor | None = None
    windows: Tensor | None = None


def a5(problem: Problem, chain: Chain) -> Value:
    """As :func:`a3`, with products of layers bounded jointly by optimized multipliers.

    Raises :class:`Absent` where a layer is too large to be written out, or something other than an activation with
    slopes in [0, 1] and σ(0) = 0, max-pooling or a linear map stands between layers.
    """
    steps = {node: step for node in chain.steps if (step := _step(chain, node)) is not None}
    order = [node for node in chain.steps if node in steps]
    places = {layer.node: order.index(layer.node) for layer in chain.layers}
    biased = [layer for layer in chain.layers if layer.bias]
    work = sum(step.width**3 for step in steps.values()) * (2 + len(biased)) * len(chain.layers) / 2
    if work > _WORK:
        raise Absent(f"the sum of cubed widths over all products is {work:.1e}, more than {_WORK:.0e}")
    names = {(use.node, use.arg): name for name, uses in chain.structure.uses.items() for use in uses}

    bound_on_outputs = gain_of_differences if problem.curvature.categorical else gain

    def joint(first: int, last: int) -> float:
        """Logarithm of the bound on the product of the steps ``first`` to ``last``."""
        return gain([steps[node] for node in order[first : last + 1]])

    blocks: dict[str, float] = {}
    for layer in chain.layers:
        place, facts = places[layer.node], layer.facts
        after = bound_on_outputs([steps[node] for node in order[place + 1 :]])
        length = problem.log_input + joint(0, place - 1)
        for other in biased:
            if places[other.node] < place:
                shift = 0.5 * log(other.facts.positions) + _bias(other, chain)
                length = float(add(length, shift + joint(places[other.node] + 1, place - 1)))
        if (layer.node, 1) in names:
            blocks[names[layer.node, 1]] = after + 0.5 * log(facts.kt) + length
        if (layer.node, 2) in names:
            blocks[names[layer.node, 2]] = after + 0.5 * log(facts.positions)
    return summed(blocks, problem.curvature.log_sup())


def gain(steps: list[Step], iterations: int = _STEPS) -> float:
    """Logarithm of a bound on ``‖w‖`` over ``‖u‖ ≤ 1``, w what ``steps`` make of u.

    Activations are any diagonal matrices with entries in [0, 1], max-poolings any selections.
    """
    return _Multipliers(steps, _unit(steps), iterations).log() if steps else 0.0


def gain_of_differences(steps: list[Step]) -> float:
    """Logarithm of a bound on ``max_ij |w_i − w_j| / √2`` over ``‖u‖ ≤ 1``, as :func:`gain`.

    The multipliers found for ``‖(I − 11ᵀ/K) w‖`` serve every pair, since ``(e_i − e_j)(e_i − e_j)ᵀ / 2 ⪯ I − 11ᵀ/K``.
    Pairs are taken up in the order of their bounds, until the largest bound cannot be improved.
    """
    if not steps:
        return 0.0
    unit = _unit(steps)
    common = _Multipliers(steps, unit - 1 / len(unit))
    i, j = torch.triu_indices(len(unit), len(unit), 1, device=unit.device)
    behind = steps[-1].matrix
    if behind is None:
        rows, rest = unit, steps
    else:
        rows, rest = behind, steps[:-1]
    apart = (rows[i] - rows[j]).norm(dim=1) / math.sqrt(2)
    rough = (2 * (apart.log() + gain(rest))).exp()
    bounds = rough.clamp(max=common.best)
    for _ in range(min(len(bounds), _PAIRS)):
        worst = int(bounds.argmax())
        vector = (unit[i[worst]] - unit[j[worst]]) / math.sqrt(2)
        exact = common.of(torch.outer(vector, vector))
        if exact >= bounds[worst]:
            break
        bounds[worst] = exact
    return 0.5 * (log(float(bounds.max())) + _ROUNDING)


def _unit(steps: list[Step]) -> Tensor:
    like = next((t for s in steps for t in (s.matrix, s.windows) if t is not None), None)
    return torch.eye(_outputs(steps[-1]), dtype=torch.float64, device=None if like is None else like.device)


class _Multipliers:
    """Multipliers chosen for one quadratic form ``end`` of the result, and ``best``, the bound that they give."""

    def __init__(self, steps: list[Step], end: Tensor, iterations: int = _STEPS) -> None:
        self.steps, self.iterations = steps, iterations
        shape = [_outputs(s) for s in steps if s.matrix is None]
        self.logs = [torch.zeros(n, dtype=end.dtype, device=end.device) for n in shape]
        self.slack = [torch.zeros((), dtype=end.dtype, device=end.device) for _ in shape]
        self.best = self.of(end)
        if shape and self.best > 0:
            first = self.logs, self.slack
            self._descend(end)
            found = self.of(end)
            if found > self.best:
                self.logs, self.slack = first
            self.best = min(self.best, found)

    def of(self, end: Tensor) -> float:
        """The bound on ``wᵀ end w`` with these multipliers; infinite where they are infeasible."""
        with torch.no_grad():
            return float(_value(self.steps, end, self.logs, self.slack, exact=True))

    def log(self) -> float:
        """Logarithm of the square root of the bound."""
        return 0.5 * (log(self.best) + _ROUNDING)

    def _descend(self, end: Tensor) -> None:
        logs, slack = ([t.clone().requires_grad_() for t in ts] for ts in (self.logs, self.slack))
        optimizer = torch.optim.Adam([*logs, *slack], lr=0.1)
        tops: dict[int, Tensor] = {}
        least = math.inf
        for _ in range(self.iterations):
            optimizer.zero_grad()
            value = _value(self.steps, end, logs, slack, exact=False, tops=tops)
            if not bool(torch.isfinite(value)):
                break
            if value.item() < least:
                least = value.item()
                self.logs, self.slack = ([t.detach().clone() for t in ts] for ts in (logs, slack))
            value.log().backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def _value(
    steps: list[Step], form: Tensor, logs: list[Tensor], slack: list[Tensor], *, exact: bool, tops: Any = None
) -> Tensor:
    """``λ_max`` of the form at the beginning; ``exact``: by eigenvalues, infinite where a multiplier is infeasible.

    In the course of a descent largest eigenvalues come from a few power iterations, started where the last one ended.
    """
    k = len(logs)
    for step in reversed(steps):
        if step.matrix is not None:
            form = step.matrix.mT @ form @ step.matrix
            continue
        k -= 1
        scale = logs[k].exp()
        root = scale.rsqrt()
        least = _top(root[:, None] * form * root, exact, tops, k)
        if not bool(least > 0):
            form = form.new_zeros(step.width, step.width)
            continue
        if step.windows is not None:
            form = torch.diag(step.windows.mT @ (least * (1 + _ROUNDING) * scale))
            continue
        multiplier = least * 0.5 * (1 + slack[k].exp()) * scale
        factor, failed = torch.linalg.cholesky_ex(torch.diag(2 * multiplier) - form)
        if int(failed):
            return form.new_tensor(math.inf)
        half = torch.linalg.solve_triangular(factor, torch.diag(multiplier), upper=False)
        form = half.mT @ half
    return _top(form, exact, tops, -1)


def _top(form: Tensor, exact: bool, tops: Any, key: int) -> Tensor:
    if exact:
        found: Tensor = torch.linalg.eigvalsh((form + form.mT) / 2)[-1].clamp_min(0)
        return found
    with torch.no_grad():
        vector = tops.get(key)
        if vector is None or vector.shape[0] != form.shape[0]:
            vector = torch.linalg.eigh((form + form.mT) / 2)[1][:, -1]
        for _ in range(3):
            vector = form @ vector
            vector = vector / vector.norm().clamp_min(1e-300)
        tops[key] = vector
    rayleigh: Tensor = vector @ form @ vector
    return rayleigh


def _outputs(step: Step) -> int:
    found = step.matrix if step.matrix is not None else step.windows
    return step.width if found is None else found.shape[0]


def _step(chain: Chain, node: Any) -> Step | None:
    """What one operation of the chain does; None where it changes the shape only."""
    known = activation(node)
    if known is not None:
        if node.operation not in AVERAGED or known.offset or known.slope > 1:
            raise Absent(f"{node.operation} is not known to have slopes in [0, 1] and σ(0) = 0")
        return Step(node.numel)
    source = next(p for p in node.inputs if p in chain.structure.data)
    device = chain.layers[-1].weight.device
    if node.operation in MOVES:
        order = torch.arange(source.numel, device=device)
        moved = node.call([order.reshape(source.shape)]).reshape(-1)
        if bool((moved == order).all()):
            return None
        return Step(source.numel, torch.eye(source.numel, dtype=torch.float64, device=device)[moved])
    # Wider ones exceed the limit on the work by themselves; so large a matrix must not even be written out.
    if max(node.numel, source.numel) ** 3 > _WORK:
        raise Absent(f"{node.name!r} is a matrix of {node.numel:,} × {source.numel:,}, too large for multipliers")
    if node.operation == "max_pool":
        pool = next(p for layer in chain.layers for p in layer.pools if p.node is node)
        return Step(source.numel, windows=_windows(pool, source, node).to(device))
    return Step(source.numel, jacobian_of_step(chain.structure, node).double())


def _windows(pool: Pool, source: Any, node: Any) -> Tensor:
    if not pool.plain:
        raise Absent(f"the windows of {node.name!r} overlap or leave the image")
    at = torch.zeros(node.numel, source.numel, dtype=torch.float64, device="cpu")
    images = torch.arange(source.numel, device="cpu").reshape(source.shape)
    taken = images
    for axis, (kernel, stride) in enumerate(zip(pool.kernel, pool.stride, strict=True), start=2):
        taken = taken.unfold(axis, kernel, stride)
    at.scatter_(1, taken.reshape(node.numel, -1), 1.0)
    return at


def _bias(layer: ChainLayer, chain: Chain) -> float:
    return log(float(chain.structure.value(layer.node.inputs[2]).norm()))
