"""``dagh sweep report``: figures, tables, claims and a page from results on disk."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from ._report_claims import claims
from ._report_data import Results, load
from ._report_figures import draw
from ._report_pages import Shown, html, markdown
from ._report_tables import (
    claim_rows,
    curve_rows,
    run_rows,
    term_rows,
    write_csv,
    write_parquet,
)
from ._store import StoreError

_DPI = 150


def report(store_dirs: Sequence[str | Path], out: str | Path) -> list[Path]:
    """Write a report on the results in ``store_dirs`` into the folder ``out``.

    ``report.html`` is one self-contained page, ``report.md`` the same for reading as text; ``figures/`` has every
    figure as PNG and PDF, ``runs.csv``, ``curves.csv``, ``terms.csv`` and ``claims.csv`` the numbers (also Parquet for
    runs, where pyarrow is installed). Missing and failed runs are named, and left out of everything else.

    Returns:
        The files written.

    Raises:
        FileFormatError: no folder holds a finished run.
        MissingPackageError: matplotlib is not installed.
        StoreError: ``out`` cannot be written.
    """
    results = load(store_dirs)
    out = Path(out)
    try:
        return _write(results, out)
    except OSError as error:
        raise StoreError(f"cannot write to {out}: {error.strerror or error}") from error


def _write(results: Results, out: Path) -> list[Path]:
    (out / "figures").mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    shown: dict[tuple[str, str], list[Shown]] = {}
    for panel in results.panels:
        for name, caption, figure in draw(panel):
            png, pdf = (out / "figures" / f"{name}.{kind}" for kind in ("png", "pdf"))
            figure.savefig(png, dpi=_DPI)
            figure.set_layout_engine("none")  # found once: the PDF has the layout of the PNG
            figure.savefig(pdf)
            written += [png, pdf]
            data = base64.b64encode(png.read_bytes()).decode()
            shown.setdefault((panel.axis, panel.dataset), []).append(Shown(name, caption, data))
    found = claims(results)
    runs = run_rows(results)
    tables = [
        write_csv(out / "runs.csv", runs),
        write_csv(out / "curves.csv", curve_rows(results)),
        write_csv(out / "terms.csv", term_rows(results)),
        write_csv(out / "claims.csv", claim_rows(found)),
        write_parquet(out / "runs.parquet", runs),
    ]
    written += [t for t in tables if t is not None]
    for name, text in (("report.md", markdown(results, found, shown)), ("report.html", html(results, found, shown))):
        (out / name).write_text(text, encoding="utf-8")
        written.append(out / name)
    return written
