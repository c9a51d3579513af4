"""``dagh spectrum``: eigenvalues of the Hessian and of its parts, by products alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dagh._cli import _output
from dagh._cli._data import InputSpec
from dagh._cli._opened import FORM, MANNER, MEMORY_BUDGET, RESULT, TARGET, WEIGHTS, explained, opened
from dagh._diagonal import diagonal
from dagh._graph import Graph
from dagh._hessian import plan
from dagh._operator import HessianOperator, operator
from dagh._spectra import Estimate, SpectralDensity
from dagh.errors import KinkError, MemoryBudgetError, ReductionError

_LABELS = {"full": "H", "outer": "H_O", "functional": "H_F"}
_BARS = " ▁▂▃▄▅▆▇█"
_BINS = 48
_PROBES, _STEPS = 8, 60
#: Flops of a diagonal, a few seconds of two cores.
_AFFORDABLE = 2e11


@click.command()
@TARGET
@click.option("--input", "specs", type=InputSpec.parse, metavar="SHAPE", multiple=True, help="As for dagh trace.")
@click.option("--batch", type=click.IntRange(min=1), default=256, show_default=True, help="Number of samples.")
@click.option("--loss", default="cross_entropy", show_default=True, help="A name, as for dagh trace.")
@click.option("--data", metavar="digits|PATH.npz", help="As for dagh trace. Default: random numbers.")
@WEIGHTS
@click.option("--part", "parts", type=click.Choice(list(_LABELS)), multiple=True, help="Default: all three.")
@click.option("--k", type=click.IntRange(min=1), default=5, show_default=True, help="Eigenvalues at either end.")
@click.option("--density", is_flag=True, help="Estimate the spectral density.")
@MANNER
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights, data and random directions.")
@MEMORY_BUDGET
@FORM
@RESULT
def spectrum(target: str, show_traceback: bool, form: str, out: Path | None, **options: Any) -> None:
    """Largest and smallest eigenvalues of the Hessian of the model in FILE, trace, norm and density.

    Nothing of the size of the matrix is formed. Traces are exact where the diagonal takes seconds at most; they are
    else estimates from random directions, as norms and densities are, with their standard errors.
    """
    with explained(show_traceback):
        found = _run(target, **options)
    text = json.dumps(_finite(found), indent=2, allow_nan=False) + "\n" if form == "json" else None
    _output.deliver(out, text, lambda: _renderable(found))


def _run(
    target: str,
    *,
    loss: str,
    parts: tuple[str, ...],
    k: int,
    density: bool,
    seed: int,
    memory_budget: int | None,
    **model: Any,
) -> dict[str, Any]:
    with opened(target, loss=loss, seed=seed, **model) as at:
        targets = at.targets(loss)
        found: dict[str, Any] = {"model": at.loaded.label, "loss": loss, "data": at.batch.origin, "parts": {}}
        for part in parts or _LABELS:
            at.steps.start(f"linearizing {_LABELS[part]}")
            op = operator(
                at.graph, loss, at.batch.inputs, targets, part=part, memory_budget=memory_budget  # type: ignore[arg-type]
            )  # fmt: skip
            found |= {"P": op.shape[0], "samples": op.samples, "value": op.loss, "dtype": str(op.dtype)[6:]}
            at.steps.start(f"spectrum of {_LABELS[part]}")
            found["parts"][part] = _spectrum(op, min(k, op.shape[0]), density, seed)
            at.steps.start(f"trace of {_LABELS[part]}")
            trace = _trace(at.graph, loss, at.batch.inputs, targets, part, memory_budget)
            found["parts"][part]["trace"] = _plain(op.trace(seed=seed) if trace is None else trace)
    return found


def _trace(graph: Graph, loss: str, inputs: Any, targets: Any, part: Any, memory_budget: int | None) -> Estimate | None:
    """The exact trace, None where the diagonal takes too much work or memory."""
    try:
        work = plan(graph, loss, inputs, targets, part=part, blocks="entries", memory_budget=memory_budget)
        if work.flops > _AFFORDABLE:
            return None
        entries = diagonal(graph, loss, inputs, targets, part=part, memory_budget=memory_budget)
    except (MemoryBudgetError, KinkError):
        return None
    total = sum(float(t.double().sum()) for t in entries.values())
    return Estimate(total, 0.0, "exact", 0)


def _spectrum(op: HessianOperator, k: int, density: bool, seed: int) -> dict[str, Any]:
    # H_O of these losses is positive semidefinite: its smallest eigenvalues say nothing.
    ends = {"LA": op.eigsh(k, "LA", seed=seed)}
    if op.part != "outer":
        ends["SA"] = op.eigsh(k, "SA", seed=seed)
    found: dict[str, Any] = {
        "largest": ends["LA"].values.flip(0).tolist(),
        "smallest": ends["SA"].values.tolist() if "SA" in ends else [],
        "residual": max(float(e.residuals.max()) for e in ends.values()),
        "frobenius": _plain(op.frobenius_norm(seed=seed)),
    }
    if density:
        if op.shape[0] < 3:
            raise ReductionError("a spectral density needs at least 3 parameters")
        made = op.spectral_density(probes=_PROBES, steps=_STEPS, seed=seed)
        found["negative"] = _plain(made.fraction_below(-1e-3 * max(map(abs, found["largest"] + found["smallest"]))))
        found["density"] = {key: getattr(made, key).tolist() for key in ("grid", "density", "error")}
        found["histogram"] = _histogram(made)
    return found


def _histogram(density: SpectralDensity) -> list[float]:
    """Shares of the eigenvalues in bins of equal width over the whole grid."""
    low, high = float(density.grid[0]), float(density.grid[-1])
    place = ((density.nodes - low) / (high - low) * _BINS).long().clamp(0, _BINS - 1).flatten()
    weights = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, place, density.weights.flatten().double())
    shares: list[float] = (weights / density.probes).tolist()
    return shares


def _finite(found: Any) -> Any:
    """The same with null for what is no number: JSON has none for them."""
    if isinstance(found, dict):
        return {key: _finite(value) for key, value in found.items()}
    if isinstance(found, list):
        return [_finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def _plain(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "error": estimate.error, "method": estimate.method, "products": estimate.products}


def _renderable(found: dict[str, Any]) -> RenderableType:
    about = f"{found['loss']} {found['value']:.4g} on {found['samples']} samples ({found['data']})"
    head = Text.assemble((found["model"], "bold"), f", P = {found['P']:,}, {found['dtype']}\n", (about, "dim"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    for part in found["parts"]:
        table.add_column(_LABELS[part], justify="right")
    parts = list(found["parts"].values())
    for end in ("largest", "smallest"):
        for i in range(max(len(p[end]) for p in parts)):
            row = (f"{p[end][i]:.5g}" if i < len(p[end]) else "≥ 0" if i == 0 else "" for p in parts)
            table.add_row(end if i == 0 else "", *row)
    table.add_row("residual at most", *(f"{p['residual']:.0e}" for p in parts), style="dim")
    for key, label in (("trace", "trace"), ("frobenius", "Frobenius norm"), ("negative", "negative share")):
        if key in parts[0]:
            table.add_row(label, *(_with_error(p[key]) for p in parts))
    lines: list[RenderableType] = [head, Text(), table]
    if "histogram" in parts[0]:
        lines += [Text("\nShare of the eigenvalues, on a logarithmic scale", style="bold")]
    for part, p in found["parts"].items():
        if "histogram" in p:
            lines += [_bars(_LABELS[part], p["histogram"], p["density"]["grid"])]
    return Group(*lines)


def _with_error(estimate: dict[str, Any]) -> str:
    if not estimate["error"]:
        return f"{estimate['value']:.5g}"
    return f"{estimate['value']:.4g} ± {estimate['error']:.1g}"


def _bars(label: str, shares: list[float], grid: list[float]) -> Text:
    """Shares of eigenvalues as bars, on a logarithmic scale from one in ten thousand to all."""
    levels = [0.0 if s <= 1e-4 else 1 + float(torch.tensor(s / 1e-4).log10()) / 4 * (len(_BARS) - 2) for s in shares]
    bars = "".join(_BARS[min(len(_BARS) - 1, round(level))] for level in levels)
    low, high = f"{grid[0]:.3g}", f"{grid[-1]:.3g}"
    gap = max(1, len(bars) - len(low) - len(high))
    return Text(f"{label:<4} {bars}\n     {low}{' ' * gap}{high}")
