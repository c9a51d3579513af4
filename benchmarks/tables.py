"""Rows to figures: which peer is fastest, how far from the floor, and text for it all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import Goal
from benchmarks.environment import best_rate
from benchmarks.tools import TOOLS

Row = dict[str, Any]
NOISY = 0.25
"""Cores that other processes may keep busy during a measurement that is to be trusted."""


def seconds(value: float | None) -> str:
    """Three digits and a unit."""
    if value is None or not math.isfinite(value):
        return "n/a"
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 1:
            return f"{digits(value * factor)} {unit}"
    return f"{digits(value * 1e6)} µs"


def digits(value: float) -> str:
    """Three significant digits, never an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


def mebibytes(value: float | None) -> str:
    if value is None:
        return "n/a"
    return f"{value:.0f} MiB" if value < 10240 else f"{value / 1024:.1f} GiB"


def marks(row: Row) -> tuple[str, str]:
    """What is put before and after a time: ``~`` scaled, ``†`` first call only, ``¹`` timed once, ``‡`` noise."""
    flags = row.get("flags", [])
    after = ("†" if "first call only" in flags else "") + ("¹" if "timed once" in flags else "")
    after += "‡" if row.get("other_cores", 0) > NOISY else ""
    return "~" if "extrapolated" in flags else "", after


def cell(row: Row | None) -> str:
    """Time and memory of one row, or why there is none."""
    if row is None:
        return ""
    if row["status"] == "ok":
        before, after = marks(row)
        return f"{before}{seconds(row['seconds'])}{after} / {mebibytes(row['MiB'])}"
    if row["status"] == "WRONG":
        return f"**wrong** (error {row['error']:.0e})"
    return {"memory": "memory", "time": "time", "not available": "n/a", "error": "fails"}.get(row["status"], "?")


@dataclass(frozen=True)
class Comparison:
    """One goal with what was measured for it."""

    goal: Goal
    own: Row | None
    peer: Row | None
    floor: float | None
    """Seconds that the plan's flops and bytes cost at the rates of the machine."""

    @property
    def ratio(self) -> float | None:
        if not self.own or not self.peer or self.own["status"] != "ok":
            return None
        return float(self.peer["seconds"] / self.own["seconds"])

    @property
    def over_floor(self) -> float | None:
        if not self.own or self.own["status"] != "ok" or not self.floor:
            return None
        return float(self.own["seconds"] / self.floor)

    @property
    def verdict(self) -> str:
        """``met``, ``missed`` or, when something was not measured, ``open``; empty if nothing is asked."""
        if self.goal.ratio is None and self.goal.floor is None and not self.goal.works:
            return ""
        if self.own is not None and self.own["status"] != "ok":
            return "missed"
        if self.goal.works and self.own is None:
            return "open"
        asked = [(self.ratio, self.goal.ratio, 1), (self.over_floor, self.goal.floor, -1)]
        states = [None if got is None else sign * got >= sign * want for got, want, sign in asked if want is not None]
        if False in states:
            return "missed"
        return "open" if None in states else "met"


def floor_seconds(own: Row | None, environment: Mapping[str, Any]) -> float | None:
    """max(flops at the best GEMM rate, bytes at the memory rate) of dagh's plan; ``None`` if it gives no totals."""
    plan = (own or {}).get("plan") or {}
    rates = environment.get("memory_GBps", {})
    parts = []
    if plan.get("flops") is not None and own is not None:
        parts.append(plan["flops"] / best_rate(dict(environment), own["dtype"])[0])
    if plan.get("bytes") is not None and rates:
        parts.append(plan["bytes"] / (1e9 * max(rates["write"], rates["copy"])))
    parts = [p for p in parts if math.isfinite(p)]
    return max(parts) if parts else None


def compare(goal: Goal, rows: Iterable[Row], environment: Mapping[str, Any], dtype: str) -> Comparison:
    """The fastest peer whose result agreed with the reference, and dagh."""
    mine = {
        r["tool"]: r
        for r in rows
        if (r["case"], r["task"], r["N"], r["dtype"]) == (goal.case, goal.task, goal.samples, dtype)
    }
    own = mine.pop("dagh", None)
    peers = [r for t, r in mine.items() if r["status"] == "ok" and not (goal.eager and not TOOLS[t].eager)]
    peer = min(peers, key=lambda r: r["seconds"], default=None)
    return Comparison(goal, own, peer, floor_seconds(own, environment))
