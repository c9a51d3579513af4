"""The plan under a memory budget: the cheapest one, unless it does not fit or strips of everything cost less."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from dagh._memory import human
from dagh._plan import Plan
from dagh._planner import make_plan
from dagh._request import Pair, Request, itemsize
from dagh._state import State

#: Strips replace everything else when their price is below this share of its price.
_CHEAPER = 0.5


def settled(
    state: State,
    request: Request,
    parts: tuple[str, ...],
    *,
    keep: bool,
    copies: int,
    budget: int,
    routes: Mapping[tuple[str, str], str] | None = None,
) -> Plan:
    """The plan for a request, with results held ``copies`` times; made once per program and shapes.

    Strips are taken for whatever does not fit the budget otherwise, and for everything where that is clearly cheaper.
    ``routes`` are taken as they are.
    """
    chosen = tuple(sorted((routes or {}).items()))
    # For each request, the plans by the pairs that must go by strips and by the room for work.
    kept = state.program.plans.setdefault((request, parts, chosen), {})

    def made(strips: Collection[Pair] = (), limit: int | None = None) -> Plan:
        key = frozenset(strips), limit
        if key not in kept:
            kept[key] = make_plan(
                state.program, request, samples=state.samples, parts=parts, routes=routes, strips=strips, limit=limit
            )
        return at(kept[key], state, parts, keep=keep, budget=budget)

    def room(plan: Plan) -> int:
        return budget - copies * plan.result_bytes

    plan = made()
    if routes or room(plan) < 0:
        return plan
    size, left = itemsize(plan.dtype), room(plan)
    if plan.least_memory > left:
        heavy = plan.least_outer * size > left
        narrow = made(plan.factored if heavy else (), _rounded(left // size))
        if narrow.least_memory <= room(narrow):
            return replace(narrow, notes=_reasons(plan, narrow, left, heavy))
        if heavy:
            why = f"{human(narrow.least_memory)} for one direction and results of {human(copies * narrow.result_bytes)}"
            return replace(plan, notes=(f"Beyond the budget: strips do not fit it either, they take {why}",))
    if plan.has_outer and _outer_price(plan) > (1 - _CHEAPER) * plan.price:
        strips = made(list(plan.routes))
        if strips.price < _CHEAPER * plan.price and strips.least_memory <= room(strips):
            much = plan.price / strips.price
            how = f"{plan.outer_rows} rows of the loss factor per sample"
            how += ", and sweeps for H_F" if plan.columns else ""
            return replace(strips, notes=(f"Strips are {much:.2g} times cheaper than {how}",))
    return plan


def _outer_price(plan: Plan) -> float:
    """What the rows of H_O and their products cost, in the unit of ``plan.price``: the most that strips can save."""
    return (plan.outer_rows * plan.forward[0] + sum(plan.outer_product(*p) for p in plan.factored)) * plan.samples


def at(plan: Plan, state: State, parts: tuple[str, ...], *, keep: bool, budget: int) -> Plan:
    """A plan for this batch, data type, device and budget."""
    return replace(
        plan,
        parts=parts,
        keep=keep,
        samples=state.samples,
        dtype=state.weights.dtype,
        device=state.weights.device.type,
        budget=budget,
    )


def _rounded(limit: int) -> int:
    """Down to three binary digits, so that budgets that are nearly the same share a plan."""
    shift = max(0, limit.bit_length() - 3)
    return limit >> shift << shift


def _reasons(before: Plan, after: Plan, left: int, heavy: bool) -> tuple[str, ...]:
    size = itemsize(before.dtype)
    notes = []
    if heavy:
        notes.append(
            f"Strips instead of the loss factor: its {before.outer_rows} rows take {human(before.least_outer * size)} "
            f"for one sample, {human(left)} are left"
        )
    if before.bridges and not after.bridges and after.columns:
        notes.append(f"Whole sweeps: bottlenecks do not fit {human(left)}")
    sweeps = {r for p, r in after.routes.items() if r != before.routes[p] and p not in after.stripped}
    if sweeps:
        notes.append(f"Other sweeps than the cheapest, to fit {human(left)}: {', '.join(sorted(sweeps))}")
    return tuple(notes)
