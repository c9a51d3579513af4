"""``dagh trace``: the structure of a model's Hessian."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from dagh._cli import _output
from dagh._cli._blocks import block_table, with_norms
from dagh._cli._facts import plugin_facts
from dagh._cli._opened import DATA, MANNER, MEMORY_BUDGET, RESULT, SUBJECT, WEIGHTS, explained, format_option, opened
from dagh._cli._report import Report
from dagh._export import node_rows
from dagh._memory import budget_bytes
from dagh._plan import Plan
from dagh._request import Request, choose_names, choose_pairs
from dagh._settle import settled
from dagh._state import State
from dagh.errors import MemoryBudgetError

#: Distance to a kink that is worth a word.
_NEAR = 1e-6


def _block_pair(text: str) -> tuple[str, str]:
    first, colon, second = text.partition(":")
    if not (first and colon and second):
        raise click.BadParameter(f"{text!r}: write two names or globs, as 'conv*:fc.weight'")
    return first, second


@click.command()
@SUBJECT
@DATA
@WEIGHTS
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
@MANNER
@click.option("--seed", type=int, default=0, show_default=True, help="Of the weights, inputs and targets.")
@MEMORY_BUDGET
@format_option("json", "dot", "html")
@RESULT
def trace(target: str, show_traceback: bool, form: str, out: Path | None, **options: Any) -> None:
    """Trace the model in FILE and show the structure of its Hessian.

    ATTR is a model, a class or a function that makes one; it may be left out when FILE has only one. FILE may
    define INPUT_SHAPE (the shape of one sample) or example_inputs.
    """
    with explained(show_traceback):
        report = _run(target, **options)
        text = _render(report, form)
    _output.deliver(out, text, report.renderable)


def _render(report: Report, form: str) -> str | None:
    """The text of the report; None for a table."""
    if form == "json":
        return report.as_json() + "\n"
    if form == "dot":
        from dagh._export_dot import dot

        return dot(type(report.graph.model).__name__, report.rows)
    if form == "html":
        from dagh._cli._page import page

        return page(report)
    return None


def _run(
    target: str,
    *,
    loss: str,
    depth: int | None,
    collapse: bool,
    hide: tuple[str, ...],
    blocks: Sequence[tuple[str, str]],
    norms: bool,
    show_plan: bool,
    memory_budget: int | None,
    **model: Any,
) -> Report:
    with opened(target, loss=loss, **model) as at:
        graph, chosen, steps = at.graph, at.batch, at.steps
        targets = at.targets(loss)
        steps.start("evaluating")
        state = graph.evaluate(loss, chosen.inputs, targets)
        names, leaves = choose_names(state.program, graph.trainable, None, None)
        request = Request(names, leaves, choose_pairs(names, leaves, list(blocks) or "all"))
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
            at.loaded.label,
            graph,
            state,
            node_rows(graph, state),
            loss,
            chosen.samples,
            chosen.origin,
            table,
            state.kinks(_NEAR),
            _plan_of(state, request, memory_budget) if show_plan else None,
            depth,
            collapse,
            hide,
            facts,
        )


def _plan_of(state: State, request: Request, memory_budget: int | None) -> Plan:
    budget = budget_bytes(memory_budget, state.weights.device)
    return settled(state, request, ("outer", "functional"), keep=False, copies=1, budget=budget)


@contextlib.contextmanager
def _budget_hint() -> Iterator[None]:
    try:
        yield
    except MemoryBudgetError as error:
        raise MemoryBudgetError(f"{error} (on the command line: --blocks GLOB:GLOB, --memory-budget SIZE)") from error
