"""The picture of an atlas: norms of all pairs, and how strongly they are coupled."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dagh._atlasview import compact
from dagh._blocktables import PARTS
from dagh._blockview import shorten
from dagh._pictures import check_picture
from dagh.errors import DaghError, ReductionError

if TYPE_CHECKING:
    from dagh._atlas import Atlas

#: More parameters than this are drawn module by module.
_MAX_ROWS = 96
_SYMBOLS = {"outer": "H_O", "functional": "H_F", "full": "H"}


def draw(atlas: Atlas, path: Path, kind: str) -> None:
    """Write the picture to ``path``.

    Raises ``DaghError`` without matplotlib, ``FileFormatError`` where no picture can be written, ``ReductionError`` for
    a ``kind``.
    """
    check_picture(path)
    if kind not in ("fro", "spectral"):
        raise ReductionError(f"kind of norm is 'fro' or 'spectral', not {kind!r}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise DaghError("pictures need matplotlib: pip install 'dagh[plot]'") from None
    shown, note = compact(atlas, _MAX_ROWS)
    matrix = shown.norms(kind).to_numpy()
    count = len(shown.names)
    side = min(max(0.17 * count, 2.2), 7.5)
    figure = Figure(figsize=(2 * side + 4.4, side + 1.5), layout="compressed")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    size = max(min(8.0, 0.78 * 72 * side / count), 3.0)
    symbol = _SYMBOLS[atlas.part]
    norm = "F" if kind == "fro" else "2"
    _logarithmic(figure, axes[0], matrix, rf"$\|{symbol}[a,b]\|_{norm}$")
    _relative(figure, axes[1], matrix)
    _labels(axes[0], shown, size, names=True)
    _labels(axes[1], shown, size, names=False)
    samples = atlas.info.get("samples", 0)
    title = f"{PARTS[atlas.part]}, P = {atlas.size:,}, {samples} samples"
    extra = [note] if note else []
    if shown.is_estimate:
        extra.append(f"estimated from {atlas.info.get('probes')} random directions per parameter")
    figure.suptitle(f"{title[0].upper()}{title[1:]}" + "".join(f"; {line}" for line in extra), fontsize=10)
    figure.savefig(path, dpi=200, bbox_inches="tight")


def _logarithmic(figure: Any, axes: Any, matrix: np.ndarray[Any, Any], title: str) -> None:
    from matplotlib.colors import LogNorm

    positive = matrix[matrix > 0]
    high = float(positive.max()) if positive.size else 1.0
    low = max(float(positive.min()), 1e-6 * high) if positive.size else 0.1
    scale = LogNorm(vmin=min(low, 0.5 * high), vmax=high)
    image = axes.imshow(np.ma.masked_less_equal(matrix, 0), cmap="magma_r", norm=scale, interpolation="nearest")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02).ax.tick_params(labelsize=8)


def _relative(figure: Any, axes: Any, matrix: np.ndarray[Any, Any]) -> None:
    from matplotlib.colors import LogNorm, Normalize

    own = np.sqrt(np.diag(matrix))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.ma.masked_invalid(matrix / np.outer(own, own))
    shown = np.ma.masked_equal(ratio, 0)
    low, top = (float(shown.min()), float(shown.max())) if shown.count() else (0.0, 1.0)
    # Semidefinite matrices stay within 1; elsewhere pairs can outweigh their diagonal blocks by far.
    bounded = top <= 1.0 + 1e-6
    scale = Normalize(min(np.floor(10 * low) / 10, 0.9), 1.0) if bounded else LogNorm(max(low, 1e-4 * top), top)
    image = axes.imshow(shown, cmap="viridis", norm=scale, interpolation="nearest")
    axes.set_title(r"coupling $\|ab\|\,/\,\sqrt{\|aa\|\,\|bb\|}$", fontsize=10)
    figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02).ax.tick_params(labelsize=8)


def _labels(axes: Any, atlas: Atlas, size: float, *, names: bool) -> None:
    count = len(atlas.names)
    places = list(range(count))
    labels = [shorten(name) for name in atlas.names]
    axes.set_xticks(places, labels if count <= 40 else [""] * count, rotation=90, fontsize=size)
    axes.set_yticks(places, labels if names else [""] * count, fontsize=size)
    axes.tick_params(length=0, pad=2)
    for edge in axes.spines.values():
        edge.set_linewidth(0.5)
    # Lines between the modules of the first level that has a handful.
    tops = _levels(atlas.modules)
    for i in range(1, count):
        if tops[i] != tops[i - 1]:
            for line in (axes.axhline, axes.axvline):
                line(i - 0.5, color="white", linewidth=0.8)


def _levels(modules: tuple[str, ...]) -> list[str]:
    paths = [m.split(".") for m in modules]
    depth = 1
    while depth < max(map(len, paths)) and len({tuple(p[:depth]) for p in paths}) < 5:
        depth += 1
    return [".".join(p[:depth]) for p in paths]
