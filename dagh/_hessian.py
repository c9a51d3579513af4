"""The public functions: full Hessian, Gauss–Newton part, functional part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from dagh import _memory
from dagh._assemble import Accumulator, assemble
from dagh._blockmatrix import BlockMatrix
from dagh._blocks import DenseBlock, ZeroBlock
from dagh._clarke._limiting import resolve
from dagh._clarke._policy import AtKinks
from dagh._clarke._warn import warn_at_ties
from dagh._graph import Graph, Mode, trace
from dagh._objectives import Reduction
from dagh._planner import Plan, make_plan
from dagh._request import Pair, Request, choose_names, choose_pairs, itemsize
from dagh._rules._generic import quiet_batching
from dagh._state import State, non_finite
from dagh.errors import ReductionError

Names: TypeAlias = str | Iterable[str] | None
Blocks: TypeAlias = Literal["all", "diagonal"] | Sequence[tuple[str, str]]


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
        blocks: ``"all"``, ``"diagonal"``, or pairs of names (globs allowed). Nothing else is formed.
        reduction: ``"mean"``: the loss as PyTorch would average it (a module's own ``reduction``, a callable's own
            value); ``"sum"`` over samples; ``"none"``: one Hessian per sample, blocks ``[N, p_a, p_b]``.
        kinks: what to take where the Hessian does not exist: ``"torch"``, ``"left"``, ``"right"``, a slope, a dict or
            function of nodes; ``"direction"``, ``"mean"``, ``"min_norm"``, ``"min_norm_block"``, ``"raise"``, or
            ``"enumerate"`` (the result is then a :class:`~dagh.LimitingSet`); see :class:`~dagh.AtKinks` and the docs.
        memory_budget: bytes for results and work, a number or ``"2GiB"`` (default: half of the free memory).
        plan: a plan made for the same graph and request, e.g. another matrix's ``H.plan``.
        output: which output to differentiate, when the model returns several.
        mode: ``"eval"`` (default) or ``"train"``.

    Returns:
        A :class:`~dagh.BlockMatrix` over the named parameters; ``H["a", "b"]`` is ``p_a × p_b`` in row-major order.

    Raises:
        DaghError: one of its subclasses in :mod:`dagh.errors`, with a one-line message.
    """
    return _compute(
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
    return _compute(
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
    return _compute(
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
    """Both parts and their sum, from one evaluation. Arguments as in :func:`hessian`."""
    found = _compute(
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


def _compute(
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
) -> dict[str, BlockMatrix]:
    if isinstance(memory_budget, str):
        memory_budget = _memory.parse_size(memory_budget)
    graph = model if isinstance(model, Graph) else trace(model, inputs, mode=mode, output=output)
    first = graph.program
    names, _ = choose_names(first, graph.trainable, params, wrt)
    choose_pairs(names, blocks)
    at = AtKinks.of(kinks)
    state = graph.evaluate(loss, inputs, targets, reduction=reduction, kinks=kinks if at is None else None, wrt=names)
    if kinks == "torch":
        warn_at_ties(graph, state)
    program = state.program
    names, leaves = choose_names(program, graph.trainable, params, wrt)
    request = Request(names, leaves, choose_pairs(names, blocks))
    parts = (
        ("outer",)
        if wanted == ("outer",)
        else ("functional",)
        if wanted == ("functional",)
        else ("outer", "functional")
    )
    keep = reduction == "none"
    budget = _check_budget(request, state, len(wanted) + (len(parts) > 1), keep, memory_budget)
    signature = (id(graph), names, request.pairs, id(program), "functional" in parts)
    if plan is None:
        plan = make_plan(program, request, functional="functional" in parts)
        plan.signature = signature
    elif not isinstance(plan, Plan):
        raise ReductionError(f"plan must be a Plan such as H.plan, not {type(plan).__name__}")
    elif (plan.names, plan.pairs) != (names, request.pairs) or plan.signature[3] != id(program):
        raise ReductionError("the plan was made for another graph or request; leave plan=None to make a new one")
    elif signature[4] and not plan.signature[4]:
        raise ReductionError("the plan was made for gauss_newton and has no sweeps for H_F; leave plan=None")

    def compute(state: State) -> dict[str, BlockMatrix]:
        return _matrices(wanted, state, request, plan, parts, reduction, keep, budget, memory_budget, graph)

    return compute(state) if at is None else resolve(at, state, leaves, compute)


def _matrices(
    wanted: tuple[str, ...],
    state: State,
    request: Request,
    plan: Plan,
    parts: tuple[str, ...],
    reduction: Reduction,
    keep: bool,
    budget: int,
    memory_budget: int | None,
    graph: Graph,
) -> dict[str, BlockMatrix]:
    program = state.program
    with quiet_batching():
        pieces = assemble(state, request, plan, parts=parts, keep=keep, budget=budget)
    if not all(bool(torch.isfinite(block).all()) for piece in pieces.values() for block in piece.blocks.values()):
        assert program.loss is not None
        raise non_finite(program, state.values, program.loss)
    info = {"loss": state.loss, "samples": state.samples, "method": graph.method, "coupled": state.coupled}
    out: dict[str, BlockMatrix] = {}
    for part in wanted:
        tensors = _sum_parts([pieces[p] for p in parts]) if part == "full" else pieces[part].blocks
        if part == "full" and len(wanted) == 1:
            pieces.clear()
        out[part] = _matrix(part, tensors, request, state, plan, reduction, keep, memory_budget, info, graph)
    return out


def _check_budget(request: Request, state: State, copies: int, keep: bool, memory_budget: int | None) -> int:
    device = state.weights.device
    budget = _memory.budget_bytes(memory_budget, device)
    needed = request.elements * itemsize(state.weights.dtype) * (state.samples if keep else 1) * copies
    if needed > budget:
        what = f"{len(request.pairs)} blocks" if len(request.pairs) > 1 else "one block"
        raise _memory.refuse(what, request.total, needed, budget, device)
    return budget


def _sum_parts(parts: list[Accumulator]) -> dict[Pair, Tensor]:
    total = dict(parts[0].blocks)
    for part in parts[1:]:
        for pair, block in part.blocks.items():
            total[pair] = total[pair] + block if pair in total else block
    return total


def _matrix(
    part: str,
    tensors: Mapping[Pair, Tensor],
    request: Request,
    state: State,
    plan: Plan,
    reduction: Reduction,
    keep: bool,
    memory_budget: int | None,
    info: dict[str, Any],
    graph: Graph,
) -> BlockMatrix:
    sizes, samples = request.sizes, state.samples if keep else None
    dtype, device = state.weights.dtype, state.weights.device
    blocks = {
        (i, j): DenseBlock(tensors[i, j])
        if (i, j) in tensors
        else ZeroBlock((sizes[i], sizes[j]), dtype=dtype, device=device, samples=samples)
        for i, j in request.pairs
    }
    modules = [
        _module_of(name, leaf.kind, leaf.module) for name, leaf in zip(request.names, request.leaves, strict=True)
    ]
    return BlockMatrix(
        request.names,
        [leaf.shape for leaf in request.leaves],
        blocks,
        part=part,
        reduction=reduction,
        samples=samples,
        modules=modules,
        memory_budget=memory_budget,
        kinds=dict(plan.kinds),
        dtype=dtype,
        device=device,
        plan=plan,
        info=info,
    )


def _module_of(name: str, kind: str, module: str) -> str:
    return name.rpartition(".")[0] if kind == "parameter" else module
