"""A plan on paper: totals, sweeps and strips, and a line for every block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.text import Text

from dagh._fitted import FittedTable
from dagh._memory import human
from dagh._request import Pair, itemsize

if TYPE_CHECKING:
    from dagh._plan import Plan
    from dagh._plan_sweeps import Column
    from dagh._strips import Strip

_SHOWN = 30


def render(plan: Plan) -> RenderableType:
    """Totals, sweeps, what fell back, blocks."""
    sweeps = FittedTable(
        title=", ".join(["Sweeps for H_F"] * bool(plan.columns) + ["Strips of H_O and H_F"] * bool(plan.strips)),
        title_justify="left",
        box=SIMPLE,
        spare=("rows", "largest", "at once", "basis", "MFLOP"),
    )
    sweeps.add_column("columns of", no_wrap=True, overflow="ellipsis", max_width=17)
    for name, width in (("basis", 10), ("width", 5), ("at once", 7), ("rows", 4), ("MFLOP", 6), ("largest", 9)):
        sweeps.add_column(name, justify="left" if name == "basis" else "right", no_wrap=True, min_width=width)
    for c in plan.columns:
        sweeps.add_row(*_sweep_row(plan, c))
    for s in plan.strips:
        sweeps.add_row(*_strip_row(plan, s))
    blocks = FittedTable(title="Blocks", title_justify="left", box=SIMPLE, spare=("parts", "route"))
    blocks.add_column("block", no_wrap=True, overflow="ellipsis", min_width=19, max_width=24)
    blocks.add_column("parts", no_wrap=True, min_width=7)
    blocks.add_column("route", no_wrap=True, overflow="ellipsis", max_width=19)
    blocks.add_column("held", justify="right", no_wrap=True, min_width=14)
    shown = [p for p in plan.pairs if plan.kinds[p] != "zero"]
    for pair in shown[:_SHOWN]:
        blocks.add_row(*_block_row(plan, pair))
    lines: list[RenderableType] = [Text(_summary(plan))]
    if plan.columns or plan.strips:
        lines.append(sweeps)
    lines += [Text(note) for note in plan.notes]
    for node, bridge in plan.bridges.items():
        meeting = [c for c in plan.columns if c.via is node]
        stopped = "; ".join(" + ".join(plan.names[i] for i in c.leaves) for c in meeting)
        lines.append(Text(f"bottleneck {node.name}, {bridge.node.numel} directions: {stopped} stop there"))
        if folded := "; ".join(" + ".join(plan.names[i] for i in c.leaves) for c in meeting if c.folded):
            lines.append(Text(f"{folded}: no sweep back from there, products with its tangents"))
    if squared := "; ".join(plan.names[c.leaves[0]] for c in plan.columns if c.square and not c.folded):
        lines.append(Text(f"{squared}: no sweep back, products of its tangents wherever the network is curved"))
    if straight := "; ".join(" + ".join(plan.names[i] for i in c.leaves) for c in plan.columns if c.one_way):
        lines.append(Text(f"{straight}: no sweep back, squares of tangents wherever the network is curved"))
    lines.append(blocks)
    if len(shown) > _SHOWN:
        lines.append(Text(f"… and {len(shown) - _SHOWN} more blocks (plan.routes has them all)"))
    if plan.kept_rows:
        widths = sum(plan.sizes[i] for i in plan.kept_rows)
        lines.append(
            Text(
                f"rows of the loss factor are held once for all low-rank blocks: "
                f"{plan.samples * plan.outer_rows:,} rows × {widths:,} columns"
            )
        )
    if plan.fallbacks:
        lines.append(Text("generic derivatives (no rule): " + ", ".join(plan.fallbacks)))
    return Group(*lines)


def _sweep_row(plan: Plan, c: Column) -> tuple[str, ...]:
    size = itemsize(plan.dtype)
    window, working = plan.chunks(plan.budget or 1 << 62)
    step = c.step(window, working, size)
    if c.square:  # all directions, of some samples
        step, window = c.width, c.together(window, working, size)
    largest = human(step * c.largest * window * size)
    names = " + ".join(plan.names[i] for i in c.leaves)
    return names, c.basis, str(c.width), str(step), str(len(c.rows)), f"{c.flops / 1e6:.3g}", largest


def _strip_row(plan: Plan, s: Strip) -> tuple[str, ...]:
    size, room = itemsize(plan.dtype), plan.room
    window = 1 if plan.keep else s.window(plan.samples, room, size)
    step = s.step(window, room, size)
    largest = human(step * max(window * s.largest, s.result) * size)
    return (
        plan.names[s.leaf], "strips", str(s.width), str(step), str(len(s.pairs)), f"{s.flops / 1e6:.3g}", largest,
    )  # fmt: skip


def _block_row(plan: Plan, pair: Pair) -> tuple[str, ...]:
    i, j = pair
    held = f"{plan.held_elements(i, j):,}"
    if not plan.keep and plan.structured(i, j, plan.samples):
        held = "factors " + held
    elif plan.low_rank(i, j):
        held = "rows " + held
    name = plan.names[i] if i == j else f"{plan.names[i]} × {plan.names[j]}"
    return (
        name,
        plan.kinds[pair],
        plan.routes.get(pair, "—").replace(" columns of ", ": ").replace(" of ", ": "),
        held,
    )


def _summary(plan: Plan) -> str:
    zero = sum(kind == "zero" for kind in plan.kinds.values())
    return (
        f"Plan: {len(plan.pairs)} blocks ({zero} zero) at N = {plan.samples}; "
        f"{_ways(plan)}\n"
        f"{plan.flops / 1e9:.3g} GFLOP, {human(plan.bytes)} moved, about {_seconds(plan.seconds)};\n"
        f"result {human(plan.result_bytes)}, peak about {human(plan.peak_memory)}" + _writing(plan)
    )


def _writing(plan: Plan) -> str:
    """What it takes to write the blocks out, where they are held in another form."""
    if not plan.dense_flops:
        return ""
    size, peak = human(plan.dense_bytes), human(plan.peak_memory + plan.dense_bytes)
    return f"\nwritten out densely: {size} and about {_seconds(plan.dense_seconds)} more, peak {peak}"


def _ways(plan: Plan) -> str:
    ways = [f"H_F by {len(plan.columns)} sweeps"] if plan.columns or not plan.strips else []
    ways += [f"H_O by {plan.outer_rows} rows per sample"] if plan.factored or not plan.strips else []
    if plan.strips:
        ways.append(f"{len(plan.stripped)} blocks by {sum(s.width for s in plan.strips)} products")
    return ", ".join(ways)


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"
    return f"{1e3 * value:.0f} ms" if value >= 0.01 else f"{1e3 * value:.2g} ms"
