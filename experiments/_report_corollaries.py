"""The measured differences beside their second-order prediction, and beside what the paper's corollaries say."""

from __future__ import annotations

import numpy as np

from ._report_data import Array, Panel, plain, term_points

#: Heading of a bound on |L(k+1) − L(k)|, by the name of its array.
BOUNDS = {
    "printed": "Corollary as printed (P0)",
    "corrected": "constants corrected, P1",
    "weights": "constants corrected, a3",
}
NOTE = (
    "Orders of magnitude by which the corollaries exceed the mean of |L(k+1) − L(k)| at the distance R from the "
    "trained point: median over runs [smallest, largest]. W is the largest loss seen. “Violated”: runs in which a "
    "single difference is above the bound."
)
PREDICTED_NOTE = (
    "The second-order prediction at the distance R from the trained point, over orders and directions: the mean of "
    "|L(k+1) − L(k)| as measured, the same mean of the predictions over it, and the mean absolute error of single "
    "predictions over it, with H and with H_O in its place: medians over runs [smallest, largest]. Changed: samples "
    "whose pattern of active units is not that at the trained point, and units that are switched, medians. There the "
    "gradient has jumped in between, which no expansion predicts."
)


def excess(panel: Panel, name: str) -> dict[tuple[float, int], tuple[Array, int]]:
    """By (R, k): log10 of bound over mean difference, one per run that has it, and the runs that violate the bound."""
    found: dict[tuple[float, int], tuple[list[float], int]] = {}
    for r in panel:
        if f"terms_log_{name}" not in r.arrays:
            continue
        bound, mean = r.arrays[f"terms_log_{name}"], r.arrays["terms_measured"]
        largest = r.arrays["terms_measured_max"]
        for i, k, j, radius in term_points(r):
            if not mean[i, j] > 0:
                continue
            values, above = found.get((radius, k), ([], 0))
            value = float((bound[i, j] - np.log(mean[i, j])) / np.log(10))
            found[radius, k] = [*values, value], above + bool(np.log(largest[i, j]) > bound[i, j])
    return {point: (np.array(values), above) for point, (values, above) in found.items()}


def predicted_table(panel: Panel) -> tuple[list[str], list[list[str]]]:
    """Heads and cells: one row per R and k, of the runs that have predictions; no cells where none has."""
    names = ("measured", "predicted", "remainder", "remainder_outer")
    found: dict[tuple[float, int], list[list[float]]] = {}
    for r in panel:
        if any(f"terms_{n}" not in r.arrays for n in (*names, "changed_samples", "changed_units")):
            continue
        for i, k, j, radius in term_points(r):
            values = [float(r.arrays[f"terms_{n}"][i, j]) for n in names]
            if values[0] > 0:
                changed = [float(r.arrays[f"terms_changed_{n}"][j]) for n in ("samples", "units")]
                found.setdefault((radius, k), []).append([values[0], *(v / values[0] for v in values[1:]), *changed])
    cells = []
    for (radius, k), rows in sorted(found.items()):
        columns = np.array(rows).T
        spans = [_span(columns[i], spec) for i, spec in ((1, ".3f"), (2, ".1g"), (3, ".1g"))]
        size, samples, units = (float(np.median(columns[i])) for i in (0, 4, 5))
        shares = [f"{100 * samples:.0f} %", f"{plain(100 * units, 1)} %"]
        cells.append([f"{radius:g}", str(k), f"{size:.2g}", *spans, *shares])
    heads = ["R", "k", "|L(k+1) − L(k)|", "predicted / measured", "error / measured", "error with H_O / measured"]
    return [*heads, "samples changed", "units changed"], cells


def corollary_table(panel: Panel) -> tuple[list[str], list[list[str]]]:
    """Heads and cells: one row per R and k, one column per bound that some run has; no cells where none has."""
    columns = {head: found for name, head in BOUNDS.items() if (found := excess(panel, name))}
    points = sorted({point for found in columns.values() for point in found})
    measured: dict[tuple[float, int], list[float]] = {}
    for r in panel:
        for i, k, j, radius in term_points(r):
            measured.setdefault((radius, k), []).append(float(r.arrays["terms_measured"][i, j]))
    cells = []
    for radius, k in points:
        row = [f"{radius:g}", str(k), f"{np.median(measured[radius, k]):.2g}"]
        for found in columns.values():
            row += _cells(*found[radius, k]) if (radius, k) in found else ["–", "–"]
        cells.append(row)
    return ["R", "k", "|L(k+1) − L(k)|", *(h for head in columns for h in (head, "violated"))], cells


def _cells(values: Array, above: int) -> list[str]:
    return [_span(values, ".1f"), f"{above} of {len(values)}"]


def _span(values: Array, spec: str) -> str:
    """The median, and the range of more than one."""
    middle, low, high = (format(float(v), spec) for v in (np.median(values), values.min(), values.max()))
    return f"{middle} [{low}, {high}]" if len(values) > 1 else middle
