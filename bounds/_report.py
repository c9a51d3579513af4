"""``dagh.bounds.report``: every bound that applies to a model, and the reason for each that does not."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dagh
from dagh.errors import DaghError, ReductionError, ShapeError, UnknownNameError

from ._curvature import Curvature, curvature_of, for_targets, largest_share
from ._foreign import foreign_statements, foreign_value
from ._ladder import Problem
from ._logs import flat, text
from ._rows import EXACT, EXACT_PARAMETERS, ROWS, Work
from ._statements import STATEMENTS, Needs, Origin, Part, Statement
from ._structure import Absent, Structure


@dataclass(frozen=True)
class BoundRow:
    """One bound: ``log_value`` is its natural logarithm, ``None`` where it is absent for the ``reason`` given.

    ``log_ratio`` is that of bound over truth where the truth is known, ``per_layer`` the logarithms of what each
    parameter (weight and bias together in some rows) adds to the value.
    """

    id: str
    statement: str
    source: str
    origin: Origin
    needs: Needs
    part: Part
    text: str
    log_value: float | None
    reason: str | None
    verdict: str | None
    log_ratio: float | None = None
    per_layer: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Bound over truth; infinite where that overflows."""
        if self.log_ratio is None:
            return None
        return math.exp(self.log_ratio) if self.log_ratio < 700 else math.inf

    @property
    def value(self) -> float | None:
        """The value as a number; infinite where it overflows (``log_value`` does not)."""
        if self.log_value is None:
            return None
        return math.exp(self.log_value) if self.log_value < 700 else math.inf

    def __str__(self) -> str:
        return f"{self.id}: {text(self.log_value) if self.reason is None else 'absent: ' + self.reason}"


@dataclass(frozen=True)
class BoundReport:
    """Rows in the order of the ladder; ``report["b2"]`` is one of them."""

    model: str
    rows: tuple[BoundRow, ...]
    info: dict[str, Any]
    matches: tuple[Any, ...] = ()

    def __getitem__(self, row: str) -> BoundRow:
        for one in self.rows:
            if one.id == row:
                return one
        raise UnknownNameError.of("bound", row, [r.id for r in self.rows])

    def __iter__(self) -> Iterator[BoundRow]:
        return iter(self.rows)

    def __contains__(self, row: object) -> bool:
        return any(one.id == row for one in self.rows)

    @property
    def present(self) -> tuple[BoundRow, ...]:
        """Rows with a value."""
        return tuple(row for row in self.rows if row.log_value is not None)

    @property
    def absent(self) -> tuple[BoundRow, ...]:
        """Rows without one."""
        return tuple(row for row in self.rows if row.log_value is None)

    def table(self, *, layers: bool = False) -> Any:
        """A ``rich`` table; with ``layers``, what every parameter adds."""
        from ._render import table

        return table(self, layers)

    def __rich__(self) -> Any:
        return self.table()

    def __str__(self) -> str:
        from ._render import plain

        return plain(self)

    def _repr_html_(self) -> str:
        return self.to_html()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, finite numbers and ``None`` only."""
        rows = []
        for row in self.rows:
            one = asdict(row)
            one["value"] = None if row.log_value is None else text(row.log_value, 6)
            one["ratio"] = None if row.log_ratio is None else text(row.log_ratio, 6)
            for key in ("log_value", "log_ratio"):
                one[key] = _finite(one[key])
            one["per_layer"] = {k: _finite(v) for k, v in row.per_layer.items()}
            rows.append(one)
        return {"model": self.model, "info": self.info, "rows": rows}

    def to_json(self, indent: int | None = 2) -> str:
        """:meth:`to_dict` as JSON; an exact zero has ``log_value`` null and ``value`` "0"."""
        import json

        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def to_latex(self) -> str:
        """A ``tabular`` with booktabs rules."""
        from ._render import latex

        return latex(self)

    def to_html(self) -> str:
        """A self-contained table."""
        from ._render import html

        return html(self)

    def plot(self, path: str | Path, part: Part = "H_O") -> None:
        """Draw the ladder on a logarithmic axis (needs matplotlib)."""
        from ._render import plot

        plot(self, path, part)


def report(
    model: nn.Module | dagh.Graph,
    loss: Any = "cross_entropy",
    inputs: Any = None,
    targets: Any = None,
    *,
    example: Any = None,
    rows: str | Sequence[str] | None = None,
    radius: float | None = None,
    input_norm: float | None = None,
    curvature: float | None = None,
    memory_budget: int | str | None = None,
    exact_parameters: int = EXACT_PARAMETERS,
    match: bool = True,
) -> BoundReport:
    """Every bound on the Hessian norms of a model that applies, on the mean loss over a batch.

    Args:
        model: a module or a traced graph.
        loss: as in :func:`dagh.hessian`.
        inputs: a batch; without it only what follows from the weights is given.
        targets: its targets; ``None`` for a loss of the output alone.
        example: without ``inputs``: an example of them to trace the model with, or the shape of one sample.
        rows: ids of the rows wanted, as in :data:`STATEMENTS`; nothing else is computed. Default: all.
        radius: R of the ball of parameters, for the rows ``….ball``.
        input_norm: X with ‖x‖ ≤ X for the rows that need weights only. Default: the largest norm in the batch or the
            example; √(number of entries) for a shape, that is entries within [−1, 1].
        curvature: ``sup ‖∂²ℓ/∂z²‖`` of a loss that is not known by name, ℓ the loss of a batch of one. What a sample
            weighs in a larger batch is found from the loss's gradients; without inputs the loss is taken to be a mean,
            unless it is a module that sums. Where a loss does not split into samples, that of the whole batch.
        memory_budget: of the Gram matrices.
        exact_parameters: up to this many parameters ‖H‖ and ‖H_F‖ are found from eigenvalues.
        match: ask the installed architecture plug-ins what they recognize (``report.matches``), and give the bounds
            that plug-ins of other packages bring along.

    Raises:
        ShapeError: neither inputs nor example. UnknownNameError: an unknown row. DaghError: as :func:`dagh.trace`.
    """
    rows = [rows] if isinstance(rows, str) else rows
    if rows is not None and not (isinstance(rows, Iterable) and all(isinstance(row, str) for row in rows)):
        raise ReductionError(f"rows={rows!r}: expected ids of bounds, as ['a3', 'b2']")
    wanted = list(ROWS) if rows is None else list(rows)
    if not match:
        _check_rows(wanted, ROWS)
    for name, value in (("radius", radius), ("input_norm", input_norm), ("curvature", curvature)):
        if value is not None and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
            raise ReductionError(f"{name}={value!r}: expected a non-negative number")
    if rows is None and radius is None:
        wanted = [row for row in wanted if not row.endswith(".ball")]
    work, info = _prepare(
        model, loss, inputs, targets, example, radius, input_norm, curvature, memory_budget, exact_parameters
    )
    for exact in EXACT.values():
        if exact in wanted:
            with contextlib.suppress(Absent):
                work.value(exact)
    matches = _matches(work.graph) if match and (rows is None or not set(wanted) <= set(ROWS)) else ()
    foreign = foreign_statements(matches)
    _check_rows(wanted, [*ROWS, *foreign])
    for row, (statement, where) in foreign.items():
        wanted += [row] if rows is None else []
        try:
            work.values[row] = foreign_value(work, statement, where)
        except Absent as reason:
            work.values[row] = reason
    statements = {**STATEMENTS, **{row: statement for row, (statement, _) in foreign.items()}}
    found = [_row(work, row, statements[row]) for row in wanted]
    return BoundReport(type(work.graph.model).__name__, tuple(found), info, matches)


def _prepare(
    model: nn.Module | dagh.Graph, loss: Any, inputs: Any, targets: Any, example: Any, radius: float | None,
    input_norm: float | None, curvature: float | None, memory_budget: Any, exact_parameters: int,
) -> tuple[Work, dict[str, Any]]:  # fmt: skip
    has_data = inputs is not None
    used, assumed = (inputs, None) if has_data else _example(model, example)
    graph = model if isinstance(model, dagh.Graph) else dagh.trace(model, used)
    state = graph.evaluate(loss, used, targets) if has_data else graph.evaluate(_total, used)
    structure = Structure(state, tuple(graph.trainable))
    weight = float(state.weights.max()) * state.samples if has_data else None
    summed = not has_data and getattr(loss, "reduction", None) == "sum"
    if summed:
        weight = float(state.samples)
    if curvature is None:
        constants = curvature_of(loss, tuple(structure.program.output.shape), weight)
    else:
        constants = _given(loss, structure, targets if has_data else _NONE, weight, curvature)
    if summed and assumed is not None:
        constants = Curvature(
            None, reason="the loss sums over samples, and a shape does not tell how many; pass a batch as example="
        )
    if curvature is None:
        constants = for_targets(constants, loss, targets)
    norms = _norms(structure)
    largest = max(norms, default=0.0)
    note = "largest ‖x‖ of the batch" if has_data else "‖x‖ of the example"
    if input_norm is not None:
        if has_data and largest > input_norm * (1 + 1e-9):
            raise ReductionError(f"input_norm={input_norm:g} is below the largest ‖x‖ of the batch, {largest:g}")
        largest, note = float(input_norm), "given"
    elif assumed is not None:
        largest, note = assumed, "assumed: entries within [−1, 1]"
    problem = Problem(structure, constants, math.log(largest) if largest > 0 else -math.inf)
    work = Work(problem, graph, loss if has_data else None, inputs, targets, radius, memory_budget, exact_parameters)
    info = {
        "loss": loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__),
        "samples": state.samples if has_data else 0,
        "parameters": sum(structure.program.parameters[n].numel for n in structure.names),
        "input_norm": largest,
        "input_norm_from": note,
        "radius": radius,
        "dtype": str(state.weights.dtype).removeprefix("torch."),
        "coupled": state.coupled,
    }
    return work, info


#: There are no targets, because there are no data.
_NONE = object()


def _given(loss: Any, structure: Structure, targets: Any, weight: float | None, curvature: float) -> Curvature:
    """The constants of a loss whose curvature on one sample the caller knows."""
    state, output = structure.state, structure.program.output
    if isinstance(loss, str) and weight is not None:
        parts = math.prod(output.shape) // (output.shape[1] if loss in ("cross_entropy", "nll") else 1)
        return Curvature(curvature * weight * parts)
    if targets is _NONE:
        return Curvature(curvature * (1.0 if weight is None else weight))
    # Where the samples are coupled, the whole batch is one.
    share = largest_share(loss, structure.value(output).flatten(0, 1), targets)
    if share is None and not state.coupled:
        return Curvature(None, reason="the loss of the batch is no weighted sum of losses of single samples")
    return Curvature(curvature * (1.0 if share is None else share * state.samples))


def _example(model: nn.Module | dagh.Graph, example: Any) -> tuple[Any, float | None]:
    """Something to trace the model with, and X where only a shape is known."""
    if example is None:
        raise ShapeError("without inputs, pass example=: a tensor like the inputs, or the shape of one sample")
    if isinstance(example, (list, tuple)) and example and all(isinstance(n, int) for n in example):
        module = model.model if isinstance(model, dagh.Graph) else model
        like = next((p for p in module.parameters() if p.dtype.is_floating_point), torch.empty((), device="cpu"))
        generator = torch.Generator().manual_seed(0)
        x = torch.rand((2, *example), generator=generator, dtype=torch.float64, device="cpu")
        return x.to(like.dtype).to(like.device), math.sqrt(math.prod(example))
    if not any(isinstance(t, Tensor) for t in pytree.tree_leaves(example)):
        raise ShapeError(f"example={example!r}: expected a tensor like the inputs, or the shape of one sample")
    return example, None


def _total(output: Tensor) -> Tensor:
    return output.sum()


def _norms(structure: Structure) -> list[float]:
    """‖x‖ of every sample; the largest over several inputs."""
    inputs = [n for n in structure.program if n.kind == "input" and n.dtype.is_floating_point]
    return [float(v) for n in inputs for v in flat(structure.value(n).double()).norm(dim=1)]


def _check_rows(wanted: Sequence[str], known: Collection[str]) -> None:
    for row in wanted:
        if row not in known:
            raise UnknownNameError.of("bound", row, known)


def _row(work: Work, row: str, statement: Statement) -> BoundRow:
    value = reason = ratio = None
    layers: dict[str, float] = {}
    try:
        found = work.value(row)
        value, layers = found.log, found.per_layer
    except Absent as absence:
        reason = str(absence)
    exact = EXACT[statement.part]
    if value is not None and exact in work.values and not isinstance(work.values[exact], Absent):
        ratio = _ratio(value, work.value(exact).log)
    return BoundRow(
        row, statement.name, statement.source, statement.origin, statement.needs, statement.part, statement.text,
        value, reason, statement.verdict, ratio, layers,
    )  # fmt: skip


def _ratio(bound: float, truth: float) -> float | None:
    if truth == -math.inf:
        return None
    return bound - truth


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _matches(graph: dagh.Graph) -> tuple[Any, ...]:
    """What the installed architecture plug-ins recognize, if there are any."""
    try:
        plugins = importlib.import_module("dagh.architectures")
    except ImportError:
        return ()
    try:
        return tuple(plugins.recognize(graph))
    except DaghError:
        return ()
