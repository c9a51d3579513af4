"""``dagh bounds``, and the line about bounds in ``dagh trace``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

import dagh
from dagh._cli import _output
from dagh._cli._opened import MANNER, RESULT, SUBJECT, WEIGHTS, explained, format_option, opened
from dagh._pictures import check_picture
from dagh.errors import DaghError, ReductionError

from ._logs import text
from ._render import plain
from ._report import BoundReport, report

#: Above this many numbers, cotangents of all layers and samples together, the line in ``dagh trace`` leaves b2 out.
_QUICK = 200_000_000

#: Above this many parameters it gives a2 in place of a3, whose norms of layers take seconds.
_FEW = 1_000_000


@click.command("bounds")
@SUBJECT
@click.option(
    "--data",
    metavar="digits|random|PATH.npz",
    help="Data for the bounds that need them: handwritten digits of scikit-learn, random numbers, or arrays x and y of "
    "a file. Default: bounds from the weights alone.",
)
@WEIGHTS
@click.option("--rows", metavar="ID,ID,…", help="Rows wanted, as a3,b2. Default: all that apply.")
@click.option("--radius", type=click.FloatRange(min=0), help="R of a ball of parameters, for the rows .ball.")
@click.option("--input-norm", type=click.FloatRange(min=0), help="X with ‖x‖ ≤ X. Default: that of the data.")
@click.option("--layers", is_flag=True, help="Show what every parameter adds (table).")
@MANNER
@click.option("--seed", type=int, default=0, show_default=True, help="Of the weights, inputs and targets.")
@format_option("json", "latex", "html")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the ladder to this file (needs matplotlib).")
@RESULT
def bounds(
    target: str, show_traceback: bool, form: str, plot: Path | None, out: Path | None, layers: bool, **options: Any
) -> None:
    """Bound the Hessian norms of the model in FILE, by every statement that applies.

    From the weights alone, or with --data at the data as well, down to the exact norm. Bounds that do not apply are
    listed with the reason.
    """
    with explained(show_traceback):
        if plot is not None:
            check_picture(plot)
        found = _run(target, **options)
    written = None if form == "table" and out is None else _form(found, form, layers)
    _output.deliver(out, written, lambda: found.table(layers=layers))
    if plot is not None:
        with explained(show_traceback):
            found.plot(plot)


def _form(found: BoundReport, form: str, layers: bool) -> str:
    if form == "json":
        return found.to_json() + "\n"
    if form == "latex":
        return found.to_latex()
    if form == "html":
        return f"<!doctype html>\n<meta charset='utf-8'>\n<title>Bounds</title>\n{found.to_html()}\n"
    return plain(found, layers) + "\n"


def _run(
    target: str, *, loss: str, data: str | None, rows: str | None, radius: float | None, input_norm: float | None,
    **model: Any,
) -> BoundReport:  # fmt: skip
    wanted = None if rows is None else [row.strip() for row in rows.split(",") if row.strip()]
    if wanted == []:
        raise ReductionError(f"--rows {rows!r}: expected ids of bounds, as a3,b2")
    options: dict[str, Any] = {"rows": wanted, "radius": radius, "input_norm": input_norm}
    with opened(target, loss=loss, data=None if data == "random" else data, **model) as at:
        at.steps.start("bounds")
        if data is None:
            return report(at.graph, loss, example=at.batch.inputs, **options)
        return report(at.graph, loss, at.batch.inputs, at.targets(loss), **options)


def summary(graph: dagh.Graph, loss: str, inputs: Any, targets: Any) -> str | None:
    """One line for ``dagh trace``: the best bound from the weights, and b2 where it is quick; ``None`` without any."""
    program = graph.program
    samples = max((x.shape[0] for x in _tensors(inputs)), default=1)
    numbers = sum(n.numel for n in program if n.op is not None) * samples * program.output.numel
    scalars = sum(p.numel() for p in graph.parameters.values())
    rows = ["a3" if scalars <= _FEW else "a2", *(["b2"] if numbers <= _QUICK else [])]
    try:
        found = report(graph, loss, inputs, targets, rows=rows)
    except DaghError:
        return None
    known = {"a2": "from the weights", "a3": "from the weights", "b2": "at these data"}
    parts = [f"{text(row.log_value)} {known[row.id]}" for row in found.present]
    return f"‖H_O‖ ≤ {', '.join(parts)}; dagh bounds shows all" if parts else None


def _tensors(inputs: Any) -> list[torch.Tensor]:
    from torch.utils import _pytree as pytree

    return [x for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor) and x.dim()]
