"""``dagh.atlas``: norms of every pair of blocks, spectra and traces of the diagonal ones, whatever the layer sizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from scipy.linalg import eigvalsh
from torch import Tensor, nn

from dagh import _memory
from dagh._blockmatrix import BlockMatrix
from dagh._blocktables import PARTS, NormTable, Pair, find_name
from dagh._gram import Gram, gram_of
from dagh._graph import Graph, trace
from dagh._hessian import functional_hessian, hessian
from dagh._notebook import Shown
from dagh._objectives import Reduction
from dagh._probes import EstimatedNorms, Probes, probe
from dagh._programs import Mode
from dagh._request import Request, choose_names, choose_pairs
from dagh._state import State
from dagh._structure import reach, structure
from dagh.errors import ReductionError

Part = Literal["outer", "functional", "full"]

#: Up to this P, blocks of H_F are formed; above, their norms are estimated.
_EXACT_SIZE = 2000
_PROBES = 16


class Atlas(Shown):
    """Norms of all pairs of blocks of H_O, H_F or H; made by :func:`dagh.atlas`.

    ``part="outer"``: exact, from ``gram``, one N·r × N·r matrix per parameter. Otherwise ``matrix`` holds exact blocks
    where P is small, and ``probes`` the samples of an estimate where it is not.
    """

    def __init__(
        self,
        names: Sequence[str],
        shapes: Sequence[Sequence[int]],
        modules: Sequence[str],
        *,
        part: str,
        reduction: str,
        gram: Gram | None = None,
        matrix: BlockMatrix | None = None,
        probes: Probes | None = None,
        members: Sequence[Sequence[int]] | None = None,
        info: dict[str, Any] | None = None,
    ) -> None:
        self.names, self.modules = tuple(names), tuple(modules)
        self.shapes = tuple(torch.Size(s) for s in shapes)
        self.part, self.reduction = part, reduction
        self.matrix, self.probes = matrix, probes
        self.info = dict(info or {})
        self.index = {name: i for i, name in enumerate(self.names)}
        self._gram = gram
        self._members = [[i] for i in range(len(self.names))] if members is None else [list(m) for m in members]
        self._tables: dict[str, NormTable] = {}

    @property
    def gram(self) -> Gram:
        """The dual of H_O. Raises ``ReductionError`` for another part."""
        if self._gram is None:
            raise ReductionError(f"the {PARTS[self.part]} has no Gram matrices; atlas(..., part='outer') has them")
        return self._gram

    @property
    def size(self) -> int:
        """P, the number of scalars."""
        return sum(shape.numel() for shape in self.shapes)

    @property
    def is_estimate(self) -> bool:
        """Whether any norm is an estimate."""
        return self.probes is not None and len(self.probes.exact) < len(self.probes.squares)

    # -- quantities --------------------------------------------------------------------------------

    def norms(self, kind: str = "fro") -> NormTable:
        """Norm of every pair: ``"fro"`` (Frobenius) or ``"spectral"`` (largest singular value).

        Estimates come as :class:`EstimatedNorms`, with ``stderr`` and ``is_exact``; there are none of spectral norms
        (``ReductionError``). Those of H_O are exact to rounding: norms below ``√eps`` of
        ``(‖H_aa‖ ‖H_bb‖)^½`` (3e-4 in float32, 1e-8 in float64) are rounding.
        """
        if kind not in ("fro", "spectral"):
            raise ReductionError(f"kind of norm is 'fro' or 'spectral', not {kind!r}")
        if kind not in self._tables:
            self._tables[kind] = self._norms(kind)
        return self._tables[kind]

    def _norms(self, kind: str) -> NormTable:
        if self.matrix is not None:
            return self.matrix.norms(kind)
        if self._gram is not None:
            found = frobenius(self._gram) if kind == "fro" else spectral(self._gram)
            return NormTable(kind, self.names, found, None)
        assert self.probes is not None
        if kind == "spectral":
            raise ReductionError("spectral norms are not estimated; name few parameters (params=), or part='outer'")
        values, errors, exact = {}, {}, set()
        for i, rows in enumerate(self._members):
            for j in range(i, len(self._members)):
                values[i, j], errors[i, j], known = self.probes.norm(rows, self._members[j])
                if known:
                    exact.add((i, j))
        return EstimatedNorms(kind, self.names, values, errors, exact)

    def eigvalsh(self, name: str) -> Tensor:
        """Eigenvalues of the diagonal block of ``name``, ascending; only the non-zero ones for H_O."""
        find_name(self.index, name, "parameter")
        if self.matrix is not None:
            values: Tensor = torch.linalg.eigvalsh(self.matrix[name, name])
            return values
        return self.gram.eigvalsh(name)

    def trace(self, name: str | None = None) -> float:
        """Trace of a diagonal block, or of the whole matrix."""
        if self.matrix is not None:
            return float(self.matrix.trace() if name is None else self.matrix.block(name, name).trace())
        return self.gram.trace(name)

    def group(self, by: str = "module", *, depth: int | None = None) -> Atlas:
        """The same with parameters merged per module (``"(root)"`` for the model itself), cut to ``depth`` levels."""
        if by != "module":
            raise ReductionError(f"blocks are grouped by 'module', not {by!r}")
        if depth is not None and depth < 1:
            raise ReductionError(f"depth is at least 1, not {depth}")
        members: dict[str, list[int]] = {}
        for i, path in enumerate(self.modules):
            key = path if depth is None else ".".join(path.split(".")[:depth])
            members.setdefault(key or "(root)", []).append(i)
        shapes = [(sum(self.shapes[i].numel() for i in held),) for held in members.values()]
        return Atlas(
            list(members),
            shapes,
            list(members),
            part=self.part,
            reduction=self.reduction,
            gram=None if self._gram is None else _grouped(self._gram, members, shapes),
            matrix=None if self.matrix is None else self.matrix.group(by, depth=depth),
            probes=self.probes,
            members=[[k for i in held for k in self._members[i]] for held in members.values()],
            info=self.info,
        )

    # -- forms -------------------------------------------------------------------------------------

    def to_dict(self, *, spectral: bool = False) -> dict[str, Any]:
        """Plain data: parameters with traces and largest eigenvalues, and every block with its norms."""
        from dagh._atlasview import as_dict

        return as_dict(self, spectral)

    def to_json(self, indent: int | None = 2, *, spectral: bool = False) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(spectral=spectral), indent=indent, allow_nan=False)

    def plot(self, path: str | Path, kind: str = "fro") -> None:
        """Draw the map of norms to a PNG, SVG or PDF file; needs matplotlib (``pip install 'dagh[plot]'``)."""
        from dagh._atlasplot import draw

        draw(self, Path(path), kind)

    def __repr__(self) -> str:
        what = "estimated" if self.is_estimate else "exact"
        side = "" if self._gram is None else f", dual {self._gram.side} × {self._gram.side}"
        return f"Atlas({PARTS[self.part]}, {len(self.names)} parameters, P={self.size}{side}, {what})"

    def __rich__(self) -> Any:
        from dagh._atlasview import renderable

        return renderable(self)


def frobenius(gram: Gram) -> dict[Pair, float]:
    """``‖H_O[l,m]‖_F² = ⟨Σ G_l Σ, G_m⟩`` for every pair, a few rows of the matrices at a time."""
    count, side = len(gram.names), gram.side
    total = torch.zeros(count, count, dtype=torch.float64, device=gram.matrices[0].device)
    step = max(1, 2**24 // max(1, count * side))
    for start in range(0, side, step):
        window = slice(start, start + step)
        block = torch.stack([g[window].flatten() for g in gram.matrices])
        if gram.signs is None:
            total += block @ block.T
        else:
            total += (block * torch.outer(gram.signs[window], gram.signs).flatten()) @ block.T
    values = total.clamp(min=0).sqrt().cpu()
    return {(i, j): float(values[i, j]) for i in range(count) for j in range(i, count)}


def spectral(gram: Gram) -> dict[Pair, float]:
    """``‖H_O[l,m]‖₂``, the largest singular value of ``F_lᵀ Σ F_m`` with ``F Fᵀ = G``, for every pair."""
    factors = [gram.factor(name) for name in gram.names]
    values = {}
    for i, left in enumerate(factors):
        turned = left.T if gram.signs is None else (gram.signs[:, None] * left).T
        for j in range(i, len(factors)):
            core = turned @ factors[j]
            square = core @ core.T if core.shape[0] <= core.shape[1] else core.T @ core
            # Thousands of small matrices: LAPACK by itself is several times quicker on them than torch.
            top = float(eigvalsh(square.cpu().numpy())[-1]) if square.numel() else 0.0
            values[i, j] = max(top, 0.0) ** 0.5
    return values


def _grouped(gram: Gram, members: dict[str, list[int]], shapes: Sequence[Sequence[int]]) -> Gram:
    """Rows of several parameters side by side: their Gram matrices add up."""
    matrices = []
    for held in members.values():
        total = gram.matrices[held[0]]
        for i in held[1:]:
            total = total + gram.matrices[i]
        matrices.append(total)
    return Gram(
        list(members), shapes, matrices, kind=gram.kind, samples=gram.samples, signs=gram.signs,
        dtype=gram.dtype, info=gram.info,
    )  # fmt: skip


def atlas(
    model: nn.Module | Graph,
    loss: Any,
    inputs: Any,
    targets: Any = None,
    *,
    part: Part = "outer",
    params: Any = None,
    reduction: Reduction = "mean",
    kinks: Any = "torch",
    memory_budget: int | str | None = None,
    output: str | int | None = None,
    mode: Mode = "eval",
    probes: int | None = None,
    seed: int = 0,
) -> Atlas:
    """Frobenius and spectral norms of every pair of blocks of H_O, exactly, however large the layers are.

    With the rows ``B_l`` of :func:`dagh.gram` and ``G_l = B_l B_lᵀ``: ``‖H_O[l,m]‖_F² = ⟨G_l, G_m⟩``,
    ``‖H_O[l,m]‖₂² = λ_max(G_l G_m)``, ``tr H_O[l,l] = tr G_l``, and the non-zero eigenvalues of ``H_O[l,l]`` are those
    of ``G_l`` (with the signs of the loss curvature where it is indefinite). Cost and memory are those of
    :func:`dagh.gram`.

    Arguments are those of :func:`dagh.hessian`, with ``reduction`` ``"mean"`` or ``"sum"``, and

    - ``part``: ``"outer"``; or ``"functional"`` and ``"full"``, H_F and H: exact up to P = 2000; beyond, pairs that
      vanish by structure are exact and the others estimated, with standard errors, from products with random
      directions.
    - ``probes``: directions per parameter of that estimate (2 or more); when given, it is used at any P. Default: 16.
    - ``seed``: of the directions.

    Raises:
        MemoryBudgetError: the Gram matrices do not fit.
        ReductionError: an unknown ``part``, ``reduction="none"`` or fewer than two probes.
    """
    if part not in ("outer", "functional", "full"):
        raise ReductionError(f"part={part!r}: expected 'outer', 'functional' or 'full'")
    if reduction not in ("mean", "sum"):
        raise ReductionError(f"reduction={reduction!r}: an atlas is over all samples; expected 'mean' or 'sum'")
    if probes is not None and (isinstance(probes, bool) or not isinstance(probes, int) or probes < 2):
        raise ReductionError(f"probes={probes!r}: expected a whole number of at least 2, or None")
    budget = _memory.parse_size(memory_budget) if isinstance(memory_budget, str) else memory_budget
    graph = model if isinstance(model, Graph) else trace(model, inputs, mode=mode, output=output)
    names, leaves = choose_names(graph.program, graph.trainable, params, None)
    if part != "outer" and probes is None and sum(leaf.numel for leaf in leaves) <= _EXACT_SIZE:
        form = hessian if part == "full" else functional_hessian
        matrix = form(
            graph, loss, inputs, targets, params=names, reduction=reduction, kinks=kinks, memory_budget=budget
        )
        return Atlas(
            matrix.names, matrix.shapes, matrix.modules, part=part, reduction=reduction, matrix=matrix, info=matrix.info
        )
    state = graph._evaluate(loss, inputs, targets, reduction=reduction, kinks=kinks, wrt=names)
    names, _ = choose_names(state.program, graph.trainable, params, None)
    return atlas_of(state, names, part, reduction, budget=budget, probes=probes or _PROBES, seed=seed)


def atlas_of(
    state: State,
    names: Sequence[str],
    part: Part,
    reduction: str,
    *,
    budget: int | None = None,
    probes: int = _PROBES,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> Atlas:
    """The atlas at a state, for parameters ``names``; H_F and H by structure and by probes."""
    leaves = [state.program.parameters[name] for name in names]
    modules = [name.rpartition(".")[0] for name in names]
    info = {"loss": state.loss, "samples": state.samples, "coupled": state.coupled}
    shapes = [leaf.shape for leaf in leaves]
    if part == "outer":
        gram = gram_of(state, names, "outer", budget, advance)
        return Atlas(names, shapes, modules, part=part, reduction=reduction, gram=gram, info=info | gram.info)
    request = Request(tuple(names), tuple(leaves), choose_pairs(names, leaves, "all"))
    found = structure(state.program, request, reach(state.program, leaves))
    known = {pair: 0.0 for pair, (outer, inner) in found.items() if not inner and (part == "functional" or not outer)}
    if part == "full":
        outer_only = [pair for pair, (outer, inner) in found.items() if outer and not inner]
        if outer_only:
            known |= _outer_norms(state, names, outer_only, budget)
    work = _memory.budget_bytes(budget, state.weights.device)
    samples = probe(state, names, part, known, count=probes, seed=seed, budget=work, advance=advance)
    info["probes"] = probes
    return Atlas(names, shapes, modules, part=part, reduction=reduction, probes=samples, info=info)


def _outer_norms(state: State, names: Sequence[str], pairs: Sequence[Pair], budget: int | None) -> dict[Pair, float]:
    used = sorted({k for pair in pairs for k in pair})
    at = {k: i for i, k in enumerate(used)}
    norms = frobenius(gram_of(state, [names[k] for k in used], "outer", budget))
    return {(i, j): norms[at[i], at[j]] for i, j in pairs}
