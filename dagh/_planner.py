"""Planning: for every requested pair, which leaf's columns are swept and in which basis.

The alternatives of a pair (a, b) are the columns of a or of b, each in a basis: the parameter itself; for a convolution
one direction per channel instead of one per output channel and weight; for a linear layer its outputs, one set per
sample, with the layer's inputs applied at the end. Each is priced in floating-point operations, passes over memory
counted in the same unit, and the cheapest taken; pairs with the same columns and basis share their sweep.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from dagh._costs import evaluation_flops, node_cost, node_moved
from dagh._footprint import held_by_state, of_rows
from dagh._ir import Node, Program
from dagh._meeting import meet
from dagh._own_parts import parted
from dagh._plan import Plan
from dagh._plan_sweeps import Bridge, Column
from dagh._pricing import Key, Option, Reach, Sweeps, gate_of
from dagh._request import Pair, Request, itemsize
from dagh._rules import rule_for
from dagh._rules._losses import factor_rows
from dagh._square_plan import one_way, squared
from dagh._strips import Strip
from dagh._structure import reach, structure
from dagh.errors import ReductionError, UnknownNameError


def make_plan(
    program: Program,
    request: Request,
    *,
    samples: int,
    parts: Collection[str] = ("outer", "functional"),
    routes: Mapping[tuple[str, str], str] | None = None,
    strips: Collection[Pair] = (),
    limit: int | None = None,
) -> Plan:
    """Choose columns and bases for every pair with a functional part; ``routes`` overrides the choice by name pair.

    Pairs in ``strips`` are formed by strips unless ``routes`` says otherwise. With ``limit``, routes that hold more
    numbers than that for one sample are left out where a pair has others.

    Raises :class:`~dagh.errors.ReductionError` for a route that a pair does not have.
    """
    functional = "functional" in parts
    assert program.loss is not None
    bits = reach(program, request.leaves)
    kinds = structure(program, request, bits)
    gates = {i: g for i, leaf in enumerate(request.leaves) if (g := gate_of(program, leaf)) is not None}
    layers = {i: g for i, g in gates.items() if not g.channels}
    needed = [p for p in request.pairs if (functional and kinds[p][1]) or ("outer" in parts and kinds[p][0])]
    columns: list[Column] = []
    made: list[Strip] = []
    bridges: dict[Node, Bridge] = {}
    alternatives: dict[Pair, dict[str, float]] = {}
    chosen_routes: dict[Pair, str] = {}
    reached = Reach(program)
    if needed:
        sweeps = Sweeps(reached, request, bits, gates, parts)
        own = {p: sweeps.alternatives(*p) if functional and kinds[p][1] else {} for p in needed}
        last = {p: sweeps.strips(*p) for p in needed}
        names = {p: {sweeps.label(o[0], o[2]): o for o in (own[p] | last[p])} for p in needed}
        alternatives = {
            p: ({} if own[p] else {FACTOR: 0.0}) | {label: (own[p] | last[p])[o] for label, o in found.items()}
            for p, found in names.items()
        }
        wanted = {p: _wanted(alternatives[p], request.names, p, routes or {}) for p in needed}
        options = {
            p: last[p] if p in strips else _fitting(sweeps, own[p], limit)
            for p in needed
            if wanted[p] is None and (own[p] or p in strips)
        }
        picked = {p: min(found, key=found.__getitem__) for p, found in options.items()}
        if not routes:
            _share(sweeps, options, picked)
        picked |= {p: names[p][w] for p, w in wanted.items() if w is not None and w != FACTOR}
        chosen_routes = {p: sweeps.label(picked[p][0], picked[p][2]) if p in picked else FACTOR for p in needed}
        gathered = sorted(_gathered(sweeps, picked).items())
        columns = [sweeps.column(pairs, key[1]) for key, pairs in gathered if key[1] != "strips"]
        made = [sweeps.strip(pairs) for key, pairs in gathered if key[1] == "strips"]
        whole = columns
        columns, bridges = meet(sweeps, columns)
        if limit is not None and sum(b.elements for b in bridges.values()) > limit // 2:
            columns, bridges = whole, {}
        columns = [parted(sweeps, replace(c, alive=sweeps.alive(c))) for c in columns]
        columns = [one_way(sweeps, c) if request.entries else squared(sweeps, c, limit) for c in columns]
        folding = {c.via for c in columns if not c.one_way}
        bridges = {v: b if v in folding else replace(b, tables=()) for v, b in bridges.items()}
        bridges = {v: sweeps.measured(b) for v, b in bridges.items()}
    rows = list(
        dict.fromkeys(
            layers[i].node if i in layers and layers[i].rows == 1 else leaf for i, leaf in enumerate(request.leaves)
        )
    )
    pulled = set(rows)
    fallbacks = sorted({n.operation for n in program if n.op is not None and bits[n] and not rule_for(n).closed_form})
    labels = {pair: _LABELS[outer, inner] for pair, (outer, inner) in kinds.items()}
    plan = Plan(
        names=request.names,
        sizes=tuple(request.sizes),
        pairs=request.pairs,
        kinds=labels,
        columns=columns,
        layers=layers,
        fallbacks=fallbacks,
        outer_rows=_outer_rows(program),
        samples=samples,
        routes=chosen_routes,
        alternatives=alternatives,
        forward=(
            sum(node_cost(v) for v in program),
            evaluation_flops(program),
            sum(node_moved(v) for v in program),
        ),
        state=held_by_state(program, request.leaves, itemsize(program.output.dtype)),
        outer_alive=of_rows(reached, rows),
        widest=max((v.numel for v in program if v.kind != "parameter" or v in pulled), default=1),
        dtype=program.output.dtype,
        program=program,
        functional=functional,
        bridges=bridges,
        strips=made,
        parts=tuple(parts),
        entries=request.entries,
    )
    for pair, prices in alternatives.items():
        if FACTOR in prices:
            prices[FACTOR] = plan.outer_rows * plan.forward[0] + plan.outer_product(*pair)
    return plan


#: The route of a pair that has no H_F.
FACTOR = "loss factor"
#: Requests with more pairs than this are not searched for shared sweeps.
_SHARED = 400
_LABELS = {(False, False): "zero", (True, False): "H_O", (False, True): "H_F", (True, True): "H_O+H_F"}


def _outer_rows(program: Program) -> int:
    """Rows per sample of the factor of the loss's curvature."""
    loss = program.loss
    if loss is None or not loss.inputs or loss.inputs[0] is not program.output:
        return program.output.numel
    return factor_rows(loss, program.output.numel)


def check_routes(routes: Mapping[tuple[str, str], str], request: Request) -> None:
    """Refuse routes for blocks that are not asked for.

    Raises :class:`~dagh.errors.UnknownNameError` for a name that is not in the request.
    """
    if not isinstance(routes, Mapping):
        raise ReductionError(f"routes={routes!r}: expected a dictionary from pairs of names to routes")
    place = {name: i for i, name in enumerate(request.names)}
    for pair, route in routes.items():
        if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(name, str) for name in pair):
            raise ReductionError(f"routes: {pair!r} is not a pair of names")
        for name in pair:
            if name not in place:
                raise UnknownNameError.of("parameter", name, place)
        i, j = sorted(place[name] for name in pair)
        if (i, j) not in request.pairs:
            raise ReductionError(f"routes: the block {pair[0]!r} x {pair[1]!r} is not among the blocks asked for")
        if not isinstance(route, str):
            raise ReductionError(f"routes: {route!r} for {pair[0]!r} x {pair[1]!r} is not the name of a route")


def _wanted(
    labels: Collection[str], names: tuple[str, ...], pair: Pair, routes: Mapping[tuple[str, str], str]
) -> str | None:
    """The route that was asked for, if any."""
    i, j = pair
    wanted = routes.get((names[i], names[j])) or routes.get((names[j], names[i]))
    if wanted is None or wanted in labels:
        return wanted
    known = ", ".join(map(repr, labels))
    raise ReductionError(f"no route {wanted!r} for the block {names[i]!r} x {names[j]!r}; its routes: {known}")


def _fitting(sweeps: Sweeps, options: dict[Option, float], limit: int | None) -> dict[Option, float]:
    """The sweeps of a pair that fit, or all of them if none does."""
    if limit is None:
        return options
    columns = {o: sweeps.column([o[:2]], o[2]) for o in options}
    return {o: price for o, price in options.items() if 3 * columns[o].unit * columns[o].order <= limit} or options


def _gathered(sweeps: Sweeps, picked: Mapping[Pair, Option]) -> dict[Key, list[Pair]]:
    """(leaf, row) pairs by the sweep that forms them."""
    gathered: dict[Key, list[Pair]] = {}
    for leaf, row, basis in picked.values():
        gathered.setdefault(sweeps.key(leaf, basis), []).append((leaf, row))
    return gathered


def _share(sweeps: Sweeps, options: Mapping[Pair, dict[Option, float]], picked: dict[Pair, Option]) -> None:
    """Move pairs to sweeps that are made anyway, one at a time or all those of a sweep, as long as the total falls."""
    if len(picked) > _SHARED:
        return
    gathered = {key: set(pairs) for key, pairs in _gathered(sweeps, picked).items()}
    costs = {key: sweeps.total(pairs, key[1]) for key, pairs in gathered.items()}

    def best(pair: Pair, limit: float) -> tuple[Option | None, float]:
        here, found = sweeps.key(picked[pair][0], picked[pair][2]), None
        for option in options[pair]:
            there = sweeps.key(option[0], option[2])
            if there == here:
                continue
            added = sweeps.total(gathered.get(there, set()) | {option[:2]}, option[2]) - costs.get(there, 0.0)
            if added < limit:
                found, limit = option, added
        return found, limit

    def move(pair: Pair, option: Option) -> None:
        leaf, row, basis = picked[pair]
        here, there = sweeps.key(leaf, basis), sweeps.key(option[0], option[2])
        gathered[here].discard((leaf, row))
        gathered.setdefault(there, set()).add(option[:2])
        for key in (here, there):
            costs[key] = sweeps.total(gathered[key], key[1])
        picked[pair] = option

    for _ in range(2):
        moved = False
        for pair, (leaf, row, basis) in list(picked.items()):
            here = sweeps.key(leaf, basis)
            saved = costs[here] - sweeps.total(gathered[here] - {(leaf, row)}, basis)
            option, _ = best(pair, saved * (1 - 1e-9))
            if option is not None:
                move(pair, option)
                moved = True
        for here in sorted(gathered, key=lambda k: costs[k]):
            # What its pairs share keeps a sweep alive although each of them would be cheap elsewhere.
            members = [p for p, option in picked.items() if sweeps.key(option[0], option[2]) == here]
            before, total = {p: picked[p] for p in members}, sum(costs.values())
            for pair in members:
                option, _ = best(pair, float("inf"))
                if option is None:
                    break
                move(pair, option)
            if members and sum(costs.values()) < total * (1 - 1e-9):
                moved = True
                continue
            for pair, option in before.items():
                move(pair, option)
        if not moved:
            return
