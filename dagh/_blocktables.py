"""What a block matrix is described with: classes of blocks, tables of norms, byte counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from torch import Tensor

from dagh._notebook import Shown
from dagh.errors import BlockNotComputedError, MemoryBudgetError, ShapeError, UnknownNameError

KINDS = ("zero", "H_O", "H_F", "H_O+H_F")
PARTS = {
    "full": "full Hessian",
    "outer": "outer-product Hessian",
    "functional": "functional Hessian",
    "combination": "combination of Hessians",
}

Pair = tuple[int, int]


def join_kinds(first: str, second: str) -> str:
    """The structural class of a sum of two blocks."""
    terms = {t for kind in (first, second) for t in kind.split("+")} - {"zero"}
    return "+".join(t for t in ("H_O", "H_F") if t in terms) or "zero"


def join_parts(first: str, second: str, sign: int) -> str:
    """Which part of the Hessian ``first + sign * second`` is."""
    if sign < 0:
        table = {("full", "outer"): "functional", ("full", "functional"): "outer"}
    else:
        table = {("outer", "functional"): "full", ("functional", "outer"): "full"}
    return first if first == second else table.get((first, second), "combination")


def restrict_kind(kind: str, part: str) -> str:
    """The structural class of a block within one part of the Hessian."""
    only = {"outer": "H_O", "functional": "H_F"}.get(part)
    return kind if only is None else only if only in kind else "zero"


def format_bytes(count: float) -> str:
    """``1.5 GiB`` and the like."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def free_bytes(device: torch.device) -> int | None:
    """Bytes free on a device, None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def check_budget(what: str, needed: int, budget: int | None, device: torch.device, cheaper: str) -> None:
    """``MemoryBudgetError`` when ``needed`` bytes exceed ``budget`` (None: no check)."""
    if budget is None or needed <= budget:
        return
    free = free_bytes(device)
    free_text = "" if free is None else f", {format_bytes(free)} free"
    raise MemoryBudgetError(
        f"{what} needs {format_bytes(needed)}, over the memory budget of {format_bytes(budget)}{free_text}; "
        f"cheaper: {cheaper}"
    )


def find_name(index: dict[str, int], name: object, kind: str) -> int:
    """Position of ``name``, or ``UnknownNameError`` with close matches."""
    if isinstance(name, str) and name in index:
        return index[name]
    raise UnknownNameError.of(kind, str(name), index)


def no_such_block(names: Sequence[str], pairs: Sequence[Pair], a: int, b: int) -> BlockNotComputedError:
    """The error for a block outside the request, saying which blocks there are."""
    if set(pairs) == {(i, i) for i in range(len(names))}:
        held = "only the diagonal blocks were: take H.block_diagonal(), zero elsewhere, or single blocks"
    else:
        shown = ", ".join(f"({names[i]!r}, {names[j]!r})" for i, j in pairs[:6])
        more = f", … ({len(pairs)} in all)" if len(pairs) > 6 else ""
        held = f"computed: {shown or 'none'}{more}"
    return BlockNotComputedError(f"block ({names[a]!r}, {names[b]!r}) was not computed; {held}")


def unflatten(v: Tensor, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """A vector ``[P]``, or columns ``[P, k]``, by name: tensors ``[*shape]`` or ``[k, *shape]``."""
    size = sum(prod(shape) for shape in shapes.values())
    if not isinstance(v, Tensor) or v.dim() not in (1, 2) or v.shape[0] != size:
        shown = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
        raise ShapeError(f"v is {shown}; expected a tensor ({size},) or ({size}, k)")
    parts = torch.split(v, [prod(shape) for shape in shapes.values()])
    named = zip(shapes.items(), parts, strict=True)
    return {name: part.movedim(0, -1).reshape(*v.shape[1:], *shape) for (name, shape), part in named}


class NormTable(Shown):
    """Norms of the blocks of a symmetric matrix: ``table["a", "b"]`` in either order.

    A value is a float, or an array [N] for per-sample blocks. Iterating gives the pairs that were computed.
    """

    def __init__(self, kind: str, names: Sequence[str], values: dict[Pair, Any], samples: int | None) -> None:
        self.kind = kind
        self.names = tuple(names)
        self.samples = samples
        self._index = {name: i for i, name in enumerate(names)}
        self._values = values

    def __getitem__(self, pair: tuple[str, str]) -> Any:
        i, j = (find_name(self._index, name, "parameter") for name in pair)
        key = (min(i, j), max(i, j))
        if key not in self._values:
            raise no_such_block(self.names, sorted(self._values), i, j)
        return self._values[key]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return ((self.names[i], self.names[j]) for i, j in sorted(self._values))

    def __len__(self) -> int:
        return len(self._values)

    def items(self) -> Iterator[tuple[tuple[str, str], Any]]:
        """``((a, b), norm)`` for every computed pair."""
        return ((pair, self[pair]) for pair in self)

    def to_numpy(self) -> np.ndarray[Any, Any]:
        """Symmetric array [(N,) n, n], NaN where a block was not computed."""
        lead = () if self.samples is None else (self.samples,)
        out = np.full((*lead, len(self.names), len(self.names)), np.nan)
        for (i, j), value in self._values.items():
            out[..., i, j] = out[..., j, i] = value
        return out

    def __str__(self) -> str:
        lines = [f"{a} × {b}: {np.array2string(np.asarray(v), precision=6)}" for (a, b), v in self.items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"NormTable({self.kind!r}, {len(self.names)} parameters, {len(self)} blocks)"

    def __rich__(self) -> Table:
        what = {"fro": "Frobenius norms", "spectral": "Spectral norms"}.get(self.kind, self.kind)
        table = Table(title=f"{what} of the blocks", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for column in ("rows", "columns", "norm"):
            table.add_column(column, justify="right" if column == "norm" else "left", no_wrap=column == "norm")
        for (a, b), value in self.items():
            table.add_row(
                Text(a), Text(b), f"{float(np.mean(value)):.4g}" + ("" if self.samples is None else " (mean)")
            )
        return table
