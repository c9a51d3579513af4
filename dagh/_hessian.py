"""The public functions: full Hessian, Gauss–Newton part, functional part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dagh import _memory
from dagh._accumulate import Accumulator
from dagh._assemble import assemble
from dagh._block_base import distinct
from dagh._blockmatrix import BlockMatrix
from dagh._blocks import Block, add_blocks
from dagh._clarke._limiting import resolve
from dagh._clarke._policy import AtKinks
from dagh._clarke._warn import warn_at_ties
from dagh._entries import Entries
from dagh._graph import Graph
from dagh._linearize import Part
from dagh._objectives import Reduction
from dagh._plan import Plan
from dagh._prepare import Blocks, Names, Prepared, prepare
from dagh._programs import Mode
from dagh._request import Pair, Request, module_of
from dagh._state import State, non_finite


@dataclass(frozen=True)
class Decomposition:
    """``full = outer + functional``, computed in one sweep over the graph."""

    full: BlockMatrix
    outer: BlockMatrix
    functional: BlockMatrix


def hessian(
    model: nn.Module | Graph,
    loss: Any,
    inputs: Any,
    targets: Any = None,
    *,
    params: Names = None,
    wrt: Names = None,
    blocks: Blocks = "all",
    reduction: Reduction = "mean",
    kinks: Any = "torch",
    memory_budget: int | str | None = None,
    plan: Plan | None = None,
    output: str | int | None = None,
    mode: Mode = "eval",
) -> BlockMatrix:
    """The exact Hessian of the loss, in blocks.

    Args:
        model: a module, or a :class:`~dagh.Graph` already traced (saves the tracing on repeated calls).
        loss: ``"cross_entropy"``, ``"mse"``, ``"bce"``, ``"bce_with_logits"``, ``"hinge"``, ``"nll"``, ``"l1"``,
            ``"huber"``, ``"smooth_l1"``, ``"squared_hinge"``; a ``torch.nn`` loss module (its options are honoured); or
            a callable ``(output, target) -> scalar``.
        inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; axis 0 is the sample axis.
        targets: a tensor (or nest of tensors) with the samples on axis 0; ``None`` for a loss of the output alone.
        params: names or globs of parameters; default: all that require a gradient.
        wrt: as ``params``, and also names of nodes: an additive probe on that activation (one probe for all samples,
            as a bias would be; one per sample with ``reduction="none"``).
        blocks: ``"all"``, ``"diagonal"``, ``"module"`` (the parameters of each module against each other), or pairs of
            names (globs allowed). Nothing else is formed.
        reduction: ``"mean"``: the loss as PyTorch would average it (a module's own ``reduction``, a callable's own
            value); ``"sum"`` over samples and elements; ``"none"``: one Hessian per sample, blocks ``[N, p_a, p_b]``,
            of the loss of a batch with that sample alone (in a mean over one sample, its class weight cancels).
        kinks: what to take where the Hessian does not exist: ``"torch"``, ``"left"``, ``"right"``, a slope, a dict or
            function of nodes; ``"direction"``, ``"mean"``, ``"min_norm"``, ``"min_norm_block"``, ``"box"``,
            ``"raise"``, or ``"enumerate"`` (the result is then a :class:`~dagh.LimitingSet`); see
            :class:`~dagh.AtKinks` and the docs.
        memory_budget: bytes for results and work, a number or ``"2GiB"`` (default: half of the free memory). It is
            kept to within a tenth from 64 MiB on, or the request is refused (``MemoryBudgetError``).
        plan: a plan made for the same graph and request, e.g. another matrix's ``H.plan``.
        output: which output to differentiate, when the model returns several.
        mode: ``"eval"`` (default) or ``"train"``.

    Returns:
        A :class:`~dagh.BlockMatrix` over the named parameters; ``H["a", "b"]`` is ``p_a × p_b`` in row-major order.

    Raises:
        DaghError: one of its subclasses in :mod:`dagh.errors`, with a one-line message.
    """
    return compute(
        ("full",),
        model,
        loss,
        inputs,
        targets,
        params,
        wrt,
        blocks,
        reduction,
        kinks,
        memory_budget,
        plan,
        output,
        mode,
    )["full"]


def gauss_newton(
    model: nn.Module | Graph,
    loss: Any,
    inputs: Any,
    targets: Any = None,
    *,
    params: Names = None,
    wrt: Names = None,
    blocks: Blocks = "all",
    reduction: Reduction = "mean",
    kinks: Any = "torch",
    memory_budget: int | str | None = None,
    plan: Plan | None = None,
    output: str | int | None = None,
    mode: Mode = "eval",
) -> BlockMatrix:
    """The outer-product Hessian H_O = Σ Jᵀ (∇²ℓ) J, the generalised Gauss–Newton matrix.

    The split is at the model's output: for a model that returns log-probabilities with an ``"nll"`` loss, ∇²ℓ = 0 and
    H_O vanishes; return logits and use ``"cross_entropy"`` for the usual matrix. Arguments as in :func:`hessian`.
    """
    return compute(
        ("outer",),
        model,
        loss,
        inputs,
        targets,
        params,
        wrt,
        blocks,
        reduction,
        kinks,
        memory_budget,
        plan,
        output,
        mode,
    )["outer"]


def functional_hessian(
    model: nn.Module | Graph,
    loss: Any,
    inputs: Any,
    targets: Any = None,
    *,
    params: Names = None,
    wrt: Names = None,
    blocks: Blocks = "all",
    reduction: Reduction = "mean",
    kinks: Any = "torch",
    memory_budget: int | str | None = None,
    plan: Plan | None = None,
    output: str | int | None = None,
    mode: Mode = "eval",
) -> BlockMatrix:
    """The functional part H_F = H - H_O: the curvature of the network itself. Arguments as in :func:`hessian`."""
    return compute(
        ("functional",),
        model,
        loss,
        inputs,
        targets,
        params,
        wrt,
        blocks,
        reduction,
        kinks,
        memory_budget,
        plan,
        output,
        mode,
    )["functional"]


def decompose(
    model: nn.Module | Graph,
    loss: Any,
    inputs: Any,
    targets: Any = None,
    *,
    params: Names = None,
    wrt: Names = None,
    blocks: Blocks = "all",
    reduction: Reduction = "mean",
    kinks: Any = "torch",
    memory_budget: int | str | None = None,
    plan: Plan | None = None,
    output: str | int | None = None,
    mode: Mode = "eval",
) -> Decomposition:
    """Both parts and their sum, from one evaluation. Arguments as in :func:`hessian`.

    Where a block of one part is zero, the sum shares the other's memory: copy what you want to write to.
    """
    found = compute(
        ("full", "outer", "functional"),
        model,
        loss,
        inputs,
        targets,
        params,
        wrt,
        blocks,
        reduction,
        kinks,
        memory_budget,
        plan,
        output,
        mode,
    )
    return Decomposition(found["full"], found["outer"], found["functional"])


def plan(
    model: nn.Module | Graph,
    loss: Any,
    inputs: Any,
    targets: Any = None,
    *,
    part: Part = "full",
    params: Names = None,
    wrt: Names = None,
    blocks: Blocks | Literal["entries"] = "all",
    reduction: Reduction = "mean",
    memory_budget: int | str | None = None,
    routes: Mapping[tuple[str, str], str] | None = None,
    output: str | int | None = None,
    mode: Mode = "eval",
) -> Plan:
    """How :func:`hessian` (or the ``part`` named) would form its blocks, without forming them.

    ``print(plan)`` shows sweeps, routes, sizes, predicted time and memory. ``routes`` overrides the choice for pairs of
    names, with a label out of ``plan.alternatives``; pass the result as ``plan=``. ``blocks="entries"`` is the plan of
    :func:`diagonal`. Other arguments as in :func:`hessian`.

    Raises:
        ReductionError: for a route that a pair does not have; other errors as :func:`hessian` does.
    """
    chosen: Blocks = "diagonal" if blocks == "entries" else blocks
    return prepare(
        (part,), model, loss, inputs, targets, params=params, wrt=wrt, blocks=chosen, reduction=reduction,
        kinks="torch", memory_budget=memory_budget, plan=None, output=output, mode=mode,
        entries=blocks == "entries", routes=routes,
    ).plan  # fmt: skip


def compute(
    wanted: tuple[str, ...],
    model: nn.Module | Graph,
    loss: Any,
    inputs: Any,
    targets: Any,
    params: Names,
    wrt: Names,
    blocks: Blocks,
    reduction: Reduction,
    kinks: Any,
    memory_budget: int | str | None,
    plan: Plan | None,
    output: str | int | None,
    mode: Mode,
    entries: bool = False,
) -> dict[str, BlockMatrix]:
    """The matrices of the parts ``wanted``; with ``entries``, diagonal blocks of their diagonals alone."""
    at = AtKinks.of(kinks)
    ready = prepare(
        wanted, model, loss, inputs, targets, params=params, wrt=wrt, blocks=blocks, reduction=reduction,
        kinks=kinks if at is None else None, memory_budget=memory_budget, plan=plan, output=output, mode=mode,
        entries=entries,
    )  # fmt: skip
    if kinks == "torch":
        warn_at_ties(ready.graph, ready.state)
    request, budget = ready.request, ready.budget
    needed = ready.plan.result_bytes * len(wanted)
    if needed > budget:
        what = f"{len(request.pairs)} blocks" if len(request.pairs) > 1 else "one block"
        raise _memory.refuse(what, request.total, needed, budget, ready.state.weights.device)
    if memory_budget is not None:
        least = ready.plan.peak_memory
        if least > _memory.TOLERANCE * max(budget, _memory.ENFORCED):
            raise _memory.too_tight(least, budget, ready.state.samples)

    def matrices(state: State) -> dict[str, BlockMatrix]:
        return _matrices(wanted, state, ready, reduction)

    return matrices(ready.state) if at is None else resolve(at, ready.state, request.leaves, matrices)


def _matrices(wanted: tuple[str, ...], state: State, ready: Prepared, reduction: Reduction) -> dict[str, BlockMatrix]:
    request, plan, graph = ready.request, ready.plan, ready.graph
    program, keep, budget = state.program, plan.keep, ready.budget
    parts = plan.parts
    kind = Entries if request.entries else Accumulator
    sums = {part: kind(request, state, plan) for part in parts}
    if wanted == ("full",):
        sums["outer"] = sums["functional"]
    assemble(state, request, plan, parts=sums, budget=budget)
    aliases = {a: name for name, leaf in zip(request.names, request.leaves, strict=True) for a in leaf.names[1:]}
    info = {"loss": state.loss, "samples": state.samples, "method": graph.method, "coupled": state.coupled}
    info |= {"aliases": aliases} if aliases else {}
    out: dict[str, BlockMatrix] = {}
    if wanted == ("full",):
        pieces = {"full": sums["functional"].finished()}
    else:
        pieces = {part: result.finished() for part, result in sums.items()}
        if "full" in wanted:
            both = pieces["functional"].items()
            pieces["full"] = {pair: add_blocks(pieces["outer"][pair], block) for pair, block in both}
    for part in wanted:
        found = pieces[part]
        if not all(_finite(t) for t in distinct(found.values())):
            assert program.loss is not None
            raise non_finite(program, state.values, program.loss)
        out[part] = _matrix(part, found, request, state, plan, reduction, keep, ready.budget, info)
    return out


def _finite(t: Tensor) -> bool:
    # One pass settles nearly every case; only a sum that overflows needs the second look.
    return math.isfinite(float(t.sum())) or bool(torch.isfinite(t).all())


def _matrix(
    part: str,
    blocks: Mapping[Pair, Block],
    request: Request,
    state: State,
    plan: Plan,
    reduction: Reduction,
    keep: bool,
    memory_budget: int | None,
    info: dict[str, Any],
) -> BlockMatrix:
    modules = [module_of(name, leaf) for name, leaf in zip(request.names, request.leaves, strict=True)]
    return BlockMatrix(
        request.names,
        [leaf.shape for leaf in request.leaves],
        blocks,
        part=part,
        reduction=reduction,
        samples=state.samples if keep else None,
        modules=modules,
        memory_budget=memory_budget,
        kinds=dict(plan.kinds),
        dtype=state.weights.dtype,
        device=state.weights.device,
        plan=plan,
        info=info,
    )
