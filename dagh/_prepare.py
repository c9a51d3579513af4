"""From the arguments of a public call to a traced graph, its state at a point, the request, and a plan for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from torch import nn

from dagh import _memory, _objectives
from dagh._graph import Graph, trace
from dagh._linearize import Part
from dagh._objectives import Reduction
from dagh._plan import Plan
from dagh._planner import check_routes
from dagh._programs import Mode
from dagh._request import Request, choose_names, choose_pairs
from dagh._settle import at, settled
from dagh._state import State
from dagh.errors import ReductionError

Names: TypeAlias = str | Iterable[str] | None
Blocks: TypeAlias = Literal["all", "diagonal", "module"] | Sequence[tuple[str, str]]


@dataclass
class Prepared:
    """What is needed to form blocks; nothing has been formed yet."""

    graph: Graph
    state: State
    request: Request
    plan: Plan
    budget: int


def prepare(
    wanted: tuple[str, ...],
    model: nn.Module | Graph,
    loss: Any,
    inputs: Any,
    targets: Any,
    *,
    params: Names,
    wrt: Names,
    blocks: Blocks,
    reduction: Reduction,
    kinks: Any,
    memory_budget: int | str | None,
    plan: Plan | None,
    output: str | int | None,
    mode: Mode,
    entries: bool = False,
    routes: Mapping[tuple[str, str], str] | None = None,
) -> Prepared:
    """Trace (unless given a graph), evaluate, resolve names, and plan (or check the plan given)."""
    for part in wanted:
        if part not in get_args(Part):
            raise ReductionError(f"part={part!r}: expected 'full', 'outer' or 'functional'")
    if isinstance(memory_budget, str):
        memory_budget = _memory.parse_size(memory_budget)
    _objectives.resolve(loss)  # before inputs in its place are tried
    graph = model if isinstance(model, Graph) else trace(model, inputs, mode=mode, output=output)
    names, leaves = choose_names(graph.program, graph.trainable, params, wrt)
    choose_pairs(names, leaves, blocks)
    state = graph._evaluate(loss, inputs, targets, reduction=reduction, kinks=kinks, wrt=names)
    names, leaves = choose_names(state.program, graph.trainable, params, wrt)
    request = Request(names, leaves, choose_pairs(names, leaves, blocks), entries)
    parts = tuple(p for p in ("outer", "functional") if wanted != ("outer",) or p == "outer")
    parts = parts if wanted != ("functional",) else ("functional",)
    budget = _memory.budget_bytes(memory_budget, state.weights.device)
    if routes is not None:
        check_routes(routes, request)
    keep = reduction == "none"
    if plan is None:
        chosen = settled(state, request, parts, keep=keep, copies=len(wanted), budget=budget, routes=routes)
    else:
        _check(plan, state, request, parts)
        chosen = at(plan, state, parts, keep=keep, budget=budget)
    return Prepared(graph, state, request, chosen, budget)


def _check(plan: Plan, state: State, request: Request, parts: tuple[str, ...]) -> None:
    if not isinstance(plan, Plan):
        raise ReductionError(f"plan must be a Plan such as H.plan, not {type(plan).__name__}")
    made_for = plan.names, plan.pairs, plan.entries
    if plan.program is not state.program or made_for != (request.names, request.pairs, request.entries):
        raise ReductionError("the plan was made for another graph or request; leave plan=None to make a new one")
    if "functional" in parts and not plan.functional:
        raise ReductionError("the plan was made for gauss_newton and has no sweeps for H_F; leave plan=None")
