"""A graph evaluated at parameters, inputs and targets: values, adjoints, local derivatives."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dagh import _sweep
from dagh._bundles import matrices
from dagh._directional import Directional, along
from dagh._ir import Node, Program
from dagh._linearize import Linearization, Part
from dagh._rules import Call, Rule, rule_for
from dagh.errors import CoupledSamplesError, NonFiniteError, ReductionError, ShapeError, UnknownNameError

if TYPE_CHECKING:
    from dagh._kinks import KinkPolicy, KinkTable


@dataclass(repr=False)
class State:
    """The network and its loss at one point.

    Returned by :meth:`dagh.Graph.evaluate`. Nodes are named as in ``graph.nx``; arrays carry the sample axis first
    (``N``, or 1 for tensors that do not depend on the sample) and shapes follow the usual table: δ_v is ``[N, d_v]``,
    D_{u←v} ``[N, d_u, d_v]``, T_{u;v,w} ``[N, d_u, d_v, d_w]``, H^f_{v,w} ``[N, d_v, d_w]``. The loss is
    ``L = Σ_n c_n s_n``; adjoints and Hessians include the weights ``c_n``.

    Where samples are coupled (Batch-Norm in training mode), the whole batch is one sample: N = 1 and nodes contain it.
    """

    program: Program
    values: dict[Node, Tensor]
    weights: Tensor
    samples: int
    policy: KinkPolicy
    sources: frozenset[Node]
    coupled: bool = False
    per_sample: bool = False
    """``reduction="none"``: adjoints of what all samples share are kept apart, ``[N, …]``."""
    branches: Mapping[Node, Node] = field(default_factory=dict)
    """Nodes with forced branches at their ties, each with the stand-in under which ``values`` holds them."""

    def __post_init__(self) -> None:
        self._calls: dict[Node, Call] = {}
        self._linear: tuple[Any, Linearization] | None = None
        self._reached = self.program.descendants([n for n in self.program if n in self.sources])

    def __repr__(self) -> str:
        return f"State(loss={self.loss:.6g}, N={self.samples}, {len(self.program.nodes)} nodes)"

    # -- what the sweeps need ----------------------------------------------------------------------

    def rule(self, node: Node) -> Rule:
        return rule_for(node)

    def call(self, node: Node) -> Call:
        """The node at its arguments, for its rule."""
        call = self._calls.get(node)
        if call is None:
            forced = self.branches.get(node)
            kink = self.policy.choice(node) if forced is None else self.values[forced]
            call = Call(node, [self.values[p] for p in node.inputs], self.values[node], kink)
            self._calls[node] = call
        return call

    def active(self, node: Node) -> bool:
        """Whether the node depends on something we differentiate with respect to."""
        return node in self._reached

    def narrow(self, window: slice) -> State:
        """The same point restricted to some samples."""
        if window.start == 0 and window.stop == self.samples:
            return self
        n = self.samples
        values = {v: t[window] if v.batched and t.shape[0] == n else t for v, t in self.values.items()}
        return replace(self, values=values, weights=self.weights[window], samples=window.stop - window.start)

    @cached_property
    def adjoints(self) -> dict[Node, Tensor]:
        """δ of every node between the sources and the loss."""
        return _sweep.adjoints(self)

    # -- public ------------------------------------------------------------------------------------

    @property
    def nodes(self) -> list[str]:
        """Names of all nodes, in topological order."""
        return [n.name for n in self.program]

    @property
    def loss(self) -> float:
        """The loss ``Σ_n c_n s_n``."""
        assert self.program.loss is not None
        return float((self.values[self.program.loss].reshape(-1) * self.weights).sum())

    def node(self, name: str | Node) -> Node:
        """The node called ``name``; a parameter may be called by any of its names."""
        if isinstance(name, Node):
            return name
        found = self.program.by_name.get(name) or self.program.parameters.get(name)
        if found is None:
            raise UnknownNameError.of("node", name, [*self.program.by_name, *self.program.parameters])
        return found

    def value(self, v: str | Node) -> Tensor:
        """``f_v``: ``[N, *shape_v]`` (``[1, …]`` for parameters)."""
        return self.values[self.node(v)]

    def adjoint(self, v: str | Node) -> Tensor:
        """``δ_v``: ``[N, *shape_v]``; zero where the loss does not depend on v."""
        node = self.node(v)
        delta = self.adjoints.get(node)
        return torch.zeros_like(self.values[node]) if delta is None else delta

    def jacobian(self, u: str | Node, v: str | Node) -> Tensor:
        """``D_{u←v} = ∂f_u/∂f_v`` for a direct argument v of u: ``[N, d_u, d_v]``.

        Raises :class:`~dagh.errors.ShapeError` when v is not an argument of u.
        """
        child, parent = self.node(u), self.node(v)
        slots = self._slots(child, parent)
        eye = self._identity(parent)
        out = self.rule(child).jvp(self.call(child), dict.fromkeys(slots, eye))
        n = max(self.values[child].shape[0], self.values[parent].shape[0])
        return matrices(out.expand(n, *out.shape[1:])).transpose(1, 2)

    def total_jacobian(self, u: str | Node, v: str | Node) -> Tensor:
        """``J_{u←v}``, over all paths: ``[N, d_u, d_v]``."""
        child, parent = self.node(u), self.node(v)
        seed = self._identity(parent)
        within = self.program.descendants([parent]) & self.program.ancestors([child])
        tangents = _sweep.push_forward(self, {parent: seed}, within)
        if child not in tangents:
            n = max(self.values[child].shape[0], self.values[parent].shape[0])
            return self.values[child].new_zeros(n, child.numel, parent.numel)
        return matrices(tangents[child]).transpose(1, 2)

    def second(self, u: str | Node, v: str | Node, w: str | Node) -> Tensor:
        """``T_{u;v,w}``: second derivatives of every output of u, ``[N, d_u, d_v, d_w]`` (dense: for small nodes)."""
        child, first, other = self.node(u), self.node(v), self.node(w)
        self._slots(child, first)
        n = self.values[child].shape[0]
        planes = []
        for k in range(child.numel):
            delta = self.values[child].new_zeros(n, child.numel)
            delta[:, k] = 1
            planes.append(self._contract(child, delta.reshape(n, *child.shape), first, other))
        if not planes:
            return self.values[child].new_zeros(n, 0, first.numel, other.numel)
        return torch.stack(planes, 1)

    def local_curvature(self, u: str | Node) -> dict[tuple[str, str], Tensor]:
        """``M_u = Σ_i δ_{u,i} ∇² f_{u,i}`` by pair of arguments: ``{(p, q): [N, d_p, d_q]}``; zero pairs are absent."""
        node = self.node(u)
        delta = self.adjoint(node)
        parents = [p for p in dict.fromkeys(node.inputs) if p.dtype.is_floating_point]
        out: dict[tuple[str, str], Tensor] = {}
        if not self.rule(node).curved(node):
            return out
        for p in parents:
            for q in parents:
                block = self._contract(node, delta, p, q)
                if bool(block.any()):
                    out[p.name, q.name] = block
        return out

    def node_hessian(self, v: str | Node, w: str | Node) -> Tensor:
        """``H^f_{v,w}``: second derivative of the loss under additive probes on f_v and f_w: ``[N, d_v, d_w]``.

        Samples interact through neither probe: sample n's probes move sample n alone. For a node that does not depend
        on the sample the probe is shared and the result summed: ``[1, d_v, d_w]``.
        """
        row, column = self.node(v), self.node(w)
        for node in (row, column):
            self._require_floating(node)
        if flipped := column.index > row.index:
            row, column = column, row
        keep = max(self.values[row].shape[0], self.values[column].shape[0]) > 1
        block = self._hessian_rows(row, column, keep)
        return block.transpose(1, 2) if flipped else block

    def _hessian_rows(self, row: Node, column: Node, keep: bool) -> Tensor:
        loss = self.program.loss
        assert loss is not None
        within = self.program.descendants([column]) & self.program.ancestors([loss])
        tangents = _sweep.push_forward(self, {column: self._identity(column)}, within)
        found = _sweep.pull_back(self, {}, [row], tangents=tangents, curved=set(self.program.nodes), keep=keep)
        n = max(self.values[row].shape[0], self.values[column].shape[0])
        if row not in found:
            return self.values[row].new_zeros(n, row.numel, column.numel)
        block = matrices(found[row]).transpose(1, 2)
        if n == 1 and block.shape[0] > 1:
            block = block.sum(0, keepdim=True)
        return block.expand(n, *block.shape[1:])

    def hessian_product(self, v: Mapping[str, Tensor], part: Part = "full") -> dict[str, Tensor]:
        """``H @ v`` without forming any block: one tangent sweep forward, one sweep back.

        ``v`` maps names of parameters (or nodes) to tensors of their shape, or to bundles ``[B, *shape]`` of several
        directions; what is not named stands still. Returns the product for every parameter, in the same layout.

        Raises :class:`~dagh.errors.ShapeError` for directions of the wrong shape, and
        :class:`~dagh.errors.CoupledSamplesError` for a state per sample.
        """
        if self.per_sample:
            raise CoupledSamplesError("hessian_product sums over samples; evaluate with reduction='mean' or 'sum'")
        seeds, width, single = self._seeds(v)
        leaves = {name: leaf for name, leaf in self.program.parameters.items() if leaf in self.sources}
        found = self._linearization(tuple(seeds), tuple(leaves.values()), part).product(seeds)
        product = {}
        for name, leaf in leaves.items():
            row = found[leaf].clone() if leaf in found else self.values[leaf].new_zeros(width, *leaf.shape)
            product[name] = row[0] if single else row
        return product

    def along(self, v: Mapping[str, Tensor]) -> Directional:
        """Every sample's loss, slope and curvature along directions ``v``, as in :meth:`hessian_product`: one sweep.

        Raises :class:`~dagh.errors.ReductionError` unless the state was evaluated with ``reduction="none"``, and
        :class:`~dagh.errors.ShapeError` for directions of the wrong shape.
        """
        if not self.per_sample:
            raise ReductionError("along() keeps samples apart; evaluate with reduction='none'")
        return along(self, self._seeds(v)[0])

    def _seeds(self, v: Mapping[str, Tensor]) -> tuple[dict[Node, Tensor], int, bool]:
        """Directions by node, as bundles ``[B, *shape]``; B; and whether they were given as single ones."""
        assert self.program.loss is not None
        seeds, widths = {}, set()
        for name, direction in v.items():
            node = self.node(name)
            self._require_floating(node)
            single = direction.shape == node.shape
            if not single and direction.shape[1:] != node.shape:
                raise ShapeError(
                    f"the direction of {name!r} has shape {tuple(direction.shape)}, not {tuple(node.shape)}"
                )
            bundled = direction.unsqueeze(0) if single else direction
            seeds[node] = bundled.detach().to(self.values[node])
            widths.add((bundled.shape[0], single))
        if len(widths) != 1:
            raise ShapeError("give one direction for every name, or bundles of the same number of directions")
        ((width, single),) = widths
        return seeds, width, single

    def _linearization(self, seeds: tuple[Node, ...], leaves: tuple[Node, ...], part: Part) -> Linearization:
        """The linearization for these directions: the one of the last call where it fits."""
        key = (seeds, part)
        if self._linear is None or self._linear[0] != key:
            self._linear = key, Linearization(self, seeds, leaves, part)
        return self._linear[1]

    def kinks(self, tol: float = 0.0) -> KinkTable:
        """Per node with kinks: how many elements sit on one, within ``tol`` of one, and the smallest margin."""
        from dagh._kinks import KinkTable

        return KinkTable.of(self, tol)

    # -- helpers -----------------------------------------------------------------------------------

    def _require_floating(self, node: Node) -> None:
        if not node.dtype.is_floating_point:
            raise ShapeError(f"node {node.name!r} holds integers; derivatives with respect to it do not exist")

    def _identity(self, node: Node) -> Tensor:
        self._require_floating(node)
        like = self.values[node]
        eye = torch.eye(node.numel, dtype=like.dtype, device=like.device)
        return eye.reshape(1, node.numel, *node.shape)

    def _slots(self, child: Node, parent: Node) -> list[int]:
        slots = [i for i, p in enumerate(child.inputs) if p is parent]
        if not slots:
            known = ", ".join(repr(p.name) for p in child.inputs) or "none"
            raise ShapeError(f"{parent.name!r} is not an argument of {child.name!r} (its arguments: {known})")
        return slots

    def _contract(self, child: Node, delta: Tensor, first: Node, other: Node) -> Tensor:
        """``Σ_i delta_i T_{child;first,other}``: ``[N, d_first, d_other]``."""
        slots = self._slots(child, other)
        rows = self._slots(child, first)
        eye = self._identity(other)
        found = self.rule(child).curvature(self.call(child), delta, dict.fromkeys(slots, eye), rows, True)
        n = self.values[child].shape[0]
        total = delta.new_zeros(n, other.numel, first.numel)
        if self.rule(child).curved(child):
            total = total + sum(matrices(block) for block in found.values())
        return total.transpose(1, 2)


def evaluate_program(
    program: Program,
    leaves: dict[Node, Tensor],
    policy: KinkPolicy,
    only: Collection[Node] | None = None,
    known: dict[Node, Tensor] | None = None,
) -> dict[Node, Tensor]:
    """Values of every node (``[N or 1, *shape]``) from the values of the leaves; ``known`` ones are not recomputed."""
    return _evaluate(program, leaves, policy, only, known or {})


def _evaluate(
    program: Program,
    leaves: dict[Node, Tensor],
    policy: KinkPolicy,
    only: Collection[Node] | None,
    known: dict[Node, Tensor],
) -> dict[Node, Tensor]:
    values: dict[Node, Tensor] = {}
    for node in program:
        if only is not None and node not in only:
            continue
        if node in known:
            values[node] = known[node]
            continue
        if node.op is None:
            values[node] = leaves[node]
            continue
        value = rule_for(node).value(node, [values[p] for p in node.inputs], policy.choice(node))
        if value.shape[1:] != node.shape:
            raise ShapeError(
                f"node {node.name!r} ({node.operation}) has shape {tuple(value.shape[1:])} per sample on these inputs, "
                f"{tuple(node.shape)} when traced; trace the model again with inputs like these"
            )
        values[node] = value.detach()
    return values


def check_finite(program: Program, values: dict[Node, Tensor]) -> None:
    """Raise :class:`~dagh.errors.NonFiniteError` naming the first node that turned finite numbers into NaN or Inf."""
    final = [n for n in (program.loss, program.output) if n is not None]
    if not all(bool(torch.isfinite(values[n]).all()) for n in final):
        raise non_finite(program, values, final[0])


def non_finite(program: Program, values: dict[Node, Tensor], otherwise: Node) -> NonFiniteError:
    """The error that names the first node whose arguments are finite and whose value is not.

    Minus infinity written by a mask is left alone: a softmax turns it into zeros.
    """
    found = None
    for node in program:
        value = values.get(node)
        if value is None or not value.dtype.is_floating_point or bool(torch.isfinite(value).all()):
            continue
        if node.op is None:
            if node.kind == "constant":
                continue
            return NonFiniteError(f"{node.kind} {node.name!r} contains {_what(value)}; clean it first")
        if node.operation in ("masked_fill", "where"):
            continue
        if all(bool(torch.isfinite(values[p]).all()) for p in node.inputs if p.dtype.is_floating_point):
            if bool(torch.isnan(value).any()):
                found = node
                break
            found = found or node
    where = found or otherwise
    at = f" in {where.module!r}" if where.module else ""
    line = f" ({where.source})" if where.source else ""
    return NonFiniteError(
        f"{_what(values[where])} in the forward pass, first at node {where.name!r} ({where.operation}{at}){line}; "
        "check the inputs and the scale of the parameters"
    )


def _what(value: Tensor) -> str:
    if bool(torch.isnan(value).any()):
        return "NaN"
    return "Inf" if bool(torch.isinf(value).any()) else "overflow of a derivative"


def as_policy(kinks: Any) -> KinkPolicy:
    """Validate the ``kinks=`` argument."""
    from dagh._clarke._policy import AtKinks, Deferred
    from dagh._kinks import KinkPolicy

    if isinstance(kinks, KinkPolicy):
        return kinks
    at = AtKinks.of(kinks)
    if at is not None:
        return Deferred(at)
    if kinks is None or (isinstance(kinks, str) and kinks == "torch"):
        return KinkPolicy(None)
    if isinstance(kinks, (int, float)) and not isinstance(kinks, bool) and 0 <= kinks <= 1:
        return KinkPolicy(float(kinks))
    if isinstance(kinks, dict) or callable(kinks) or (isinstance(kinks, str) and kinks in ("left", "right")):
        return KinkPolicy(kinks)
    raise ReductionError(
        f"kinks={kinks!r}: expected 'torch', 'left', 'right', a slope in [0, 1], a dict like {{'relu': 0.5}}, "
        f"a function, one of {', '.join(map(repr, AtKinks.policies()))}, or dagh.AtKinks(…)"
    )
