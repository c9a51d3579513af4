"""``dagh bounds``, and the line about bounds in ``dagh trace``."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

import dagh
from dagh import _objectives
from dagh._cli import _output
from dagh._cli._data import InputSpec, inputs_for, targets_for
from dagh._cli._group import Failure
from dagh._cli._load import load, load_weights, on_path
from dagh._cli._trace import _dtype_of, _forward, _short_warnings, _traced
from dagh._cli._untraceable import naming_the_line
from dagh.errors import DaghError, UnknownNameError

from ._logs import text
from ._render import plain
from ._report import BoundReport, report
from ._rows import ROWS

#: Above this many numbers, cotangents of all layers and samples together, the line in ``dagh trace`` leaves b2 out.
_QUICK = 200_000_000

#: Above this many parameters it gives a2 in place of a3, whose norms of layers take seconds.
_FEW = 1_000_000


@click.command("bounds")
@click.argument("target", metavar="FILE[:ATTR]")
@click.option(
    "--input",
    "specs",
    type=InputSpec.parse,
    metavar="SHAPE",
    multiple=True,
    help="Shape of one sample, as 1,28,28; 16:long100 for tokens below 100. Repeat for several inputs.",
)
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Number of samples.")
@click.option(
    "--loss", default="cross_entropy", show_default=True, help=f"One of {', '.join(_objectives.loss_names())}."
)
@click.option(
    "--data",
    metavar="digits|random|PATH.npz",
    help="Data for the bounds that need them: handwritten digits of scikit-learn, random numbers, or arrays x and y of "
    "a file. Default: bounds from the weights alone.",
)
@click.option("--weights", type=click.Path(path_type=Path), help="State dict to load: torch.save or safetensors.")
@click.option("--rows", metavar="ID,ID,…", help="Rows wanted, as a3,b2. Default: all that apply.")
@click.option("--radius", type=click.FloatRange(min=0), help="R of a ball of parameters, for the rows .ball.")
@click.option("--input-norm", type=click.FloatRange(min=0), help="X with ‖x‖ ≤ X. Default: that of the data.")
@click.option("--layers", is_flag=True, help="Show what every parameter adds (table).")
@click.option("--mode", type=click.Choice(["eval", "train"]), default="eval", show_default=True)
@click.option("--dropout-seed", type=int, help="Fix the dropout masks of train mode.")
@click.option("--output", metavar="NAME", help="Which output to use, of a model that returns several.")
@click.option("--dtype", type=click.Choice(["float32", "float64"]), help="Default: the model's own.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the weights, inputs and targets.")
@click.option(
    "--format", "form", type=click.Choice(["table", "json", "latex", "html"]), default="table", show_default=True
)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the ladder to this file (needs matplotlib).")
@click.option("--out", type=click.Path(path_type=Path), help="Write to this file instead of the standard output.")
@click.option("--traceback", "show_traceback", is_flag=True, help="Show where an error comes from.")
def bounds(
    target: str, show_traceback: bool, form: str, plot: Path | None, out: Path | None, layers: bool, **options: Any
) -> None:
    """Bound the Hessian norms of the model in FILE, by every statement that applies.

    From the weights alone, or with --data at the data as well, down to the exact norm. Bounds that do not apply are
    listed with the reason.
    """
    try:
        found = _run(target, **options)
        if plot is not None:
            found.plot(plot)
    except (DaghError, Failure) as error:
        if show_traceback:
            traceback.print_exception(error)
        raise
    if form == "table" and out is None:
        _output.console().print(found.table(layers=layers))
        return
    shown = _form(found, form, layers)
    _output.emit(shown) if out is None else _output.write(out, shown)


def _form(found: BoundReport, form: str, layers: bool) -> str:
    if form == "json":
        return found.to_json() + "\n"
    if form == "latex":
        return found.to_latex()
    if form == "html":
        return f"<!doctype html>\n<meta charset='utf-8'>\n<title>Bounds</title>\n{found.to_html()}\n"
    return plain(found, layers) + "\n"


def _run(
    target: str, *, specs: Sequence[InputSpec], batch: int, loss: str, data: str | None, weights: Path | None,
    rows: str | None, radius: float | None, input_norm: float | None, mode: Any, dropout_seed: int | None,
    output: str | None, dtype: str | None, seed: int,
) -> BoundReport:  # fmt: skip
    _objectives.resolve(loss)
    wanted = None if rows is None else [row.strip() for row in rows.split(",") if row.strip()]
    for row in wanted or ():
        if row not in ROWS:
            raise UnknownNameError.of("bound", row, ROWS)
    torch.manual_seed(seed)
    with _output.steps() as steps, _short_warnings():
        steps.start("loading")
        loaded = load(target)
        model = loaded.model
        if dtype is not None:
            model.to(getattr(torch, dtype))
        if weights is not None:
            load_weights(model, weights)
        model.train(mode == "train")
        chosen = inputs_for(loaded, specs, None if data == "random" else data, batch, seed, _dtype_of(model))
        steps.start("tracing")
        with on_path(loaded.path), naming_the_line(loaded, chosen.inputs, mode):
            graph = _traced(loaded, chosen, mode, dropout_seed, output)
            steps.start("bounds")
            options: dict[str, Any] = {"rows": wanted, "radius": radius, "input_norm": input_norm}
            if data is None:
                return report(graph, loss, example=chosen.inputs, **options)
            targets = targets_for(loss, graph._pick(_forward(loaded, chosen, mode)), chosen.labels, seed)
            return report(graph, loss, chosen.inputs, targets, **options)


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
