"""Appending a loss to a model's program."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dagh import _capture
from dagh._ir import Node, Program
from dagh._lowering import Builder
from dagh._objectives import Objective, blamed_on
from dagh.errors import LossError


def append_loss(
    base: Program, objective: Objective, output: Tensor, targets: list[Tensor], spec: Any, *, batched: bool
) -> Program:
    """``base`` followed by the loss, traced at these values of its output and targets (of one sample, or the batch).

    Raises :class:`~dagh.errors.LossError` for losses that fail, are not scalar, do not depend on the output, or close
    over something that requires a gradient (its derivatives would be lost).
    """

    def function(out: Tensor, *ts: Tensor) -> Any:
        return objective.summed(out, pytree.tree_unflatten(list(ts), spec) if targets else None)

    with torch.no_grad(), blamed_on(objective.name, output, targets):
        value = function(output.clone(), *targets)
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise LossError(f"loss {objective.name!r} must return a scalar; it returned {shape}")
    with blamed_on(objective.name, output, targets):
        traced = _capture.trace_function(function, [output.detach().clone(), *targets])
    for t in [*traced.parameters(), *traced.buffers()]:
        if t.requires_grad:
            raise LossError(
                f"loss {objective.name!r} closes over a tensor of shape {tuple(t.shape)} that requires a gradient; "
                "make it an output of the model, or detach it"
            )
    builder = Builder("loss", taken=base.by_name)
    with torch.no_grad():
        leaves = [
            builder.leaf("target" if len(targets) == 1 else f"target_{i}", "target", t, batched=batched)
            for i, t in enumerate(targets)
        ]
        result = builder.walk(traced, [builder.adopt(base.output, output.detach()), *leaves])
        if result is base.output:  # the model computes its loss itself
            result = builder.emit(torch.ops.aten.sum.default, result)
    nodes = [*base.nodes, *builder.nodes]
    for made in builder.nodes:
        if made.dtype.is_complex and _depends(nodes, made, base.output):
            raise LossError(
                f"loss {objective.name!r} makes the output complex (node {made.name!r}), which has no rules; "
                "write it with real and imaginary parts"
            )
    if not isinstance(result, Node) or not _depends(nodes, result, base.output):
        raise LossError(f"loss {objective.name!r} does not depend on the model's output through tensor operations")
    if "loss" not in base.by_name:
        result.name = "loss"
    program = Program(nodes, base.parameters, base.inputs, base.output, leaves, result)
    keep = program.ancestors([result]) | {*base.parameters.values(), *leaves, *base.inputs}
    return Program([n for n in nodes if n in keep], base.parameters, base.inputs, base.output, leaves, result)


def _depends(nodes: list[Node], result: Node, source: Node) -> bool:
    reached = {source}
    for node in nodes:
        if any(p in reached for p in node.inputs):
            reached.add(node)
    return result in reached
