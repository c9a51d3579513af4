"""``dagh convergence``."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from dagh.errors import FileFormatError

from ._convergence import Array, LossDifferences, loss_differences
from ._datasets import read_npz


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--shuffles", default=100, show_default=True, type=click.IntRange(min=1), help="Random orders.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the random orders.")
def convergence(file: Path, shuffles: int, seed: int) -> None:
    """How much one more sample moves the mean loss.

    FILE is an .npz file with the per-sample losses in an array named "losses" (or its only array), or an .npy
    file.
    """
    Console().print(_table(loss_differences(_losses(file), shuffles, seed)))


def _losses(file: Path) -> Array:
    arrays = read_npz(file)
    name = "losses" if "losses" in arrays else next(iter(arrays)) if len(arrays) == 1 else None
    if name is None:
        held = ", ".join(sorted(arrays)) or "nothing"
        raise FileFormatError(f"{file} has no array named 'losses'; it holds {held}")
    if arrays[name].dtype.kind not in "fiu":
        raise FileFormatError(f"{file}: the losses have type {arrays[name].dtype}, not real numbers")
    return arrays[name].astype(np.float64)


def _table(result: LossDifferences) -> Table:
    title = f"|L(k+1) − L(k)| over {result.shuffles} orders of {result.samples} samples"
    table = Table(title=title, box=None, pad_edge=False)
    for column in ("k", "mean", *(f"{level:.0%}" for level in result.quantiles)):
        table.add_column(column, justify="right")
    for row in _rows(len(result.k)):
        values = (result.mean[row], *(q[row] for q in result.quantiles.values()))
        table.add_row(str(result.k[row]), *(f"{v:.3e}" for v in values))
    return table


def _rows(count: int) -> list[int]:
    """Positions of k = 1, 2, 5, 10, 20, 50, … and of the last k."""
    steps = (m * 10**e for e in range(len(str(count))) for m in (1, 2, 5))
    return sorted({count - 1, *(s - 1 for s in steps if s < count)})
