"""``dagh kinks``: where a model stands on its kinks, and what meets there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.text import Text

from dagh._clarke._report import KinkReport, kinks
from dagh._cli import _output
from dagh._cli._opened import DATA, FORM, MANNER, RESULT, SUBJECT, WEIGHTS, explained, opened


@click.command("kinks")
@SUBJECT
@DATA
@WEIGHTS
@click.option("--params", multiple=True, metavar="GLOB", help="Parameters that vary. Default: all. Repeatable.")
@click.option("--tol", type=click.FloatRange(min=0), default=1e-6, show_default=True, help="Distance called near.")
@click.option("--max-patterns", type=click.IntRange(min=1), default=512, show_default=True, help="Most to enumerate.")
@MANNER
@click.option("--seed", type=int, default=0, show_default=True, help="Of the weights, inputs, targets and directions.")
@FORM
@RESULT
def kinks_command(target: str, show_traceback: bool, form: str, out: Path | None, **options: Any) -> None:
    """Show where the model in FILE stands on kinks of ReLU, max-pooling and the like.

    At an exact tie the Hessian does not exist: the report tells which ties matter, how many smooth pieces meet, by how
    much the gradient jumps and the Hessians differ, and how near all other elements are to a kink.
    """
    with explained(show_traceback):
        label, report = _run(target, **options)
    text = None
    if form == "json":
        text = json.dumps({"file": label, **report.to_dict()}, indent=2, allow_nan=False) + "\n"
    _output.deliver(out, text, lambda: _shown(label, report))


def _shown(label: str, report: KinkReport) -> RenderableType:
    return Group(Text(f"Kinks of {label}", style="bold"), Text(), report)


def _run(
    target: str, *, loss: str, params: tuple[str, ...], tol: float, max_patterns: int, seed: int, **model: Any
) -> tuple[str, KinkReport]:
    with opened(target, loss=loss, seed=seed, **model) as at:
        targets = at.targets(loss)
        at.steps.start("enumerating")
        report = kinks(
            at.graph, loss, at.batch.inputs, targets, tol,
            params=list(params) or None, max_patterns=max_patterns, seed=seed,
        )  # fmt: skip
    return at.loaded.label, report
