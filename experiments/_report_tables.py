"""Tables of a report: one row per run, one per value, one per k; as CSV, and Parquet where pyarrow is installed."""

from __future__ import annotations

import csv
import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ._report_claims import Claim
from ._report_corollaries import BOUNDS
from ._report_data import Array, Panel, Results, label_of, plain, term_points
from ._report_figures import band_of, curves_of, norm_ratio, spaced

Row = dict[str, Any]

#: Columns of the summary: heading, path of the number, format.
_SUMMARY = (
    ("train loss", "train.loss", ".3g"),
    ("test loss", "test.loss", ".3g"),
    ("test accuracy", "test.accuracy", ".3f"),
    ("level", "level", ".3g"),
    ("slope", "slope", ".3f"),
    ("‖H_O‖", "hessian.outer_max", ".3g"),
    ("λ max", "hessian.max", ".3g"),
    ("λ min", "hessian.min", ".3g"),
    ("‖H_F‖", "hessian.functional_norm", ".3g"),
    ("‖∇L‖", "gradient_norm", ".2g"),
)


def run_rows(results: Results) -> list[Row]:
    """One row per run and axis: what identifies it, then every number of its results."""
    rows = []
    for panel in results.panels:
        for value, runs in panel.runs.items():
            for r in runs:
                row: Row = {"axis": panel.axis, "value": value, "dataset": panel.dataset, "seed": r.seed, "key": r.key}
                rows.append(row | dict(_numbers(r.scalars)))
    return rows


def _numbers(scalars: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | str]]:
    for name, value in scalars.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, str if prefix == "environment." else (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", value


def curve_rows(results: Results) -> list[Row]:
    """The curves of every value, mean over seeds, at about sixty k; ``low`` and ``high`` are the band of the figure."""
    rows = []
    for panel in results.panels:
        found = {name: curves_of(panel, name) for name in ("mean", "smooth", "q05", "q50", "q95")}
        bands = band_of(panel)
        for value, (k, _) in found["mean"].items():
            for i in spaced(k, 60).tolist():
                row: Row = {"axis": panel.axis, "value": value, "dataset": panel.dataset, "k": int(k[i])}
                row |= {n: float(c[value][1][i]) for n, c in found.items() if value in c}
                if value in bands:
                    row |= {"low": float(bands[value][0][i]), "high": float(bands[value][1][i])}
                rows.append(row)
    return rows


def term_rows(results: Results) -> list[Row]:
    """The terms of every run at every k and R, and log10 of what the corollaries say."""
    names = (
        "measured", "measured_max", "zeroth", "first", "second", "second_outer", "predicted", "predicted_outer",
        "remainder", "remainder_outer", "level",
    )  # fmt: skip
    rows = []
    for panel in results.panels:
        for r in panel:
            for i, k, j, radius in term_points(r):
                row: Row = {
                    "axis": panel.axis, "value": label_of(r.value), "dataset": panel.dataset, "seed": r.seed,
                    "R": radius, "k": k,
                }  # fmt: skip
                row |= {n: float(r.arrays[f"terms_{n}"][i, j]) for n in names if f"terms_{n}" in r.arrays}
                row |= {
                    f"log10_{n}": float(r.arrays[f"terms_log_{n}"][i, j] / math.log(10))
                    for n in BOUNDS
                    if f"terms_log_{n}" in r.arrays
                }
                row |= {
                    n: float(r.arrays[f"terms_{n}"][j])
                    for n in ("changed_samples", "changed_units")
                    if f"terms_{n}" in r.arrays
                }
                rows.append(row)
    return rows


def claim_rows(claims: Sequence[Claim]) -> list[Row]:
    """One row per claim."""
    return [
        {
            "statement": c.statement, "source": c.source, "dataset": c.dataset, "test": c.test,
            "estimate": c.estimate.value, "low": c.estimate.low, "high": c.estimate.high, "verdict": c.verdict,
            "runs": c.runs, "note": c.note,
        }
        for c in claims
    ]  # fmt: skip


def summary(panel: Panel) -> tuple[list[str], list[list[str]]]:
    """Heads and cells: mean and standard deviation over seeds, per value of the axis."""
    used = [(head, panel.scalar(path), spec) for head, path, spec in _SUMMARY]
    used = [(head, groups, spec) for head, groups, spec in used if any(len(g) for g in groups)]
    ratios = [(f"{row} / ‖H_O‖", norm_ratio(panel, row)) for row in ("P0", "a3", "b2")]
    ratios = [(head, groups) for head, groups in ratios if any(len(g) for g in groups)]
    heads = [panel.label, "runs", *(head for head, _, _ in used), *(head for head, _ in ratios)]
    cells = []
    for i, (value, runs) in enumerate(panel.runs.items()):
        row = [value, str(len(runs))]
        row += [_mean(groups[i], spec) for _, groups, spec in used]
        row += [_power(groups[i]) for _, groups in ratios]
        cells.append(row)
    return heads, cells


def _mean(values: Array, spec: str) -> str:
    if not len(values):
        return "–"
    spread = f" ± {plain(float(values.std(ddof=1)), 1)}" if len(values) > 1 else ""
    return f"{values.mean():{spec}}{spread}"


def _power(log10: Array) -> str:
    """The geometric mean; from ten thousand on with one digit before the exponent."""
    if not len(log10):
        return "–"
    mean = float(log10.mean())
    if mean < 4:
        return plain(10**mean, 2)
    digit, exponent = round(10 ** (mean % 1)), math.floor(mean)
    return f"{digit}e{exponent}" if digit < 10 else f"1e{exponent + 1}"


def write_csv(path: Path, rows: Sequence[Row]) -> Path | None:
    """Write rows, columns in the order of first appearance; nothing where there are none."""
    if not rows:
        return None
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: Sequence[Row]) -> Path | None:
    """The same rows as Parquet; nothing without pyarrow."""
    if not rows:
        return None
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        return None
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = arrow.table({c: [row.get(c) for row in rows] for c in columns})
    parquet.write_table(table, path)
    return path
