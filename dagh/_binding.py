"""Binding a captured graph to a model: its tensors become the leaves of a program."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dagh import _capture
from dagh._inputs import input_labels, parameter_names, resize
from dagh._ir import Node, Program
from dagh._lowering import Builder, dropout_mask
from dagh._outputs import choose_output, prune
from dagh.errors import DtypeError

if TYPE_CHECKING:
    from dagh._state import State


def lower_model(
    model: nn.Module,
    captured: _capture.Captured,
    batch: int,
    example: tuple[tuple[Any, ...], dict[str, Any]],
    rows: Collection[int],
    *,
    mode: str,
    dropout_seed: int | None,
    per_sample: bool,
    output: str | int | None,
) -> tuple[Program, str]:
    """The program of a batch of this size, and the name of the output it ends in.

    ``rows``: positions of the inputs that carry the samples along axis 0. Tied parameters become one leaf; buffers are
    read from the model at every evaluation.
    """
    args, kwargs = example
    tied = parameter_names(model)
    flat, _ = pytree.tree_flatten((args, kwargs))
    named = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    builder = Builder(dropout_seed=dropout_seed)
    with _capture.in_mode(model, mode), torch.no_grad():
        leaf_of: dict[str, Node] = {}
        for names in tied:
            node = builder.leaf(names[0], "parameter", named[names[0]], names=names)
            leaf_of.update(dict.fromkeys(names, node))
        buffer_nodes: dict[str, Node] = {}
        inputs: list[Node] = []
        supplied: list[Any] = []
        labels = input_labels(model, args, kwargs)
        for kind, what in captured.leaves:
            if kind == "parameter":
                supplied.append(leaf_of[what])
            elif kind == "buffer":
                if what not in buffer_nodes:
                    buffer_nodes[what] = builder.leaf(what, "constant", buffers[what], names=(what,))
                    buffer_nodes[what].value = None
                supplied.append(buffer_nodes[what])
            elif kind == "constant":
                supplied.append(builder.constant(what) if isinstance(what, Tensor) else what)
            else:
                x = flat[what]
                if not isinstance(x, Tensor):
                    supplied.append(x)
                    continue
                sample = resize(x, batch) if what in rows else x
                node = builder.leaf(labels[what], "input", sample, batched=what in rows and per_sample)
                node.names = (str(what),)
                inputs.append(node)
                supplied.append(node)
        results = builder.walk(captured.module, supplied)
    for made in builder.nodes:
        if made.dtype in (torch.float16, torch.bfloat16) or made.dtype.is_complex:
            where = f" in {made.module!r}" if made.module else ""
            raise DtypeError(
                f"node {made.name!r}{where} is {str(made.dtype)[6:]}; dagh needs float32 or float64 throughout"
            )
    flat_out = pytree.tree_leaves(results) if not isinstance(results, (list, tuple)) else list(results)
    outputs = [flat_out[i] for i in captured.outputs]
    node, name = choose_output(captured.names, outputs, output)
    kinds = {p.dtype for p in leaf_of.values() if p.dtype.is_floating_point}
    if len(kinds) == 1 and node.dtype not in kinds:
        raise DtypeError(
            f"the model's parameters are {str(kinds.pop())[6:]} and its output is {str(node.dtype)[6:]}: it casts on "
            "the way; use that dtype for both, or leave out the cast"
        )
    return prune(builder.nodes, {names[0]: leaf_of[names[0]] for names in tied}, inputs, node), name


def leaf_values(
    model: nn.Module, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], coupled: bool
) -> dict[Node, Tensor]:
    """Values of a program's leaves, ``[N or 1, *shape]``, as the model and the inputs are now."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    flat, _ = pytree.tree_flatten((args, kwargs))
    n = _capture.batch_size(args, kwargs)
    leaves: dict[Node, Tensor] = {}
    for node in program:
        if node.op is not None:
            continue
        if node.kind == "parameter":
            leaves[node] = parameters[node.names[0]].detach().unsqueeze(0)
        elif node.dropout is not None:
            rows = n if node.batched and not coupled else 1
            known = [*parameters.values(), *(t for t in flat if isinstance(t, Tensor))]
            like = known[0].new_empty((), dtype=node.dtype).expand(rows, *node.shape)
            leaves[node] = dropout_mask(like, *node.dropout)
        elif node.kind == "constant":
            value = node.value if node.value is not None else buffers[node.names[0]].detach()
            leaves[node] = value.unsqueeze(0)
        elif node.kind == "input":
            x = flat[int(node.names[0])].detach()
            leaves[node] = x.unsqueeze(1) if node.batched and not coupled else x.unsqueeze(0)
    return leaves


def unbind(state: State) -> None:
    """Copy values that share memory with the model or the data, so that the state does not move with them."""
    live = {v.untyped_storage().data_ptr() for n, v in state.values.items() if n.op is None}
    for node, value in state.values.items():
        if value.untyped_storage().data_ptr() in live:
            state.values[node] = value.clone()
    state._calls.clear()
