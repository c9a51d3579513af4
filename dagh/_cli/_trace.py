"""``dagh trace``: the structure of a model's Hessian."""

from __future__ import annotations

import contextlib
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from dagh import _capture, _objectives
from dagh._clarke._warn import KinkWarning
from dagh._cli import _output
from dagh._cli._blocks import block_table, with_norms
from dagh._cli._data import Batch, InputSpec, inputs_for, targets_for, tensors
from dagh._cli._facts import plugin_facts
from dagh._cli._group import UNTRACEABLE, Failure, complain
from dagh._cli._load import Loaded, load, load_weights, on_path, users_code
from dagh._cli._report import Report
from dagh._cli._untraceable import naming_the_line
from dagh._export import node_rows
from dagh._graph import Graph
from dagh._graph import trace as trace_model
from dagh._inputs import normalize_inputs
from dagh._memory import parse_size
from dagh._planner import make_plan
from dagh._request import Request, choose_names, choose_pairs
from dagh.errors import DaghError, MemoryBudgetError, OutputError, ReductionError

#: Distance to a kink that is worth a word.
_NEAR = 1e-6


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ReductionError as error:
        raise click.BadParameter(str(error)) from None


def _block_pair(text: str) -> tuple[str, str]:
    first, colon, second = text.partition(":")
    if not (first and colon and second):
        raise click.BadParameter(f"{text!r}: write two names or globs, as 'conv*:fc.weight'")
    return first, second


@click.command()
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
@click.option("--depth", type=click.IntRange(min=1), help="Levels of modules to show (table, html).")
@click.option("--collapse", is_flag=True, help="Show identical modules in a row once (table, html).")
@click.option("--hide", multiple=True, metavar="GLOB", help="Operations, nodes or modules to leave out (table, html).")
@click.option(
    "--blocks",
    type=_block_pair,
    metavar="GLOB:GLOB",
    multiple=True,
    help="Blocks of the Hessian, as 'conv*:fc.weight'. Default: all.",
)
@click.option("--norms", is_flag=True, help="Compute the Frobenius norms of H_O and H_F of every block.")
@click.option("--plan", "show_plan", is_flag=True, help="Show how the blocks would be computed.")
@click.option("--mode", type=click.Choice(["eval", "train"]), default="eval", show_default=True)
@click.option("--dropout-seed", type=int, help="Fix the dropout masks of train mode.")
@click.option("--output", metavar="NAME", help="Which output to use, of a model that returns several.")
@click.option("--dtype", type=click.Choice(["float32", "float64"]), help="Default: the model's own.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the weights, inputs and targets.")
@click.option("--memory-budget", type=_size, metavar="SIZE", help="As 2GiB. Default: half of the free memory.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "dot", "html"]),
    default="table",
    show_default=True,
)
@click.option("--out", type=click.Path(path_type=Path), help="Write to this file instead of the standard output.")
@click.option("--traceback", "show_traceback", is_flag=True, help="Show where an error comes from.")
def trace(target: str, show_traceback: bool, form: str, out: Path | None, **options: Any) -> None:
    """Trace the model in FILE and show the structure of its Hessian.

    ATTR is a model, a class or a function that makes one; it may be left out when FILE has only one. FILE may
    define INPUT_SHAPE (the shape of one sample) or example_inputs.
    """
    try:
        report = _run(target, **options)
        text = _render(report, form, out)
    except (DaghError, Failure) as error:
        if show_traceback:
            traceback.print_exception(error)
        raise
    if text is None:
        _output.console().print(report.renderable())
    elif out is None:
        _output.emit(text)
    else:
        _output.write(out, text)


def _render(report: Report, form: str, out: Path | None) -> str | None:
    """The text of the report; None for a table on the terminal, which is laid out for its width."""
    if form == "json":
        return report.as_json() + "\n"
    if form == "dot":
        from dagh._export_dot import dot

        return dot(type(report.graph.model).__name__, report.rows)
    if form == "html":
        from dagh._cli._page import page

        return page(report)
    return None if out is None else _output.plain(report.renderable())


def _run(
    target: str,
    *,
    specs: Sequence[InputSpec],
    batch: int,
    loss: str,
    data: str | None,
    weights: Path | None,
    depth: int | None,
    collapse: bool,
    hide: tuple[str, ...],
    blocks: Sequence[tuple[str, str]],
    norms: bool,
    show_plan: bool,
    mode: Any,
    dropout_seed: int | None,
    output: str | None,
    dtype: str | None,
    seed: int,
    memory_budget: int | None,
) -> Report:
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
            result = graph._pick(_forward(loaded, chosen, mode))
            targets = targets_for(loss, result, chosen.labels, seed)
            steps.start("evaluating")
            state = graph.evaluate(loss, chosen.inputs, targets)
            names, leaves = choose_names(state.program, graph.trainable, None, None)
            request = Request(names, leaves, choose_pairs(names, list(blocks) or "all"))
            table = block_table(state, request)
            facts = plugin_facts(graph, loss, chosen.inputs, targets)
            if norms:
                steps.start("norms of blocks")
                with _budget_hint():
                    table = with_norms(
                        table,
                        graph,
                        state,
                        loss,
                        chosen.inputs,
                        targets,
                        memory_budget,
                        lambda n: steps.start("norms of blocks", n),
                        steps.advance,
                    )
        return Report(
            loaded.label,
            graph,
            state,
            node_rows(graph, state),
            loss,
            chosen.samples,
            chosen.origin,
            table,
            state.kinks(_NEAR),
            make_plan(state.program, request, samples=state.samples) if show_plan else None,
            depth,
            collapse,
            hide,
            facts,
        )


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.get_default_dtype())


def _forward(loaded: Loaded, batch: Batch, mode: str) -> Any:
    """The model's own output; an error in it names the user's line."""
    args, kwargs = normalize_inputs(batch.inputs)
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
def _budget_hint() -> Iterator[None]:
    try:
        yield
    except MemoryBudgetError as error:
        raise MemoryBudgetError(f"{error} (on the command line: --blocks GLOB:GLOB, --memory-budget SIZE)") from error


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
