"""What every command on a model file shares: its options, and the way from them to a traced graph."""

from __future__ import annotations

import contextlib
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource
from torch import nn

from dagh import _capture, _objectives
from dagh._clarke._warn import KinkWarning
from dagh._cli import _output
from dagh._cli._data import Batch, InputSpec, inputs_for, targets_for, tensors
from dagh._cli._group import UNTRACEABLE, Failure, complain
from dagh._cli._load import Loaded, load, load_weights, on_path, users_code
from dagh._cli._untraceable import naming_the_line
from dagh._graph import Graph
from dagh._graph import trace as trace_model
from dagh._inputs import normalize_inputs
from dagh._memory import parse_size
from dagh.errors import DaghError, OutputError, ReductionError

Decorator = Callable[[Any], Any]

TARGET = click.argument("target", metavar="FILE[:ATTR]")
INPUT = click.option(
    "--input",
    "specs",
    type=InputSpec.parse,
    metavar="SHAPE",
    multiple=True,
    help="Shape of one sample, as 1,28,28; 16:long100 for tokens below 100. Repeat for several inputs.",
)
BATCH = click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Number of samples.")
LOSS = click.option(
    "--loss",
    default="cross_entropy",
    show_default=True,
    help=f"One of {', '.join(_objectives.loss_names())}.",
)
DATA = click.option(
    "--data",
    metavar="digits|PATH.npz",
    help="Handwritten digits of scikit-learn, or arrays x and y of a file. Default: random numbers.",
)
WEIGHTS = click.option(
    "--weights", type=click.Path(path_type=Path), help="State dict to load: torch.save or safetensors."
)
MODE = click.option("--mode", type=click.Choice(["eval", "train"]), default="eval", show_default=True)
DROPOUT_SEED = click.option("--dropout-seed", type=int, help="Fix the dropout masks of train mode.")
OUTPUT = click.option("--output", metavar="NAME", help="Which output to use, of a model that returns several.")
DTYPE = click.option("--dtype", type=click.Choice(["float32", "float64"]), help="Default: the model's own.")
OUT = click.option(
    "--out",
    type=click.Path(path_type=Path),
    is_eager=True,  # before --format, which goes by it
    help="Write to this file instead of the standard output, in the format of its ending unless --format is given.",
)
_ENDINGS = {".json": "json", ".html": "html", ".htm": "html", ".dot": "dot", ".gv": "dot", ".tex": "latex"}


def _by_ending(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """The format that the ending of ``--out`` names, where ``--format`` is not given."""
    out: Path | None = ctx.params.get("out")
    given = ctx.get_parameter_source(param.name or "") is not ParameterSource.DEFAULT
    if out is None or given or not isinstance(param.type, click.Choice):
        return value
    named = _ENDINGS.get(out.suffix.lower(), value)
    if named not in param.type.choices:
        known = ", ".join(f"--format {choice}" for choice in param.type.choices)
        raise click.UsageError(f"{out.name}: this command has no format {named!r}; name one: {known}", ctx)
    return named


TRACEBACK = click.option("--traceback", "show_traceback", is_flag=True, help="Show where an error comes from.")


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ReductionError as error:
        raise click.BadParameter(str(error)) from None


MEMORY_BUDGET = click.option(
    "--memory-budget", type=_size, metavar="SIZE", help="As 2GiB. Default: half of the free memory."
)


def stacked(*decorators: Decorator) -> Decorator:
    """The decorators as one, in the order in which they would be written (and options are listed)."""

    def decorate(command: Any) -> Any:
        for one in reversed(decorators):
            command = one(command)
        return command

    return decorate


#: Which model, on what kind of input, under which loss.
SUBJECT = stacked(TARGET, INPUT, BATCH, LOSS)
#: How it is run.
MANNER = stacked(MODE, DROPOUT_SEED, OUTPUT, DTYPE)
#: Where the result goes.
RESULT = stacked(OUT, TRACEBACK)


def format_option(*choices: str) -> Decorator:
    """``--format``, a table by default; without it, the ending of ``--out`` decides."""
    return click.option(
        "--format",
        "form",
        type=click.Choice(["table", *choices]),
        default="table",
        show_default=True,
        callback=_by_ending,
    )


#: A table for people or JSON for programs.
FORM = format_option("json")


@contextlib.contextmanager
def explained(show_traceback: bool) -> Iterator[None]:
    """Where an error comes from, if that was asked for; its one line follows in any case."""
    try:
        yield
    except (DaghError, Failure) as error:
        if show_traceback:
            traceback.print_exception(error)
        raise


@dataclass(frozen=True)
class Opened:
    """A model of a file, a batch for it, and its graph."""

    loaded: Loaded
    batch: Batch
    graph: Graph
    steps: _output.Steps
    mode: str
    seed: int

    def targets(self, loss: str) -> Any:
        """Those of the data, or random ones that fit the loss."""
        result = self.graph._pick(_forward(self.loaded, self.batch, self.mode))
        return targets_for(loss, result, self.batch.labels, self.seed)


@contextlib.contextmanager
def opened(
    target: str,
    *,
    loss: str,
    specs: Sequence[InputSpec],
    batch: int,
    data: str | None,
    weights: Path | None,
    dtype: str | None,
    mode: Any,
    dropout_seed: int | None,
    output: str | None,
    seed: int,
) -> Iterator[Opened]:
    """Load, trace, and report progress, warnings and errors as the commands do as long as the context lasts."""
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
            with contextlib.redirect_stdout(sys.stderr):  # the model may print whenever it is run
                yield Opened(loaded, chosen, graph, steps, mode, seed)


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.get_default_dtype())


def _forward(loaded: Loaded, batch: Batch, mode: str) -> Any:
    """The model's own output; an error in it names the user's line."""
    args, kwargs = normalize_inputs(batch.inputs, loaded.model)
    shapes = ", ".join("×".join(map(str, x.shape)) for x in tensors(batch.inputs))
    with users_code(loaded.path, f"running the model on input {shapes}", UNTRACEABLE):
        return _capture.run_model(loaded.model, args, kwargs, mode)


def _traced(loaded: Loaded, batch: Batch, mode: Any, dropout_seed: int | None, output: str | None) -> Graph:
    _forward(loaded, batch, mode)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return trace_model(loaded.model, batch.inputs, mode=mode, dropout_seed=dropout_seed, output=output)
    except OutputError as error:
        raise OutputError(f"{error} (here: --output NAME)") from error


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Warnings as one line each, once."""
    seen: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        text = str(message)
        # Ties have a line of the report.
        if text not in seen and issubclass(category, UserWarning) and not issubclass(category, KinkWarning):
            seen.add(text)
            complain("warning", text)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
