"""``dagh.gram``: the dual of the outer-product Hessian, and the neural tangent kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, cast

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from dagh import _memory
from dagh._blocktables import find_name
from dagh._gramsweep import gram_matrices
from dagh._graph import Graph, trace
from dagh._notebook import Shown
from dagh._objectives import Reduction
from dagh._outer import factor_loss
from dagh._programs import Mode
from dagh._request import choose_names
from dagh._state import State, non_finite
from dagh.errors import ReductionError, ShapeError, SingularError

Kind = Literal["outer", "ntk"]


class Gram(Shown):
    """``G = B Bᵀ`` of the rows ``B = Sᵀ J`` (H_O = Bᵀ diag(σ) B), in all and by parameter; made by :func:`dagh.gram`.

    Rows are ordered (sample, column of the loss factor). ``signs`` are the σ (``None``: all +1). Matrices are float64
    and as accurate as the model's dtype. ``kind="ntk"``: the rows are those of J, and the matrix is the kernel.
    """

    def __init__(
        self,
        names: Sequence[str],
        shapes: Sequence[Sequence[int]],
        matrices: Sequence[Tensor],
        *,
        kind: str,
        samples: int,
        signs: Tensor | None = None,
        modules: Sequence[str] | None = None,
        dtype: torch.dtype = torch.float64,
        ways: Sequence[str] = (),
        info: Mapping[str, Any] | None = None,
    ) -> None:
        self.names = tuple(names)
        self.shapes = tuple(torch.Size(s) for s in shapes)
        self.modules = tuple(names if modules is None else modules)
        self.kind = kind
        self.samples = samples
        self.signs = signs
        self.dtype = dtype
        self.ways = dict(zip(self.names, ways, strict=False))
        self.info: dict[str, Any] = dict(info or {})
        self.index = {name: i for i, name in enumerate(self.names)}
        self.matrices = list(matrices)
        self._spectra: dict[str | None, Tensor] = {}

    @property
    def sizes(self) -> dict[str, int]:
        """Number of entries of each parameter."""
        return {name: shape.numel() for name, shape in zip(self.names, self.shapes, strict=True)}

    @property
    def size(self) -> int:
        """P, the number of scalars."""
        return sum(self.sizes.values())

    @property
    def side(self) -> int:
        """N·r, the number of rows of the dual."""
        return int(self.matrices[0].shape[0])

    @cached_property
    def matrix(self) -> Tensor:
        """``Σ_l G_l``: ``[N·r, N·r]``."""
        total = self.matrices[0].clone()
        for piece in self.matrices[1:]:
            total += piece
        return total

    def of(self, name: str | None = None) -> Tensor:
        """``G_l`` of one parameter, ``[N·r, N·r]``; of all without a name. Raises ``UnknownNameError``."""
        return self.matrix if name is None else self.matrices[find_name(self.index, name, "parameter")]

    def factor(self, name: str | None = None) -> Tensor:
        """``F`` with ``F Fᵀ = G``: ``[N·r, k]``, columns of an eigendecomposition."""
        values, vectors = torch.linalg.eigh(self.of(name))
        used = values > 0
        return cast(Tensor, vectors[:, used] * values[used].sqrt())

    def eigvalsh(self, name: str | None = None) -> Tensor:
        """The non-zero eigenvalues of ``H_O`` (of its diagonal block of ``name``), ascending.

        Those of ``G`` where the loss is convex in the output; with signs, those of ``Fᵀ diag(σ) F``, symmetric as
        well. Eigenvalues below ``τ = N·r·eps·‖G‖`` (eps of the model's dtype) count as zero. Signs can cancel, to an
        H_O far smaller than G; what is then known is ``τ √(‖G‖ / γ)``, γ the least eigenvalue of G above τ: columns
        of F are known as well as its eigenvectors are.
        """
        if name not in self._spectra:
            size = self.size if name is None else self.sizes[name]
            values, known = self._spectrum(name)
            kept = values[values.abs() > known]
            if len(kept) > size:  # a block of p rows has p eigenvalues
                kept = kept[kept.abs().topk(size).indices].sort().values
            self._spectra[name] = kept
        return self._spectra[name]

    def _spectrum(self, name: str | None) -> tuple[Tensor, float]:
        """Eigenvalues of the dual, and to what they are known."""
        if self.side == 0:
            return self.matrix.new_zeros(0), 0.0
        rounding = self.side * torch.finfo(self.dtype).eps
        if self.signs is None:
            values = torch.linalg.eigvalsh(self.of(name))
            return values, rounding * float(values.abs().max())
        values, vectors = torch.linalg.eigh(self.of(name))
        largest = max(float(values[-1]), 0.0)
        known = rounding * largest
        # Directions below rounding would meet the largest ones as √(eps)‖G‖ where those cancel.
        used = values > known
        if not bool(used.any()):
            return values.new_zeros(0), 0.0
        f = vectors[:, used] * values[used].sqrt()
        least = float(values[used][0])
        return torch.linalg.eigvalsh(f.T @ (self.signs[:, None] * f)), known * math.sqrt(largest / least)

    def lambda_max(self, name: str | None = None) -> float:
        """The largest eigenvalue of ``H_O`` or of a diagonal block."""
        values, size = self.eigvalsh(name), self.size if name is None else self.sizes[name]
        largest = float(values[-1]) if len(values) else 0.0
        return largest if len(values) == size else max(largest, 0.0)

    def logdet(self, damping: float, name: str | None = None) -> float:
        """``log det(H_O + damping·I)`` of the P × P matrix, or of a diagonal block, from its non-zero eigenvalues.

        Raises :class:`~dagh.errors.SingularError` where it is not positive definite.
        """
        values, size = self.eigvalsh(name).double(), self.size if name is None else self.sizes[name]
        if not damping > 0 or bool((values <= -damping).any()):
            raise SingularError(f"H_O + {damping:g}·I is not positive definite: give a larger damping")
        return size * math.log(damping) + float(torch.log1p(values / damping).sum())

    def rank(self, name: str | None = None) -> int:
        """How many eigenvalues are told from zero in the model's dtype: those of :meth:`eigvalsh`.

        In float32 that is about 1e-5 of the largest one; for the rank proper, take the model in float64.
        """
        return len(self.eigvalsh(name))

    def trace(self, name: str | None = None) -> float:
        """Trace of ``H_O`` or of a diagonal block (of the kernel, ``kind="ntk"``)."""
        diagonal = self.of(name).diagonal()
        return float(diagonal.sum() if self.signs is None else (self.signs * diagonal).sum())

    def fro(self, name: str | None = None) -> float:
        """Frobenius norm of ``H_O`` or of a diagonal block."""
        g = self.of(name)
        if self.signs is None:
            return float(g.norm())
        square = g.square()
        total = self.signs @ square @ self.signs
        if total > torch.finfo(self.dtype).eps ** 0.5 * square.sum():
            return float(total.sqrt())
        return float(self.eigvalsh(name).norm())  # signs that cancel leave half of the digits of the sum

    def __repr__(self) -> str:
        what = "neural tangent kernel" if self.kind == "ntk" else "dual of H_O"
        signed = "" if self.signs is None else ", signed"
        return (
            f"Gram({what}, {self.side} × {self.side}, {len(self.names)} parameters, P={self.size}, "
            f"{str(self.dtype).removeprefix('torch.')}{signed})"
        )

    def __rich__(self) -> Table:
        table = Table(title=repr(self), title_justify="left", box=None, pad_edge=False)
        table.add_column("parameter")
        for head in ("size", "trace", "λ max", "rank"):
            table.add_column(head, justify="right", no_wrap=True)
        for name in (*self.names, None):
            size = self.size if name is None else self.sizes[name]
            row = (f"{size:,}", f"{self.trace(name):.4g}", f"{self.lambda_max(name):.4g}", str(self.rank(name)))
            table.add_row(Text("all" if name is None else name), *row, style="bold" if name is None else "")
        return table


def gram(
    model: nn.Module | Graph,
    loss: Any,
    inputs: Any,
    targets: Any = None,
    *,
    params: Any = None,
    reduction: Reduction = "mean",
    kinks: Any = "torch",
    memory_budget: int | str | None = None,
    output: str | int | None = None,
    mode: Mode = "eval",
    kind: Kind = "outer",
) -> Gram:
    """The N·r × N·r dual of the outer-product Hessian: its exact non-zero spectrum without a P × P matrix.

    ``∇²ℓ = S diag(σ) Sᵀ`` per sample, ``B = Sᵀ J`` (weights of the loss included), ``H_O = Bᵀ diag(σ) B``: the non-zero
    eigenvalues of H_O are those of the dual ``diag(σ) B Bᵀ``, whatever P is. One matrix per parameter is formed;
    gradients are streamed. With r columns of the loss factor per sample (the outputs, as a rule) it costs N·r backward
    passes, and (parameters + 3)·(N·r)²·8 bytes.

    Arguments are those of :func:`dagh.hessian`, with ``reduction`` ``"mean"`` or ``"sum"``, and ``kind``: ``"outer"``,
    or ``"ntk"``, ``J Jᵀ`` over all outputs: the empirical neural tangent kernel (Jacot, Gabriel & Hongler 2018), which
    needs no loss (give ``None``).

    Raises:
        MemoryBudgetError: the Gram matrices do not fit.
        ReductionError: ``reduction="none"``, or an unknown ``kind``.
    """
    if kind not in ("outer", "ntk"):
        raise ReductionError(f"kind={kind!r}: expected 'outer' or 'ntk'")
    if reduction not in ("mean", "sum"):
        raise ReductionError(f"reduction={reduction!r}: a Gram matrix is over all samples; expected 'mean' or 'sum'")
    if kind == "ntk":
        loss, targets = _total, None
    budget = _memory.parse_size(memory_budget) if isinstance(memory_budget, str) else memory_budget
    graph = model if isinstance(model, Graph) else trace(model, inputs, mode=mode, output=output)
    names, _ = choose_names(graph.program, graph.trainable, params, None)
    state = graph._evaluate(loss, inputs, targets, reduction=reduction, kinks=kinks, wrt=names)
    names, _ = choose_names(state.program, graph.trainable, params, None)
    return gram_of(state, names, kind, budget)


def gram_of(
    state: State,
    names: Sequence[str],
    kind: str = "outer",
    budget: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> Gram:
    """The dual at a state, for parameters ``names``."""
    program = state.program
    leaves = [program.parameters[name] for name in names]
    if not leaves:
        raise ShapeError("name at least one parameter")
    columns, signs = _columns(state, kind)
    with torch.no_grad():
        matrices, ways = gram_matrices(
            state, columns, leaves, _memory.budget_bytes(budget, state.weights.device), advance
        )
    if not all(bool(torch.isfinite(g).all()) for g in matrices):
        assert program.loss is not None
        raise non_finite(program, state.values, program.loss)
    return Gram(
        names,
        [leaf.shape for leaf in leaves],
        matrices,
        kind=kind,
        samples=state.samples,
        signs=signs,
        modules=[name.rpartition(".")[0] for name in names],
        dtype=state.weights.dtype,
        ways=ways,
        info={"samples": state.samples, "columns": columns.shape[1], "coupled": state.coupled},
    )


def _columns(state: State, kind: str) -> tuple[Tensor, Tensor | None]:
    """What is pulled back, ``[N, r, *output]``, and the signs ``[N·r]``."""
    node, n = state.program.output, state.samples
    if kind == "ntk":
        like = state.values[node]
        eye = torch.eye(node.numel, dtype=like.dtype, device=like.device)
        return eye.reshape(1, node.numel, *node.shape).expand(n, -1, *node.shape), None
    factor = factor_loss(state)
    columns = factor.columns.expand(n, *factor.columns.shape[1:])
    signs = None if factor.signs is None else factor.signs.expand(n, -1).reshape(-1).double()
    return columns, signs


def _total(output: Tensor) -> Tensor:
    return output.sum()
