"""How each row of a report is computed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch

import dagh
from dagh.errors import DaghError

from . import _averaged as averaged
from . import _functional as functional
from . import _ladder as ladder
from . import _multipliers as multipliers
from . import _published as paper
from ._chain import Chain, chain_of
from ._ladder import Dual, Problem, Value
from ._logs import add, log
from ._structure import Absent

Form = Literal["printed", "corrected"]

#: Parameters up to which the exact Hessian is formed and its eigenvalues found.
EXACT_PARAMETERS = 2_500


class RowWarning(UserWarning):
    """A row failed in a way that nobody foresaw: a defect. The tests turn it into an error."""


@dataclass
class Work:
    """Everything rows share; each piece is computed when first needed."""

    problem: Problem
    graph: dagh.Graph
    loss: Any
    inputs: Any
    targets: Any
    radius: float | None
    memory_budget: int | str | None
    exact_parameters: int = EXACT_PARAMETERS
    values: dict[str, Value | Absent] = field(default_factory=dict)

    @property
    def has_data(self) -> bool:
        """Whether the state holds real inputs and targets."""
        return self.loss is not None and self.inputs is not None

    @cached_property
    def chain(self) -> Chain:
        """The model as a chain; raises :class:`Absent`."""
        return chain_of(self.problem.structure)

    @cached_property
    def dual(self) -> Dual:
        """The Gram matrix of the batch."""
        self.need_data()
        gram = dagh.gram(self.graph, self.loss, self.inputs, self.targets, memory_budget=self.memory_budget)
        layers: dict[Any, list[str]] = {}
        for name in gram.names:
            uses = self.problem.structure.uses[name]
            key = uses[0].node if len(uses) == 1 and uses[0].node.operation in ("linear", "convolution") else name
            layers.setdefault(key, []).append(name)
        return Dual(gram, layers.values())

    def need_data(self) -> None:
        """Raise where there are none."""
        if not self.has_data:
            raise Absent("needs inputs and targets")

    def value(self, row: str) -> Value:
        """The value of a row, computed once; raises :class:`Absent`."""
        if row not in self.values:
            try:
                self.values[row] = ROWS[row](self)
            except Absent as reason:
                self.values[row] = reason
            except DaghError as reason:
                self.values[row] = Absent(str(reason))
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # it is there, and documented
                self.values[row] = Absent("a norm cannot be found: derivatives at the data are not finite")
            except MemoryError:
                raise
            except Exception as error:  # one row must not take the others with it
                what = " ".join(f"{type(error).__name__}: {error}".split())
                warnings.warn(RowWarning(f"bounds: row {row} failed, {what}"), stacklevel=2)
                self.values[row] = Absent(f"failed: {what}")
        found = self.values[row]
        if isinstance(found, Absent):
            raise found
        return found

    def exact_norm(self, part: str) -> Value:
        """Norm of H or H_F by eigenvalues, where the parameters are few."""
        self.need_data()
        size = sum(self.problem.structure.program.parameters[n].numel for n in self.problem.structure.names)
        if size > self.exact_parameters:
            raise Absent(f"{size:,} parameters; eigenvalues are found up to {self.exact_parameters:,}")
        call = dagh.functional_hessian if part == "H_F" else dagh.hessian
        matrix = call(self.graph, self.loss, self.inputs, self.targets, memory_budget=self.memory_budget)
        return Value(log(float(torch.linalg.eigvalsh(matrix.dense().double()).abs().max())))


# -- published -------------------------------------------------------------------------------------


def _statement(
    formula: Callable[..., float], form: Form, axes: int, *, pools: str = "", head: bool = False
) -> Callable[[Work], Value]:
    """A row of one published statement, on the networks that it is about."""

    def compute(work: Work) -> Value:
        chain = work.chain
        paper.check_shape(chain, axes, pools=bool(pools), head=head)
        (paper.check_plain if form == "printed" else paper.check_slopes)(chain)
        if form == "corrected" or pools:
            paper.check_pools(chain, (pools,) if pools else ("max", "avg"))
        return _evaluate(work, formula, form)

    return compute


def _composite(form: Form) -> Callable[[Work], Value]:
    def compute(work: Work) -> Value:
        chain = work.chain
        if form == "printed":
            paper.check_bias(chain)
            paper.check_copies(chain)
            if not chain.homogeneous():
                raise Absent("an activation is not of the form x = Λ z that the paper assumes")
        else:
            paper.check_slopes(chain)
        if form == "corrected" or any(layer.pools for layer in chain.layers):
            paper.check_pools(chain)
        return _evaluate(work, paper.composite, form)

    return compute


def _evaluate(work: Work, formula: Callable[..., float], form: Form) -> Value:
    dims = paper.dims_of(work.chain, form)
    sup = 0.0 if form == "printed" else work.problem.curvature.log_sup()
    return Value(formula(dims, work.problem.log_input, sup, form))


def _lemma2(form: Form) -> Callable[[Work], Value]:
    def compute(work: Work) -> Value:
        chain = work.chain
        paper.check_slopes(chain)
        for layer in chain.layers:
            if any(not pool.plain for pool in layer.pools):
                raise Absent("pooling windows overlap or are summed, so that ‖Λ‖ may exceed 1")
        q = math.sqrt(max(layer.facts.reuse for layer in chain.layers))
        w_T = max(layer.facts.tau for layer in chain.layers)
        sup = 0.0 if form == "printed" else work.problem.curvature.log_sup()
        return Value(paper.lemma2(q, w_T, len(chain.layers), work.problem.log_input, sup, form))

    return compute


# -- ours ------------------------------------------------------------------------------------------


def _ball(compute: Callable[[Problem, float], Value]) -> Callable[[Work], Value]:
    def row(work: Work) -> Value:
        if work.radius is None:
            raise Absent("needs radius=")
        return compute(work.problem, work.radius)

    return row


def _at_data(compute: Callable[[Problem], Value]) -> Callable[[Work], Value]:
    def row(work: Work) -> Value:
        work.need_data()
        return compute(work.problem)

    return row


def _sum(first: str, second: str) -> Callable[[Work], Value]:
    return lambda work: Value(add(work.value(first).log, work.value(second).log))


ROWS: dict[str, Callable[[Work], Value]] = {
    "P.L2": _lemma2("printed"),
    "P.T1": _statement(paper.theorem1, "printed", 1),
    "P.T2": _statement(paper.theorem2, "printed", 2),
    "P.L3": _statement(paper.lemma3, "printed", 2, pools="max"),
    "P.L4": _statement(paper.lemma4, "printed", 2, pools="avg"),
    "P.L5": _statement(paper.lemma5, "printed", 2, head=True),
    "P0": _composite("printed"),
    "C.L2": _lemma2("corrected"),
    "C.T1": _statement(paper.theorem1, "corrected", 1),
    "C.T2": _statement(paper.theorem2, "corrected", 2),
    "C.L3": _statement(paper.lemma3, "corrected", 2, pools="max"),
    "C.L4": _statement(paper.lemma4, "corrected", 2, pools="avg"),
    "C.L5": _statement(paper.lemma5, "corrected", 2, head=True),
    "P1": _composite("corrected"),
    "a1": lambda work: ladder.a1(work.problem),
    "a2": lambda work: ladder.a2(work.problem),
    "a3": lambda work: ladder.a3(work.problem),
    "a4": lambda work: averaged.a4(work.problem, work.chain),
    "a5": lambda work: multipliers.a5(work.problem, work.chain),
    "b0": _at_data(ladder.b0),
    "b1": _at_data(ladder.b1),
    "b2": _at_data(ladder.b2),
    "b3": lambda work: work.dual.b3(),
    "b3.mean": lambda work: work.dual.mean(),
    "b3.block": lambda work: work.dual.block(),
    "c": lambda work: work.dual.exact(),
    "F_a": lambda work: functional.F_a(work.problem),
    "F_b": _at_data(functional.F_b),
    "F_exact": lambda work: work.exact_norm("H_F"),
    "H.a3": _sum("a3", "F_a"),
    "H.b2": _sum("b2", "F_b"),
    "H.c": _sum("c", "F_b"),
    "H.exact": lambda work: work.exact_norm("H"),
    "a1.ball": _ball(ladder.a1),
    "a2.ball": _ball(ladder.a2),
    "a3.ball": _ball(ladder.a3),
    "F_a.ball": _ball(functional.F_a),
    "H.a3.ball": _sum("a3.ball", "F_a.ball"),
}

#: The exact row that each part of the Hessian is compared with.
EXACT = {"H_O": "c", "H_F": "F_exact", "H": "H.exact"}

#: Rows that are cheap, whatever the network.
WEIGHTS_ONLY = tuple(r for r in ROWS if r.startswith(("P", "C")) or r in ("a1", "a2", "a3", "a4", "a5", "F_a", "H.a3"))
