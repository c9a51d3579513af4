"""``dagh kinks``: where a model stands on its kinks, and what meets there."""

from __future__ import annotations

import json
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Group, RenderableType
from rich.text import Text

from dagh import _objectives
from dagh._clarke._report import KinkReport, kinks
from dagh._cli import _output
from dagh._cli._data import InputSpec, inputs_for, targets_for
from dagh._cli._group import Failure
from dagh._cli._load import load, load_weights, on_path
from dagh._cli._trace import _dtype_of, _forward, _short_warnings, _traced
from dagh._cli._untraceable import naming_the_line
from dagh.errors import DaghError


@click.command("kinks")
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
    "--loss",
    default="cross_entropy",
    show_default=True,
    help=f"One of {', '.join(_objectives.loss_names())}.",
)
@click.option(
    "--data",
    metavar="digits|PATH.npz",
    help="Handwritten digits of scikit-learn, or arrays x and y of a file. Default: random numbers.",
)
@click.option("--weights", type=click.Path(path_type=Path), help="State dict to load: torch.save or safetensors.")
@click.option("--params", multiple=True, metavar="GLOB", help="Parameters that vary. Default: all. Repeatable.")
@click.option("--tol", type=click.FloatRange(min=0), default=1e-6, show_default=True, help="Distance called near.")
@click.option("--max-patterns", type=click.IntRange(min=1), default=512, show_default=True, help="Most to enumerate.")
@click.option("--mode", type=click.Choice(["eval", "train"]), default="eval", show_default=True)
@click.option("--dropout-seed", type=int, help="Fix the dropout masks of train mode.")
@click.option("--output", metavar="NAME", help="Which output to use, of a model that returns several.")
@click.option("--dtype", type=click.Choice(["float32", "float64"]), help="Default: the model's own.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the weights, inputs, targets and directions.")
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write to this file instead of the standard output.")
@click.option("--traceback", "show_traceback", is_flag=True, help="Show where an error comes from.")
def kinks_command(target: str, show_traceback: bool, form: str, out: Path | None, **options: Any) -> None:
    """Show where the model in FILE stands on kinks of ReLU, max-pooling and the like.

    At an exact tie the Hessian does not exist: the report tells which ties matter, how many smooth pieces meet, by how
    much the gradient jumps and the Hessians differ, and how near all other elements are to a kink.
    """
    try:
        label, report = _run(target, **options)
    except (DaghError, Failure) as error:
        if show_traceback:
            traceback.print_exception(error)
        raise
    if form == "json":
        text = json.dumps({"file": label, **report.to_dict()}, indent=2, allow_nan=False) + "\n"
        _output.emit(text) if out is None else _output.write(out, text)
    elif out is None:
        _output.console().print(_shown(label, report))
    else:
        _output.write(out, _output.plain(_shown(label, report)))


def _shown(label: str, report: KinkReport) -> RenderableType:
    return Group(Text(f"Kinks of {label}", style="bold"), Text(), report)


def _run(
    target: str,
    *,
    specs: Sequence[InputSpec],
    batch: int,
    loss: str,
    data: str | None,
    weights: Path | None,
    params: tuple[str, ...],
    tol: float,
    max_patterns: int,
    mode: Any,
    dropout_seed: int | None,
    output: str | None,
    dtype: str | None,
    seed: int,
) -> tuple[str, KinkReport]:
    _objectives.resolve(loss)
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
        chosen = inputs_for(loaded, specs, data, batch, seed, _dtype_of(model))
        steps.start("tracing")
        with on_path(loaded.path), naming_the_line(loaded, chosen.inputs, mode):
            graph = _traced(loaded, chosen, mode, dropout_seed, output)
            targets = targets_for(loss, graph._pick(_forward(loaded, chosen, mode)), chosen.labels, seed)
            steps.start("enumerating")
            report = kinks(
                graph, loss, chosen.inputs, targets, tol,
                params=list(params) or None, max_patterns=max_patterns, seed=seed,
            )  # fmt: skip
    return loaded.label, report
