"""The report: JSON with everything, Markdown tables, pictures, and a summary for the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cases import CASES, CURVES, GOALS, TASKS, Goal, parameter_count, variant_goals
from benchmarks.environment import best_rate
from benchmarks.runner import Results
from benchmarks.tables import Comparison, cell, compare, digits, marks, mebibytes, seconds
from benchmarks.tools import TOOLS

Row = dict[str, Any]
VERDICTS = {"met": "✓", "missed": "✗", "open": "?", "": "–"}

NOTES = """\
Every result is compared with a float64 reference before it is timed; **wrong** ones are excluded. A time is the
median of at least three calls after a first one, each tool in a process of its own, and covers everything from the
parameters to the finished matrix in memory; tracing and compilation come before and are listed below. Memory is the
peak of the resident set above its size after imports and construction of the model. `~`: timed on part of the columns
and scaled. `¹`: timed once after the first call (long ones). `†`: first call only. `‡`: other processes kept more
than a quarter of a core busy. *memory*, *time*: would need or needed more than was allowed. *n/a*: not installed, or
cannot do it. *fails*: raises an error.
"""


def write(store: Results, dtype: str = "float32", console: Console | None = None) -> list[Path]:
    """All files of the report beside the rows; returns their paths."""
    rows, environment = list(store.rows().values()), store.environment()
    stem = store.path.with_suffix("") if dtype == "float32" else store.path.with_name(f"{store.path.stem}-{dtype}")
    found = [stem.with_suffix(".json"), stem.with_suffix(".md")]
    pictures = []
    try:
        from benchmarks import plots
    except ImportError:
        if console:
            console.print("matplotlib is not installed: no pictures")
    else:
        pictures = plots.write(rows, environment, dtype, stem)
    chosen = [r for r in rows if r["dtype"] == dtype]
    found[0].write_text(json.dumps({"environment": environment, "rows": chosen}, indent=1) + "\n")
    text = "\n".join(markdown(rows, environment, dtype, [p.name for p in pictures if p.suffix == ".png"]))
    found[1].write_text(text.rstrip() + "\n")
    if console:
        wide = console if console.is_terminal else Console(file=console.file, width=130)
        wide.print(summary(rows, environment, dtype))
    return [*found, *pictures]


def machine(environment: Row, dtype: str) -> str:
    """One paragraph on the machine."""
    if not environment:
        return "Machine not described."
    rate, by = best_rate(environment, dtype)
    memory = environment.get("memory_GBps", {})
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items() if v != "absent")
    where = environment["cpu"] if environment["device"] == "cpu" else f"{environment['device']} ({environment['cpu']})"
    return (
        f"{where}, {environment['threads']} of {environment['cores']} cores, {environment['memory_GiB']} GiB; "
        f"Python {environment['python']}; {versions}. Best matrix product found: {rate / 1e9:.0f} GFLOP/s in {dtype} "
        f"({by}). Memory: {memory.get('write', 0):.1f} GB/s written, {memory.get('copy', 0):.1f} GB/s copied, "
        f"{memory.get('write fresh', 0):.1f} GB/s to fresh pages."
    )


def table(header: Iterable[str], body: Iterable[Iterable[str]], right: int = 1) -> list[str]:
    """A Markdown table; columns from ``right`` on are aligned to the right."""
    header = list(header)
    rule = ["---" if i < right else "---:" for i in range(len(header))]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *map(list, body))]


def _goal_cells(c: Comparison) -> list[str]:
    goal, own, peer = c.goal, c.own, c.peer
    asked = [f"{goal.ratio:g}×"] if goal.ratio else []
    asked += [f"≤ {goal.floor:g}× floor"] if goal.floor else []
    asked += ["works"] if goal.works else []
    before = marks(peer)[0] if peer else ""
    return [
        f"{goal.case}, N={goal.samples}",
        TOOLS[peer["tool"]].label if peer else "none",
        cell(peer),
        cell(own),
        f"{before}{digits(c.ratio)}×" if c.ratio else "",
        ", ".join(asked) or "–",
        f"{digits(c.over_floor)}×" if c.over_floor else "n/a",
        VERDICTS[c.verdict],
    ]


HEADER = ("case", "fastest right peer", "its time / memory", "dagh", "ratio", "goal", "over floor", "")


def _goal_tables(rows: list[Row], environment: Row, dtype: str, goals: Iterable[Goal]) -> Iterator[str]:
    goals = list(goals)
    for task, title in TASKS.items():
        chosen = [compare(g, rows, environment, dtype) for g in goals if g.task == task]
        chosen = [c for c in chosen if c.own or c.peer]
        if not chosen:
            continue
        yield from (f"### {title}", "")
        yield from table(HEADER, map(_goal_cells, chosen), right=2)
        yield ""


def _details(rows: list[Row], dtype: str) -> Iterator[str]:
    """Every tool in every case: one table per task."""
    for task, title in TASKS.items():
        mine = [r for r in rows if r["task"] == task and r["dtype"] == dtype]
        tools = [t for t in TOOLS if any(r["tool"] == t for r in mine)]
        if not mine:
            continue
        at = {(r["case"], r["N"], r["tool"]): r for r in mine}
        yield from (f"### {title}", "")
        body = []
        for case, n in dict.fromkeys((r["case"], r["N"]) for r in mine):
            size = parameter_count(CASES[case]) if case in CASES else 0
            cells = [cell(at.get((case, n, t))) for t in tools]
            body.append([f"{case}, N={n}", str(size), *cells])
        yield from table(["case", "P", *(TOOLS[t].label for t in tools)], body)
        yield ""


def _own(rows: list[Row], dtype: str) -> Iterator[str]:
    """Set-up, first call and steady state of dagh, and its plan's predictions beside what was measured."""
    mine = [r for r in rows if r["tool"] == "dagh" and r["dtype"] == dtype and r["status"] == "ok"]
    if not mine:
        return
    body = []
    for r in mine:
        plan = {k: v for k, v in (r.get("plan") or {}).items() if v is not None}
        peak = plan.get("peak_memory")
        predicted = [
            f"{plan['flops'] / 1e9:.3g}" if "flops" in plan else "n/a",
            seconds(plan.get("seconds")),
            f"{digits(r['seconds'] / plan['seconds'])}" if plan.get("seconds") else "n/a",
            mebibytes(peak / 2**20 if peak else None),
            mebibytes(r["work_MiB"]),
            digits(max(r["work_MiB"] * 2**20 / peak, 1e-9)) if peak else "n/a",
        ]
        times = [seconds(r.get(k)) for k in ("trace_seconds", "first_seconds", "seconds")]
        body.append([f"{r['case']}, {r['task']}, N={r['N']}", *times, *predicted])
    header = ["case", "trace", "first call", "steady", "GFLOP planned", "predicted", "measured / predicted"]
    header += ["peak predicted", "peak of a call", "measured / predicted"]
    yield from ("## dagh: set-up, and predictions beside measurements", "")
    yield from table(header, body)
    yield ""


def _absent(rows: list[Row], dtype: str) -> Iterator[str]:
    bad = [r for r in rows if r["dtype"] == dtype and r["status"] != "ok"]
    if not bad:
        return
    yield from ("## Wrong, missing or failed", "")
    body = []
    for r in bad:
        why = str(r.get("why") or f"relative error {r.get('error', float('nan')):.1e}").replace("|", "\\|")
        body.append([r["case"], r["task"], str(r["N"]), TOOLS[r["tool"]].label, r["status"], why])
    yield from table(["case", "task", "N", "tool", "status", "why"], body, right=9)
    yield ""


def markdown(rows: list[Row], environment: Row, dtype: str, pictures: Iterable[str] = ()) -> Iterator[str]:
    """The whole report, line by line."""
    device = environment.get("device", "cpu")
    yield from (f"# Benchmarks on {device.upper() if device == 'cpu' else device}, {dtype}", "")
    yield from (machine(environment, dtype), "", *NOTES.splitlines(), "")
    elsewhere = sum(r.get("environment", environment.get("id")) != environment.get("id") for r in rows)
    if elsewhere:
        yield from (f"{elsewhere} of {len(rows)} rows come from another machine or other versions.", "")
    comparisons = [compare(g, rows, environment, dtype) for g in GOALS]
    count = {v: sum(c.verdict == v for c in comparisons) for v in ("met", "missed", "open")}
    yield from (f"Goals: {count['met']} met, {count['missed']} missed, {count['open']} open.", "")
    for name in pictures:
        yield from (f"![{'Scaling' if 'scaling' in name else 'All tools, by task'}]({name})", "")
    yield from ("## Fastest peer and dagh", "")
    yield from _goal_tables(rows, environment, dtype, asked(rows, dtype))
    variants = list(_goal_tables(rows, environment, dtype, variant_goals()))
    if variants:
        yield from (
            "## Equally shaped variants",
            "",
            "The same goals, on other widths, strides, groups and activations.",
        )
        yield from ("", *variants)
    yield from ("## Every tool", "")
    yield from _details(rows, dtype)
    yield from _own(rows, dtype)
    yield from _absent(rows, dtype)


def asked(rows: list[Row], dtype: str) -> list[Goal]:
    """The goals, and what else was measured beside variants and curves; nothing is asked of that."""
    known = {(g.task, g.case, g.samples) for g in (*GOALS, *variant_goals())}
    known |= {("hessian", case, n) for _, points in CURVES.values() for case, n in points}
    others = dict.fromkeys((r["task"], r["case"], r["N"]) for r in rows if r["dtype"] == dtype)
    return [*GOALS, *(Goal(*o) for o in others if o not in known)]


def summary(rows: list[Row], environment: Row, dtype: str) -> Table:
    """The goals in a table for the terminal."""
    out = Table(title=f"dagh and the fastest right peer, {dtype}", title_justify="left")
    for name in ("task", "case", "fastest right peer", "its time", "dagh", "ratio", "goal", "over floor", ""):
        out.add_column(name, justify="left" if name in ("task", "case", HEADER[1]) else "right", no_wrap=True)
    goals = [*asked(rows, dtype), *variant_goals()]
    for task in TASKS:
        name = task
        for goal in (g for g in goals if g.task == task):
            c = compare(goal, rows, environment, dtype)
            if c.own or c.peer:
                case, _, _, _, ratio, goal_text, floor, verdict = _goal_cells(c)
                times = [_time(c.peer), _time(c.own)]
                out.add_row(name, case, c.peer["tool"] if c.peer else "none", *times, ratio, goal_text, floor, verdict)
                name = ""
    return out


def _time(row: Row | None) -> str:
    if row is None or row["status"] != "ok":
        return "" if row is None else row["status"]
    before, after = marks(row)
    return f"{before}{seconds(row['seconds'])}{after}"
