"""The ``dagh`` command."""

from __future__ import annotations

import click

from dagh._cli._group import DaghGroup
from dagh._version import __version__

__all__ = ["cli", "main"]


@click.group(
    cls=DaghGroup,
    own={
        "kinks": "dagh._cli._kinks:kinks_command",
        "ops": "dagh._cli._ops:ops",
        "spectrum": "dagh._cli._spectrum:spectrum",
        "trace": "dagh._cli._trace:trace",
    },
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="dagh")
def cli() -> None:
    """Exact second derivatives of neural networks, block by block.

    Exit codes: 0 done, 1 the output cannot be written, 2 wrong usage, 3 the model cannot be traced, 4 over the memory
    budget, 130 interrupted.
    """


def main() -> None:
    """Run the command line; never returns."""
    cli.main(prog_name="dagh")
