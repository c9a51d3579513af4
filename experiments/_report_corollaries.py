"""The measured differences beside what the paper's corollaries say about them."""

from __future__ import annotations

import numpy as np

from ._report_data import Array, Panel, term_points

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
    middle = f"{np.median(values):.1f}"
    span = f" [{values.min():.1f}, {values.max():.1f}]" if len(values) > 1 else ""
    return [middle + span, f"{above} of {len(values)}"]
