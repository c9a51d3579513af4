"""An atlas as text and as plain data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dagh._blocktables import PARTS
from dagh._probes import EstimatedNorms

if TYPE_CHECKING:
    from dagh._atlas import Atlas

_MAX_ROWS = 24
_MAX_PAIRS = 12


def as_dict(atlas: Atlas, spectral: bool) -> dict[str, Any]:
    """Parameters and blocks of an atlas; estimates are called so."""
    fro = atlas.norms()
    other = atlas.norms("spectral") if spectral else None
    parameters = []
    for name, shape, module in zip(atlas.names, atlas.shapes, atlas.modules, strict=True):
        entry: dict[str, Any] = {"name": name, "shape": list(shape), "module": module}
        if atlas.probes is None:
            values = atlas.eigvalsh(name)
            top = float(values[-1]) if len(values) else 0.0
            whole = len(values) == shape.numel()
            entry |= {"trace": atlas.trace(name), "lambda_max": top if whole else max(top, 0.0)}
            entry["rank"] = len(values) if atlas.matrix is None else None
        parameters.append(entry)
    blocks = []
    for a, b in fro:
        entry = {"row": a, "column": b, "fro": fro[a, b]}
        exact = not isinstance(fro, EstimatedNorms) or fro.is_exact(a, b)
        entry["exact"] = exact
        if not exact and isinstance(fro, EstimatedNorms):
            entry |= {"estimate": "random probes", "standard_error": fro.stderr[a, b]}
        if other is not None:
            entry["spectral"] = other[a, b]
        blocks.append(entry)
    return {
        "part": atlas.part,
        "reduction": atlas.reduction,
        "size": atlas.size,
        **atlas.info,
        "parameters": parameters,
        "blocks": blocks,
    }


def compact(atlas: Atlas, limit: int = _MAX_ROWS) -> tuple[Atlas, str]:
    """The atlas merged by module as deep as ``limit`` rows allow, and a line that says so."""
    if len(atlas.names) <= limit:
        return atlas, ""
    depth = max(path.count(".") + 1 for path in atlas.modules)
    merged = atlas.group(depth=depth)
    while len(merged.names) > limit and depth > 1:
        depth -= 1
        merged = atlas.group(depth=depth)
    return merged, f"{len(atlas.names)} parameters, merged by module"


def coupling(atlas: Atlas) -> dict[tuple[str, str], float]:
    """``‖H[a,b]‖ / (‖H[a,a]‖ ‖H[b,b]‖)^½`` for every pair; between 0 and 1 where H is positive semidefinite."""
    norms = atlas.norms()
    own = {name: float(norms[name, name]) for name in atlas.names}
    return {(a, b): float(norms[a, b]) / (own[a] * own[b]) ** 0.5 if own[a] * own[b] > 0 else 0.0 for a, b in norms}


def renderable(atlas: Atlas) -> RenderableType:
    """Two tables: the diagonal blocks, and the pairs that are most coupled."""
    shown, note = compact(atlas)
    name = PARTS[atlas.part]
    title = f"{name[0].upper()}{name[1:]}, P = {atlas.size:,}, {atlas.info.get('samples', 0)} samples"
    notes = [note] if note else []
    if shown.is_estimate:
        notes.append(f"≈ estimates from {atlas.info.get('probes')} random directions per parameter, ± standard error")
    parts: list[RenderableType] = [Text(title, style="bold"), _diagonal(shown), _pairs(shown)]
    return Group(*parts, *(Text(line, style="dim") for line in notes))


def _table(*heads: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for head in heads:
        left = head in ("", "row", "column")
        table.add_column(head, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    return table


def _diagonal(atlas: Atlas) -> Table:
    norms, exact = atlas.norms(), atlas.probes is None
    table = _table("", "size", "‖·‖ Frobenius", *(("trace", "λ min", "λ max") if exact else ()))
    for name, shape in zip(atlas.names, atlas.shapes, strict=True):
        text = norms.text(name, name) if isinstance(norms, EstimatedNorms) else f"{norms[name, name]:.3e}"
        cells = [text]
        if exact:
            values = atlas.eigvalsh(name)
            full = len(values) == shape.numel()
            low, high = (float(values[0]), float(values[-1])) if len(values) else (0.0, 0.0)
            low, high = (low, high) if full else (min(low, 0.0), max(high, 0.0))
            cells += [f"{atlas.trace(name):.3e}", f"{low:.1e}" if low else "0", f"{high:.3e}"]
        table.add_row(Text(name), f"{shape.numel():,}", *cells)
    return table


def _pairs(atlas: Atlas) -> RenderableType:
    norms = atlas.norms()
    found = sorted(((c, pair) for pair, c in coupling(atlas).items() if pair[0] != pair[1]), reverse=True)
    if not found:
        return Text()
    table = _table("row", "column", "‖·‖ Frobenius", "coupling")
    table.title, table.title_justify = "\nMost coupled pairs: ‖ab‖ / √(‖aa‖ ‖bb‖)", "left"
    table.title_style = "dim"
    for value, (a, b) in found[:_MAX_PAIRS]:
        text = norms.text(a, b) if isinstance(norms, EstimatedNorms) else f"{norms[a, b]:.3e}"
        table.add_row(Text(a), Text(b), text, f"{value:.3f}")
    return table
