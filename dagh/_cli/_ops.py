"""``dagh ops``: the operations with a derivative rule."""

from __future__ import annotations

import json

import click
from rich.box import SIMPLE_HEAD
from rich.table import Table

from dagh._cli._output import console
from dagh._rules._base import registered

_HEADS = ("operation", "derivative", "closed form", "acts per", "note")


def rule_rows() -> list[dict[str, str | bool]]:
    """One row per registered operation, sorted by name."""
    return [
        {
            "operation": name,
            "derivative": rule.derivative,
            "closed_form": rule.closed_form,
            "acts_per": rule.acts_per,
            "note": rule.note,
        }
        for name, rule in registered().items()
    ]


def markdown() -> str:
    """The table for the documentation."""
    lines = ["| " + " | ".join(_HEADS) + " |", "|" + " --- |" * len(_HEADS)]
    lines += ["| " + " | ".join([f"`{cells[0]}`", *cells[1:]]).replace("|  |", "| |") + " |" for cells in _cells()]
    return "\n".join(lines)


def _cells() -> list[list[str]]:
    return [
        [("yes" if v else "no") if isinstance(v, bool) else v.replace("|", "\\|") for v in row.values()]
        for row in rule_rows()
    ]


@click.command()
@click.option("--format", "form", type=click.Choice(["table", "markdown", "json"]), default="table", show_default=True)
def ops(form: str) -> None:
    """List the operations with a derivative rule.

    Every other one that PyTorch can differentiate twice runs on generic derivatives: exact, but slower.
    """
    if form == "json":
        click.echo(json.dumps(rule_rows(), indent=2))
        return
    if form == "markdown":
        click.echo(markdown())
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for head in _HEADS:
        table.add_column(head, overflow="fold")
    for cells in _cells():
        table.add_row(*cells)
    out = console()
    out.print(table)
    out.print(
        f"{len(_cells())} operations; every other one runs on generic derivatives (exact, only slower)",
        style="dim",
    )
