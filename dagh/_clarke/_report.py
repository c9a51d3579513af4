"""``dagh.kinks``: what happens at a point with ties, and how far other points are from one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import Any

import numpy as np
from torch import nn

from dagh import _memory
from dagh._blockmatrix import BlockMatrix
from dagh._clarke._box import box_of
from dagh._clarke._limiting import Certainty, Found, _flat, describe, find_patterns, gradient_of
from dagh._clarke._margins import histogram, margins
from dagh._clarke._policy import AtKinks
from dagh._clarke._sites import Site, loss_jump
from dagh._graph import Graph, trace
from dagh._hessian import _matrices
from dagh._notebook import Shown
from dagh._objectives import Reduction
from dagh._planner import make_plan
from dagh._prepare import Names, Prepared
from dagh._programs import Mode
from dagh._request import Request, choose_names, choose_pairs
from dagh._state import State
from dagh.errors import KinkError, MemoryBudgetError

#: Numbers that the Hessians of all patterns may fill when they are compared.
_COMPARED = 2**25
#: Directions looked along where enumeration is out of reach.
_FALLBACK = 64


@dataclass(frozen=True)
class KinkNode:
    """One node with kinks. Counts are over samples and elements; margins are the smallest distances to a kink.

    ``ties`` elements are exactly on a kink, and ``live`` of them matter: something can move them and the loss can feel
    them. ``near`` are within the tolerance, ties included. ``smooth``: the gradient is continuous across all its ties
    (C^{1,1}). ``margin`` is in units of the node's input, ``parameter_margin`` and ``input_margin`` are Euclidean
    distances in the parameters and in one sample's input, to first order.
    """

    node: str
    operation: str
    module: str
    elements: int
    ties: int
    live: int
    near: int
    smooth: bool
    margin: float
    parameter_margin: float
    input_margin: float


@dataclass(frozen=True)
class PatternRow:
    """One realizable pattern: its branches, share of directions, and norms of its gradient and Hessian."""

    branches: tuple[str, ...]
    weight: float
    gradient: float
    hessian: float | None


@dataclass(frozen=True)
class BoxRow:
    """Bounds that hold for every limiting Hessian, found or not, and every convex combination of them.

    ``least_norm`` and ``largest_norm`` are of Frobenius norms, ``spread`` of Frobenius distances, ``eigenvalues`` an
    interval that holds all; ``form`` is how the bounds were proven (``"affine"``, ``"pairs"``, ``"patterns"``).
    """

    least_norm: float
    largest_norm: float
    spread: float
    eigenvalues: tuple[float, float] | None
    form: str


@dataclass(frozen=True, repr=False)
class KinkReport(Shown):
    """What meets at a point, and how near everything else is to a kink; printed in full by ``rich.print`` or ``str``.

    Attributes:
        nodes: one :class:`KinkNode` per node with kinks.
        ties, live_ties, near: totals; live ties matter, near ones are within ``tol``.
        patterns: realizable patterns found, one :class:`PatternRow` each; a single one where no tie matters.
        certainty: ``"exact"``, ``"first_order"`` (cusps may be missing), ``"sampled"`` (some ties settled by points
            nearby), or ``"bound"`` (too many ties: random directions only, so that counts and differences are lower
            bounds).
        equal, sampled: ties between candidates that agree nearby; ties settled by points nearby.
        loss_jump: distance of a pattern's loss from the loss here, 0 but where a comparison makes the loss jump.
        gradient_jump: largest distance between the gradients of two patterns.
        hessian_spread: largest Frobenius distance between their Hessians; ``None`` where those were not formed.
        box: where the patterns may not be all there are, bounds on all; ``None`` where that takes too long as well.
        removable: neither differs: the function is twice differentiable here, whatever its spelling suggests.
        c11: every tie that matters is C^{1,1}: the Clarke generalized Hessian is defined.
        histogram: elements per bin of ``edges``: on a kink, then up to each edge.
    """

    nodes: tuple[KinkNode, ...]
    tol: float
    samples: int
    ties: int
    live_ties: int
    near: int
    patterns: tuple[PatternRow, ...]
    certainty: Certainty
    equal: int
    sampled: int
    loss_jump: float
    gradient_jump: float
    hessian_spread: float | None
    box: BoxRow | None
    removable: bool | None
    c11: bool
    histogram: tuple[int, ...]
    edges: tuple[float, ...]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        return (
            f"KinkReport({self.ties} ties, {self.live_ties} matter, {len(self.patterns)} patterns, {self.certainty}; "
            "print it for the whole)"
        )

    @property
    def realizable(self) -> int:
        """Number of realizable patterns found."""
        return len(self.patterns)

    @property
    def margin(self) -> float:
        """Smallest margin of all nodes (infinite without kinks)."""
        return min((n.margin for n in self.nodes), default=float("inf"))

    def __iter__(self) -> Iterator[KinkNode]:
        return iter(self.nodes)

    def __getitem__(self, node: str) -> KinkNode:
        for row in self.nodes:
            if row.node == node:
                return row
        raise KeyError(node)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; infinite and undefined numbers become ``None``."""
        out = _plain(asdict(self))
        assert isinstance(out, dict)
        return out

    def __rich__(self) -> Any:
        from dagh._clarke._show import full

        return full(self)

    def __str__(self) -> str:
        from dagh._clarke._show import as_text

        return as_text(self)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def kinks(
    model: nn.Module | Graph,
    loss: Any,
    inputs: Any,
    targets: Any = None,
    tol: float = 0.0,
    *,
    params: Names = None,
    wrt: Names = None,
    reduction: Reduction = "mean",
    output: str | int | None = None,
    mode: Mode = "eval",
    max_patterns: int = 512,
    seed: int = 0,
) -> KinkReport:
    """Where a model and its loss stand on kinks, what meets there, and how far they are from the others.

    Args:
        model: as in :func:`dagh.hessian`, and so are ``loss``, ``inputs``, ``targets``, ``output`` and ``mode``.
        loss: as there.
        inputs: as there.
        targets: as there.
        params: names or globs of the parameters that vary; everything else stands still.
        wrt: as ``params``, and also names of nodes.
        output: as there.
        mode: as there.
        tol: elements within this distance of a kink are counted as near; only exact ties have branches.
        reduction: ``"mean"`` or ``"sum"``.
        max_patterns: beyond this many the report looks along 64 random directions instead, and says so.
        seed: of random directions.

    Returns:
        A :class:`~dagh.KinkReport`; ``print`` shows all of it.

    Raises:
        DaghError: one of its subclasses in :mod:`dagh.errors`.
    """
    if reduction == "none":
        raise KinkError("patterns belong to the whole batch: use reduction='mean' or 'sum'")
    graph = model if isinstance(model, Graph) else trace(model, inputs, mode=mode, output=output)
    names, _ = choose_names(graph.program, graph.trainable, params, wrt)
    state = graph._evaluate(loss, inputs, targets, reduction=reduction, kinks="torch", wrt=names)
    return report(graph, state, choose_names(state.program, graph.trainable, params, wrt), tol, max_patterns, seed)


def report(graph: Graph, state: State, chosen: Any, tol: float, max_patterns: int, seed: int) -> KinkReport:
    """The report of a graph already evaluated; ``chosen`` holds names and leaves of the variables."""
    names, leaves = chosen
    notes: list[str] = []
    try:
        found = find_patterns(state, leaves, AtKinks("enumerate", max_patterns=max_patterns, seed=seed))
    except KinkError as error:
        notes.append(str(error).partition(";")[0])
        found = find_patterns(state, leaves, AtKinks("enumerate", samples=_FALLBACK, seed=seed))
    nodes, counts = _nodes(state, leaves, {site.node.name: site for site in found.sites.all}, tol)
    request = Request(names, leaves, choose_pairs(names, leaves, "all"))
    matrices = _hessians(graph, state, request, found)
    if matrices is None:
        size = f"{len(found.branchings)} of {request.total:,} × {request.total:,}"
        notes.append(
            f"Hessians neither compared nor bounded: {size}; fewer parameters (params=, --params) make it possible"
        )
    box = None
    if found.certainty != "exact" and matrices is not None:
        box = _box(graph, state, request, found, max_patterns, notes)
    gradients = [_vector(gradient_of(s, found.sites)) for s in found.states()]
    jump = _spread(np.stack(gradients))
    spread = None if matrices is None else _spread(_flat(matrices))
    sizes = [None] * len(gradients) if matrices is None else [float(v) for v in np.linalg.norm(_flat(matrices), axis=1)]
    rows = tuple(
        PatternRow(tuple(map(str, describe(found.sites, b))), b.share, float(np.linalg.norm(g)), size)
        for b, g, size in zip(found.branchings, gradients, sizes, strict=True)
    )
    live = found.sites.live
    scale = max((r.gradient for r in rows), default=0.0), max((s for s in sizes if s is not None), default=0.0)
    broken = loss_jump(state, found.states()) if any(site.ties.levels is not None for site in live) else 0.0
    still = not broken and jump <= 1e-9 * max(scale[0], 1e-12)
    return KinkReport(
        nodes, tol, state.samples, found.sites.ties, found.sites.live_ties, sum(n.near for n in nodes), rows,
        found.certainty, found.equal, found.sampled, broken, jump, spread, box,
        None if spread is None and still else still and spread is not None and spread <= 1e-9 * max(scale[1], 1e-12),
        not broken and all(bool(site.smooth[site.live].all()) for site in live), *counts, (*found.notes, *notes),
    )  # fmt: skip


def _nodes(
    state: State, leaves: Sequence[Any], sites: dict[str, Site], tol: float
) -> tuple[tuple[KinkNode, ...], tuple[tuple[int, ...], tuple[float, ...]]]:
    from dagh._clarke._margins import EDGES

    rows, all_margins = [], []
    inputs = [n for n in state.program.inputs if n.dtype.is_floating_point]
    for node in state.program:
        site = sites.get(node.name)
        found = None if node.op is None else margins(state, node, leaves, inputs, site)
        if found is None:
            continue
        all_margins.append(found.margin)
        rows.append(
            KinkNode(
                node.name, node.operation, node.module, found.margin.numel(), int((found.margin == 0).sum()),
                site.count if site else 0, int((found.margin <= tol).sum()),
                bool(site.smooth.all()) if site else False, float(found.margin.min()),
                0.0 if site and site.count else found.parameters, found.inputs,
            )
        )  # fmt: skip
    return tuple(rows), (histogram(all_margins), EDGES)


def _box(graph: Graph, state: State, request: Request, found: Found, cap: int, notes: list[str]) -> BoxRow | None:
    ready = _ready(graph, state, request)
    try:
        middle, _ = box_of(found.sites, lambda s: _matrices(("full",), s, ready, "mean"), cap)["full"]
    except (KinkError, MemoryBudgetError) as error:
        notes.append(f"no bounds: {str(error).partition(';')[0]}")
        return None
    made = middle.info["kinks"]
    return BoxRow(*(made[k] for k in ("least_norm", "largest_norm", "spread", "eigenvalues", "form")))


def _hessians(graph: Graph, state: State, request: Request, found: Found) -> list[BlockMatrix] | None:
    if len(found.branchings) * request.total**2 > _COMPARED:
        return None
    ready = _ready(graph, state, request)
    return [_matrices(("full",), forced, ready, "mean")["full"] for forced in found.states()]


def _ready(graph: Graph, state: State, request: Request) -> Prepared:
    device = state.weights.device
    plan = replace(
        make_plan(state.program, request, samples=state.samples), dtype=state.weights.dtype, device=device.type
    )
    return Prepared(graph, state, request, plan, _memory.budget_bytes(None, device))


def _vector(gradient: dict[str, Any]) -> Any:
    return np.concatenate([g.double().cpu().numpy().reshape(-1) for g in gradient.values()])


def _spread(vectors: Any) -> float:
    """The largest distance between two rows."""
    gram = vectors @ vectors.T
    square = np.diag(gram)[:, None] + np.diag(gram)[None] - 2 * gram
    i, j = np.unravel_index(int(square.argmax()), square.shape)
    return float(np.linalg.norm(vectors[i] - vectors[j]))


__all__ = ["BoxRow", "KinkNode", "KinkReport", "PatternRow", "kinks", "report"]
