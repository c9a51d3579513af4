"""``dagh architectures``."""

from __future__ import annotations

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ._plugins import installed


@click.command()
def architectures() -> None:
    """List the installed architecture plug-ins."""
    table = Table(box=None, pad_edge=False)
    for column in ("name", "what it recognizes", "from"):
        table.add_column(column)
    for plugin in installed():
        if plugin.architecture is None:
            what = f"[red]cannot be loaded: {escape(plugin.error or '')}[/red]"
        else:
            what = escape(plugin.architecture.description)
        table.add_row(escape(plugin.name), what, escape(plugin.provider))
    Console().print(table)
